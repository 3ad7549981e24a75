"""A maker makes one artifact from the layers that pass by, and puts it in its place at the end, whole."""

from __future__ import annotations

import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from workers.checkpoint import Source, copy_companions
from workers.content import write_text
from workers.folding import Fold
from workers.job import ArtifactMade, Job, Order, artifact_folder
from workers.loading import StreamedModel
from workers.methods.factors import Factors
from workers.recipes import Frozen
from workers.shards import Journal, ShardWriter
from workers.statistics import Observer


@dataclass(frozen=True)
class LayerWork:
    """One layer as all makers get it: its checkpoint tensors, and what was seen of it.

    ``observer`` is None in a pass without calibration; ``folds`` are those that a probe of the layer has proven;
    ``factors`` are shared by the recipes that solve under the same statistics.
    """

    index: int
    tensors: Mapping[str, Tensor]
    observer: Observer | None = None
    folds: Sequence[Fold] = ()
    factors: Factors = field(default_factory=Factors)


class MakerState(Frozen):
    """What a maker needs to go on after a kill."""

    journal: Journal
    fallbacks: tuple[str, ...]
    seconds: float


class Maker(ABC):
    """One artifact in the making. ``layer`` takes one layer after the other, ``finish`` the rest.

    Raises:
        UnsupportedRecipe: on construction, before anything dear has started, if the model can't take the recipe.
        FileNotFoundError: ``state`` names files that aren't there.
    """

    def __init__(
        self,
        job: Job,
        order: Order,
        streamed: StreamedModel,
        source: Source,
        partial: Path,
        state: MakerState | None = None,
    ) -> None:
        self.order = order
        self.seconds = state.seconds if state else 0.0
        self.fallbacks: dict[str, None] = {}
        # The layer as the artifact holds it, by checkpoint key: for recipes that calibrate on their own activations.
        self.decoded: dict[str, Tensor] = {}
        self._streamed = streamed
        self._source = source
        self.place = artifact_folder(job.workspace, order)
        self._partial = partial
        if state is None:
            shutil.rmtree(partial, ignore_errors=True)
        self._writer = ShardWriter(partial, journal=state.journal if state else None)

    @abstractmethod
    def layer(self, work: LayerWork) -> None:
        """Write one layer's tensors; its statistics are complete."""

    @abstractmethod
    def quantization_config(self) -> dict[str, Any]:
        """The ``quantization_config`` of config.json."""

    def state(self) -> MakerState:
        """What was made so far, surely on the disk."""
        return MakerState(journal=self._writer.journal(), fallbacks=tuple(self.fallbacks), seconds=self.seconds)

    def finish(self) -> ArtifactMade:
        """Write what belongs to no layer, and put the artifact in its place."""
        for key in self._streamed.outside_keys:
            self.copy({key: self._source.read(key)})
        self._writer.close()
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
        write_text(record_path(self.place), made.model_dump_json() + "\n")
        shutil.rmtree(self.place, ignore_errors=True)
        self._partial.rename(self.place)
        return made

    def release(self) -> None:
        """Let go of open files; what was written stays for the next attempt."""
        self._writer.release()

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
            self._writer.add(key, tensor)

    def put(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the stored tensors of a quantized module."""
        for suffix, tensor in tensors.items():
            self._writer.add(f"{module}.{suffix}", tensor)


def record_path(place: Path) -> Path:
    """Where the quantize stage notes what it made, beside the artifact: verify takes the fallbacks from there."""
    return place.with_name(f"{place.name}.json")


def folds_folder(place: Path) -> Path:
    """Where the scales that were folded into an artifact's weights are kept, beside it: verify undoes them."""
    return place.with_name(f"{place.name}.folds")
