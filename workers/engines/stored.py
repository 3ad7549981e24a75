"""The base of makers of modules in a format with a codec of its own: config.json's part, and stacks of experts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial as partial_function
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workers.checkpoint.source import ModelSource
from workers.engines.maker import Maker
from workers.errors import UnsupportedRecipe
from workers.formats.kept import DecodedSource
from workers.formats.table import CODECS
from workers.model.loading import QuantizableWeight, StreamedModel
from workers.spec import mlx
from workers.spec.formats import FORMATS
from workers.spec.job import Job, Order
from workers.spec.layers import Layout
from workers.spec.schemes import LinearScheme, MicroscalingScheme

MXFP4 = MicroscalingScheme(type="mxfp4")


class StoredMaker(Maker):
    """Stores modules by the codec of the recipe's format; ``_chosen`` says which, and under which schemes."""

    def __init__(self, job: Job, order: Order, streamed: StreamedModel, source: ModelSource, partial: Path) -> None:
        super().__init__(job, order, streamed, source, partial)
        recipe = order.recipe
        codec = CODECS[recipe.format]
        assert codec.encode is not None, "the recipe names a format that linear layers are stored in"
        assert codec.config is not None, "the recipe names a format that linear layers are stored in"
        self._encode, self._config = codec.encode, codec.config
        self._place = partial_function(FORMATS[recipe.format].place, str(streamed.model.config.model_type))
        # Tensors of a layer's experts that the format stacks, by the stack's name and the expert.
        self._stacks: dict[str, dict[int, Tensor]] = {}
        self._weights, self._schemes = self._chosen()
        # Keys of experts in MXFP4 that are stored as the source has them.
        self._blocks: tuple[str, ...] = ()
        if FORMATS[recipe.format].blocks and isinstance(source, DecodedSource):
            self._blocks = tuple(key for key in source.headers if source.has_blocks(key))
        self.quantization_config()  # raises if the format can't store the schemes

    @abstractmethod
    def _chosen(self) -> tuple[dict[str, QuantizableWeight], dict[str, LinearScheme]]:
        """All weights that can be quantized, and the schemes of those that are, by checkpoint key."""

    def layout(self) -> Layout:
        """The schemes of the quantized modules, deviations included."""
        return Layout.of(self._by_module())

    def _by_module(self) -> dict[str, LinearScheme]:
        return {self._weights[key].module: scheme for key, scheme in self._schemes.items()}

    def quantization_config(self) -> dict[str, Any]:
        """The quantization config as the format defines it."""
        conv1d = [self._weights[key].module for key in self._schemes if self._weights[key].transposed]
        in_model = {
            weight.module: weight.input.module
            for key, weight in self._weights.items()
            # Experts are one module in the model, whatever they are called in the checkpoint.
            if key in self._schemes and weight.input.expert is None and weight.input.module != weight.module
        }
        by_module, others = self._by_stored_module(), self._unquantized_modules()
        by_module |= {name: MXFP4 for key in self._blocks for name in mlx.fused_experts(key)}
        speculative = {key.rpartition(".")[0] for key in self._streamed.speculative}
        return self._config(by_module, others, conv1d, self.order.runtimes, in_model, speculative)

    def _by_stored_module(self) -> dict[str, LinearScheme]:
        """The schemes by the modules' names in the artifact.

        Raises:
            UnsupportedRecipe: experts that are stored as one tensor have different schemes.
        """
        stored: dict[str, LinearScheme | None] = {}
        for weight in self._weights.values():
            place, scheme = self._place(weight.module), self._schemes.get(weight.key)
            name = place.name if place else weight.module
            if stored.setdefault(name, scheme) != scheme:
                recipe = self.order.recipe
                raise UnsupportedRecipe(
                    f"recipe {recipe.name!r}: format {recipe.format} stores the experts of a layer as one "
                    f"tensor, {name}, and {weight.module} has another scheme than those before it; give a layer's "
                    "experts one scheme, and ignore all or none"
                )
        return {name: scheme for name, scheme in stored.items() if scheme is not None}

    def _unquantized_modules(self) -> list[str]:
        """Modules that aren't quantized and that a runtime may take for linear layers, by their names in the model and
        in the checkpoint.

        A router is a module of its own in transformers and a linear layer in vLLM; so are the layers of prediction
        heads, which transformers doesn't build at all. So every matrix of the checkpoint counts that is no embedding.
        """
        weights, modules = self._weights, dict(self._streamed.model.named_modules())
        coded = {weights[key].input.module for key in self._schemes}
        linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        in_checkpoint = []
        for key, header in self._source.headers.items():
            matrix = key.endswith(".weight") and len(header.shape) == 2
            if not matrix or key in self._schemes or key in self._streamed.unused:
                continue
            owner = self._streamed.owners.get(key, key).rpartition(".")[0]
            if not isinstance(modules.get(owner), nn.Embedding):
                in_checkpoint.append(key.rpartition(".")[0])
        return [*(name for name in linears if name not in coded), *in_checkpoint]

    def _copy_rest(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors that aren't quantized; experts in MXFP4 as the source has them, if the format holds such."""
        for key, tensor in tensors.items():
            if key in self._blocks:
                assert isinstance(self._source, DecodedSource), "others have no blocks"
                self.copy(self._source.blocks(key))
                self.fallbacks["experts in MXFP4: codes and scales are the source's own, bit for bit"] = None
            else:
                self.copy({key: tensor})

    def _write(self, key: str, tensor: Tensor) -> None:
        """Write a tensor, or keep it until all of its stack are there."""
        if place := self._place(key):
            self._stacks.setdefault(place.name, {})[place.expert] = tensor.to("cpu")
        else:
            super()._write(key, tensor)

    def _write_stacks(self) -> None:
        """Write the layer's stacked experts, each stack as one tensor."""
        while self._stacks:
            name, experts = self._stacks.popitem()
            parts = [experts.pop(expert) for expert in range(len(experts))]
            super()._write(name, torch.stack([part.view(torch.uint8) for part in parts]).view(parts[0].dtype))
