"""Several runtimes check one artifact: all must agree, and verdict, card and manifest say what each check came to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.workers import jobs
from workers.quantize.one_pass import quantize
from workers.spec.job import LOADER_CHECKED, Job, Metrics, ReasonCode, RuntimeAgreement, Verdict
from workers.spec.runtimes import RUNTIMES, TRANSFORMERS
from workers.verify import gates
from workers.verify.card import render_card, zoo_of
from workers.verify.card_body import Told
from workers.verify.runtimes import reply, transformers
from workers.verify.stage import verify

LLAMA = jobs.ZOO / "models" / "llama-tiny"
ENTRY = "tests.workers.verify.test_several_runtimes:{}"


def unkerneled(request: str) -> str:
    """transformers, that says it computed without its kernels."""
    return json.dumps({**json.loads(transformers.answer(request)), "kernels": "no such op", "processor": "abacus"})


def wrong(request: str) -> str:
    """transformers, whose logits are another's."""
    from safetensors.torch import load_file, save_file

    answer = transformers.answer(request)
    file = Path(json.loads(request)["scratch"]) / "logits.safetensors"
    save_file({"logits": load_file(file)["logits"].roll(1, -1).contiguous()}, file)
    return answer


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("unkerneled", "wrong"):
        monkeypatch.setitem(RUNTIMES, name, replace(TRANSFORMERS, name=name, entry=ENTRY.format(name)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    job = jobs.job(LLAMA, tmp_path_factory.mktemp("runs"), "rtn-w4-g128")
    (artifact,), _ = quantize(job, LLAMA)
    assert artifact.error is None
    return job, Path(artifact.path)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_all_named_runtimes_are_asked_and_must_agree(made: tuple[Job, Path]) -> None:
    job, folder = made
    alone = verify(job, job.orders[0], LLAMA)
    assert [runtime.name for runtime in alone.verdict.runtimes] == ["transformers"]
    assert alone.verdict.other_runtimes == ()

    both = job.orders[0].model_copy(update={"runtimes": ("transformers", "unkerneled")})
    manifest = verify(job, both, LLAMA)
    assert manifest.verdict.accepted, manifest.verdict.reasons
    first, second = manifest.verdict.runtimes
    assert (first.name, first.verdict, first.kernels) == ("transformers", "checked", "")
    assert (second.verdict, second.kernels, second.processor) == (LOADER_CHECKED, "no such op", "abacus")
    assert first.processor
    assert first.kl_mean is not None
    assert abs(first.kl_mean) < 1e-3
    card = (folder / "README.md").read_text()
    assert f"Loaded by transformers {first.version} on {first.processor}: logits within" in card
    assert f"Loaded by unkerneled {second.version}'s own loader on abacus; its kernels weren't run" in card
    assert verify(job, both, LLAMA) == manifest, "nothing is asked again"
    assert verify(job, job.orders[0], LLAMA) == manifest, "it was checked in more than is asked"

    refused = job.orders[0].model_copy(update={"runtimes": ("transformers", "wrong")})
    verdict = verify(job, refused, LLAMA).verdict
    assert verdict.codes == (ReasonCode.RUNTIME_LOGITS,)
    assert "runtime logits of wrong differ from our decoding" in verdict.reasons[0]


def test_the_card_names_what_was_checked_and_what_only_reads_it(tmp_path: Path) -> None:
    job = jobs.job(LLAMA, tmp_path, "gptq-w4-g128")
    order = job.orders[0].model_copy(update={"repo_id": "acme/llama", "runtimes": ("vLLM",)})
    found = RuntimeAgreement(
        name="vLLM", version="0.32.0", max_abs_logit_difference=0.01, relative_logit_difference=0.001, generated="",
        kl_mean=1e-9, processor="x86_64 with AVX2", verdict=LOADER_CHECKED, kernels="no op",
    )  # fmt: skip
    metrics = Metrics(
        perplexity=2, reference_perplexity=2, kl_mean=0.1, kl_mean_upper=0.1, kl_p99=0.1, top1_agreement=0.9,
        top1_agreement_lower=0.9, perplexity_ratio_upper=1, eval_tokens=512,
    )  # fmt: skip
    verdict = Verdict.model_validate({"accepted": True, "reasons": (), "metrics": metrics, "runtime": found})
    text = render_card(job, order, tmp_path, verdict, Told({}))
    own = "Loaded by vLLM 0.32.0's own loader on x86_64 with AVX2; its kernels weren't run on this processor"
    assert own in text
    assert 'LLM("acme/llama")' in text
    assert "Not checked in vLLM" not in text
    assert "Not checked in transformers" in text
    assert zoo_of(job, order)["verify"]["runtimes"] == ["vLLM"]


def test_the_processor_is_told() -> None:
    assert reply.processor().split(" with ")[0] in ("x86_64", "aarch64", "arm64", "AMD64")


def test_what_cannot_be_computed_here_is_no_fault_of_the_artifact() -> None:
    def look(request: object) -> dict[str, object]:
        raise reply.NotHere("activations of 4 bits: no reference arithmetic")

    assert json.loads(reply.reply("{}", look))["not_here"] is True


def test_a_further_runtimes_difference_is_judged() -> None:
    agreement = RuntimeAgreement(
        name="b", version="1", max_abs_logit_difference=9, relative_logit_difference=0.5, generated=""
    )
    verdict = gates.by_thresholds(gates.Evidence(other_runtimes=(agreement,)), jobs.LOOSE)
    assert verdict.codes == (ReasonCode.RUNTIME_LOGITS,)
    assert verdict.other_runtimes == (agreement,)
