"""Nobody learns the token: everything that a publish and a whole run leave behind is searched for it."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.loopback import LoopbackHub
from pipeline.loopback.faults import Fault, FaultRequest
from tests.limits import RUN_SECONDS
from tests.pipeline.runs import MODELS, ROOT, command, write_zoo
from tests.workers.published import artifact
from workers.transfer.hub import connect

TOKEN = "hf_thisTokenMustNotBeFoundAnywhere0123"

PUBLISH = """
import logging, os, sys
from pathlib import Path
from pipeline.loopback import LoopbackHub
from pipeline.loopback.faults import Fault
from workers.transfer.destinations import check as check_destination
from tests.workers.published import Faults
from workers.transfer import hub, to_hub as publishing
from workers.transfer.artifact import open_accepted
from workers.spec.job import Destination
from workers.transfer.patience import Patience
from workers.machine.failures import describe

logging.basicConfig(level=logging.DEBUG)
root, right = Path(sys.argv[1]), sys.argv[2] == "right"
faults = Faults()
token = os.environ["HF_TOKEN"] if right else "hf_another"
caught = 0
with LoopbackHub(root / "hub", token=token, fault=faults) as server:
    api = hub.connect(server.endpoint)
    ways = [Fault(status=503), Fault(status=403), Fault(status=401), Fault(status=400), Fault(drop="after")]
    for number, way in enumerate(ways):
        for where in ("/whoami", "/api/repos/create", "/preupload", "/commit/", "/tag/"):
            faults.plan = [(where, 99, way)]
            try:
                check_destination(server.endpoint, "acme")
                to = Destination(endpoint=server.endpoint)
                one = open_accepted(root / "a")
                publishing.publish(api, f"acme/model-{number}", one, to, patience=Patience(0.3))
            except Exception as error:
                caught += 1
                print(type(error).__name__, error, repr(error), describe(error).model_dump_json())
print("caught", caught, flush=True)
os._exit(0)  # calls that were given up on are still at it
"""


def holding(needle: str, *folders: Path) -> list[str]:
    """Files that have it in their content or in their path."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in files if needle in str(path) or needle.encode() in path.read_bytes()]


@pytest.mark.parametrize("token", ["right", "wrong"])
def test_no_failure_of_a_publish_tells_the_token(tmp_path: Path, token: str) -> None:
    """Each request fails in each way, with all that is logged: also with a token that the Hub doesn't know."""
    artifact(tmp_path / "a")
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH, str(tmp_path), token],
        env={**os.environ, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=RUN_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 20, "most of them fail"
    assert "HF_TOKEN" in done.stdout, "and say what to do"
    assert "DEBUG" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert not holding(TOKEN, tmp_path)


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Short, for the sockets of Ray are in it."""
    folder = Path(tempfile.mkdtemp(prefix="qm"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.night
def test_a_whole_run_leaves_the_token_nowhere(tmp_path: Path, ray_folder: Path) -> None:
    """Artifacts, ledger, results, report, output, Ray's logs and what Ray was told of jobs and environments."""
    chance = random.Random(3)

    def fault(request: FaultRequest) -> Fault | None:
        return Fault(status=chance.choice([500, 503])) if chance.random() < 0.2 else None

    zoo = write_zoo(tmp_path, [str(MODELS / "llama-tiny")], "bnb-nf4")
    with LoopbackHub(tmp_path / "hub", token=TOKEN, fault=fault) as server:
        zoo.write_text(zoo.read_text().replace("endpoint: loopback", f"endpoint: {server.endpoint!r}, collection: C"))
        environment = {
            **os.environ, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "RAY_TMPDIR": str(ray_folder),
        }  # fmt: skip
        done = subprocess.run(
            command(zoo, tmp_path / "runs"),
            env=environment, capture_output=True, text=True, check=False, timeout=RUN_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    with LoopbackHub(tmp_path / "hub") as server:
        assert connect(server.endpoint).repo_exists("acme/llama-tiny-bnb-nf4"), "the token was what let it write"
    places = [tmp_path / "runs", tmp_path / "home", tmp_path / "hub", ray_folder]
    assert (tmp_path / "runs" / "ledger.sqlite").is_file()
    assert holding("raylet", ray_folder), "Ray's logs are there to be searched"
    assert TOKEN not in done.stdout + done.stderr
    assert not holding(TOKEN, *places)
