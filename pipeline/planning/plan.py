"""Turn a zoo into jobs: pin, expand, fingerprint, skip existing artifacts, estimate. Starts nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipeline.planning import sizing, sources
from pipeline.planning.cells import Cells, RefusedArtifact, at_once, invalid_name
from pipeline.planning.configs import positions
from pipeline.planning.sources import PinnedModel
from pipeline.zoo.zoo import Zoo
from workers.errors import HubUnavailable, UserError, ZooError
from workers.spec.auto_classes import is_multimodal
from workers.spec.data import Calibration, Verification
from workers.spec.job import Destination, Job, Manifest, Order
from workers.spec.workspace import MANIFEST, artifact_folder
from workers.transfer import destinations
from workers.transfer.patience import Silence, insist
from workers.transfer.storage import Storage

U = TypeVar("U")


@dataclass(frozen=True)
class PlannedArtifact:
    """One cell of models x recipes, to be made or skipped."""

    source: sources.PinnedModel
    order: Order
    estimate: sizing.Estimate
    standing: Manifest | None = None
    commit: str | None = None

    @property
    def skipped(self) -> bool:
        """Whether an artifact with this fingerprint exists at its destination already."""
        return self.standing is not None

    @property
    def reason(self) -> str:
        """Why the artifact is skipped or made, for people."""
        if not self.skipped:
            return "to be made"
        return "published already" if self.order.repo_id else "verified already"


@dataclass(frozen=True)
class Collection:
    """A Hub collection, identified by its title in the namespace of the artifacts."""

    title: str
    namespace: str
    endpoint: str
    private: bool


@dataclass(frozen=True)
class Plan:
    """All cells of a zoo, and the jobs that make the missing ones: one job per model and environment.

    ``refused`` cells fail without being started. ``notes`` say what is taken and left out of models' folders.
    """

    zoo: str
    artifacts: tuple[PlannedArtifact, ...]
    jobs: tuple[Job, ...]
    collection: Collection | None = None
    refused: tuple[RefusedArtifact, ...] = ()
    notes: tuple[str, ...] = ()
    calibration: Calibration | None = None


def make_plan(zoo: Zoo, zoo_folder: Path, workspace: Path, endpoint: str | None, *, strict: bool = False) -> Plan:
    """Plan a zoo.

    ``endpoint`` is where artifacts are published (for the loopback Hub, its URL); None: they aren't published.
    A model that can't be made is planned as refused, and the others are made; ``strict`` refuses the whole zoo.

    Raises:
        UserError: all findings about data and destination in one message; with ``strict`` also those about models.
        HubUnavailable: the destination can't be reached.
    """
    silence = Silence()
    calibration, data_sha256, verification, problems = _pin_data(zoo, zoo_folder, silence)
    problems += _name_problem(zoo)
    if problems and not strict:
        raise ZooError("\n".join(problems))
    cells = Cells(zoo, zoo_folder)
    cells.resolve(workspace, silence)
    cells.check(calibration, verification)
    if problems or (strict and cells.refused):
        messages = dict.fromkeys(refused.failure.message for refused in cells.refused.values())
        raise ZooError("\n".join([*problems, *messages]))
    cells.order(calibration, data_sha256)
    if strict and cells.refused:
        raise ZooError("\n".join(dict.fromkeys(refused.failure.message for refused in cells.refused.values())))
    publish = zoo.publish
    if endpoint and publish:
        namespace = publish.namespace
        insist("check the destination", lambda: destinations.check(endpoint, namespace), silence)
    if zoo.storage:
        insist("check the storage", Storage(zoo.storage).check, silence)
    orders = [(order, _for_model(verification, source)) for source, order in cells.made]
    standing = _standing(orders, workspace, endpoint, zoo.storage, silence)
    estimates = sizing.Estimates(calibration, verification)
    artifacts = tuple(
        PlannedArtifact(source, order, estimates.of(source, order.recipe, order.runtimes), *(existing or ()))
        for (source, order), existing in zip(cells.made, standing, strict=True)
    )
    destination, collection = None, None
    if endpoint and publish:
        destination = publish.destination(endpoint)
        if publish.collection:
            collection = Collection(publish.collection, publish.namespace, endpoint, publish.private)
    jobs = _jobs(artifacts, calibration, verification, destination, workspace, zoo.storage)
    notes = (
        *cells.notes,
        *(note for source in cells.sources.values() for note in source.notes),
        *(note for source, order in cells.made for note in sizing.deviations(source, order.recipe)),
    )
    return Plan(zoo.name, artifacts, jobs, collection, tuple(cells.refused.values()), notes, calibration)


def _pin_data(
    zoo: Zoo, zoo_folder: Path, silence: Silence
) -> tuple[Calibration | None, str | None, Verification, list[str]]:
    problems: list[str] = []
    calibration, data_sha256, texts = zoo.calibration, None, list[str]()
    if calibration is not None:
        pinned = _try(partial(sources.pin_calibration, calibration, zoo.special_tokens, zoo_folder, silence))
        if isinstance(pinned, UserError):
            problems.append(str(pinned))
        else:
            calibration, texts = pinned
            data_sha256 = sources.together(texts)
    verification = zoo.verify.verification
    held_out_text = sources.with_special_tokens(verification.dataset, zoo.special_tokens)
    held_out = _try(lambda: sources.pin_dataset(held_out_text, zoo_folder, "verify.dataset", silence))
    if isinstance(held_out, UserError):
        problems.append(str(held_out))
    else:
        verification = verification.model_copy(update={"dataset": held_out[0], "data": held_out[1]})
    if verification.shown is not None:
        shown = _try(partial(sources.pin_dataset, verification.shown, zoo_folder, "verify.shown", silence))
        if isinstance(shown, UserError):
            problems.append(str(shown))
        else:
            verification = verification.model_copy(update={"shown": shown[0], "shown_data": shown[1]})
    for key, data in (("verify.dataset", verification.data), ("verify.shown", verification.shown_data)):
        if data in texts:
            problems.append(f"{key}: holds the very text that was calibrated on; name held-out text")
    return calibration, data_sha256, verification, problems


def _try(action: Callable[[], U]) -> U | UserError:
    """The result, or the user's error; other errors (an unreachable Hub) propagate."""
    try:
        return action()
    except UserError as problem:
        return problem


def _name_problem(zoo: Zoo) -> Iterator[str]:
    """Why no repository of the zoo can have a valid name, whatever its models are called."""
    publish = zoo.publish
    names = {publish.pattern(recipe.format) for recipe in zoo.resolved_recipes} if publish else set[str]()
    for name in sorted(names):
        assert publish is not None, "names are those of what is published"
        if why := invalid_name(f"{publish.namespace}/{name.format(model='model', recipe='recipe')}"):
            yield f"publish: no valid name of a repository ({why}); change publish.namespace or publish.name"


Standing = tuple[Manifest, str | None]


def _standing(
    orders: list[tuple[Order, Verification]],
    workspace: Path,
    endpoint: str | None,
    storage: str | None,
    silence: Silence,
) -> list[Standing | None]:
    """For each order, the existing artifact: at the destination, or in the workspace if nothing is published."""

    def find(order: Order, verification: Verification) -> Standing | None:
        return _published(endpoint, order) if endpoint else _local(order, workspace, verification, storage)

    return at_once(lambda one: insist(f"look for {one[0].repo_id}", lambda: find(*one), silence), orders)


def _for_model(verification: Verification, source: PinnedModel) -> Verification:
    """Without pictures and sounds, for a model that takes text alone."""
    return verification if is_multimodal(source.config) else verification.of_text


def _published(endpoint: str, order: Order) -> Standing | None:
    return destinations.standing(endpoint, order.repo_id or "", order.fingerprint)


def standing(job: Job, order: Order) -> Standing | None:
    """The artifact of an order if it exists by now; None also while the Hub doesn't answer."""
    try:
        if job.destination is None:
            return _local(order, Path(job.workspace), job.verification, job.storage)
        return _published(job.destination.endpoint, order)
    except HubUnavailable:
        return None


def _local(order: Order, workspace: Path, verification: Verification, storage: str | None) -> Standing | None:
    """The artifact in the workspace or shared storage, if it was accepted with the current thresholds and text."""
    folder = artifact_folder(workspace, order)
    try:
        text = (folder / MANIFEST).read_bytes() if storage is None else Storage(storage).manifest(folder)
        manifest = Manifest.model_validate_json(text or b"")
    except (OSError, ValueError):
        return None
    same_text = manifest.verification.same_as(verification) and manifest.checked_in(order.runtimes)
    same_criteria = manifest.thresholds == order.thresholds and same_text
    return (manifest, None) if manifest.verdict.accepted and same_criteria else None


def _jobs(
    artifacts: tuple[PlannedArtifact, ...],
    calibration: Calibration | None,
    verification: Verification,
    destination: Destination | None,
    workspace: Path,
    storage: str | None,
) -> tuple[Job, ...]:
    missing: dict[tuple[str, str | None], list[PlannedArtifact]] = {}
    for artifact in artifacts:
        if not artifact.skipped:
            key = artifact.source.pin.id, artifact.order.recipe.environment
            missing.setdefault(key, []).append(artifact)
    return tuple(
        Job(
            model=group[0].source.pin,
            orders=tuple(artifact.order for artifact in group),
            calibration=(
                calibration.within(positions(group[0].source.config))
                if calibration and any(a.order.recipe.calibrated for a in group)
                else None
            ),
            verification=_for_model(verification, group[0].source),
            destination=destination,
            workspace=str(workspace),
            storage=storage,
        )
        for group in missing.values()
    )
