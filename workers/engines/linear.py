"""The maker of artifacts by our own methods: quantizes linear layers, and stores them in a format for their codes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint.source import ModelSource
from workers.engines.stored import StoredMaker
from workers.errors import UnsupportedRecipe
from workers.formats.already import kept_codes
from workers.formats.kept import DecodedSource
from workers.methods import linear, schemes
from workers.methods.layer import Coded, Factors, Layer, LayerWork, require_finite
from workers.methods.scaling import Scaling, some
from workers.model import first_layer
from workers.model.key_values import KEYS, VALUES, attentions_of
from workers.model.loading import InputName, QuantizableWeight, StreamedModel
from workers.model.statistics import InputStatistics
from workers.numerics import fp8
from workers.numerics.codes import CodedWeight
from workers.numerics.precision import coarse_products
from workers.spec.formats import FORMATS
from workers.spec.fusion import together
from workers.spec.job import ArtifactMade, Job, Order
from workers.spec.recipes import LinearRecipe, nearest
from workers.spec.schemes import LinearScheme
from workers.spec.workspace import folds_folder

# Elements of embeddings or head that are quantized at a time: bounds the memory of a large vocabulary.
OUTSIDE_ELEMENTS = 1 << 24
# Weight of the embeddings' own squared error beside what the first layer sees of it, as a share of its mean diagonal:
# the residual stream carries the error on (tests/bench/RESULTS.md).
RESIDUAL = 0.15


class LinearMaker(StoredMaker):
    """Quantizes linear layers."""

    def __init__(self, job: Job, order: Order, streamed: StreamedModel, source: ModelSource, partial: Path) -> None:
        assert isinstance(order.recipe, LinearRecipe)
        self._recipe = order.recipe
        super().__init__(job, order, streamed, source, partial)
        outside = {
            key: weight for key, weight in self._weights.items() if weight.layer < 0 and key not in streamed.speculative
        }
        self._attentions = {
            index: attentions_of(streamed, index) if self._recipe.kv_cache else {}
            for index in range(len(streamed.layers))
        }
        if self._recipe.kv_cache and not any(self._attentions.values()):
            raise UnsupportedRecipe(
                f"recipe {self._recipe.name!r}: kv_cache: no attention of {type(streamed.model).__name__} is known to "
                "cache keys and values as they are (self_attn with k_proj and v_proj, or qkv_proj); leave kv_cache out"
            )
        self.fallbacks |= dict.fromkeys(schemes.deviations(self._recipe, streamed.weights, self._schemes))
        self.fallbacks.update(dict.fromkeys(schemes.left_outside(self._recipe, streamed, outside)))
        self._block = self._fused_in_block()
        if self._recipe.mtp == "quantize":
            self.fallbacks[self._said_of_block()] = None
        unknown = self._other_matrices()
        if unknown:
            note = f"left in half precision, for they are no linear layers that can be streamed: {some(unknown)}"
            self.fallbacks[note] = None

    def _chosen(self) -> tuple[dict[str, QuantizableWeight], dict[str, LinearScheme]]:
        outside = schemes.outside_weights(self._recipe, self._streamed)
        chosen = schemes.schemes_of(self._recipe, self._streamed)
        chosen |= {key: schemes.scheme_outside(self._recipe, weight) for key, weight in outside.items()}
        block = schemes.speculative_weights(self._recipe, self._streamed)
        for key, weight in block.items():
            if (scheme := schemes.scheme_in_block(self._recipe, weight)) is not None:
                chosen[key] = scheme
        return {weight.key: weight for weight in self._streamed.weights} | outside | block, chosen

    def _fused_in_block(self) -> dict[str, list[QuantizableWeight]]:
        """The quantized weights of speculative blocks by key, each with those that runtimes fuse it with."""
        weights = [self._weights[key] for key in self._schemes if key in self._streamed.speculative]
        by_module = {weight.module: weight for weight in weights}
        groups = ([by_module[module] for module in modules] for modules in together(by_module))
        return {weight.key: group for group in groups for weight in group}

    def _said_of_block(self) -> str:
        modules = [self._weights[key].module for key in self._block]
        if not modules:
            return "mtp: quantize: the checkpoint has no speculative block with linear layers as its decoder's"
        return (
            f"speculative block rounded to nearest, for no calibration text passes through it: {len(modules)} linear "
            f"layers ({some(modules)})"
        )

    def _other_matrices(self) -> list[str]:
        """Large layer tensors that aren't separate linear weights, such as experts stored as one tensor."""
        streamed, known = self._streamed, {weight.key for weight in self._streamed.weights}
        unquantized = []
        for index in range(len(streamed.layers)):
            shapes = {key: self._source.headers[key].shape for key in streamed.keys_of_layer(index)}
            threshold = sum(map(math.prod, shapes.values())) // 100
            large = (key for key, shape in shapes.items() if len(shape) > 1 and math.prod(shape) > threshold)
            unquantized += [
                key
                for key in large
                if key not in {*known, *self._blocks} and not self._recipe.ignores(key.rpartition(".")[0])
            ]
        return unquantized

    def quantization_config(self) -> dict[str, Any]:
        """The quantization config as the format defines it."""
        config = super().quantization_config()
        declaration = FORMATS[self._recipe.format].cache_declaration
        return {**config, **declaration} if declaration and self._recipe.kv_cache else config

    def layer(self, work: LayerWork) -> None:
        """Quantize one layer's weights, and copy its other tensors."""
        self._stacks = {}
        keys = self._streamed.keys_of_layer(work.index)
        chosen = [(self._weights[key], self._schemes[key]) for key in keys if key in self._schemes]
        scaling = self._scaling(work)
        if work.tensors.whole:
            work.finite.ask({weight.key: work.tensors.placed[weight.key] for weight, _ in chosen})
        layer = self._layer(work, scaling, chosen)
        cards = [(thread, self._layer(at, scaling.copied(at, thread.device), chosen)) for thread, at in work.cards]
        self.decoded = {}
        kept = self._kept(chosen)
        others = [pair for pair in chosen if pair[0].module not in kept]
        for coded in linear.code_layer(self._recipe, others, layer, cards):
            self._put(coded, layer.dtype, work.tensors.home)
        for weight, _ in chosen:
            if weight.module in kept:
                self._put(Coded(weight, kept[weight.module]), layer.dtype, work.tensors.home)
        self._copy_rest(
            {key: scaling.replaced.get(key, work.tensors.as_read[key]) for key in keys if key not in self._schemes}
        )
        self._write_stacks()
        self._write_cache_scales(work, layer.dtype)
        self._note_borrowing(work, [weight for weight, _ in chosen if weight.module not in kept])
        if scaling.changed:
            scaling.save(self._folds / f"{work.index:05d}.safetensors")

    def _layer(
        self, work: LayerWork, scaling: Scaling, chosen: Sequence[tuple[QuantizableWeight, LinearScheme]]
    ) -> Layer:
        """The layer as methods see it, where ``work`` has it."""
        return Layer(
            read=lambda weight: self._read(work, scaling, weight),
            statistics=lambda weight: scaling.statistics(weight, self._statistics(work, weight)),
            dtype=self._source.headers[chosen[0][0].key].dtype if chosen else self._streamed.dtype,
            factors=work.factors,
        )

    def _kept(self, chosen: list[tuple[QuantizableWeight, LinearScheme]]) -> dict[str, CodedWeight]:
        """The codes of weights that the source has in the recipe's scheme, by module: they are stored as they are.

        Methods that fold scales into weights change them first.
        """
        if not isinstance(self._source, DecodedSource) or self._recipe.needs.folds:
            return {}
        schemes = {weight.module: scheme for weight, scheme in chosen if not weight.transposed}
        kept = kept_codes(self._source, schemes, self._recipe.format)
        if kept and len(kept) == len(chosen):
            self.fallbacks["codes and scales are the source's own, bit for bit, for it has the recipe's scheme"] = None
        elif kept:
            self.fallbacks[f"codes and scales are the source's own, bit for bit: {some(list(kept))}"] = None
        return kept

    def _write_cache_scales(self, work: LayerWork, dtype: torch.dtype) -> None:
        """Write the scales of the layer's keys and values: their largest magnitude over the largest of E4M3.

        Raises:
            UnsupportedRecipe: an attention module cached nothing.
        """
        for module, stored in self._attentions[work.index].items():
            for leaf in (KEYS, VALUES):
                seen = work.observer.of(InputName(f"{module}.{leaf}", None)) if work.observer else None
                if seen is None:
                    raise UnsupportedRecipe(
                        f"recipe {self._recipe.name!r}: kv_cache: {module} handed no keys and values to its cache; "
                        "leave kv_cache out for this model"
                    )
                super()._write(f"{stored}.{leaf}", fp8.input_scale(seen.abs_max_I, dtype).to("cpu"))

    def _put(self, coded: Coded, dtype: torch.dtype, home: torch.device) -> None:
        weight = coded.weight
        self.put(weight.module, self._encode(coded.codes, self._schemes[weight.key]))
        self.fallbacks.update(dict.fromkeys(coded.fallbacks))
        if self._recipe.needs.own_stream:
            matrix_OI = coded.codes.dequantize().to(home, dtype)
            self.decoded[weight.key] = matrix_OI.T.contiguous() if weight.transposed else matrix_OI

    def outside(self, key: str) -> None:
        """Quantize embeddings or head if the recipe says so, in pieces of their rows; copy any other tensor."""
        scheme = self._schemes.get(key)
        if scheme is None:
            super().outside(key)
            return
        if key in self._block:
            self._round_block(self._block[key], key)
            return
        weight, matrix_OI = self._weights[key], self._source.read(key)
        layer = Layer(
            read=lambda piece: require_finite(key, rows_OI),
            statistics=lambda piece: statistics,
            dtype=matrix_OI.dtype,
            factors=Factors(),
        )
        statistics, stored = self._statistics_outside(weight), list[dict[str, Tensor]]()
        for rows in torch.split(matrix_OI, max(OUTSIDE_ELEMENTS // matrix_OI.shape[1], 1)):
            rows_OI = rows.to(self._streamed.device)
            piece = replace(weight, shape_OI=(len(rows), matrix_OI.shape[1]))
            for coded in linear.code_layer(self._recipe, [(piece, scheme)], layer):
                stored.append({name: tensor.to("cpu") for name, tensor in self._encode(coded.codes, scheme).items()})
                self.fallbacks.update(dict.fromkeys(coded.fallbacks))
        self.put(weight.module, {name: _joined([part[name] for part in stored]) for name in stored[0]})

    def _round_block(self, group: list[QuantizableWeight], key: str) -> None:
        """Round weights of a speculative block that runtimes fuse, once the first of them comes."""
        if key != min(weight.key for weight in group):
            return
        pairs = [(weight, self._schemes[weight.key]) for weight in group]
        layer = Layer(
            read=lambda weight: require_finite(weight.key, self._source.read(weight.key).to(self._streamed.device)),
            statistics=lambda weight: None,
            dtype=self._source.headers[key].dtype,
            factors=Factors(),
        )
        kept = self._kept(pairs)
        others = [pair for pair in pairs if pair[0].module not in kept]
        for coded in linear.code_layer(nearest(self._recipe), others, layer):
            self.put(coded.weight.module, self._encode(coded.codes, self._schemes[coded.weight.key]))
            self.fallbacks.update(dict.fromkeys(coded.fallbacks))
        for weight, scheme in pairs:
            if weight.module in kept:
                self.put(weight.module, self._encode(kept[weight.module], scheme))

    def _statistics_outside(self, weight: QuantizableWeight) -> InputStatistics | None:
        """The statistics that a matrix outside of the layers is quantized under: the head's input; for embeddings what
        the first layer makes of an error, and both if one matrix serves for both."""
        if self.final is None:
            return None
        model, width = self._streamed.model, weight.shape_OI[1]
        is_embeddings = model.get_submodule(weight.input.module) is self._streamed.language_model.get_input_embeddings()
        if not is_embeddings:
            return self.final
        seen = InputStatistics.even(width, self._streamed.device)
        if (first_II := first_layer.gram(self._streamed, self._source, width)) is not None:
            seen.gram_II.mul_(RESIDUAL).add_(first_II.to(seen.gram_II))
        return InputStatistics.sum([seen, self.final.normalized()]) if schemes.is_tied(model) else seen

    def _scaling(self, work: LayerWork) -> Scaling:
        """Choose and fold the scales of the layer's inputs, if the method uses any."""
        scaling = Scaling(
            self._streamed, work, {key: s for key, s in self._schemes.items() if key in work.tensors.as_read}
        )
        if self._recipe.needs.folds:
            with coarse_products():
                scaling.choose(self._recipe)
            self.fallbacks.update(dict.fromkeys(scaling.notes))
        return scaling

    def _read(self, work: LayerWork, scaling: Scaling, weight: QuantizableWeight) -> Tensor:
        """A weight as [O, I], scaled if the method scales it.

        Raises:
            NumericalError: it contains NaN or Inf.
        """
        placed = work.finite.require(weight.key, work.tensors.placed[weight.key])
        matrix_OI = placed.T.contiguous() if weight.transposed else placed
        scaled_OI = scaling.weight(weight, matrix_OI)
        return scaled_OI if scaled_OI is matrix_OI else work.finite.require_scaled(weight.key, scaled_OI)

    def _statistics(self, work: LayerWork, weight: QuantizableWeight) -> InputStatistics | None:
        if work.observer is None or not self._recipe.calibrated:
            return None
        return work.observer.of(weight.input)

    @property
    def _folds(self) -> Path:
        return self._partial.with_name(f"{self._partial.name}.folds")

    def finish(self) -> ArtifactMade:
        """Write the tensors outside of the layers, store the folded scales, and move the artifact to its final path."""
        target = folds_folder(self.target)
        shutil.rmtree(target, ignore_errors=True)
        if self._folds.is_dir():
            # Copied, not moved: if the process is killed before the rename, the next attempt still needs them.
            shutil.copytree(self._folds, target)
        artifact = super().finish()
        shutil.rmtree(self._folds, ignore_errors=True)
        return artifact

    def discard(self) -> None:
        """Remove everything written so far."""
        super().discard()
        shutil.rmtree(self._folds, ignore_errors=True)


def _joined(parts: list[Tensor]) -> Tensor:
    """Tensors of any dtype, one below the other."""
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
