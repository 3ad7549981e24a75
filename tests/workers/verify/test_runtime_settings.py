"""The runtime check judges the artifact: its settings of generation, and packages beside it, are told apart from it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.workers.jobs import ZOO, job
from workers.checkpoint.source import Source
from workers.machine import child
from workers.model.generation import GENERATION_CONFIG
from workers.run import run_stage
from workers.spec.job import Job, Manifest, ReasonCode, Stage
from workers.spec.workspace import artifact_folder
from workers.verify.comparison import Comparison
from workers.verify.runtimes.ask import RuntimeAnswer

LLAMA = ZOO / "models" / "llama-tiny"
RTN = "rtn-w4-g128"


def made(model: Path, workspace: Path, *recipes: str) -> Job:
    of = job(model, workspace, *recipes)
    result = run_stage(of, Stage.QUANTIZE)
    assert [artifact.error for artifact in result.artifacts] == [None] * len(recipes), result.failure
    return of


def verified(of: Job, name: str = RTN) -> Manifest:
    result = run_stage(of, Stage.VERIFY, name)
    assert result.manifest is not None, result.failure
    return result.manifest


def with_settings(content: str, folder: Path) -> Path:
    shutil.copytree(LLAMA, folder)
    (folder / GENERATION_CONFIG).write_text(content)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_peculiar_settings_make_the_same_verdict(tmp_path: Path) -> None:
    plain = verified(made(LLAMA, tmp_path / "plain", "gptq-w8-g128"), "gptq-w8-g128").verdict
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    odd = {
        "stop_strings": ["</s>"],
        "do_sample": True,
        "num_return_sequences": 3,
        "num_beams": 3,
        "repetition_penalty": 1.5,
        "return_dict_in_generate": True,
    }
    model = with_settings(json.dumps({**ids, **odd}), tmp_path / "model")
    peculiar = verified(made(model, tmp_path, "gptq-w8-g128"), "gptq-w8-g128")
    assert peculiar.verdict.accepted, peculiar.verdict.reasons
    assert peculiar.verdict.generations == plain.generations
    assert GENERATION_CONFIG in peculiar.files, "the artifact's users have them as they were"


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("content", "kept"),
    [("{broken", True), ("[]", False), ('{"num_return_sequences": 3}', False), ('{"max_new_tokens": -1}', False)],
)
def test_settings_with_which_nothing_loads_are_left_out(content: str, kept: bool, tmp_path: Path) -> None:
    of = made(with_settings(content, tmp_path / "model"), tmp_path, RTN)
    manifest = verified(of)
    assert manifest.verdict.accepted, manifest.verdict.reasons
    assert (GENERATION_CONFIG in manifest.files) == kept
    notes = [note for note in manifest.fallbacks if note.startswith(f"{GENERATION_CONFIG} left out")]
    assert len(notes) == (not kept)


@pytest.mark.usefixtures("forked")
def test_settings_that_come_later_are_the_files_problem(tmp_path: Path) -> None:
    of = made(LLAMA, tmp_path, RTN)
    (artifact_folder(tmp_path, of.orders[0]) / GENERATION_CONFIG).write_text('{"max_new_tokens": -1}')
    answer = asked(of)
    (reason,) = answer.problems
    assert reason.startswith("runtime transformers: generation_config.json: from_pretrained fails on its settings")
    assert answer.logits is not None
    assert 1 <= len(answer.generated) <= 4


@pytest.mark.usefixtures("forked")
def test_settings_in_the_config_with_which_nothing_loads_are_its_problem(tmp_path: Path) -> None:
    folder = with_settings("", tmp_path / "model")
    (folder / GENERATION_CONFIG).unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_return_sequences": 3}))
    verdict = verified(made(folder, tmp_path, RTN)).verdict
    (reason,) = verdict.reasons
    assert reason.startswith("runtime transformers: config.json: from_pretrained fails on its settings of generation")
    assert verdict.runtime is not None


def asked(of: Job) -> RuntimeAnswer:
    """The runtime's answer alone."""
    with Source(Path(of.model.folder or "")) as source:
        (answer,) = Comparison.of_job(of, source)._ask(artifact_folder(of.workspace, of.orders[0]), ())
        return answer


@pytest.mark.usefixtures("forked")
def test_where_nothing_is_generated_the_logits_stay(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    (folder / "modeling_mute.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass Mute(LlamaForCausalLM):\n"
        "    def generate(self, *args, **kwargs):\n        raise NotImplementedError('of an older cache')\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mute.Mute"}
    (folder / "config.json").write_text(json.dumps(config))
    of = job(folder, tmp_path, RTN)
    of = of.model_copy(update={"model": of.model.model_copy(update={"trust_remote_code": True})})
    assert run_stage(of, Stage.QUANTIZE).artifacts[0].error is None
    verdict = verified(of).verdict
    assert verdict.reasons == ("runtime transformers: generates not: NotImplementedError: of an older cache",)
    assert verdict.codes == (ReasonCode.RUNTIME,)
    assert verdict.runtime is not None
    assert verdict.runtime.relative_logit_difference < 0.01
    assert verdict.metrics is not None


@pytest.fixture
def peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name, for processes from nothing: with it, transformers looks for adapters."""
    package = tmp_path / "packages" / "peft"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.99.0'\n")
    info = package.parent / "peft-0.99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.99.0\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv(child.WARM, raising=False)


def save_adapter(folder: Path) -> None:
    content = {"peft_type": "LORA", "base_model_name_or_path": "somebody/else", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(8, 8)}, folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.usefixtures("peft")
def test_artifacts_load_beside_peft(tmp_path: Path) -> None:
    seen = child.run("tests.workers.verify.test_runtime_settings:peft_is_available", "{}")
    assert seen.answer == "True", seen.stderr
    manifest = verified(made(LLAMA, tmp_path, RTN))
    assert manifest.verdict.accepted, manifest.verdict.reasons


def peft_is_available(_: str) -> str:
    """Entry: whether transformers sees the package."""
    from transformers.utils import is_peft_available

    return str(is_peft_available())


@pytest.mark.slow
@pytest.mark.usefixtures("peft")
def test_an_adapter_beside_a_model_is_neither_read_nor_copied(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    save_adapter(folder)
    manifest = verified(made(folder, tmp_path, RTN))
    assert manifest.verdict.accepted, manifest.verdict.reasons
    assert manifest.source_check is not None
    assert manifest.source_check.relative_logit_difference < 1e-5
    assert not [name for name in manifest.files if name.startswith("adapter_")]
