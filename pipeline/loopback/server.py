"""Run the loopback Hub: in a thread of this process, or in the foreground."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.loopback.app import Limits, build_app
from pipeline.loopback.faults import FaultFunction
from pipeline.loopback.store import Store
from workers.errors import UserError

HOST = "127.0.0.1"
_STOP_SECONDS = 5
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class LoopbackHub:
    """A Hub for models on 127.0.0.1 with its state in one folder; serves from construction until `close`.

    root: the folder, created if needed; UserError if another server owns it.
    port: 0 for any free one; UserError if the given one is in use.
    token: required for writing and for private repositories; None allows everything to everybody.
    fault: called before every request to inject a fault, for tests.
    limits: sizes (bytes) that decide how files are uploaded.
    """

    def __init__(
        self,
        root: Path,
        port: int = 0,
        token: str | None = None,
        *,
        fault: FaultFunction | None = None,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
    ) -> None:
        # Listen now: requests that arrive before the event loop runs wait in the socket's backlog.
        listener = _listen(port)
        try:
            self._store = Store(root)
        except BaseException:
            listener.close()
            raise
        self.root = root
        self.endpoint = f"http://{HOST}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            build_app(self._store, token=token, limits=limits, fault=fault),
            http=_Protocol,
            lifespan="off",
            proxy_headers=False,
            log_config=None,
            log_level=None,
            access_log=False,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="loopback-hub", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish running requests (at most 5 seconds), stop, and release the root."""
        self._server.should_exit = True
        self._thread.join()
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(root: Path, port: int, token: str | None = None) -> None:
    """Run the Hub in the foreground until SIGINT or SIGTERM; prints its URL and root once.

    Call it from the main thread. Raises as LoopbackHub does.
    """
    # Block the signals before the server's threads start and inherit the mask, so that only sigwait gets them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        with LoopbackHub(root, port, token) as hub:
            print(f"loopback Hub at {hub.endpoint}, files in {root.absolute()}", flush=True)
            signal.sigwait(_STOP_SIGNALS)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _listen(port: int) -> socket.socket:
    try:
        listener = socket.create_server((HOST, port))
    except OSError as error:
        raise UserError(
            f"can't listen on {HOST}, port {port}: {error}; choose another port, or 0 for a free one"
        ) from error
    # asyncio sets this only on its own sockets; without it every response waits 40 ms for a delayed ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class _Protocol(H11Protocol):  # type: ignore[misc]  # uvicorn is untyped to mypy here (see pyproject.toml)
    """uvicorn's protocol, which also puts the transport into the request's state, for faults.py to close it."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.app_state: dict[str, Any] = {**self.app_state, "transport": transport}
