"""One pace for a run: its processes together keep to the limits, not each by itself."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.loopback import LoopbackHub
from pipeline.loopback.faults import Fault, FaultRequest
from tests.limits import LONG_TEST_SECONDS, RUN_SECONDS
from tests.pipeline.runs import MODELS, by_key, command, write_zoo


def most_in(times: list[float], seconds: float) -> int:
    """Events in the fullest window."""
    return max(sum(start <= at < start + seconds for at in times) for start in times)


@pytest.mark.night
@pytest.mark.timeout(LONG_TEST_SECONDS)
def test_the_publishers_of_a_run_share_its_limits(tmp_path: Path) -> None:
    seen: list[tuple[float, str]] = []

    def note(request: FaultRequest) -> Fault | None:
        seen.append((time.monotonic(), request.path))
        return Fault(delay=0.05)

    zoo = write_zoo(tmp_path, [str(MODELS / "llama-tiny")], "bnb-nf4, bnb-fp4")
    with LoopbackHub(tmp_path / "hub", fault=note) as server:
        where = f"endpoint: {server.endpoint!r}, limits: {{requests: 3, files: 3, request_seconds: 2}}"
        zoo.write_text(zoo.read_text().replace("endpoint: loopback", where))
        # What was verified stands in the workspace: the second run does nothing but publish, both at once.
        published = zoo.read_text()
        zoo.write_text("\n".join(line for line in published.splitlines() if not line.startswith("publish")))
        run(zoo, tmp_path)
        zoo.write_text(published)
        seen.clear()
        results = run(zoo, tmp_path)
    assert {entry["status"] for entry in by_key(results).values()} == {"published"}
    first = next(number for number, (_, path) in enumerate(seen) if path.endswith("/refs"))
    of_workers = [at for at, _ in seen[first:]]
    assert len({path.split("/")[4] for _, path in seen[first : first + 12] if "/api/models/" in path}) > 1, "at once"
    # Permits are given out in windows of 2 s; requests arrive a little later, each by its own little.
    assert len(of_workers) > 20
    assert most_in(of_workers, 1.7) <= 6
    # And into a folder, from the same workspace.
    zoo.write_text(published.replace(where, f"endpoint: {tmp_path / 'models'}"))
    entries = by_key(run(zoo, tmp_path))
    assert {entry["status"] for entry in entries.values()} == {"published"}
    for entry in entries.values():
        told = json.loads((tmp_path / "models" / entry["repo_id"] / "main.json").read_text())
        assert told["revision"] == entry["commit"]
        assert (tmp_path / "models" / entry["repo_id"] / told["revision"] / "model.safetensors").is_file()


def run(zoo: Path, folder: Path) -> dict[str, object]:
    done = subprocess.run(
        command(zoo, folder / "runs"), capture_output=True, text=True, check=False, timeout=RUN_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    loaded: dict[str, object] = json.loads(Path(done.stdout.strip().splitlines()[-2]).read_text())
    return loaded
