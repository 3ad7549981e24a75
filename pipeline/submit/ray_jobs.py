"""Call the Jobs API of a Ray head's dashboard over HTTP, with a deadline for every request.

Ray's own ``JobSubmissionClient`` has no timeout, lets ``RAY_ADDRESS`` override the given address, and needs the extra
``ray[default]`` (33 packages, which slow the embedded Ray down) on the client too.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from workers.errors import QuantmillError, TransientError, ZooError

T = TypeVar("T")

SECONDS = 30.0  # default deadline of a request
SLOWEST = 1e6  # bytes per second: an upload's deadline allows for this rate
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


class RayJob(BaseModel):
    """A submitted job, as the head reports it; times are Unix milliseconds."""

    model_config = ConfigDict(frozen=True)

    submission_id: str | None = None
    status: str
    entrypoint: str = ""
    message: str | None = None
    start_time: int | None = None
    end_time: int | None = None
    metadata: dict[str, str] | None = None
    driver_exit_code: int | None = None

    @property
    def ended(self) -> bool:
        """Whether the job has reached a final status."""
        return self.status in ENDED


_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_JOB = TypeAdapter(RayJob)
_JOBS = TypeAdapter(list[RayJob])


class JobsClient:
    """Client of a Ray head's dashboard.

    Every method raises TransientError if the head doesn't answer, or answers that it failed itself (5xx, 429), and
    ZooError if the address isn't that of a dashboard that accepts our token.
    """

    def __init__(self, address: str, seconds: float = SECONDS) -> None:
        try:
            parts = urlsplit(address)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or parts.query or parts.fragment:
            raise ZooError(
                f"--address: expected the dashboard of a Ray head, such as http://head:8265, got {address!r}"
            )
        if parts.username or parts.password:
            raise ZooError("--address: holds credentials, which logs would show; give Ray's token as RAY_AUTH_TOKEN")
        self.address = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._seconds = seconds
        self._opener = urllib.request.build_opener(_NoRedirect)

    def check(self) -> None:
        """Check that a Ray head answers at the address.

        Raises:
            ZooError: none does.
        """
        try:
            version = _parsed(self._ask("GET", "/api/version"), _OBJECT).get("ray_version")
        except TransientError as error:
            raise ZooError(
                f"--address: no Ray dashboard answers there, nothing was started ({error}); start the head with "
                "`ray start --head` (ray[default] installed there), or name another"
            ) from error
        if not isinstance(version, str):
            raise ZooError(f"--address: {self.address} is no Ray dashboard, got no ray_version; name another")

    def jobs(self) -> list[RayJob]:
        """List all jobs that the head knows."""
        return _parsed(self._ask("GET", "/api/jobs/"), _JOBS)

    def job(self, name: str) -> RayJob | None:
        """The job with that submission id, or None."""
        answer = self._find(f"/api/jobs/{quote(name, safe='')}")
        return None if answer is None else _parsed(answer, _JOB)

    def logs(self, name: str) -> str:
        """The output of a job so far."""
        return str(_parsed(self._ask("GET", f"/api/jobs/{name}/logs"), _OBJECT).get("logs", ""))

    def stop(self, name: str) -> None:
        """Ask the head to stop a job."""
        self._ask("POST", f"/api/jobs/{name}/stop")

    def start(self, request: dict[str, Any]) -> None:
        """Start a job; the head answers with an error if its submission id is taken."""
        self._ask("POST", "/api/jobs/", json.dumps(request).encode(), extra_seconds=self._seconds)

    def upload(self, archive: Path) -> str:
        """Upload a zip file unless the head has it; returns its URI for runtime environments."""
        name = archive.name
        if self._find(f"/api/packages/gcs/{name}") is None:
            body = archive.read_bytes()
            self._ask("PUT", f"/api/packages/gcs/{name}", body, extra_seconds=len(body) / SLOWEST)
        return f"gcs://{name}"

    def _find(self, path: str) -> bytes | None:
        """The answer to a GET, or None on 404."""
        try:
            return self._ask("GET", path)
        except _NotFound:
            return None

    def _ask(self, method: str, path: str, body: bytes | None = None, extra_seconds: float = 0.0) -> bytes:
        headers = {**_authorization(), "Content-Type": "application/json" if method == "POST" else "application/zip"}
        request = urllib.request.Request(self.address + path, body, headers, method=method)
        seconds = self._seconds + extra_seconds
        deadline = time.monotonic() + seconds
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                return _read(answer, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(path, error.code, error.read(1 << 16).decode(errors="replace")) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise TransientError(f"{self.address}: no answer: {str(reason) or type(reason).__name__}") from error

    def _refusal(self, path: str, code: int, text: str) -> QuantmillError:
        line = (text.strip().splitlines() or [""])[-1][:500]
        if code in (401, 403):
            return ZooError(
                f"--address: {self.address} wants Ray's token, got {code} ({line}); set RAY_AUTH_TOKEN to the cluster's"
            )
        if code == 404:
            return _NotFound(f"--address: {self.address}{path} doesn't exist; name the dashboard of a Ray head")
        if code >= 500 or code == 429:
            return TransientError(f"{self.address}: answered {code}: {line}")
        return ZooError(f"--address: {self.address}{path} answered {code}: {line}")


class _NotFound(ZooError):
    """The server answered 404."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Doesn't follow redirects, which could send Ray's token to another server."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Never redirect."""


def _authorization() -> dict[str, str]:
    """Authorization header with Ray's token, read from where Ray reads it; unrelated to the Hub's token."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and path.is_file():
        token = path.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _read(answer: Any, deadline: float) -> bytes:
    """Read the whole answer before the deadline; the socket's timeout bounds only each single read."""
    pieces = []
    while piece := answer.read1(1 << 20):
        pieces.append(piece)
        if time.monotonic() > deadline:
            raise TimeoutError("the answer didn't end in time")
    return b"".join(pieces)


def _parsed(answer: bytes, adapter: TypeAdapter[T]) -> T:
    try:
        return adapter.validate_json(answer)
    except ValidationError as error:
        raise TransientError(f"the head's answer can't be read ({error.error_count()} problems)") from error
