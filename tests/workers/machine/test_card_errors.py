"""What CUDA, its libraries and torch say, word for word, and what it is for us."""

from __future__ import annotations

import pytest

from tests.workers.jobs import recipe
from workers.errors import DeviceLost, DeviceUnusable, OutOfMemory, WorkerDied
from workers.machine.card_errors import CARD_ERRORS, card_error
from workers.machine.child import Ended
from workers.machine.failures import classify, describe, of_a_process
from workers.model.batching import ran_out
from workers.quantize.attempts import failure_alone
from workers.spec.job import Order, Thresholds
from workers.verify.runtimes.reply import out_of_memory, reply

ADVICE = (
    "\nSearch for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html "
    "for more information.\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
SAID = {
    OutOfMemory: [
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 0 is free.",
        "CUDA error: out of memory" + ADVICE,
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`",
    ],
    DeviceLost: [
        "CUDA error: an illegal memory access was encountered" + ADVICE,
        "CUDA error: an illegal instruction was encountered",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: uncorrectable NVLink error detected during the execution",
        "CUDA error: unspecified launch failure",
        "CUDA error: device-side assert triggered" + ADVICE,
        "CUDA error: misaligned address",
        "CUDA error: the launch timed out and was terminated",
        "CUDA error: unknown error",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "Unable to determine the device handle for GPU 0000:01:00.0: GPU is lost.  Reboot the system",
    ],
    DeviceUnusable: [
        "CUDA error: no kernel image is available for execution on the device" + ADVICE,
        "Error no kernel image is available for execution on the device at line 380 in file /src/csrc/ops.cu",
        "CUDA driver version is insufficient for CUDA runtime version",
        "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by "
        "downloading and installing a new version",
        "CUDA error: all CUDA-capable devices are busy or unavailable" + ADVICE,
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable" + ADVICE,
        "CUDA error: exclusive-thread device already in use by a different thread",
        "CUDA error: system not yet initialized",
        "CUDA error: system has unsupported display driver / cuda driver combination",
        "CUDA error: the provided PTX was compiled with an unsupported toolchain.",
    ],
}
CASES = [(kind, words) for kind, several in SAID.items() for words in several]
OTHERS = [
    "CUDA error: invalid argument" + ADVICE,
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    "Torch not compiled with CUDA enabled",
    "No CUDA GPUs are available",
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes",
]
ORDER = Order(
    recipe=recipe(name="r", method="rtn", scheme={"type": "int", "bits": 4, "group_size": 128, "symmetric": True}),
    fingerprint="f" * 8,
    thresholds=Thresholds(kl_mean=1, top1_agreement=0.1, perplexity_ratio=2, runtime_logit_difference=1),
)


@pytest.mark.parametrize(("kind", "words"), CASES)
def test_an_error_of_a_card_has_its_class_and_a_remedy(kind: type[Exception], words: str) -> None:
    known = classify(RuntimeError(words))
    assert type(known) is kind
    assert words.partition("\n")[0].rstrip(".") in str(known)
    assert str(known).endswith(tuple(row.remedy for row in CARD_ERRORS.values() if row.error is kind))
    assert describe(RuntimeError(words)).kind == kind.__name__


@pytest.mark.parametrize("words", OTHERS)
def test_what_else_is_said_of_devices_is_no_error_of_a_card(words: str) -> None:
    assert card_error(RuntimeError(words)) is None


def test_our_own_errors_stay_as_they_are() -> None:
    assert card_error(WorkerDied("it said: CUDA error: unspecified launch failure")) is None


@pytest.mark.parametrize(("kind", "words"), CASES)
def test_no_recipe_is_blamed_for_a_card(kind: type[Exception], words: str) -> None:
    error = RuntimeError(words)
    assert ran_out(error) == (kind is OutOfMemory)
    with pytest.raises(OutOfMemory if kind is OutOfMemory else RuntimeError):
        failure_alone(ORDER, error)


@pytest.mark.parametrize(("kind", "words"), CASES)
def test_a_process_that_a_card_ended_is_not_the_checkpoints_fault(kind: type[Exception], words: str) -> None:
    def look(request: object) -> dict[str, object]:
        raise RuntimeError(words)

    with pytest.raises(RuntimeError):  # passes, and ends the process
        reply("{}", look)
    assert out_of_memory(RuntimeError(words))
    stderr = f"Traceback (most recent call last):\n  File x\nRuntimeError: {words}\n"
    assert type(of_a_process("runtime check", Ended(1, stderr))) is kind


def test_a_process_that_ended_otherwise_died() -> None:
    assert type(of_a_process("x", Ended(1, "ValueError: no such thing"))) is WorkerDied
