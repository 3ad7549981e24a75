"""Chooses the scales of a layer's inputs (AWQ, SmoothQuant), and folds them into the preceding module.

I input features, O output features; W x = (W diag(s)) (diag(1/s) x), and diag(1/s) is folded into the norm or linear
layer that computed x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from workers.methods.layer import FoldableInput, LayerWork
from workers.methods.table import METHODS
from workers.model.folding import Fold, fold_source
from workers.model.loading import InputName, QuantizableWeight, StreamedModel
from workers.model.statistics import InputStatistics
from workers.model.upload import on_host
from workers.numerics.smoothing import scaled
from workers.numerics.waits import brought
from workers.spec.recipes import LinearRecipe
from workers.spec.schemes import LinearScheme


class Scaling:
    """A layer's tensors and statistics under the scales of its inputs; unchanged unless ``choose`` is called.

    ``replaced`` are the changed tensors that aren't quantized (norms, routers), in their stored dtype.
    """

    def __init__(self, streamed: StreamedModel, work: LayerWork, schemes: Mapping[str, LinearScheme]) -> None:
        self._streamed = streamed
        self._work = work
        self._schemes = schemes
        self._weights = [weight for weight in streamed.weights if weight.layer == work.index]
        self._keys = {streamed.owners[key]: key for key in work.tensors.as_read}
        self._columns: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        self._inputs: dict[InputName, Tensor] = {}
        self._scaled: dict[tuple[int, InputName], InputStatistics] = {}
        self.replaced: dict[str, Tensor] = {}
        self.notes: list[str] = []

    def copied(self, work: LayerWork, device: torch.device) -> Scaling:
        """The same scales on another card, for the same layer there; this one itself where it is."""
        if work.factors is self._work.factors:
            return self
        other = Scaling(self._streamed, work, self._schemes)
        other._columns = {key: scale.to(device) for key, scale in self._columns.items()}
        other._rows = {key: scale.to(device) for key, scale in self._rows.items()}
        # Inputs that have one scale here have one there.
        scales = {id(scale): scale.to(device) for scale in self._inputs.values()}
        other._inputs = {name: scales[id(scale)] for name, scale in self._inputs.items()}
        return other

    @property
    def changed(self) -> bool:
        """Whether any tensor differs from the checkpoint's."""
        return bool(self._columns or self._rows or self.replaced)

    def weight(self, weight: QuantizableWeight, matrix_OI: Tensor) -> Tensor:
        """A weight to quantize: float32 if it is scaled, otherwise unchanged."""
        return scaled(matrix_OI, self._columns.get(weight.key), self._rows.get(weight.key))

    def statistics(self, weight: QuantizableWeight, statistics: InputStatistics | None) -> InputStatistics | None:
        """Statistics of a weight's input after scaling; weights that shared statistics still share them."""
        scale_I = self._inputs.get(weight.input)
        if statistics is None or scale_I is None:
            return statistics
        leader = next(name for name, other in self._inputs.items() if other is scale_I)
        key = (id(statistics), leader)
        if key not in self._scaled:
            self._scaled[key] = statistics.divided(scale_I)
        return self._scaled[key]

    def save(self, path: Path) -> None:
        """Store the scales, for ``formats.folded``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kinds = {"columns": self._columns, "rows": self._rows, "replaced": self.replaced}
        tensors = {f"{kind}|{key}": t for kind, tensors_by_key in kinds.items() for key, t in tensors_by_key.items()}
        save_file(on_host(tensors), path)

    # ------------------------------------------------------------------------------------- choosing

    def choose(self, recipe: LinearRecipe) -> None:
        """Choose the scales of all foldable inputs, and fold them."""
        folded: set[InputName] = set()
        for fold in self._work.folds:
            sinks = [weight for weight in self._sinks(fold) if weight.key in self._schemes]
            if not sinks or not self._reachable(fold):
                continue
            scale_I = self._chosen(recipe, fold, sinks)
            if scale_I is not None:
                self._fold(fold, scale_I)
                folded |= {weight.input for weight in sinks}
        unscaled = [w.module for w in self._weights if w.key in self._schemes and w.input not in folded]
        if unscaled:
            self.notes.append(f"inputs not scaled, for nothing before them can take the scales: {some(unscaled)}")

    def _sinks(self, fold: Fold) -> list[QuantizableWeight]:
        names = set(fold.sinks)
        return [weight for weight in self._weights if weight.input in names]

    def _reachable(self, fold: Fold) -> bool:
        """Whether every tensor that the fold changes has its own key in the checkpoint."""
        inputs = {weight.input for weight in self._weights}
        return all(sink in inputs or sink.parameter in self._keys for sink in fold.sinks)

    def _chosen(self, recipe: LinearRecipe, fold: Fold, sinks: Sequence[QuantizableWeight]) -> Tensor | None:
        """s of the sinks' input, float32 [I]; equal for all columns from one channel of the source."""
        observer, choose = self._work.observer, METHODS[recipe.method].input_scales
        assert observer is not None, "a method that folds is calibrated"
        assert choose is not None, "the recipe says that it folds"
        seen = [(weight, statistics) for weight in sinks if (statistics := observer.of(weight.input)) is not None]
        if not seen:
            return None
        return choose(recipe, FoldableInput(fold.rows_I, seen, sinks, self._schemes[seen[0][0].key], self._read))

    def _read(self, weight: QuantizableWeight) -> Tensor:
        matrix = self._work.tensors.placed[weight.key]
        return matrix.T if weight.transposed else matrix

    # -------------------------------------------------------------------------------------- folding

    def _fold(self, fold: Fold, scale_I: Tensor) -> None:
        """Divide the source by the scales, and multiply the sinks by the effective scales after rounding."""
        effective_I = self._divide_source(fold, scale_I)
        names = set(fold.sinks)
        for name in names:
            self._inputs[name] = effective_I
        inputs = {weight.input: None for weight in self._weights}
        for weight in self._weights:
            if weight.input in names:
                self._multiply(weight.key, effective_I, transposed=weight.transposed)
        for parameter, expert in names:
            if (parameter, expert) not in inputs:
                self._multiply(self._keys[parameter], effective_I, transposed=False)

    def _multiply(self, key: str, scale_I: Tensor, *, transposed: bool) -> None:
        if key in self._schemes:
            self._columns[key] = scale_I * self._columns.get(key, 1.0)
            return
        tensor = self._current(key)
        columns = scale_I[:, None] if transposed else scale_I
        self.replaced[key] = (tensor.float() * columns).to(tensor.dtype)

    def _divide_source(self, fold: Fold, scale_I: Tensor) -> Tensor:
        """Divide the source; return the effective scales of the sinks' columns."""
        if fold.kind == "linear":
            return self._divide_rows(fold, scale_I)
        weight, bias = self._keys[f"{fold.source}.weight"], self._keys.get(f"{fold.source}.bias")
        old_bias = None if bias is None else self._current(bias)
        new_weight, new_bias, effective = fold_source(fold.kind, self._current(weight), old_bias, scale_I)
        self.replaced[weight] = new_weight
        if bias is not None and new_bias is not None:
            self.replaced[bias] = new_bias
        return effective.float()

    def _divide_rows(self, fold: Fold, scale_I: Tensor) -> Tensor:
        """Divide the rows of a linear source, which may be several checkpoint keys fused in memory."""
        parameter = fold.source if fold.expert is not None else f"{fold.source}.weight"
        start, device = 0, scale_I.device
        for weight in [w for w in self._weights if w.input == (parameter, fold.expert)]:
            rows = weight.shape_OI[0]
            inside = (fold.rows_I >= start) & (fold.rows_I < start + rows)
            if bool(inside.any()):
                scale_O = torch.ones(rows, device=device)
                # Numbers of rows, not masks, which a card is waited for.
                columns = brought(inside.nonzero().flatten(), device)
                scale_O[brought(fold.rows_I[inside] - start, device)] = scale_I[columns]
                self._divide(weight, scale_O)
            start += rows
        bias = self._keys.get(f"{fold.source}.bias")
        if fold.expert is None and bias is not None:
            old_bias = self._current(bias)
            scale_O = torch.ones(len(old_bias), device=device)
            scale_O[brought(fold.rows_I, device)] = scale_I
            self.replaced[bias] = (old_bias.float() / scale_O).to(old_bias.dtype)
        return scale_I

    def _divide(self, weight: QuantizableWeight, scale_O: Tensor) -> None:
        if weight.key in self._schemes:
            self._rows[weight.key] = scale_O * self._rows.get(weight.key, 1.0)
            return
        tensor = self._current(weight.key)
        rows = scale_O if weight.transposed else scale_O[:, None]
        self.replaced[weight.key] = (tensor.float() / rows).to(tensor.dtype)

    def _current(self, key: str) -> Tensor:
        """A tensor that isn't quantized, with the folds so far applied."""
        return self.replaced[key] if key in self.replaced else self._work.tensors.placed[key]


def some(names: Sequence[str]) -> str:
    """List the first three of many names."""
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
