"""Secrets go only where they are needed: a model's own code never sees the token or the webhook."""

from __future__ import annotations

import json
import os
import shutil
import string
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.fleet.cluster import Where, compute
from pipeline.loopback import LoopbackHub
from tests.pipeline.runs import MODELS
from tests.workers.jobs import job
from tests.workers.warm_entries import __name__ as ENTRIES
from workers.machine import child
from workers.machine.secrets import NO_LOGIN, is_secret, without_secrets
from workers.machine.warm import Parent, Parents
from workers.run import StageRequest, run_stage
from workers.spec.job import Destination, Job, Stage, StageResult

TOKEN, WEBHOOK = "hf_" + "thisTokenMustNotBeSeen0123", "https://hooks.example.com/services/T0/B0/secret"
SECRETS = {
    "HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "QUANTMILL_WEBHOOK": WEBHOOK, "RAY_AUTH_TOKEN": "abc",
    "AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "s", "AWS_PROFILE": "prod", "AZURE_STORAGE_KEY": "s",
    "GOOGLE_APPLICATION_CREDENTIALS": "/key.json", "FSSPEC_S3_KEY": "s", "WANDB_API_KEY": "s", "OPENAI_APIKEY": "s",
    "DB_PASSWORD": "s", "github_token": "s", "HF_OIDC_RESOURCE": "r", "ACTIONS_ID_TOKEN_REQUEST_URL": "u",
    "HTTPS_PROXY": "http://user:pass@proxy:3128", "SOMETHING": f"Bearer {TOKEN}", "SSH_AUTH_SOCK": "/tmp/agent",
}  # fmt: skip
NEEDED = {
    "PATH": "/bin", "HOME": "/root", "HF_HOME": "/cache", "HF_ENDPOINT": "https://hub.example.com",
    "LD_LIBRARY_PATH": "/x",
    "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1", "HTTP_PROXY": "http://proxy:1",
    "PYTORCH_CUDA_ALLOC_CONF": "x", "QUANTMILL_ENVS": "/envs", "XDG_CACHE_HOME": "/c", "TRITON_CACHE_DIR": "/t",
    "TORCHINDUCTOR_CACHE_DIR": "/i", "NCCL_SOCKET_IFNAME": "eth0", "MAX_TOKENS_X": "8",
}  # fmt: skip
# Writes what each process that imports it can see.
CODE = """
import json, os, sys
from pathlib import Path
from huggingface_hub import get_token
from transformers import LlamaForCausalLM

seen = {"environment": dict(os.environ), "token": get_token(), "entry": sys.argv[0]}
Path(os.environ["SEEN"], f"{os.getpid()}.json").write_text(json.dumps(seen))

class OwnForCausalLM(LlamaForCausalLM):
    pass
"""


@given(where=st.sampled_from(sorted(SECRETS)), name=st.text(string.ascii_uppercase + "_", max_size=8))
def test_names_and_values_of_secrets_are_known(where: str, name: str) -> None:
    assert is_secret(where, SECRETS[where])
    assert is_secret(f"{name}_TOKEN", "x")
    assert is_secret(f"{name}_SECRET_{name}", "x")
    assert is_secret(name, f"https://user:{name or 'x'}@host/")


def test_what_computing_needs_is_kept() -> None:
    kept = without_secrets({**NEEDED, **SECRETS})
    assert kept == {**{name: value for name, value in NEEDED.items() if name != "MAX_TOKENS_X"}, **NO_LOGIN}


@pytest.mark.parametrize("warm", [False, True])
def test_every_process_that_is_asked_is_without_them(warm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)

    def check(address: str | None) -> None:
        ended = child.run(f"{ENTRIES}:echo", "null", warm=address, environment={**os.environ, "OMP_NUM_THREADS": "1"})
        assert ended.note is None
        environment = json.loads(ended.answer or "{}")["environment"]
        assert "OMP_NUM_THREADS" in environment
        assert not set(SECRETS) & set(environment)

    if not warm:
        check(None)
        return
    with Parent(modules=[ENTRIES]) as parent:
        check(parent.address)
        # A fork has its parent's memory, and may read what the parent was started with.
        assert TOKEN.encode() not in Path(f"/proc/{parent.pid}/environ").read_bytes()
    _, environment = child.script("workers.machine.child")
    assert not set(SECRETS) & set(environment)


def own_code(folder: Path) -> Path:
    model = shutil.copytree(MODELS / "llama-tiny", folder / "own")
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "modeling_own.py").write_text(CODE)
    return model


@pytest.mark.slow
def test_a_models_own_code_sees_none_and_publishing_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantize, verify and the runtime run the code that comes with the model; publish has the token."""
    (tmp_path / "seen").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)  # a stored login, beside the environment
    for name, value in {**SECRETS, "SEEN": str(tmp_path / "seen"), "HF_HOME": str(tmp_path / "home")}.items():
        if name not in ("HTTPS_PROXY", "HF_OIDC_RESOURCE"):  # publishing would go by them
            monkeypatch.setenv(name, value)
    made = job(own_code(tmp_path), tmp_path / "work", "bnb-nf4")
    pin = made.model.model_copy(update={"trust_remote_code": True})
    order = made.orders[0].model_copy(update={"repo_id": "acme/own-bnb-nf4"})
    made = made.model_copy(update={"model": pin, "orders": (order,)})
    with closing(Parents()) as parents:
        for stage, recipe in ((Stage.QUANTIZE, None), (Stage.VERIFY, "bnb-nf4")):
            result = computed(made, stage, recipe, parents)
            assert result.failure is None, result.failure
            assert result.notes == ()
    assert result.manifest is not None
    assert result.manifest.verdict.accepted, result.manifest.verdict.reasons
    seen = [json.loads(path.read_text()) for path in (tmp_path / "seen").glob("*.json")]
    assert len(seen) == 4, "quantize, verify, the source as transformers loads it, and the runtime"
    for each in seen:
        assert each["token"] is None
        assert not set(SECRETS) & set(each["environment"])
        assert TOKEN not in json.dumps(each)
    with LoopbackHub(tmp_path / "hub", token=TOKEN) as hub:
        published = made.model_copy(update={"destination": Destination(endpoint=hub.endpoint)})
        result = run_stage(published, Stage.PUBLISH, "bnb-nf4")
        assert result.failure is None, result.failure
        assert result.commit


def computed(made: Job, stage: Stage, recipe: str | None, parents: Parents) -> StageResult:
    request = StageRequest(job=made, stage=stage, recipe=recipe, seconds=600.0).model_dump_json()
    return StageResult.model_validate_json(compute(request, Where(None, None, 1), parents.address()))
