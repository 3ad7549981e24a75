"""A seam for tests: make the loopback Hub answer, stall or hang up as a real one does on a bad day."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True, slots=True)
class FaultRequest:
    """What a fault is decided by: the method and the path, percent-encoded as it came, without the query."""

    method: str
    path: str


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one request, after `delay` seconds.

    status: answer with this status and `headers` instead of doing the work.
    drop: close the connection without an answer, before or after the work was done.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    drop: Literal["before", "after"] | None = None
    delay: float = 0.0

    def __post_init__(self) -> None:
        if self.status is not None and self.drop is not None:
            raise ValueError(f"a fault answers or drops, not both: got status={self.status}, drop={self.drop!r}")


FaultFunction = Callable[[FaultRequest], Fault | None]


class FaultInjector:
    """ASGI middleware that asks `fault` about every request; it runs on the event loop, so it must not block.

    Dropping needs the connection's transport in the scope's state, which server.py puts there.
    """

    def __init__(self, app: ASGIApp, fault: FaultFunction) -> None:
        self._app = app
        self._fault = fault

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = self._fault(FaultRequest(scope["method"], scope["raw_path"].decode("ascii")))
        if fault is None:
            return await self._app(scope, receive, send)
        await asyncio.sleep(fault.delay)
        if fault.status is not None:
            await drain(receive)
            body = {"error": f"injected fault {fault.status}"}
            return await JSONResponse(body, fault.status, dict(fault.headers))(scope, receive, send)
        if fault.drop is None:
            return await self._app(scope, receive, send)
        if fault.drop == "after":
            await self._app(scope, receive, _swallow)
        await _hang_up(scope, receive)
        return None


async def drain(receive: Receive) -> None:
    """Read a request to its end, so that an early answer reaches a client that is still sending."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


async def _swallow(message: Message) -> None:
    del message


async def _hang_up(scope: Scope, receive: Receive) -> None:
    scope["state"]["transport"].abort()
    while (await receive())["type"] != "http.disconnect":
        pass
