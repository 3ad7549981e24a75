"""What CONTRIBUTING says of a new format, runtime and engine is enough, from a recipe to a published artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from pipeline.checking import declared_family
from pipeline.planning import sizing, sources
from pipeline.zoo.zoo import ModelEntry
from tests.toy import engine, format, runtime
from tests.workers import jobs
from workers.formats.decoded import Decoded, open_decoded
from workers.formats.table import CODECS
from workers.machine.preflight import probe, problems
from workers.quantize.one_pass import quantize
from workers.spec.engines import ENGINES
from workers.spec.formats import FORMATS
from workers.spec.job import Destination, Job, ReasonCode
from workers.spec.layers import Layout
from workers.spec.recipes import RtnRecipe
from workers.spec.runtimes import RUNTIMES
from workers.spec.workspace import layout_path
from workers.transfer import destinations
from workers.transfer.artifact import open_accepted
from workers.verify.stage import verify

LLAMA = jobs.ZOO / "models" / "llama-tiny"
SCHEME = {"type": "int", "bits": 8, "group_size": None, "symmetric": True}


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that an addition of each kind takes."""
    monkeypatch.setitem(FORMATS, "toy", format.ROW)
    monkeypatch.setitem(CODECS, "toy", format.CODEC)
    monkeypatch.setitem(RUNTIMES, "toyrun", runtime.ROW)
    monkeypatch.setitem(ENGINES, "toylib", engine.ROW)


class ToylibRecipe(RtnRecipe):
    """A recipe that names the toy engine."""

    engine: ClassVar[str] = "toylib"


def toy_job(tmp_path: Path, **recipe: Any) -> Job:
    return jobs.job(
        LLAMA, tmp_path / "runs", jobs.recipe(name="toy-w8", method="rtn", scheme=SCHEME, format="toy", **recipe)
    )


def by_engine(job: Job, scheme: dict[str, Any]) -> Job:
    recipe = ToylibRecipe.model_validate({"name": "toy-w8", "method": "rtn", "scheme": scheme, "format": "toy"})
    return job.model_copy(update={"orders": (job.orders[0].model_copy(update={"recipe": recipe}),)})


@pytest.mark.slow
@pytest.mark.parametrize(
    "whole",
    [False, True],
    ids=["in the pass", "by an engine of its own"],
)
def test_a_toy_goes_all_the_way(tmp_path: Path, whole: bool) -> None:
    job = by_engine(toy_job(tmp_path), SCHEME) if whole else toy_job(tmp_path)
    order = job.orders[0]
    (made,), _ = quantize(job, LLAMA)
    assert made.error is None, made.error
    assert made.fallbacks == (("rounded by a toy",) if whole else ())
    place = Path(made.path)
    layout = Layout.model_validate_json(layout_path(place).read_text())
    with open_decoded(place) as opened:
        assert isinstance(opened, Decoded)
        assert opened.quantized == frozenset(layout.modules)
        assert opened.read("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16
    planned = sizing.estimate(
        sources.resolve(ModelEntry(id=str(LLAMA)), tmp_path), order.recipe, None, job.verification
    )
    assert planned.artifact_bytes == pytest.approx(made.bytes, rel=0.02)
    manifest = verify(job, order, LLAMA)
    assert manifest.verdict.accepted, manifest.verdict.reasons
    assert manifest.verdict.runtime is not None
    assert manifest.verdict.runtime.name == "toyrun"
    assert 1 <= len(manifest.verdict.generations) <= 4, "those that name people are left out"
    card = (place / "README.md").read_text()
    assert "import toyrun" in card
    assert "from_pretrained" not in card
    to = Destination(endpoint=str(tmp_path / "published"))
    revision = destinations.publish(to, "acme/toy", place)
    standing = destinations.standing(to.endpoint, "acme/toy", order.fingerprint)
    assert standing is not None
    assert standing[1] == revision
    assert open_accepted(place).manifest.recipe.model_dump() == order.recipe.model_dump()


def test_the_preflight_and_the_gates_read_the_rows(tmp_path: Path) -> None:
    facts = probe(tmp_path, with_devices=False)
    recipe = toy_job(tmp_path).orders[0].recipe
    assert problems(facts, recipe) == []
    bare = facts.model_copy(update={"packages": {k: v for k, v in facts.packages.items() if k != "transformers"}})
    assert [line.split()[1] for line in problems(bare, recipe)] == ["transformers"]
    assert declared_family({"quant_method": "toy"}) == "w8"


def test_a_scheme_that_the_toy_does_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"format 'toy' can't hold the scheme .* choose format: compressed-tensors"):
        jobs.recipe(name="toy-w4", method="rtn", scheme={**SCHEME, "bits": 5}, format="toy")


def test_what_the_toy_engine_refuses_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "toy", format.ROW.__class__(**{**vars(format.ROW), "holds": lambda scheme: True}))
    (made,), _ = quantize(by_engine(toy_job(tmp_path), {**SCHEME, "bits": 4}), LLAMA)
    assert made.error is not None
    assert made.error.kind == "UnsupportedRecipe"
    assert "4 bits aren't 8; set scheme.bits: 8" in made.error.message
    assert not list((tmp_path / "runs" / "artifacts").glob("*"))


def test_an_engine_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "toylib", engine.Engine("toylib", script="tests.toy.gone"))
    (made,), _ = quantize(by_engine(toy_job(tmp_path), SCHEME), LLAMA)
    assert made.error is not None
    assert made.error.kind == "WorkerDied"
    assert "No module named tests.toy.gone" in made.error.message


@pytest.mark.slow
def test_a_wrong_byte_is_an_integrity_reason(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    job = toy_job(tmp_path)
    (made,), _ = quantize(job, LLAMA)
    weights = Path(made.path) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.toy_codes"] = tensors["model.layers.0.mlp.up_proj.toy_codes"].roll(7, 1)
    save_file(tensors, weights, metadata={"format": "pt"})
    verdict = verify(job, job.orders[0], LLAMA).verdict
    assert set(verdict.codes) == {ReasonCode.INTEGRITY}
    assert "model.layers.0.mlp.up_proj.weight" in verdict.reasons[0]
