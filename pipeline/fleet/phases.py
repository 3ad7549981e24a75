"""What stages are at, from their processes to the driver: a file on the node, the run's desk (an actor), a dict."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from workers.machine import phase
from workers.spec.job import HubLimits
from workers.transfer.pace import LocalPace

# Seconds between two looks at what a process says, and at what all of them said.
EVERY_SECONDS = 2.0


class Desk(LocalPace):
    """The pace of a whole run, and what its stages say they are at; served by an actor."""

    def __init__(self, limits: HubLimits | None = None) -> None:
        super().__init__(limits)
        self._phases: dict[str, str] = {}

    def tell(self, label: str, text: str) -> None:
        """A stage says what it is at; with an empty text, that it ended."""
        with self._lock:
            if text:
                self._phases[label] = text
            else:
                self._phases.pop(label, None)

    def phases(self) -> dict[str, str]:
        """What the stages at work are at, by their labels (``stage_label``)."""
        with self._lock:
            return dict(self._phases)


@contextmanager
def passed_on(desk: Any, label: str) -> Iterator[str]:
    """The path of a file, of which the ``desk`` (an actor) is told whatever a stage's process says there."""
    over = threading.Event()
    with tempfile.TemporaryDirectory(prefix="quantmill-phase-") as folder:
        path = Path(folder) / "phase"

        def watch() -> None:
            said = ""
            while not over.wait(EVERY_SECONDS):
                if (now := phase.told(path)) != said:
                    said = now
                    with suppress(Exception):  # whatever Ray raises: a display isn't worth a stage
                        desk.tell.remote(label, said)
            if said:
                with suppress(Exception):
                    desk.tell.remote(label, "")

        watcher = threading.Thread(target=watch, name="phase", daemon=True)
        watcher.start()
        try:
            yield str(path)
        finally:
            over.set()
            watcher.join()
