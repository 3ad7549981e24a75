"""Makers: each makes one artifact from the layers that pass by, and puts it in its place at the end, whole."""

from __future__ import annotations

import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from workers.checkpoint import ShardWriter, Source, copy_companions, write_text
from workers.formats import compressed_tensors, gptq
from workers.formats.compressed_tensors import IntWeight
from workers.job import (
    ArtifactMade,
    BitsAndBytesRecipe,
    GptqRecipe,
    IntScheme,
    Job,
    Order,
    RtnRecipe,
    artifact_folder,
)
from workers.loading import QuantizableWeight, StreamedModel
from workers.methods import bitsandbytes, integers
from workers.statistics import Observer


class IntFormat(Protocol):
    """What a format of integer codes offers: the modules ``formats.compressed_tensors`` and ``formats.gptq`` do."""

    def encode(self, weight: IntWeight) -> dict[str, Tensor]:
        """The stored tensors by their names within the module."""

    def quantization_config(
        self, schemes: Mapping[str, IntScheme], kept: Iterable[str], conv1d: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The ``quantization_config`` of config.json."""


FORMATS: dict[str, IntFormat] = {"compressed-tensors": compressed_tensors, "gptq": gptq}


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
        self._partial = self.place.with_name(f".{self.place.name}.{os.getpid()}.partial")
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


class IntMaker(Maker):
    """Codes on an integer grid, in one of the formats that hold them."""

    def __init__(self, job: Job, order: Order, streamed: StreamedModel, source: Source) -> None:
        super().__init__(job, order, streamed, source)
        recipe = order.recipe
        assert isinstance(recipe, GptqRecipe | RtnRecipe)
        self._recipe = recipe
        self._format = FORMATS[recipe.format]
        self._schemes = integers.schemes_of(recipe, streamed.weights)
        self.fallbacks = dict.fromkeys(integers.deviations(recipe, streamed.weights, self._schemes))
        self._weights = {weight.key: weight for weight in streamed.weights}
        self.quantization_config()  # refuses what the format can't hold

    def quantization_config(self) -> dict[str, Any]:
        """As the format defines it."""
        weights = self._weights
        schemes = {weights[key].module: scheme for key, scheme in self._schemes.items()}
        conv1d = [weights[key].module for key in self._schemes if weights[key].transposed]
        return self._format.quantization_config(schemes, self._kept(), conv1d)

    def _kept(self) -> list[str]:
        """Every linear module that stays as it is, by its names in the model and in the checkpoint."""
        weights = self._weights
        coded = {weights[key].input[0].removesuffix(".weight") for key in self._schemes}
        linear = [name for name, module in self._streamed.model.named_modules() if isinstance(module, nn.Linear)]
        in_checkpoint = [weight.module for key, weight in weights.items() if key not in self._schemes]
        return [*(name for name in linear if name not in coded), *in_checkpoint]

    def layer(self, index: int, observer: Observer | None) -> None:
        """Solve what is to be quantized, copy the rest."""
        keys = self._streamed.keys_of_layer(index)
        chosen = [(self._weights[key], self._schemes[key]) for key in keys if key in self._schemes]
        seen = observer if self._recipe.calibrated else None
        for solved in integers.solve_layer(
            self._recipe, chosen, self._read, lambda weight: seen.of(weight.input) if seen else None
        ):
            self.put(solved.weight.module, self._format.encode(solved.codes))
            self.fallbacks.update(dict.fromkeys(solved.fallbacks))
        self.copy(key for key in keys if key not in self._schemes)

    def _read(self, weight: QuantizableWeight) -> Tensor:
        matrix = self._source.read(weight.key).to(self._streamed.device)
        return matrix.T.contiguous() if weight.transposed else matrix


class BitsAndBytesMaker(Maker):
    """bitsandbytes' own kernels over the tensors that the library would convert."""

    def __init__(self, job: Job, order: Order, streamed: StreamedModel, source: Source) -> None:
        super().__init__(job, order, streamed, source)
        recipe = order.recipe
        assert isinstance(recipe, BitsAndBytesRecipe)
        self._recipe = recipe
        self._plan = bitsandbytes.plan(streamed.model, recipe)
        self._modules = {weight.key: weight.input[0].removesuffix(".weight") for weight in streamed.weights}
        kept = [name for name in self._plan.kept if streamed.layers_name in name]
        if kept:
            said = f"left in half precision, for bitsandbytes converts linear modules alone: {_summary(kept)}"
            self.fallbacks[said] = None

    def quantization_config(self) -> dict[str, Any]:
        """As ``save_pretrained`` writes it."""
        dtypes = [self._source.headers[key].dtype for key in self._modules]
        return bitsandbytes.quantization_config(self._recipe, dtypes[0], self._plan.skipped)

    def layer(self, index: int, observer: Observer | None) -> None:
        """Convert what the library converts, copy the rest."""
        for key in self._streamed.keys_of_layer(index):
            module = self._modules.get(key)
            if module not in self._plan.converted:
                self.copy([key])
                continue
            tensor = integers.require_finite(key, self._source.read(key).to(self._streamed.device))
            transposed = module in self._plan.transposed
            self.put(
                key.removesuffix(".weight"), bitsandbytes.quantize(tensor, self._recipe.scheme, transposed=transposed)
            )


def _summary(names: list[str], shown: int = 3) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def make_maker(job: Job, order: Order, streamed: StreamedModel, source: Source) -> Maker:
    """The maker for an order's recipe."""
    match order.recipe:
        case BitsAndBytesRecipe():
            return BitsAndBytesMaker(job, order, streamed, source)
        case GptqRecipe() | RtnRecipe():
            return IntMaker(job, order, streamed, source)


def record_path(place: Path) -> Path:
    """Where the quantize stage notes what it made, beside the artifact: verify takes the fallbacks from there."""
    return place.with_name(f"{place.name}.json")
