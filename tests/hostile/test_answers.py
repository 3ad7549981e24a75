"""Whatever a Hub answers becomes one of our own errors, soon and in bounded memory; what it sends is checked."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.planning import plan, sources
from pipeline.zoo.zoo import ModelEntry
from tests.hostile import answers, base
from workers import errors
from workers.machine.memory import peak_host_bytes
from workers.transfer import from_hub, hub

WRONG = [*answers.of_the_listing(), *answers.of_files()]
SECONDS, MEMORY = 10.0, 500_000_000


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[answers.HostileHub, str]]:
    made = answers.HostileHub(base.write(tmp_path_factory.mktemp("model") / "model"), WRONG)
    with made.serving() as address:
        yield made, address


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request is made once: how long one is repeated for is tested elsewhere."""

    def once(thing: str, action: Callable[[], object], silence: object = None) -> object:
        return action()

    monkeypatch.setattr(sources, "insist", once)


def test_there_are_enough() -> None:
    assert len(WRONG) == len({each.name for each in WRONG}) >= 40


def test_an_honest_model_is_pinned(
    hostile: tuple[answers.HostileHub, str], impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hostile[1])
    found = sources.resolve(ModelEntry(id="org/good"), Path("/nowhere"))
    assert found.pin.revision == answers.COMMIT
    assert {tensor.name for tensor in found.tensors} == set(base.shapes())


@pytest.mark.parametrize("wrong", WRONG, ids=[each.name for each in WRONG])
def test_a_wrong_answer_is_refused_soon(
    wrong: answers.Wrong, hostile: tuple[answers.HostileHub, str], impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hostile[1])
    begun = time.monotonic()
    with pytest.raises(errors.QuantmillError) as caught:
        sources.resolve(ModelEntry(id=f"org/{wrong.name}"), Path("/nowhere"))
    assert time.monotonic() - begun < SECONDS
    assert type(caught.value).__name__ in wrong.kinds, caught.value
    assert wrong.says in str(caught.value)
    assert "fetch it again" not in str(caught.value)


MEMORY_OF = """
import sys
from pathlib import Path
from pipeline.planning import sources
from pipeline.zoo.zoo import ModelEntry
from workers.errors import QuantmillError
from workers.machine.memory import peak_host_bytes

sources.insist = lambda thing, action, silence=None: action()
for name in sys.argv[1:]:
    try:
        sources.resolve(ModelEntry(id=f"org/{name}"), Path("/nowhere"))
    except QuantmillError:
        pass
print(peak_host_bytes())
"""


def test_none_takes_much_memory(hostile: tuple[answers.HostileHub, str]) -> None:
    large = [
        each.name for each in WRONG if any(word in each.name for word in ("huge", "endless", "bomb", "many", "deep"))
    ]
    assert len(large) >= 6
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_OF, *large], capture_output=True, text=True, check=True,
        env={"HF_ENDPOINT": hostile[1], "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(plan.__file__).parents[2])},
    )  # fmt: skip
    assert int(done.stdout) < MEMORY
    assert peak_host_bytes() > 0


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fetched(tmp_path: Path) -> Iterator[tuple[answers.HostileHub, str]]:
    """A Hub of a test's own."""
    made = answers.HostileHub(base.write(tmp_path / "model"), [])
    (tmp_path / "model" / "model.onnx").write_bytes(b"\0" * 100)
    made.files["model.onnx"] = b"\0" * 100
    with made.serving() as address:
        yield made, address


def fetch(address: str) -> Path:
    return from_hub.fetch(hub.connect(address), "org/model", answers.COMMIT, allow_pickle=False)


def flipped(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


def test_what_is_fetched_is_the_checkpoint_alone(fetched: tuple[answers.HostileHub, str], empty_cache: Path) -> None:
    folder = fetch(fetched[1])
    assert "model.onnx" not in {path.name for path in folder.iterdir()}
    assert (folder / "model.safetensors").read_bytes() == fetched[0].files["model.safetensors"]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_arrives_damaged_is_fetched_again(
    file: str, fetched: tuple[answers.HostileHub, str], empty_cache: Path
) -> None:
    """Of the size that was said, so that the client itself notices nothing."""
    made, address = fetched
    first = made.given.count(file)
    asked: list[int] = []

    def spoil(number: int, body: bytes) -> bytes:
        asked.append(number)
        # HEAD, then GET: the first time that it's given is wrong.
        return flipped(body) if len(asked) <= 2 else body

    made.spoiled[file] = spoil
    folder = fetch(address)
    assert (folder / file).read_bytes() == made.files[file]
    assert first == 0
    assert len(asked) > 2


def test_a_file_that_is_always_damaged_is_named(fetched: tuple[answers.HostileHub, str], empty_cache: Path) -> None:
    made, address = fetched
    made.spoiled["model.safetensors"] = lambda number, body: flipped(body)
    with pytest.raises(errors.HubUnavailable, match=r"model\.safetensors arrived twice with another sha256"):
        fetch(address)
    # Nothing damaged stays where the next attempt would find it.
    assert not [path for path in empty_cache.rglob("*") if path.is_file() and path.stat().st_size > 100_000]


@pytest.mark.slow
def test_plans_succeed_with_a_tenth_of_the_requests_failing(
    fetched: tuple[answers.HostileHub, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import random

    made, address = fetched
    pick, honest, failed = random.Random(5), made.answer, []

    def flaky(path: str) -> answers.Answer:
        if pick.random() < 0.1:
            failed.append(path)
            return pick.choice(
                [answers.Answer(b"", 503), answers.Answer(b"", 429, {"Retry-After": "0"}), answers.Answer(drop=True)]
            )
        return honest(path)

    monkeypatch.setattr(made, "answer", flaky)
    monkeypatch.setenv("HF_ENDPOINT", address)
    entry = ModelEntry(id="org/model")
    for _ in range(20):
        assert sources.resolve(entry, Path("/nowhere"), calibrated=True).tensors
    assert len(failed) > 3
