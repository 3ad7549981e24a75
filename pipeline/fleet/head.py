"""Looks whether Ray's head answers: before connecting to a cluster, and while a run is at work.

Ray itself tries an address for minutes, and ends a driver's process when its head has been silent for a minute.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from workers.errors import ClusterLost, ZooError

# Seconds in which a cluster must answer, of one attempt, and between two looks at the head of a running one.
ANSWER_SECONDS, ATTEMPT_SECONDS, LOOK_SECONDS = 20.0, 3.0, 5.0
# Silence in seconds after which a head counts as gone; Ray ends this process after 60, results have to be written then.
SILENT_SECONDS = 20.0
# Processes of an embedded Ray without which it doesn't work.
VITAL = frozenset({"gcs_server", "raylet"})
HOST_AND_PORT = re.compile(r"(?:ray://)?(?P<host>\[[^\]]+\]|[^:/\[\]]+):(?P<port>\d+)/?")


def connect(address: str, start: Callable[[str], None], seconds: float = ANSWER_SECONDS) -> None:
    """Connect to a cluster that runs already; ``start`` does, once something answers there, within ``seconds``.

    Raises:
        ZooError: there's none.
    """
    named = (os.environ.get("RAY_ADDRESS") or address) if address == "auto" else address
    try:
        problem = _silence(named, seconds)
        if problem is None:
            start(address)
            return
    except Exception as error:  # Ray raises bare ones
        problem = " ".join(str(error).split())
    raise ZooError(f"--address: no Ray cluster there, got {named!r} ({problem}); start one, or name another")


def _silence(address: str, seconds: float) -> str | None:
    """Why no Ray head answers at ``host:port``; None if one does, or for another kind of address."""
    match = HOST_AND_PORT.fullmatch(address)
    if match is None:
        return None
    import grpc  # type: ignore[import-untyped]  # comes with Ray, without types
    from ray._private.grpc_utils import init_grpc_channel

    host, port = match["host"].strip("[]"), int(match["port"])
    until = time.monotonic() + seconds / 2
    while (problem := _unreachable(host, port)) and time.monotonic() < until:
        time.sleep(0.5)
    if problem:
        return f"nothing answers within {seconds / 2:.0f} s: {problem}"
    channel = init_grpc_channel(f"{match['host']}:{port}")
    try:
        # Another service, or a silent one, never says the first word of gRPC.
        grpc.channel_ready_future(channel).result(timeout=seconds / 2)
    except grpc.FutureTimeoutError:
        return f"what is there doesn't speak as a Ray head does, waited {seconds / 2:.0f} s"
    finally:
        channel.close()
    return None


def _unreachable(host: str, port: int) -> str | None:
    try:
        with socket.create_connection((host, port), timeout=ATTEMPT_SECONDS):
            return None
    except OSError as error:
        return str(error)


class Head:
    """The head of the cluster that this process is connected to."""

    def __init__(self) -> None:
        import ray

        self._node: Any = ray._private.worker._global_node
        self._embedded = self._node is not None and self._node.head
        match = HOST_AND_PORT.fullmatch(str(ray.get_runtime_context().gcs_address))
        self._address = (match["host"].strip("[]"), int(match["port"])) if match else None
        self._heard = self._looked = time.monotonic()
        self.answers, self.lost = True, False

    def wait(self) -> None:
        """Wait until the head answers, before a call that Ray would end this process over.

        Raises:
            ClusterLost: see ``check``.
        """
        self.check(at_once=True)
        while not self.answers:
            time.sleep(1.0)
            self.check(at_once=True)

    def check(self, at_once: bool = False) -> None:
        """Look at the head, at a cluster's every few seconds or ``at_once``; ``answers`` says what was found.

        Raises:
            ClusterLost: a vital process of the embedded Ray ended, or a cluster's head has been silent for long.
        """
        if self._embedded:
            if ended := self._ended():
                self.lost, self.answers = True, False
                raise ClusterLost(f"Ray's head on this machine died ({ended} ended)")
            return
        if self._address is None or (not at_once and time.monotonic() - self._looked < LOOK_SECONDS):
            return
        self._looked = time.monotonic()
        problem = _unreachable(*self._address)
        self.answers = problem is None
        if problem is None:
            self._heard = time.monotonic()
        elif time.monotonic() - self._heard > SILENT_SECONDS:
            self.lost = True
            host, port = self._address
            raise ClusterLost(f"Ray's head at {host}:{port} doesn't answer any more ({problem})")

    def _ended(self) -> str | None:
        """The vital process of an embedded Ray that ended, if one did."""
        with suppress(AttributeError):  # Ray's own, not promised
            return next((str(kind) for kind, _ in self._node.dead_processes() if kind in VITAL), None)
        return None
