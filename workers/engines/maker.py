"""A maker makes one artifact from the layers that pass by, and puts it in its place at the end, whole."""

from __future__ import annotations

import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from workers.checkpoint.shards import WRITERS, Journal, ShardWriter, Spooled
from workers.checkpoint.source import Source, copy_companions
from workers.machine.files import write_text
from workers.methods.layer import LayerWork
from workers.model.loading import StreamedModel
from workers.spec.base import Frozen
from workers.spec.formats import FORMATS
from workers.spec.job import ArtifactMade, Job, Order
from workers.spec.layers import Layout
from workers.spec.workspace import artifact_folder, layout_path, record_path


class TensorWriter(Protocol):
    """Where the tensors of an artifact go."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, of any device."""


class MakerState(Frozen):
    """What a maker needs to go on after a kill."""

    journal: Journal
    fallbacks: tuple[str, ...]
    seconds: float


class Maker(ABC):
    """One artifact in the making. After ``begin``, ``layer`` takes one layer after the other, ``finish`` the rest.

    Where the layers are spread over workers, each calls ``layer_into``, and one ``adopt`` for all of them.

    Raises:
        UnsupportedRecipe: on construction, before anything dear has started, if the model can't take the recipe.
    """

    def __init__(self, job: Job, order: Order, streamed: StreamedModel, source: Source, partial: Path) -> None:
        self.order = order
        self.seconds = 0.0
        self.fallbacks: dict[str, None] = {}
        # The layer as the artifact holds it, by checkpoint key: for recipes that calibrate on their own activations.
        self.decoded: dict[str, Tensor] = {}
        self._streamed = streamed
        self._source = source
        self.place = artifact_folder(job.workspace, order)
        self._partial = partial
        self._shards: ShardWriter | None = None
        self._writer: TensorWriter | None = None

    def begin(self, state: MakerState | None = None) -> None:
        """Begin to write the artifact, or go on with it.

        Raises:
            FileNotFoundError: ``state`` names files that aren't there.
        """
        if state is None:
            shutil.rmtree(self._partial, ignore_errors=True)
        else:
            self.seconds, self.fallbacks = state.seconds, dict.fromkeys(state.fallbacks)
        writer = WRITERS[FORMATS[self.order.recipe.format].container]
        self._shards = self._writer = writer(self._partial, journal=state.journal if state else None)

    @abstractmethod
    def layer(self, work: LayerWork) -> None:
        """Write one layer's tensors; its statistics are complete."""

    @abstractmethod
    def layout(self) -> Layout:
        """What is decided: the scheme of every module that is quantized."""

    @abstractmethod
    def quantization_config(self) -> dict[str, Any]:
        """The ``quantization_config`` of config.json."""

    def layer_into(self, writer: TensorWriter, work: LayerWork) -> tuple[str, ...]:
        """One layer, of any number, written elsewhere than into the artifact; the fallbacks that it took."""
        self._writer, self.fallbacks = writer, {}
        self.layer(work)
        return tuple(self.fallbacks)

    def adopt(self, entries: Iterable[Spooled], fallbacks: Iterable[str], seconds: float) -> None:
        """Take in the layer that comes next, as ``layer_into`` has left it; its file has to stay until ``finish``."""
        self._begun.adopt(entries)
        self.fallbacks.update(dict.fromkeys(fallbacks))
        self.seconds += seconds

    def state(self) -> MakerState:
        """What was made so far, surely on the disk."""
        return MakerState(journal=self._begun.journal(), fallbacks=tuple(self.fallbacks), seconds=self.seconds)

    @property
    def _begun(self) -> ShardWriter:
        assert self._shards is not None, "begin comes first"
        return self._shards

    def finish(self) -> ArtifactMade:
        """Write what belongs to no layer, and put the artifact in its place."""
        for key in self._streamed.outside_keys:
            self.copy({key: self._source.read(key)})
        self._begun.close()
        folder = self._source.folder
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = self.quantization_config()
        write_text(self._partial / "config.json", json.dumps(config, indent=2) + "\n")
        copy_companions(folder, self._partial)
        made = ArtifactMade(
            recipe=self.order.recipe.name,
            path=str(self.place),
            bytes=sum(path.stat().st_size for path in self._partial.glob("*.safetensors")),
            seconds=self.seconds,
            fallbacks=tuple(self.fallbacks),
        )
        self.place.parent.mkdir(parents=True, exist_ok=True)
        write_text(layout_path(self.place), self.layout().model_dump_json() + "\n")
        write_text(record_path(self.place), made.model_dump_json() + "\n")
        shutil.rmtree(self.place, ignore_errors=True)
        self._partial.rename(self.place)
        return made

    def release(self) -> None:
        """Let go of open files; what was written stays for the next attempt."""
        if self._shards is not None:
            self._shards.release()

    def discard(self) -> None:
        """Remove what was written so far."""
        self.release()
        shutil.rmtree(self._partial, ignore_errors=True)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of the context as this artifact's own."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - begun

    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as they are."""
        for key, tensor in tensors.items():
            self._write(key, tensor)

    def put(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the stored tensors of a quantized module."""
        for suffix, tensor in tensors.items():
            self._write(f"{module}.{suffix}", tensor)

    def _write(self, key: str, tensor: Tensor) -> None:
        assert self._writer is not None, "begin comes first"
        self._writer.add(key, tensor)
