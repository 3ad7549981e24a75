"""The model card: what the Hub reads of it, and what a person can do with it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.loopback import LoopbackHub
from pipeline.zoo import shipped
from pipeline.zoo.zoo import Zoo
from tests.workers import jobs
from workers.spec.data import Dataset
from workers.spec.job import Generation, Job, Metrics, ModelPin, Verdict
from workers.spec.layers import LayerKinds
from workers.spec.runtimes import TRANSFORMERS
from workers.verify.card import read_metadata, render_card, zoo_of
from workers.verify.card_body import Told

LLAMA = Path(__file__).parents[2] / "zoo/models/llama-tiny"
METRICS = Metrics(
    perplexity=20.03241, reference_perplexity=19.9, kl_mean=0.00312345678, kl_mean_upper=0.004, kl_p99=0.02,
    top1_agreement=0.96, top1_agreement_lower=0.95, perplexity_ratio_upper=1.01, eval_tokens=512,
)  # fmt: skip
VERDICT = Verdict.model_validate({"accepted": True, "reasons": (), "outcome": "ACCEPT", "metrics": METRICS})
ENVIRONMENT = {"python": "3.11", "quantmill": "0.1.0", "transformers": "5.23.0"}


def job(recipe: str, tmp_path: Path, **model: Any) -> Job:
    made = jobs.job(LLAMA, tmp_path / "secret-workspace", recipe)
    pin = ModelPin(id="org/llama", revision="c" * 40, endpoint="https://huggingface.co")
    return made.model_copy(update={"model": pin, **model})


def card(made: Job, source: Path, verdict: Verdict = VERDICT) -> str:
    told = Told(ENVIRONMENT, fallbacks=("layer 3 in 8 bits",), bytes=3_700_000, reference_bytes=8_400_000)
    return render_card(made, made.orders[0], source, verdict, told)


def source(tmp_path: Path, front: str) -> Path:
    (tmp_path / "README.md").write_text(f"---\n{front}---\n# Llama\n")
    return tmp_path


def test_the_hub_accepts_it_and_reads_the_results(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    front = "license: other\nlicense_name: lama\nlicense_link: LICENSE\nlanguage: [en]\ntags: [chat]\ndatasets: [x]\n"
    text = card(job("gptq-w4-g128", tmp_path), source(tmp_path, front))
    data = ModelCard(text).data
    assert [(r.metric_type, r.metric_value, r.dataset_type, r.task_type) for r in data.eval_results or ()] == [
        ("perplexity", 20.03241, "text", "text-generation"),
        ("kl_divergence_to_reference", 0.003123, "text", "text-generation"),
        ("top1_agreement_with_reference", 0.96, "text", "text-generation"),
    ]
    metadata = yaml.safe_load(text.split("---\n")[1])
    index = metadata["model-index"]
    assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index, "the Hub's own form"
    assert (metadata["license"], metadata["license_name"], metadata["license_link"]) == ("other", "lama", "LICENSE")
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/llama", "quantized")
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "text-generation")
    assert metadata["tags"] == ["chat", "quantmill", "compressed-tensors", "gptq"]
    assert "datasets" not in metadata
    with LoopbackHub(tmp_path / "hub") as hub:
        import httpx2

        answer = httpx2.post(f"{hub.endpoint}/api/validate-yaml", json={"content": text, "repoType": "model"})
        assert answer.json() == {"errors": [], "warnings": []}


def test_the_pipeline_tag_is_the_sources(tmp_path: Path) -> None:
    text = card(job("bnb-nf4", tmp_path), source(tmp_path, "pipeline_tag: image-text-to-text\n"))
    (tmp_path / "card.md").write_text(text)
    assert read_metadata(tmp_path / "card.md")["pipeline_tag"] == "image-text-to-text"


def test_results_on_a_data_set_of_the_hub_name_it(tmp_path: Path) -> None:
    made = job("bnb-nf4", tmp_path)
    dataset = Dataset(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="test", revision="d" * 40)
    made = made.model_copy(update={"verification": made.verification.model_copy(update={"dataset": dataset})})
    metadata = yaml.safe_load(card(made, tmp_path).split("---\n")[1])
    assert metadata["model-index"][0]["results"][0]["dataset"] == {
        "name": "Salesforce/wikitext", "type": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test",
        "revision": "d" * 40,
    }  # fmt: skip


def test_a_number_that_is_none_is_left_out(tmp_path: Path) -> None:
    broken = VERDICT.model_copy(update={"metrics": METRICS.model_copy(update={"kl_mean": float("nan")})})
    metadata = yaml.safe_load(card(job("bnb-nf4", tmp_path), tmp_path, broken).split("---\n")[1])
    kinds = [metric["type"] for metric in metadata["model-index"][0]["results"][0]["metrics"]]
    assert kinds == ["perplexity", "top1_agreement_with_reference"]


@pytest.mark.parametrize("recipe", shipped.recipe_names())
def test_what_it_says_makes_the_same_recipe_again(tmp_path: Path, recipe: str) -> None:
    made = job(recipe, tmp_path)
    text = card(made, tmp_path)
    found = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert found is not None
    zoo = Zoo.model_validate(yaml.safe_load(found[1]))
    assert zoo.resolved_recipes == (made.orders[0].recipe,)
    assert (zoo.models[0].id, zoo.models[0].revision) == ("org/llama", "c" * 40)
    if made.orders[0].recipe.calibrated:
        assert made.calibration is not None
        assert zoo.calibration is not None
        text_of = {"data_files": ("calibration.txt",)}
        same = made.calibration.model_copy(update={"dataset": made.calibration.dataset.model_copy(update=text_of)})
        assert zoo.calibration == same
    else:
        assert zoo.calibration is None
    assert zoo.verify.tokens == 512
    assert "With quantmill 0.1.0 installed from its repository, `quantmill run again.yaml` makes it" in text
    assert "pip install quantmill" not in text


@pytest.mark.parametrize(
    ("recipe", "kinds", "in_vllm"),
    [
        ("gptq-w4-g128", LayerKinds(), True),
        ("gptq-w4-g128", LayerKinds(experts=True, mixture=True), True),
        ("gptq-w4-g128", LayerKinds(split=True), False),
        ("gptq-w3-g128", LayerKinds(), False),
        ("gptq-mixed-4-8", LayerKinds(mixed=True), True),
        ("hqq-w4-g64", LayerKinds(), False),
        ("bnb-nf4", LayerKinds(), True),
        ("bnb-nf4", LayerKinds(mixture=True), False),
    ],
)
def test_how_to_load_it(tmp_path: Path, recipe: str, kinds: LayerKinds, in_vllm: bool) -> None:
    made = job(recipe, tmp_path)
    order = made.orders[0].model_copy(update={"repo_id": "acme/llama-w4"})
    text = render_card(made, order, tmp_path, VERDICT, Told(ENVIRONMENT, kinds))
    assert 'AutoModelForCausalLM.from_pretrained("acme/llama-w4")' in text
    assert TRANSFORMERS.install(order.recipe.format) in text
    assert ('LLM("acme/llama-w4")' in text) is in_vllm
    assert ("Not checked in vLLM" if in_vllm else "vLLM: the quantized layers ") in text


def test_no_path_of_the_machine_is_in_it(tmp_path: Path) -> None:
    made = jobs.job(LLAMA, tmp_path / "secret-workspace", "gptq-w4-g128")
    text = card(made, tmp_path)
    assert str(tmp_path) not in text
    assert str(LLAMA.parent) not in text
    assert zoo_of(made, made.orders[0])["models"] == [{"id": "llama-tiny"}]
    assert "layer 3 in 8 bits" in text


def test_it_says_what_a_reader_looks_for_first(tmp_path: Path) -> None:
    made = job("gptq-w4-g128", tmp_path)
    other = made.orders[0].model_copy(update={"repo_id": "acme/other", "recipe": shipped.recipe("bnb-nf4")})
    made = made.model_copy(update={"orders": (made.orders[0].model_copy(update={"repo_id": "acme/this"}), other)})
    text = card(made, tmp_path)
    assert "| weights | 3.7 MB (44 %) | 8.4 MB |" in text
    assert "| perplexity (recovered) | 20.0324 (99.34 %) | 19.9000 |" in text
    assert "![KL divergence: 0.0031 nats](https://img.shields.io/badge/KL%20divergence-0.0031%20nats-info" in text
    assert "badge/format-compressed--tensors-" in text
    assert "- `acme/other`: NF4" in text
    assert "`acme/this`" not in text


def test_continuations_are_text_whatever_they_hold(tmp_path: Path) -> None:
    said = {"prompt": "a\n```", "artifact": " b ```` c", "reference": " b ` d", "same_tokens": 1, "tokens": 4}
    verdict = VERDICT.model_copy(update={"generations": (Generation.model_validate(said),)})
    text = card(job("bnb-nf4", tmp_path), tmp_path, verdict)
    assert "1 of 4 tokens alike:\n\n`````text\na\n```\n→ b ```` c\noriginal → b ` d\n`````\n" in text


@pytest.mark.slow
@pytest.mark.parametrize("chats", [True, False])
def test_the_code_for_transformers_runs(chats: bool, tmp_path: Path) -> None:
    code = TRANSFORMERS.snippet(str(LLAMA), "AutoModelForCausalLM", chats)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.strip()) > 20


def test_the_chart_stands_with_what_was_measured(tmp_path: Path) -> None:
    made = job("bnb-nf4", tmp_path)
    text = render_card(made, made.orders[0], tmp_path, VERDICT, Told(ENVIRONMENT, chart="quantmill.png"))
    assert text.index("## Measured") < text.index("(quantmill.png)") < text.index("## Use it")
    assert "quantmill.png" not in card(made, tmp_path)
