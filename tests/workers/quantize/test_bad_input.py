"""What bad calibration and odd weights do: a named error or a recorded fallback, never NaN in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.workers.jobs import ZOO, job, recipe
from tests.workers.quantize.test_pass import small
from workers.formats.decoded import open_decoded
from workers.machine.failures import describe
from workers.quantize.one_pass import quantize
from workers.spec.data import Dataset
from workers.spec.job import Job
from workers.spec.recipes import Recipe
from workers.spec.workspace import artifact_folder

LLAMA = ZOO / "models" / "llama-tiny"
MOE = ZOO / "models" / "qwen3-moe-tiny"


def calibrated() -> list[Recipe | str]:
    """Every method that looks at activations, without refinement and with it."""
    scheme = {"bits": 3, "group_size": 64}
    return [
        recipe(name="plain-gptq", method="gptq", scheme=scheme, options={"refine": 0}),
        recipe(name="in-order", method="gptq", scheme=scheme, options={"activation_order": False}),
        recipe(name="own", method="gptq", scheme=scheme, options={"propagate": "quantized"}),
        "awq-w4-g128",
        "awq-w4-g128-gemm",
        "w8a8-int8",
        "fp8-static",
    ]


def changed(model: Path, key: str, change: Callable[[Tensor], object]) -> Path:
    tensors = load_file(model / "model.safetensors")
    change(tensors[key])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def with_text(of: Job, text: Path, samples: int, length: int) -> Job:
    assert of.calibration is not None
    dataset = Dataset(path="text", data_files=(str(text),))
    update = {"dataset": dataset, "samples": samples, "sequence_length": length}
    return of.model_copy(update={"calibration": of.calibration.model_copy(update=update)})


def assert_finite(of: Job) -> dict[str, tuple[str, ...]]:
    """Every artifact is there, and every number in it finite; the fallbacks by recipe."""
    made, _ = quantize(of, Path(of.model.folder or ""))
    assert [artifact.error for artifact in made] == [None] * len(made)
    for order in of.orders:
        with open_decoded(artifact_folder(of.workspace, order)) as artifact:
            for name in artifact.headers:
                assert bool(artifact.read(name).float().isfinite().all()), f"{order.recipe.name}: {name}"
    return {artifact.recipe: artifact.fallbacks for artifact in made}


def test_one_token_is_enough_for_no_method_and_breaks_none(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("word " * 4)
    of = with_text(job(small(LLAMA, tmp_path / "model", 2), tmp_path, *calibrated()), tmp_path / "one.txt", 1, 1)
    assert_finite(of)


def test_text_without_variance_leaves_every_number_finite(tmp_path: Path) -> None:
    """The same token again and again: H has one direction only."""
    (tmp_path / "same.txt").write_text("the " * 4000)
    of = with_text(job(small(LLAMA, tmp_path / "model", 2), tmp_path, *calibrated()), tmp_path / "same.txt", 4, 128)
    assert_finite(of)


def test_inputs_that_never_come_and_rows_of_zeros(tmp_path: Path) -> None:
    model = small(LLAMA, tmp_path / "model", 2)
    changed(model, "model.layers.0.input_layernorm.weight", lambda tensor: tensor[:40].zero_())
    changed(model, "model.layers.1.mlp.up_proj.weight", lambda tensor: tensor[5:9].zero_())
    changed(model, "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor.zero_())
    of = job(model, tmp_path, *calibrated())
    assert_finite(of)
    for order in of.orders:
        with open_decoded(artifact_folder(of.workspace, order)) as artifact:
            assert not artifact.read("model.layers.1.mlp.up_proj.weight")[5:9].any(), order.recipe.name
            assert not artifact.read("model.layers.1.mlp.down_proj.weight").any(), order.recipe.name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_named_by_every_method(bad: float, tmp_path: Path) -> None:
    model = small(LLAMA, tmp_path / "model", 2)
    changed(model, "model.layers.0.mlp.up_proj.weight", lambda tensor: tensor[2, 3].fill_(bad))
    made, _ = quantize(job(model, tmp_path, "hqq-w4-g64", "fp8-dynamic", "fp8-block", "mxfp4-rtn", "nvfp4-rtn"), model)
    for artifact in made:
        assert artifact.error is not None
        assert artifact.error.kind == "NumericalError"
        assert "model.layers.0.mlp.up_proj.weight" in artifact.error.message


def test_activations_that_overflow_are_named_by_their_layer(tmp_path: Path) -> None:
    model = small(LLAMA, tmp_path / "model", 2)
    changed(model, "model.layers.0.mlp.down_proj.weight", lambda tensor: tensor.fill_(3e38))
    with pytest.raises(Exception, match=r"layers?\b.*1") as caught:
        quantize(job(model, tmp_path, *calibrated()), model)
    assert describe(caught.value).kind == "NumericalError"


def test_experts_that_no_token_comes_to_are_rounded_and_recorded(tmp_path: Path) -> None:
    model = small(MOE, tmp_path / "model", 1)
    (tmp_path / "one.txt").write_text("word " * 4)
    of = job(model, tmp_path, "gptq-w4-g128", "awq-w4-g128")
    assert of.calibration is not None
    unborrowed = of.model_copy(update={"calibration": of.calibration.model_copy(update={"minimum_expert_tokens": 0})})
    said = assert_finite(with_text(unborrowed, tmp_path / "one.txt", 1, 1))
    assert all(any("only 0 tokens came to it" in line for line in lines) for lines in said.values())
    assert torch.get_float32_matmul_precision() == "highest", "calibration's coarse products stay its own"
