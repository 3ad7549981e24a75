"""What tests run in a process that has a card: each command prints one JSON text of facts."""

from __future__ import annotations

import builtins
import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.zoo import shipped
from tests.device.card import Card
from tests.workers.jobs import ZOO, job, quick, recipe
from workers.machine.card_share import SHARE
from workers.machine.failures import classify
from workers.run import run_stage
from workers.spec.job import Job, Stage, StageResult


def card() -> Card:
    """This process's cards, installed at its start."""
    found: Card | None = builtins.TEST_CARD  # type: ignore[attr-defined]
    assert found is not None
    return found


def _stage(of: Job, stage: Stage, recipe: str | None = None) -> tuple[StageResult, dict[str, Any]]:
    """A stage's result, and its facts."""
    with card().counted() as counted:
        result = run_stage(of, stage, recipe)
    failure = result.failure and {"kind": result.failure.kind, "message": result.failure.message}
    if result.failure:
        print(result.failure.traceback, file=sys.stderr)
    return result, {**asdict(counted), "failure": failure, "device": result.memory.device, "seconds": result.seconds}


def whole_pass(workspace: str, model: str, *recipes: str) -> dict[str, Any]:
    """Quantize and verify a small model under recipes, in one pass."""
    of = job(ZOO / "models" / model, Path(workspace), *(quick(shipped.recipe(name)) for name in recipes))
    result, quantized = _stage(of, Stage.QUANTIZE)
    verified = {}
    for name in recipes if result.failure is None else ():
        found, facts = _stage(of, Stage.VERIFY, name)
        manifest = found.manifest.model_dump(mode="json") if found.manifest else {}
        verified[name] = {**facts, "verdict": manifest.get("verdict"), "environment": manifest.get("environment")}
    return {"quantize": quantized, "verify": verified}


def one_pass(workspace: str, model: str, *recipes: str) -> dict[str, Any]:
    """Quantize a small model under recipes, in one pass; ``made`` is the number of artifacts."""
    of = job(ZOO / "models" / model, Path(workspace), *(quick(shipped.recipe(name)) for name in recipes))
    result, facts = _stage(of, Stage.QUANTIZE)
    return {**facts, "made": sum(made.error is None for made in result.artifacts)}


def card_pass(workspace: str, model: str, *recipes: str) -> dict[str, Any]:
    """Quantize a small model under recipes, in several micro-batches; ``digests`` are those of the weights.

    ``own`` is GPTQ on its own quantized activations.
    """
    return _made(_several_batches(workspace, model, *recipes))


def _several_batches(workspace: str, model: str, *recipes: str) -> Job:
    own = recipe(
        name="own", method="gptq", scheme={"bits": 4, "group_size": 64}, options={"propagate": "quantized", "refine": 0}
    )
    chosen = [own if name == "own" else shipped.recipe(name) for name in recipes]
    # AWQ keeps its search, without which it needs no calibration.
    chosen = [each if each.method == "awq" else quick(each) for each in chosen]
    return job(ZOO / "models" / model, Path(workspace), *chosen, samples=40)


def _made(of: Job) -> dict[str, Any]:
    """Facts of a pass; the errors, folders and digests of its artifacts."""
    result, facts = _stage(of, Stage.QUANTIZE)
    errors = {made.recipe: made.error.message for made in result.artifacts if made.error is not None}
    folders = {made.recipe: made.path for made in result.artifacts if made.error is None}
    digests = {name: hashlib.sha256(_weights(folder)).hexdigest() for name, folder in folders.items()}
    made_with = [made.made_with for made in result.artifacts]
    return {**facts, "errors": errors, "folders": folders, "digests": digests, "made_with": made_with}


def failing_recipe(workspace: str, model: str, method: str, *recipes: str) -> dict[str, Any]:
    """A pass in which one method fails at its seventh stack of weights."""
    from workers.errors import NumericalError
    from workers.methods.table import METHODS

    solve, calls = METHODS[method].solve, itertools.count(1)

    def failing(recipe: Any, stack: Any) -> Any:
        if next(calls) == 7:
            raise NumericalError("planted")
        return solve(recipe, stack)

    METHODS[method] = replace(METHODS[method], solve=failing)
    return card_pass(workspace, model, *recipes)


def resumed_pass(workspace: str, model: str, *recipes: str) -> dict[str, Any]:
    """A pass that ends right after its second checkpoint, and the same again; ``layers`` are those that it began at."""
    from workers.model.cards import CardStreaming
    from workers.quantize import attempts
    from workers.quantize.resume import PassFolder

    attempts.KEEPING_SECONDS, attempts.KEEPING_SHARE = 0.0, 1e9
    save, layers_from = PassFolder.save, CardStreaming.layers
    saves, begun = itertools.count(1), list[int]()

    def save_and_stop(self: PassFolder, *of: Any) -> None:
        save(self, *of)
        if next(saves) == 2:
            raise OSError("planted")

    def layers(self: CardStreaming, start: int = 0) -> Any:
        begun.append(start)
        return layers_from(self, start)

    PassFolder.save, CardStreaming.layers = save_and_stop, layers  # type: ignore[method-assign]
    of = _several_batches(workspace, model, *recipes)
    first, again = _made(of), _made(of)
    return {"first": first, "again": again, "layers": begun}


def large_verify(workspace: str, *recipes: str) -> dict[str, Any]:
    """Verify artifacts of a small model as if each had half as many bytes again as a card has."""
    import torch

    from workers.verify.comparison import Comparison

    bytes_ = int(1.5 * torch.cuda.get_device_properties(0).total_memory)
    Comparison._on_a_card = lambda *_: bytes_  # type: ignore[method-assign]
    return whole_pass(workspace, "llama-tiny", *recipes)


def _weights(folder: str) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors")))


def faulty_pass(workspace: str, launches: str, words: str) -> dict[str, Any]:
    """A pass of two recipes in which the card fails with these words after so many launches."""
    of = job(ZOO / "models" / "llama-tiny", Path(workspace), "fp8-dynamic", "rtn-w4-g128")
    card().fail_after(int(launches), words)
    return _stage(of, Stage.QUANTIZE)[1]


def tight_pass(workspace: str) -> dict[str, Any]:
    """A pass on a card with far too little memory, and the same again with enough."""
    of = job(ZOO / "models" / "llama-tiny", Path(workspace), "fp8-dynamic")
    limit = 3_000_000
    card().limit(limit)
    tight = _stage(of, Stage.QUANTIZE)[1]
    card().limit(0)
    return {"limit": limit, "tight": tight, "again": _stage(of, Stage.QUANTIZE)[1]}


def _refused(what: Callable[[], Any]) -> dict[str, str]:
    """The class of an error, ours for it, and its message."""
    try:
        what()
    except Exception as error:
        return {"class": type(error).__name__, "kind": type(classify(error)).__name__, "message": str(error)}
    return {"class": "", "kind": "", "message": ""}


def tensors() -> dict[str, Any]:
    """What becomes of small tensors on two cards of 1 MiB each."""
    import torch

    one = torch.ones(4, 4)
    with card().counted() as counted:
        there = one.to("cuda")
        product = there @ there
        assert product[1:].sum().item() == 48
        product.cpu()
    shared = torch.ones(2, 2, device="cuda")
    shared[:1].zero_()
    found: dict[str, Any] = {
        "counted": asdict(counted),
        "shared": shared.tolist(),
        "mixed": _refused(lambda: there @ one),
        "two cards": _refused(lambda: there @ one.to("cuda:1")),
        "third card": _refused(lambda: one.to("cuda:2")),
        "too large": _refused(lambda: torch.empty(1 << 20, device="cuda")),
    }
    card().fail_after(1, "CUDA error: an illegal memory access was encountered")
    there.add(there)
    return found | {name: _refused(lambda: there.add(there)) for name in ("poisoned", "still poisoned")}


def uploads() -> dict[str, Any]:
    """A layer brought to a card of 1 MiB, used before and after it has arrived, and one that is too large for it."""
    import torch

    from workers.model.upload import Upload

    upload = Upload("cuda")
    layer = {"weight": torch.randn(100, 100, dtype=torch.bfloat16), "empty": torch.empty(0)}
    with card().counted() as counted:
        tensors = upload(layer)
        early = _refused(tensors.placed["weight"].sum)
        tensors.wait()
        same = all(torch.equal(tensors.placed[key].cpu(), layer[key]) for key in layer)
        loaded = tensors.loaded["weight"] is tensors.placed["weight"]
        del tensors
    large = {"weight": torch.randn(500, 200)}
    with card().counted() as on_demand:
        tensors = upload(large)
        tensors.wait()
        before = on_demand.to, card().held
        alike = torch.equal(tensors.placed["weight"].cpu(), large["weight"])
        for_model = tensors.loaded["weight"] is large["weight"]
    return {
        "early": early, "same": same and loaded, "whole": asdict(counted),
        "before": before, "alike": alike and for_model, "on demand": asdict(on_demand),
    }  # fmt: skip


class Launched:
    """Stands for a Triton kernel where there is no Triton: its launches are counted, and all codes become zero."""

    count = 0

    def __getitem__(self, programs: Any) -> Callable[..., None]:
        return self.launch

    def launch(
        self, sums: Any, weight: Any, mixed: Any, error: Any, change: Any, code: Any, *_: Any, **__: Any
    ) -> None:
        self.count += 1
        code.zero_()
        error.copy_(weight)


def with_kernels() -> Launched:
    """Have ``numerics.kernels`` launch a kernel that is only counted."""
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    kernel = Launched()
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    triton.__spec__ = ModuleSpec("triton", None)
    told = {"jit": lambda function: kernel, "cdiv": lambda a, b: -(-a // b), "language": language}
    vars(triton).update(told)
    vars(language).update({"constexpr": lambda value: value})
    sys.modules.update({"triton": triton, "triton.language": language})
    return kernel


def columns() -> dict[str, Any]:
    """Launches of GPTQ with three rounds of refinement, by the number of inputs, the kernel's among them."""
    import torch

    kernel = with_kernels()
    from workers.numerics import gptq, refine, rounding

    found = {}
    for width in (1024, 2048, 3072):
        weight = torch.randn(64, width, generator=torch.Generator().manual_seed(1))[None].to("cuda")
        inputs = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(2)).to("cuda")
        hessian, before = (inputs.T @ inputs)[None], kernel.count
        params = rounding.mse_params(weight, 4, 128, symmetric=True, scale_dtype=torch.float16)
        refine.MANY_ELEMENTS = 4 * weight.numel()  # four groups at a time, as of 4096 x 14336
        with card().counted() as counted:
            factor = gptq.factorize(hessian, activation_order=True, damping=0.01)
            codes = gptq.solve(weight, factor, *params, bits=4)
            refine.refine(weight, hessian, codes, *params, bits=4, rounds=3, damping=0.01)
        kernels = kernel.count - before
        # What stands for the kernel takes two launches itself.
        found[str(width)] = {"launches": counted.launches - kernels, "kernels": kernels, "waits": counted.waits}
    return found


def layer(hidden: str, samples: str = "2") -> dict[str, Any]:
    """Launches, waits and operations of products of one layer, ``hidden`` wide, of an 8B's shape: by recipe of eight,
    and beside them. 32 samples are a micro-batch.

    Pieces are as many as of a layer 4096 wide. One layer is what a pass over two takes more than one over one.
    """
    import torch
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM is not None  # it is imported before there seems to be a Triton
    kernel = with_kernels()
    from torch.utils.flop_counter import FlopCounterMode

    from tests.bench import gpu_stack
    from workers.engines.maker import Maker
    from workers.numerics import pieces, refine
    from workers.quantize import attempts

    def product(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
        operations: int = 2 * torch.Size(left).numel() * right[-1]
        return operations

    aten = torch.ops.aten
    in_place = {aten.addmm_: product, aten.baddbmm_: product, aten.addmm: product}
    flops = FlopCounterMode(display=False, custom_mapping=in_place)

    width, times = int(hidden), 4096 // int(hidden)
    pieces.ON_A_CARD //= times**2
    refine.ON_A_CARD, refine.MANY_ELEMENTS = refine.ON_A_CARD // times**2, refine.MANY_ELEMENTS // times**2
    attempts.KEEPING_SECONDS = float("inf")  # a checkpoint waits for what it saves
    names = ("launches", "waits", "kernels", "operations")
    taken: dict[str, dict[str, int]] = {}

    def now() -> dict[str, int]:
        return dict(zip(names, (*card().so_far(), kernel.count, flops.get_total_flops()), strict=True))

    @contextmanager
    def counted(maker: Maker) -> Iterator[None]:
        before = now()
        yield
        of = taken.setdefault(maker.order.recipe.name, dict.fromkeys(names, 0))
        of.update({name: of[name] + count - before[name] for name, count in now().items()})

    Maker.timed = counted  # type: ignore[method-assign]
    found: list[dict[str, dict[str, int]]] = []
    with tempfile.TemporaryDirectory() as place:
        for layers in (1, 2):
            taken.clear()
            stack = Path(place) / f"stack-{layers}"
            gpu_stack.save_stack(stack, layers, width, width * 7 // 2, torch.device("cpu"))
            before = now()
            of = gpu_stack.job_of(stack, Path(place) / f"work-{layers}", gpu_stack.EIGHT, int(samples), 128)
            with flops:
                result, facts = _stage(of, Stage.QUANTIZE)
            assert facts["failure"] is None, facts
            assert not [made.error for made in result.artifacts if made.error]
            whole = {
                "launches": facts["launches"],
                "waits": facts["waits"],
                "kernels": kernel.count - before["kernels"],
                "operations": flops.get_total_flops(),  # of this pass: it began at none
            }
            beside = {name: whole[name] - sum(counts[name] for counts in taken.values()) for name in names}
            found.append({name: dict(counts) for name, counts in taken.items()} | {"beside": beside})
    first, second = found
    each = {name: {what: of[what] - first[name][what] for what in names} for name, of in second.items()}
    for of in each.values():
        of["launches"] -= of["kernels"]  # what stands for the kernel takes two launches itself
    return each


def peaks(hidden: str, *recipes: str) -> dict[str, list[float]]:
    """Peak bytes of a pass over a layer of an 8B's shape, ``hidden`` wide, and those that the plan counts on, without
    the context of a card, for each recipe alone."""
    import torch
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM is not None  # it is imported before there seems to be a Triton
    with_kernels()
    from pipeline.planning.sizing import DEVICE_BYTES
    from tests.bench import gpu_stack

    found = {}
    with tempfile.TemporaryDirectory() as place:
        stack = Path(place) / "stack"
        gpu_stack.save_stack(stack, 1, int(hidden), int(hidden) * 7 // 2, torch.device("cpu"))
        for name in recipes:
            of = gpu_stack.job_of(stack, Path(place) / name, (name,), 16, 128)
            result, facts = _stage(of, Stage.QUANTIZE)
            assert facts["failure"] is None, facts
            assert not [made.error for made in result.artifacts if made.error]
            found[name] = [facts["peak"], gpu_stack.planned(of, Stage.QUANTIZE) - DEVICE_BYTES]
    return found


def products() -> dict[str, Any]:
    """Statistics of inputs in half precision on a card, against those of the same inputs in float32 on the CPU."""
    import torch

    from workers.model.statistics import InputStatistics

    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x_NI = torch.randn(300, 1100, generator=torch.Generator().manual_seed(1)).to(dtype)
        there, here = (InputStatistics.empty(1100, device) for device in ("cuda", "cpu"))
        on_card = x_NI.to("cuda")
        with card().counted() as counted:
            there.add(on_card[:200])
            there.add(on_card[200:])
        there.complete()
        here.add(x_NI.float())
        here.complete()
        pairs = [(there.gram_II, here.gram_II), (there.abs_sum_I, here.abs_sum_I), (there.abs_max_I, here.abs_max_I)]
        found[str(dtype)] = {
            "error": max(float((one.cpu() - other).abs().max() / other.abs().max()) for one, other in pairs),
            "count": there.count, "peak": counted.peak, "dtypes": sorted({str(one.dtype) for one, _ in pairs}),
        }  # fmt: skip
    return found


def shared() -> dict[str, Any]:
    """What a process has of a card of 1 MiB that it shares, and its child while it takes some."""
    import torch

    from workers.machine import child
    from workers.model.card_room import environment_of_child
    from workers.model.device import compute_device

    device, _ = compute_device()
    taken = torch.empty(100 << 10, dtype=torch.uint8, device=device)
    given = environment_of_child()
    children = {"here": room("")}
    for name, environment in (("beside", given), ("without a share left", {**(given or {}), SHARE: "0.000000"})):
        children[name] = child.run("tests.device.work:room", "", environment=environment).answer or ""
    too_much = _refused(lambda: torch.empty(200 << 10, dtype=torch.uint8, device=device))
    return {"device": device, "taken": taken.numel(), "too much": too_much, "room": children}


def room(_: str) -> str:
    """The bytes of the card that this process may still have."""
    from workers.model.card_room import room_on_card

    return str(room_on_card())


def searches() -> dict[str, Any]:
    """Launches of each search for a weight of 1024 x 1024, and whether it finds what it finds on the CPU."""
    import torch

    from workers.numerics import hqq, microscaling, rounding

    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    half = torch.float16
    of: dict[str, Callable[[Any], Any]] = {
        "hqq": lambda w: hqq.params(w, 4, 64, scale_dtype=half, iterations=20, norm=0.7),
        "mxfp4": microscaling.mxfp4,
        "nvfp4": microscaling.nvfp4,
        "mse": lambda w: rounding.mse_params(w, 4, 128, symmetric=False, scale_dtype=half),
    }
    found = {}
    for name, search in of.items():
        on_card = weight.to("cuda")
        with card().counted() as counted:
            there = search(on_card)
        same = all(
            torch.equal(one.cpu(), other) for one, other in zip(there, search(weight), strict=True) if other is not None
        )
        found[name] = {"launches": counted.launches, "waits": counted.waits, "same": same}
    return found


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
