"""Inject faults into the loopback Hub for tests: error responses, delays and dropped connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True, slots=True)
class FaultRequest:
    """What a fault function decides by: method and path (percent-encoded as sent, without the query)."""

    method: str
    path: str


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of one request, injected after `delay` seconds.

    status: respond with this status and `headers` instead of doing the work.
    drop: close the connection before the work; during it (for `work` seconds, in which the client may reconnect);
        after it, without a response; or in the middle of the response.
    trickle: send the response in pieces, this many seconds apart.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    drop: Literal["before", "during", "after", "answering"] | None = None
    delay: float = 0.0
    work: float = 0.0
    trickle: float = 0.0

    def __post_init__(self) -> None:
        if self.status is not None and self.drop is not None:
            raise ValueError(f"a fault answers or drops, not both: got status={self.status}, drop={self.drop!r}")


FaultFunction = Callable[[FaultRequest], Fault | None]


class FaultInjector:
    """ASGI middleware that calls `fault` for every request, on the event loop: `fault` must not block.

    Dropping uses the connection's transport, which server.py puts into the scope's state.
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
        match fault.drop:
            case None:
                await self._app(scope, receive, _Trickle(send, fault.trickle) if fault.trickle else send)
            case "before":
                await _hang_up(scope, receive)
            case "during":
                whole = await _whole(receive)
                scope["state"]["transport"].abort()
                await asyncio.sleep(fault.work)
                await self._app(scope, whole, _swallow)
            case "after":
                await self._app(scope, receive, _swallow)
                await _hang_up(scope, receive)
            case "answering":
                await self._app(scope, receive, _half_of(send))
                await _hang_up(scope, receive)
        return None


async def drain(receive: Receive) -> None:
    """Read a request to its end, so that a client that is still sending can read an early response."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


async def _whole(receive: Receive) -> Receive:
    """Read a request to its end; returns a receive function that replays it, and then reports a disconnect."""
    messages: list[Message] = []
    while not messages or messages[-1].get("more_body", False):
        messages.append(await receive())
    remaining = iter(messages)

    async def replay() -> Message:
        return next(remaining, {"type": "http.disconnect"})

    return replay


def _half_of(send: Send) -> Send:
    """Send the headers of a response, and half of the first piece of its body."""
    done = False

    async def half(message: Message) -> None:
        nonlocal done
        if done:
            return
        if message["type"] == "http.response.body":
            body, done = message.get("body", b""), True
            message = {**message, "body": body[: len(body) // 2], "more_body": True}
        await send(message)

    return half


class _Trickle:
    """Sends a response's body in pieces, `seconds` apart."""

    def __init__(self, send: Send, seconds: float, pieces: int = 50) -> None:
        self._send = send
        self._seconds = seconds
        self._pieces = pieces

    async def __call__(self, message: Message) -> None:
        body = message.get("body", b"")
        if message["type"] == "http.response.body" and body:
            size = max(1, len(body) // self._pieces)
            for start in range(0, len(body), size):
                await self._send({**message, "body": body[start : start + size], "more_body": True})
                await asyncio.sleep(self._seconds)
            message = {**message, "body": b""}
        await self._send(message)


async def _swallow(message: Message) -> None:
    del message


async def _hang_up(scope: Scope, receive: Receive) -> None:
    scope["state"]["transport"].abort()
    while (await receive())["type"] != "http.disconnect":
        pass
