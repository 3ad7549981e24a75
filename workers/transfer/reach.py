"""Checks within seconds that anything answers at a Hub's address; whatever it answers is an answer. No torch."""

from __future__ import annotations

import ssl
import threading
import time
import urllib.error
import urllib.request
from queue import Empty, SimpleQueue

from workers.errors import HubUnavailable

# Seconds for all attempts together, for one of them, and between two.
REACH_SECONDS, ATTEMPT_SECONDS, PAUSE_SECONDS = 25.0, 8.0, 1.0


def check(endpoint: str, named_by: str, seconds: float | None = None) -> None:
    """Ask for the first page of ``endpoint`` until anything answers, for ``seconds`` at most.

    ``named_by`` is the setting that has the address, for the message. Proxies of the environment are used.

    Raises:
        HubUnavailable: nothing answers: no such host, a refused connection, or silence.
    """
    seconds = REACH_SECONDS if seconds is None else seconds
    until, problem = time.monotonic() + seconds, "no answer"
    while (left := until - time.monotonic()) > 0:
        outcome = _bounded(endpoint, min(left, ATTEMPT_SECONDS))
        if outcome is None:
            return
        problem = outcome
        time.sleep(max(0.0, min(PAUSE_SECONDS, until - time.monotonic())))
    raise HubUnavailable(
        f"{named_by}: nothing answers at {endpoint!r}, tried for {seconds:.0f} s ({problem}); check the address and "
        "the network, and run the zoo again"
    )


def _bounded(endpoint: str, seconds: float) -> str | None:
    """What went wrong in one attempt, None if something answered; a name's look-up has no timeout of its own."""
    outcomes: SimpleQueue[str | None] = SimpleQueue()

    def work() -> None:
        try:
            _attempt(endpoint, seconds)
            outcomes.put(None)
        except Exception as error:
            outcomes.put(None if _answered(error) else _brief(error))

    threading.Thread(target=work, name=f"reach {endpoint}", daemon=True).start()
    try:
        return outcomes.get(timeout=seconds + 1)
    except Empty:
        return "no answer"


def _attempt(endpoint: str, seconds: float) -> None:
    request = urllib.request.Request(f"{endpoint}/", method="HEAD", headers={"User-Agent": "quantmill"})
    with urllib.request.urlopen(request, timeout=seconds):
        pass


def _answered(error: Exception) -> bool:
    """Whether an error shows that something is there: an HTTP status, another protocol, a connection that breaks off.

    A URL that can't be asked is left to the client, which names what is wrong with it.
    """
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, urllib.error.HTTPError) or isinstance(reason, ssl.SSLError):
        return True
    return not isinstance(reason, OSError) or isinstance(reason, ConnectionResetError | BrokenPipeError)


def _brief(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return "no answer" if isinstance(reason, TimeoutError) else str(reason)
