"""Turn a zoo into jobs: pin, expand, fingerprint, skip existing artifacts, estimate. Starts nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pipeline.planning import fitting, sizing, sources
from pipeline.zoo.zoo import ModelEntry, Zoo
from workers.errors import HubUnavailable, UserError, ZooError
from workers.spec.job import Calibration, Destination, Job, Manifest, Order, Verification, fingerprint
from workers.spec.recipes import Recipe
from workers.spec.tensors import TensorHeader
from workers.spec.workspace import MANIFEST, artifact_folder
from workers.transfer import destinations
from workers.transfer.patience import insist
from workers.transfer.storage import Storage

T = TypeVar("T")
U = TypeVar("U")
THREADS = 16  # requests at a time while planning
PLANNING = "quantmill-planning"  # how the names of its threads begin
BATCH = 32  # items per task of the thread pool


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
    """All cells of a zoo, and the jobs that make the missing ones: one job per model and environment."""

    zoo: str
    artifacts: tuple[PlannedArtifact, ...]
    jobs: tuple[Job, ...]
    collection: Collection | None = None


def make_plan(zoo: Zoo, zoo_folder: Path, workspace: Path, endpoint: str | None) -> Plan:
    """Plan a zoo.

    ``endpoint`` is where artifacts are published (for the loopback Hub, its URL); None: they aren't published.

    Raises:
        UserError: all findings about models, data and destination in one message.
        HubUnavailable: the Hub can't be reached.
    """
    pairs, problems = _resolve_all(zoo, zoo_folder)
    pinned = [source for _, source in pairs]
    cells = [(source, recipe) for entry, source in pairs for recipe in zoo.recipes_of(entry)]
    calibration, data_sha256, verification, data_problems = _pin_data(zoo, zoo_folder)
    problems += data_problems
    problems += [problem for source in pinned for problem in _too_long(source, calibration, verification)]
    refused = {source.pin.id: problem for source in pinned if (problem := fitting.model_problem(source))}
    problems += refused.values()
    problems += _misfits(cells, refused)
    if problems:
        raise ZooError("\n".join(problems))
    orders = [
        _order(zoo, entry, source, recipe, calibration, data_sha256)
        for entry, source in pairs
        for recipe in zoo.recipes_of(entry)
    ]
    _check_repositories(orders)
    _check_twins(cells, orders)
    publish = zoo.publish
    if endpoint and publish:
        namespace = publish.namespace
        insist(lambda: destinations.check(endpoint, namespace))
    if zoo.storage:
        insist(Storage(zoo.storage).check)
    standing = _standing(orders, workspace, endpoint, verification, zoo.storage)
    estimates = sizing.Estimates(calibration, verification)
    artifacts = tuple(
        PlannedArtifact(source, order, estimates.of(source, recipe), *(existing or ()))
        for (source, recipe), order, existing in zip(cells, orders, standing, strict=True)
    )
    destination, collection = None, None
    if endpoint and publish:
        destination = publish.destination(endpoint)
        if publish.collection:
            collection = Collection(publish.collection, publish.namespace, endpoint, publish.private)
    jobs = _jobs(artifacts, calibration, verification, destination, workspace, zoo.storage)
    return Plan(zoo.name, artifacts, jobs, collection)


def _resolve_all(zoo: Zoo, zoo_folder: Path) -> tuple[list[tuple[ModelEntry, sources.PinnedModel]], list[str]]:
    results = _at_once(lambda entry: _try(lambda: sources.resolve(entry, zoo_folder)), zoo.models)
    pairs = zip(zoo.models, results, strict=True)
    # Share equal headers to save memory: a zoo has many finetunes of few models.
    known: dict[tuple[TensorHeader, ...], tuple[TensorHeader, ...]] = {}
    resolved = [
        (entry, replace(result, tensors=known.setdefault(result.tensors, result.tensors)))
        for entry, result in pairs
        if isinstance(result, sources.PinnedModel)
    ]
    return resolved, [str(result) for result in results if isinstance(result, UserError)]


def _at_once(look: Callable[[T], U], things: Sequence[T]) -> list[U]:
    """Map ``look`` over things in threads, in order; in batches, as one task costs more than a short look."""
    size = max(1, min(BATCH, len(things) // (4 * THREADS)))
    batches = [things[start : start + size] for start in range(0, len(things), size)]
    pool = ThreadPoolExecutor(THREADS, PLANNING)
    try:
        return [
            answer for batch in pool.map(lambda batch: [look(thing) for thing in batch], batches) for answer in batch
        ]
    finally:
        # An error or a signal isn't kept waiting by what the other threads still ask.
        pool.shutdown(wait=False, cancel_futures=True)


def _misfits(cells: list[tuple[sources.PinnedModel, Recipe]], refused: Mapping[str, str]) -> list[str]:
    """Why recipes don't fit models; models of the same shape, such as finetunes, are checked once."""
    fine: set[tuple[object, ...]] = set()
    misfits: list[str] = []
    for source, recipe in cells:
        key = (*sizing.alike(source), recipe.name)
        if source.pin.id in refused or key in fine:
            continue
        problems = list(fitting.recipe_problems(source, recipe))
        misfits += problems
        if not problems:
            fine.add(key)
    return misfits


def _pin_data(zoo: Zoo, zoo_folder: Path) -> tuple[Calibration | None, str | None, Verification, list[str]]:
    problems: list[str] = []
    calibration, data_sha256 = zoo.calibration, None
    if calibration is not None:
        text = calibration.dataset
        pinned = _try(lambda: sources.pin_dataset(text, zoo_folder, "calibration.dataset"))
        if isinstance(pinned, UserError):
            problems.append(str(pinned))
        else:
            calibration, data_sha256 = calibration.model_copy(update={"dataset": pinned[0]}), pinned[1]
    verification = zoo.verify.verification
    held_out = _try(lambda: sources.pin_dataset(verification.dataset, zoo_folder, "verify.dataset"))
    if isinstance(held_out, UserError):
        problems.append(str(held_out))
    else:
        verification = verification.model_copy(update={"dataset": held_out[0], "data": held_out[1]})
        if held_out[1] == data_sha256 and data_sha256 is not None:
            problems.append("verify.dataset: holds the very text that was calibrated on; name held-out text")
    return calibration, data_sha256, verification, problems


def _try(action: Callable[[], U]) -> U | UserError:
    """The result, or the user's error; other errors (an unreachable Hub) propagate."""
    try:
        return insist(action)
    except UserError as problem:
        return problem


def _too_long(source: sources.PinnedModel, calibration: Calibration | None, verification: Verification) -> list[str]:
    """Messages about sequence lengths (tokens) above the model's number of positions."""
    longest = source.config.get("max_position_embeddings") or source.config.get("n_positions")
    lengths = {"verify": verification.sequence_length, "calibration": calibration.sequence_length if calibration else 0}
    return [
        f"{where}.sequence_length: got {length}, but {source.pin.id!r} has {longest} positions; set at most {longest}"
        for where, length in lengths.items()
        if isinstance(longest, int) and length > longest
    ]


def _order(
    zoo: Zoo,
    entry: ModelEntry,
    source: sources.PinnedModel,
    recipe: Recipe,
    calibration: Calibration | None,
    data_sha256: str | None,
) -> Order:
    return Order(
        recipe=recipe,
        fingerprint=fingerprint(source.pin, recipe, calibration, data_sha256),
        thresholds=zoo.thresholds(entry, recipe),
        repo_id=zoo.publish.repo_id(source.name, recipe.name) if zoo.publish else None,
    )


def _check_twins(cells: list[tuple[sources.PinnedModel, Recipe]], orders: list[Order]) -> None:
    """Refuse two cells with the same fingerprint: they would be one artifact, made twice in the same folder."""
    owners: dict[str, tuple[str, str]] = {}
    for (source, recipe), order in zip(cells, orders, strict=True):
        first = owners.setdefault(order.fingerprint, (source.pin.id, recipe.name))
        if first != (source.pin.id, recipe.name):
            raise ZooError(
                f"{source.pin.id!r} under {recipe.name!r} is the same artifact as {first[0]!r} under {first[1]!r}; "
                "list it once"
            )


def _check_repositories(orders: Iterable[Order]) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    seen: set[str] = set()
    for order in orders:
        try:
            validate_repo_id(order.repo_id or "none")
        except HFValidationError as error:
            raise ZooError(
                f"publish: {order.repo_id!r} is no valid name of a repository ({error}); change publish.namespace or "
                "publish.name"
            ) from error
        if order.repo_id in seen:
            raise ZooError(
                f"publish.name: two artifacts would share the repository {order.repo_id!r} (two models of one name); "
                "publish them by separate zoos under different namespaces"
            )
        if order.repo_id:
            seen.add(order.repo_id)


Standing = tuple[Manifest, str | None]


def _standing(
    orders: list[Order], workspace: Path, endpoint: str | None, verification: Verification, storage: str | None
) -> list[Standing | None]:
    """For each order, the existing artifact: at the destination, or in the workspace if nothing is published."""

    def find(order: Order) -> Standing | None:
        return _published(endpoint, order) if endpoint else _local(order, workspace, verification, storage)

    return _at_once(lambda order: insist(lambda: find(order)), orders)


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
    same_criteria = manifest.thresholds == order.thresholds and manifest.verification.same_as(verification)
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
            calibration=calibration if any(a.order.recipe.calibrated for a in group) else None,
            verification=verification,
            destination=destination,
            workspace=str(workspace),
            storage=storage,
        )
        for group in missing.values()
    )
