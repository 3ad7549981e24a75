"""What an artifact and its making will need, from safetensors headers and config.json alone.

An estimate of bytes on disk and of peak host memory; the measured peaks stand in results.json beside it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from pipeline.placement import Need
from pipeline.sources import Source, TensorHeader
from workers.fits import CONV1D_MODEL_TYPES
from workers.job import Calibration, Stage, Verification
from workers.recipes import BitsAndBytesRecipe, FourBitFloatScheme, Recipe

LAYER = re.compile(r"(?:^|\.)(\d+)\.")
# A process with torch, transformers and their CPU kernels loaded; measured 0.6 GB, with room for allocators.
RUNTIME_BYTES = 1_000_000_000
# What a shard holds at most (workers.shards.MAX_SHARD_BYTES, which this side can't import).
SHARD_BYTES = 2_000_000_000
# Below these a stage isn't slow, it hangs: a tenth or less of what was ever measured.
STARTING_SECONDS = 3600.0
CRAWLING_BYTES_PER_SECOND = 256 * 1024
CRAWLING_ON_A_CORE, CRAWLING_ON_A_GPU = 1e9, 1e12


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


def estimate(source: Source, recipe: Recipe, calibration: Calibration | None, verification: Verification) -> Estimate:
    """Sizes for one model under one recipe; zeros for a pickled checkpoint, whose headers can't be read."""
    artifact = sum(_stored_bytes(tensor, source, recipe) for tensor in source.tensors)
    making = _peak_bytes(source, recipe, calibration, verification)
    # The runtime check loads the whole model as its users do, in float32 on a CPU, beside the verifying process.
    loaded = RUNTIME_BYTES + sum(4 * tensor.numel for tensor in source.tensors)
    verifying = loaded + _peak_bytes(source, recipe, None, verification)
    return Estimate(
        source_bytes=sum(t.bytes for t in source.tensors),
        artifact_bytes=artifact,
        quantize=Need(making),
        verify=Need(verifying),
        # A shard is written from its spool; the state of a pass beside the one before it.
        spool_bytes=min(artifact, SHARD_BYTES),
        state_bytes=2 * _hidden_bytes(source, recipe, calibration, verification),
        pass_work=_weights(source) * (verification.tokens + _calibration_tokens(recipe, calibration)),
        own_work=_weights(source) * verification.tokens,
    )


def deadline_seconds(stage: Stage, source_bytes: int, work: int, cpus: int, gpus: int) -> float:
    """When a stage counts as hanging: a generous time for what every stage does, and its work at a crawl."""
    if stage in (Stage.FETCH, Stage.PUBLISH):
        return STARTING_SECONDS + source_bytes / CRAWLING_BYTES_PER_SECOND
    return STARTING_SECONDS + work / (CRAWLING_ON_A_GPU if gpus else CRAWLING_ON_A_CORE * cpus)


def _weights(source: Source) -> int:
    return sum(tensor.numel for tensor in source.tensors)


def _calibration_tokens(recipe: Recipe, calibration: Calibration | None) -> int:
    return calibration.samples * calibration.sequence_length if calibration and recipe.calibrated else 0


def _hidden_bytes(source: Source, recipe: Recipe, calibration: Calibration | None, verification: Verification) -> int:
    """Hidden states of all tokens, float32."""
    hidden = int(source.config.get("hidden_size") or source.config.get("n_embd") or 0)
    return 4 * hidden * (verification.tokens + _calibration_tokens(recipe, calibration))


def quantizable(tensor: TensorHeader, recipe: Recipe) -> bool:
    """Whether the recipe turns this tensor into codes: a matrix inside a decoder layer that isn't ignored."""
    module, _, leaf = tensor.name.rpartition(".")
    if isinstance(recipe, BitsAndBytesRecipe) and ".experts." in module:
        return False  # fused in memory, and left alone by the library
    return (
        leaf == "weight"
        and len(tensor.shape) == 2
        and LAYER.search(tensor.name) is not None
        and not recipe.ignores(module)
    )


def in_features(tensor: TensorHeader, config: dict[str, Any]) -> int:
    """The width along which a weight's groups run."""
    return tensor.shape[0] if config.get("model_type") in CONV1D_MODEL_TYPES else tensor.shape[1]


def _stored_bytes(tensor: TensorHeader, source: Source, recipe: Recipe) -> int:
    if not quantizable(tensor, recipe):
        return tensor.bytes
    scheme = recipe.scheme
    if isinstance(scheme, FourBitFloatScheme):
        return round(tensor.numel * scheme.bits_per_weight / 8) + 1500  # quant map and quant state of each weight
    width = in_features(tensor, source.config)
    scales = 4 * (tensor.numel // width)
    return round(tensor.numel * scheme.bits_per_weight / 8) + scales


def _peak_bytes(source: Source, recipe: Recipe, calibration: Calibration | None, verification: Verification) -> int:
    """Peak of one streaming process: all outside the layers and one layer in float32, its Hessians, hidden states."""
    layers: dict[str, int] = defaultdict(int)
    outside = 0
    hessians: dict[str, int] = defaultdict(int)
    for tensor in source.tensors:
        match = LAYER.search(tensor.name)
        if match is None:
            outside += 4 * tensor.numel
            continue
        layers[match.group(1)] += 4 * tensor.numel
        if recipe.calibrated and quantizable(tensor, recipe):
            hessians[match.group(1)] += 4 * in_features(tensor, source.config) ** 2
    hidden = _hidden_bytes(source, recipe, calibration, verification)
    logits = 4 * int(source.config.get("vocab_size") or 0) * verification.sequence_length
    # A layer as it was read, the one that is read ahead, the model's own copy and a method's; two times the Hessians,
    # for their factors.
    largest = 4 * max(layers.values(), default=0) + 2 * max(hessians.values(), default=0)
    return RUNTIME_BYTES + outside + largest + 2 * hidden + 4 * logits
