"""Small artifacts to publish, how tests publish them, and a fault function for the loopback Hub."""

from __future__ import annotations

import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

from pipeline.loopback.faults import Fault, FaultRequest
from pipeline.zoo.shipped import recipe
from tests.limits import TEST_SECONDS
from workers.machine.files import file_sha256
from workers.spec.data import Dataset, Verification
from workers.spec.job import Destination, FileEntry, Manifest, Metrics, Thresholds, Verdict
from workers.spec.workspace import MANIFEST
from workers.transfer import to_hub
from workers.transfer.artifact import open_accepted
from workers.transfer.patience import Patience

DAY = date(2026, 11, 21)
ACCEPTED = {"accepted": True, "reasons": (), "outcome": "ACCEPT"}
REJECTED = {"accepted": False, "reasons": ("KL too high",), "outcome": "REGRESSION"}


def artifact(folder: Path, text: str = "one", fingerprint: str = "f" * 64, *, accepted: bool = True) -> Path:
    """Write an artifact with files for git and for LFS, and its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n{text}")
    (folder / "model.safetensors").write_bytes(text.encode() * 1000)
    return seal(folder, fingerprint, accepted=accepted)


def seal(
    folder: Path,
    fingerprint: str = "f" * 64,
    *,
    accepted: bool = True,
    model: str = "org/model",
    name: str = "bnb-nf4",
    metrics: Metrics | None = None,
) -> Path:
    """Write the manifest of a folder's files, as made of a model by the shipped recipe ``name``."""
    files = [path for path in folder.iterdir() if path.name != MANIFEST]
    manifest = Manifest(
        fingerprint=fingerprint,
        model=model,
        revision="r",
        recipe=recipe(name),
        calibration=None,
        verification=Verification(dataset=Dataset(path="text")),
        thresholds=Thresholds(kl_mean=1, top1_agreement=0.5, perplexity_ratio=2, runtime_logit_difference=1),
        files={path.name: FileEntry(sha256=file_sha256(path), size=path.stat().st_size) for path in files},
        verdict=Verdict.model_validate({**(ACCEPTED if accepted else REJECTED), "metrics": metrics}),
        environment={},
        fallbacks=(),
        bytes=1,
        reference_bytes=2,
        created_at="now",
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


def publish_to(
    repo: str, api: Any, folder: Path, day: date = DAY, patience: Patience | None = None, **terms: Any
) -> str:
    """Publish an artifact; waits as it would, ten times as fast. Returns the commit."""
    to = Destination(endpoint=api.endpoint, **terms)
    patience = patience or Patience(TEST_SECONDS, sleep=lambda seconds: time.sleep(seconds / 10), jitter=lambda: 0.0)
    return to_hub.publish(api, repo, open_accepted(folder), to, patience=patience, today=lambda: day)


def commits_of(repo: str, api: Any) -> int:
    """The number of our commits: the first one is the Hub's own."""
    return len(api.list_repo_commits(repo)) - 1


def tags_of(repo: str, api: Any) -> dict[str, str]:
    """The commits of a repository's tags."""
    return {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}


class Faults:
    """Fault function: ``plan`` has (part of a path, number of failures, fault); ``seen`` records all requests."""

    def __init__(self) -> None:
        self.plan: list[tuple[str, int, Fault]] = []
        self.seen: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, request: FaultRequest) -> Fault | None:
        with self._lock:
            self.seen.append(f"{request.method} {request.path}")
            for index, (part, left, fault) in enumerate(self.plan):
                if part in request.path and left:
                    self.plan[index] = (part, left - 1, fault)
                    return fault
        return None
