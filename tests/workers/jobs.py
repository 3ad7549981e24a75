"""Build jobs on the small models, as the driver sends them to a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline.zoo import shipped
from workers.machine.files import folder_sha256
from workers.spec.data import Calibration, Dataset, Verification
from workers.spec.job import Job, ModelPin, Order, Thresholds, fingerprint
from workers.spec.recipes import Recipe

ZOO = Path(__file__).parents[1] / "zoo"
LOOSE = Thresholds(kl_mean=5, top1_agreement=0.1, perplexity_ratio=20, runtime_logit_difference=0.1)

# What makes recipes quick, and leaves the sizes of their artifacts as they are.
QUICK: dict[str, dict[str, Any]] = {
    "gptq": {"refine": 0, "scales": "minmax"},
    "awq": {"grid": 1, "clip": False},
    "hqq": {"iterations": 1},
    "ggml": {"codes": "llama.cpp"},
}


def quick(recipe: Recipe) -> Recipe:
    """The recipe with options that take little time, and give an artifact of the same form."""
    options = recipe.options.model_copy(update=QUICK.get(recipe.method, {}))
    return recipe.model_copy(update={"options": options})


def text(name: str) -> Dataset:
    return Dataset(path="text", data_files=(str(ZOO / "text" / f"{name}.txt"),))


def recipe(**definition: Any) -> Recipe:
    """A recipe from its fields, by default in the format compressed-tensors."""
    adapter: TypeAdapter[Recipe] = TypeAdapter(Recipe)
    return adapter.validate_python({"format": "compressed-tensors", **definition})


def job(
    model: Path,
    workspace: Path,
    *recipes: str | Recipe,
    thresholds: Thresholds = LOOSE,
    samples: int = 8,
    allow_pickle: bool = False,
) -> Job:
    chosen = [shipped.recipe(item) if isinstance(item, str) else item for item in recipes]
    pin = ModelPin(id=model.name, revision=folder_sha256(model), folder=str(model), allow_pickle=allow_pickle)
    calibration = Calibration(dataset=text("calibration"), samples=samples, sequence_length=128)
    return Job(
        model=pin,
        orders=tuple(
            Order(recipe=item, fingerprint=fingerprint(pin, item, calibration, "text"), thresholds=thresholds)
            for item in chosen
        ),
        calibration=calibration,
        verification=Verification(dataset=text("heldout"), tokens=512, sequence_length=128),
        destination=None,
        workspace=str(workspace),
    )
