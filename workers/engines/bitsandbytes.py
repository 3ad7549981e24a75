"""The maker of bitsandbytes artifacts: converts weights to the tensors that the library itself would save.

The kernels, the choice of modules and the block in config.json are the library's own. The result is byte-identical to
``from_pretrained(source, quantization_config=...)`` followed by ``save_pretrained``, without a model in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert

from workers.checkpoint.source import ModelSource
from workers.engines.maker import Maker
from workers.errors import UnsupportedRecipe
from workers.methods.layer import LayerWork
from workers.methods.scaling import some
from workers.model.loading import StreamedModel
from workers.spec.formats import BNB_BLOCK
from workers.spec.job import Job, Order
from workers.spec.layers import Layout
from workers.spec.recipes import BitsAndBytesRecipe
from workers.spec.schemes import FourBitFloatScheme, LlmInt8Scheme

# Indexers of sparse attention cast the input of this module to the dtype of its weight: to bytes, where that is packed.
# Most classes keep it in float32; those of glm5_next and dots3_note (transformers 5.23) don't.
CASTS_ITS_INPUT = ".indexer.weights_proj"


@dataclass(frozen=True)
class Plan:
    """Modules that bitsandbytes converts in one model; all names are module names of the transformers model.

    ``transposed`` are the Conv1D modules of ``converted``, stored (in, out) by the source. ``skipped`` is the list for
    config.json: None for the library's own default. ``unquantized`` are parameters that a matmul reads and that stay in
    half precision though the recipe doesn't ignore them (fused experts, routers, the head).
    """

    converted: frozenset[str]
    transposed: frozenset[str]
    skipped: tuple[str, ...] | None
    unquantized: tuple[str, ...]


def plan(streamed: StreamedModel, recipe: BitsAndBytesRecipe) -> Plan:
    """Determine which modules of the model (on the meta device, not modified) the library converts.

    The library's own default always applies: the output head and tied weights stay. What the recipe ignores in
    addition, what belongs to no decoder layer (towers of multimodal models), and what computes wrongly once it's
    converted, is in ``skipped``.
    """
    model, inside = streamed.model, {weight.input.module for weight in streamed.weights}
    converted = _converted(model, recipe, None)
    ignored = {
        name for name in converted if name not in inside or recipe.ignores(name) or name.endswith(CASTS_ITS_INPUT)
    }
    skipped: tuple[str, ...] | None = None
    if ignored:
        skipped = tuple(sorted(ignored | set(get_keys_to_not_convert(model))))
        converted = _converted(model, recipe, skipped)
    return Plan(
        converted=frozenset(converted),
        transposed=frozenset(name for name, source in converted.items() if issubclass(source, Conv1D)),
        skipped=skipped,
        unquantized=tuple(_unquantized(model, recipe, converted)),
    )


def quantize(
    weight: Tensor,
    scheme: FourBitFloatScheme | LlmInt8Scheme,
    *,
    transposed: bool,
    storage: torch.dtype = torch.uint8,
) -> dict[str, Tensor]:
    """Quantize one weight with the library's kernel, on the weight's own device.

    ``weight`` is (out, in), or (in, out) if ``transposed``, in the checkpoint's dtype. Returns the stored tensors by
    their names within the module: 4-bit ``weight`` uint8 (n/2, 1), or its bytes as ``storage``, with ``weight.absmax``,
    ``weight.quant_map`` and the packed state; LLM.int8 ``weight`` int8 (out, in), ``SCB`` float32 (out,),
    ``weight_format`` uint8 ().
    """
    weight_OI = (weight.T if transposed else weight).contiguous()
    match scheme:
        case FourBitFloatScheme():
            packed, state = bnb.functional.quantize_4bit(
                weight_OI,
                blocksize=BNB_BLOCK,
                compress_statistics=scheme.double_quantization,
                quant_type=scheme.type,
                quant_storage=storage,
            )
            return {"weight": packed, **{f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}}
        case LlmInt8Scheme():
            # bitsandbytes.nn.Int8Params quantizes from float16, whatever the checkpoint's dtype.
            codes, row_max, _ = bnb.functional.int8_vectorwise_quant(weight_OI.to(torch.float16))
            return {"weight": codes, "SCB": row_max, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def quantization_config(
    recipe: BitsAndBytesRecipe, dtype: torch.dtype, skipped: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Return the ``quantization_config`` of config.json, as ``save_pretrained`` writes it.

    ``dtype`` is the checkpoint's: 4-bit layers compute in it, unless the recipe says in what. ``skipped`` comes from
    :func:`plan`.
    """
    config: dict[str, Any] = _library_config(recipe, dtype, skipped).to_dict()
    return {**config, "quant_method": config["quant_method"].value}


def _library_config(
    recipe: BitsAndBytesRecipe, dtype: torch.dtype, skipped: tuple[str, ...] | None
) -> BitsAndBytesConfig:
    skip_modules, options = None if skipped is None else list(skipped), recipe.options
    match recipe.scheme:
        case FourBitFloatScheme() as scheme:
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=scheme.type,
                bnb_4bit_use_double_quant=scheme.double_quantization,
                bnb_4bit_compute_dtype=getattr(torch, options.compute_dtype) if options.compute_dtype else dtype,
                bnb_4bit_quant_storage=options.quant_storage,
                llm_int8_enable_fp32_cpu_offload=options.fp32_cpu_offload,
                llm_int8_skip_modules=skip_modules,
            )
        case LlmInt8Scheme() as scheme:
            return BitsAndBytesConfig(
                load_in_8bit=True,
                llm_int8_threshold=scheme.outlier_threshold,
                llm_int8_enable_fp32_cpu_offload=options.fp32_cpu_offload,
                llm_int8_skip_modules=skip_modules,
            )


def _converted(
    model: PreTrainedModel, recipe: BitsAndBytesRecipe, skipped: tuple[str, ...] | None
) -> dict[str, type[nn.Module]]:
    """Names of the modules that the library replaces in a copy of the model, with their original classes."""
    config = _library_config(recipe, torch.float32, skipped)
    keep = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)
    replaced = replace_with_bnb_linear(copy.deepcopy(model), keep, config)
    return {
        name: module.source_cls
        for name, module in replaced.named_modules()
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    }


def _unquantized(model: PreTrainedModel, recipe: BitsAndBytesRecipe, converted: Iterable[str]) -> list[str]:
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    known = {f"{name}.weight" for name in (*embeddings, *converted)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name not in known and not recipe.ignores(name.removesuffix(".weight"))
    ]


class BitsAndBytesMaker(Maker):
    """Applies bitsandbytes' own kernels to the tensors that the library would convert."""

    def __init__(self, job: Job, order: Order, streamed: StreamedModel, source: ModelSource, partial: Path) -> None:
        super().__init__(job, order, streamed, source, partial)
        recipe = order.recipe
        assert isinstance(recipe, BitsAndBytesRecipe)
        self._recipe = recipe
        self._plan = plan(streamed, recipe)
        self._modules = {weight.key: weight.input.module for weight in streamed.weights}
        if not self._plan.converted:
            raise UnsupportedRecipe(
                f"recipe {recipe.name!r}: nothing is left to quantize, got ignore {list(recipe.ignore)}; shorten it"
            )
        unquantized = [name for name in self._plan.unquantized if streamed.layers_name in name]
        casting = [name for name in unquantized if name.removesuffix(".weight").endswith(CASTS_ITS_INPUT)]
        for names, why in (
            ([name for name in unquantized if name not in casting], "bitsandbytes converts linear modules alone"),
            (casting, "transformers casts their inputs to the dtype of the weight"),
        ):
            if names:
                self.fallbacks[f"left in half precision, for {why}: {some(names)}"] = None

    def layout(self) -> Layout:
        """The recipe's scheme for every module that the library converts."""
        converted = [w.module for w in self._streamed.weights if self._modules[w.key] in self._plan.converted]
        return Layout.of(dict.fromkeys(converted, self._recipe.scheme))

    def quantization_config(self) -> dict[str, Any]:
        """The quantization config, as ``save_pretrained`` writes it."""
        dtypes = [self._source.headers[key].dtype for key in self._modules]
        return quantization_config(self._recipe, dtypes[0], self._plan.skipped)

    def layer(self, work: LayerWork) -> None:
        """Quantize the modules that the library converts, and copy the other tensors."""
        keys = self._streamed.keys_of_layer(work.index)
        if work.tensors.whole:
            converted = [key for key in keys if self._modules.get(key) in self._plan.converted]
            work.finite.ask({key: work.tensors.placed[key] for key in converted})
        for key in keys:
            module = self._modules.get(key)
            if module not in self._plan.converted:
                self.copy({key: work.tensors.as_read[key]})
                continue
            tensor = work.finite.require(key, work.tensors.placed[key])
            transposed = module in self._plan.transposed
            storage = getattr(torch, self._recipe.options.quant_storage)
            parts = quantize(tensor, self._recipe.scheme, transposed=transposed, storage=storage)
            self.put(key.removesuffix(".weight"), parts)
