"""Each hostile folder fails alone, by our own errors, soon and small; a good model in the same zoo is published."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.planning import plan
from pipeline.zoo import zoo as zoos
from tests.hostile import base, folders
from tests.pipeline import runs
from workers import errors

# Limits for one refusal, in seconds and bytes of resident memory (the whole process with its imports).
SECONDS, MEMORY = 10.0, 500_000_000
MOST_RUN = 1800.0


class Corpus:
    """All hostile folders and a good one in one zoo, with a private file beside them."""

    def __init__(self, root: Path) -> None:
        self.root = root / "models"
        self.root.mkdir(parents=True)
        self.canary = self.root / "private.safetensors"
        self.canary.write_text(base.CANARY)
        self.hostile = folders.all_of_them(self.canary)
        for each in self.hostile:
            each.make(self.root / each.name)
            # Else some would be the same artifact.
            (self.root / each.name / "NOTICE").write_text(each.name)
        base.write(self.root / "good")
        self.outside = self._outside()

    def zoo(self, names: list[str]) -> Path:
        """A zoo of the good model and the named ones."""
        text = "\n".join(f"the {n} of them is line number {n * 7 % 91}." for n in range(4000))
        for name, part in (("calibration.txt", text[:60_000]), ("held-out.txt", text[60_000:])):
            (self.root / name).write_text(part)
        gates = {"kl_mean": 50.0, "top1_agreement": 0.0001, "perplexity_ratio": 1e6, "runtime_logit_difference": 0.1,
                 "kl_least": 1e-12}  # fmt: skip
        extra = {each.name: yaml.safe_load(each.entry) if each.entry else {} for each in self.hostile}
        zoo = {
            "name": "hostile",
            "models": [{"id": f"./{name}", **extra.get(name, {})} for name in [*names, "good"]],
            "recipes": ["rtn-w4-g128"],
            "verify": {
                "dataset": {"path": "text", "data_files": ["held-out.txt"]}, "tokens": 256, "sequence_length": 32,
                "gates": {"w4": gates},
            },
            "publish": {"endpoint": "loopback", "namespace": "acme"},
        }  # fmt: skip
        recipe = {
            "name": "w4",
            "method": "rtn",
            "scheme": {"bits": 4, "group_size": 32},
            "format": "compressed-tensors",
        }
        path = self.root / "zoo.yaml"
        path.write_text(yaml.safe_dump({**zoo, "recipes": [recipe]}))
        return path

    def _outside(self) -> dict[str, str]:
        """Everything beside the models' folders, by its content."""
        files = [path for path in self.root.parent.rglob("*") if path.is_file() and not path.is_symlink()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def changed(self) -> list[str]:
        """Files that were there before, and aren't as they were."""
        now = self._outside()
        return sorted(name for name, content in self.outside.items() if now.get(name) != content)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("hostile"))


RESOLVE = """
import json, sys, time
from pathlib import Path
from pipeline.planning import sources
from pipeline.zoo import zoo
from workers.machine.memory import peak_host_bytes

loaded, answers = zoo.load(Path(sys.argv[1])), {}
for entry in loaded.models:
    begun = time.monotonic()
    try:
        sources.resolve(entry, Path(sys.argv[1]).parent)
        kind = ""
    except Exception as error:
        kind = type(error).__name__
    answers[entry.id] = [kind, time.monotonic() - begun]
print(json.dumps({"answers": answers, "bytes": peak_host_bytes()}))
"""


def test_each_is_answered_soon_and_small(corpus: Corpus) -> None:
    zoo = corpus.zoo([each.name for each in corpus.hostile])
    done = subprocess.run([sys.executable, "-c", RESOLVE, str(zoo)], capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["bytes"] < MEMORY
    assert len(answer["answers"]) == len(corpus.hostile) + 1 >= 150
    for name, (kind, seconds) in answer["answers"].items():
        assert seconds < SECONDS, name
        assert not kind or issubclass(getattr(errors, kind), errors.UserError), (name, kind)
    assert answer["answers"]["./good"][0] == ""


def test_the_plan_sets_each_apart_with_its_reason(corpus: Corpus, tmp_path: Path) -> None:
    zoo = zoos.load(corpus.zoo([each.name for each in corpus.hostile]))
    made = plan.make_plan(zoo, corpus.root, tmp_path / "runs", None)
    refused = {cell.model.removeprefix("./"): cell.failure for cell in made.refused}
    planned = {cell.source.name for cell in made.artifacts}
    assert "good" in planned
    for each in corpus.hostile:
        if each.fate != "refused":
            assert each.name in planned, (each.name, refused.get(each.name))
            continue
        failure = refused[each.name]
        assert issubclass(getattr(errors, failure.kind), errors.UserError), (each.name, failure)
        assert each.says in failure.message, (each.name, failure.message)
        assert each.name in failure.message, "the message names the model"
        assert all(char.isprintable() for char in failure.message), (each.name, failure.message)
        assert "fetch it again" not in failure.message
        assert base.CANARY not in failure.message
        assert len(failure.message) < 2000, (each.name, len(failure.message))
    assert corpus.changed() == []


@pytest.mark.night
@pytest.mark.timeout(3600)
def test_a_run_makes_the_good_one_and_what_only_looks_bad(corpus: Corpus) -> None:
    at_work = [each for each in corpus.hostile if each.fate != "refused"]
    # Of those that the plan refuses, a few: they cost a run nothing.
    few = [each for each in corpus.hostile if each.fate == "refused"][::12]
    zoo = corpus.zoo([each.name for each in [*at_work, *few]])
    out = corpus.root.parent / "runs"
    code, printed, results = runs.run(zoo, out, MOST_RUN)
    assert code == 1
    ended = {Path(entry["model"]).name: entry for entry in results["artifacts"]}
    assert ended["good"]["status"] == "published", ended["good"]
    wrong = {
        each.name: (ended[each.name]["status"], ended[each.name]["reason"])
        for each in [*at_work, *few]
        if (ended[each.name]["status"] == "published") is not (each.fate == "made")
    }
    assert wrong == {}
    for each in [*at_work, *few]:
        entry = ended[each.name]
        if each.fate == "fails" and entry["error"]:
            assert hasattr(errors, entry["error"]["kind"]), (each.name, entry["error"])
            assert each.says in entry["error"]["message"], (each.name, entry["error"]["message"])
            assert "fetch it again" not in entry["error"]["message"]
    assert all(char.isprintable() or char == "\n" for char in printed)
    assert corpus.changed() == []
    assert not [path for path in out.rglob("*") if path.is_file() and base.CANARY.encode() in path.read_bytes()]
    assert not list(corpus.root.parent.rglob("pwned"))
    published = [path.name for path in out.glob("hub/models/acme/*")]
    assert Counter(entry["status"] for entry in results["artifacts"])["published"] == len(published)
