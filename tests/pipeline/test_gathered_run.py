"""A model's GGUF files in one repository, as a user makes them: run a zoo, run it again, add a recipe."""

import json
from pathlib import Path

import pytest

from pipeline.loopback import LoopbackHub
from tests.pipeline.runs import MODELS, TEXT, run
from workers.machine.files import file_sha256
from workers.spec.ggml import IMATRIX
from workers.transfer import gathered, hub

REPO = "acme/llama-tiny-GGUF"


@pytest.mark.slow
def test_a_zoo_gathers_gguf_files_and_adds_to_them(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub") as server:
        api = hub.connect(server.endpoint)

        def night(recipes: str) -> list[str]:
            zoo = tmp_path / "zoo.yaml"
            text = "calibration: {{dataset: {{path: text, data_files: [{0}/calibration.txt]}}, samples: 16, "
            text += "sequence_length: 256}}\nverify: {{dataset: {{path: text, data_files: [{0}/heldout.txt]}}, "
            text += "tokens: 2048, sequence_length: 256}}\n"
            zoo.write_text(
                f"name: small\nmodels: [{{id: {MODELS / 'llama-tiny'}}}]\nrecipes: [{recipes}]\n{text.format(TEXT)}"
                f"publish: {{endpoint: {server.endpoint}, namespace: acme}}\n"
            )
            code, printed, results = run(zoo, tmp_path / "runs")
            assert code == 0, printed
            assert {entry["repo_id"] for entry in results["artifacts"]} == {REPO}
            return [entry["status"] for entry in results["artifacts"]]

        def shown() -> dict[str, str]:
            names = api.list_repo_files(REPO)
            return {name: file_sha256(Path(api.hf_hub_download(REPO, name))) for name in names}

        assert night("gguf-q4_0, gguf-q8_0") == ["published", "published"]
        first, commits = shown(), len(api.list_repo_commits(REPO))
        assert {IMATRIX, "tokenizer.json", "README.md"} <= set(first)
        assert commits == 3  # the Hub's own, and one for each
        assert night("gguf-q4_0, gguf-q8_0") == ["skipped", "skipped"]
        assert (shown(), len(api.list_repo_commits(REPO))) == (first, 3)
        assert night("gguf-q4_0, gguf-q8_0, gguf-q6_k") == ["skipped", "skipped", "published"]
        second = shown()
        changed = {name for name in first if second.get(name) != first[name]}
        assert changed == {"README.md", "quantmill.json", "quantmill.png"}
        assert len(api.list_repo_commits(REPO)) == 4
        index = gathered.read_index(Path(api.hf_hub_download(REPO, "quantmill.json")).read_bytes())
        assert index is not None
        assert {member.file for member in index.members} == {
            f"llama-tiny-{kind}.gguf" for kind in ("Q4_0", "Q8_0", "Q6_K")
        }
        for member in index.members:
            own = json.loads(Path(api.hf_hub_download(REPO, member.manifest_path)).read_text())
            assert own["files"][member.file]["sha256"] == second[member.file]
        card = Path(api.hf_hub_download(REPO, "README.md")).read_text()
        assert card.count("\n| [llama-tiny-Q") == 3
        assert "&id" not in card, "yaml's aliases aren't for people"
        assert "nearest to the original" in card
        assert "](quantmill.png)" in card
        assert sum(name.endswith("/quantmill.png") for name in second) == 3, "each has its own, too"
        assert f"--imatrix {IMATRIX}" in card
