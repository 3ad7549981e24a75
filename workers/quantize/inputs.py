"""What goes through the model in a pass: calibration tokens, the probe, held-out text."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from workers.machine.preflight import versions
from workers.model import reference
from workers.model.folding import Fold, find_folds
from workers.model.forward import Lanes, LoadedLayer
from workers.model.loading import StreamedModel
from workers.model.statistics import Observer
from workers.model.text import calibration_tokens, held_out_tokens, load_tokenizer
from workers.spec.job import ArtifactMade, Calibration, Job, Order
from workers.spec.recipes import Recipe
from workers.spec.workspace import artifact_folder, is_made, record_path

# Tokens of the short sequence that layers are probed with for foldable pairs.
PROBE_TOKENS = 32
CALIBRATION, REFERENCE, PROBE = "calibration", "reference", "probe"
OWN = "own:"


def made_before(job: Job) -> tuple[dict[str, ArtifactMade], list[Order]]:
    """The artifacts of a job that are there, by recipe, and the orders of those that aren't."""
    done, missing = dict[str, ArtifactMade](), list[Order]()
    for order in job.orders:
        place = artifact_folder(job.workspace, order)
        if is_made(place):
            done[order.recipe.name] = ArtifactMade.model_validate_json(record_path(place).read_text())
        else:
            missing.append(order)
    return done, missing


def observer_of(said: Calibration, *, magnitudes: bool) -> Observer:
    """An observer for a calibration."""
    return Observer(said.experts, said.minimum_expert_tokens, magnitudes=magnitudes)


def folds_of(streamed: StreamedModel, layer: LoadedLayer, probe: Lanes) -> list[Fold]:
    """The folds of a layer that the lanes of the probe rest before."""
    prefix = f"{streamed.layers_name}.{layer.index}"
    weights = [weight for weight in streamed.weights if weight.layer == layer.index]
    return find_folds(streamed.layers[layer.index], prefix, probe.float32_run(), weights)


def own(recipe: Recipe) -> str:
    """The name of the lanes of a recipe that calibrates on its own activations."""
    return f"{OWN}{recipe.name}"


class Tokens:
    """The tokens of a pass, where its reference lies, and its identity."""

    def __init__(self, job: Job, folder: Path, orders: list[Order], dtype: torch.dtype) -> None:
        tokenizer = load_tokenizer(folder, job.model)
        self.held_out = held_out_tokens(job.verification, tokenizer)
        self.place = reference.reference_file(job.model, Path(job.workspace), self.held_out, dtype)
        self.calibration: Tensor | None = None
        if any(order.recipe.calibrated for order in orders):
            assert job.calibration is not None
            self.calibration = calibration_tokens(job.calibration, tokenizer)
        # A pass that another version began is not taken up.
        digest = hashlib.sha256(f"{self.place.path.name} {self.place.exists} {sorted(versions().items())}".encode())
        if self.calibration is not None and job.calibration is not None:
            digest.update(self.calibration.numpy().tobytes())
            digest.update(f"{job.calibration.experts} {job.calibration.minimum_expert_tokens}".encode())
        self.digest = digest.hexdigest()[:32]

    @property
    def longest(self) -> int:
        """The longest sequence: a micro-batch holds one at least."""
        lengths = [tokens.shape[1] for tokens in (self.held_out, self.calibration) if tokens is not None]
        return max(lengths)
