"""Tell a webhook how a run ended; what goes wrong with that is told, and changes nothing."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.report.results import Results

ATTEMPTS, SECONDS = 3, 10.0
NAMED = 20  # artifacts that weren't accepted, in one message


def message(results: Results, place: Path) -> dict[str, Any]:
    """What is posted as JSON; chat services show ``text``."""
    counts = Counter(entry.status for entry in results.artifacts)
    bad = [entry for entry in results.artifacts if entry.status in ("rejected", "failed")]
    said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    lines = [f"quantmill {results.zoo}: {results.status} ({said})"]
    lines += [f"{entry.status}: {Path(entry.model).name} {entry.recipe}: {entry.reason}" for entry in bad[:NAMED]]
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
            for entry in bad[:NAMED]
        ],
        "results": str(place),
    }


def post(url: str, content: dict[str, Any], seconds: float = SECONDS) -> str | None:
    """Post it, in a few attempts; what went wrong in words, without the URL, which is often a secret."""
    body, said = json.dumps(content).encode(), ""
    for attempt in range(ATTEMPTS):
        time.sleep(attempt)
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
            with urllib.request.urlopen(request, timeout=seconds):
                return None
        except urllib.error.HTTPError as error:
            said = f"it answered {error.code}"
            if error.code < 500 and error.code != 429:
                break
        except ValueError:
            return "webhook: not a URL that can be posted to; expected https://..."
        except OSError as error:
            said = f"no answer ({type(error).__name__})"
    return f"webhook: {said}; the run itself is not concerned"
