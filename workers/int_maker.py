"""The maker of artifacts whose codes lie on an integer grid (rtn, gptq)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from workers.checkpoint import Source
from workers.codes import IntWeight
from workers.formats import compressed_tensors, gptq
from workers.job import Job, Order
from workers.loading import QuantizableWeight, StreamedModel
from workers.makers import Maker
from workers.methods import integers
from workers.recipes import GptqRecipe, IntScheme, RtnRecipe
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
        unknown = self._other_matrices()
        if unknown:
            self.fallbacks[f"left in half precision, for they are no linear layers that can be streamed: {unknown}"] = (
                None
            )
        self._weights = {weight.key: weight for weight in streamed.weights}
        self.quantization_config()  # refuses what the format can't hold

    def _other_matrices(self) -> str:
        """Large tensors of the layers that aren't linear weights of their own: experts stored as one tensor."""
        streamed, known = self._streamed, {weight.key for weight in self._streamed.weights}
        found = []
        for index in range(len(streamed.layers)):
            shapes = {key: self._source.headers[key].shape for key in streamed.keys_of_layer(index)}
            threshold = sum(map(math.prod, shapes.values())) // 100
            large = (key for key, shape in shapes.items() if len(shape) > 1 and math.prod(shape) > threshold)
            found += [key for key in large if key not in known and not self._recipe.ignores(key.rpartition(".")[0])]
        return compressed_tensors.some(found) if found else ""

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
