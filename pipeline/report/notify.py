"""Tell a webhook, and what plugins add, how a run ended; a failure to tell is reported and doesn't change the run."""

from __future__ import annotations

import copy
import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.report.results import Results
from workers.spec import plugins

ATTEMPTS, SECONDS = 3, 10.0
NOTIFIER_SECONDS = 30.0  # that one notifier of a plugin may take
LISTED = 20  # most artifacts listed in one message as not accepted


def message(results: Results, results_path: Path | None) -> dict[str, Any]:
    """The JSON content to post; chat services show ``text``. No path: nothing was started."""
    counts = Counter(entry.status for entry in results.artifacts)
    not_accepted = [entry for entry in results.artifacts if entry.status in ("rejected", "failed")]
    summary = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    lines = [f"quantmill {results.zoo}: {results.status}" + (f" ({summary})" if summary else "")]
    if results.error is not None:
        lines.append(f"{results.error.kind}: {results.error.message}")
    lines += [
        f"{entry.status}: {Path(entry.model).name} {entry.recipe}: {entry.reason}" for entry in not_accepted[:LISTED]
    ]
    return {
        "text": "\n".join(lines),
        "run_id": results.run_id,
        "zoo": results.zoo,
        "status": results.status,
        "started_at": results.started_at,
        "finished_at": results.finished_at,
        "artifacts": dict(counts),
        "not_accepted": [
            {"model": entry.model, "recipe": entry.recipe, "status": entry.status, "reason": entry.reason}
            for entry in not_accepted[:LISTED]
        ],
        "results": str(results_path) if results_path else None,
    }


def post(url: str, content: dict[str, Any], seconds: float = SECONDS) -> str | None:
    """Post the content, retrying a few times; returns the problem or None. Omits the URL, which is often a secret."""
    body, problem = json.dumps(content).encode(), ""
    for attempt in range(ATTEMPTS):
        time.sleep(attempt)
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
            with urllib.request.urlopen(request, timeout=seconds):
                return None
        except urllib.error.HTTPError as error:
            problem = f"it answered {error.code}"
            if error.code < 500 and error.code != 429:
                break
        except ValueError:
            return "webhook: not a URL that can be posted to; expected https://..."
        except OSError as error:
            problem = f"no answer ({type(error).__name__})"
    return f"webhook: {problem}; the run itself is not concerned"


def tell(content: dict[str, Any], seconds: float = NOTIFIER_SECONDS) -> list[str]:
    """Call the notifiers that plugins add, each in a thread of its own; returns the problems."""
    problems = []
    for name, where in plugins.NOTIFIERS.items():
        raised: list[str] = []
        arguments = (where, copy.deepcopy(content), raised)
        thread = threading.Thread(target=_call, args=arguments, name=f"notifier {name}", daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raised.append(f"it hasn't returned in {seconds:g} s")
        problems += [f"notifier {name!r}: {problem}; the run itself is not concerned" for problem in raised]
    return problems


def _call(where: str, content: dict[str, Any], raised: list[str]) -> None:
    try:
        plugins.resolved(where)(content)
    except Exception as error:  # a plugin raises whatever it likes
        raised.append(" ".join(str(error).split()) or type(error).__name__)
