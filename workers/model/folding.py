"""Which channels of a layer can be rescaled without changing what it computes: pairs of a source and its sinks.

Nothing is known of any architecture. What may belong together is read off one run of the layer (what takes a norm's
output; which matrices lie side by side), and then proven: with a source divided and its sinks multiplied by powers of
two, which floats carry without rounding, the layer has to return the same bits. The powers are far apart, so that what
bounds its values (a clamp between two linear layers) shows on a few tokens; and the layer computes in float32, whatever
its own dtype, which none of them leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workers.model import trees
from workers.model.batching import ran_out
from workers.model.loading import InputName, QuantizableWeight
from workers.model.products import Products

FoldKind = Literal["norm", "unit-offset-norm", "linear"]
# A tensor of the layer, and what it is to hold.
TensorChange = tuple[Tensor, Tensor]
# Exponents of the powers of two that a proof scales with.
EXPONENTS = (-20.0, -1.0, 1.0, 20.0)


@dataclass(frozen=True)
class Fold:
    """A source that is divided, and all the sinks that undo it: parameters whose input columns are multiplied.

    ``source`` names the module, or for an expert of a fused parameter that parameter; ``rows_I`` (int64) is the channel
    of the source that each column of the sinks comes from.
    """

    source: str
    kind: FoldKind
    expert: int | None
    rows_I: Tensor
    sinks: tuple[InputName, ...]


def find_folds(
    layer: nn.Module, prefix: str, run: Callable[[], Any], targets: Sequence[QuantizableWeight]
) -> list[Fold]:
    """The folds of a loaded layer, proven by running it.

    ``prefix`` is the layer's name in the model; ``run`` runs it on some tokens, always the same and in float32, and
    returns its output and whatever else it may write to. ``targets`` are the layer's quantizable weights: linear
    sources are among them, and the sinks of a fold, beside routers. The layer's weights are afterwards what they were.
    """
    with _in_float32(layer):
        probe = _Probe(layer, prefix, run, targets)
        if not probe.deterministic:
            return []
        return probe.proven([*probe.from_norms(), *probe.from_linears()])


def fold_source(
    kind: FoldKind, weight: Tensor, bias: Tensor | None, s_I: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Divide a norm's weight and bias by s_I in their stored dtypes; and the s_I that rounding made of it (float32)."""
    offset = 1.0 if kind == "unit-offset-norm" else 0.0
    new = ((weight.float() + offset) / s_I - offset).to(weight.dtype)
    made = new.float() + offset
    effective = torch.where(made == 0, s_I, (weight.float() + offset) / made)
    # A channel that the norm switches off has no ratio.
    effective = torch.where(effective > 0, effective, s_I)
    return new, None if bias is None else (bias.float() / effective).to(bias.dtype), effective


@dataclass
class _Seen:
    """What one run showed: the input of each product, and each norm's arguments and output."""

    inputs: dict[InputName, Tensor] = field(default_factory=dict)
    norms: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = field(default_factory=dict)
    entered: dict[str, list[Tensor]] = field(default_factory=dict)
    result: tuple[Tensor, ...] = ()

    def note(self, name: InputName, inputs: Tensor) -> None:
        """Keep the first input that came to a product."""
        self.inputs.setdefault(name, inputs)


class _Probe:
    """One layer under examination; every name is the model's."""

    def __init__(
        self, layer: nn.Module, prefix: str, run: Callable[[], Any], targets: Sequence[QuantizableWeight]
    ) -> None:
        self._run = run
        self._modules = {f"{prefix}.{name}" if name else prefix: module for name, module in layer.named_modules()}
        self._parameters = {f"{prefix}.{name}": parameter for name, parameter in layer.named_parameters()}
        self._targets = list(dict.fromkeys(weight.input for weight in targets))
        self._generator = torch.Generator().manual_seed(0)
        self._plain = self._look()
        self.deterministic = _same(self._plain.result, self._look().result)

    # ---------------------------------------------------------------------------------------- looking

    def _look(self) -> _Seen:
        """Run the layer, and note what goes on inside."""
        seen = _Seen()
        matrices = [(name, parameter) for name, parameter in self._parameters.items() if parameter.dim() > 1]
        with ExitStack() as stack:
            for name, module in self._modules.items():
                before = module.register_forward_pre_hook(partial(_note_entry, seen, name))
                stack.callback(before.remove)
                if isinstance(module, nn.Linear | Conv1D):
                    # Whatever its forward does with the weight.
                    note = partial(_note_input, seen, f"{name}.weight")
                    stack.callback(module.register_forward_pre_hook(note).remove)
                if _is_norm(module):
                    hook = partial(_note_norm, seen, name)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            stack.enter_context(Products(matrices, seen.note))
            seen.result = tuple(tensor.clone() for _, tensor in trees.leaves(self._run()))
        return seen

    def _result(self) -> tuple[Tensor, ...] | None:
        """What the layer returns under changed weights; None if it fails."""
        try:
            return tuple(tensor for _, tensor in trees.leaves(self._run()))
        except (RuntimeError, ValueError, IndexError) as error:
            if ran_out(error):
                raise
            return None

    def _powers(self, count: int, device: torch.device) -> Tensor:
        """Random powers of two, float32 [count]."""
        exponents = torch.tensor(EXPONENTS)[torch.randint(len(EXPONENTS), (count,), generator=self._generator)]
        return exponents.exp2().to(device)

    # ------------------------------------------------------------------------------------------ norms

    def from_norms(self) -> Iterator[Fold]:
        """For each norm all that takes its output, if it is of a kind that scales."""
        for name, (args, kwargs, output) in self._plain.norms.items():
            norm = self._modules[name]
            sinks = self._takers(output)
            kind = _kind_of(norm, args, kwargs, self._powers(output.shape[-1], output.device)) if sinks else None
            if kind is not None:
                rows_I = torch.arange(output.shape[-1], device=norm.weight.device)
                yield Fold(name, kind, None, rows_I, tuple(sinks))

    def _takers(self, output: Tensor) -> list[InputName]:
        """The products with a tensor, and all products of its width in a mixture of experts that it goes into."""
        width, names = output.shape[-1], dict[InputName, None]()
        for name, inputs in self._plain.inputs.items():
            if _shares(inputs, output) and inputs.shape[-1] == width:
                names[name] = None
        inside = [module for module, given in self._plain.entered.items() if any(_shares(x, output) for x in given)]
        for name in self._targets:
            fused = name[1] is not None and name[0].rpartition(".")[0] in inside
            if fused and self._width(name) == width:
                names[name] = None
        return list(names)

    # ---------------------------------------------------------------------------------------- linears

    def from_linears(self) -> Iterator[Fold]:
        """For each target the linear layer beside it that makes its input, channel by channel."""
        taken = {sink.parameter for fold in self.from_norms() for sink in fold.sinks}
        for sink in dict.fromkeys(parameter for parameter, _ in self._targets):
            if sink in taken:
                continue
            found = next(filter(None, (self._matched(source, sink) for source in self._beside(sink))), None)
            if found is not None:
                source, rows_I = found
                yield from self._folds_between(source, sink, rows_I)

    def _beside(self, sink: str) -> list[str]:
        """Targets of the same module or of the module's own parent that come first, the nearest at the front."""
        order = list(dict.fromkeys(parameter for parameter, _ in self._plain.inputs))
        if sink not in order:
            return []
        earlier = order[: order.index(sink)]
        known = {parameter for parameter, _ in self._targets}
        return [name for name in reversed(earlier) if name in known and _family(name) == _family(sink)]

    def _experts(self, parameter: str) -> list[int | None]:
        return [expert for name, expert in self._targets if name == parameter]

    def _matched(self, source: str, sink: str) -> tuple[str, Tensor] | None:
        """Which row of the source each column of the sink comes from, if it does."""
        if self._experts(source) != self._experts(sink):
            return None
        rows = self._rows(InputName(source, self._experts(source)[0]))
        width = self._width(InputName(sink, self._experts(sink)[0]))
        for rows_I in _row_maps(rows, width, self._head_sizes(sink)):
            if self._follows(source, sink, rows_I):
                return source, rows_I.to(self._parameters[sink].device)
        return None

    def _follows(self, source: str, sink: str, rows_I: Tensor) -> bool:
        """Whether the sink's inputs, and they alone, are scaled with the source's rows."""
        scale_O = torch.ones(self._rows(InputName(source, self._experts(source)[0])))
        scale_O[rows_I] = self._powers(len(scale_O), torch.device("cpu"))[rows_I]
        changes = (c for expert in self._experts(source) for c in self._divided_rows(source, expert, scale_O))
        with _changed(changes):
            try:
                now = self._look()
            except (RuntimeError, ValueError, IndexError) as error:
                if ran_out(error):
                    raise
                return False
        pairs = [
            (self._plain.inputs[name], now.inputs.get(name))
            for name in ((sink, expert) for expert in self._experts(sink))
            if name in self._plain.inputs
        ]
        scale_I = scale_O[rows_I]
        return bool(pairs) and all(
            after is not None
            and after.shape == before.shape
            and bool(before.any())
            and torch.equal(after * scale_I.to(after), before)
            for before, after in pairs
        )

    def _folds_between(self, source: str, sink: str, rows_I: Tensor) -> Iterator[Fold]:
        module = source.removesuffix(".weight")
        for expert in self._experts(source):
            name = source if expert is not None else module
            yield Fold(name, "linear", expert, rows_I, (InputName(sink, expert),))

    def _head_sizes(self, sink: str) -> list[int]:
        """What the module of attention says of the size of its heads."""
        values = vars(self._modules.get(_family(sink), nn.Module()))
        named = [v for k, v in values.items() if "head" in k and ("dim" in k or "size" in k) and isinstance(v, int)]
        return list(dict.fromkeys(value for value in named if value > 0))

    # ------------------------------------------------------------------------------------------- proof

    def proven(self, folds: Sequence[Fold]) -> list[Fold]:
        """Those under which, all together, the layer returns the same bits."""
        if not folds or self._holds(folds):
            return list(folds)
        alone = [group for group in _by_structure(folds) if self._holds(group)]
        kept = [fold for group in alone for fold in group]
        return kept if kept and self._holds(kept) else []

    def _holds(self, folds: Sequence[Fold]) -> bool:
        """Whether folding random powers of two changes nothing, while the sources alone change something."""
        neutral = [
            (self._parameters[f"{fold.source}.weight"], torch.zeros_like(self._parameters[f"{fold.source}.weight"]))
            for fold in folds
            if fold.kind == "unit-offset-norm"
        ]
        with _changed(neutral):
            plain = self._result()
            scales = [self._powers(int(fold.rows_I.max()) + 1, fold.rows_I.device)[fold.rows_I] for fold in folds]
            # One after the other: a layer's worth of new values isn't held beside the old ones.
            with _changed(c for fold, s in zip(folds, scales, strict=True) for c in self._divided(fold, s)):
                half = self._result()
                with _changed(c for fold, s in zip(folds, scales, strict=True) for c in self._multiplied(fold, s)):
                    whole = self._result()
        if plain is None or half is None or whole is None:
            return False
        return _same(plain, whole) and not _same(plain, half)

    def _divided(self, fold: Fold, scale_I: Tensor) -> Iterator[TensorChange]:
        if fold.kind == "linear":
            parameter = fold.source if fold.expert is not None else f"{fold.source}.weight"
            scale_O = torch.ones(self._rows(InputName(parameter, fold.expert)), device=scale_I.device)
            scale_O[fold.rows_I] = scale_I
            yield from self._divided_rows(parameter, fold.expert, scale_O)
            return
        weight, bias = self._parameters[f"{fold.source}.weight"], self._parameters.get(f"{fold.source}.bias")
        new_weight, new_bias, _ = fold_source(fold.kind, weight.data, None if bias is None else bias.data, scale_I)
        yield weight, new_weight
        if bias is not None and new_bias is not None:
            yield bias, new_bias

    def _divided_rows(self, parameter: str, expert: int | None, scale_O: Tensor) -> Iterator[TensorChange]:
        matrix = self._matrix(InputName(parameter, expert))
        scale_O = scale_O.to(matrix)
        yield matrix, matrix / (scale_O if self._transposed(parameter) else scale_O[:, None])
        bias = self._parameters.get(f"{parameter.removesuffix('.weight')}.bias")
        if expert is None and bias is not None:
            yield bias, bias.data / scale_O

    def _multiplied(self, fold: Fold, scale_I: Tensor) -> Iterator[TensorChange]:
        for sink in fold.sinks:
            matrix = self._matrix(sink)
            columns = scale_I.to(matrix)
            yield matrix, matrix * (columns[:, None] if self._transposed(sink.parameter) else columns)

    # ----------------------------------------------------------------------------------------- matrices

    def _matrix(self, name: InputName) -> Tensor:
        parameter = self._parameters[name[0]].data
        return parameter if name[1] is None else parameter[name[1]]

    def _transposed(self, parameter: str) -> bool:
        return isinstance(self._modules.get(parameter.rpartition(".")[0]), Conv1D)

    def _rows(self, name: InputName) -> int:
        return self._matrix(name).shape[1 if self._transposed(name[0]) else 0]

    def _width(self, name: InputName) -> int:
        return self._matrix(name).shape[0 if self._transposed(name[0]) else 1]


def _note_entry(seen: _Seen, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    seen.entered.setdefault(name, []).extend(value for value in args if isinstance(value, Tensor))


def _note_input(seen: _Seen, weight: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    if args:
        seen.inputs.setdefault(InputName(weight, None), args[0])


def _note_norm(
    seen: _Seen, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    if isinstance(output, Tensor) and output.shape[-1] == module.get_parameter("weight").numel():
        seen.norms.setdefault(name, (args, kwargs, output))


def _is_norm(module: nn.Module) -> bool:
    """A module with a vector for a weight, and nothing beside it but a bias of the same size."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return False
    return all(name in ("weight", "bias") and p.shape == weight.shape for name, p in module.named_parameters())


def _kind_of(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], scale_I: Tensor) -> FoldKind | None:
    """Whether the norm multiplies with its weight, with one more than it, or with neither."""
    weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
    without_bias = [] if bias is None else [(bias, torch.zeros_like(bias))]
    kinds: tuple[tuple[FoldKind, float], ...] = (("norm", 0.0), ("unit-offset-norm", 1.0))
    for kind, offset in kinds:
        scale = scale_I.to(weight)
        with _changed([(weight, torch.ones_like(weight) - offset), *without_bias]):
            plain = norm(*args, **kwargs)
        with _changed([(weight, scale - offset), *without_bias]):
            scaled = norm(*args, **kwargs)
        if torch.equal(plain * scale.to(plain), scaled) and bool(plain.any()):
            return kind
    return None


def _row_maps(rows: int, width: int, head_sizes: Iterable[int]) -> Iterator[Tensor]:
    """Where the columns of a sink may come from: all that attention and gated layers are known to do.

    The rows as they are; the last or the first of them, or every other (parts that are fused, side by side or in
    turns); values of key-value heads that several heads share, alone, behind queries and keys, or in groups with them;
    a part at the end of each head.
    """
    columns = torch.arange(width)
    if rows == width:
        yield columns
    if rows > width:
        yield columns + rows - width
        yield columns
    if rows == 2 * width:
        yield 2 * columns + 1
        yield 2 * columns
    for size in head_sizes:
        if width % size == 0:
            yield from _shared_heads(rows, width, size)


def _shared_heads(rows: int, width: int, size: int) -> Iterator[Tensor]:
    columns = torch.arange(width)
    heads, place = columns // size, columns % size
    stride = rows // (width // size)
    if stride > size and stride * (width // size) == rows:
        yield heads * stride + stride - size + place
    values = rows if rows < width else (rows - width) // 2
    groups = values // size
    if values % size or groups == 0 or (width // size) % groups:
        return
    shared = width // size // groups
    yield rows - values + heads // shared * size + place
    if rows == width + 2 * values:
        yield heads // shared * (shared + 2) * size + (shared + 1) * size + place


def _family(parameter: str) -> str:
    """The module that a linear layer is part of; for a fused parameter the one that holds it."""
    return parameter.removesuffix(".weight").rpartition(".")[0]


def _by_structure(folds: Sequence[Fold]) -> list[list[Fold]]:
    """Folds that differ in nothing but the expert stand or fall together."""
    groups: dict[str, list[Fold]] = {}
    for fold in folds:
        groups.setdefault(fold.source, []).append(fold)
    return list(groups.values())


@contextmanager
def _in_float32(layer: nn.Module) -> Iterator[None]:
    """A layer computes in float32 while the context lasts; its own bits come back, which float32 holds all of."""
    narrow = [
        (tensor, tensor.dtype)
        for tensor in [*layer.parameters(), *layer.buffers()]
        if tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    try:
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)


@contextmanager
def _changed(changes: Iterable[TensorChange]) -> Iterator[None]:
    """Tensors hold other values while the context lasts."""
    kept: list[TensorChange] = []
    try:
        for tensor, value in changes:
            kept.append((tensor.data, tensor.data.clone()))
            tensor.data.copy_(value)
        yield
    finally:
        for tensor, value in reversed(kept):
            tensor.copy_(value)


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _shares(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
