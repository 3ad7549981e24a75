"""Implement ``quantmill calibration show``: the sequences that a zoo's models are calibrated on, as they see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checking import ask
from pipeline.planning import sources
from pipeline.planning.automatic import load
from pipeline.planning.configs import positions
from pipeline.zoo import shipped
from pipeline.zoo.zoo import Zoo
from workers.errors import ZooError
from workers.spec.base import meant
from workers.spec.data import Calibration
from workers.transfer import from_hub, hub

# What stands for the zoo's own calibration, instead of the name of a set.
OWN = "zoo"


def sample(
    name: str, zoo_file: Path, model: str | None, shown: int, tokens: int | None = None
) -> tuple[Calibration, list[dict[str, Any]]]:
    """The first sequences of each data set of a calibration for a model of a zoo (left out: its first).

    ``name`` is that of a shipped set, or ``zoo`` for the zoo's own. ``tokens``: of a sequence, instead of what the zoo
    says. Returns the calibration, and ``workers.model.sample.Shown`` as JSON for each sequence.

    Raises:
        QuantmillError: no such set or model, or text that can't be read.
    """
    zoo = load(zoo_file)
    calibration = _calibration(name, zoo)
    ids = [entry.id for entry in zoo.models]
    if model is not None and model not in ids:
        raise ZooError(f"--model: not in the zoo, got {model!r}; {meant(model, ids)}it has {', '.join(ids)}")
    entry = zoo.models[ids.index(model) if model is not None else 0]
    if tokens is not None:
        calibration = calibration.model_copy(update={"sequence_length": tokens})
    source = sources.resolve(entry, zoo_file.parent, calibrated=True)
    pin = source.pin
    if pin.folder is None:
        folder = from_hub.fetch(hub.connect(pin.endpoint), pin.id, pin.revision, pin.allow_pickle, weights=False)
        pin = pin.model_copy(update={"folder": str(folder)})
    calibration = sources.pin_calibration(
        calibration.within(positions(source.config)), zoo.special_tokens, zoo_file.parent
    )[0]
    asked = {
        "model": pin.model_dump(mode="json"),
        "calibration": calibration.model_dump(mode="json"),
        "shown": shown,
    }
    answer = ask("workers.model.sample", asked, None)
    return calibration, list(answer["sequences"])


def _calibration(name: str, zoo: Zoo) -> Calibration:
    if name == OWN:
        if zoo.calibration is None:
            raise ZooError(f"calibration show: the zoo {zoo.name!r} calibrates nothing; name a set, as general")
        return zoo.calibration
    try:
        content = shipped.filled_in(name)
    except ValueError as error:
        raise ZooError(f"calibration show: {error}") from None
    settings = zoo.calibration.model_dump(include={"samples", "seed"}) if zoo.calibration else {}
    return Calibration.model_validate({**settings, **dict(content)})  # type: ignore[call-overload]
