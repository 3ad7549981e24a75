"""The Hub: one client with deadlines and a pace, its errors as ours, models, manifests. No torch; the driver uses it.

What has to be handled here is in huggingface_hub's own source: it retries uploads and listings, but raises on the first
503 of create_repo, create_commit, create_tag and model_info; its default client waits for ever, and as long as a
``Retry-After`` says.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from workers.errors import (
    CheckpointError,
    DiskFull,
    HubRefused,
    HubUnavailable,
    ModelNotFound,
    QuantmillError,
    ZooError,
)
from workers.spec.job import Manifest
from workers.spec.workspace import MANIFEST
from workers.transfer.artifact import check_bytes as check_bytes
from workers.transfer.pace import LONGEST_PAUSE_SECONDS, UNNAMED_PAUSE_SECONDS, LocalPace, Pace

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OFFICIAL = "https://huggingface.co"
READ_SECONDS = 60.0
# A permit that takes longer to get is not waited for inside a call: its caller knows how long it may wait.
SHORT_WAIT_SECONDS = 10.0
# What a checkpoint in another framework or format would add to the download.
PICKLES = ("*.bin", "*.pt", "*.pth")
NOT_FETCHED = (*PICKLES, "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot", "*.tflite", "onnx/*")
# Written by the Hub itself into every new repository.
HUB_OWN_FILES = frozenset({".gitattributes"})


def default_endpoint() -> str:
    """``HF_ENDPOINT``, else the public Hub."""
    return os.environ.get("HF_ENDPOINT", OFFICIAL).rstrip("/")


def normalized(endpoint: str | None) -> str:
    """A destination's address as it's compared and shown; left out: the Hub's."""
    if endpoint is None:
        return default_endpoint()
    return endpoint if endpoint.endswith("://") else endpoint.rstrip("/")


def connect(endpoint: str | None = None, pace: Pace | None = None) -> HfApi:
    """A client of that Hub on which no read waits for ever. The token is the environment's or the stored login's.

    Every request of this process asks ``pace`` for a permit; left out, it's the one set before, or the process's own.
    """
    endpoint = (endpoint or default_endpoint()).rstrip("/")
    # huggingface_hub reads it when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, constants

    if endpoint != OFFICIAL and "HF_HUB_DISABLE_XET" not in os.environ:
        # A self-hosted Hub speaks LFS, and 2.x doesn't negotiate. This is looked at anew for each transfer, so that it
        # also holds where the public Hub was asked first; the environment is for children.
        constants.HF_HUB_DISABLE_XET = True
        os.environ["HF_HUB_DISABLE_XET"] = "1"
    _meter().watch(endpoint, pace)
    return HfApi(endpoint=endpoint, library_name="quantmill")


@cache
def _meter() -> _Meter:
    """Once in a process: setting the factory closes the client under the requests of other threads."""
    from huggingface_hub import set_client_factory

    meter = _Meter()
    set_client_factory(meter.client)
    return meter


class _Meter:
    """Stands before and behind every request that huggingface_hub's shared client sends to a Hub."""

    def __init__(self) -> None:
        self._pace: Pace = LocalPace()
        self._hubs: dict[str, str] = {}

    def watch(self, endpoint: str, pace: Pace | None) -> None:
        """Count the requests to a Hub; its storage, on other hosts, has limits of its own."""
        import httpx2

        self._hubs[httpx2.URL(endpoint).netloc.decode()] = endpoint
        self._pace = pace or self._pace

    def client(self) -> Any:
        """What huggingface_hub makes its client with."""
        import httpx2
        from huggingface_hub.utils._http import default_client_factory

        client = default_client_factory()
        client.timeout = httpx2.Timeout(READ_SECONDS, connect=10.0)
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], self._before],
            "response": [*hooks["response"], self._after],
        }
        return client

    def _before(self, request: Any) -> None:
        hub = self._hubs.get(request.url.netloc.decode())
        if hub is None:
            return
        path = request.url.path
        while (wait := self._pace.ask(hub, _committed_to(request.method, path), file="/resolve/" in path)) > 0:
            if wait > SHORT_WAIT_SECONDS:
                raise HubUnavailable(f"{hub}: its limit is used up, or it asked to wait; free in {wait:.0f} s", wait)
            time.sleep(wait)

    def _after(self, response: Any) -> None:
        """A 429 pauses everybody; no ``Retry-After`` reaches the client, which would keep to any."""
        asked = _retry_after(response)
        hub = self._hubs.get(response.request.url.netloc.decode())
        if response.status_code == 429 and hub is not None:
            self._pace.pause(hub, UNNAMED_PAUSE_SECONDS if asked is None else asked)
        if asked is not None and asked > LONGEST_PAUSE_SECONDS:
            response.headers["Retry-After"] = f"{LONGEST_PAUSE_SECONDS:.0f}"
            response.headers.pop("ratelimit", None)


def _committed_to(method: str, path: str) -> str | None:
    """The repository that a request commits to: POST /api/models/{namespace}/{name}/commit/{revision}."""
    parts = path.split("/")
    return "/".join(parts[3:5]) if method == "POST" and parts[1:2] == ["api"] and parts[5:6] == ["commit"] else None


@contextmanager
def hub_errors(thing: str) -> Iterator[None]:
    """Turn whatever a Hub call raises into this package's tree; ``thing`` names what was being done to what."""
    import httpx2
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except QuantmillError:
        raise
    except OfflineModeIsEnabled as error:
        raise HubRefused(
            f"{thing}: HF_HUB_OFFLINE is set, got {os.environ.get('HF_HUB_OFFLINE')!r}; unset it"
        ) from error
    except HfHubHTTPError as error:
        raise _from_status(error, thing) from error
    except HFValidationError as error:
        raise ZooError(f"{thing}: no valid name of a repository ({_brief(error)}); choose another") from error
    except NotASafetensorsRepoError as error:
        raise CheckpointError(f"{thing}: its safetensors have no usual names ({_brief(error)})") from error
    except (httpx2.HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError, LocalEntryNotFoundError) as error:
        raise HubUnavailable(f"{thing}: no usable answer from the Hub ({_brief(error)})") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(f"{thing}: no space left on the device; free some, or choose another --out") from error
        raise
    except RuntimeError as error:
        raise _from_runtime(error, thing) from error


def _from_runtime(error: RuntimeError, thing: str) -> Exception:
    """What a plain RuntimeError means: hf_xet, a client that another thread closed, or an upload's own error inside."""
    if type(error) is not RuntimeError:
        return error
    if isinstance(error.__cause__, Exception):
        try:
            with hub_errors(thing):
                raise error.__cause__
        except Exception as inner:
            return inner
    return HubUnavailable(f"{thing}: the upload broke off ({_brief(error)})")


def _from_status(error: Any, thing: str) -> QuantmillError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = error.response.status_code if error.response is not None else 0
    if isinstance(error, GatedRepoError):
        return HubRefused(f"{thing}: the repository is gated; accept its terms with the account of HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(f"{thing}: no such revision; name a branch, tag or commit of the repository")
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFound(f"{thing}: no such repository, or HF_TOKEN can't see it; check the name and the token")
    if status in (401, 403):
        return HubRefused(f"{thing}: refused ({status}); set HF_TOKEN to a token with write access to the namespace")
    if status in (408, 409, 412, 429) or status >= 500:
        return HubUnavailable(f"{thing}: the Hub answered {status}", _retry_after(error.response))
    return HubRefused(f"{thing}: the Hub answered {status} ({_brief(error)})")


def _retry_after(response: Any) -> float | None:
    """Seconds that an answer asks to wait: as a number, as a date, or in the Hub's ``ratelimit`` header."""
    from huggingface_hub.utils._http import parse_ratelimit_headers

    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        limit = parse_ratelimit_headers(response.headers)
        return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------ reading


def fetch(api: HfApi, repo_id: str, revision: str, allow_pickle: bool, offline: bool = False) -> Path:
    """A model's folder in the client's cache, downloaded at that commit; ``offline`` expects it to be there.

    What was downloaded stays when a download breaks off: the next attempt goes on from there.

    Raises:
        ModelNotFound, HubRefused, HubUnavailable, DiskFull: as ``hub_errors`` says.
    """
    skip = [pattern for pattern in NOT_FETCHED if not (allow_pickle and pattern in PICKLES)]
    with hub_errors(f"fetch {repo_id}@{revision[:12]}"):
        return Path(api.snapshot_download(repo_id, revision=revision, ignore_patterns=skip, local_files_only=offline))


def read_file(api: HfApi, repo_id: str, path: str, revision: str = "main") -> tuple[bytes, str] | None:
    """A small file's content now, never a cached copy, and the commit it's from; None if it isn't there."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    url = hf_hub_url(repo_id, path, revision=revision, endpoint=api.endpoint)
    with hub_errors(f"read {path} of {repo_id} on {api.endpoint}"):
        try:
            response = get_session().get(url, headers=build_hf_headers(token=api.token), follow_redirects=True)
            hf_raise_for_status(response)
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
        return bytes(response.content), str(response.headers.get("X-Repo-Commit", ""))


def read_manifest(api: HfApi, repo_id: str, revision: str = "main") -> tuple[Manifest, str] | None:
    """The manifest at a revision and its commit; None if there is none, or one of another schema."""
    found = read_file(api, repo_id, MANIFEST, revision)
    if found is None:
        return None
    try:
        return Manifest.model_validate_json(found[0]), found[1]
    except ValidationError:
        return None
