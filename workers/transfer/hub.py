"""The Hub client: deadlines, rate limits, error translation, model downloads, manifests. No torch; the driver uses it.

It compensates for huggingface_hub's own behaviour: it retries uploads and listings, but raises on the first 503 of
create_repo, create_commit, create_tag and model_info; its default client has no timeout, and waits as long as a
``Retry-After`` header says.
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
from typing import TYPE_CHECKING, Any

from workers.errors import (
    CheckpointError,
    DiskFull,
    HubRefused,
    HubUnavailable,
    ModelNotFound,
    QuantmillError,
    ZooError,
)
from workers.transfer.artifact import check_bytes as check_bytes
from workers.transfer.pace import LONGEST_PAUSE_SECONDS, UNNAMED_PAUSE_SECONDS, LocalPace, Pace

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OFFICIAL = "https://huggingface.co"
READ_SECONDS = 60.0
# Maximum wait in seconds for a permit inside a call; for longer waits the caller decides.
SHORT_WAIT_SECONDS = 10.0
# Files that the Hub itself writes into every new repository.
HUB_OWN_FILES = frozenset({".gitattributes"})


def default_endpoint() -> str:
    """``HF_ENDPOINT``, or the public Hub."""
    return os.environ.get("HF_ENDPOINT", OFFICIAL).rstrip("/")


def normalized(endpoint: str | None) -> str:
    """A destination's normalized address, for comparing and display; the default endpoint if None."""
    if endpoint is None:
        return default_endpoint()
    return endpoint if endpoint.endswith("://") else endpoint.rstrip("/")


def connect(endpoint: str | None = None, pace: Pace | None = None) -> HfApi:
    """A client of a Hub with a read timeout. The token is the environment's, or the stored login's.

    Every request of this process asks ``pace`` for a permit; None keeps the pace set before, or the process's own.
    """
    endpoint = (endpoint or default_endpoint()).rstrip("/")
    # Set before the import, at which huggingface_hub reads it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, constants

    if endpoint != OFFICIAL and "HF_HUB_DISABLE_XET" not in os.environ:
        # Self-hosted Hubs speak LFS, and huggingface_hub 2.x doesn't negotiate. The constant is read for each transfer,
        # so it also applies if the public Hub was used first; the environment variable is for child processes.
        constants.HF_HUB_DISABLE_XET = True
        os.environ["HF_HUB_DISABLE_XET"] = "1"
    _meter().watch(endpoint, pace)
    return HfApi(endpoint=endpoint, library_name="quantmill")


@cache
def _meter() -> _Meter:
    """Created once per process: setting the factory closes the client that other threads are using."""
    from huggingface_hub import set_client_factory

    meter = _Meter()
    set_client_factory(meter.client)
    return meter


class _Meter:
    """Hooks into every request and response of huggingface_hub's shared client."""

    def __init__(self) -> None:
        self._pace: Pace = LocalPace()
        self._hubs: dict[str, str] = {}

    def watch(self, endpoint: str, pace: Pace | None) -> None:
        """Count the requests to a Hub; its storage, on other hosts, has its own limits."""
        import httpx2

        self._hubs[httpx2.URL(endpoint).netloc.decode()] = endpoint
        self._pace = pace or self._pace

    def client(self) -> Any:
        """Client factory for huggingface_hub."""
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
        while (wait := self._pace.ask(hub, _committed_repository(request.method, path), file="/resolve/" in path)) > 0:
            if wait > SHORT_WAIT_SECONDS:
                raise HubUnavailable(f"{hub}: its limit is used up, or it asked to wait; free in {wait:.0f} s", wait)
            time.sleep(wait)

    def _after(self, response: Any) -> None:
        """Pause all callers after a 429, and cap ``Retry-After``, which the client would follow without a limit."""
        retry_after = _retry_after(response)
        hub = self._hubs.get(response.request.url.netloc.decode())
        if response.status_code == 429 and hub is not None:
            self._pace.pause(hub, UNNAMED_PAUSE_SECONDS if retry_after is None else retry_after)
        if retry_after is not None and retry_after > LONGEST_PAUSE_SECONDS:
            response.headers["Retry-After"] = f"{LONGEST_PAUSE_SECONDS:.0f}"
            response.headers.pop("ratelimit", None)


def _committed_repository(method: str, path: str) -> str | None:
    """The repository that a request commits to: POST /api/models/{namespace}/{name}/commit/{revision}."""
    parts = path.split("/")
    return "/".join(parts[3:5]) if method == "POST" and parts[1:2] == ["api"] and parts[5:6] == ["commit"] else None


@contextmanager
def hub_errors(thing: str) -> Iterator[None]:
    """Translate exceptions of a Hub call into this package's errors; ``thing`` names the action and its object."""
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
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise HubRefused(f"{thing}: not the address of a Hub ({_brief(error)}); set HF_ENDPOINT to its URL") from error
    except (httpx2.ConnectError, httpx2.ConnectTimeout, ConnectionRefusedError) as error:
        raise HubUnavailable(
            f"{thing}: nothing answers at that address ({_plain(error)}); check the network and HF_ENDPOINT, or "
            "name a local folder or file instead",
            reached=False,
        ) from error
    except (httpx2.HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError, LocalEntryNotFoundError) as error:
        raise HubUnavailable(f"{thing}: no usable answer from the Hub ({_brief(error)})") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(f"{thing}: no space left on the device; free some, or choose another --out") from error
        raise
    except RuntimeError as error:
        raise _from_runtime(error, thing) from error


def _from_runtime(error: RuntimeError, thing: str) -> Exception:
    """Translate a plain RuntimeError: hf_xet's, a client closed by another thread, or an upload's wrapped error."""
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
    """Requested wait in seconds: ``Retry-After`` as a number or date, or the Hub's ``ratelimit`` header."""
    from huggingface_hub.utils._http import parse_ratelimit_headers

    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        limit = parse_ratelimit_headers(response.headers)
        return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def _plain(error: Exception) -> str:
    """The system's own words for a failed connection."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no answer"


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
