"""Helpers that run zoos on the small models as a user does: in a subprocess, with embedded Ray and loopback Hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.limits import GONE_SECONDS, RUN_SECONDS

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "tests/zoo/models"
TEXT = ROOT / "tests/zoo/text"
MARK = "QUANTMILL_TEST_RUN"

ZOO = """
name: small
models: [{models}]
recipes: [{recipes}]
calibration: {{dataset: {{path: text, data_files: [{text}/calibration.txt]}}, samples: 16, sequence_length: 256}}
verify: {{dataset: {{path: text, data_files: [{text}/heldout.txt]}}, tokens: 2048, sequence_length: 256}}
publish: {{endpoint: loopback, namespace: acme}}
"""


def write_zoo(folder: Path, models: list[str], recipes: str) -> Path:
    path = folder / "zoo.yaml"
    path.write_text(ZOO.format(models=", ".join(f"{{id: {model}}}" for model in models), recipes=recipes, text=TEXT))
    return path


def command(zoo: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", "run", str(zoo), "--out", str(out)]


def run(zoo: Path, out: Path, seconds: float = RUN_SECONDS) -> tuple[int, str, dict[str, Any]]:
    """Run a zoo to its end; returns exit code, stdout, and the content of results.json."""
    done = subprocess.run(
        command(zoo, out), capture_output=True, text=True, timeout=seconds, cwd=out.parent, check=False
    )
    lines = done.stdout.strip().splitlines()
    assert len(lines) > 1, done.stderr
    assert lines[-1].endswith("report.html"), done.stdout + done.stderr
    return done.returncode, done.stdout, json.loads(Path(lines[-2]).read_text())


def stop_when(zoo: Path, out: Path, said: str, number: signal.Signals) -> tuple[int, str, str]:
    """Run a zoo and send a signal once a line contains ``said``; returns exit code, output, and the run's mark."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command(zoo, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, MARK: mark}
    )
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if said in line:
            process.send_signal(number)
            break
    rest = process.stdout.read()
    process.stdout.close()
    return process.wait(GONE_SECONDS), printed + rest, mark


def marked_processes(mark: str, but: tuple[str, ...] = ()) -> list[int]:
    """Ids of processes that inherited a run's mark (Ray's and workers' too), except titles that start with ``but``."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes().decode(errors="replace")
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes() and not title.startswith(
                    but or ("\0",)
                ):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.2)
    return condition()


def by_key(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(Path(entry["model"]).name, entry["recipe"]): entry for entry in results["artifacts"]}
