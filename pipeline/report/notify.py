"""Post a run's outcome to a webhook; a failure to post is reported and doesn't change the run's status."""

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
