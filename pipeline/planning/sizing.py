"""Estimate an artifact's disk, memory and compute from safetensors headers and config.json alone.

Estimates are bytes on disk, peak bytes of host and GPU memory, and multiply-adds; results.json has the measured peaks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pipeline.planning.configs import positions, setting
from pipeline.planning.sources import PinnedModel
from workers.spec.data import Calibration, Verification
from workers.spec.engines import ENGINES
from workers.spec.formats import FORMATS
from workers.spec.job import Stage
from workers.spec.layers import EXPERT, LAYER, layer_of, out_in_shape, quantizable, scheme_for
from workers.spec.low_bit import MXFP4, MXFP4_BLOCK
from workers.spec.recipes import Recipe
from workers.spec.runtimes import Runtime, checkers
from workers.spec.split import gathered_bytes
from workers.spec.tensors import TensorHeader
from workers.spec.workspace import DECODED_ON_A_CARD, LOGITS_ROWS, MAX_SHARD_BYTES, MICRO_BATCH_TOKENS

# Bytes of a process with torch and transformers, forked from the warm parent, and of the second one that checks the
# runtime. Measured: 0.4 to 0.55 GB each, pages shared with the parent included (0.1 GB more without a parent).
PROCESS_BYTES, LOADER_BYTES = 580_000_000, 680_000_000
# A pass's objects for each tensor of the source: 10 to 19 KB, measured with 128 and 512 experts in 2 to 6 layers.
TENSOR_BYTES = 16_000
# GPU bytes of such a process: CUDA context and kernels. Not measured yet.
DEVICE_BYTES = 1_000_000_000
# GPU bytes of a search for scales: eight temporaries of a piece of a weight in float32 (numerics.pieces.ON_A_CARD).
SEARCH_BYTES = 32 * (1 << 25)
# Bytes per weight of the largest layer: as read, the next layer prefetched, the model's float32, the method's own copy.
LAYER_BYTES = 12
# The same on a GPU: the layer and the next one as read, the model's stacks of experts, a method's float32 of a few
# weights; less so much with which the next one isn't brought there ahead (``workers.model.upload``).
DEVICE_LAYER_BYTES, AHEAD_BYTES = 8, 2
# Bytes per element of a weight that is decoded on a GPU, and of the float64 pieces in which it is compared.
DECODING_BYTES, COMPARING_BYTES = 16, 32 * (1 << 24)
# Bytes per logit of a piece of a sequence: both models' logits, their logarithms, and the loading process's logits and
# answer.
LOGITS_BYTES = 36
# Config keys for the number of experts that a token is sent to.
SENT_TO = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
# Keys of config.json that determine the estimates.
CONFIG = (
    "model_type",
    "dtype",
    "torch_dtype",
    "hidden_size",
    "n_embd",
    "vocab_size",
    "num_attention_heads",
    "n_head",
    *SENT_TO,
)
# Output projections: their input isn't shared with other projections of their module.
OUTWARD = re.compile(r"^(o|out|down|c|dense|fc2|w2|wo)(_proj|_lin|_4h_to_h)?$|^dense|^fc_?out")
EXPERT_ONE = re.compile(r"experts\.(?!0\.)\d+\.")
# A recipe's pattern that may match some layers and not others.
ONE_LAYER = re.compile(r"\d\\?\.|\[|\.\d|^re:")
# Below these rates (seconds, bytes/s, multiply-adds/s) a stage counts as hung: a tenth or less of any measurement.
STARTING_SECONDS = 3600.0
CRAWLING_BYTES_PER_SECOND = 256 * 1024
CRAWLING_ON_A_CORE, CRAWLING_ON_A_GPU = 1e9, 1e12
# Typical multiply-adds per second: on a core measured (4e10 with a calibrated recipe), on a GPU, too: an H200 does 6e13
# with one recipe, 3e13 with eight.
TYPICAL_ON_A_CORE, TYPICAL_ON_A_GPU = 4e10, 5e13


@dataclass(frozen=True)
class Need:
    """Peak bytes of a stage, in host memory and in GPU memory.

    ``least``: bytes of GPU memory with which it goes on, more slowly; 0: no fewer than ``device``.
    """

    host: int
    device: int = 0
    least: int = 0

    @property
    def least_device(self) -> int:
        """Bytes of GPU memory that a card must have."""
        return self.least or self.device


@dataclass(frozen=True)
class Estimate:
    """Bytes on disk of source and artifact, peak memory of quantizing and verifying, and work in multiply-adds.

    Quantizing takes ``spool_bytes`` more disk per artifact, and ``state_bytes`` for all recipes of the pass together.
    """

    source_bytes: int
    artifact_bytes: int
    quantize: Need
    verify: Need
    spool_bytes: int = 0
    state_bytes: int = 0
    gathered_bytes: int = 0  # on disk, while the pass is spread over workers
    # Multiply-adds of the pass that all recipes of a model share, and of the artifact's own verification.
    pass_work: int = 0
    own_work: int = 0

    @property
    def host_bytes(self) -> int:
        """Peak bytes of host memory over all stages."""
        return max(self.quantize.host, self.verify.host)

    @property
    def device_bytes(self) -> int:
        """Peak bytes of GPU memory over all stages, if there is a GPU."""
        return max(self.quantize.device, self.verify.device)


def estimate(
    source: PinnedModel,
    recipe: Recipe,
    calibration: Calibration | None,
    verification: Verification,
    runtimes: Sequence[str] = (),
) -> Estimate:
    """Estimate one model under one recipe; zeros for a pickled checkpoint, which has no readable headers.

    ``runtimes`` check the artifact; none named: the one of its format.
    """
    shape = shape_of(source)
    artifact = _artifact_bytes(source, shape, recipe)
    calibrated = _calibration_tokens(recipe, calibration)
    hidden = 4 * _size(source, "hidden_size", "n_embd")
    return Estimate(
        source_bytes=shape.bytes,
        artifact_bytes=artifact,
        quantize=_quantizing(source, shape, recipe, calibration, verification),
        verify=_verifying(source, shape, verification, checkers(recipe.format, runtimes)),
        # A shard is copied from its spool file; a pass writes its new state before it deletes the last one.
        spool_bytes=max(min(artifact, MAX_SHARD_BYTES), _logits_bytes(source, recipe, verification)),
        state_bytes=2 * hidden * (verification.tokens + calibrated),
        gathered_bytes=gathered_bytes(calibrated, _widths(source, shape, recipe), 4),
        pass_work=shape.weights * (verification.tokens + calibrated),
        own_work=shape.weights * verification.tokens,
    )


def _logits_bytes(source: PinnedModel, recipe: Recipe, verification: Verification) -> int:
    """Bytes of the logits of all held-out text, which the runtime leaves of artifacts that quantmill doesn't decode."""
    return 0 if FORMATS[recipe.format].decoded else 4 * _size(source, "vocab_size") * verification.tokens


class Estimates:
    """Cache of a plan's estimates; models of the same shape, such as finetunes, share one."""

    def __init__(self, calibration: Calibration | None, verification: Verification) -> None:
        self._calibration, self._verification = calibration, verification
        self._known: dict[tuple[object, ...], Estimate] = {}

    def of(self, source: PinnedModel, recipe: Recipe, runtimes: Sequence[str] = ()) -> Estimate:
        """Cached ``estimate``."""
        calibration = self._calibration and self._calibration.within(positions(source.config))
        key = (*alike(source), recipe.name, calibration and calibration.sequence_length)
        if key not in self._known:
            self._known[key] = estimate(source, recipe, calibration, self._verification, runtimes)
        return self._known[key]


def alike(source: PinnedModel) -> tuple[object, ...]:
    """Cache key: sources with equal keys share estimates and fit the same recipes. Tensors compare by identity."""
    return id(source.tensors), *(str(setting(source.config, name)) for name in CONFIG)


def deadline_seconds(stage: Stage, source_bytes: int, work: int, cpus: int, gpus: int) -> float:
    """Seconds after which a stage counts as hung: a generous fixed time, plus its work at the lowest plausible rate."""
    if stage not in (Stage.QUANTIZE, Stage.VERIFY):
        return STARTING_SECONDS + source_bytes / CRAWLING_BYTES_PER_SECOND
    return STARTING_SECONDS + work / (CRAWLING_ON_A_GPU if gpus else CRAWLING_ON_A_CORE * cpus)


def typical_seconds(work: int, cpus: int, gpus: int) -> float:
    """Typical seconds for ``work`` multiply-adds on one slot."""
    return work / (TYPICAL_ON_A_GPU if gpus else TYPICAL_ON_A_CORE * cpus)


def _calibration_tokens(recipe: Recipe, calibration: Calibration | None) -> int:
    return calibration.samples * calibration.sequence_length if calibration and recipe.calibrated else 0


def _size(source: PinnedModel, *names: str) -> int:
    values = (setting(source.config, name) for name in names)
    return next((int(value) for value in values if isinstance(value, int)), 0)


def _in_features(tensor: TensorHeader, source: PinnedModel) -> int:
    """A weight's input width, along which its groups run."""
    return out_in_shape(tensor, conv1d=source.family.conv1d)[1]


def artifact_bytes(source: PinnedModel, recipe: Recipe) -> int:
    """Bytes of the weight files that a recipe makes of a model."""
    return _artifact_bytes(source, shape_of(source), recipe)


def deviations(source: PinnedModel, recipe: Recipe) -> Iterator[str]:
    """What of a model a format stores otherwise than the recipe's scheme says, for its widths."""
    matrices = [_in_one_file(tensor, source) for tensor in source.tensors]
    for said in FORMATS[recipe.format].deviations(recipe.scheme, matrices, source.config):
        yield f"{source.name} {recipe.name}: {said}"


def _artifact_bytes(source: PinnedModel, shape: Shape, recipe: Recipe) -> int:
    """Bytes of the artifact's weight files."""
    whole = FORMATS[recipe.format].file_bytes
    if whole is None:
        return sum(count * _stored_bytes(tensor, source, recipe) for tensor, count in _tensors(shape, recipe))
    return whole(recipe.scheme, [_in_one_file(tensor, source) for tensor in shape.every], source.config)


def _in_one_file(tensor: TensorHeader, source: PinnedModel) -> tuple[str, tuple[int, int], int]:
    """A tensor as ``Format.file_bytes`` takes it; vectors are stored in float32."""
    if len(tensor.shape) != 2:
        return tensor.name, (1, tensor.numel), 4 * tensor.numel
    conv1d = source.family.conv1d and layer_of(tensor.name) is not None
    return tensor.name, out_in_shape(tensor, conv1d=conv1d), tensor.bytes


def _stored_bytes(tensor: TensorHeader, source: PinnedModel, recipe: Recipe) -> int:
    """Bytes of a tensor in the artifact, including its entries in the safetensors header."""
    place = FORMATS[recipe.format].place(str(source.config.get("model_type")), tensor.name)
    # Of the tensors of a stack, the first alone has an entry.
    entries = 0 if place is not None and place.expert else 1
    unquantized = tensor.bytes + entries * tensor.header_bytes
    if source.decoded == MXFP4 and FORMATS[recipe.format].blocks and len(tensor.shape) == 3:
        # Experts in blocks of 32 codes of half a byte, and a scale.
        return tensor.numel // 2 + tensor.numel // MXFP4_BLOCK + 2 * tensor.header_bytes
    if not quantizable(tensor, recipe):
        return unquantized
    module, shape_OI = tensor.name.removesuffix(".weight"), out_in_shape(tensor, conv1d=source.family.conv1d)
    scheme = scheme_for(recipe, module, shape_OI).scheme
    if scheme is None:
        return unquantized
    stored = FORMATS[recipe.format].stored(scheme, tensor._replace(shape=shape_OI))
    return sum(part.bytes + entries * (part.header_bytes + len(module) + 1) for part in stored)


@dataclass(frozen=True)
class Shape:
    """The tensors of a checkpoint; identical layers are counted instead of repeated."""

    outside: tuple[TensorHeader, ...]
    layers: tuple[tuple[tuple[TensorHeader, ...], int], ...]  # one layer of each kind, and how many there are
    every: tuple[TensorHeader, ...]
    bytes: int
    weights: int


@lru_cache(maxsize=4096)
def _shape(tensors: _Same) -> Shape:
    outside: list[TensorHeader] = []
    layers: dict[str, list[TensorHeader]] = defaultdict(list)
    for tensor in tensors.tensors:
        number = layer_of(tensor.name)
        if number is None:
            outside.append(tensor)
        else:
            layers[number].append(tensor)
    kinds: dict[tuple[tuple[str, tuple[int, ...], str], ...], list[tuple[TensorHeader, ...]]] = defaultdict(list)
    for layer in layers.values():
        # Compare tensors by the part of the name after the layer's number.
        signature = sorted((LAYER.split(t.name, maxsplit=1)[-1], t.shape, t.dtype) for t in layer)
        kinds[tuple(signature)].append(tuple(layer))
    return Shape(
        outside=tuple(outside),
        layers=tuple((same_kind[0], len(same_kind)) for same_kind in kinds.values()),
        every=tensors.tensors,
        bytes=sum(tensor.bytes for tensor in tensors.tensors),
        weights=sum(tensor.numel for tensor in tensors.tensors),
    )


@dataclass(frozen=True)
class _Same:
    """Tensors hashed and compared by identity: a model has hundreds, and hashing them all is slow."""

    tensors: tuple[TensorHeader, ...]

    def __hash__(self) -> int:
        return id(self.tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.tensors is self.tensors


def shape_of(source: PinnedModel) -> Shape:
    """The shape of a model's checkpoint."""
    return _shape(_Same(source.tensors))


def _tensors(shape: Shape, recipe: Recipe) -> Iterable[tuple[TensorHeader, int]]:
    """Tensors and their counts; one by one if a recipe's patterns may match single layers."""
    if recipe.layers is not None or any(ONE_LAYER.search(pattern) for pattern in recipe.patterns):
        return [(tensor, 1) for tensor in shape.every]
    inside = [(tensor, count) for layer, count in shape.layers for tensor in layer]
    return [*((tensor, 1) for tensor in shape.outside), *inside]


def _quantizing(
    source: PinnedModel, shape: Shape, recipe: Recipe, calibration: Calibration | None, verification: Verification
) -> Need:
    """Need of a pass: tensors outside layers, two layers, statistics and their factors, hidden states, activations."""
    tokens = verification.tokens + _calibration_tokens(recipe, calibration)
    longest = max(verification.sequence_length, calibration.sequence_length if calibration else 0)
    hessians = max((_hessian_bytes(layer, source, recipe) for layer, _ in shape.layers), default=0)
    outside = sum(tensor.numel for tensor in shape.outside)
    layer = max((sum(tensor.numel for tensor in layer) for layer, _ in shape.layers), default=0)
    working = _activations(source, shape, longest, tokens)
    hidden_states = (1 + recipe.needs.own_stream) * tokens * _bytes_for_each_token(source, shape, longest)
    whole = 4 * shape.weights if ENGINES[recipe.engine].loads_whole_model else 0
    host = PROCESS_BYTES + 4 * outside + LAYER_BYTES * layer + 2 * hessians + hidden_states + working + whole
    host += TENSOR_BYTES * len(shape.every)
    # On a GPU weights and hidden states are in half precision; those of waiting micro-batches stay there, too.
    waiting = (1 + recipe.needs.own_stream) * tokens * _bytes_for_each_token(source, shape, longest, floats=2)
    searched = min(SEARCH_BYTES, 32 * layer)
    # Statistics and their factors; of the input that is solved its damped statistics, and those over their diagonal.
    widest = max((max(_inputs(layer, source, recipe), default=0) for layer, _ in shape.layers), default=0)
    solved = 2 * hessians + (8 * widest**2 if hessians else 0)
    device = DEVICE_BYTES + 2 * outside + DEVICE_LAYER_BYTES * layer + searched + solved + waiting + working
    return Need(host, device, device - AHEAD_BYTES * layer)


def _verifying(source: PinnedModel, shape: Shape, verification: Verification, runtimes: Sequence[Runtime] = ()) -> Need:
    """Need of verifying: both models streamed side by side, and a process that loads the whole artifact as users do
    (most runtimes decode it to float32 on a CPU), or, before it, the whole source as it's streamed: float32, too, on a
    CPU, on a GPU its own dtype."""
    outside = sum(tensor.numel for tensor in shape.outside)
    layer = max((sum(tensor.numel for tensor in layer) for layer, _ in shape.layers), default=0)
    logits = _size(source, "vocab_size") * min(verification.sequence_length, LOGITS_ROWS)
    working = _activations(source, shape, verification.sequence_length, verification.tokens) + LOGITS_BYTES * logits
    hidden = _size(source, "hidden_size", "n_embd") * verification.tokens
    host = PROCESS_BYTES + 8 * outside + LAYER_BYTES * layer + 8 * hidden + working + LOADER_BYTES + 4 * shape.weights
    host += max((runtime.host_bytes for runtime in runtimes), default=0)
    # Both models' hidden states are there while theirs are streamed, or one weight is decoded and compared. Without
    # room for the second process's model, it runs on the CPU, and the source is compared by its first layers.
    matrices = (tensor.numel for tensor in shape.every if len(tensor.shape) == 2)
    decoding = DECODING_BYTES * max((count for count in matrices if count <= DECODED_ON_A_CARD), default=0)
    compared = decoding + min(COMPARING_BYTES, 2 * decoding)
    at_work = max(DEVICE_LAYER_BYTES * layer, compared)
    streamed = DEVICE_BYTES + 4 * outside + at_work + 4 * hidden + working
    return Need(host, streamed + DEVICE_BYTES + max(2 * shape.weights, shape.bytes), streamed)


def _hessian_bytes(layer: tuple[TensorHeader, ...], source: PinnedModel, recipe: Recipe) -> int:
    """Bytes of the float32 statistics of a layer's distinct inputs: projections of one module and width share theirs,
    except output projections."""
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
    """The widths of all layers' distinct inputs; of experts, only as many as a token is routed to."""
    if not recipe.calibrated:
        return []
    sent_to = _size(source, *SENT_TO) or 1
    widths: list[int] = []
    for layer, count in shape.layers:
        plain = tuple(tensor for tensor in layer if EXPERT.search(tensor.name) is None)
        first = tuple(tensor for tensor in layer if EXPERT.search(tensor.name) and not EXPERT_ONE.search(tensor.name))
        widths += count * _inputs(plain, source, recipe) + count * sent_to * _inputs(first, source, recipe)
    return widths


def _bytes_for_each_token(source: PinnedModel, shape: Shape, longest: int, floats: int = 4) -> int:
    """Bytes per token held between two layers: hidden states, mask, rotary embeddings. Experts take several times as
    much: they gather tokens in pieces of varying size, which allocators don't return."""
    experts = any(EXPERT_ONE.search(tensor.name) for layer, _ in shape.layers for tensor in layer)
    return floats * (9 if experts else 1) * _size(source, "hidden_size", "n_embd") + longest + 512


def _activations(source: PinnedModel, shape: Shape, longest: int, tokens: int) -> int:
    """Bytes of a micro-batch in the widest layer, with attention scores (as ``workers.model.batching`` counts)."""
    widths = [
        sum(sum(tensor.shape) for tensor in layer if len(tensor.shape) == 2 and EXPERT_ONE.search(tensor.name) is None)
        for layer, _ in shape.layers
    ]
    heads = _size(source, "num_attention_heads", "n_head", *SENT_TO)
    at_once = min(max(MICRO_BATCH_TOKENS, longest), tokens)
    return 4 * at_once * (max(widths, default=0) + 2 * heads * longest)
