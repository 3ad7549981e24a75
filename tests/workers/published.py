"""A small artifact to publish, and a fault function for the loopback Hub."""

from __future__ import annotations

import threading
from pathlib import Path

from pipeline.loopback.faults import Fault, FaultRequest
from pipeline.zoo.shipped import recipe
from workers.machine.files import file_sha256
from workers.spec.job import Dataset, FileEntry, Manifest, Thresholds, Verdict, Verification
from workers.spec.workspace import MANIFEST

ACCEPTED = {"accepted": True, "reasons": (), "outcome": "ACCEPT"}
REJECTED = {"accepted": False, "reasons": ("KL too high",), "outcome": "REGRESSION"}


def artifact(folder: Path, text: str = "one", fingerprint: str = "f" * 64, *, accepted: bool = True) -> Path:
    """Write an artifact with files for git and for LFS, and its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n{text}")
    (folder / "model.safetensors").write_bytes(text.encode() * 1000)
    return seal(folder, fingerprint, accepted=accepted)


def seal(folder: Path, fingerprint: str = "f" * 64, *, accepted: bool = True) -> Path:
    """Write the manifest of a folder's files."""
    files = [path for path in folder.iterdir() if path.name != MANIFEST]
    manifest = Manifest(
        fingerprint=fingerprint,
        model="org/model",
        revision="r",
        recipe=recipe("bnb-nf4"),
        calibration=None,
        verification=Verification(dataset=Dataset(path="text")),
        thresholds=Thresholds(kl_mean=1, top1_agreement=0.5, perplexity_ratio=2, runtime_logit_difference=1),
        files={path.name: FileEntry(sha256=file_sha256(path), size=path.stat().st_size) for path in files},
        verdict=Verdict.model_validate(ACCEPTED if accepted else REJECTED),
        environment={},
        fallbacks=(),
        bytes=1,
        reference_bytes=2,
        created_at="now",
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


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
