"""A stack of layers of the widths of Llama-3-8B, with random weights: seconds and memory of a pass and a verification.

Part of ``tests.bench.bench_gpu``. The weights are made on the card, nothing is downloaded. A pass over few layers and
one over more: their difference is what a layer takes, without what a pass takes once.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from pipeline.planning import sizing, sources
from pipeline.zoo.zoo import ModelEntry
from tests.bench import roofline
from tests.bench.bench_solver import processor
from tests.workers.jobs import LOOSE, ZOO, job
from workers.checkpoint.source import Source
from workers.formats.decoded import Decoded, open_decoded
from workers.model.upload import Upload
from workers.run import run_stage
from workers.spec.data import Calibration, Dataset
from workers.spec.job import Job, Stage
from workers.spec.workspace import artifact_folder
from workers.verify.integrity import Findings, compare

ONE = ("gptq-w4-g128",)
EIGHT = (*ONE, "awq-w4-g128", "fp8-dynamic", "fp8-block", "rtn-w4-g128", "nvfp4", "mxfp4", "w8a8-int8")
# Random weights say nothing of quality: gates are wide open.
ANY = LOOSE.model_copy(update={"kl_mean": 1e9, "kl_least": 0.0, "perplexity_ratio": 1e9, "top1_agreement": 0.0})
ALL_LAYERS = 32
HEADER = ("what", "seconds", "bound", "peak GB", "planned GB")


@dataclass(frozen=True)
class Row:
    """A row of the table: seconds and their bound by arithmetic, peak bytes of the card and those of the plan."""

    what: str
    seconds: float | None = None
    bound: float | None = None
    peak: float | None = None
    planned: float | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        seconds = [f"{value:.3g}" if value else "" for value in (self.seconds, self.bound)]
        return self.what, *seconds, *(f"{value / 1e9:.2f}" if value else "" for value in (self.peak, self.planned))


def shapes_of(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's weights: heads of 128, four to a key."""
    keys = 128 * max(1, hidden // 512)
    return {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip


def save_stack(folder: Path, layers: int, hidden: int, inner: int, device: torch.device) -> None:
    """A Llama of the zoo's vocabulary with ``layers`` layers of these widths, bfloat16."""
    small = ZOO / "models" / "llama-tiny"
    folder.mkdir(parents=True)
    for file in small.iterdir():
        if not file.name.endswith((".safetensors", ".index.json")):
            shutil.copy(file, folder)
    config = AutoConfig.from_pretrained(small)
    heads, key_heads = hidden // 128, max(1, hidden // 512)
    config.update({
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_heads, "head_dim": 128, "max_position_embeddings": 8192,
    })  # fmt: skip
    config.save_pretrained(folder)
    shapes = shapes_of(hidden, inner)
    torch.manual_seed(0)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        weight_OI: torch.Tensor = torch.randn(rows, columns, device=device) / columns**0.5
        return weight_OI.bfloat16().cpu()

    tensors = {
        f"model.layers.{layer}.{name}.weight": drawn(*shape)
        for layer in range(layers)
        for name, shape in shapes.items()
    }
    tensors |= {
        f"model.layers.{layer}.{name}.weight": torch.ones(hidden, dtype=torch.bfloat16)
        for layer in range(layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = drawn(config.vocab_size, hidden)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def job_of(folder: Path, place: Path, recipes: tuple[str, ...], samples: int, length: int) -> Job:
    """A job on the stack; the small zoo's texts repeated until they are long enough."""
    texts = "".join((ZOO / "text" / f"{name}.txt").read_text() for name in ("calibration", "heldout"))
    text = place / "text.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(texts * (1 + 8 * samples * length // len(texts)))
    of = job(folder, place, *recipes, thresholds=ANY)
    data = Dataset(path="text", data_files=(str(text),))
    calibration = Calibration(dataset=data, samples=samples, sequence_length=length)
    held_out = of.verification.model_copy(update={"tokens": 16 * length, "sequence_length": length})
    return of.model_copy(update={"calibration": calibration, "verification": held_out})


def rows(place: Path, given: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Rows of passes of one recipe and of eight, of each recipe's share, and of a verification."""
    few, many = given.layers
    for layers in (few, many):
        save_stack(place / f"stack-{layers}", layers, given.hidden, given.inner, device)
    for recipes in (ONE, EIGHT):
        taken: dict[int, float] = {}
        own: dict[int, dict[str, float]] = {}
        bound = bound_of_layer(given, recipes)
        for turn, layers in enumerate((few, few, many)):  # the first compiles kernels, and isn't counted
            workspace = place / f"work-{len(recipes)}-{turn}"
            of = job_of(place / f"stack-{layers}", workspace, recipes, given.samples, given.length)
            forget(device)
            with idle(device) as shares:
                result = run_stage(of, Stage.QUANTIZE)
            failed = [made.error for made in result.artifacts if made.error]
            assert not result.failure, result.failure
            assert not failed, failed
            taken[layers] = result.seconds
            own[layers] = {made.recipe: made.seconds for made in result.artifacts}
            said = f", the card idle {shares[0]:.0%} of the time" if shares else ""
            what = f"{len(recipes)} recipe(s), {layers} layer(s)" + ", kernels compiled" * (turn == 0) + said
            yield Row(what, result.seconds, layers * bound, result.memory.device, planned(of, Stage.QUANTIZE))
            if turn == 0:
                shutil.rmtree(workspace)
        each = (taken[many] - taken[few]) / (many - few)
        yield Row(f"{len(recipes)} recipe(s), a layer", each, bound)
        whole = taken[few] + each * (ALL_LAYERS - few)
        yield Row(f"{len(recipes)} recipe(s), {ALL_LAYERS} layers by these", whole, ALL_LAYERS * bound)
        if device.type == "cuda" and recipes == ONE:
            yield from uploaded(place / f"stack-{few}", device, each, 2 * given.hidden)
        for name in own[many]:
            yield Row(f"of {len(recipes)}: {name}, a layer", (own[many][name] - own[few][name]) / (many - few))
    forget(device)
    begun = time.perf_counter()
    verified = run_stage(of, Stage.VERIFY, ONE[0])
    assert verified.manifest is not None, verified.failure
    reasons = "; ".join(verified.manifest.verdict.reasons)
    yield Row(
        f"verification of {ONE[0]}, {many} layers, {16 * given.length} tokens {reasons}".strip(),
        time.perf_counter() - begun,
        peak=verified.memory.device,
        planned=planned(of, Stage.VERIFY),
    )
    for where in dict.fromkeys(("cpu", device.type)):
        yield Row(f"of which decoding {ONE[0]} and comparing it with its source, {where}", compared(of, where))


def forget(device: torch.device) -> None:
    """Let peaks of memory be those of what comes next: what was freed before isn't held any longer."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def bound_of_layer(given: argparse.Namespace, recipes: tuple[str, ...]) -> float:
    """Seconds of a layer's arithmetic: all tokens through it, X^T X of its four inputs, and the recipes' own."""
    hidden, inner = given.hidden, given.inner
    shapes, inputs = shapes_of(hidden, inner).values(), (hidden, hidden, hidden, inner)
    tokens = given.samples * given.length
    seconds = roofline.forward(shapes, tokens, given.length, hidden) + roofline.statistics(inputs, tokens)
    seconds += sum(roofline.recipe(name, shapes) for name in recipes)
    return seconds + sum(roofline.factorize(width) for width in inputs)


def planned(of: Job, stage: Stage) -> float:
    """Bytes of the card that a plan counts on for a stage of this job: of its neediest recipe."""
    folder = Path(of.model.folder or "")
    source = sources.resolve(ModelEntry(id=str(folder)), folder.parent)
    estimates = [sizing.estimate(source, order.recipe, of.calibration, of.verification) for order in of.orders]
    needs = [estimate.quantize if stage == Stage.QUANTIZE else estimate.verify for estimate in estimates]
    return max(need.device for need in needs)


@contextmanager
def idle(device: torch.device) -> Iterator[list[float]]:
    """The share of the context's time in which no kernel ran, as the driver tells it ten times a second."""
    shares: list[float] = []
    tool = shutil.which("nvidia-smi") if device.type == "cuda" else None
    if tool is None:
        yield shares
        return
    asked = [tool, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=100", "--id=0"]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as asking:
        try:
            yield shares
        finally:
            asking.terminate()
            busy = [int(line) for line in asking.communicate()[0].split() if line.isdigit()]
    if busy:
        shares.append(1 - sum(busy) / len(busy) / 100)


def uploaded(folder: Path, device: torch.device, layer_seconds: float, width: int) -> Iterator[Row]:
    """Seconds of bringing a layer to the card: alone, and how much longer 100 products of that width take beside it."""
    upload = Upload(device.type)
    with Source(folder) as source:
        layer = {key: source.read(key) for key in source.headers if key.startswith("model.layers.0.")}
    left = torch.randn(width, width, device=device, dtype=torch.bfloat16)

    def seconds(bring: bool, products: int) -> float:
        taken = []
        for _ in range(4):  # the first allocates pinned memory
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(products):
                torch.mm(left, left)
            tensors = upload(layer) if bring else None
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - begun)
            del tensors
        return min(taken[1:])

    alone, beside, products = seconds(True, 0), seconds(True, 100), seconds(False, 100)
    size = sum(tensor.nbytes for tensor in layer.values())
    yield Row(f"a layer to the card, {size / 1e6:.0f} MB, alone ({layer_seconds:.2f} s are computed)", alone)
    yield Row(f"the same beside products of {products:.3f} s, what it adds to them", max(0.0, beside - products))


def compared(of: Job, device: str) -> float:
    """Seconds of decoding all of the first artifact's weights and comparing them with their source's."""
    findings, folder = Findings(), artifact_folder(of.workspace, of.orders[0])
    begun = time.perf_counter()
    with Source(Path(of.model.folder or "")) as source, open_decoded(folder, device=device) as artifact:
        assert isinstance(artifact, Decoded)
        compare(source, artifact, artifact.quantized, findings)
    assert len(findings.sqnr) == len(artifact.quantized), findings.problems
    return time.perf_counter() - begun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The stack's widths, its two depths, and the tokens."""
    parser.add_argument("--layers", nargs=2, type=int, default=[1, 3])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)


def print_table(
    given: argparse.Namespace, header: Sequence[str], rows: Callable[[torch.device], Iterable[Sequence[str]]]
) -> None:
    """Print a Markdown table, row by row as they are measured, below the name of the card, or of the processor."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    print(f"{name}, torch {torch.__version__}; {given.samples} x {given.length} tokens, hidden {given.hidden}\n")
    for cells in chain((header, ("---",) * len(header)), rows(device)):
        print("| " + " | ".join(cells) + " |", flush=True)
