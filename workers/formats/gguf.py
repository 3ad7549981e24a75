"""The gguf format: quantized matrices as ggml's blocks, in one file with names and metadata as llama.cpp wants them.

O output features, I input features, R bytes of a row. The file itself: ``checkpoint.gguf_file``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint.gguf_file import Skeleton
from workers.checkpoint.source import DTYPES, Header
from workers.errors import UnsupportedModel, WorkerDied
from workers.formats.decoder import Decoder
from workers.formats.llama_converter import ConverterAnswer, ConverterRequest
from workers.formats.llama_projector import ProjectorAnswer, ProjectorRequest
from workers.machine import child
from workers.machine.environments import interpreter
from workers.machine.failures import of_a_process
from workers.machine.ggml_library import ENVIRONMENT
from workers.numerics import ggml
from workers.spec import formats
from workers.spec.ggml import TYPES, Mix

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CONVERTER_SECONDS = 1800.0
SUFFIXES = tuple(f"weight_{kind}{end}" for kind in TYPES for end in ("", "_t"))


def suffix(kind: str, *, transposed: bool) -> str:
    """The name within its module of a weight's blocks; ``transposed``: the checkpoint stores it as (I, O)."""
    return f"weight_{kind}{'_t' * transposed}"


def file_name(model: str, mix: Mix) -> str:
    """The file's name, as publishers of such files write it."""
    return f"{model}-{mix.upper()}.gguf"


def quantization_config(file: str, mix: Mix) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, by which quantmill finds and reads the file."""
    return {"quant_method": formats.GGUF.name, "file": file, "file_type": mix}


def open_(config: Mapping[str, Any], source: Any, trust_remote_code: bool) -> Decoder:
    """The decoder of a GGUF file that quantmill wrote."""
    return Decoder(anchors=SUFFIXES, suffixes=SUFFIXES, required=(), header=_header, decode=_decode)


def _header(module: str, stored: Mapping[str, Header], read: Any) -> Header:
    (name, header), = stored.items()  # fmt: skip
    kind, transposed = _parsed(name)
    rows, row_bytes = header.shape
    columns = row_bytes // TYPES[kind].bytes * TYPES[kind].block
    return Header((columns, rows) if transposed else (rows, columns), torch.float32)


def _decode(module: str, stored: Mapping[str, Tensor]) -> Tensor:
    (name, raw_OR), = stored.items()  # fmt: skip
    kind, transposed = _parsed(name)
    weight_OI = ggml.decode(kind, raw_OR)
    return weight_OI.T.contiguous() if transposed else weight_OI


def _parsed(name: str) -> tuple[str, bool]:
    transposed = name.endswith("_t")
    return name.removesuffix("_t").removeprefix("weight_"), transposed


# ----------------------------------------------------------------------------------------------- skeleton


def skeleton_of(folder: Path, name: str, headers: Mapping[str, Header]) -> tuple[Skeleton, tuple[str, ...]]:
    """What llama.cpp's converter makes of a checkpoint beside the weights, and its notes.

    Raises:
        PreflightError: the environment isn't built here.
        UnsupportedModel: the converter doesn't know the model, or rearranges its weights by more than rows.
        WorkerDied: its process ended without an answer.
    """
    tensors = {key: (tuple(header.shape), DTYPE_NAMES[header.dtype]) for key, header in headers.items()}
    answer = _asked(ConverterRequest(folder=str(folder.absolute()), name=name, tensors=tensors).model_dump_json())
    if answer.skeleton is None:
        raise UnsupportedModel(
            f"gguf: llama.cpp's converter makes no file of {name}: {answer.error}; choose another format for this model"
        )
    return answer.skeleton, answer.notes


def write_projector(folder: Path, name: str, out: Path) -> str | None:
    """Write a multimodal model's towers and projector, float16, as llama.cpp's converter does; or why it can't.

    Raises:
        PreflightError: the environment isn't built here.
        WorkerDied: its process ended without an answer.
    """
    request = ProjectorRequest(folder=str(folder.absolute()), name=name, out=str(out.absolute())).model_dump_json()
    return ProjectorAnswer.model_validate_json(_in_llama_cpp("llama_projector", request)).error


@lru_cache(maxsize=2)
def _asked(request: str) -> ConverterAnswer:
    """The converter's answer, which all recipes of a pass share."""
    return ConverterAnswer.model_validate_json(_in_llama_cpp("llama_converter", request))


def _in_llama_cpp(module: str, request: str) -> str:
    """The answer of a module of this room, run in the environment that has llama.cpp's converter."""
    python = interpreter(ENVIRONMENT)
    try:
        ended = child.run(f"workers.formats.{module}:answer", request, python=python, seconds=CONVERTER_SECONDS)
    except TimeoutError:
        raise WorkerDied(f"llama.cpp's converter: no answer within {CONVERTER_SECONDS:.0f} s") from None
    if ended.answer is None:
        raise of_a_process("llama.cpp's converter", ended)
    return ended.answer
