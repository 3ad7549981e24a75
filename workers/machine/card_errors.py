"""What CUDA and its libraries say when a card is at fault, by kind: words, error class, remedy. Standard library only.

A card that is lost, or whose context an error has poisoned, fails everything that its process does from then on; so
these errors are the stage's, never one recipe's. The words are those of cudaGetErrorString, of cuBLAS' and cuDNN's
status names, of NVML and of torch.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from workers.errors import DeviceLost, DeviceUnusable, OutOfMemory, QuantmillError

# Lines that torch appends to any error of CUDA, about debugging; they name errors that didn't happen.
ADVICE = re.compile(
    r"^(Search for `cuda|CUDA kernel errors might|For debugging consider|Compile with `TORCH_USE_CUDA_DSA"
    r"|Device-side assertion tracking).*$",
    re.MULTILINE,
)
# Lines at the end of stderr in which a process says what ended it: an uncaught error's, and torch's advice after it.
LAST_LINES = 12


class CardError(NamedTuple):
    """A kind of error: its words, its class, how a message begins, and how it ends: what to do."""

    words: re.Pattern[str]
    error: type[OutOfMemory] | type[DeviceLost] | type[DeviceUnusable]
    what: str
    remedy: str


def _row(
    error: type[OutOfMemory] | type[DeviceLost] | type[DeviceUnusable], what: str, remedy: str, *words: str
) -> CardError:
    return CardError(re.compile("|".join(words), re.IGNORECASE), error, what, remedy)


# The first row that fits.
CARD_ERRORS: dict[str, CardError] = {
    "out of memory": _row(
        OutOfMemory,
        "out of GPU memory",
        "use a larger card, lower calibration.samples, or shorter sequence_length; quantization's buffers need a tenth "
        "of the memory beside the model",
        r"CUDA out of memory",
        r"CUDA (driver |runtime )?error: out of memory",
        r"cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY",
        r"CU\w+_STATUS_ALLOC_FAILED",
    ),
    "not usable": _row(
        DeviceUnusable,
        "the GPU can't be used by this process",
        "end the process that holds it (nvidia-smi names it), or set its compute mode to default: nvidia-smi -c 0; "
        "CUDA_VISIBLE_DEVICES= uses the CPU",
        r"devices?(\(s\))? (are|is|is/are) busy or unavailable",
        r"exclusive-thread device already in use",
        r"CUDA_ERROR_DEVICE_UNAVAILABLE|cudaErrorDevicesUnavailable|cudaErrorDeviceAlreadyInUse",
    ),
    "driver": _row(
        DeviceUnusable,
        "the NVIDIA driver doesn't serve this build of torch",
        "update the driver, or install torch's build for the CUDA version that nvidia-smi shows; on machines with "
        "NVSwitch start nvidia-fabricmanager",
        r"driver (version )?(on your system )?is (too old|insufficient)",
        r"unsupported display driver / cuda driver combination",
        r"forward compatibility was attempted on non supported HW",
        r"PTX was compiled with an unsupported toolchain",
        r"CUDA error: system not yet initialized",
    ),
    "architecture": _row(
        DeviceUnusable,
        "this build has no kernels for the GPU's architecture",
        "compare torch.cuda.get_arch_list() with torch.cuda.get_device_capability(), and install the build of torch "
        "(or of the library that is named) for this card; CUDA_VISIBLE_DEVICES= uses the CPU",
        r"no kernel image is available",
        r"device kernel image is invalid",
        r"cudaErrorNoKernelImageForDevice|CUDA_ERROR_NO_BINARY_FOR_GPU",
    ),
    "lost": _row(
        DeviceLost,
        "the GPU failed, or an error has poisoned its context",
        "it is tried on another card; look at dmesg for NVRM Xid lines, and at nvidia-smi -q -d ECC,PAGE_RETIREMENT; "
        "reset the card or leave it out by CUDA_VISIBLE_DEVICES",
        r"(uncorrectable|double.bit) (ECC|NVLink) error",
        r"an illegal (memory access|instruction) was encountered",
        r"unspecified launch failure",
        r"device-side assert",
        r"CUDA error: (misaligned address|invalid program counter|hardware stack error|unknown error)",
        r"CUDA error: operation not supported on global/shared address space",
        r"CUDA error: the launch timed out and was terminated",
        r"CUDA error: (context is destroyed|an exception occurred on the device)",
        r"CUDA error: (call requires newer driver or )?(tensor memory|cluster) \w+",
        r"GPU (is lost|has fallen off the bus|requires reset)",
        r"CU\w+_STATUS_(EXECUTION_FAILED|MAPPING_ERROR|INTERNAL_ERROR|NOT_INITIALIZED)",
        r"cudaError(IllegalAddress|ECCUncorrectable|LaunchFailure|Assert|HardwareStackError|IllegalInstruction)",
    ),
}


def row_of(message: str) -> CardError | None:
    """The row whose words are in a message; None: no error of a card."""
    said = ADVICE.sub("", message)
    return next((row for row in CARD_ERRORS.values() if row.words.search(said)), None)


def card_error(error: BaseException | str) -> OutOfMemory | DeviceLost | DeviceUnusable | None:
    """Our error for what CUDA or a library of it said; None if it isn't an error of a card, or is ours already."""
    if isinstance(error, QuantmillError):
        return None
    row = row_of(str(error))
    if row is None:
        return None
    said = ADVICE.sub("", str(error)).strip()
    line = next((line.strip() for line in said.splitlines() if row.words.search(line)), said)
    return row.error(f"{row.what} ({line.rstrip('.')}); {row.remedy}")


def card_error_at_end(stderr: str) -> OutOfMemory | DeviceLost | DeviceUnusable | None:
    """``card_error`` of the last lines that a process printed; torch's own advice follows CUDA's words."""
    return card_error("\n".join(stderr.strip().splitlines()[-LAST_LINES:]))


def of_the_machine(error: BaseException) -> bool:
    """Whether an error is a lost or unusable card's: no recipe's fault, and the end of what this process can do."""
    return isinstance(error, DeviceLost | DeviceUnusable) or isinstance(card_error(error), DeviceLost | DeviceUnusable)
