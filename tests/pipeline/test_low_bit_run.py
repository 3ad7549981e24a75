"""A low-bit source from the zoo file to what is published, as users run it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.runs import by_key, run, write_zoo
from tests.workers.fused import save_gpt_oss


@pytest.mark.night
def test_gpt_oss_is_published_from_its_mxfp4_checkpoint(tmp_path: Path) -> None:
    model = save_gpt_oss(tmp_path / "gpt-oss-tiny")
    zoo = write_zoo(tmp_path, [str(model)], "gptq-w4-g128, fp8-dynamic, nvfp4, mxfp4")
    code, output, results = run(zoo, tmp_path / "runs")
    assert code == 0, output
    artifacts = by_key(results)
    assert len(artifacts) == 4
    for (_, name), entry in artifacts.items():
        assert entry["status"] == "published", (name, entry["reason"], entry["error"])
        assert entry["runtime"]["name"] == "transformers"
        assert any("what it decodes to" in line for line in entry["fallbacks"])
