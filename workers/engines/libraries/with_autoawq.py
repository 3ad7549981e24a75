"""autoawq's AWQ (arXiv 2306.00978), into the format awq (GEMM).

The library divides norms and rows of preceding linear layers by the scales that it chooses, and keeps no record of
them. They are recorded here as they are chosen, in the form of ``formats.folded``: verification then applies them to
the source, and compares every tensor, norms bit for bit.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

from workers.engines.libraries import older, speak

# The search for a weight's range works on this many outputs at a time, and on no other number.
OUTPUTS = 64


def make(request: dict[str, Any]) -> list[str]:
    """Quantize by autoawq, and leave its codes and the scales that it folded in the request's folders."""
    from awq.models._config import AwqConfig
    from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP

    tokens = speak.tokens_of(request)
    with tempfile.TemporaryDirectory(dir=Path(request["out"]).parent) as scratch:
        speak.progress("loading")
        plain = older.load(request, Path(scratch))
        kind = older.model_class(AWQ_CAUSAL_LM_MODEL_MAP, plain, "autoawq")
        model = kind(
            plain,
            plain.config.model_type,
            is_quantized=False,
            config=plain.config,
            quant_config=AwqConfig(),
            processor=None,
        )
        recorder = _recorder(plain, request["modules"])
        speak.layers(plain)
        speak.progress("quantizing")
        model.quantize(
            tokenizer=None,
            quant_config=settings(request),
            calib_data=tokens,
            max_calib_samples=len(tokens),
            max_calib_seq_len=len(tokens[0]),
            quantizer_cls=recorder,
        )
        speak.progress("saving")
        saved = Path(scratch) / "saved"
        model.save_quantized(str(saved))
        speak.declare(saved, {"modules_to_not_convert": request["left"]})
        speak.store(request, saved, recorder.folds)
    unsearched = sorted(recorder.unsearched)
    return [f"ranges not searched, for {OUTPUTS} doesn't divide their outputs: {', '.join(unsearched)}"] * bool(
        unsearched
    )


def settings(request: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the library's AwqConfig."""
    scheme = request["recipe"]["scheme"]
    return {
        "w_bit": scheme["bits"],
        "q_group_size": scheme["group_size"],
        "zero_point": not scheme["symmetric"],
        "version": "GEMM",
    }


def _recorder(model: Any, modules: list[str]) -> Any:
    """The library's quantizer, limited to ``modules``, that records the scales which it folds."""
    import torch
    from awq.quantize.quantizer import AwqQuantizer

    names = {id(module): name for name, module in model.named_modules()}
    chosen = set(modules)

    class Recorder(AwqQuantizer):  # type: ignore[misc,unused-ignore]  # the library is untyped, or not here
        folds: ClassVar = speak.Folds()
        unsearched: ClassVar[set[str]] = set()

        def _search_best_scale(self, module: Any, prev_op: Any, layers: list[Any], inp: Any, **more: Any) -> Any:
            before, after = names[id(prev_op)], [names[id(layer)] for layer in layers]
            linear = isinstance(prev_op, torch.nn.Linear)
            if not chosen.issuperset(after) or (linear and before not in chosen):
                # What isn't quantized stays as it is: scales of one change nothing.
                found = [name.removeprefix(f"{names[id(module)]}.") for name in (before, *after)]
                return found[0], tuple(found[1:]), torch.ones(inp.shape[-1], dtype=inp.dtype)
            if not hasattr(prev_op, "weight"):
                raise speak.Refused(
                    f"autoawq stores scales of {before}, an activation, as a tensor that runtimes don't read; leave "
                    "engine out for quantmill's own"
                )
            if "gemma" in type(prev_op).__name__.lower():
                raise speak.Refused(
                    f"{before} multiplies by its weight and one more, whose folds aren't recorded; leave engine out "
                    "for quantmill's own"
                )
            answer = super()._search_best_scale(module, prev_op, layers, inp, **more)
            self.folds.add(before, prev_op, after, answer[2])
            return answer

        def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *more: Any) -> Any:
            # The library keeps the weights by moving the module's state to the CPU, and puts them back for each trial.
            # A module that is on the CPU would keep the first trial's scales for good: nothing is copied there.
            hook = module2inspect.register_state_dict_post_hook(_copied)
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *more)
            finally:
                hook.remove()

        def _search_best_clip(self, layer: Any, named_linears: dict[str, Any], input_feat: Any) -> Any:
            wanted = self._wanted(named_linears)
            whole = {name: linear for name, linear in wanted.items() if linear.out_features % OUTPUTS == 0}
            self.unsearched.update(names[id(wanted[name])] for name in set(wanted) - set(whole))
            return super()._search_best_clip(layer, whole, input_feat)

        def _apply_quant(self, module: Any, named_linears: dict[str, Any]) -> None:
            super()._apply_quant(module, self._wanted(named_linears))

        def _wanted(self, named_linears: dict[str, Any]) -> dict[str, Any]:
            return {name: linear for name, linear in named_linears.items() if names.get(id(linear)) in chosen}

    return Recorder


def _copied(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state.update({name: tensor.clone() for name, tensor in state.items()})


if __name__ == "__main__":
    speak.main(make)
