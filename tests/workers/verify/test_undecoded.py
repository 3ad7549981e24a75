"""Artifacts of transformers' quantizers: measured by transformers' own predictions, their files compared by headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.planning import sizing, sources
from pipeline.zoo.zoo import ModelEntry
from tests.workers import jobs
from workers.checkpoint.source import Source
from workers.quantize.one_pass import quantize
from workers.spec.job import Job, Manifest
from workers.spec.layers import Layout
from workers.spec.workspace import layout_path
from workers.verify import undecoded
from workers.verify.foreign import CheckRequest, check
from workers.verify.stage import verify

pytest.importorskip("torchao")
LLAMA = jobs.ZOO / "models" / "llama-tiny"
ONE = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path, Manifest]:
    job = jobs.job(LLAMA, tmp_path_factory.mktemp("runs"), "torchao-int8wo")
    (artifact,), _ = quantize(job, LLAMA)
    assert artifact.error is None, artifact.error
    return job, Path(artifact.path), verify(job, job.orders[0], LLAMA)


@pytest.mark.slow
def test_an_artifact_of_torchao_is_measured_in_transformers(made: tuple[Job, Path, Manifest]) -> None:
    job, folder, manifest = made
    verdict = manifest.verdict
    assert verdict.accepted, verdict.reasons
    assert verdict.metrics is not None
    assert 1e-9 < verdict.metrics.kl_mean < 1e-3
    assert verdict.metrics.eval_tokens == job.verification.tokens
    assert verdict.runtime is not None
    assert verdict.runtime.relative_logit_difference < 1e-2
    assert undecoded.NOTE in manifest.fallbacks
    assert 1 <= len(verdict.generations) <= 4, "those that name people are left out"
    assert "torchao" in manifest.environment
    planned = sizing.estimate(
        sources.resolve(ModelEntry(id=str(LLAMA)), folder), job.orders[0].recipe, None, job.verification
    )
    assert planned.artifact_bytes == pytest.approx(manifest.bytes, rel=0.02)
    card = (folder / "README.md").read_text()
    assert "pip install transformers torchao" in card


@pytest.mark.slow
def test_a_checkpoint_of_another_hand_is_measured_too(made: tuple[Job, Path, Manifest], tmp_path: Path) -> None:
    job, folder, manifest = made
    request = CheckRequest(
        checkpoint=str(folder),
        reference=job.model,
        verification=job.verification,
        thresholds=jobs.LOOSE,
        workspace=str(tmp_path),
    )
    verdict = check(request).verdict
    assert verdict is not None
    assert verdict.accepted, verdict.reasons
    assert verdict.metrics == manifest.verdict.metrics


def dropped(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{ONE}._weight_qdata"], tensors[f"{ONE}._weight_scale"], tensors[f"{ONE}._weight_zero_point"]


def plain(tensors: dict[str, Tensor]) -> None:
    dropped(tensors)
    with safe_open(LLAMA / "model.safetensors", "pt") as source:
        tensors[f"{ONE}.weight"] = source.get_tensor(f"{ONE}.weight")


def not_finite(tensors: dict[str, Tensor]) -> None:
    tensors[f"{ONE}._weight_scale"] = torch.full_like(tensors[f"{ONE}._weight_scale"], torch.nan)


def changed(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2


def without(tensors: dict[str, Tensor]) -> None:
    del tensors["model.norm.weight"]


def added(tensors: dict[str, Tensor]) -> None:
    tensors["model.stranger.weight"] = torch.zeros(2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (dropped, f"quantized modules without a tensor: {ONE}"),
        (plain, f"not quantized though the recipe says so: {ONE}"),
        (not_finite, f"NaN or Inf in: {ONE}._weight_scale"),
        (changed, "model.norm.weight isn't quantized, but differs from the source's"),
        (without, "tensors missing: model.norm.weight"),
        (added, "tensors that the source doesn't have: model.stranger.weight"),
    ],
)
def test_a_broken_file_is_found(
    made: tuple[Job, Path, Manifest], tmp_path: Path, fault: Callable[[dict[str, Tensor]], None], says: str
) -> None:
    _, folder, _ = made
    modules = frozenset(Layout.model_validate_json(layout_path(folder).read_text()).modules)
    tensors = load_file(folder / "model.safetensors")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        if path.name not in ("model.safetensors", "README.md", "quantmill.json"):
            (copy / path.name).write_bytes(path.read_bytes())
    save_file(tensors, copy / "model.safetensors")
    with Source(LLAMA) as source:
        assert undecoded.inspect(source, copy, modules).problems == []
        fault(tensors)
        save_file(tensors, copy / "model.safetensors")
        problems = undecoded.inspect(source, copy, modules).problems
    assert any(says in problem for problem in problems), json.dumps(problems)
