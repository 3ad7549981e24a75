"""Makes one artifact layer by layer, and moves it to its final path by an atomic rename."""

from __future__ import annotations

import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from workers.checkpoint.behind import TensorWriter, WriteBehind
from workers.checkpoint.containers import WRITERS
from workers.checkpoint.shards import Journal, ShardWriter, Spooled
from workers.checkpoint.source import ModelSource, copy_companions
from workers.machine.files import write_text
from workers.methods.layer import LayerWork
from workers.methods.scaling import some
from workers.model.device import card_of
from workers.model.generation import GENERATION_CONFIG, unreadable
from workers.model.loading import QuantizableWeight, StreamedModel
from workers.model.statistics import InputStatistics
from workers.spec.base import Frozen
from workers.spec.checkpoint_files import WEIGHTS, CheckpointFiles
from workers.spec.formats import FORMATS
from workers.spec.ggml import is_beside
from workers.spec.job import ArtifactMade, ExpertTokens, Job, Order
from workers.spec.layers import Layout
from workers.spec.workspace import artifact_folder, layout_path, record_path


class MakerState(Frozen):
    """State that a maker needs to resume after a kill."""

    journal: Journal
    fallbacks: tuple[str, ...]
    seconds: float
    expert_tokens: tuple[ExpertTokens, ...] = ()


class Maker(ABC):
    """Makes one artifact: call ``begin``, ``layer`` for each layer in order, then ``finish``.

    When the layers are spread over workers, each worker calls ``layer_into``, and one calls ``adopt`` for all layers.

    Raises:
        UnsupportedRecipe: on construction, before any expensive work, if the model can't take the recipe.
    """

    def __init__(self, job: Job, order: Order, streamed: StreamedModel, source: ModelSource, partial: Path) -> None:
        self.order = order
        self.seconds = 0.0
        self.cards = 1  # that its pass computes on, if it computes on a card
        self.fallbacks: dict[str, None] = {}
        # Of the layers so far that have experts, where the recipe is calibrated.
        self.expert_tokens: list[ExpertTokens] = []
        # The layer's dequantized weights by checkpoint key: for recipes that calibrate on their own activations.
        self.decoded: dict[str, Tensor] = {}
        # Statistics of the decoder's output, set before ``finish`` for recipes that need them.
        self.final: InputStatistics | None = None
        self._streamed = streamed
        self._source = source
        if job.model.dequantize:
            note = "the source is quantized already: what it decodes to was quantized, and is the reference"
            self.fallbacks[note] = None
        self.target = artifact_folder(job.workspace, order)
        self._partial = partial
        self._shards: ShardWriter | None = None
        self._writer: WriteBehind | None = None

    def begin(self, state: MakerState | None = None) -> None:
        """Start writing the artifact, or resume from ``state``.

        Raises:
            FileNotFoundError: files that ``state`` names are missing.
        """
        if state is None:
            shutil.rmtree(self._partial, ignore_errors=True)
        else:
            self.seconds, self.fallbacks = state.seconds, dict.fromkeys(state.fallbacks)
            self.expert_tokens = list(state.expert_tokens)
        writer = WRITERS[FORMATS[self.order.recipe.format].container]
        self._shards = writer(self._partial, journal=state.journal if state else None)
        self._writer = WriteBehind(self._shards)

    @abstractmethod
    def layer(self, work: LayerWork) -> None:
        """Write one layer's tensors; its statistics must be complete."""

    @abstractmethod
    def layout(self) -> Layout:
        """The scheme of every quantized module."""

    @abstractmethod
    def quantization_config(self) -> dict[str, Any]:
        """The ``quantization_config`` of config.json."""

    def layer_into(self, writer: TensorWriter, work: LayerWork) -> tuple[str, ...]:
        """Write any one layer to ``writer`` instead of the artifact; return its fallbacks."""
        self._writer, self.fallbacks = WriteBehind(writer), {}
        try:
            self.layer(work)
            self._writer.drain()
        finally:
            self._writer.stop()
        return tuple(self.fallbacks)

    def adopt(self, entries: Iterable[Spooled], fallbacks: Iterable[str], seconds: float) -> None:
        """Append the next layer, as written by ``layer_into``; its file must exist until ``finish``."""
        self._open_shards.adopt(entries)
        self.fallbacks.update(dict.fromkeys(fallbacks))
        self.seconds += seconds

    def state(self) -> MakerState:
        """The state so far, flushed to disk."""
        return MakerState(
            journal=self._open_shards.journal(),
            fallbacks=tuple(self.fallbacks),
            seconds=self.seconds,
            expert_tokens=tuple(self.expert_tokens),
        )

    @property
    def _open_shards(self) -> ShardWriter:
        """The writer, with all written that was given to it."""
        assert self._shards is not None, "begin comes first"
        assert self._writer is not None, "begin comes first"
        self._writer.drain()
        return self._shards

    def finish(self) -> ArtifactMade:
        """Write the tensors outside of the layers, and move the artifact to its final path."""
        unused = frozenset(self._streamed.unused)
        for key in self._streamed.outside_keys:
            if key not in unused:
                self.outside(key)
        if unused:
            name = type(self._streamed.model).__name__
            note = f"left out, for {name} has no place for them: {len(unused)} of the source's tensors"
            self.fallbacks[f"{note} ({some(self._streamed.unused)})"] = None
        if shared := self._streamed.shared_keys:
            self.fallbacks[
                f"kept as they are, for several layers share them: {len(shared)} tensors ({some(shared)})"
            ] = None
        self._open_shards.close()
        folder = self._source.folder
        config = json.loads((folder / "config.json").read_text())
        config.pop("transformers_weights", None)  # the artifact's weights have the usual names
        config["quantization_config"] = self.quantization_config()
        config |= FORMATS[self.order.recipe.format].settings(config)
        write_text(self._partial / "config.json", json.dumps(config, indent=2) + "\n")
        self.fallbacks.update(dict.fromkeys(copy_beside(self._source.files, folder, self._partial)))
        artifact = ArtifactMade(
            recipe=self.order.recipe.name,
            path=str(self.target),
            bytes=sum(
                path.stat().st_size
                for end in WEIGHTS
                for path in self._partial.glob(f"*{end}")
                if not is_beside(path.name)
            ),
            seconds=self.seconds,
            fallbacks=tuple(self.fallbacks),
            made_with=card_of(self._streamed.device, self.cards),
            expert_tokens=tuple(self.expert_tokens),
        )
        put_in_place(self._partial, self.target, artifact, self.layout())
        return artifact

    def outside(self, key: str) -> None:
        """Write one of the tensors outside of the layers."""
        self.copy({key: self._source.read(key)})

    def release(self) -> None:
        """Close open files; written files stay for the next attempt."""
        if self._writer is not None:
            self._writer.stop()
        if self._shards is not None:
            self._shards.release()

    def discard(self) -> None:
        """Remove everything written so far."""
        self.release()
        shutil.rmtree(self._partial, ignore_errors=True)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the duration of the context to this artifact's seconds."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - begun

    def _note_borrowing(self, work: LayerWork, weights: Iterable[QuantizableWeight]) -> None:
        """Add a fallback that names the layer's experts with too few tokens."""
        if work.observer is None or not self.order.recipe.calibrated:
            return
        short = {w.module: n for w in weights if (n := work.observer.borrowed(w.input)) is not None}
        if short:
            least, most = min(short.values()), max(short.values())
            tokens = f"{least} to {most} tokens" if least != most else f"{least} tokens"
            self.fallbacks[
                f"calibrated on the tokens of all experts of its layer, for only {tokens} came to it: "
                f"{some(sorted(short))}"
            ] = None

    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors unchanged."""
        for key, tensor in tensors.items():
            self._write(key, tensor)

    def put(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the stored tensors of a quantized module."""
        for suffix, tensor in tensors.items():
            self._write(f"{module}.{suffix}", tensor)

    def _write(self, key: str, tensor: Tensor) -> None:
        assert self._writer is not None, "begin comes first"
        self._writer.add(key, tensor)


def copy_beside(files: CheckpointFiles, source: Path, partial: Path) -> list[str]:
    """Copy the companion files, and return what was left out: settings with which no artifact could be loaded."""
    copy_companions(files, source, partial)
    reason = unreadable(partial)
    if reason is None:
        return []
    (partial / GENERATION_CONFIG).unlink()
    return [f"{GENERATION_CONFIG} left out, for transformers loads no model beside it ({reason})"]


def put_in_place(partial: Path, target: Path, artifact: ArtifactMade, layout: Layout) -> None:
    """Write an artifact's layout and record beside its final path, and move it there by an atomic rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(layout_path(target), layout.model_dump_json() + "\n")
    write_text(record_path(target), artifact.model_dump_json() + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
