"""Publishing on a bad day: many publishes while requests fail and a reader looks on; and publishers that are killed.

python -m tests.bench.bench_publish [--repositories 40] [--revisions 5] [--kills 50] [--seed 0]
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub.utils import disable_progress_bars

from pipeline.loopback import LoopbackHub
from pipeline.loopback.faults import Fault, FaultRequest
from tests.workers.published import artifact
from workers.errors import QuantmillError
from workers.spec.job import Destination, HubLimits
from workers.transfer import destinations, hub
from workers.transfer.artifact import Artifact, open_accepted
from workers.transfer.pace import LocalPace

# Only the reader names main like this: its own requests never fail, so that it misses as little as possible.
READERS_MAIN = "refs%2Fheads%2Fmain"
READ_SECONDS = 2.0
FAULTS = {
    "dropped before the work": Fault(drop="before"),
    "dropped during the work": Fault(drop="during", work=0.05),
    "dropped after the work": Fault(drop="after"),
    "broken off in the answer": Fault(drop="answering"),
    "503": Fault(status=503),
    "429, Retry-After 1": Fault(status=429, headers={"Retry-After": "1"}),
    "stalled beyond the deadline, then done": Fault(delay=READ_SECONDS + 1),
    "slow link": Fault(trickle=0.01),
}


class BadDay:
    """Fails a share of all requests, each in one of the ways; the same seed draws the same."""

    def __init__(self, share: float, seed: int) -> None:
        self._share = share
        self._random = random.Random(seed)
        self.requests = 0
        self.failed: Counter[str] = Counter()

    def __call__(self, request: FaultRequest) -> Fault | None:
        if READERS_MAIN in request.path:
            return None
        self.requests += 1
        if self._random.random() >= self._share:
            return None
        name = self._random.choice(list(FAULTS))
        self.failed[name] += 1
        return FAULTS[name]


class Reader:
    """Looks at ``main`` of all repositories, all the time: whatever is there has to be one artifact, whole."""

    def __init__(self, endpoint: str, meant: Mapping[str, list[Artifact]]) -> None:
        self._endpoint = endpoint
        self._meant = meant
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.looks = 0
        self.whole = 0
        self.torn: list[str] = []

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx2.Client(base_url=self._endpoint, timeout=30) as client:
            while not self._stop.is_set():
                for repo_id in self._meant:
                    answer = client.get(f"/api/models/{repo_id}/tree/{READERS_MAIN}?recursive=true")
                    if answer.status_code == 200:
                        self._look(repo_id, answer.json())

    def _look(self, repo_id: str, entries: list[dict[str, Any]]) -> None:
        tree = {e["path"]: e["lfs"]["oid"] if "lfs" in e else e["oid"] for e in entries if e["type"] == "file"}
        tree.pop(".gitattributes", None)
        self.looks += 1
        if not tree:
            return  # just made
        self.whole += 1
        if not any(_is(tree, one) for one in self._meant[repo_id]):
            self.torn.append(f"{repo_id}: {sorted(tree)}")


def _is(tree: Mapping[str, str], one: Artifact) -> bool:
    return set(tree) == set(one.sha256) and all(one.is_at(path, identity) for path, identity in tree.items())


@dataclass
class Outcome:
    """What came of it."""

    asked: int
    published: int = 0
    duplicates: int = 0
    torn: int = 0
    looks: int = 0
    requests: int = 0
    failed: int = 0
    seconds: float = 0.0
    errors: tuple[str, ...] = ()
    kinds: tuple[tuple[str, int], ...] = ()


def storm(folder: Path, repositories: int, revisions: int, share: float, seed: int, at_a_time: int = 4) -> Outcome:
    """Publish so many revisions to each of so many repositories while a share of all requests fails."""
    meant = {
        f"acme/model-{number:03}": [_artifact(folder, number, revision) for revision in range(revisions)]
        for number in range(repositories)
    }
    day = BadDay(share, seed)
    errors: list[str] = []
    with LoopbackHub(folder / "hub", fault=day) as server, short_reads():
        to = Destination(endpoint=server.endpoint)
        # The Hub's own limits would make these minutes hours; what holds to them is tested by itself.
        hub.connect(server.endpoint, LocalPace(HubLimits(requests=10**6, files=10**6, commits=10**6)))

        def all_of(repo_id: str) -> None:
            for one in meant[repo_id]:
                try:
                    destinations.publish(to, repo_id, one.folder)
                except QuantmillError as error:
                    errors.append(f"{repo_id}: {error}")

        with Reader(server.endpoint, meant) as reader:
            begun = time.monotonic()
            with ThreadPoolExecutor(at_a_time) as pool:
                list(pool.map(all_of, meant))
            seconds = time.monotonic() - begun
        outcome = Outcome(repositories * revisions, torn=len(reader.torn), looks=reader.whole, seconds=seconds)
        outcome.requests, outcome.failed = day.requests, sum(day.failed.values())
        outcome.errors, outcome.kinds = tuple(errors + reader.torn), tuple(sorted(day.failed.items()))
    with LoopbackHub(folder / "hub") as server:
        api = hub.connect(server.endpoint)
        for repo_id, artifacts in meant.items():
            tagged = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}
            outcome.published += sum(f"quantmill-{one.manifest.fingerprint[:12]}" in tagged for one in artifacts)
            outcome.duplicates += len(api.list_repo_commits(repo_id)) - 1 - revisions
    return outcome


@contextlib.contextmanager
def short_reads() -> Iterator[None]:
    """A stall counts as one after two seconds, not after a minute."""
    from huggingface_hub import close_session

    before, hub.READ_SECONDS = hub.READ_SECONDS, READ_SECONDS
    close_session()
    try:
        yield
    finally:
        hub.READ_SECONDS = before
        close_session()


def _artifact(folder: Path, number: int, revision: int) -> Artifact:
    text = f"{number} {revision} " * (1000 + 200 * revision)
    return open_accepted(artifact(folder / f"{number}-{revision}", text, f"{number:06}{revision:06}".ljust(64, "0")))


PUBLISHER = """
import sys
from pathlib import Path
from workers.transfer import destinations, hub, to_hub as publishing, to_folder as folders
from workers.spec.job import Destination
to = Destination(endpoint=sys.argv[1])
hub.connect(to.endpoint)
from huggingface_hub.utils import disable_progress_bars
disable_progress_bars()
print("ready", flush=True)
sys.stdin.readline()
print(destinations.publish(to, sys.argv[2], Path(sys.argv[3])), flush=True)
"""


@dataclass
class Killed:
    """What came of publishers that were killed and started again."""

    kills: int
    completed: int = 0
    one_commit: int = 0
    died_before_the_commit: int = 0
    died_between_commit_and_last_tag: int = 0
    had_finished: int = 0


def kill(folder: Path, kills: int, seed: int) -> Killed:
    """Kill a publisher at a random instant, run it again, and count; each has a repository of its own."""
    instants = random.Random(seed)
    outcome = Killed(kills)
    # A slow answer to everything spreads a publish over time, as a real Hub's distance does.
    with LoopbackHub(folder / "hub", fault=lambda request: Fault(delay=0.02)) as server:
        whole = _publish(server.endpoint, "acme/first", _artifact(folder, 0, 0).folder, None)
        api = hub.connect(server.endpoint)
        for number in range(1, kills + 1):
            repo_id, one = f"acme/killed-{number:03}", _artifact(folder, number, 0)
            _publish(server.endpoint, repo_id, one.folder, instants.uniform(0.0, whole))
            stood, tagged = _state(api, repo_id)
            outcome.had_finished += tagged
            outcome.died_between_commit_and_last_tag += stood and not tagged
            outcome.died_before_the_commit += not stood
            _publish(server.endpoint, repo_id, one.folder, None)
            outcome.completed += _state(api, repo_id) == (True, True)
            outcome.one_commit += len(api.list_repo_commits(repo_id)) == 2
    return outcome


def _state(api: Any, repo_id: str) -> tuple[bool, bool]:
    """Whether the commit stands, and whether the last tag does."""
    if not api.repo_exists(repo_id):
        return False, False
    tags = [tag.name for tag in api.list_repo_refs(repo_id).tags]
    return len(api.list_repo_commits(repo_id)) > 1, any(name.startswith("quantmill-") for name in tags)


def _publish(endpoint: str, repo_id: str, folder: Path, kill_after: float | None) -> float:
    """Run a publisher once it has imported what it needs, SIGKILL after so many seconds; the seconds that it took."""
    command = [sys.executable, "-c", PUBLISHER, endpoint, repo_id, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        begun = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            process.kill()
        process.stdout.readline()
        seconds = time.monotonic() - begun
        process.stdout.read()
    assert kill_after is not None or process.returncode == 0
    return seconds


def main() -> None:
    """Measure and print."""
    logging.disable(logging.WARNING)  # the client tells of each of its retries
    disable_progress_bars()
    warnings.filterwarnings("ignore", "Use .content=", DeprecationWarning)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repositories", type=int, default=40)
    parser.add_argument("--revisions", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        done = storm(Path(scratch), asked.repositories, asked.revisions, asked.share, asked.seed)
    print(
        f"{done.published} of {done.asked} published, {done.duplicates} duplicate commits, {done.torn} torn states in "
        f"{done.looks} looks at main, {done.seconds:.0f} s, {done.requests} requests of which {done.failed} failed"
    )
    for line in (*(f"  {count} {kind}" for kind, count in done.kinds), *done.errors):
        print(line)
    with tempfile.TemporaryDirectory() as scratch:
        print(kill(Path(scratch), asked.kills, asked.seed))


if __name__ == "__main__":
    main()
