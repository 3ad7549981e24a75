"""Wrap an HTTP request for the handlers, and build the error responses that huggingface_hub turns into exceptions."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, unquote

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.loopback.errors import (
    AlreadyExists,
    EntryNotFound,
    HeadMoved,
    HubError,
    InvalidRequest,
    NotFound,
    RepoNotFound,
    RevisionNotFound,
    TooLarge,
    Unauthorized,
)
from pipeline.loopback.store import Repo, Store

# The page size of the real Hub's tree listing.
PAGE_ENTRIES = 1000
# Largest body of a request in bytes; files that go through LFS are streamed, and have their own limit.
BODY_BYTES = 8 * 2**20
# A body is read on up to this many times its limit.
READ_ON = 4

# Status and X-Error-Code; the client chooses its exception class by the code.
_ANSWERS: dict[type[HubError], tuple[int, str | None]] = {
    InvalidRequest: (400, None),
    TooLarge: (413, None),
    Unauthorized: (401, None),
    NotFound: (404, None),
    RepoNotFound: (404, "RepoNotFound"),
    RevisionNotFound: (404, "RevisionNotFound"),
    EntryNotFound: (404, "EntryNotFound"),
    AlreadyExists: (409, None),
    HeadMoved: (412, None),
}

_Kind = TypeVar("_Kind")


@dataclass(frozen=True, slots=True)
class Call:
    """A request with its whole body; `trusted`: it may write, and see private repositories."""

    request: Request
    body: bytes
    trusted: bool

    @property
    def base(self) -> str:
        """The Hub's URL as this client reached it, without a trailing slash."""
        return str(self.request.base_url).rstrip("/")

    @property
    def repo_id(self) -> str:
        return f"{self.param('ns')}/{self.param('name')}"

    def param(self, name: str) -> str:
        """A decoded path parameter, '' if the route has none of that name."""
        return unquote(self.request.path_params.get(name, ""))

    def query(self, name: str) -> str:
        """A query parameter, '' if it is absent."""
        return self.request.query_params.get(name, "")

    def flag(self, name: str) -> bool:
        """A boolean query parameter, False if it is absent."""
        return self.query(name).lower() in ("1", "true")

    def json(self) -> dict[str, Any]:
        """The body, which must be a JSON object."""
        return json_object(self.body)

    def form(self, name: str) -> list[str]:
        """The values of a field of a form-encoded body."""
        return parse_qs(self.body.decode(errors="replace"), keep_blank_values=True).get(name, [])


def json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object; InvalidRequest for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"expected a JSON object, got {data[:80]!r}: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"expected a JSON object, got {data[:80]!r}")
    return value


def take(body: Mapping[str, Any], name: str, kind: type[_Kind], default: _Kind | None = None) -> _Kind:
    """A field of a JSON object, checked for its type; InvalidRequest if it is absent or null and has no default."""
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidRequest(f"the field {name!r} must be a {kind.__name__}, got {value!r}")
    return value


def trusts(request: Request, token: str | None) -> bool:
    """Whether the request has the Hub's token, or the Hub has none; Unauthorized for a wrong token."""
    if token is None:
        return True
    given = request.headers.get("authorization")
    if given is None:
        return False
    if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        # The client distinguishes a wrong token from a hidden repository by exactly this text.
        raise Unauthorized("Invalid credentials in Authorization header")
    return True


def visible_repo(store: Store, call: Call) -> Repo:
    """The repository in the path; RepoNotFound if it doesn't exist or the caller may not see it."""
    repo = store.repo(call.repo_id)
    if repo.private and not call.trusted:
        raise RepoNotFound(f"no repository {repo.id!r} here; create it first")
    return repo


def answer_error(error: HubError, *, trusted: bool) -> Response:
    """The response that makes huggingface_hub raise the exception for this error."""
    status, code = _ANSWERS[type(error)]
    if isinstance(error, RepoNotFound) and not trusted:
        # As on the Hub: without a token, "private" and "doesn't exist" get the same response.
        status = 401
    # Header values must be latin-1 without line breaks.
    text = " ".join(str(error).split()).encode("ascii", "replace").decode()
    headers = {"X-Error-Message": text}
    if code is not None:
        headers["X-Error-Code"] = code
    if isinstance(error, EntryNotFound) and error.commit is not None:
        headers["X-Repo-Commit"] = error.commit
    body: dict[str, Any] = {"error": str(error)}
    if isinstance(error, AlreadyExists) and error.slug is not None:
        body["slug"] = error.slug
    return JSONResponse(body, status, headers)


def page(call: Call, items: Sequence[Any]) -> Response:
    """One page of a listing, with a Link header to the next one (RFC 8288) if there is more."""
    cursor = call.query("cursor") or "0"
    if not (cursor.isascii() and cursor.isdecimal()):
        raise InvalidRequest(f"the cursor must be a number, got {cursor!r}")
    start = int(cursor)
    asked = call.query("limit")
    limit = int(asked) if asked.isascii() and asked.isdecimal() else PAGE_ENTRIES
    stop = start + min(limit, PAGE_ENTRIES)
    headers = {}
    if stop < len(items):
        url = str(call.request.url.include_query_params(cursor=stop))
        headers["Link"] = f'<{quote(url, safe=":/?&=%")}>; rel="next"'
    return JSONResponse(list(items[start:stop]), headers=headers)


def route(
    method: str,
    path: str,
    work: Callable[[Call], Response],
    *,
    token: str | None,
    write: bool = False,
    body_bytes: int = BODY_BYTES,
) -> Route:
    """A route that reads a body of limited size, checks the token, and runs the handler `work` in a worker thread."""

    async def endpoint(request: Request) -> Response:
        trusted = False
        try:
            try:
                body = await _body(request, body_bytes)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody receives it: the client disconnected while sending
            trusted = trusts(request, token)
            if write:
                _require_writer(request, trusted)
            return await run_in_threadpool(work, Call(request, body, trusted))
        except HubError as error:
            return answer_error(error, trusted=trusted)
        except UnicodeError as error:  # lone surrogates, which JSON may hold and no file can
            return answer_error(InvalidRequest(f"text that is no Unicode: {error}"), trusted=trusted)

    return Route(path, endpoint, methods=[method])


async def _body(request: Request, most: int) -> bytes:
    """The whole body; what is above the limit is read, so that the client sees the answer, and thrown away.

    Raises:
        TooLarge: it has more than ``most`` bytes.
    """
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            body += chunk
        else:
            body.clear()
        if size > READ_ON * most:
            break
    if size > most:
        raise TooLarge(f"the body has {size} bytes or more, expected at most {most}")
    return bytes(body)


def _require_writer(request: Request, trusted: bool) -> None:
    if "origin" in request.headers:
        # Only browsers send Origin: a web page must not write to a Hub on the reader's machine.
        raise InvalidRequest("a web page may not write to this Hub: got an Origin header")
    if trusted:
        return
    if "name" in request.path_params:
        raise RepoNotFound("Invalid username or password.")
    raise Unauthorized("Invalid username or password.")
