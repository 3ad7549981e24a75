"""Submit, follow and cancel runs as Ray jobs. Submitting is idempotent.

A submission's name contains the hash of its content (zoo, files, code, --out), so that a repeated command finds the job
instead of starting another. The cluster makes the plan, as it has the Hub's token and the shared folders; the machine
that submits needs neither, and sends no token.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.submit.parcel import Parcel
from pipeline.submit.ray_jobs import JobsClient, RayJob
from pipeline.zoo.zoo import LOOPBACK, Zoo
from workers.errors import TransientError, ZooError
from workers.spec.base import canonical_json

PREFIX = "quantmill-"
ATTEMPTS = 4
POLL_SECONDS = 1.0
READ_RATE = 1e6  # bytes per second at most for polling a log, which is read whole each time
PATIENCE_SECONDS = 600.0  # longest time without an answer while a job is followed
LOG_SECONDS = 30.0  # longest wait for the log of a run that has ended
STOP_SECONDS = 60  # between SIGINT and SIGKILL
RUN_CODES = frozenset({0, 1, 2, 130})
FAILED, INTERRUPTED = 1, 130


@dataclass(frozen=True)
class Submission:
    """The submission id of a job on the cluster, and whether the job was running before (``attached``)."""

    name: str
    attached: bool


def check(zoo: Zoo, out: str) -> None:
    """Refuse what a cluster can't do.

    Raises:
        ZooError: the zoo publishes to the loopback Hub, or Ray would delete the output folder.
    """
    if zoo.publish and zoo.publish.endpoint == LOOPBACK:
        raise ZooError(
            "publish.endpoint: the loopback Hub lives on one machine, and a cluster's nodes can't reach it; name a Hub "
            "by its URL, a folder, or leave 'publish' out"
        )
    if not out.startswith(("/", "~/")):
        raise ZooError(
            f"--out: expected a folder on the cluster, from / or ~/ on, got {out!r}; a relative one would lie in the "
            "job's working directory, which Ray deletes"
        )


def command(parcel: Parcel, out: str, python: str) -> str:
    """The job's shell command, run in the unpacked parcel; ``exec`` makes signals and exit code the run's."""
    folder = f"~/{shlex.quote(out[2:])}" if out.startswith("~/") else shlex.quote(out)
    return (
        f"exec {shlex.quote(python)} -m pipeline.cli.in_job run {shlex.quote(parcel.zoo)} --out {folder} --address auto"
    )


def submit(head: JobsClient, zoo: Zoo, parcel: Parcel, out: str, python: str) -> Submission:
    """Start the run, unless the same one is pending or running.

    Every retry lists the jobs first, so that a job whose start request got no answer is found. After a run that has
    ended, a new one starts under the next name.

    Raises:
        TransientError: the head doesn't answer; the run may have been started, and submitting again is safe.
    """
    entrypoint = command(parcel, out, python)
    identity = canonical_json({"parcel": parcel.sha256(), "entrypoint": entrypoint})
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    base, requested, problem = f"{PREFIX}{zoo.name}-{fingerprint[:12]}", None, ""
    with tempfile.TemporaryDirectory(prefix="quantmill-") as folder:
        archive = Path(folder) / f"quantmill_{parcel.sha256()}.zip"
        parcel.write(archive)
        for attempt in range(ATTEMPTS):
            try:
                known = head.jobs()
                if requested and any(job.submission_id == requested for job in known):
                    return Submission(requested, attached=False)
                name, attached = choose(base, known)
                if attached:
                    return Submission(name, attached=True)
                request = _request(name, entrypoint, head.upload(archive), zoo.name, out, fingerprint)
                requested = name
                head.start(request)
                return Submission(name, attached=False)
            except TransientError as error:
                problem = str(error)
                time.sleep(2.0**attempt * POLL_SECONDS)
    raise TransientError(
        f"submit: the head fails to take the run ({problem}); whether it was started isn't known. Give the same "
        "command again: it starts nothing twice"
    )


def choose(base: str, known: Iterable[RayJob]) -> tuple[str, bool]:
    """The submission id to use (``base``, ``base-2``, ``base-3``, ...), and whether that job is pending or running."""
    numbered = re.compile(rf"{re.escape(base)}(?:-(\d+))?")
    earlier = [(match, job) for job in known if (match := numbered.fullmatch(job.submission_id or ""))]
    for match, job in earlier:
        if not job.ended:
            return match[0], True
    last = max((int(match[1] or 1) for match, _ in earlier), default=0)
    return (base if last == 0 else f"{base}-{last + 1}"), False


def _request(name: str, entrypoint: str, uri: str, zoo: str, out: str, fingerprint: str) -> dict[str, Any]:
    return {
        "submission_id": name,
        "entrypoint": entrypoint,
        "runtime_env": {
            "working_dir": uri,
            # Ray's job supervisor reads these; its defaults are SIGTERM, and SIGKILL after 3 s.
            "env_vars": {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
        },
        "metadata": {"zoo": zoo, "out": out, "fingerprint": fingerprint},
    }


def submitted(head: JobsClient) -> list[RayJob]:
    """The submitted runs that the cluster knows, newest first."""
    ours = [job for job in head.jobs() if (job.submission_id or "").startswith(PREFIX)]
    return sorted(ours, key=lambda job: job.start_time or 0, reverse=True)


def find(head: JobsClient, name: str) -> RayJob:
    """The submitted run of that name.

    Raises:
        ZooError: the head knows none.
    """
    job = head.job(name)
    if job is None:
        known = ", ".join(str(job.submission_id) for job in submitted(head)[:5]) or "none"
        raise ZooError(f"{head.address} knows no submitted run {name!r}, but of quantmill's: {known}")
    return job


def follow(head: JobsClient, name: str, write: Callable[[str], object], tell: Callable[[str], object]) -> RayJob:
    """Stream the run's output to ``write`` until it has ended, retrying lost connections; ``tell`` gets notices.

    Raises:
        TransientError: no answer for ``PATIENCE_SECONDS``, or the head, restarted, doesn't know the job any more.
    """
    shown, last_answer, outage_reported, job = 0, time.monotonic(), False, None
    while True:
        try:
            job = head.job(name)
            text = head.logs(name) if job else ""
        except TransientError as error:
            since = time.monotonic() - last_answer
            if job and job.ended and since > LOG_SECONDS:
                tell(f"{error}; the end of its log can't be had")
                return job
            if since > PATIENCE_SECONDS:
                raise TransientError(f"{error}; none for {since:.0f} s, the run may well go on") from error
            if not outage_reported:
                tell(f"{error}; trying again")
            outage_reported = True
            time.sleep(POLL_SECONDS)
            continue
        if job is None:
            raise TransientError(
                f"{head.address} doesn't know {name!r} any more, so its head was started anew; submit the zoo again: "
                "only what is missing is made"
            )
        last_answer, outage_reported = time.monotonic(), False
        write(text[shown:])
        shown = max(shown, len(text))
        if job.ended:
            return job
        time.sleep(max(POLL_SECONDS, len(text) / READ_RATE))


def cancel(head: JobsClient, name: str) -> RayJob:
    """Ask a run to end, and wait until it has written its results and ended. Does nothing to a run that has ended.

    Raises:
        ZooError: the head knows no such run.
        TransientError: the run doesn't end in time.
    """
    job = find(head, name)
    deadline = time.monotonic() + STOP_SECONDS + 30
    while not job.ended:
        head.stop(name)
        time.sleep(POLL_SECONDS)
        job = find(head, name)
        if time.monotonic() > deadline:
            raise TransientError(f"{name}: still {job.status} after {STOP_SECONDS + 30} s; cancel it again")
    return job


def row(job: RayJob) -> dict[str, object]:
    """The row of a submitted run in the table of ``quantmill status``."""
    begun, ended = job.start_time, job.end_time
    seconds = None if begun is None else (ended / 1000 if ended else time.time()) - begun / 1000
    return {
        "id": job.submission_id,
        "status": job.status.lower(),
        "exit code": exit_code(job) if job.ended else None,
        "started": None if begun is None else f"{datetime.fromtimestamp(begun / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}",
        "seconds": None if seconds is None else f"{seconds:.0f}",
        "out": (job.metadata or {}).get("out"),
    }


def exit_code(job: RayJob) -> int:
    """The run's exit code; 130 if it was cancelled, 1 if it died."""
    if job.status == "STOPPED":
        return INTERRUPTED
    if job.status == "SUCCEEDED":
        return 0
    code = job.driver_exit_code
    if code is None and (match := re.search(r"failed with exit code (-?\d+)", job.message or "")):
        code = int(match[1])
    return code if code in RUN_CODES and code else FAILED


def ending(job: RayJob) -> str:
    """Describe how a run ended."""
    if job.status != "FAILED" or job.driver_exit_code in RUN_CODES:
        return f"{job.submission_id}: {job.status.lower()}, exit code {exit_code(job)}"
    if job.driver_exit_code is not None:
        reason = f"its driver ended with {job.driver_exit_code}"
        if job.driver_exit_code == 127:
            reason += ": no such Python on the head; name it with --python"
    else:
        reason = (job.message or "no reason given").strip().splitlines()[0]
    return f"{job.submission_id}: failed, {reason}; submit the zoo again: only what is missing is made"
