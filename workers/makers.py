"""A maker makes one artifact from the layers that pass by, and puts it in its place at the end, whole."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from workers.checkpoint import Source, copy_companions
from workers.content import write_text
from workers.job import ArtifactMade, Job, Order, artifact_folder
from workers.loading import StreamedModel
from workers.shards import ShardWriter
from workers.statistics import Observer


class Maker(ABC):
    """One artifact in the making. ``layer`` takes one layer after the other, ``finish`` the rest.

    Raises:
        UnsupportedRecipe: on construction, before anything dear has started, if the model can't take the recipe.
    """

    def __init__(self, job: Job, order: Order, streamed: StreamedModel, source: Source) -> None:
        self.order = order
        self.seconds = 0.0
        self.fallbacks: dict[str, None] = {}
        self._streamed = streamed
        self._source = source
        self.place = artifact_folder(job.workspace, order)
        # Another process may be at the same artifact: each writes a folder of its own, and the rename decides.
        self._partial = self.place.with_name(f".{self.place.name}.{platform.node()}-{os.getpid()}.partial")
        self._writer: ShardWriter | None = None

    @abstractmethod
    def layer(self, index: int, observer: Observer | None) -> None:
        """Write one layer's tensors; its statistics are complete."""

    @abstractmethod
    def quantization_config(self) -> dict[str, Any]:
        """The ``quantization_config`` of config.json."""

    def finish(self) -> ArtifactMade:
        """Write what belongs to no layer, and put the artifact in its place."""
        self.copy(self._streamed.outside_keys)
        self.writer.close()
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
        write_text(record_path(self.place), made.model_dump_json() + "\n")
        shutil.rmtree(self.place, ignore_errors=True)
        self._partial.rename(self.place)
        return made

    def discard(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self._partial, ignore_errors=True)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of the context as this artifact's own."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - begun

    @property
    def writer(self) -> ShardWriter:
        """The shards, begun with the first tensor."""
        if self._writer is None:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._writer = ShardWriter(self._partial)
        return self._writer

    def copy(self, keys: Iterable[str]) -> None:
        """Write tensors as they are."""
        for key in keys:
            self.writer.add(key, self._source.read(key))

    def put(self, module: str, tensors: dict[str, Tensor]) -> None:
        """Write the stored tensors of a quantized module."""
        for suffix, tensor in tensors.items():
            self.writer.add(f"{module}.{suffix}", tensor)


def record_path(place: Path) -> Path:
    """Where the quantize stage notes what it made, beside the artifact: verify takes the fallbacks from there."""
    return place.with_name(f"{place.name}.json")
