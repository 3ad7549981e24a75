"""The report of a night: what needs a look comes first; it is read on a phone, in the dark, at a thousand rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli.main import main
from pipeline.ending import write_report
from pipeline.report import night
from pipeline.report.logbook import LOG
from pipeline.report.results import Results
from tests.pipeline.report import browser, nights

BROWSER = pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six good nights and a bad one, of a few models."""
    folder = tmp_path_factory.mktemp("nights")
    for number in range(6):
        nights.write(folder, 12, number=number)
    faults = {index % 12: fault for index, fault in nights.FAULTS.items()}
    write_report(nights.write(folder, 12, number=6, faults=faults, drifted=2))
    return folder


def read(out: Path, number: int = 6) -> night.Night:
    folder = sorted(path for path in out.iterdir() if path.is_dir())[number]
    return night.about(Results.model_validate_json((folder / night.RESULTS).read_text()), folder)


def test_what_went_wrong_is_told_with_where_why_and_what_next(out: Path) -> None:
    found = {problem.kind: problem for problem in read(out).problems}
    assert list(found) == ["HubUnavailable", "OutOfMemory", "REGRESSION"]
    hub, memory, bad = found.values()
    assert (memory.stage, hub.stage, bad.status) == ("quantize", "publish", "rejected")
    assert memory.nodes[0].startswith("gpu-")
    assert memory.attempts == 3
    assert memory.excerpt.endswith("MemoryError")
    assert bad.command == f"quantmill verify {bad.files[0]} --reference acme/model-003"
    assert "run" in hub.command


def test_failures_for_one_reason_are_one_problem(tmp_path: Path) -> None:
    def lacks(index: int) -> dict[str, str]:
        said = f"models: 'acme/model-{index:03}': no tensors for layer {index}"
        return {"status": "failed", "kind": "CheckpointError", "message": said}

    folder = nights.write(tmp_path, 9, faults={index: lacks(index) for index in range(7)})
    (problem,) = night.about(Results.model_validate_json((folder / night.RESULTS).read_text()), folder).problems
    assert len(problem.artifacts) == 7
    page = write_report(folder).read_text()
    assert "7 artifacts, model-000 gptq-w4-g128 among them" in page


def test_what_changed_since_the_run_before_is_named(out: Path) -> None:
    changes = {change.kind: change.artifacts for change in read(out).changes}
    assert changes["newly failing"] == ("model-003 gptq-w4-g128", "model-004 gptq-w4-g128", "model-007 gptq-w4-g128")
    assert [one.partition(" (")[0] for one in changes["farther from its source"]] == [
        f"model-002 {recipe}" for recipe in nights.RECIPES
    ]
    assert read(out, 1).changes == ()
    back = {change.kind for change in night.compared(read(out).results, read(out, 5).results)}
    assert back == {"mended", "nearer to its source"}


def test_nights_of_the_zoo_are_counted(out: Path) -> None:
    rows = read(out).history
    assert [row.bad for row in rows] == [0] * 6 + [3]
    assert [row.made for row in rows] == [36] * 6 + [33]
    assert all(row.hours == pytest.approx(12 * 390 / 3600) for row in rows)
    assert read(out, 0).before is None


def test_a_log_that_a_crash_has_cut_is_read_as_far_as_it_goes(out: Path, tmp_path: Path) -> None:
    folder = nights.write(tmp_path, 2)
    lines = (folder / LOG).read_text().splitlines()
    (folder / LOG).write_text("\n".join(["", "{", "null", json.dumps({"event": "ended"}), *lines[:3], lines[3][:40]]))
    results = Results.model_validate_json((folder / night.RESULTS).read_text())
    assert len(night.about(results, folder).steps) == 3
    write_report(folder)
    (folder / LOG).unlink()
    assert night.about(results, folder).steps == ()
    write_report(folder)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(1e-6, 1)), max_size=12), st.floats(1e-4, 0.5))
def test_the_frontier_holds_what_no_smaller_one_beats(points: list[tuple[int, float]], most: float) -> None:
    whole = nights.artifacts_of(points)
    line = night.frontier(whole)
    for one in whole:
        beaten = any(
            other.bytes <= one.bytes and other.metrics.kl_mean < one.metrics.kl_mean
            for other in whole
            if other.metrics and one.metrics
        )
        assert beaten or any(other.bytes <= one.bytes and other.metrics == one.metrics for other in line)
    best = night.recommended(whole, most)
    assert (best is None) == (not whole)
    if best is not None and best.metrics is not None:
        within = [one.bytes for one in whole if one.metrics and one.metrics.kl_mean <= most]
        assert best.bytes == min(within) if within else best.metrics.kl_mean == min(points, key=lambda p: p[1])[1]


@BROWSER
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (1100, 800), (900, 700), (390, 844), (2560, 1400)])
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_read_on_any_screen(out: Path, width: int, height: int, dark: bool) -> None:
    (page,) = out.glob("*/report.html")
    found = browser.measured(page, width, height, dark=dark, search="model-003 fp8")
    assert found["overflow"] <= 0
    assert found["narrowest"] >= 60, "a column of single letters"
    assert found["low"] == []
    assert found["sorted"]["left"] == 1
    numbers = [float(value) for value in found["sorted"]["column"] if value]
    assert numbers == sorted(numbers)
    assert len(numbers) == 34, "two failed before they were measured"
    assert "calibration tokens of experts: 6 at least" in page.read_text()
    if width >= 1280:
        assert found["problems"] < 900, "three problems are told within one screen"


@BROWSER
@pytest.mark.night
def test_a_thousand_artifacts_sort_without_lag(tmp_path: Path) -> None:
    page = write_report(nights.write(tmp_path, 334, faults=nights.FAULTS))
    found = browser.measured(page, 1280, 900, search="model-33")
    assert found["overflow"] <= 0
    assert found["sorted"]["left"] == 4 * 3
    assert found["sorted"]["milliseconds"] < 1500


def test_two_runs_are_compared_and_nights_listed_on_the_command_line(out: Path) -> None:
    before, now = sorted(path.name for path in out.iterdir() if path.is_dir())[-2:]
    said = CliRunner().invoke(main, ["report", now, "--compare", before, "--out", str(out)])
    assert said.exit_code == 0, said.output
    assert "newly failing: 3" in said.output
    assert "  model-003 gptq-w4-g128" in said.output
    asked = ["report", now, "--compare", now, "--out", str(out)]
    assert "nothing is otherwise" not in CliRunner().invoke(main, asked).output, "three still fail"
    rows = json.loads(CliRunner().invoke(main, ["report", "--history", "--json", "--out", str(out)]).output)
    assert [row["bad"] for row in rows] == [0] * 6 + [3]
    assert "median KL" in CliRunner().invoke(main, ["report", "--history", "--out", str(out)]).output


def test_results_of_another_version_are_named(tmp_path: Path) -> None:
    folder = nights.write(tmp_path, 1)
    path = folder / night.RESULTS
    path.write_text(path.read_text().replace('"schema_version":1', '"schema_version":9'))
    with pytest.raises(ValueError, match="results of schema version 9, and this quantmill reads 1"):
        write_report(folder)
