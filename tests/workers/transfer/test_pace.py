"""Pure decisions of publishing: how fast, how long, and under which names."""

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import HubUnavailable
from workers.spec.job import HubLimits
from workers.transfer.pace import Counters, LocalPace, Window
from workers.transfer.patience import Patience
from workers.transfer.revisions import day_tag, stale

HUB = "https://hub"


@given(
    limit=st.integers(1, 5),
    seconds=st.integers(1, 20),
    arrivals=st.lists(st.integers(0, 100), max_size=40).map(sorted),
)
def test_no_window_ever_holds_more_than_its_limit(limit: int, seconds: int, arrivals: list[int]) -> None:
    window = Window(limit, seconds)
    taken: list[float] = []
    for now in arrivals:
        if window.wait(now) == 0:
            window.take(now)
            taken.append(now)
        else:
            # And the wait isn't longer than needed: by then there is room, just before there isn't.
            oldest = taken[-limit]
            assert now + window.wait(now) == oldest + seconds
    for start in taken:
        assert sum(start <= at < start + seconds for at in taken) <= limit


def test_a_permit_is_counted_in_all_windows_or_in_none() -> None:
    counters = Counters(HubLimits(requests=3, commits_to_a_repository=1, commits=2))
    assert counters.ask(HUB, "a/b", 0) == 0
    assert counters.ask(HUB, "a/b", 1) == 3599  # of this repository's hour
    assert counters.ask(HUB, "a/c", 2) == 0
    assert counters.ask(HUB, "a/d", 3) == 3597  # of all commits' hour
    assert counters.ask(HUB, None, 4) == 0, "refused ones didn't count as requests"
    assert counters.ask(HUB, None, 5) == 295
    assert counters.ask("https://other", "a/b", 5) == 0, "each Hub has its own"
    assert counters.ask(HUB, None, 300) == 0


def test_files_have_a_limit_of_their_own() -> None:
    counters = Counters(HubLimits(requests=1, files=2))
    assert [counters.ask(HUB, None, 0), counters.ask(HUB, None, 1)] == [0, 299]
    assert [counters.ask(HUB, None, at, file=True) for at in (0, 1, 2)] == [0, 0, 298]


def test_a_pause_holds_everybody_and_a_shorter_one_does_not_end_it() -> None:
    counters = Counters(HubLimits())
    counters.pause(HUB, until=50)
    counters.pause(HUB, until=10)
    assert counters.ask(HUB, None, 20) == 30
    assert counters.ask("https://other", None, 20) == 0
    assert counters.ask(HUB, None, 50) == 0


def test_a_pause_of_a_day_is_not_taken() -> None:
    now = [0.0]
    pace = LocalPace(clock=lambda: now[0])
    pace.pause(HUB, 86400)
    assert pace.ask(HUB, None) == 300
    now[0] = 301
    assert pace.ask(HUB, None) == 0


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def failing(times: int, retry_after: float | None = None) -> object:
    left = [times]

    def action() -> str:
        if left[0]:
            left[0] -= 1
            raise HubUnavailable("503", retry_after)
        return "done"

    return action


def patience(clock: Clock, seconds: float = 1800, jitter: float = 1.0) -> Patience:
    return Patience(seconds, clock=clock, sleep=clock.sleep, jitter=lambda: jitter)


def test_waits_double_up_to_a_bound() -> None:
    clock = Clock()
    assert patience(clock).call("x", failing(7)) == "done"  # type: ignore[arg-type]
    assert clock.slept == [1, 2, 4, 8, 16, 30, 30]


def test_jitter_takes_up_to_half_of_a_wait_away() -> None:
    clock = Clock()
    patience(clock, jitter=0.0).call("x", failing(3))  # type: ignore[arg-type]
    assert clock.slept == [0.5, 1, 2]


@pytest.mark.parametrize(("asked", "slept"), [(20, 20), (3600, 300)])
def test_what_the_hub_asks_for_is_kept_to_up_to_a_bound(asked: float, slept: float) -> None:
    clock = Clock()
    patience(clock).call("x", failing(1, asked))  # type: ignore[arg-type]
    assert clock.slept == [slept]


def test_the_deadline_is_one_for_all_calls_and_never_slept_past() -> None:
    clock = Clock()
    waiting = patience(clock, seconds=20)
    waiting.call("first", failing(3))  # type: ignore[arg-type]
    with pytest.raises(HubUnavailable, match="503; given up after 4 attempts, for 20 s in all are over"):
        waiting.call("second", failing(9))  # type: ignore[arg-type]
    assert clock.now <= 20


def test_other_errors_are_not_tried_again() -> None:
    calls = []

    def action() -> None:
        calls.append(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        patience(Clock()).call("x", action)
    assert len(calls) == 1


def test_the_tag_of_a_day_counts_up() -> None:
    today = date(2026, 11, 21)
    assert day_tag([], today) == "2026-11-21"
    assert day_tag(["2026-11-21", "2026-11-20"], today) == "2026-11-21.2"
    assert day_tag(["2026-11-21", "2026-11-21.2"], today) == "2026-11-21.3"


def revisions(count: int) -> dict[str, str]:
    """As many revisions of one day, each with its two tags."""
    tags = {}
    for number in range(1, count + 1):
        tags["2026-11-21" if number == 1 else f"2026-11-21.{number}"] = f"c{number}"
        tags[f"quantmill-{number:012x}"] = f"c{number}"
    return tags


@pytest.mark.parametrize("keep", [1, 3, 11])
def test_the_newest_are_kept_and_ten_comes_after_two(keep: int) -> None:
    tags = revisions(12)
    left = set(tags) - set(stale(tags, "c12", keep))
    assert {tags[name] for name in left} == {f"c{number}" for number in range(13 - keep, 13)}
    assert len(left) == 2 * keep


def test_the_current_one_stays_however_old() -> None:
    tags = revisions(5)
    assert {tags[name] for name in set(tags) - set(stale(tags, "c1", 2))} == {"c1", "c5"}


def test_without_a_rule_and_of_other_people_nothing_goes() -> None:
    tags = {**revisions(3), "v1": "c1", "2020-01-01": "x", "quantmill-latest": "c1"}
    assert stale(tags, "c3", None) == []
    assert {"v1", "2020-01-01", "quantmill-latest"}.isdisjoint(stale(tags, "c3", 1))
