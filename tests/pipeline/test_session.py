"""The output folder: who holds it, and what is cleared from it before a run."""

import os
import time
from pathlib import Path

from pipeline import session


def test_passes_that_nobody_takes_up_are_cleared_after_a_week(tmp_path: Path) -> None:
    for name, days in (("old", 8), ("new", 6)):
        folder = tmp_path / "passes" / name
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        then = time.time() - days * 24 * 3600
        for path in (folder / "state.json", folder):
            os.utime(path, (then, then))
    with session._alone_in(tmp_path):
        assert [path.name for path in (tmp_path / "passes").iterdir()] == ["new"]
