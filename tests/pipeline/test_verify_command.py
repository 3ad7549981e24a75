"""``quantmill verify`` on checkpoints of other tools, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from pipeline import checking
from pipeline.cli.main import main
from tests.workers.faults import PLANTED
from tests.workers.jobs import ZOO, job
from workers.machine.warm import Parents
from workers.run import run_stage
from workers.spec.job import Stage
from workers.spec.workspace import artifact_folder

LLAMA, MOE = ZOO / "models" / "llama-tiny", ZOO / "models" / "qwen3-moe-tiny"
Verify = Callable[..., tuple[int, str]]
TEXT = ZOO / "text" / "heldout.txt"


def words(checkpoint: Path | str, reference: Path | str, out: Path, *more: str) -> list[str]:
    asked = ["verify", str(checkpoint), "--reference", str(reference), "--text", str(TEXT), "--tokens", "2048"]
    return [*asked, "--sequence-length", "256", "--out", str(out), *more]


def verify_in_a_process(*asked: Any) -> tuple[int, str]:
    command = [sys.executable, "-m", "pipeline.cli", *words(*asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})
    return done.returncode, done.stdout + done.stderr


class Lent:
    """Parents that go on when whoever had them is done."""

    def __init__(self, parents: Parents) -> None:
        self.address = parents.address

    def close(self) -> None:
        """They're another's."""


@pytest.fixture
def verify(parents: Parents, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """The command in this process, with parents that have imported already; the rest runs in forks of theirs."""
    monkeypatch.setattr(checking, "Parents", lambda modules=None: Lent(parents))

    def call(*asked: Any) -> tuple[int, str]:
        done = CliRunner(env={"COLUMNS": "200"}).invoke(main, words(*asked))
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    return call


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in a folder of its own, without anything that quantmill keeps beside it."""
    of = job(LLAMA, tmp_path_factory.mktemp("ours"), "rtn-w4-g128")
    assert run_stage(of, Stage.QUANTIZE).artifacts[0].error is None
    return artifact_folder(of.workspace, of.orders[0])


@pytest.mark.slow
def test_a_checkpoint_of_bitsandbytes_is_accepted_and_the_table_says_by_what(tmp_path: Path) -> None:
    config = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    tf.AutoModelForCausalLM.from_pretrained(LLAMA, quantization_config=config).save_pretrained(tmp_path / "nf4")
    tf.AutoTokenizer.from_pretrained(LLAMA).save_pretrained(tmp_path / "nf4")
    code, said = verify_in_a_process(tmp_path / "nf4", LLAMA, tmp_path)
    assert code == 0, said
    for words in ("28 of 28 linear layers", "KL divergence", "95 % bound", "transformers 5", "goes on, 1", "noisiest"):
        assert words in said
    assert "ACCEPT by the gates of nf4" in said


@pytest.mark.night
def test_another_tools_mixture_that_transformers_loads_at_random_is_rejected(verify: Verify, tmp_path: Path) -> None:
    """gptqmodel's own GPTQ of a mixture of experts: right by its codes, and loaded silently wrong."""
    code = (
        "import sys, torch\nfrom gptqmodel import GPTQModel\nfrom gptqmodel.quantization.config import GPTQConfig\n"
        "model = GPTQModel.load(sys.argv[1], GPTQConfig(bits=4, group_size=128))\n"
        "rows = torch.randint(3, 2000, (16, 128))\n"
        "model.quantize([{'input_ids': r[None], 'attention_mask': torch.ones_like(r[None])} for r in rows])\n"
        "model.save(sys.argv[2])\n"
    )
    quiet = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-c", code, str(MOE), str(tmp_path / "made")]
    subprocess.run(command, cwd=tmp_path, env=quiet, check=True, capture_output=True)
    code_, said = verify(tmp_path / "made", MOE, tmp_path)
    assert code_ == 1
    assert "missing keys on loading, got ['model.layers.0.mlp.experts" in said
    assert "runtime logits of transformers differ from our decoding" in said
    assert "REGRESSION" in said


@pytest.mark.slow
def test_a_method_that_transformers_does_not_know_is_rejected(verify: Verify, ours: Path, tmp_path: Path) -> None:
    """As modelopt writes it: a quant_method that is ignored, and scales that are left over."""
    folder = Path(shutil.copytree(ours, tmp_path / "made"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (folder / "config.json").write_text(json.dumps(config))
    code, said = verify(folder, LLAMA, tmp_path, "--json")
    verdict = json.loads(said)["verdict"]
    assert (code, verdict["outcome"]) == (1, "REGRESSION")
    assert any("unexpected keys on loading" in reason for reason in verdict["reasons"])
    assert any("quant_method 'modelopt'" in reason for reason in verdict["reasons"])


def test_experts_under_other_names_are_rejected(verify: Verify, tmp_path: Path) -> None:
    """As llm-compressor writes Mixtral: the experts by names that the model's own loader doesn't look for."""
    folder = Path(shutil.copytree(MOE, tmp_path / "made"))
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace(".mlp.experts.", ".block_sparse_moe.experts."): t for name, t in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    code, said = verify(folder, MOE, tmp_path)
    assert code == 1
    assert "integrity: tensors missing: model.layers.0.mlp.experts.0.down_proj.weight" in said


@pytest.mark.parametrize("fault", ["scales shifted by one group", "a truncated shard"])
def test_a_fault_in_a_checkpoint_of_ours_is_named(verify: Verify, fault: str, ours: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ours, tmp_path / "made"))
    PLANTED[fault].plant(folder)
    code, said = verify(folder, LLAMA, tmp_path)
    assert code == 1
    assert PLANTED[fault].said in said


def test_the_tokenizer_counts_by_what_it_does(verify: Verify, ours: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ours, tmp_path / "made"))
    tf.AutoTokenizer.from_pretrained(LLAMA).save_pretrained(folder)  # other bytes, the same tokenizer
    PLANTED["another tokenizer"].plant(folder)
    code, said = verify(folder, LLAMA, tmp_path)
    assert code == 1
    assert "the tokenizer differs from the source's: tokens of the held-out text, vocabulary" in said


def test_a_runtime_is_named_and_the_table_says_what_was_checked(verify: Verify, ours: Path, tmp_path: Path) -> None:
    code, said = verify(ours, LLAMA, tmp_path, "--runtime", "Transformers")
    assert code == 0, said
    assert re.search(r"transformers 5[\d.]* on \w+( with [\w-]+)?: checked, logits differ by", said)


def test_a_runtime_that_is_unknown_or_not_here_is_told_with_the_remedy(
    verify: Verify, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = verify(ours, LLAMA, tmp_path, "--runtime", "vlm")
    assert code == 2
    assert "--runtime: unknown runtime, got 'vlm'; did you mean 'vLLM'?" in said
    monkeypatch.setenv("QUANTMILL_ENVS", str(tmp_path / "none"))
    code, said = verify(ours, LLAMA, tmp_path, "--runtime", "vllm")
    assert code != 0
    assert "environment 'vllm-cpu' isn't built" in said
    assert "run `quantmill env create vllm-cpu` there" in said


def test_the_reference_itself_is_no_quantized_checkpoint(verify: Verify, tmp_path: Path) -> None:
    code, said = verify(LLAMA, LLAMA, tmp_path)
    assert code == 1
    assert "ANOMALOUS by the gates of w8" in said
    assert "this isn't quantized, or was compared with itself" in said


@pytest.mark.parametrize(
    ("checkpoint", "reference", "more", "said"),
    [
        ("./nothing", LLAMA, (), "no such folder, got './nothing'"),
        (LLAMA, "./nothing", (), "no such folder, got './nothing'"),
        (LLAMA, LLAMA, ("--tokens", "99999999"), "add text"),
    ],
)
def test_what_is_not_the_checkpoints_fault_is_no_verdict(
    verify: Verify, checkpoint: Any, reference: Any, more: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    code, output = verify(checkpoint, reference, tmp_path, *more)
    assert code == 2
    assert said in output
    assert "Traceback" not in output


def test_the_families_of_foreign_checkpoints() -> None:
    from pipeline.checking import declared_family

    ct = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    int4 = {"weights": {"type": "int", "num_bits": 4}}
    int8 = {"weights": {"type": "int", "num_bits": 8}}
    rounded = {"type": "int", "num_bits": 8}
    assert declared_family({}) == "w8"
    assert declared_family({"quant_method": "gptq", "bits": 3}) == "w3"
    assert declared_family({"group_size": 64, "bits": 6, "lm_head": {"bits": 4}}) == "w4", "mlx names no quantizer"
    assert declared_family({"group_size": 32, "bits": 4, "mode": "mxfp4"}) == "mxfp4"
    assert declared_family({"quant_method": "bitsandbytes", "load_in_8bit": True}) == "llm-int8"
    assert declared_family({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}) == "fp4"
    assert declared_family({**ct, "config_groups": {"a": int4}}) == "w4"
    assert declared_family({**ct, "config_groups": {"a": int4, "b": int8}}) == "w4"
    assert declared_family({**ct, "config_groups": {"a": {**int8, "input_activations": rounded}}}) == "w8a8"
    assert declared_family({**ct, "config_groups": {"a": {"weights": {"type": "float", "num_bits": 8}}}}) == "fp8"
    nvfp4 = {"weights": {"type": "float", "num_bits": 4}, "format": "nvfp4-pack-quantized"}
    assert declared_family({**ct, "config_groups": {"a": nvfp4}}) == "nvfp4"
    assert declared_family({}) == "w8"
