"""Libraries as engines from the zoo file to what is published, as users run them: with Ray, beside quantmill's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf

from pipeline.zoo import shipped
from tests.pipeline.runs import MODELS, by_key, run, write_zoo
from tests.workers.families import PLAIN, save_config, save_tokenizer
from workers.errors import PreflightError
from workers.machine import environments
from workers.spec.engines import ENGINES

# An engine's shipped recipe, and quantmill's own of the same scheme.
BESIDE = {
    "gptqmodel-w4-g128": "gptq-w4-g128",
    "llmcompressor-w4-g128": "gptq-w4-g128",
    "llmcompressor-nvfp4": "nvfp4-rtn",
    "modelopt-nvfp4": "nvfp4-rtn",
    "modelopt-fp8": "fp8-static",
    "autogptq-w4-g128": "gptq-w4-g128",
    "autoawq-w4-g128": "awq-w4-g128-gemm",
    "autoround-w4-g128": "rtn-w4-g128",
}


def save_dense(folder: Path) -> Path:
    """A Qwen2 (biases, and as many heads for values as for queries) whose matrices groups of 128 divide."""
    sizes = {**PLAIN, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_key_value_heads": 4}
    save_config(tf.Qwen2Config(**sizes | {"max_position_embeddings": 512}), folder, 0.08, torch.bfloat16)
    save_tokenizer(folder)
    return folder


def built(recipe: str) -> bool:
    needed = ENGINES[shipped.recipe(recipe).engine]
    try:
        return needed.environment is None or bool(environments.interpreter(needed.environment))
    except PreflightError:
        return False


@pytest.mark.night
@pytest.mark.timeout(3600)
def test_engines_and_ours_stand_in_one_report(tmp_path: Path) -> None:
    theirs = [name for name in BESIDE if built(name)]
    if len(theirs) < 2:
        pytest.skip("of the libraries' environments none is built; run `quantmill env create llmcompressor`")
    recipes = [*theirs, *dict.fromkeys(BESIDE[name] for name in theirs)]
    # First choices of random weights are near ties.
    loose = ", ".join(f"{family}: {{top1_agreement: 0.4}}" for family in ("w4", "nvfp4", "fp8"))
    models = [str(MODELS / "llama-tiny"), f"{save_dense(tmp_path / 'qwen2-dense')}, gates: {{{loose}}}"]
    code, output, results = run(write_zoo(tmp_path, models, ", ".join(recipes)), tmp_path / "runs", seconds=3000)
    artifacts = by_key(results)
    assert code == 0, output
    assert len(artifacts) == len(models) * len(recipes)
    for (model, name), entry in artifacts.items():
        assert entry["status"] == "published", (model, name, entry["reason"], entry["error"])
        assert entry["runtime"]["name"] == "transformers", (model, name)
    for model in ("llama-tiny", "qwen2-dense"):
        for name in theirs:
            engine, own = artifacts[model, name], artifacts[model, BESIDE[name]]
            # The same codes by another hand: no fold of scales was lost, no matrix was left as it is. The format gptq
            # stores groups by input and zero points, a twentieth of so small a model.
            assert engine["bytes"] == pytest.approx(own["bytes"], rel=0.1), (model, name)
            assert engine["metrics"]["kl_mean"] < 4 * own["metrics"]["kl_mean"], (model, name)
    report = Path(output.strip().splitlines()[-1]).read_text()
    assert all(name in report for name in recipes)
