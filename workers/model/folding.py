"""Finds the folds of a layer: a source and sinks whose channels can be rescaled without changing the layer's output.

No architecture is hard-coded. One traced run of the layer gives the candidates (which products consume a norm's output;
which matrices are siblings), and a second run proves them: with the source divided and its sinks multiplied by powers
of two, which are exact in floating point, the layer must return the same bits. The powers differ by up to 2**40, so a
nonlinearity between two linear layers (a clamp) shows on a few tokens. The layer computes in float32, whatever its own
dtype, whose range the powers don't exceed.
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
from workers.numerics.waits import brought, truths

FoldKind = Literal["norm", "unit-offset-norm", "linear"]
# A tensor of the layer, and its new value.
TensorChange = tuple[Tensor, Tensor]
# Exponents of the powers of two used as test scales.
EXPONENTS = (-20.0, -1.0, 1.0, 20.0)


@dataclass(frozen=True)
class Fold:
    """A source to divide, and all its sinks: parameters whose input columns are multiplied to compensate.

    ``source`` names a module, or the fused parameter if ``expert`` is set; ``rows_I`` (int64, on the CPU) is the source
    channel that feeds each input column of the sinks.
    """

    source: str
    kind: FoldKind
    expert: int | None
    rows_I: Tensor
    sinks: tuple[InputName, ...]


def find_folds(
    layer: nn.Module, prefix: str, run: Callable[[], Any], targets: Sequence[QuantizableWeight]
) -> list[Fold]:
    """Find the folds of a loaded layer, and prove them by running it.

    ``prefix`` is the layer's name in the model. ``run`` runs the layer on some tokens, always the same and in float32,
    and returns its output and everything else it may write to. ``targets`` are the layer's quantizable weights: linear
    sources and the sinks of folds are among them; routers are sinks too. The layer's weights are restored afterwards.
    """
    with _in_float32(layer):
        probe = _Probe(layer, prefix, run, targets)
        if not probe.deterministic:
            return []
        norms = list(probe.from_norms())
        return probe.proven([*norms, *probe.from_linears(norms)])


def fold_source(
    kind: FoldKind, weight: Tensor, bias: Tensor | None, s_I: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Divide a norm's weight and bias by s_I in their stored dtypes; return them and the effective s_I (float32)."""
    offset = 1.0 if kind == "unit-offset-norm" else 0.0
    new = ((weight.float() + offset) / s_I - offset).to(weight.dtype)
    rounded = new.float() + offset
    effective = torch.where(rounded == 0, s_I, (weight.float() + offset) / rounded)
    # A channel whose rounded weight is 0 has no ratio: keep s_I.
    effective = torch.where(effective > 0, effective, s_I)
    return new, None if bias is None else (bias.float() / effective).to(bias.dtype), effective


@dataclass
class _Trace:
    """One traced run: the input of each product, each norm's arguments and output, and each module's tensor inputs."""

    inputs: dict[InputName, Tensor] = field(default_factory=dict)
    norms: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = field(default_factory=dict)
    module_inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    result: tuple[Tensor, ...] = ()

    def note(self, name: InputName, inputs: Tensor) -> None:
        """Record the first input of a product."""
        self.inputs.setdefault(name, inputs)


class _Probe:
    """Probes one layer for folds; all names are the model's."""

    def __init__(
        self, layer: nn.Module, prefix: str, run: Callable[[], Any], targets: Sequence[QuantizableWeight]
    ) -> None:
        self._run = run
        self._modules = {f"{prefix}.{name}" if name else prefix: module for name, module in layer.named_modules()}
        self._parameters = {f"{prefix}.{name}": parameter for name, parameter in layer.named_parameters()}
        self._targets = list(dict.fromkeys(weight.input for weight in targets))
        self._generator = torch.Generator().manual_seed(0)
        self._plain = self._traced_run()
        (self.deterministic,) = _alike(self._plain.result, self._traced_run().result)

    # ---------------------------------------------------------------------------------------- tracing

    def _traced_run(self) -> _Trace:
        """Run the layer, and record its inner inputs."""
        trace = _Trace()
        matrices = [(name, parameter) for name, parameter in self._parameters.items() if parameter.dim() > 1]
        with ExitStack() as stack:
            for name, module in self._modules.items():
                before = module.register_forward_pre_hook(partial(_note_entry, trace, name))
                stack.callback(before.remove)
                if isinstance(module, nn.Linear | Conv1D):
                    # A hook, because Conv1D and Linear subclasses need not call ``linear``.
                    note = partial(_note_input, trace, f"{name}.weight")
                    stack.callback(module.register_forward_pre_hook(note).remove)
                if _is_norm(module):
                    hook = partial(_note_norm, trace, name)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            stack.enter_context(Products(matrices, trace.note))
            trace.result = tuple(tensor.clone() for _, tensor in trees.leaves(self._run()))
        return trace

    def _result(self) -> tuple[Tensor, ...] | None:
        """The layer's output under changed weights; None if it fails."""
        try:
            return tuple(tensor for _, tensor in trees.leaves(self._run()))
        except (RuntimeError, ValueError, IndexError) as error:
            if ran_out(error):
                raise
            return None

    def _powers(self, count: int, device: torch.device) -> Tensor:
        """Random powers of two, float32 [count]."""
        exponents = torch.tensor(EXPONENTS)[torch.randint(len(EXPONENTS), (count,), generator=self._generator)]
        return brought(exponents.exp2(), device)

    # ------------------------------------------------------------------------------------------ norms

    def from_norms(self) -> Iterator[Fold]:
        """Yield a fold for each norm that scales by its weight, with all consumers of its output as sinks."""
        for name, (args, kwargs, output) in self._plain.norms.items():
            norm = self._modules[name]
            sinks = self._consumers(output)
            kind = _kind_of(norm, args, kwargs, self._powers(output.shape[-1], output.device)) if sinks else None
            if kind is not None:
                yield Fold(name, kind, None, torch.arange(output.shape[-1]), tuple(sinks))

    def _consumers(self, output: Tensor) -> list[InputName]:
        """Products whose input is ``output``, and same-width products of expert modules that take ``output``."""
        width, names = output.shape[-1], dict[InputName, None]()
        for name, inputs in self._plain.inputs.items():
            if _shares(inputs, output) and inputs.shape[-1] == width:
                names[name] = None
        inside = [
            module for module, tensors in self._plain.module_inputs.items() if any(_shares(x, output) for x in tensors)
        ]
        for name in self._targets:
            fused = name[1] is not None and name[0].rpartition(".")[0] in inside
            if fused and self._width(name) == width:
                names[name] = None
        return list(names)

    # ---------------------------------------------------------------------------------------- linears

    def from_linears(self, norms: Iterable[Fold]) -> Iterator[Fold]:
        """Yield a fold for each target, but the norms' sinks, whose input a sibling linear layer produces channel by
        channel."""
        covered = {sink.parameter for fold in norms for sink in fold.sinks}
        for sink in dict.fromkeys(parameter for parameter, _ in self._targets):
            if sink in covered:
                continue
            match = next(filter(None, (self._row_map(source, sink) for source in self._candidate_sources(sink))), None)
            if match is not None:
                source, rows_I = match
                yield from self._folds_between(source, sink, rows_I)

    def _candidate_sources(self, sink: str) -> list[str]:
        """Targets that run before the sink in the same parent module, nearest first."""
        order = list(dict.fromkeys(parameter for parameter, _ in self._plain.inputs))
        if sink not in order:
            return []
        earlier = order[: order.index(sink)]
        known = {parameter for parameter, _ in self._targets}
        return [name for name in reversed(earlier) if name in known and _parent_module(name) == _parent_module(sink)]

    def _experts(self, parameter: str) -> list[int | None]:
        return [expert for name, expert in self._targets if name == parameter]

    def _row_map(self, source: str, sink: str) -> tuple[str, Tensor] | None:
        """The source and its row for each column of the sink; None if the sink doesn't follow the source."""
        if self._experts(source) != self._experts(sink):
            return None
        rows = self._rows(InputName(source, self._experts(source)[0]))
        width = self._width(InputName(sink, self._experts(sink)[0]))
        for rows_I in _row_maps(rows, width, self._head_sizes(sink)):
            if self._follows(source, sink, rows_I):
                return source, rows_I
        return None

    def _follows(self, source: str, sink: str, rows_I: Tensor) -> bool:
        """Whether scaling the source's rows scales the sink's inputs, and in exactly that way."""
        scale_O = torch.ones(self._rows(InputName(source, self._experts(source)[0])))
        scale_O[rows_I] = self._powers(len(scale_O), torch.device("cpu"))[rows_I]
        changes = (c for expert in self._experts(source) for c in self._divided_rows(source, expert, scale_O))
        with _changed(changes):
            try:
                now = self._traced_run()
            except (RuntimeError, ValueError, IndexError) as error:
                if ran_out(error):
                    raise
                return False
        pairs = [
            (self._plain.inputs[name], now.inputs.get(name))
            for name in ((sink, expert) for expert in self._experts(sink))
            if name in self._plain.inputs
        ]
        seen = [(before, after) for before, after in pairs if after is not None and after.shape == before.shape]
        if not pairs or len(seen) < len(pairs):
            return False
        scale_I = brought(scale_O[rows_I], seen[0][0].device)
        # All in one wait.
        scaled = [(after * scale_I.to(after) == before).all() for before, after in seen]
        return all(truths([*scaled, *(before.any() for before, _ in seen)]))

    def _folds_between(self, source: str, sink: str, rows_I: Tensor) -> Iterator[Fold]:
        module = source.removesuffix(".weight")
        for expert in self._experts(source):
            name = source if expert is not None else module
            yield Fold(name, "linear", expert, rows_I, (InputName(sink, expert),))

    def _head_sizes(self, sink: str) -> list[int]:
        """Head sizes named in the attributes of the attention module (``head_dim`` and alike)."""
        values = vars(self._modules.get(_parent_module(sink), nn.Module()))
        named = [v for k, v in values.items() if "head" in k and ("dim" in k or "size" in k) and isinstance(v, int)]
        return list(dict.fromkeys(value for value in named if value > 0))

    # ------------------------------------------------------------------------------------------- proof

    def proven(self, folds: Sequence[Fold]) -> list[Fold]:
        """The folds that, applied together, leave the layer's output bit-identical."""
        if not folds or self._is_exact(folds):
            return list(folds)
        alone = [group for group in _by_structure(folds) if self._is_exact(group)]
        valid = [fold for group in alone for fold in group]
        return valid if valid and self._is_exact(valid) else []

    def _is_exact(self, folds: Sequence[Fold]) -> bool:
        """Whether folding random powers of two leaves the output bit-identical, while the sources alone change it."""
        neutral = [
            (self._parameters[f"{fold.source}.weight"], torch.zeros_like(self._parameters[f"{fold.source}.weight"]))
            for fold in folds
            if fold.kind == "unit-offset-norm"
        ]
        with _changed(neutral):
            plain = self._result() if neutral else self._plain.result
            scales = [self._powers(int(fold.rows_I.max()) + 1, fold.rows_I.device)[fold.rows_I] for fold in folds]
            # Lazily, one after the other: at most one new value is held beside the saved ones.
            with _changed(c for fold, s in zip(folds, scales, strict=True) for c in self._divided(fold, s)):
                half = self._result()
                with _changed(c for fold, s in zip(folds, scales, strict=True) for c in self._multiplied(fold, s)):
                    whole = self._result()
        if plain is None or half is None or whole is None:
            return False
        return _alike(plain, whole, half) == [True, False]

    def _divided(self, fold: Fold, scale_I: Tensor) -> Iterator[TensorChange]:
        if fold.kind == "linear":
            parameter = fold.source if fold.expert is not None else f"{fold.source}.weight"
            scale_O = torch.ones(self._rows(InputName(parameter, fold.expert)))
            scale_O[fold.rows_I] = scale_I
            yield from self._divided_rows(parameter, fold.expert, scale_O)
            return
        weight, bias = self._parameters[f"{fold.source}.weight"], self._parameters.get(f"{fold.source}.bias")
        there_I, old_bias = brought(scale_I, weight.device), None if bias is None else bias.data
        new_weight, new_bias, _ = fold_source(fold.kind, weight.data, old_bias, there_I)
        yield weight, new_weight
        if bias is not None and new_bias is not None:
            yield bias, new_bias

    def _divided_rows(self, parameter: str, expert: int | None, scale_O: Tensor) -> Iterator[TensorChange]:
        matrix = self._matrix(InputName(parameter, expert))
        scale_O = brought(scale_O, matrix.device).to(matrix)
        yield matrix, matrix / (scale_O if self._transposed(parameter) else scale_O[:, None])
        bias = self._parameters.get(f"{parameter.removesuffix('.weight')}.bias")
        if expert is None and bias is not None:
            yield bias, bias.data / scale_O

    def _multiplied(self, fold: Fold, scale_I: Tensor) -> Iterator[TensorChange]:
        for sink in fold.sinks:
            matrix = self._matrix(sink)
            columns = brought(scale_I, matrix.device).to(matrix)
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


def _note_entry(trace: _Trace, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    trace.module_inputs.setdefault(name, []).extend(value for value in args if isinstance(value, Tensor))


def _note_input(trace: _Trace, weight: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    if args:
        trace.inputs.setdefault(InputName(weight, None), args[0])


def _note_norm(
    trace: _Trace, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    if isinstance(output, Tensor) and output.shape[-1] == module.get_parameter("weight").numel():
        trace.norms.setdefault(name, (args, kwargs, output))


def _is_norm(module: nn.Module) -> bool:
    """A module whose only parameters are a weight vector and optionally a bias of the same shape."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return False
    return all(name in ("weight", "bias") and p.shape == weight.shape for name, p in module.named_parameters())


def _kind_of(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], scale_I: Tensor) -> FoldKind | None:
    """How the norm scales: by its weight, by 1 + its weight, or neither (None)."""
    weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
    without_bias = [] if bias is None else [(bias, torch.zeros_like(bias))]
    kinds: tuple[tuple[FoldKind, float], ...] = (("norm", 0.0), ("unit-offset-norm", 1.0))
    for kind, offset in kinds:
        scale = scale_I.to(weight)
        with _changed([(weight, torch.ones_like(weight) - offset), *without_bias]):
            plain = norm(*args, **kwargs)
        with _changed([(weight, scale - offset), *without_bias]):
            scaled = norm(*args, **kwargs)
        if all(truths([(plain * scale.to(plain) == scaled).all(), plain.any()])):
            return kind
    return None


def _row_maps(rows: int, width: int, head_sizes: Iterable[int]) -> Iterator[Tensor]:
    """Candidate row maps (sink column -> source row) of the layouts known from attention and gated layers.

    The identity; the last or first ``width`` rows, or every other row (parts fused side by side or interleaved); the
    values of key-value heads shared by several query heads: alone, behind queries and keys, or grouped with them; the
    last part of each head.
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
    heads, offset = columns // size, columns % size
    stride = rows // (width // size)
    if stride > size and stride * (width // size) == rows:
        yield heads * stride + stride - size + offset
    values = rows if rows < width else (rows - width) // 2
    groups = values // size
    if values % size or groups == 0 or (width // size) % groups:
        return
    shared = width // size // groups
    yield rows - values + heads // shared * size + offset
    if rows == width + 2 * values:
        yield heads // shared * (shared + 2) * size + (shared + 1) * size + offset


def _parent_module(parameter: str) -> str:
    """The parent module of a linear layer; for a fused parameter the module that holds it."""
    return parameter.removesuffix(".weight").rpartition(".")[0]


def _by_structure(folds: Sequence[Fold]) -> list[list[Fold]]:
    """Group the folds of one source: folds that differ only in the expert are accepted or rejected together."""
    groups: dict[str, list[Fold]] = {}
    for fold in folds:
        groups.setdefault(fold.source, []).append(fold)
    return list(groups.values())


@contextmanager
def _in_float32(layer: nn.Module) -> Iterator[None]:
    """Run a layer in float32 while the context lasts; its own tensors, which recipes may share, are put back."""
    narrow = [
        (tensor, tensor.data)
        for tensor in [*layer.parameters(), *layer.buffers()]
        if tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    try:
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data


@contextmanager
def _changed(changes: Iterable[TensorChange]) -> Iterator[None]:
    """Overwrite tensors while the context lasts."""
    originals: list[TensorChange] = []
    try:
        for tensor, value in changes:
            originals.append((tensor.data, tensor.data.clone()))
            tensor.data.copy_(value)
        yield
    finally:
        for tensor, value in reversed(originals):
            tensor.copy_(value)


def _alike(one: Sequence[Tensor], *others: Sequence[Tensor]) -> list[bool]:
    """Whether each of the others is equal to the first, in one wait for all of them."""
    shapes, flags, owners = [tensor.shape for tensor in one], list[Tensor](), list[int]()
    alike = [[tensor.shape for tensor in other] == shapes for other in others]
    for index, other in enumerate(others):
        pairs = [(a, b) for a, b in zip(one, other, strict=True) if not _is(a, b)] if alike[index] else []
        flags += [(a == b).all() for a, b in pairs]
        owners += [index] * len(pairs)
    for index, flag in zip(owners, truths(flags), strict=True):
        alike[index] &= flag
    return alike


def _is(one: Tensor, other: Tensor) -> bool:
    """Whether both are one and the same memory."""
    return one.data_ptr() == other.data_ptr() and one.dtype == other.dtype and one.stride() == other.stride()


def _shares(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
