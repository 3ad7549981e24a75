"""One model over several workers: the same artifacts as one pass makes, whoever dies on the way."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.zoo import shipped
from tests.workers.jobs import ZOO, job, recipe
from tests.workers.quantize.test_pass import own_stream, small
from workers.checkpoint.source import Source
from workers.engines.maker import Maker
from workers.errors import TransientError, UnsupportedRecipe
from workers.model import batching
from workers.model.forward import Lanes, Streaming
from workers.model.loading import StreamedModel
from workers.model.reference import micro_batches
from workers.model.statistics import InputWatcher, Observer, inputs_of
from workers.quantize import attempts, spread
from workers.quantize.gathered import Log, Recorder, replay
from workers.quantize.one_pass import quantize
from workers.quantize.solved import LayerWriter, SolvedFolder
from workers.run import run_stage
from workers.spec.data import Dataset
from workers.spec.job import ArtifactMade, Job, Part, Stage
from workers.spec.split import gathered_bytes, layers_of, slice_of, spreadable
from workers.spec.workspace import artifact_folder, folds_folder

PARTS = 3
RECIPES = {
    "llama-tiny": ["gptq-w4-g128", "awq-w4-g128", "fp8-static", "nvfp4-w4a4", "bnb-nf4", "rtn-w4-g128"],
    "qwen3-moe-tiny": ["gptq-w4-g128", "awq-w4-g128", "bnb-nf4", "rtn-w4-g128", "mlx-w4-g64"],
}


class Killed(BaseException):
    """What a process dies of, as far as anybody can tell."""


@pytest.fixture(autouse=True)
def _micro_batches_of_two_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MICRO_BATCH_TOKENS", 256)


def source_of(of: Job) -> Path:
    return Path(of.model.folder or "")


def spread_over(of: Job, parts: int) -> dict[str, ArtifactMade]:
    """All three steps, one part after the other."""
    for part in range(parts):
        spread.gather(of, source_of(of), part, parts)
    for part in range(parts):
        spread.solve(of, source_of(of), part, parts)
    return joined(of, parts)


def texts(of: Job) -> Job:
    """The job with held-out text for more micro-batches than there are parts."""
    return of.model_copy(update={"verification": of.verification.model_copy(update={"tokens": 1024})})


def said_of(made: dict[str, ArtifactMade]) -> dict[str, Any]:
    return {name: (artifact.fallbacks, artifact.bytes, artifact.error) for name, artifact in made.items()}


def joined(of: Job, parts: int) -> dict[str, ArtifactMade]:
    made, size = spread.join(of, source_of(of), parts)
    if not of.model.dequantize:  # whose size is that of what it decodes to
        assert size == sum(path.stat().st_size for path in source_of(of).glob("*.safetensors"))
    return {artifact.recipe: artifact for artifact in made}


def at_once(of: Job) -> dict[str, ArtifactMade]:
    made, _ = quantize(of, source_of(of))
    return {artifact.recipe: artifact for artifact in made}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def left_over(of: Job) -> list[Path]:
    """What lies in the passes' folder, but for locks."""
    return [path for path in (Path(of.workspace) / "passes").rglob("*") if path.is_file() and path.name != ".lock"]


def assert_same_artifact(one: Job, other: Job, name: str) -> None:
    places = [artifact_folder(of.workspace, of.order(name)) for of in (one, other)]
    assert files(places[0])
    assert files(places[0]) == files(places[1])
    assert files(folds_folder(places[0])) == files(folds_folder(places[1]))


@pytest.mark.parametrize("name", list(RECIPES))
def test_parts_make_what_one_pass_makes(name: str, tmp_path: Path) -> None:
    model = small(ZOO / "models" / name, tmp_path / "model", 1)
    cached = shipped.recipe("rtn-w4-g128").model_copy(update={"name": "cached", "kv_cache": "fp8"})
    recipes = [*RECIPES[name], cached]
    plain, parted = (texts(job(model, tmp_path / place, *recipes, samples=12)) for place in ("plain", "parted"))
    expected, made = at_once(plain), spread_over(parted, PARTS)
    assert [artifact.error for artifact in expected.values()] == [None] * len(expected)
    assert said_of(made) == said_of(expected)
    assert files(tmp_path / "parted" / "references") == files(tmp_path / "plain" / "references")
    assert left_over(parted) == []
    for chosen in (*RECIPES[name], "cached"):
        assert_same_artifact(plain, parted, chosen)


def test_one_part_alone_makes_the_same_bytes(tmp_path: Path) -> None:
    recipes = ["gptq-w4-g128", "w8a8-int8", "bnb-nf4"]
    model = small(ZOO / "models" / "llama-tiny", tmp_path / "model", 2)
    plain, alone = (texts(job(model, tmp_path / place, *recipes)) for place in ("plain", "alone"))
    assert said_of(at_once(plain)) == said_of(spread_over(alone, 1))
    assert files(tmp_path / "alone" / "references") == files(tmp_path / "plain" / "references")
    for chosen in recipes:
        assert_same_artifact(plain, alone, chosen)


def test_sequences_of_several_lengths(tmp_path: Path) -> None:
    rows = (ZOO / "text" / "calibration.txt").read_text().split("\n\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows[:80]))
    model = small(ZOO / "models" / "llama-tiny", tmp_path / "model", 2)
    dataset = Dataset(path="json", data_files=(str(tmp_path / "rows.jsonl"),))
    changed = {"dataset": dataset, "sequences": "single", "samples": 16}
    of = job(model, tmp_path / "plain", "gptq-w4-g128", "awq-w4-g128", own_stream())
    of = of.model_copy(update={"calibration": of.calibration and of.calibration.model_copy(update=changed)})
    # A recipe that calibrates on its own quantized layers runs in one pass alone.
    assert [made.error for made in at_once(of).values()] == [None] * 3
    parted = of.model_copy(update={"orders": of.orders[:2], "workspace": str(tmp_path / "parted")})
    assert [made.error for made in spread_over(texts(parted), PARTS).values()] == [None] * 2
    for name in ("gptq-w4-g128", "awq-w4-g128"):
        assert_same_artifact(of, parted, name)


# ------------------------------------------------------------------------------------------- deaths


def dies(monkeypatch: pytest.MonkeyPatch, where: type, name: str, call: int) -> None:
    """The process dies as a method is called for the n-th time."""
    plain: Callable[..., Any] = getattr(where, name)
    count = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise Killed
        return plain(*args, **kwargs)

    monkeypatch.setattr(where, name, deadly)


@pytest.mark.slow
def test_steps_that_died_go_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(ZOO / "models" / "llama-tiny", tmp_path / "model", 3)
    recipes = ["awq-w4-g128", "rtn-w4-g128", "bnb-nf4"]
    quiet, torn = (job(model, tmp_path / place, *recipes) for place in ("quiet", "torn"))
    spread_over(quiet, 2)
    source = source_of(torn)
    monkeypatch.setattr(attempts, "KEEPING_SECONDS", 0.0)
    monkeypatch.setattr(attempts, "KEEPING_SHARE", 1e9)
    with monkeypatch.context() as death:
        dies(death, Recorder, "log", 3)  # the last layer is seen, and not yet kept
        with pytest.raises(Killed):
            spread.gather(torn, source, 0, 2)
    passed: list[int] = []
    with monkeypatch.context() as watched:
        plain = Lanes.advance
        watched.setattr(Lanes, "advance", lambda lanes: (passed.append(lanes._at), plain(lanes))[1])
        spread.gather(torn, source, 0, 2)
    assert set(passed) == {2}, "layers that were finished are computed again"
    spread.gather(torn, source, 1, 2)
    for method in ("note", "writer"):  # within a layer: beyond its tensors, and before them
        with monkeypatch.context() as death:
            dies(death, SolvedFolder, method, 2)
            with pytest.raises(Killed):
                spread.solve(torn, source, 0, 2)
    spread.solve(torn, source, 0, 2)
    with pytest.raises(TransientError, match=r"no part has made layers \[1\]"):
        joined(torn, 2)
    spread.solve(torn, source, 1, 2)
    with monkeypatch.context() as death:
        dies(death, Path, "rename", 7)  # an artifact is in its place, another not quite
        with pytest.raises(Killed):
            joined(torn, 2)
    assert 0 < len(list((tmp_path / "torn" / "artifacts").glob("*/config.json"))) < 3
    joined(torn, 2)
    for name in recipes:
        assert_same_artifact(quiet, torn, name)
    assert left_over(torn) == []
    # What is called once more, for its answer was lost, finds that all is done.
    with monkeypatch.context() as idle:
        idle.setattr(Maker, "finish", None)
        spread.gather(torn, source, 0, 2)
        spread.solve(torn, source, 1, 2)
        assert {made.error for made in joined(torn, 2).values()} == {None}
    assert left_over(torn) == []


def run_part(of: Job, part: Part, results: Any, killed: bool = False) -> None:
    """A worker's process: one part, through the one door."""
    batching.MICRO_BATCH_TOKENS = 256
    torch.set_num_threads(1)
    if killed:
        SolvedFolder.note = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    results.put(run_stage(of, Stage.QUANTIZE, part=part).model_dump_json())


@pytest.mark.slow
def test_processes_at_once_one_of_them_killed(tmp_path: Path) -> None:
    model = small(ZOO / "models" / "llama-tiny", tmp_path / "model", 2)
    recipes = ["gptq-w4-g128", "bnb-nf4"]
    plain, parted = (job(model, tmp_path / place, *recipes) for place in ("plain", "parted"))
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()

    def together(*workers: tuple[Part, bool]) -> list[int | None]:
        started = [context.Process(target=run_part, args=(parted, part, results, kill)) for part, kill in workers]
        for process in started:
            process.start()
        for process in started:
            process.join()
        for _, kill in workers:
            assert kill or json.loads(results.get())["failure"] is None
        return [process.exitcode for process in started]

    assert together(*((Part(step="gather", index=index, of=2), False) for index in range(2))) == [0, 0]
    solving = [Part(step="solve", index=index, of=2) for index in range(2)]
    assert together((solving[0], True), (solving[1], False)) == [-signal.SIGKILL, 0]
    assert len(list((tmp_path / "parted" / "passes").rglob("solved/*/*.tensors"))) == 3, (
        "one layer of both, and one without its record"
    )
    assert together((solving[0], False)) == [0]
    result = run_stage(parted, Stage.QUANTIZE, part=Part(step="join", of=2))
    assert result.failure is None
    assert {made.recipe: made.error for made in result.artifacts} == dict.fromkeys(recipes)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        at_once(plain)
    finally:
        torch.set_num_threads(torch_threads)
    for name in recipes:
        assert_same_artifact(plain, parted, name)
    assert left_over(parted) == []


# ------------------------------------------------------------------------------------------ refusals


def test_a_recipe_with_its_own_stream_is_not_spread(tmp_path: Path) -> None:
    of = job(ZOO / "models" / "llama-tiny", tmp_path, "gptq-w4-g128", own_stream())
    assert not spreadable(of)
    assert spreadable(of.model_copy(update={"orders": of.orders[:1]}))
    steps = (
        lambda: spread.gather(of, source_of(of), 0, 2),
        lambda: spread.solve(of, source_of(of), 0, 2),
        lambda: spread.join(of, source_of(of), 2),
    )
    for step in steps:
        with pytest.raises(UnsupportedRecipe, match=r"\['own'\] can't be spread"):
            step()


def test_a_step_before_its_time_is_refused(tmp_path: Path) -> None:
    model = small(ZOO / "models" / "llama-tiny", tmp_path / "model", 1)
    of = job(model, tmp_path, "gptq-w4-g128")
    with pytest.raises(TransientError, match=r"parts \[0, 1\] of 2 are lacking"):
        spread.solve(of, model, 0, 2)
    with pytest.raises(TransientError, match=r"no part has made layers \[0\]"):
        spread.join(of, model, 2)


@pytest.mark.slow
def test_what_fails_alone_fails_as_in_one_pass(tmp_path: Path) -> None:
    model = small(ZOO / "models" / "llama-tiny", tmp_path / "model", 2)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    scheme = {"bits": 4, "group_size": 64}
    first = recipe(name="first", method="rtn", scheme=scheme, ignore=["lm_head", "*.layers.1.*"])
    widths = recipe(name="widths", method="rtn", scheme={"bits": 4, "group_size": 100})
    plain, parted = (
        job(model, tmp_path / place, "rtn-w4-g128", first, widths, "bnb-nf4") for place in ("plain", "parted")
    )
    expected, made = at_once(plain), spread_over(parted, 2)
    said = [
        {name: artifact.error and (artifact.error.kind, artifact.error.message) for name, artifact in found.items()}
        for found in (expected, made)
    ]
    assert said[0] == said[1]
    assert [name for name, error in said[1].items() if error is None] == ["first"]
    assert_same_artifact(plain, parted, "first")
    assert sorted(path.name for path in (tmp_path / "parted" / "artifacts").iterdir()) == sorted(
        path.name for path in (tmp_path / "plain" / "artifacts").iterdir()
    )


# ------------------------------------------------------------------------------- odd splits, no memory


@pytest.mark.slow
def test_more_parts_than_micro_batches(tmp_path: Path) -> None:
    model = small(ZOO / "models" / "llama-tiny", tmp_path / "model", 1)
    plain, parted = (job(model, tmp_path / place, "fp8-static", samples=2) for place in ("plain", "parted"))
    assert said_of(spread_over(parted, 3)) == said_of(at_once(plain))
    assert_same_artifact(plain, parted, "fp8-static")
    assert files(tmp_path / "parted" / "references") == files(tmp_path / "plain" / "references")
    tokens = torch.arange(7 * 128).view(7, 128)
    for parts in range(1, 10):
        shares = [spread.share(micro_batches(tokens, 256), part, parts, 256) for part in range(parts)]
        whole = [batch for share in shares for batch in share if isinstance(batch, Tensor)]
        assert [len(batch) for batch in whole] == [2, 2, 2, 1]
        assert torch.equal(torch.cat(whole), tokens)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.slow
def test_a_part_without_memory_takes_smaller_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(ZOO / "models" / "llama-tiny", tmp_path / "model", 1)
    of = job(model, tmp_path, "fp8-static", "bnb-nf4")
    spread.gather(of, model, 0, 2)
    plain = Lanes.advance

    def advance(self: Lanes) -> None:
        if any(lane._batch["input_ids"].numel() > 128 for lane in self._lanes):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        plain(self)

    with monkeypatch.context() as short:
        short.setattr(Lanes, "advance", advance)
        spread.gather(of, model, 1, 2)
    for part in range(2):
        spread.solve(of, model, part, 2)
    made = joined(of, 2)
    assert made["fp8-static"].fallbacks == (
        "calibrated in micro-batches of 128 tokens, for there was no memory for 256",
    )
    assert made["bnb-nf4"].fallbacks == ()


# ------------------------------------------------------------------------------------------- pieces


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 9))
def test_every_layer_goes_to_one_part_and_no_part_gets_much_more(work: list[int], parts: int) -> None:
    shares = [layers_of(work, part, parts) for part in range(parts)]
    assert sorted(layer for share in shares for layer in share) == list(range(len(work)))
    loads = [sum(work[layer] for layer in share) for share in shares]
    assert max(loads) - min(loads) <= max(work, default=0)
    slices = [range(len(work))[slice_of(len(work), part, parts)] for part in range(parts)]
    assert [item for found in slices for item in found] == list(range(len(work)))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def watched(watcher: InputWatcher, streamed: StreamedModel, tokens: Tensor) -> None:
    """Show the inputs of a model's one layer to a watcher."""
    with Streaming(streamed) as streaming:
        lanes = streaming.lanes(list(tokens.split(1)))
        for layer in streaming.layers():
            with watcher.watching(streamed, inputs_of(streamed, layer.index)):
                lanes.advance()


@pytest.mark.parametrize("experts", ["routed", "all"])
def test_what_is_recorded_is_what_was_seen(experts: Literal["routed", "all"], tmp_path: Path) -> None:
    model = small(ZOO / "models" / "qwen3-moe-tiny", tmp_path / "model", 1)
    tokens = torch.randint(3, 2000, (3, 24), generator=torch.Generator().manual_seed(1))
    with Source(model) as source, torch.inference_mode():
        streamed = StreamedModel(model, source, dtype=torch.float32)
        names = inputs_of(streamed, 0)
        direct, again = Observer(experts, 8), Observer(experts, 8)
        with direct.gathering(names):
            watched(direct, streamed, tokens)
        parts = []
        for part, some in enumerate((tokens[:2], tokens[2:])):
            with LayerWriter(tmp_path / f"{part}.tensors") as writer:
                recorder = Recorder(writer, all_tokens=experts == "all")
                watched(recorder, streamed, some)
                parts.append(recorder.log([]))
        with again.gathering(names):
            for part, log in enumerate(parts):
                assert (
                    replay(Log.model_validate_json(log.model_dump_json()), tmp_path / f"{part}.tensors", again, "cpu")
                    == []
                )
    assert any(direct.borrowed(name) is not None for name in names) == (experts == "routed")
    for name in names:
        one, other = direct.of(name), again.of(name)
        assert one is not None
        assert other is not None
        assert one.count == other.count
        assert torch.equal(one.gram_II, other.gram_II)
        assert torch.equal(one.abs_sum_I, other.abs_sum_I)
        assert torch.equal(one.abs_max_I, other.abs_max_I)
        assert direct.borrowed(name) == again.borrowed(name)
    shared = [[observer.of(name) is observer.of(names[0]) for name in names] for observer in (direct, again)]
    assert shared[0] == shared[1]
    # q, k and v; o; of experts as many as a token goes to (all see the same for gate and up), for each gate and down.
    width, inner, heads, count = 256, 128, 256, 2 if experts == "routed" else 8
    up = 2 if experts == "routed" else 1
    planned = gathered_bytes(tokens.numel(), [width, heads, *[width] * up, *[inner] * count], 4)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tensors")) == planned


def test_the_first_to_come_decides_how_the_text_is_split(tmp_path: Path) -> None:
    home = spread.SpreadFolder(job(ZOO / "models" / "llama-tiny", tmp_path, "bnb-nf4"), 2)
    proposals = [spread.Agreement(micro_batch_tokens=size, reference="x") for size in (512, 4096)]
    assert [home.agree(proposal) for proposal in proposals] == [proposals[0]] * 2
    shutil.rmtree(tmp_path / "passes")
    assert home.agree(proposals[1]) == proposals[1]
