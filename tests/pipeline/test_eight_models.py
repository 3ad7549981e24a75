"""Eight models of today's kinds by four recipes in one run on the embedded defaults: all are published."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from tests.limits import LONG_TEST_SECONDS
from tests.pipeline.runs import by_key, run
from tests.walk.smallest import VOCABULARY, save_smallest
from tests.workers.families import save_tokenizer
from tests.workers.fused import save_gpt_oss
from tests.workers.jobs import ZOO, job
from tests.workers.multimodal import save_llava
from workers.quantize.one_pass import quantize
from workers.spec.workspace import artifact_folder

# Multimodal with experts and prediction heads, multimodal, experts in one tensor, latent attention, linear attention.
SMALLEST = {
    "qwen3_5_moe": True, "gemma3": True, "llama4_text": False, "deepseek_v3": False, "qwen3_next": False,
}  # fmt: skip
W4 = {"bits": 4, "group_size": 32, "indivisible": "keep"}
RECIPES = [
    {"name": "gptq-w4", "method": "gptq", "scheme": W4, "format": "compressed-tensors"},
    {"name": "rtn-w8", "method": "rtn", "scheme": {**W4, "bits": 8}, "format": "compressed-tensors"},
    "fp8-dynamic",
    "bnb-nf4",
]
# Weights at random predict nothing in particular, and lose more by rounding than trained ones.
LOOSE = {"kl_mean": 2.0, "top1_agreement": 0.2, "perplexity_ratio": 3.0, "runtime_logit_difference": 0.3}


def save_fp8(folder: Path) -> Path:
    """A checkpoint in blocks of FP8, as DeepSeek's are."""
    source = ZOO / "models" / "llama-tiny"
    of = job(source, folder.with_name("making"), "fp8-block")
    quantize(of, source)
    return Path(shutil.copytree(artifact_folder(of.workspace, of.orders[0]), folder))


@pytest.mark.night
@pytest.mark.timeout(LONG_TEST_SECONDS)
def test_eight_models_by_four_recipes_are_published(tmp_path: Path) -> None:
    models = [{"id": str(save_gpt_oss(tmp_path / "gpt-oss"))}, {"id": str(save_llava(tmp_path / "llava"))}]
    for family, multimodal in SMALLEST.items():
        save_smallest(family, tmp_path / family, multimodal=multimodal)
        save_tokenizer(tmp_path / family, VOCABULARY)
        models.append({"id": str(tmp_path / family)})
    models.append({"id": str(save_fp8(tmp_path / "llama-fp8")), "source": "dequantize"})
    text = {
        name: {"path": "text", "data_files": [str(ZOO / "text" / f"{name}.txt")]} for name in ("calibration", "heldout")
    }
    gates = dict.fromkeys(("w4", "w8", "fp8", "nf4"), LOOSE)
    zoo = {
        "name": "eight",
        "models": models,
        "recipes": RECIPES,
        "calibration": {"dataset": text["calibration"], "samples": 16, "sequence_length": 64},
        "verify": {"dataset": text["heldout"], "tokens": 8192, "sequence_length": 64, "gates": gates},
        "publish": {"endpoint": "loopback", "namespace": "acme"},
    }
    path = tmp_path / "zoo.yaml"
    path.write_text(yaml.safe_dump(zoo))
    code, output, results = run(path, tmp_path / "runs", LONG_TEST_SECONDS)
    assert code == 0, output
    assert len(by_key(results)) == 32
    assert {entry["status"] for entry in results["artifacts"]} == {"published"}
    assert max(entry["peak_memory_bytes"]["host"] for entry in results["artifacts"]) < 2e9
