"""Talking with a checkpoint on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from tests.pipeline.cli.terminal import quantmill
from tests.workers.jobs import ZOO

MODELS = ZOO / "models"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2-tiny"])
def test_prompts_are_answered_one_line_each(model: str, tmp_path: Path) -> None:
    asked = ["chat", str(MODELS / model), "--prompt", "import os", "--prompt", "def add(a, b):", "--tokens", "8"]
    said = quantmill(*asked, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("\n") >= 2
    assert len(said.stdout.strip()) > 8
    assert "Traceback" not in said.stderr


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    said = CliRunner().invoke(main, ["chat", "nowhere"])
    assert said.exit_code == 2
    assert "no such folder, got 'nowhere'; give a folder" in said.output
    (tmp_path / "model.gguf").touch()
    said = CliRunner().invoke(main, ["chat", str(tmp_path)])
    assert f"llama-cli -m {tmp_path}/model.gguf" in said.output
    (tmp_path / "model.gguf").unlink()
    (tmp_path / "config.json").write_text("{")
    said = CliRunner().invoke(main, ["chat", str(tmp_path)])
    assert said.exit_code == 2
    assert "no readable config.json" in said.output
