"""What an artifact and its making will need, from safetensors headers and config.json alone.

An estimate of bytes on disk and of peak host memory; the measured peaks stand in results.json beside it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from pipeline.planning.sources import PinnedModel
from workers.spec.formats import FORMATS
from workers.spec.job import Calibration, Stage, Verification
from workers.spec.layers import EXPERT, LAYER, out_in_shape, quantizable, scheme_for
from workers.spec.recipes import Recipe
from workers.spec.split import gathered_bytes
from workers.spec.tensors import TensorHeader
from workers.spec.workspace import MAX_SHARD_BYTES, MICRO_BATCH_TOKENS

# A fork of a parent with torch and transformers, and the second one that checks the runtime; measured 0.4 to 0.55 GB
# each, of which what the parent has is shared (processes that start from nothing: 0.1 GB more).
RUNTIME_BYTES, LOADER_BYTES = 580_000_000, 680_000_000
# The same on a card: the CUDA context and kernels. Not measured yet.
DEVICE_BYTES = 1_000_000_000
# Bytes for each weight of the largest layer: as it was read, the next one, the model's float32 and a method's own.
LAYER_BYTES = 12
# Bytes for each logit of a sequence: both models', their logarithms, what the loading process computes and sends.
LOGITS_BYTES = 36
# What a model's config says of its sizes.
CONFIG = ("model_type", "hidden_size", "n_embd", "vocab_size", "num_attention_heads", "n_head")
# Projections that lead out of their module have an input of their own.
OUTWARD = re.compile(r"^(o|out|down|c|dense|fc2|w2|wo)(_proj|_lin|_4h_to_h)?$|^dense|^fc_?out")
EXPERT_ONE = re.compile(r"experts\.(?!0\.)\d+\.")
# A pattern that may mean some layers and not others.
ONE_LAYER = re.compile(r"\d\\?\.|\[|\.\d|^re:")
# Below these a stage isn't slow, it hangs: a tenth or less of what was ever measured.
STARTING_SECONDS = 3600.0
CRAWLING_BYTES_PER_SECOND = 256 * 1024
CRAWLING_ON_A_CORE, CRAWLING_ON_A_GPU = 1e9, 1e12
# What is reached as a rule: on a core measured (4e10 with a calibrated recipe), on a GPU assumed.
TYPICAL_ON_A_CORE, TYPICAL_ON_A_GPU = 4e10, 5e13


@dataclass(frozen=True)
class Need:
    """Peak bytes of a stage, on the host and on a card."""

    host: int
    device: int = 0


@dataclass(frozen=True)
class Estimate:
    """Bytes on disk, of the source and of the artifact, and what making and verifying it need in memory.

    While it's made, ``spool_bytes`` more lie on the disk, and ``state_bytes`` for all recipes of the pass together.
    """

    source_bytes: int
    artifact_bytes: int
    quantize: Need
    verify: Need
    spool_bytes: int = 0
    state_bytes: int = 0
    gathered_bytes: int = 0  # while the pass is spread over workers
    # Multiply-adds: of the pass that all recipes of a model share, and of the artifact's own verification.
    pass_work: int = 0
    own_work: int = 0

    @property
    def host_bytes(self) -> int:
        """The peak of all stages."""
        return max(self.quantize.host, self.verify.host)

    @property
    def device_bytes(self) -> int:
        """The peak of all stages on a card, where there is one."""
        return max(self.quantize.device, self.verify.device)


def estimate(
    source: PinnedModel, recipe: Recipe, calibration: Calibration | None, verification: Verification
) -> Estimate:
    """Sizes for one model under one recipe; zeros for a pickled checkpoint, whose headers can't be read."""
    shape = shape_of(source)
    artifact = sum(count * _stored_bytes(tensor, source, recipe) for tensor, count in _tensors(shape, recipe))
    calibrated = _calibration_tokens(recipe, calibration)
    hidden = 4 * _size(source, "hidden_size", "n_embd")
    return Estimate(
        source_bytes=shape.bytes,
        artifact_bytes=artifact,
        quantize=_quantizing(source, shape, recipe, calibration, verification),
        verify=_verifying(source, shape, verification),
        # A shard is written from its spool; the state of a pass beside the one before it.
        spool_bytes=min(artifact, MAX_SHARD_BYTES),
        state_bytes=2 * hidden * (verification.tokens + calibrated),
        gathered_bytes=gathered_bytes(calibrated, _widths(source, shape, recipe), 4),
        pass_work=shape.weights * (verification.tokens + calibrated),
        own_work=shape.weights * verification.tokens,
    )


class Estimates:
    """Estimates for a plan; models of the same shape, such as finetunes, are estimated once."""

    def __init__(self, calibration: Calibration | None, verification: Verification) -> None:
        self._calibration, self._verification = calibration, verification
        self._known: dict[tuple[object, ...], Estimate] = {}

    def of(self, source: PinnedModel, recipe: Recipe) -> Estimate:
        """As ``estimate`` says."""
        key = (*alike(source), recipe.name)
        if key not in self._known:
            self._known[key] = estimate(source, recipe, self._calibration, self._verification)
        return self._known[key]


def alike(source: PinnedModel) -> tuple[object, ...]:
    """What sources have in common that are sized, and fit recipes, alike; tensors have to be the same object."""
    return id(source.tensors), *(str(source.config.get(name)) for name in CONFIG)


def deadline_seconds(stage: Stage, source_bytes: int, work: int, cpus: int, gpus: int) -> float:
    """When a stage counts as hanging: a generous time for what every stage does, and its work at a crawl."""
    if stage not in (Stage.QUANTIZE, Stage.VERIFY):
        return STARTING_SECONDS + source_bytes / CRAWLING_BYTES_PER_SECOND
    return STARTING_SECONDS + work / (CRAWLING_ON_A_GPU if gpus else CRAWLING_ON_A_CORE * cpus)


def typical_seconds(work: int, cpus: int, gpus: int) -> float:
    """About how long so many multiply-adds take on a slot."""
    return work / (TYPICAL_ON_A_GPU if gpus else TYPICAL_ON_A_CORE * cpus)


def _calibration_tokens(recipe: Recipe, calibration: Calibration | None) -> int:
    return calibration.samples * calibration.sequence_length if calibration and recipe.calibrated else 0


def _size(source: PinnedModel, *names: str) -> int:
    return next((int(value) for name in names if isinstance(value := source.config.get(name), int)), 0)


def _in_features(tensor: TensorHeader, source: PinnedModel) -> int:
    """The width along which a weight's groups run."""
    return out_in_shape(tensor, conv1d=source.family.conv1d)[1]


def _stored_bytes(tensor: TensorHeader, source: PinnedModel, recipe: Recipe) -> int:
    """Bytes of a tensor in the artifact, its entries in the header of its file included."""
    as_it_is = tensor.bytes + tensor.header_bytes
    if not quantizable(tensor, recipe):
        return as_it_is
    module, shape_OI = tensor.name.removesuffix(".weight"), out_in_shape(tensor, conv1d=source.family.conv1d)
    scheme = scheme_for(recipe, module, shape_OI).scheme
    if scheme is None:
        return as_it_is
    stored = FORMATS[recipe.format].stored(scheme, tensor._replace(shape=shape_OI))
    return sum(part.bytes + part.header_bytes + len(module) + 1 for part in stored)


@dataclass(frozen=True)
class Shape:
    """The tensors of a checkpoint, with layers that are alike counted instead of repeated."""

    outside: tuple[TensorHeader, ...]
    layers: tuple[tuple[tuple[TensorHeader, ...], int], ...]  # one of each kind, and how many there are
    every: tuple[TensorHeader, ...]
    bytes: int
    weights: int


@lru_cache(maxsize=4096)
def _shape(tensors: _Same) -> Shape:
    outside: list[TensorHeader] = []
    layers: dict[str, list[TensorHeader]] = defaultdict(list)
    for tensor in tensors.tensors:
        match = LAYER.search(tensor.name)
        if match is None:
            outside.append(tensor)
        else:
            layers[match.group(1)].append(tensor)
    kinds: dict[tuple[tuple[str, tuple[int, ...], str], ...], list[tuple[TensorHeader, ...]]] = defaultdict(list)
    for layer in layers.values():
        # The name after the layer's number tells them apart.
        signature = sorted((LAYER.split(t.name, maxsplit=1)[-1], t.shape, t.dtype) for t in layer)
        kinds[tuple(signature)].append(tuple(layer))
    return Shape(
        outside=tuple(outside),
        layers=tuple((found[0], len(found)) for found in kinds.values()),
        every=tensors.tensors,
        bytes=sum(tensor.bytes for tensor in tensors.tensors),
        weights=sum(tensor.numel for tensor in tensors.tensors),
    )


@dataclass(frozen=True)
class _Same:
    """Tensors that are told apart by being the same object: a model has hundreds."""

    tensors: tuple[TensorHeader, ...]

    def __hash__(self) -> int:
        return id(self.tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.tensors is self.tensors


def shape_of(source: PinnedModel) -> Shape:
    """The shape of a model's checkpoint."""
    return _shape(_Same(source.tensors))


def _tensors(shape: Shape, recipe: Recipe) -> Iterable[tuple[TensorHeader, int]]:
    """Tensors and how many of each there are; all of them where a recipe's patterns may name single layers."""
    if any(ONE_LAYER.search(pattern) for pattern in recipe.patterns):
        return [(tensor, 1) for tensor in shape.every]
    inside = [(tensor, count) for layer, count in shape.layers for tensor in layer]
    return [*((tensor, 1) for tensor in shape.outside), *inside]


def _quantizing(
    source: PinnedModel, shape: Shape, recipe: Recipe, calibration: Calibration | None, verification: Verification
) -> Need:
    """One pass: what lies outside the layers, two layers, statistics and their factors, hidden states, activations."""
    tokens = verification.tokens + _calibration_tokens(recipe, calibration)
    longest = max(verification.sequence_length, calibration.sequence_length if calibration else 0)
    hessians = max((_hessian_bytes(layer, source, recipe) for layer, _ in shape.layers), default=0)
    outside = sum(tensor.numel for tensor in shape.outside)
    layer = max((sum(tensor.numel for tensor in layer) for layer, _ in shape.layers), default=0)
    working = _activations(source, shape, longest, tokens)
    kept = (1 + recipe.needs.own_stream) * tokens * _bytes_for_each_token(source, shape, longest)
    host = RUNTIME_BYTES + 4 * outside + LAYER_BYTES * layer + 2 * hessians + kept + working
    # On a card in half precision; hidden states of waiting micro-batches rest on the host.
    device = DEVICE_BYTES + 2 * outside + (LAYER_BYTES // 2) * layer + 2 * hessians + working
    return Need(host, device)


def _verifying(source: PinnedModel, shape: Shape, verification: Verification) -> Need:
    """Both models streamed side by side; and a process beside it that loads the whole artifact as users do, which a
    CPU mostly decodes to float32."""
    outside = sum(tensor.numel for tensor in shape.outside)
    layer = max((sum(tensor.numel for tensor in layer) for layer, _ in shape.layers), default=0)
    logits = _size(source, "vocab_size") * verification.sequence_length
    working = _activations(source, shape, verification.sequence_length, verification.tokens) + LOGITS_BYTES * logits
    hidden = _size(source, "hidden_size", "n_embd") * verification.tokens
    host = RUNTIME_BYTES + 8 * outside + LAYER_BYTES * layer + 8 * hidden + working + LOADER_BYTES + 4 * shape.weights
    device = 2 * DEVICE_BYTES + 4 * outside + (LAYER_BYTES // 2) * layer + working + 2 * shape.weights
    return Need(host, device)


def _hessian_bytes(layer: tuple[TensorHeader, ...], source: PinnedModel, recipe: Recipe) -> int:
    """Float32 statistics of all distinct inputs of a layer: projections of one module and width share theirs, but for
    those that lead out of it."""
    if not recipe.calibrated:
        return 0
    return sum(4 * width**2 for width in _inputs(layer, source, recipe))


def _inputs(layer: tuple[TensorHeader, ...], source: PinnedModel, recipe: Recipe) -> list[int]:
    """The widths of a layer's distinct inputs."""
    inputs: dict[tuple[str, int, bool], int] = {}
    for tensor in layer:
        if quantizable(tensor, recipe):
            module, _, leaf = tensor.name.removesuffix(".weight").rpartition(".")
            width = _in_features(tensor, source)
            inputs[module, width, OUTWARD.search(leaf) is not None] = width
    return list(inputs.values())


def _widths(source: PinnedModel, shape: Shape, recipe: Recipe) -> list[int]:
    """The widths of all layers' inputs; of experts, as many as a token is sent to."""
    if not recipe.calibrated:
        return []
    sent_to = _size(source, "num_experts_per_tok", "num_experts_per_token", "moe_topk") or 1
    found: list[int] = []
    for layer, count in shape.layers:
        plain = tuple(tensor for tensor in layer if EXPERT.search(tensor.name) is None)
        first = tuple(tensor for tensor in layer if EXPERT.search(tensor.name) and not EXPERT_ONE.search(tensor.name))
        found += count * _inputs(plain, source, recipe) + count * sent_to * _inputs(first, source, recipe)
    return found


def _bytes_for_each_token(source: PinnedModel, shape: Shape, longest: int) -> int:
    """What waits between two layers: hidden states, the mask, rotary embeddings. With experts several times as much:
    their tokens are gathered in pieces of all sizes, which allocators don't give back."""
    experts = any(EXPERT_ONE.search(tensor.name) for layer, _ in shape.layers for tensor in layer)
    return 4 * (9 if experts else 1) * _size(source, "hidden_size", "n_embd") + longest + 512


def _activations(source: PinnedModel, shape: Shape, longest: int, tokens: int) -> int:
    """One micro-batch in the widest layer, attention scores included (as ``workers.model.batching`` counts them)."""
    widths = [
        sum(sum(tensor.shape) for tensor in layer if len(tensor.shape) == 2 and EXPERT_ONE.search(tensor.name) is None)
        for layer, _ in shape.layers
    ]
    heads = _size(source, "num_attention_heads", "n_head")
    at_once = min(max(MICRO_BATCH_TOKENS, longest), tokens)
    return 4 * at_once * (max(widths, default=0) + 2 * heads * longest)
