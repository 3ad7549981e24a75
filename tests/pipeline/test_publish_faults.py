"""Publishing on a bad day, in small; tests/bench/bench_publish.py does it at length."""

from pathlib import Path

import pytest

from tests.bench import bench_publish
from tests.limits import SOON_SECONDS
from tests.pipeline.runs import wait_for


@pytest.mark.slow
def test_publishes_through_failing_requests_are_whole_and_single(tmp_path: Path) -> None:
    done = bench_publish.storm(tmp_path, repositories=4, revisions=5, share=0.1, seed=1)
    assert done.failed > 10, "the requests did fail"
    assert done.looks > 100, "the reader did look"
    assert (done.published, done.duplicates, done.torn, done.errors) == (20, 0, 0, ())


@pytest.mark.slow
def test_killed_publishers_are_completed_with_one_commit_each(tmp_path: Path) -> None:
    done = bench_publish.kill(tmp_path, kills=5, seed=1)
    assert done.had_finished < 5, "some died on their way"
    assert (done.completed, done.one_commit) == (5, 5)


def test_the_reader_would_see_a_torn_state(tmp_path: Path) -> None:
    """What the first test relies on: half an artifact on main, as upload_folder leaves it, doesn't pass unseen."""
    from pipeline.loopback import LoopbackHub
    from workers.transfer import hub

    one = bench_publish._artifact(tmp_path, 0, 0)
    with LoopbackHub(tmp_path / "hub") as server:
        api = hub.connect(server.endpoint)
        api.create_repo("acme/torn")
        with bench_publish.Reader(server.endpoint, {"acme/torn": [one]}) as reader:
            api.upload_file(path_or_fileobj=one.folder / "README.md", path_in_repo="README.md", repo_id="acme/torn")
            assert wait_for(lambda: bool(reader.torn), SOON_SECONDS)
    assert reader.torn[0] == "acme/torn: ['README.md']"
