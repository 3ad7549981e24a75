"""Inputs of a pass: calibration tokens, the probe sequence, held-out tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from workers.machine.files import read_model
from workers.machine.preflight import versions
from workers.model import reference
from workers.model.cards import AnyLanes
from workers.model.folding import Fold, find_folds
from workers.model.forward import Batch, LoadedLayer
from workers.model.loading import InputName, StreamedModel
from workers.model.pictures import Inputs, processor_of
from workers.model.statistics import Observer, inputs_of
from workers.model.text import calibration_tokens, check_ids, held_out_tokens, load_tokenizer
from workers.spec.data import Calibration
from workers.spec.job import ArtifactMade, Job, Order
from workers.spec.layers import Layout
from workers.spec.recipes import Recipe
from workers.spec.workspace import artifact_folder, is_made, layout_path, record_path

# Length in tokens of the sequence that layers are probed with for folds.
PROBE_TOKENS = 32
CALIBRATION, REFERENCE, PROBE = "calibration", "reference", "probe"
OWN = "own:"


def existing_artifacts(job: Job) -> tuple[dict[str, ArtifactMade], list[Order]]:
    """Split a job's orders: existing artifacts by recipe name, and the orders still to do.

    An artifact whose record or layout is damaged is made anew.
    """
    done, missing = dict[str, ArtifactMade](), list[Order]()
    for order in job.orders:
        folder = artifact_folder(job.workspace, order)
        record = read_model(record_path(folder), ArtifactMade) if is_made(folder) else None
        stored = layout_path(folder)
        if record is None or (stored.is_file() and read_model(stored, Layout) is None):
            missing.append(order)
        else:
            done[order.recipe.name] = record
    return done, missing


def observer_of(calibration: Calibration, recipes: Iterable[Recipe]) -> Observer:
    """An observer with a calibration's settings, of what these recipes need."""
    needs = [recipe.needs for recipe in recipes]
    return Observer(
        calibration.experts,
        calibration.minimum_expert_tokens,
        magnitudes=any(need.magnitudes for need in needs),
        keys_and_values=any(need.keys_and_values for need in needs),
    )


def watched_inputs(streamed: StreamedModel, layer: int, recipes: Iterable[Recipe]) -> list[InputName]:
    """The inputs of a layer that these recipes need statistics of."""
    return inputs_of(streamed, layer, keys_and_values=any(recipe.needs.keys_and_values for recipe in recipes))


def folds_of(streamed: StreamedModel, layer: LoadedLayer, probe: AnyLanes) -> list[Fold]:
    """The folds of a layer that the probe is paused before."""
    prefix = f"{streamed.layers_name}.{layer.index}"
    weights = [weight for weight in streamed.weights if weight.layer == layer.index]
    return find_folds(streamed.layers[layer.index], prefix, probe.float32_run(), weights)


def own_stream(recipe: Recipe) -> str:
    """Name of the group of lanes of a recipe that calibrates on its own quantized activations."""
    return f"{OWN}{recipe.name}"


class Tokens:
    """The tokens of a pass, its reference file, and its identity (``digest``).

    ``calibration``: sequences in groups of one length each, int64 [N, T], the longest first; ``shown``: those with
    pictures or sounds.
    ``notes`` say what of the calibration data was left out.
    """

    def __init__(self, job: Job, folder: Path, orders: list[Order], dtype: torch.dtype, embedding_rows: int) -> None:
        tokenizer = load_tokenizer(folder, job.model)
        data = (*(job.calibration.datasets if job.calibration else ()), job.verification.shown)
        processor = processor_of(data, folder, job.model)
        self.held_out = held_out_tokens(job.verification, tokenizer, processor)
        check_ids(self.held_out.rows, embedding_rows, "verify.dataset")
        self.notes: tuple[str, ...] = ()
        self.reference = reference.reference_file(job.model, Path(job.workspace), self.held_out.tensors, dtype)
        self.calibration: tuple[Tensor, ...] = ()
        self.shown: tuple[Inputs, ...] = ()
        if any(order.recipe.calibrated for order in orders):
            assert job.calibration is not None
            calibration = calibration_tokens(job.calibration, tokenizer, processor)
            ids = (*calibration.groups, *(inputs["input_ids"] for inputs in calibration.shown))
            check_ids(ids, embedding_rows, "calibration.dataset")
            self.calibration, self.shown, self.notes = calibration.groups, calibration.shown, calibration.notes
        # The versions are part of the identity: a pass of other versions is not resumed.
        digest = hashlib.sha256(
            f"{self.reference.path.name} {self.reference.exists} {sorted(versions().items())}".encode()
        )
        if self.calibrates and job.calibration is not None:
            for tensor in (*self.calibration, *(tensor for inputs in self.shown for tensor in inputs.values())):
                digest.update(tensor.numpy().tobytes())
            digest.update(f"{job.calibration.experts} {job.calibration.minimum_expert_tokens}".encode())
        self.digest = digest.hexdigest()[:32]

    @property
    def longest(self) -> int:
        """Length in tokens of the longest sequence, the minimum size of a micro-batch."""
        shown = (inputs["input_ids"] for inputs in (*self.shown, *self.held_out.shown))
        return max(tokens.shape[1] for tokens in (self.held_out.tokens_NT, *self.calibration, *shown))

    @property
    def calibrates(self) -> bool:
        """Whether anything is calibrated on."""
        return bool(self.calibration or self.shown)

    def calibration_batches(self, tokens: int) -> list[Batch]:
        """Micro-batches of the calibration of at most that many tokens, or of one sequence."""
        text = [batch for group in self.calibration for batch in reference.micro_batches(group, tokens)]
        return [*text, *self.shown]

    @property
    def probe(self) -> Tensor:
        """The first tokens of the longest sequence of text, int64 [1, at most PROBE_TOKENS]."""
        return (*self.calibration, self.held_out.tokens_NT)[0][:1, :PROBE_TOKENS]
