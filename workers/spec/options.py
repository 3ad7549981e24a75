"""The settings of each method, which a recipe gives under `options`. Frozen, unknown keys refused."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workers.spec.base import Frozen


class NoOptions(Frozen):
    """A method without settings."""


class RtnOptions(Frozen):
    """Settings of rounding to nearest."""

    scales: Literal["minmax", "mse"] = Field("minmax", description="How the range of an int group is chosen.")


class GptqOptions(Frozen):
    """Settings of GPTQ (arXiv 2210.17323)."""

    scales: Literal["minmax", "mse"] = Field("mse", description="How a group's range is chosen.")
    activation_order: bool = Field(True, description="Solve columns in order of falling diag(H); groups stay static.")
    damping: float = Field(0.01, gt=0, lt=1, description="Added to diag(H), as a share of its mean.")
    refine: int = Field(
        3,
        ge=0,
        le=100,
        description="After solving: rounds of least squares for the scales and coordinate descent for the codes, "
        "both under the same Hessian; 0: none.",
    )
    propagate: Literal["original", "quantized"] = Field(
        "original",
        description="Which activations are calibrated on: the original model's (one stream for all recipes), or this "
        "recipe's own, through the layers that it has quantized so far.",
    )


class AwqOptions(Frozen):
    """Settings of AWQ (arXiv 2306.00978)."""

    grid: int = Field(20, ge=1, le=1000, description="Exponents tried between 0 and 1 for the scales of the inputs.")
    clip: bool = Field(True, description="Search the range of each group for the least error on the activations.")


class SmoothQuantOptions(Frozen):
    """Settings of SmoothQuant (arXiv 2211.10438)."""

    strength: float = Field(
        0.5, ge=0, le=1, description="alpha: how much of the activations' range moves into weights."
    )
    scales: Literal["minmax", "mse"] = Field("minmax", description="How the range of an output channel is chosen.")


class HqqOptions(Frozen):
    """Settings of half-quadratic quantization (Badri and Shaji, 2023)."""

    iterations: int = Field(20, ge=1, le=1000, description="Rounds of half-quadratic splitting.")
    norm: float = Field(0.7, gt=0, lt=2, description="p of the l_p norm of the error that is made small.")


class BitsAndBytesOptions(Frozen):
    """Settings of bitsandbytes, as transformers' config has them; its threshold is the scheme's."""

    compute_dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="What 4-bit layers compute in; null: the checkpoint's dtype."
    )
    quant_storage: Literal["uint8", "float16", "bfloat16", "float32"] = Field(
        "uint8", description="The dtype that 4-bit codes are packed in: FSDP shards what has the other weights' dtype."
    )
    fp32_cpu_offload: bool = Field(
        False,
        description="Let loaders keep modules on the CPU, in float32, which a device_map places there; without it, "
        "transformers refuses such a map.",
    )


class GgufOptions(Frozen):
    """Settings of GGUF files."""

    codes: Literal["solved", "llama.cpp"] = Field(
        "solved",
        description="On the scales that llama.cpp chooses with the importance matrix: codes by GPTQ, or llama.cpp's.",
    )
    damping: float = Field(0.01, gt=0, lt=1, description="Added to diag(H), as a share of its mean.")
    refine: int = Field(3, ge=0, le=100, description="After solving: sweeps of coordinate descent for the codes.")


class LibraryOptions(Frozen):
    """Settings of a library that makes whole artifacts; each takes some of them."""

    damping: float = Field(0.01, gt=0, lt=1, description="GPTQ: added to diag(H), as a share of its mean.")
    activation_order: bool = Field(False, description="GPTQ: solve columns in order of falling diag(H).")
    iterations: int = Field(200, ge=1, le=10000, description="AutoRound: steps of signed gradient descent for a block.")
