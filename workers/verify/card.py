"""Renders an artifact's model card: what was done, what was measured, how to load it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from workers.errors import CheckpointError
from workers.machine.files import read_bounded
from workers.spec.bounded_yaml import BadYaml, parse_yaml
from workers.spec.bounds import CARD_BYTES, printable, printable_lines
from workers.spec.data import Calibration, Dataset
from workers.spec.job import Job, Order, Verdict
from workers.spec.runtimes import checkers
from workers.verify.card_body import Told, body

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags")


# Those that the Hub takes as lists, too.
LISTS = ("license", "language", "tags")


def render_card(job: Job, order: Order, source: Path, verdict: Verdict, told: Told) -> str:
    """Render ``README.md`` of an artifact; metadata of the card in the ``source`` folder is inherited."""
    metadata = card_metadata(job, order, read_metadata(source / "README.md"), verdict)
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    zoo = yaml.safe_dump(zoo_of(job, order), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{printable_lines(body(job, order, verdict, told, zoo))}"


def read_metadata(card: Path) -> dict[str, Any]:
    """The YAML block at the top of a card; empty if there is none."""
    try:
        text = read_bounded(card, CARD_BYTES, str(card)).decode("utf-8") if card.is_file() else ""
        block = re.match(r"---\r?\n(.*?\n)---", text, re.DOTALL)
        loaded = parse_yaml(block[1]) if block else None
    except (CheckpointError, BadYaml, UnicodeDecodeError):
        return {}  # an invalid card of the source is no error of ours
    if not isinstance(loaded, dict):
        return {}
    words = {key: _plain_words(loaded.get(key)) for key in INHERITED}
    return {key: value for key, value in words.items() if value and (isinstance(value, str) or key in LISTS)}


def _plain_words(value: Any) -> str | list[str] | None:
    """A text, or a list of texts, as the Hub takes them in metadata; None for anything else."""
    if isinstance(value, list):
        return [printable(item)[:200] for item in value if isinstance(item, str)][:100]
    return printable(value)[:500] if isinstance(value, str) else None


def card_metadata(job: Job, order: Order, source: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    """The card's YAML metadata, under the Hub's names."""
    inherited = {key: source[key] for key in INHERITED if key in source}
    theirs = inherited.pop("tags", None)
    tags = [*(theirs if isinstance(theirs, list) else []), "quantmill", order.recipe.format, order.recipe.method]
    base = {} if job.model.folder else {"base_model": job.model.id, "base_model_relation": "quantized"}
    metadata = {
        **base,
        "library_name": checkers(order.recipe.format, order.runtimes)[0].library,
        "pipeline_tag": "text-generation",
        **inherited,
        "tags": list(dict.fromkeys(tags)),
    }
    if verdict.metrics is not None:
        metadata["model-index"] = [_model_index(job, order, verdict)]
    return metadata


def _model_index(job: Job, order: Order, verdict: Verdict) -> dict[str, Any]:
    """The evaluation results, in the form of huggingface_hub's ``eval_results_to_model_index``."""
    metrics, text = verdict.metrics, job.verification.dataset
    assert metrics is not None
    values = (
        ("perplexity", "Perplexity", metrics.perplexity),
        ("kl_divergence_to_reference", "KL divergence to the original, nats", metrics.kl_mean),
        ("top1_agreement_with_reference", "Top-1 agreement with the original", metrics.top1_agreement),
    )
    on_the_hub = {"config": text.name, "split": text.split, "revision": text.revision} if text.revision else {}
    return {
        "name": f"{Path(job.model.id).name}-{order.recipe.name}",
        "results": [
            {
                "task": {"type": "text-generation", "name": "Text Generation"},
                "dataset": {
                    "name": text.path if text.revision else "held-out text",
                    "type": text.path if text.revision else "text",
                    **{key: value for key, value in on_the_hub.items() if value is not None},
                },
                # Skip NaN/Inf: not valid in model-index; the verdict has the reasons.
                "metrics": [
                    {"type": kind, "value": round(value, 6), "name": name}
                    for kind, name, value in values
                    if math.isfinite(value)
                ],
            }
        ],
    }


def zoo_of(job: Job, order: Order) -> dict[str, Any]:
    """A zoo file of this one artifact, without the paths of this machine."""
    model = (
        {"id": Path(job.model.id).name} if job.model.folder else {"id": job.model.id, "revision": job.model.revision}
    )
    flags: dict[str, bool | str] = {
        name: True for name in ("trust_remote_code", "allow_pickle") if getattr(job.model, name)
    }
    flags |= {"variant": job.model.variant} if job.model.variant else {}
    flags |= {"source": "dequantize"} if job.model.dequantize else {}
    verify = {**_plain(job.verification), "dataset": _text(job.verification.dataset)}
    if job.verification.shown:
        verify["shown"] = _text(job.verification.shown)
    for digest in ("data", "shown_data"):  # of the content, computed by the plan
        verify.pop(digest, None)
    verify |= {"runtimes": list(order.runtimes)} if order.runtimes else {}
    zoo: dict[str, Any] = {
        "name": "again",
        "models": [{**model, **flags}],
        "recipes": [short(order.recipe)],
    }
    if job.calibration is not None and order.recipe.calibrated:
        zoo["calibration"] = _calibration(job.calibration)
    return {**zoo, "verify": verify}


# Keys by which kinds of recipes and schemes are told apart, written also where they hold the default.
TOLD_BY = frozenset({"name", "method", "format", "type", "engine"})


def short(value: Any) -> Any:
    """A value of the data model as a zoo file says it: without what is so anyway."""
    if isinstance(value, BaseModel):
        fields, dumped = type(value).model_fields, value.model_dump(mode="json")
        return {
            name: short(getattr(value, name)) if isinstance(getattr(value, name), BaseModel | tuple) else dumped[name]
            for name, field in fields.items()
            if name in TOLD_BY or getattr(value, name) != field.get_default(call_default_factory=True)
        }
    return [short(item) for item in value] if isinstance(value, tuple) else value


def _plain(value: BaseModel) -> dict[str, Any]:
    return value.model_dump(mode="json")


def _calibration(calibration: Calibration) -> dict[str, Any]:
    """Its settings with the data sets written out, as they were pinned, not by the name of their set."""
    content = _plain(calibration.model_copy(update={"set": None}))
    texts = [_text(dataset) for dataset in calibration.datasets]
    return {**content, **({"dataset": texts[0]} if calibration.dataset is not None else {"mixture": texts})}


def _text(dataset: Dataset) -> dict[str, Any]:
    return dataset.public.model_dump(mode="json", exclude_none=True)
