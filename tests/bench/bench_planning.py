"""Planning a zoo of 10,000 models x 10 recipes whose metadata is at hand: seconds and memory.

python -m tests.bench.bench_planning [--models N]

What the Hub would answer is there already: the models' configs and headers (of 40 sizes of llama, for most models of a
zoo are finetunes of few), and that nothing is published yet. All else is the real planning.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from unittest import mock

from pipeline.fleet.demand import demands
from pipeline.fleet.scheduler import Driver
from pipeline.planning import plan as planning
from pipeline.planning import sources
from pipeline.planning.sources import PinnedModel
from pipeline.zoo import shipped
from pipeline.zoo.zoo import ModelEntry, Zoo
from tests.bench import models
from tests.pipeline.simulated import SimulatedFleet, node
from workers.spec.job import ModelPin
from workers.spec.tensors import TensorHeader

RECIPES = (
    "awq-w4-g128", "bnb-fp4", "bnb-int8", "bnb-nf4", "fp8-dynamic", "fp8-static", "gptq-w4-g128", "gptq-w8-g128",
    "rtn-w4-g128", "w8a8-int8",
)  # fmt: skip
SIZES = 40


def source(index: int) -> PinnedModel:
    """A llama of one of the sizes."""
    layers, hidden = 16 + index % SIZES, 1024 + 256 * (index % SIZES)
    shapes = {"embed_tokens": (32000, hidden), "norm": (hidden,)}
    for layer in range(layers):
        prefix = f"layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj": (3 * hidden, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj"] = (hidden, 3 * hidden)
        shapes |= {f"{prefix}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    tensors = tuple(TensorHeader(f"model.{name}.weight", shape, "BF16") for name, shape in shapes.items())
    pin = ModelPin(id=f"org/model-{index}", revision=f"{index:040x}", endpoint="https://hub.invalid")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": 32000}
    return PinnedModel(pin, config, tensors, name="model")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=int, default=10_000)
    count = parser.parse_args().models
    assert set(RECIPES) <= set(shipped.recipe_names())
    text = {"path": "text", "data_files": [str(models.TEXT / "calibration.txt")]}
    zoo = Zoo.model_validate(
        {
            "name": "large",
            "models": [{"id": f"org/model-{index}"} for index in range(count)],
            "recipes": RECIPES,
            "calibration": {"dataset": text},
            "verify": {"dataset": {**text, "data_files": [str(models.TEXT / "heldout.txt")]}},
            "publish": {"endpoint": "https://hub.invalid", "namespace": "acme"},
        }
    )
    sizes = [source(index) for index in range(min(SIZES, count))]

    def at_hand(entry: ModelEntry, folder: Path) -> PinnedModel:
        index = int(entry.id.rpartition("-")[2])
        pin = ModelPin(id=entry.id, revision=f"{index:040x}", endpoint="https://hub.invalid")
        like = sizes[index % SIZES]
        return PinnedModel(pin, dict(like.config), tuple(like.tensors), name="model")

    print(models.machine())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(sources, "resolve", at_hand),
        mock.patch.object(planning.destinations, "standing", return_value=None),
        mock.patch.object(planning.destinations, "check", return_value=None),
    ):
        begun = time.perf_counter()
        plan = planning.make_plan(zoo, Path(folder), Path(folder), "https://hub.invalid")
        seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"  {len(plan.artifacts)} artifacts in {len(plan.jobs)} jobs: {seconds:.1f} s")
    print(f"  {peak / 1e6:.2f} GB at the peak, {before / 1e6:.2f} GB of it before")
    begun = time.perf_counter()
    demands(plan)
    fleet = SimulatedFleet([node(f"n{index}", 16, gpus=8, gib=10_000) for index in range(125)], card_gib=1000)
    driver = Driver(fleet, plan, [], clock=lambda: fleet.now, sleep=fleet.sleep)
    driver.run()
    seconds = time.perf_counter() - begun
    stages = sum(event == "started" for _, event, _, _ in fleet.log)
    print(
        f"  decisions for {stages} stages on 1,000 GPUs: {seconds:.1f} s, {1000 * seconds / count:.2f} ms for each job"
    )


if __name__ == "__main__":
    main()
