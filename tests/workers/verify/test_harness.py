"""lm-eval beside the verification: what is asked of it, and what comes back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.workers.jobs import ZOO
from workers.errors import PreflightError, ZooError
from workers.verify.harness import HarnessRequest, _scores, evaluate

LLAMA = str(ZOO / "models" / "llama-tiny")
TASK = f"""
task: own
dataset_path: text
dataset_kwargs: {{data_files: {{test: {ZOO / "text" / "heldout.txt"}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PreflightError, match=r"pip install 'quantmill\[eval\]'"):
        evaluate(HarnessRequest(models=(LLAMA,), tasks=("own",)))


def test_metrics_come_with_their_errors_and_without_what_is_no_number() -> None:
    result = {
        "t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "ppl,strict": 3.0, "ppl_stderr,strict": "N/A"}
    }
    accuracy, perplexity = _scores([result, {"t": {**result["t"], "acc,none": 0.4}}])
    assert (accuracy.metric, accuracy.values, accuracy.errors) == ("acc", (0.5, 0.4), (0.1, 0.1))
    assert (perplexity.metric, perplexity.values, perplexity.errors) == ("ppl (strict)", (3.0, 3.0), (None, None))


def test_a_local_task_runs_on_both(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' isn't part of make setup: forty packages for one option")
    (tmp_path / "own.yaml").write_text(TASK)
    (score,) = evaluate(HarnessRequest(models=(LLAMA, LLAMA), tasks=("own",), include=str(tmp_path), limit=8))
    assert (score.task, score.metric) == ("own", "bits_per_byte")
    assert score.values[0] == score.values[1] > 0
    with pytest.raises(ZooError, match="no task 'other'"):
        evaluate(HarnessRequest(models=(LLAMA,), tasks=("other",)))
