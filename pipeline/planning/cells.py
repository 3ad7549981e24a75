"""The cells of a zoo, models x recipes: resolved, checked and ordered; those that can't be made are set apart."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pipeline import registry
from pipeline.planning import fitting, modules, sizing, sources
from pipeline.planning.configs import pad_problem, positions
from pipeline.planning.sources import PinnedModel
from pipeline.zoo.zoo import ModelEntry, Zoo
from workers.errors import UnsupportedModel, UnsupportedRecipe, ZooError
from workers.machine.failures import describe
from workers.spec import kept
from workers.spec.bounds import brief
from workers.spec.data import Calibration, Verification
from workers.spec.job import Failure, Order, fingerprint
from workers.spec.recipes import KeepRecipe, Recipe
from workers.spec.tensors import TensorHeader
from workers.transfer.patience import Silence

T = TypeVar("T")
U = TypeVar("U")
THREADS = 16  # requests at a time while planning
PLANNING = "quantmill-planning"  # how the names of its threads begin
BATCH = 32  # items per task of the thread pool
# Longest name of a repository on the Hub.
NAME_LENGTH = 96


@dataclass(frozen=True)
class RefusedArtifact:
    """A cell of models x recipes that can't be made, with the reason; the others are."""

    model: str
    name: str
    recipe: str
    failure: Failure
    revision: str = ""
    repo_id: str | None = None


class Cells:
    """Every model of a zoo under each of its recipes, by the model's id and the recipe's name.

    Each step sets the cells apart that can't be made (``refused``), and goes on with the others.
    """

    def __init__(self, zoo: Zoo, zoo_folder: Path) -> None:
        self._zoo = zoo
        self._folder = zoo_folder
        self.sources: dict[str, PinnedModel] = {}
        self.refused: dict[tuple[str, str], RefusedArtifact] = {}
        self.made: list[tuple[PinnedModel, Order]] = []

    @property
    def notes(self) -> list[str]:
        """Recipes that are checked in another runtime than the zoo names, for want of one that reads their format."""
        named = self._zoo.verify.runtimes
        return [
            f"recipe {recipe.name!r}: none of verify.runtimes ({', '.join(named)}) reads the format {recipe.format}; "
            f"it is checked in {', '.join(self._zoo.runtimes_of(recipe))}"
            for recipe in (self._zoo.resolved_recipes if named else ())
            if named and not set(self._zoo.runtimes_of(recipe)) & set(named)
        ]

    def resolve(self, workspace: Path, silence: Silence) -> None:
        """Pin the models."""

        def pin(entry: ModelEntry) -> PinnedModel | Exception:
            try:
                recipes = self._zoo.recipes_of(entry)
                calibrated = any(recipe.calibrated for recipe in recipes)
                keeps = any(isinstance(recipe, KeepRecipe) for recipe in recipes)
                return sources.resolve(entry, self._folder, workspace, silence, calibrated=calibrated, keeps=keeps)
            except Exception as error:  # whatever a folder or a Hub answers, the other models go on
                return error

        # Share equal headers to save memory: a zoo has many finetunes of few models.
        known: dict[tuple[TensorHeader, ...], tuple[TensorHeader, ...]] = {}
        for entry, result in zip(self._zoo.models, at_once(pin, self._zoo.models), strict=True):
            if isinstance(result, PinnedModel):
                self.sources[entry.id] = replace(result, tensors=known.setdefault(result.tensors, result.tensors))
            else:
                self._refuse(entry, self._zoo.recipes_of(entry), result)

    def check(self, calibration: Calibration | None, verification: Verification) -> None:
        """Set apart models and recipes that don't fit; models of the same shape, such as finetunes, share checks."""
        fine: set[tuple[object, ...]] = set()
        never = registry.ask(self._zoo.resolved_recipes).never
        for entry in self._zoo.models:
            source = self.sources.get(entry.id)
            if source is None:
                continue
            recipes = self._zoo.recipes_of(entry)
            problems = [*_too_long(source, calibration, verification), fitting.model_problem(source)]
            if calibration and any(recipe.calibrated for recipe in recipes):
                problems += fitting.picture_problems(source, calibration)
            if pad := pad_problem(source.config):
                problems.append(f"models: {entry.id!r}: {pad}")
            if found := [problem for problem in problems if problem]:
                self._refuse(entry, recipes, UnsupportedModel("; ".join(found)))
                continue
            for recipe in recipes:
                if recipe.name in never:
                    self._refuse(entry, [recipe], UnsupportedRecipe(never[recipe.name]))
                    continue
                key = (*sizing.alike(source), recipe.name)
                if (key not in fine or source.kept) and not self._misfit(entry, source, recipe):
                    fine.add(key)

    def _misfit(self, entry: ModelEntry, source: PinnedModel, recipe: Recipe) -> bool:
        try:
            own = _for_source(source, recipe)
            problems = list(fitting.recipe_problems(source, own, self._zoo.runtimes_of(recipe)))
        except Exception as error:  # odd headers or settings: this model's fault, not the zoo's
            self._refuse(entry, [recipe], error)
            return True
        if problems:
            self._refuse(entry, [recipe], UnsupportedRecipe("; ".join(problems)))
        return bool(problems)

    def order(self, calibration: Calibration | None, data_sha256: str | None) -> None:
        """Order what can be made, and set apart cells that would be one artifact, or share a repository.

        Raises:
            ZooError: a model has the same recipe twice.
        """
        ordered: list[tuple[ModelEntry, PinnedModel, Order]] = []
        for entry in self._zoo.models:
            if source := self.sources.get(entry.id):
                ordered += [
                    (entry, source, self._order(entry, source, recipe, calibration, data_sha256))
                    for recipe in self._zoo.recipes_of(entry)
                    if (entry.id, recipe.name) not in self.refused
                ]
        self._refuse_twins(ordered)
        self._refuse_names(ordered)
        self.made = [(s, order) for entry, s, order in ordered if (entry.id, order.recipe.name) not in self.refused]

    def _order(
        self,
        entry: ModelEntry,
        source: PinnedModel,
        recipe: Recipe,
        calibration: Calibration | None,
        data_sha256: str | None,
    ) -> Order:
        publish, own = self._zoo.publish, _for_source(source, recipe)
        return Order(
            recipe=own,
            fingerprint=fingerprint(
                source.pin, own, calibration and calibration.within(positions(source.config)), data_sha256
            ),
            thresholds=self._zoo.thresholds(entry, recipe),
            repo_id=publish.repo_id(source.name, recipe) if publish else None,
            gathered=publish is not None and publish.gathers(recipe.format),
            runtimes=self._zoo.runtimes_of(recipe),
        )

    def _refuse_twins(self, ordered: Sequence[tuple[ModelEntry, PinnedModel, Order]]) -> None:
        """Refuse a second cell with the same fingerprint: it would be one artifact, made twice in the same folder."""
        owners: dict[str, tuple[str, str]] = {}
        for entry, _, order in ordered:
            model, recipe = owners.setdefault(order.fingerprint, (entry.id, order.recipe.name))
            message = (
                f"{entry.id!r} under {order.recipe.name!r} is the same artifact as {model!r} under {recipe!r}; "
                "list it once"
            )
            if model == entry.id and recipe != order.recipe.name:
                raise ZooError(message)
            if model != entry.id:
                self._refuse(entry, [order.recipe], UnsupportedModel(message))

    def _refuse_names(self, ordered: Sequence[tuple[ModelEntry, PinnedModel, Order]]) -> None:
        """Refuse repositories that a Hub doesn't take, or that several cells would share."""
        owners: dict[str, list[tuple[ModelEntry, Order]]] = defaultdict(list)
        for entry, source, order in ordered:
            if order.repo_id is None or (entry.id, order.recipe.name) in self.refused:
                continue
            if why := invalid_name(order.repo_id):
                longest = NAME_LENGTH - (len(order.repo_id.partition("/")[2]) - len(source.name))
                remedy = f"set as: {proposed_name(source.name, longest)} for this model"
                message = f"models: {entry.id!r}: no repository can be named {order.repo_id!r} ({why}); {remedy}"
                self._refuse(entry, [order.recipe], UnsupportedModel(message))
            else:
                # Hubs don't tell upper from lower case in names.
                owners[order.repo_id.casefold()].append((entry, order))
        for cells in owners.values():
            self._refuse_files([(entry, order) for entry, order in cells if order.gathered])
            shared = len({entry.id for entry, _ in cells}) == 1 and all(order.gathered for _, order in cells)
            for entry, order in cells if len(cells) > 1 and not shared else ():
                others = sorted({other.id for other, _ in cells} - {entry.id})
                message = (
                    f"models: {entry.id!r} and {', '.join(map(repr, others))} would share the repository "
                    f"{order.repo_id!r} (Hubs don't tell upper from lower case); give one of them another name, by as:"
                )
                self._refuse(entry, [order.recipe], UnsupportedModel(message))

    def _refuse_files(self, gathered: Sequence[tuple[ModelEntry, Order]]) -> None:
        """Refuse what would have a file of the same name in a shared repository: the scheme alone names files."""
        owners: dict[tuple[str, str], str] = {}
        for entry, order in gathered:
            first = owners.setdefault((entry.id, order.recipe.scheme.model_dump_json()), order.recipe.name)
            if first != order.recipe.name:
                message = (
                    f"models: {entry.id!r}: recipes {first!r} and {order.recipe.name!r} would have one file in the "
                    f"repository {order.repo_id!r}; leave one out, or put {{recipe}} into publish.name"
                )
                self._refuse(entry, [order.recipe], UnsupportedRecipe(message))

    def _refuse(self, entry: ModelEntry, recipes: Sequence[Recipe], error: Exception) -> None:
        failure = failure_of(entry, error)
        source = self.sources.get(entry.id)
        name = source.name if source else sources.model_name(entry, self._folder)
        revision = source.pin.revision if source else ""
        model = source.pin.id if source else entry.id
        for recipe in recipes:
            cell = RefusedArtifact(model, name, recipe.name, failure, revision)
            self.refused.setdefault((entry.id, recipe.name), cell)


def _for_source(source: PinnedModel, recipe: Recipe) -> Recipe:
    """The recipe as it applies to a source: one that keeps codes has those of the source.

    Raises:
        UnsupportedRecipe: the source isn't quantized, or the recipe's format would lose something of it.
        UnsupportedModel: the source is quantized, and the recipe quantizes.
    """
    if not isinstance(recipe, KeepRecipe):
        if source.kept is not None:
            raise UnsupportedModel(
                f"models: {source.pin.id!r} is quantized already ({source.kept.format}), and recipe {recipe.name!r} "
                "quantizes; name the original checkpoint for it, or give that model recipes of method: keep alone"
            )
        return modules.with_layers_of(source, recipe)
    if source.decoded is not None:
        raise UnsupportedRecipe(
            f"recipe {recipe.name!r}: method keep takes a quantized checkpoint as it is, and {source.pin.id!r} is "
            "decoded here; list it once more with `as: NAME`, source: original and recipes of method: keep alone"
        )
    if source.kept is None:
        raise UnsupportedRecipe(
            f"recipe {recipe.name!r}: method keep converts a checkpoint that is quantized already, and "
            f"{source.pin.id!r} isn't; name one in the format {' or '.join(kept.SOURCES)}"
        )
    found = kept.resolved(recipe, source.kept)
    if isinstance(found, str):
        raise UnsupportedRecipe(f"recipe {recipe.name!r}, {source.pin.id!r}: {found}")
    return found


def failure_of(entry: ModelEntry, error: Exception) -> Failure:
    """An error as a model's failure, naming the model."""
    failure = describe(error)
    if repr(entry.id) in failure.message or f" {entry.id}" in failure.message:
        return failure
    return failure.model_copy(update={"message": f"models: {entry.id!r}: {failure.message}"})


def at_once(look: Callable[[T], U], things: Sequence[T]) -> list[U]:
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


def invalid_name(repo_id: str) -> str | None:
    """Why a Hub takes no repository of that name; None: it does."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        return brief(error)
    return None


def proposed_name(name: str, longest: int = NAME_LENGTH) -> str:
    """A name that a repository can have, near to ``name``, in at most ``longest`` characters."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    plain = re.sub(r"-{2,}|\.{2,}", lambda found: found[0][0], plain)
    return plain.strip("-._")[: max(longest, 1)].strip("-._") or "model"


def _too_long(source: PinnedModel, calibration: Calibration | None, verification: Verification) -> Iterator[str]:
    """Messages about sequence lengths (tokens) above the model's number of positions."""
    longest = positions(source.config)
    calibration = calibration and calibration.within(longest)
    lengths = {"verify": verification.sequence_length, "calibration": calibration.sequence_length if calibration else 0}
    for where, length in lengths.items():
        if longest is not None and length > longest:
            yield (
                f"{where}.sequence_length: got {length}, but {source.pin.id!r} has {longest} positions; set at most "
                f"{longest}"
            )
