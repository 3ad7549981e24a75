"""What follows what, and what is tried again: pure decisions, no Ray."""

from typing import Any

import pytest

from pipeline.fleet import retry
from pipeline.fleet.retry import Choices, Retry, RetryMode
from pipeline.fleet.steps import JobRun, Step
from pipeline.zoo.shipped import recipe
from workers import errors
from workers.spec.data import Calibration, Dataset, Verification
from workers.spec.job import (
    ArtifactMade,
    Destination,
    Failure,
    Job,
    Manifest,
    ModelPin,
    Order,
    PeakMemory,
    Stage,
    StageResult,
    Thresholds,
    Verdict,
)
from workers.transfer import patience

TEXT = Dataset(path="text", data_files=("/a.txt",))
BOUNDS = Thresholds(kl_mean=1, top1_agreement=0.5, perplexity_ratio=2, runtime_logit_difference=1)


def job(*recipes: str, publish: bool = True) -> Job:
    return Job(
        model=ModelPin(id="org/model", revision="r" * 40),
        orders=tuple(
            Order(recipe=recipe(name), fingerprint=name * 8, thresholds=BOUNDS, repo_id=f"acme/model-{name}")
            for name in recipes
        ),
        calibration=Calibration(dataset=TEXT),
        verification=Verification(dataset=TEXT),
        destination=Destination(endpoint="http://127.0.0.1:1") if publish else None,
        workspace="/nowhere",
    )


def manifest(of: Job, name: str, accepted: bool) -> Manifest:
    return Manifest(
        fingerprint=of.order(name).fingerprint,
        model="org/model",
        revision="r",
        recipe=of.order(name).recipe,
        calibration=None,
        verification=of.verification,
        thresholds=BOUNDS,
        files={},
        verdict=Verdict(accepted=accepted, reasons=() if accepted else ("KL",)),
        environment={},
        fallbacks=(),
        bytes=1,
        reference_bytes=2,
        created_at="now",
    )


def made(*names: str, **failed: Failure) -> StageResult:
    artifacts = [ArtifactMade(recipe=name, path="/x", bytes=1, seconds=1.0) for name in names]
    artifacts += [
        ArtifactMade(recipe=n.replace("_", "-"), path="", bytes=0, seconds=0, error=f) for n, f in failed.items()
    ]
    return StageResult(stage=Stage.QUANTIZE, seconds=3.0, artifacts=tuple(artifacts), memory=PeakMemory(host=9))


def test_a_job_goes_from_fetch_to_publish() -> None:
    run = JobRun(0, job("bnb-nf4", "bnb-int8"))
    assert run.first() == Step(0, Stage.FETCH)
    assert run.follow(run.first(), StageResult(stage=Stage.FETCH), 1) == [Step(0, Stage.QUANTIZE)]
    verify = run.follow(Step(0, Stage.QUANTIZE), made("bnb-nf4", "bnb-int8"), 1)
    assert verify == [Step(0, Stage.VERIFY, "bnb-nf4"), Step(0, Stage.VERIFY, "bnb-int8")]
    accepted = StageResult(stage=Stage.VERIFY, recipe="bnb-nf4", manifest=manifest(run.job, "bnb-nf4", True))
    assert run.follow(verify[0], accepted, 1) == [Step(0, Stage.PUBLISH, "bnb-nf4")]
    rejected = StageResult(stage=Stage.VERIFY, recipe="bnb-int8", manifest=manifest(run.job, "bnb-int8", False))
    assert run.follow(verify[1], rejected, 1) == []
    published = StageResult(stage=Stage.PUBLISH, recipe="bnb-nf4", commit="c")
    assert run.follow(Step(0, Stage.PUBLISH, "bnb-nf4"), published, 2) == []
    assert run.artifacts["bnb-nf4"].commit == "c"
    assert run.artifacts["bnb-nf4"].attempts == 2
    assert run.artifacts["bnb-int8"].commit is None
    assert run.seconds[Stage.QUANTIZE] == 3.0


def test_without_a_destination_nothing_is_published() -> None:
    run = JobRun(0, job("bnb-nf4", publish=False))
    result = StageResult(stage=Stage.VERIFY, recipe="bnb-nf4", manifest=manifest(run.job, "bnb-nf4", True))
    assert run.follow(Step(0, Stage.VERIFY, "bnb-nf4"), result, 1) == []


def ended(stage: Stage, recipe: str, **more: Any) -> StageResult:
    return StageResult(stage=stage, recipe=recipe, **more)


@pytest.mark.parametrize("first", [Stage.KEEP, Stage.VERIFY])
@pytest.mark.parametrize("safe", [True, False])
def test_with_storage_an_artifact_is_published_once_its_copy_is_through(first: Stage, safe: bool) -> None:
    run = JobRun(0, job("bnb-nf4").model_copy(update={"storage": "/shared"}))
    keep, verify = Step(0, Stage.KEEP, "bnb-nf4"), Step(0, Stage.VERIFY, "bnb-nf4")
    assert run.follow(Step(0, Stage.QUANTIZE), made("bnb-nf4"), 1) == [verify, keep]
    failure = None if safe else Failure(kind="HubUnavailable", message="no")
    results = {
        Stage.KEEP: (keep, ended(Stage.KEEP, "bnb-nf4", failure=failure)),
        Stage.VERIFY: (verify, ended(Stage.VERIFY, "bnb-nf4", manifest=manifest(run.job, "bnb-nf4", True))),
    }
    assert run.follow(*results.pop(first), 1) == []
    assert run.follow(*results.popitem()[1], 1) == [Step(0, Stage.PUBLISH, "bnb-nf4")]
    assert run.artifacts["bnb-nf4"].failure is None, "a copy is for safety alone"


def test_a_verdict_of_a_lost_node_publishes_nothing_of_the_next() -> None:
    run = JobRun(0, job("bnb-nf4").model_copy(update={"storage": "/shared"}))
    run.follow(Step(0, Stage.QUANTIZE), made("bnb-nf4"), 1)
    accepted = ended(Stage.VERIFY, "bnb-nf4", manifest=manifest(run.job, "bnb-nf4", True))
    assert run.follow(Step(0, Stage.VERIFY, "bnb-nf4"), accepted, 1) == []
    run.restart()
    run.follow(Step(0, Stage.QUANTIZE, generation=1), made("bnb-nf4"), 1)
    assert run.follow(Step(0, Stage.KEEP, "bnb-nf4", 1), ended(Stage.KEEP, "bnb-nf4"), 1) == []
    publish = run.follow(Step(0, Stage.VERIFY, "bnb-nf4", 1), accepted, 1)
    assert publish == [Step(0, Stage.PUBLISH, "bnb-nf4", 1)]


@pytest.mark.parametrize("accepted", [True, False])
def test_what_is_not_published_stays_in_the_storage_with_its_verdict(accepted: bool) -> None:
    run = JobRun(0, job("bnb-nf4", publish=not accepted).model_copy(update={"storage": "/shared"}))
    keep, verify = Step(0, Stage.KEEP, "bnb-nf4"), Step(0, Stage.VERIFY, "bnb-nf4")
    run.follow(Step(0, Stage.QUANTIZE), made("bnb-nf4"), 1)
    assert run.follow(keep, ended(Stage.KEEP, "bnb-nf4"), 1) == []
    judged = ended(Stage.VERIFY, "bnb-nf4", manifest=manifest(run.job, "bnb-nf4", accepted))
    assert run.follow(verify, judged, 1) == [keep]
    failure = Failure(kind="HubUnavailable", message="no")
    assert run.follow(keep, ended(Stage.KEEP, "bnb-nf4", failure=failure), 1) == []
    # What should be found there and isn't has failed; what's rejected is rejected, wherever it lies.
    assert (run.artifacts["bnb-nf4"].failure == failure) == accepted


def test_one_failed_recipe_leaves_the_others_alone() -> None:
    run = JobRun(0, job("bnb-nf4", "gptq-w4-g128"))
    failure = Failure(kind="UnsupportedRecipe", message="no")
    assert run.follow(Step(0, Stage.QUANTIZE), made("bnb-nf4", gptq_w4_g128=failure), 1) == [
        Step(0, Stage.VERIFY, "bnb-nf4")
    ]
    assert run.artifacts["gptq-w4-g128"].failure == failure
    assert run.artifacts["bnb-nf4"].failure is None


def test_a_failed_stage_of_a_job_fails_all_of_its_artifacts() -> None:
    run = JobRun(0, job("bnb-nf4", "bnb-int8"))
    failure = Failure(kind="ModelNotFound", message="gone")
    assert run.follow(run.first(), StageResult(stage=Stage.FETCH, failure=failure), 1) == []
    assert [artifact.failure for artifact in run.artifacts.values()] == [failure, failure]


@pytest.mark.parametrize("name", [name for name, kind in vars(errors).items() if isinstance(kind, type)])
def test_only_what_can_pass_is_tried_again(name: str) -> None:
    transient = issubclass(getattr(errors, name), errors.TransientError)
    waits: list[float] = []
    failure = Failure(kind=name, message="")
    while (
        again := retry.decide(failure, [(name, RetryMode.SAME)] * (len(waits) + 1))
    ) and again.mode is RetryMode.SAME:
        waits.append(again.seconds)
        assert len(waits) < 100
    # ClusterLost ends a run; no stage fails with it.
    assert bool(waits) == (transient and name not in ("TransientError", "ClusterLost"))
    assert waits == sorted(waits)


def test_memory_that_ran_out_is_never_asked_for_again_in_the_same_way() -> None:
    failure = Failure(kind="OutOfMemory", message="")
    history = [("OutOfMemory", RetryMode.SAME)]
    first = retry.decide(failure, history)
    assert first == Retry(0.0, RetryMode.ALONE)
    history.append(("OutOfMemory", RetryMode.ALONE))
    assert retry.decide(failure, history) is None
    assert retry.decide(failure, history, Choices(larger=True)) == Retry(0.0, RetryMode.LARGER)


def test_a_full_disk_is_left_for_a_roomier_one_once() -> None:
    failure = Failure(kind="DiskFull", message="")
    assert retry.decide(failure, [("DiskFull", RetryMode.SAME)]) is None
    assert retry.decide(failure, [("DiskFull", RetryMode.SAME)], Choices(roomier=True)) == Retry(0.0, RetryMode.ROOMIER)
    history = [("DiskFull", RetryMode.SAME), ("WorkerDied", RetryMode.SAME)]
    assert retry.decide(Failure(kind="WorkerDied", message=""), history) == Retry(1.0)


def test_a_hub_that_asks_to_wait_is_obeyed_within_reason() -> None:
    def wait(seconds: float) -> float:
        failure = Failure(kind="HubUnavailable", message="", retry_after=seconds)
        again = retry.decide(failure, [(failure.kind, RetryMode.SAME)])
        assert again is not None
        return again.seconds

    assert wait(17.0) == 17.0
    assert wait(0.0) == 1.0
    assert wait(1e9) == retry.LONGEST_WAIT_SECONDS


def test_a_request_is_repeated_while_the_hub_asks_to_wait() -> None:
    slept: list[float] = []
    answers = [errors.HubUnavailable("busy", 17.0), errors.HubUnavailable("busy")]

    def ask() -> str:
        if answers:
            raise answers.pop(0)
        return "there"

    def patient(silence: patience.Silence | None = None) -> patience.Patience:
        slept.clear()
        return patience.Patience(
            100.0, clock=lambda: sum(slept), sleep=slept.append, jitter=lambda: 1.0, silence=silence
        )

    assert patient().call("ask", ask) == "there"
    assert slept == [17.0, 2.0]
    answers += [errors.HubUnavailable("gone")] * 30
    with pytest.raises(errors.HubUnavailable, match="gone; given up after 8 attempts, for 100 s in all are over"):
        patient().call("ask", ask)
    # Where nothing answers at all, that is said soon; a word in between, and it goes on.
    answers[:] = [errors.HubUnavailable("nobody", reached=False)] * 30
    with pytest.raises(errors.HubUnavailable, match=r"^nobody$"):
        patient(patience.Silence(20.0)).call("ask", ask)
    assert sum(slept) < 20.0
    answers[:] = [errors.HubUnavailable("nobody", reached=False), errors.HubUnavailable("busy")] * 3
    assert patient(patience.Silence(20.0)).call("ask", ask) == "there"
