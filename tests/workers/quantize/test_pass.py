"""One pass, many recipes: taken up after a kill, smaller when memory runs out, own streams, experts' tokens."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.workers.jobs import ZOO, job, recipe
from workers.checkpoint import shards
from workers.formats.decoded import open_decoded
from workers.machine.files import file_sha256
from workers.model.forward import Lanes
from workers.quantize import attempts, inputs
from workers.quantize.one_pass import quantize
from workers.quantize.resume import PassFolder
from workers.run import run_stage
from workers.spec.job import ArtifactMade, Job, Stage
from workers.spec.recipes import Recipe
from workers.spec.workspace import artifact_folder

LLAMA = ZOO / "models" / "llama-tiny"
MOE = ZOO / "models" / "qwen3-moe-tiny"


def small(model: Path, folder: Path, layers: int = 3) -> Path:
    """A model of the zoo with its first layers only: the tests run the engine, not the model."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = layers
    for key in ("layer_types", "mlp_only_layers"):
        if config.get(key):
            config[key] = config[key][:layers]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not _beyond(name, layers)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _beyond(name: str, layers: int) -> bool:
    parts = name.split(".")
    return "layers" in parts and int(parts[parts.index("layers") + 1]) >= layers


def own_stream(name: str = "own") -> Recipe:
    return recipe(
        name=name, method="gptq", scheme={"bits": 4, "group_size": 64}, options={"propagate": "quantized", "refine": 0}
    )


def made_of(of: Job) -> dict[str, ArtifactMade]:
    made, _ = quantize(of, Path(of.model.folder or ""))
    assert [artifact.error for artifact in made] == [None] * len(made)
    return {artifact.recipe: artifact for artifact in made}


def digests(of: Job) -> dict[str, str]:
    """sha256 of the weights of a job's artifacts, by recipe."""
    places = {order.recipe.name: artifact_folder(of.workspace, order) for order in of.orders}
    return {name: file_sha256(place / "model.safetensors") for name, place in places.items()}


def quantize_and_die(of: Job, saves: int) -> None:
    """Run the stage, and be killed right after the state was saved for the n-th time."""
    plain, count = PassFolder.save, 0

    def save(self: PassFolder, *args: Any) -> None:
        nonlocal count
        plain(self, *args)
        count += 1
        if count == saves:
            os.kill(os.getpid(), signal.SIGKILL)

    PassFolder.save = save  # type: ignore[method-assign]
    attempts.KEEPING_SECONDS = 0.0
    quantize(of, Path(of.model.folder or ""))


@pytest.mark.slow
def test_a_killed_pass_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(MOE, tmp_path / "model", 3)
    recipes = ["gptq-w4-g128", "bnb-nf4", "awq-w4-g128", "fp8-dynamic", own_stream()]
    quiet = job(model, tmp_path / "quiet", *recipes)
    torn = job(model, tmp_path / "torn", *recipes)
    made_of(quiet)
    killed = multiprocessing.get_context("spawn").Process(target=quantize_and_die, args=(torn, 1))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not list((tmp_path / "torn" / "artifacts").glob("*"))
    begun: list[int] = []
    plain = Lanes.advance
    monkeypatch.setattr(Lanes, "advance", lambda lanes: (begun.append(lanes._at), plain(lanes))[1])
    made_of(torn)
    assert set(begun) == {1, 2}, "layers that were finished are computed again"
    assert digests(torn) == digests(quiet)
    # What stays is the artifacts and the lock: no state, nothing half-written.
    assert [path for path in (tmp_path / "torn" / "passes").rglob("*") if path.is_file() and path.name != ".lock"] == []


@pytest.mark.parametrize("saves", [False, True])
def test_a_full_disk_ends_a_pass_that_then_makes_the_same_bytes(
    saves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are written in a thread: its error ends the stage, as the disk's."""
    model = small(LLAMA, tmp_path / "model", 3)
    quiet, torn = (job(model, tmp_path / name, "rtn-w4-g128", "fp8-dynamic") for name in ("quiet", "torn"))
    made_of(quiet)
    plain, count = shards.append, 0

    def append(*given: Any) -> shards.Spooled:
        nonlocal count
        count += 1
        if count > 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*given)

    if saves:
        monkeypatch.setattr(attempts, "KEEPING_SECONDS", 0.0)
    with monkeypatch.context() as full:
        full.setattr(shards, "append", append)
        result = run_stage(torn, Stage.QUANTIZE)
    assert result.failure is not None
    assert result.failure.kind == "DiskFull"
    assert not list((tmp_path / "torn" / "artifacts").glob("*")), "nothing half-written"
    made_of(torn)
    assert digests(torn) == digests(quiet)


def test_a_pass_without_memory_goes_on_with_smaller_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(LLAMA, tmp_path / "model", 2)
    plain, tried = Lanes.advance, set[int]()

    def advance(self: Lanes) -> None:
        largest = max(lane._batch["input_ids"].numel() for lane in self._lanes)
        tried.add(largest)
        if largest > 512 and self._at == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        plain(self)

    monkeypatch.setattr(Lanes, "advance", advance)
    made = made_of(job(model, tmp_path, "gptq-w4-g128", "bnb-nf4", samples=64))
    assert max(tried) == 4096
    assert {256, 512} & tried
    assert "micro-batches of 512 tokens, for there was no memory for 4096" in " ".join(made["gptq-w4-g128"].fallbacks)
    assert made["bnb-nf4"].fallbacks == ()


def test_a_lean_pass_takes_the_smallest_batches_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(LLAMA, tmp_path / "model", 1)
    plain, seen = Lanes.advance, set[int]()

    def advance(self: Lanes) -> None:
        seen.update(lane._batch["input_ids"].numel() for lane in self._lanes)
        plain(self)

    monkeypatch.setattr(Lanes, "advance", advance)
    made = made_of(job(model, tmp_path, "fp8-static").model_copy(update={"lean": True}))
    assert seen == {128}
    assert "micro-batches of 128 tokens, for there was no memory for 4096" in " ".join(made["fp8-static"].fallbacks)


def test_memory_that_is_never_enough_is_an_error_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(LLAMA, tmp_path / "model", 1)

    def advance(self: Lanes) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Lanes, "advance", advance)
    with pytest.raises(RuntimeError, match="allocate memory"):
        quantize(job(model, tmp_path, "gptq-w4-g128"), model)


def test_an_own_stream_calibrates_on_what_the_quantized_layers_give(tmp_path: Path) -> None:
    model = small(LLAMA, tmp_path / "model", 2)
    own = job(model, tmp_path / "own", own_stream())
    made_of(own)
    place = artifact_folder(own.workspace, own.orders[0])
    # The oracle: a source whose first layer is the quantized one already, calibrated plainly.
    oracle = tmp_path / "oracle"
    shutil.copytree(model, oracle)
    with open_decoded(place) as artifact:
        tensors = {name: artifact.read(name) for name in artifact.headers if ".layers.0." in name}
    before = load_file(model / "model.safetensors")
    decoded = {name: tensors[name].to(t.dtype) if name in tensors else t for name, t in before.items()}
    save_file(decoded, oracle / "model.safetensors", metadata={"format": "pt"})
    plain = recipe(
        name="plain",
        method="gptq",
        scheme={"bits": 4, "group_size": 64},
        options={"refine": 0},
        ignore=["lm_head", "*.layers.0.*"],
    )
    expected = job(oracle, tmp_path / "expected", plain)
    made_of(expected)
    stored = load_file(place / "model.safetensors")
    wanted = load_file(artifact_folder(expected.workspace, expected.orders[0]) / "model.safetensors")
    codes = [name for name in wanted if name.endswith("weight_packed")]
    assert codes
    assert all(torch.equal(stored[name], wanted[name]) for name in codes)
    original = job(model, tmp_path / "original", plain)
    made_of(original)
    others = load_file(artifact_folder(original.workspace, original.orders[0]) / "model.safetensors")
    assert not all(torch.equal(stored[name], others[name]) for name in codes)


def test_experts_with_few_tokens_are_named(tmp_path: Path) -> None:
    model = small(MOE, tmp_path / "model", 2)
    of = job(model, tmp_path, "gptq-w4-g128", samples=1)
    assert of.calibration is not None
    demanding = of.model_copy(update={"calibration": of.calibration.model_copy(update={"minimum_expert_tokens": 100})})
    said = [line for line in made_of(demanding)["gptq-w4-g128"].fallbacks if "tokens of all experts" in line]
    assert len(said) == 2, "one line for each layer"
    assert "mlp.experts." in said[0]


def test_a_tiny_probe_is_not_needed_by_recipes_that_fold_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("probed")

    monkeypatch.setattr(inputs, "find_folds", refuse)
    made_of(job(small(LLAMA, tmp_path / "model", 1), tmp_path, "gptq-w4-g128"))
