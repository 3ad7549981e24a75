"""The maker of bitsandbytes artifacts. Apart from the others: importing the library takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workers.checkpoint import Source
from workers.errors import UnsupportedRecipe
from workers.loading import StreamedModel
from workers.makers import Maker
from workers.methods import bitsandbytes
from workers.methods.layer import LayerWork, require_finite
from workers.spec.job import Job, Order
from workers.spec.layers import Layout
from workers.spec.recipes import BitsAndBytesRecipe


class BitsAndBytesMaker(Maker):
    """bitsandbytes' own kernels over the tensors that the library would convert."""

    def __init__(self, job: Job, order: Order, streamed: StreamedModel, source: Source, partial: Path) -> None:
        super().__init__(job, order, streamed, source, partial)
        recipe = order.recipe
        assert isinstance(recipe, BitsAndBytesRecipe)
        self._recipe = recipe
        self._plan = bitsandbytes.plan(streamed.model, recipe)
        self._modules = {weight.key: weight.input[0].removesuffix(".weight") for weight in streamed.weights}
        if not self._plan.converted:
            raise UnsupportedRecipe(
                f"recipe {recipe.name!r}: nothing is left to quantize, got ignore {list(recipe.ignore)}; shorten it"
            )
        kept = [name for name in self._plan.kept if streamed.layers_name in name]
        if kept:
            said = f"left in half precision, for bitsandbytes converts linear modules alone: {_summary(kept)}"
            self.fallbacks[said] = None

    def layout(self) -> Layout:
        """The one scheme for what the library converts."""
        converted = [w.module for w in self._streamed.weights if self._modules[w.key] in self._plan.converted]
        return Layout.of(dict.fromkeys(converted, self._recipe.scheme))

    def quantization_config(self) -> dict[str, Any]:
        """As ``save_pretrained`` writes it."""
        dtypes = [self._source.headers[key].dtype for key in self._modules]
        return bitsandbytes.quantization_config(self._recipe, dtypes[0], self._plan.skipped)

    def layer(self, work: LayerWork) -> None:
        """Convert what the library converts, copy the rest."""
        for key in self._streamed.keys_of_layer(work.index):
            module = self._modules.get(key)
            if module not in self._plan.converted:
                self.copy({key: work.tensors[key]})
                continue
            tensor = require_finite(key, work.tensors[key].to(self._streamed.device))
            transposed = module in self._plan.transposed
            self.put(
                key.removesuffix(".weight"), bitsandbytes.quantize(tensor, self._recipe.scheme, transposed=transposed)
            )


def _summary(names: list[str], shown: int = 3) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
