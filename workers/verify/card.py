"""Renders an artifact's model card: what was done, what was measured, how to load it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from workers.errors import CheckpointError
from workers.machine.files import read_bounded
from workers.spec.bounded_yaml import BadYaml, parse_yaml
from workers.spec.bounds import CARD_BYTES, printable, printable_lines
from workers.spec.data import Calibration, Dataset
from workers.spec.families import DEFAULT_LOADER
from workers.spec.job import CHECKED, Job, Order, PictureCheck, RuntimeAgreement, SourceCheck, Verdict
from workers.spec.layers import LayerKinds
from workers.spec.recipes import BitsAndBytesRecipe, GgufRecipe, KeepRecipe, Recipe, TransformersRecipe, words
from workers.spec.runtimes import RUNTIMES, Runtime, checkers

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags")


# Those that the Hub takes as lists, too.
LISTS = ("license", "language", "tags")


def render_card(
    job: Job,
    order: Order,
    source: Path,
    verdict: Verdict,
    environment: Mapping[str, str],
    fallbacks: tuple[str, ...],
    kinds: LayerKinds,
    loader: str = DEFAULT_LOADER,
    checked: SourceCheck | None = None,
) -> str:
    """Render ``README.md`` of an artifact; metadata of the card in the ``source`` folder is inherited.

    ``kinds`` are the kinds of the quantized layers: other runtimes' support depends on them. ``loader`` is
    transformers' class for the family; ``checked`` is how the original was compared with what transformers loads.
    """
    metadata = card_metadata(job, order, read_metadata(source / "README.md"), verdict)
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    body = _body(job, order, verdict, environment, fallbacks, kinds, loader, checked)
    return f"---\n{front}---\n\n{printable_lines(body)}"


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


def _body(
    job: Job,
    order: Order,
    verdict: Verdict,
    environment: Mapping[str, str],
    fallbacks: tuple[str, ...],
    kinds: LayerKinds,
    loader: str = DEFAULT_LOADER,
    checked: SourceCheck | None = None,
) -> str:
    name = Path(job.model.id).name
    recipe = order.recipe
    repo = order.repo_id or f"{name}-{recipe.name}"
    if isinstance(recipe, GgufRecipe):
        repo += f":{recipe.scheme.mix.upper()}"  # the repository may have other files
    parts = [
        f"# {name}, {recipe.name}\n",
        _made_of(job, recipe),
        *_calibrated_on(job, recipe),
        "## Measured\n",
        _measured(verdict, _reference(job, recipe)),
        *_source_checked(checked),
        "## Load it\n",
        *(_loading(runtime, recipe, repo, loader) for runtime in checkers(recipe.format, order.runtimes)),
        *_other_runtimes(order, repo, kinds, loader),
        "## Train on it\n",
        _training(recipe, repo, loader),
    ]
    if fallbacks:
        parts += ["## Deviations from the recipe\n", "".join(f"- {line}\n" for line in fallbacks)]
    parts += [
        "## Make it again\n",
        _made_with(job, order, environment),
        f"Fingerprint `{order.fingerprint}`; `quantmill.json` has the sha256 of every file. Made with:\n",
        "".join(f"- {package} {version}\n" for package, version in environment.items()),
    ]
    return "\n".join(parts)


def _reference(job: Job, recipe: Recipe) -> str:
    """What the artifact was compared with."""
    decoded = job.model.dequantize or isinstance(recipe, KeepRecipe)
    return "the source, decoded" if decoded else "the half-precision original"


def _made_of(job: Job, recipe: Recipe) -> str:
    """What was made of which model."""
    at = f"{Path(job.model.id).name} at `{job.model.revision[:12]}`"
    if isinstance(recipe, KeepRecipe):
        return (
            f"{job.model.id} at `{job.model.revision[:12]}`, which is quantized in the format {recipe.source}, "
            f"converted by quantmill to {recipe.format} without loss: the same codes, scales and zero points "
            f"({words(recipe)}). Every decoded weight was compared with the source's, and is equal bit for bit.\n"
        )
    decoded = ", from what its own quantized weights decode to" if job.model.dequantize else ""
    return f"{at}, quantized by quantmill{decoded}: {words(recipe)} (method {recipe.method}, format {recipe.format}).\n"


def _calibrated_on(job: Job, recipe: Recipe) -> Iterator[str]:
    if job.calibration is not None and recipe.calibrated:
        yield f"Calibrated on {job.calibration.public.described}.\n"


def _loading(runtime: Runtime, recipe: Recipe, repo: str, loader: str) -> str:
    """How to load it in a runtime."""
    needs = recipe.scheme.packages if isinstance(recipe, TransformersRecipe) else ()
    install = " ".join([runtime.install(recipe.format), *needs])
    return f"```\n{install}\n```\n\n```python\n{runtime.snippet(repo, loader)}```\n"


def _other_runtimes(order: Order, repo: str, kinds: LayerKinds, loader: str) -> Iterator[str]:
    """What is known about the runtimes that it wasn't checked in."""
    recipe = order.recipe
    checked = checkers(recipe.format, order.runtimes)
    for runtime in RUNTIMES.values():
        if runtime in checked or recipe.format not in runtime.rules:
            continue
        why = runtime.reads(recipe.format, recipe.scheme, kinds)
        if why:
            yield f"{runtime.name}: the quantized layers {why}.\n"
        else:
            seen = f"; files of this scheme and format were read by {runtime.tried}" if runtime.tried else ""
            yield f"Not checked in {runtime.name}{seen}:\n\n{_loading(runtime, recipe, repo, loader)}"


def _training(recipe: Recipe, repo: str, loader: str) -> str:
    """How adapters are trained on it, or that they aren't."""
    if not isinstance(recipe, BitsAndBytesRecipe):
        return (
            "For inference only: training on this format wasn't tried. Adapters are trained on the original, or on a "
            "bitsandbytes artifact of it (recipes `bnb-nf4` and `bnb-int8`).\n"
        )
    return (
        "Its layers pass gradients on, so that adapters can be trained on it (QLoRA, arXiv 2305.14314):\n\n"
        "```\npip install peft\n```\n\n```python\n"
        "from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training\n"
        f"from transformers import {loader}\n\n"
        f'model = {loader}.from_pretrained("{repo}")\n'
        "model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)\n"
        'model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", '
        'task_type="CAUSAL_LM"))\n```\n'
    )


def _made_with(job: Job, order: Order, environment: Mapping[str, str]) -> str:
    """A zoo file that makes the same artifact, and the commands to run it."""
    zoo = yaml.safe_dump(zoo_of(job, order), sort_keys=False, allow_unicode=True)
    version = f"=={environment['quantmill']}" if "quantmill" in environment else ""
    local = "" if job.model.folder is None else " The model was a folder of that name, pinned by its content."
    return (
        f"Write this to `again.yaml`:\n\n```yaml\n{zoo}```\n\n"
        f"```\npip install quantmill{version}\nquantmill run again.yaml\n```\n\n"
        f"Data files are those beside the zoo file, by their names.{local}\n"
    )


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
        "recipes": [_plain(order.recipe)],
    }
    if job.calibration is not None and order.recipe.calibrated:
        zoo["calibration"] = _calibration(job.calibration)
    return {**zoo, "verify": verify}


def _plain(value: BaseModel) -> dict[str, Any]:
    return value.model_dump(mode="json")


def _calibration(calibration: Calibration) -> dict[str, Any]:
    """Its settings with the data sets written out, as they were pinned, not by the name of their set."""
    content = _plain(calibration.model_copy(update={"set": None}))
    texts = [_text(dataset) for dataset in calibration.datasets]
    return {**content, **({"dataset": texts[0]} if calibration.dataset is not None else {"mixture": texts})}


def _text(dataset: Dataset) -> dict[str, Any]:
    return dataset.public.model_dump(mode="json", exclude_none=True)


def _measured(verdict: Verdict, reference: str) -> str:
    metrics = verdict.metrics
    if metrics is None:
        return "Nothing: the artifact failed before it could be measured.\n"
    lines = [
        f"Against {reference}, on {metrics.eval_tokens} held-out tokens:\n",
        "| | this checkpoint | original |",
        "|---|---|---|",
        f"| perplexity | {metrics.perplexity:.4f} | {metrics.reference_perplexity:.4f} |",
        f"| KL divergence, mean (p99), nats | {metrics.kl_mean:.5f} ({metrics.kl_p99:.4f}) | 0 |",
        f"| top-1 agreement (95 % bound) | {metrics.top1_agreement:.4f} ({metrics.top1_agreement_lower:.4f}) | 1 |",
    ]
    lines += map(_loaded, verdict.runtimes)
    if verdict.picture is not None:
        lines.append(_picture(verdict.picture))
    return "\n".join([*lines, *_continued(verdict)]) + "\n"


def _loaded(runtime: RuntimeAgreement) -> str:
    """What a runtime's check came to; one without its kernels says so."""
    within = f"logits within {runtime.max_abs_logit_difference:.2g} of the measured ones"
    on = f" on {runtime.processor}" if runtime.processor else ""
    if runtime.verdict == CHECKED:
        return f"\nLoaded by {runtime.name} {runtime.version}{on}: {within}."
    return (
        f"\nLoaded by {runtime.name} {runtime.version}'s own loader{on}; its kernels weren't run on this processor, "
        f"and PyTorch computed with what it loaded: {within}."
    )


def _picture(picture: PictureCheck) -> str:
    if picture.unchecked:
        return f"\nNo picture was shown to it: {picture.unchecked}."
    return (
        f"\nA picture was shown to it and to the original in transformers {picture.version}: KL divergence on the "
        f"{picture.tokens} tokens after it {picture.kl_mean:.5f} nats, top-1 agreement {picture.top1_agreement:.2f}."
    )


def _source_checked(checked: SourceCheck | None) -> list[str]:
    """How the original was compared with what transformers loads; nothing if it wasn't."""
    if checked is None or checked.unchecked:
        return []
    cut = f", of its first {checked.layers} of {checked.all_layers} layers" * (checked.layers < checked.all_layers)
    return [
        f"The original's reading was checked against transformers {checked.version}{cut}: logits of {checked.tokens} "
        f"tokens within {checked.relative_logit_difference:.1g} standard deviations.\n"
    ]


def _continued(verdict: Verdict) -> list[str]:
    """Greedy continuations next to the original's, up to the first differing token."""
    if not verdict.generations:
        return []
    lines = ["\nGreedy continuations, the original's up to the first token that differs:\n", "```"]
    for generation in verdict.generations:
        same = f"{generation.same_tokens} of {generation.tokens} tokens alike"
        lines += [
            f"after     {generation.prompt[-80:]!r}",
            f"this      {generation.artifact!r}",
            f"original  {generation.reference!r} ({same})",
        ]
    return [*lines, "```"]
