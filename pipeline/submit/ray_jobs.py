"""The Jobs API of a Ray head over HTTP: as its dashboard serves it, with a deadline for every request.

Ray's own ``JobSubmissionClient`` waits for ever, lets ``RAY_ADDRESS`` overrule the address it's given, and needs the
extra ``ray[default]`` (33 packages, which slow the embedded Ray down) also where nothing but requests are made.
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

SECONDS = 30.0
SLOWEST = 1e6  # bytes in a second, of an upload
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


class RayJob(BaseModel):
    """A submitted job, as the head tells of it; times are Unix milliseconds."""

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
        """Whether nothing will happen any more."""
        return self.status in ENDED


_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_JOB = TypeAdapter(RayJob)
_JOBS = TypeAdapter(list[RayJob])


class JobsClient:
    """A Ray head, by the address of its dashboard.

    Every method raises TransientError where there's no answer, or one that says that the head itself failed, and
    ZooError where the address isn't one of a dashboard that lets us in.
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
        """Look whether there is a Ray head at all.

        Raises:
            ZooError: there's none.
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
        """All jobs that the head knows."""
        return _parsed(self._ask("GET", "/api/jobs/"), _JOBS)

    def job(self, name: str) -> RayJob | None:
        """The job submitted under that name; None if there is none."""
        answer = self._find(f"/api/jobs/{quote(name, safe='')}")
        return None if answer is None else _parsed(answer, _JOB)

    def logs(self, name: str) -> str:
        """All that a job has printed so far."""
        return str(_parsed(self._ask("GET", f"/api/jobs/{name}/logs"), _OBJECT).get("logs", ""))

    def stop(self, name: str) -> None:
        """Ask a job to end."""
        self._ask("POST", f"/api/jobs/{name}/stop")

    def start(self, request: dict[str, Any]) -> None:
        """Start a job; where its name is taken, the head fails."""
        self._ask("POST", "/api/jobs/", json.dumps(request).encode(), more=self._seconds)

    def upload(self, archive: Path) -> str:
        """Bring a zip file there unless it is there; its URI in runtime environments."""
        name = archive.name
        if self._find(f"/api/packages/gcs/{name}") is None:
            body = archive.read_bytes()
            self._ask("PUT", f"/api/packages/gcs/{name}", body, more=len(body) / SLOWEST)
        return f"gcs://{name}"

    def _find(self, path: str) -> bytes | None:
        """The answer, or None where nothing is."""
        try:
            return self._ask("GET", path)
        except _NotFound:
            return None

    def _ask(self, method: str, path: str, body: bytes | None = None, more: float = 0.0) -> bytes:
        headers = {**_authorization(), "Content-Type": "application/json" if method == "POST" else "application/zip"}
        request = urllib.request.Request(self.address + path, body, headers, method=method)
        seconds = self._seconds + more
        until = time.monotonic() + seconds
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                return _read(answer, until)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(path, error.code, error.read(1 << 16).decode(errors="replace")) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise TransientError(f"{self.address}: no answer: {str(reason) or type(reason).__name__}") from error

    def _refusal(self, path: str, code: int, text: str) -> QuantmillError:
        said = (text.strip().splitlines() or [""])[-1][:500]
        if code in (401, 403):
            return ZooError(
                f"--address: {self.address} wants Ray's token, got {code} ({said}); set RAY_AUTH_TOKEN to the cluster's"
            )
        if code == 404:
            return _NotFound(f"--address: {self.address}{path} doesn't exist; name the dashboard of a Ray head")
        if code >= 500 or code == 429:
            return TransientError(f"{self.address}: answered {code}: {said}")
        return ZooError(f"--address: {self.address}{path} answered {code}: {said}")


class _NotFound(ZooError):
    """The address leads to a server that has nothing there."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer: following it would carry Ray's token to somebody else."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Never."""


def _authorization() -> dict[str, str]:
    """Ray's own token, from where Ray takes it; nothing to do with the Hub's."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and path.is_file():
        token = path.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _read(answer: Any, until: float) -> bytes:
    """All of it, unless it comes too slowly; the socket's own timeout only bounds each piece."""
    pieces = []
    while piece := answer.read1(1 << 20):
        pieces.append(piece)
        if time.monotonic() > until:
            raise TimeoutError("the answer didn't end in time")
    return b"".join(pieces)


def _parsed(answer: bytes, what: TypeAdapter[T]) -> T:
    try:
        return what.validate_json(answer)
    except ValidationError as error:
        raise TransientError(f"the head's answer can't be read ({error.error_count()} problems)") from error
