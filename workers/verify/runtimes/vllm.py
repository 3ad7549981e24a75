"""Loads an artifact in vLLM as its users will, in the environment ``vllm-cpu``, and reports the result.

``answer`` is called in a fresh process. vLLM is tried as it is; where it has no kernel for this processor, its own
loader runs, and PyTorch computes with what was loaded (``vllm_reference``): then ``kernels`` says why.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.machine.memory import peak_host_bytes
from workers.spec.formats import BITSANDBYTES
from workers.verify.runtimes import vllm_loading, vllm_reference
from workers.verify.runtimes.reply import NotHere, out_of_memory, reply
from workers.verify.runtimes.vllm_stored import stored_problems

# One process, a small cache, no compilation, nothing from the network.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Other processes of this machine compute, too: threads are neither bound to cores nor wait by spinning.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
}  # fmt: skip

# What vLLM says of a format in which it computes in half precision alone.
HALF_ONLY = "is not supported for quantization method"
# Characters of a library's message that are shown.
MESSAGE = 400


class NotLoaded(ValueError):
    """vLLM's loader refuses the checkpoint, or leaves parts of the model unset."""


@dataclass
class Watched:
    """What loading showed: ``problems`` of a model that computes all the same, and how many layers are decoded.

    ``filled``: parameters were marked before loading, so that those that weren't set are found.
    """

    filled: bool = False
    problems: list[str] = field(default_factory=list)
    decoded: int = 0


def answer(request: str) -> str:
    """The result of loading a ``RuntimeRequest``'s artifact in vLLM, as JSON."""
    os.environ.update(SETTINGS)
    return reply(request, _load_and_run)


def _load_and_run(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    import vllm
    from safetensors.torch import load_file, save_file

    artifact, scratch = Path(request["artifact"]), Path(request["scratch"])
    given = load_file(scratch / "tokens.safetensors")
    tokens, prompts = given["tokens"].tolist(), given["prompts"].tolist()
    if wrong := stored_problems(artifact):
        raise NotLoaded("; ".join(wrong))
    watched = Watched()
    _watch(watched)
    length = max(len(tokens[0]) + 1, len(prompts[0]) + request["new_tokens"])
    trust = request["trust_remote_code"]

    def run(dtype: str) -> tuple[Any, list[list[int]]]:
        llm = _engine(artifact, length, trust, dtype)
        try:
            return torch.stack([_logits(llm, row) for row in tokens]), _continued(llm, prompts, request["new_tokens"])
        finally:
            _let_go(llm)

    kernels = ""
    try:
        logits, generated = run("auto") if request["arithmetic"] == "own" else _in_widest(run)
    except Exception as error:
        if out_of_memory(error) or isinstance(error, NotLoaded):
            raise
        kernels = _said(error)
    if kernels:  # after the error, whose traceback holds the first model
        gc.collect()
        watched.problems.clear()
        vllm_reference.choose_no_kernels()
        _watch(watched, decode=True)
        logits, generated = _in_reference(run, kernels)
        if not watched.decoded:
            raise NotLoaded(kernels)
    save_file({"logits": logits.contiguous()}, scratch / "logits.safetensors")
    return {
        "version": vllm.__version__,
        "problems": watched.problems,
        "generated": generated,
        "host_bytes": peak_host_bytes(),
        "kernels": kernels,
    }


Run = Callable[[str], tuple[Any, list[list[int]]]]


def _in_widest(run: Run) -> tuple[Any, list[list[int]]]:
    """Run in float32 for exactness, or in the checkpoint's dtype where vLLM takes only half precision."""
    try:
        return run("float32")
    except ValueError as error:
        if HALF_ONLY not in str(error):
            raise
        return run("auto")


def _in_reference(run: Run, kernels: str) -> tuple[Any, list[list[int]]]:
    """Run with reference arithmetic; the error of what isn't a missing kernel is the loader's.

    ``kernels`` is what vLLM said without it.
    """
    try:
        return run("float32")
    except Exception as error:
        if out_of_memory(error) or isinstance(error, NotLoaded | NotHere):
            raise
        why = _said(error)
        raise NotLoaded(why if why == kernels else f"{why}; with its own kernels {kernels}") from error


def _engine(artifact: Path, length: int, trust_remote_code: bool, dtype: str) -> Any:
    from vllm import LLM

    return LLM(
        model=str(artifact),
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=length,
        max_num_seqs=1,
        max_num_batched_tokens=length,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
    )


def _logits(llm: Any, tokens: list[int]) -> Any:
    """The logits after each token, float32 [T, V], as the model computes them for log-probabilities of its prompt."""
    import torch
    from vllm import SamplingParams

    seen: list[Any] = []

    def record(model: Any) -> None:
        compute = type(model).compute_logits

        def recording(*args: Any, **kwargs: Any) -> Any:
            logits = compute(model, *args, **kwargs)
            seen.append(logits.float().cpu().clone())
            return logits

        model.compute_logits = recording

    llm.apply_model(record)
    llm.generate(
        [{"prompt_token_ids": tokens}],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False),
        use_tqdm=False,
    )
    prompt = next(rows for rows in seen if len(rows) == len(tokens) - 1)
    last = next(rows for rows in seen if len(rows) == 1)
    return torch.cat([prompt, last])


def _continued(llm: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The greedy continuation of each prompt, up to the end of the text."""
    from vllm import SamplingParams

    greedy = SamplingParams(max_tokens=new_tokens, temperature=0, detokenize=False)
    made = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in made]


def _let_go(llm: Any) -> None:
    """Free a model and vLLM's state of this process, so that another can be loaded."""
    from vllm.distributed import cleanup_dist_env_and_memory

    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def _watch(watched: Watched, decode: bool = False) -> None:
    """Check what vLLM's loader sets, between loading and its processing of weights; ``decode``: compute in PyTorch."""
    import vllm.model_executor.model_loader.base_loader as loader

    own_create = getattr(loader.BaseModelLoader.create_model, "own", loader.BaseModelLoader.create_model)
    own_process = getattr(loader.process_weights_after_loading, "own", loader.process_weights_after_loading)

    def create(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        cached = bool(getattr(vllm_config.quant_config, "kv_cache_scheme", None))
        if decode:
            vllm_reference.leave_cache_unrounded(vllm_config)
        model = own_create(self, vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        vllm_loading.expect_cache_scales(model, cached)
        watched.filled = BITSANDBYTES.name not in str(model_config.quantization)  # whose loader replaces parameters
        if watched.filled:
            vllm_loading.fill(model)
        return model

    def process(model: Any, model_config: Any, device: Any) -> None:
        if watched.filled and (names := vllm_loading.unset(model)):
            raise NotLoaded(vllm_loading.unset_problem(names))
        watched.problems += vllm_loading.split_scales(model)
        if decode:
            watched.decoded = vllm_reference.use_reference(model)
            vllm_reference.round_cached(model)
        own_process(model, model_config, device)

    create.own, process.own = own_create, own_process  # type: ignore[attr-defined]
    loader.BaseModelLoader.create_model = create
    loader.process_weights_after_loading = process


def _said(error: Exception) -> str:
    """An exception's class and message in one line, as it's shown."""
    text = " ".join(str(error).split()).partition(" Reasons:")[0]
    return f"{type(error).__name__}: {text[:MESSAGE]}"
