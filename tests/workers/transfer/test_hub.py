"""The one client: its deadlines, its pace, its errors as ours."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pipeline.loopback import LoopbackHub
from pipeline.loopback.faults import Fault
from tests.workers.published import Faults
from workers.errors import CheckpointError, DiskFull, HubRefused, HubUnavailable, QuantmillError
from workers.spec.job import HubLimits
from workers.transfer import from_hub, hub
from workers.transfer.pace import LocalPace


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def server(tmp_path: Path, faults: Faults) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub", fault=faults) as server:
        yield server


@pytest.fixture
def api(server: LoopbackHub) -> Any:
    return hub.connect(server.endpoint, LocalPace())


def test_what_is_not_there_is_none(api: Any) -> None:
    assert from_hub.read_manifest(api, "acme/nothing") is None


def test_no_read_waits_for_ever(api: Any, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session

    monkeypatch.setattr(hub, "READ_SECONDS", 0.5)
    close_session()  # the next client gets the new deadline
    faults.plan = [("/config.json", 1, Fault(delay=5.0))]
    with pytest.raises(HubUnavailable, match="Timeout"):
        from_hub.read_file(api, "acme/model", "config.json")
    monkeypatch.undo()
    close_session()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"Retry-After": "7"}, 7), ({"Retry-After": "86400"}, 300), ({"ratelimit": '"api";r=0;t=55'}, 55), ({}, None)],
)
def test_what_a_hub_asks_to_wait_is_told_within_a_bound(
    api: Any, faults: Faults, headers: dict[str, str], seconds: float | None
) -> None:
    faults.plan = [("/config.json", 1, Fault(status=429, headers=headers))]
    with pytest.raises(HubUnavailable, match="429") as caught:
        from_hub.read_file(api, "acme/model", "config.json")
    assert caught.value.retry_after == seconds


def test_a_429_pauses_whoever_shares_the_pace(server: LoopbackHub, faults: Faults) -> None:
    pace = LocalPace()
    api = hub.connect(server.endpoint, pace)
    faults.plan = [("/config.json", 1, Fault(status=429, headers={"Retry-After": "40"}))]
    with pytest.raises(HubUnavailable):
        from_hub.read_file(api, "acme/model", "config.json")
    assert 10 < pace.ask(server.endpoint, None) <= 40
    seen = len(faults.seen)
    with pytest.raises(HubUnavailable, match="asked to wait") as caught:
        from_hub.read_file(api, "acme/other", "config.json")
    assert caught.value.retry_after == pytest.approx(40, abs=30)
    assert len(faults.seen) == seen, "nothing was sent"


def test_requests_and_commits_are_counted(server: LoopbackHub) -> None:
    pace = LocalPace(HubLimits(requests=20, files=20, commits_to_a_repository=1))
    api = hub.connect(server.endpoint, pace)
    api.create_repo("acme/model")
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="acme/model")
    with pytest.raises(HubUnavailable, match="limit is used up") as caught:
        api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="acme/model")
    assert caught.value.retry_after == pytest.approx(3600, abs=60)
    while pace.ask(server.endpoint, None) == 0:
        pass
    assert from_hub.read_file(api, "acme/model", "a.txt"), "files are counted apart"
    while pace.ask(server.endpoint, None, file=True) == 0:
        pass
    with pytest.raises(HubUnavailable, match="limit is used up"):
        from_hub.read_file(api, "acme/model", "a.txt")


@pytest.mark.parametrize(
    ("raised", "meant"),
    [
        (RuntimeError("xet: connection lost"), HubUnavailable),
        (ConnectionError("reset"), HubUnavailable),
        (httpx2.ReadTimeout("slow"), HubUnavailable),
        (OSError(errno.ENOSPC, "full"), DiskFull),
        (CheckpointError("ours"), CheckpointError),
        (NotImplementedError("a bug"), NotImplementedError),
    ],
)
def test_what_calls_raise_becomes_ours(raised: Exception, meant: type[Exception]) -> None:
    with pytest.raises(meant), hub.hub_errors("x"):
        raise raised


def test_an_upload_tells_what_is_inside_its_error() -> None:
    """huggingface_hub wraps whatever one upload raises into a RuntimeError."""
    with pytest.raises(QuantmillError, match="permission") as caught, hub.hub_errors("x"):
        raise RuntimeError("Error while uploading") from HubRefused("no permission")
    assert isinstance(caught.value, HubRefused)


def test_offline_is_said_to_be_so(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    with pytest.raises(HubRefused, match="HF_HUB_OFFLINE"):
        from_hub.read_file(api, "acme/model", "config.json")
