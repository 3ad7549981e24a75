"""From a zoo to jobs: pin, expand, fingerprint, skip what stands already, estimate. Decides; starts nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline import sizing, sources
from pipeline.zoo import Zoo
from workers import hub
from workers.errors import HubRefused, ModelNotFound, UserError, ZooError
from workers.job import (
    MANIFEST,
    Calibration,
    Destination,
    Job,
    Manifest,
    Order,
    Recipe,
    Verification,
    artifact_folder,
    fingerprint,
)

T = TypeVar("T")
U = TypeVar("U")
THREADS = 16  # requests at a time while planning


@dataclass(frozen=True)
class PlannedArtifact:
    """One cell of models x recipes: what would be made, or why not."""

    source: sources.Source
    order: Order
    estimate: sizing.Estimate
    standing: Manifest | None = None
    commit: str | None = None

    @property
    def skipped(self) -> bool:
        """Whether the very artifact stands at its destination already."""
        return self.standing is not None

    @property
    def reason(self) -> str:
        """Why the artifact is skipped, or made."""
        if not self.skipped:
            return "to be made"
        return "published already" if self.order.repo_id else "verified already"


@dataclass(frozen=True)
class Plan:
    """All cells of a zoo, and the jobs that make the missing ones: one for each model."""

    zoo: str
    artifacts: tuple[PlannedArtifact, ...]
    jobs: tuple[Job, ...]


def make_plan(zoo: Zoo, zoo_folder: Path, workspace: Path, endpoint: str | None) -> Plan:
    """Plan a zoo.

    ``endpoint`` is where artifacts are published (the loopback Hub's address once it runs), None for nowhere.

    Raises:
        UserError: all findings about models, data and destination in one message.
        HubUnavailable: the Hub can't be reached.
    """
    pinned, problems = _resolve_all(zoo, zoo_folder)
    calibration, data_sha256, verification, data_problems = _pin_data(zoo, zoo_folder)
    problems += data_problems
    found = (sizing.group_size_problem(source, recipe) for source in pinned for recipe in zoo.resolved_recipes)
    problems += [problem for problem in found if problem]
    if problems:
        raise ZooError("\n".join(problems))
    cells = [(source, recipe) for source in pinned for recipe in zoo.resolved_recipes]
    orders = [_order(zoo, source, recipe, calibration, data_sha256) for source, recipe in cells]
    _check_repositories(orders)
    if endpoint:
        check_destination(endpoint)
    standing = _standing(orders, workspace, endpoint)
    artifacts = tuple(
        PlannedArtifact(source, order, sizing.estimate(source, recipe, calibration, verification), *(there or ()))
        for (source, recipe), order, there in zip(cells, orders, standing, strict=True)
    )
    destination = Destination(endpoint=endpoint, private=zoo.publish.private) if endpoint and zoo.publish else None
    jobs = _jobs(artifacts, calibration, verification, destination, workspace)
    return Plan(zoo.name, artifacts, jobs)


def _resolve_all(zoo: Zoo, zoo_folder: Path) -> tuple[list[sources.Source], list[str]]:
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(lambda entry: _try(lambda: sources.resolve(entry, zoo_folder)), zoo.models))
    return [r for r in results if isinstance(r, sources.Source)], [str(r) for r in results if isinstance(r, UserError)]


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
        verification = verification.model_copy(update={"dataset": held_out[0]})
        if held_out[1] == data_sha256 and data_sha256 is not None:
            problems.append("verify.dataset: holds the very text that was calibrated on; name held-out text")
    return calibration, data_sha256, verification, problems


def _try(action: Callable[[], U]) -> U | UserError:
    """The result, or the finding; what isn't the user's to mend (an unreachable Hub) goes on upwards."""
    try:
        return action()
    except UserError as problem:
        return problem


def _order(
    zoo: Zoo, source: sources.Source, recipe: Recipe, calibration: Calibration | None, data_sha256: str | None
) -> Order:
    return Order(
        recipe=recipe,
        fingerprint=fingerprint(source.pin, recipe, calibration, data_sha256),
        thresholds=zoo.verify.thresholds(recipe),
        repo_id=zoo.publish.repo_id(source.name, recipe.name) if zoo.publish else None,
    )


def _check_repositories(orders: Iterable[Order]) -> None:
    seen: set[str] = set()
    for order in orders:
        if order.repo_id in seen:
            raise ZooError(
                f"publish.name: two artifacts would share the repository {order.repo_id!r} (two models of one name); "
                "publish them by separate zoos under different namespaces"
            )
        if order.repo_id:
            seen.add(order.repo_id)


def check_destination(endpoint: str) -> None:
    """Whether the Hub answers, and the token may write to the namespace.

    Raises:
        HubRefused: no token, or one without write access.
        HubUnavailable: no answer.
    """
    api = hub.connect(endpoint)
    from huggingface_hub import get_token
    from huggingface_hub.errors import LocalTokenNotFoundError

    if endpoint == hub.OFFICIAL and not get_token():
        raise HubRefused(
            f"publish: no token for {endpoint}, got neither HF_TOKEN nor a stored login; "
            "set HF_TOKEN to a token with write access, or run `hf auth login`"
        )
    try:
        with hub.hub_errors(f"publish: token check on {endpoint}"):
            who = api.whoami()
    except LocalTokenNotFoundError:
        return  # a Hub without accounts, such as the loopback one
    except ModelNotFound as error:
        raise HubRefused(f"publish: {endpoint} does not know this token; set HF_TOKEN to a valid one") from error
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubRefused(f"publish: the token of {who.get('name')!r} may only read; set HF_TOKEN to one that may write")


Standing = tuple[Manifest, str | None]


def _standing(orders: list[Order], workspace: Path, endpoint: str | None) -> list[Standing | None]:
    """For each order, what makes it superfluous: at the destination, or here if nothing is published."""
    if endpoint is None:
        return [_local(order, workspace) for order in orders]
    api = hub.connect(endpoint)
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda order: hub.read_manifest(api, order.repo_id or ""), orders)
        return [
            there if there and there[0].fingerprint == order.fingerprint else None
            for order, there in zip(orders, found, strict=True)
        ]


def _local(order: Order, workspace: Path) -> Standing | None:
    try:
        text = (artifact_folder(workspace, order) / MANIFEST).read_text()
        manifest = Manifest.model_validate_json(text)
    except (OSError, ValueError):
        return None
    return (manifest, None) if manifest.verdict.accepted else None


def _jobs(
    artifacts: tuple[PlannedArtifact, ...],
    calibration: Calibration | None,
    verification: Verification,
    destination: Destination | None,
    workspace: Path,
) -> tuple[Job, ...]:
    missing: dict[str, list[PlannedArtifact]] = {}
    for artifact in artifacts:
        if not artifact.skipped:
            missing.setdefault(artifact.source.pin.id, []).append(artifact)
    return tuple(
        Job(
            model=group[0].source.pin,
            orders=tuple(artifact.order for artifact in group),
            calibration=calibration if any(a.order.recipe.calibrated for a in group) else None,
            verification=verification,
            destination=destination,
            workspace=str(workspace),
        )
        for group in missing.values()
    )
