"""Loads a GGUF file in llama.cpp as its users will, in the environment ``llama-cpp``, and reports the result.

``answer`` is called in a fresh process. Declarations are those of include/llama.h at the library's version, which the
environment pins; the processor's kernels round activations to 8 bits, so that logits differ slightly from our decoding.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

from workers.machine.memory import peak_host_bytes
from workers.verify.runtimes.reply import reply

F32, WARNING = 0, 3
# Characters of text whose tokens are compared with the tokenizer's own.
COMPARED = 4000


class ModelParams(Structure):
    """``llama_model_params``."""

    _fields_ = (
        ("devices", c_void_p), ("tensor_buft_overrides", c_void_p), ("n_gpu_layers", c_int32), ("split_mode", c_int),
        ("load_mode", c_int), ("lazy_mode", c_int), ("main_gpu", c_int32),
        ("tensor_split", c_void_p), ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p), ("kv_overrides", c_void_p), ("vocab_only", c_bool),
        ("check_tensors", c_bool), ("use_extra_bufts", c_bool), ("no_host", c_bool), ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )  # fmt: skip


class ContextParams(Structure):
    """``llama_context_params``."""

    _fields_ = (
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32), ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32), ("n_threads_batch", c_int32), ("ctx_type", c_int), ("rope_scaling_type", c_int),
        ("pooling_type", c_int), ("attention_type", c_int), ("flash_attn_type", c_int), ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float), ("yarn_ext_factor", c_float), ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float), ("yarn_beta_slow", c_float), ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p), ("type_k", c_int), ("type_v", c_int),
        ("moe_cache_size", c_size_t), ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p), ("embeddings", c_bool),
        ("offload_kqv", c_bool), ("no_perf", c_bool), ("op_offload", c_bool), ("swa_full", c_bool),
        ("kv_unified", c_bool), ("samplers", c_void_p), ("n_samplers", c_size_t), ("ctx_other", c_void_p),
    )  # fmt: skip


class Batch(Structure):
    """``llama_batch``."""

    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_RETURNS: dict[str, Any] = {
    "llama_backend_init": None, "llama_log_set": None, "llama_model_default_params": ModelParams,
    "llama_context_default_params": ContextParams, "llama_model_load_from_file": c_void_p,
    "llama_init_from_model": c_void_p, "llama_model_get_vocab": c_void_p, "llama_vocab_n_tokens": c_int32,
    "llama_batch_init": Batch, "llama_batch_free": None, "llama_decode": c_int32, "llama_get_logits_ith": c_void_p,
    "llama_get_memory": c_void_p, "llama_memory_clear": None, "llama_tokenize": c_int32, "llama_free": None,
    "llama_model_free": None,
}  # fmt: skip
_TAKES: dict[str, list[Any]] = {
    "llama_log_set": [LOG, c_void_p], "llama_model_load_from_file": [c_char_p, ModelParams],
    "llama_init_from_model": [c_void_p, ContextParams], "llama_model_get_vocab": [c_void_p],
    "llama_vocab_n_tokens": [c_void_p], "llama_batch_init": [c_int32, c_int32, c_int32], "llama_batch_free": [Batch],
    "llama_decode": [c_void_p, Batch], "llama_get_logits_ith": [c_void_p, c_int32], "llama_get_memory": [c_void_p],
    "llama_memory_clear": [c_void_p, c_bool], "llama_free": [c_void_p], "llama_model_free": [c_void_p],
    "llama_tokenize": [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
}  # fmt: skip


def answer(request: str) -> str:
    """The result of loading a ``RuntimeRequest``'s file in llama.cpp, as JSON."""
    return reply(request, _load_and_run)


def _load_and_run(request: dict[str, Any]) -> dict[str, Any]:
    import importlib.metadata

    import torch
    import xllamacpp.xllamacpp as extension
    from safetensors.torch import load_file, save_file

    artifact, scratch = Path(request["artifact"]), Path(request["scratch"])
    declared = json.loads((artifact / "config.json").read_text())["quantization_config"]
    given = load_file(scratch / "tokens.safetensors")
    tokens, prompts = given["tokens"].tolist(), given["prompts"].tolist()
    longest = max(len(tokens[0]), len(prompts[0]) + request["new_tokens"])
    with Llama(Path(extension.__file__), artifact / declared["file"], longest) as llama:
        logits = torch.stack([llama.logits(row) for row in tokens])
        save_file({"logits": logits.contiguous()}, scratch / "logits.safetensors")
        generated = [llama.continued(prompt, request["new_tokens"]) for prompt in prompts]
        problems = list(_tokenizer_problems(artifact, llama, tokens, request["trust_remote_code"]))
    return {
        "version": importlib.metadata.version("xllamacpp"),
        "problems": problems,
        "generated": generated,
        "host_bytes": peak_host_bytes(),
    }


class Llama:
    """llama.cpp with one model and one context of ``n_ctx`` tokens; computes with cache and logits in float32.

    Raises:
        ValueError: the library doesn't load the file; the message is its own.
    """

    def __init__(self, library: Path, file: Path, n_ctx: int) -> None:
        self._said: list[str] = []
        self._log = LOG(
            lambda level, text, data: self._said.append(text.decode(errors="replace")) if level >= WARNING else None
        )
        self._lib = ctypes.CDLL(str(library))
        for name, returned in _RETURNS.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = returned, _TAKES.get(name, [])
        self._lib.llama_backend_init()
        self._lib.llama_log_set(self._log, None)
        model_params = self._lib.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.check_tensors = True
        self._model = self._lib.llama_model_load_from_file(str(file).encode(), model_params)
        self._refuse(not self._model, "the model doesn't load")
        params = self._lib.llama_context_default_params()
        self._refuse(
            (model_params.main_gpu, params.n_ctx, params.n_batch, params.moe_cache_size, params.n_samplers)
            != (0, 512, 2048, 0, 0),
            "its structures aren't those of the version that is declared here",
        )
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.type_k = params.type_v = F32
        params.flash_attn_type = 0
        self._context = self._lib.llama_init_from_model(self._model, params)
        self._refuse(not self._context, "no context")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self._width = self._lib.llama_vocab_n_tokens(self._vocab)

    def _note(self, level: int, text: bytes, data: object) -> None:
        if level >= WARNING:
            self._said.append(text.decode(errors="replace"))

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *error: object) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def logits(self, tokens: Sequence[int]) -> Any:
        """The logits after each token, float32 [T, V]."""
        self._forget()
        return self._decode(tokens, 0, every=True)

    def continued(self, prompt: Sequence[int], count: int) -> list[int]:
        """The greedy continuation of a prompt."""
        self._forget()
        made: list[int] = []
        last = self._decode(prompt, 0, every=False)[-1]
        for at in range(count):
            made.append(int(last.argmax()))
            if at + 1 < count:
                last = self._decode(made[-1:], len(prompt) + at, every=False)[-1]
        return made

    def tokenized(self, text: str) -> list[int]:
        """Its tokens of a text, without special tokens added."""
        data = text.encode()
        room = (c_int32 * (len(data) + 8))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), room, len(room), False, False)
        return list(room[: max(count, 0)])

    def _forget(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, tokens: Sequence[int], start: int, *, every: bool) -> Any:
        import numpy as np
        import torch

        with self._batch(len(tokens)) as batch:
            for at, token in enumerate(tokens):
                batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, start + at, 1, 0
                batch.logits[at] = every or at == len(tokens) - 1
            failed = self._lib.llama_decode(self._context, batch)
            self._refuse(bool(failed), f"llama_decode answers {failed}")
            places = range(len(tokens)) if every else [len(tokens) - 1]
            rows = [
                np.ctypeslib.as_array(
                    ctypes.cast(self._lib.llama_get_logits_ith(self._context, at), POINTER(c_float)), (self._width,)
                ).copy()
                for at in places
            ]
        return torch.from_numpy(np.stack(rows))

    @contextmanager
    def _batch(self, count: int) -> Iterator[Batch]:
        batch = self._lib.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        try:
            yield batch
        finally:
            self._lib.llama_batch_free(batch)

    def _refuse(self, wrong: bool, what: str) -> None:
        if wrong:
            raise ValueError(f"{what}: {' '.join(''.join(self._said)[-600:].split())}")


def _tokenizer_problems(
    artifact: Path, llama: Llama, tokens: Sequence[Sequence[int]], trust_remote_code: bool
) -> Iterator[str]:
    """Where the file's tokenizer gives other tokens than the model's own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifact, trust_remote_code=trust_remote_code)
    for row in tokens:
        text = tokenizer.decode(row, skip_special_tokens=True)[:COMPARED]
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        got = llama.tokenized(text)
        if got != wanted:
            at = next(
                (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted))
            )
            yield (
                f"runtime llama.cpp: tokenizes otherwise than the model's tokenizer, from token {at} on "
                f"({got[at : at + 3]}, expected {wanted[at : at + 3]})"
            )
            return
