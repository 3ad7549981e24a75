"""What hangs ends, whether Python runs in it or not."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.limits import COMMAND_SECONDS, TEST_SECONDS
from tests.workers.jobs import ZOO, job
from workers import run
from workers.errors import StageHung
from workers.machine.deadline import EXIT_CODE, ends_within
from workers.spec.job import Stage


def test_what_ends_in_time_is_left_alone() -> None:
    with ends_within(0.2, "it"):
        pass
    time.sleep(0.4)  # nothing rings later


def test_what_sleeps_is_ended_by_an_error_that_names_it() -> None:
    with pytest.raises(StageHung, match="verify llama: no end within 0 s"), ends_within(0.2, "verify llama"):
        time.sleep(TEST_SECONDS)


def test_a_process_that_hears_no_signal_is_ended() -> None:
    """Signals are blocked, as in a library that never gives the interpreter back."""
    code = (
        "import signal, sys, time\nfrom workers.machine.deadline import ends_within\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
        "with ends_within(0.2, 'it', grace=0.2):\n    time.sleep(3600)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )
    assert done.returncode == EXIT_CODE
    assert "it: no end within 0 s" in done.stderr


def test_a_thread_without_signals_can_still_use_it() -> None:
    ended = []

    def work() -> None:
        with ends_within(TEST_SECONDS, "it"):
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]


def test_a_stage_that_hangs_comes_back_as_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = job(ZOO / "models" / "llama-tiny", tmp_path, "bnb-nf4")
    monkeypatch.setitem(run._STAGES, Stage.FETCH, lambda *_: time.sleep(TEST_SECONDS))
    result = run.run_stage(of, Stage.FETCH, seconds=0.2)
    assert result.failure is not None
    assert result.failure.kind == "StageHung"
    assert "fetch llama-tiny" in result.failure.message
