"""The text of an artifact's model card: what it is, what was measured, how to use it, how to make it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from workers.spec.families import DEFAULT_LOADER
from workers.spec.job import CHECKED, Job, Order, PictureCheck, RuntimeAgreement, SourceCheck, Verdict
from workers.spec.layers import LayerKinds
from workers.spec.recipes import BitsAndBytesRecipe, GgufRecipe, KeepRecipe, Recipe, TransformersRecipe, words
from workers.spec.runtimes import RUNTIMES, Runtime, checkers

BADGE = "https://img.shields.io/badge"


@dataclass(frozen=True)
class Told:
    """What a card tells besides the job: of which kinds the quantized layers are, and how the artifact is used.

    ``loader`` is transformers' class for the family; ``checked`` how the original was compared with what transformers
    loads; ``bytes`` and ``reference_bytes`` the sizes of the weights, 0 if not known; ``zoo`` the zoo file that makes
    it again; ``kept`` the tensors beside the model that stay as they are; ``chart`` the file beside the card.
    """

    environment: Mapping[str, str]
    kinds: LayerKinds = field(default_factory=LayerKinds)
    fallbacks: tuple[str, ...] = ()
    loader: str = DEFAULT_LOADER
    checked: SourceCheck | None = None
    bytes: int = 0
    reference_bytes: int = 0
    chats: bool = False
    chart: str | None = None


def body(job: Job, order: Order, verdict: Verdict, told: Told, zoo: str) -> str:
    """The card below its metadata, as Markdown; ``zoo`` is the text of the zoo file that makes the artifact again."""
    name, recipe = Path(job.model.id).name, order.recipe
    repo = order.repo_id or f"{name}-{recipe.name}"
    if isinstance(recipe, GgufRecipe):
        repo += f":{recipe.scheme.mix.upper()}"  # the repository may have other files
    parts = [
        f"# {name}, {recipe.name}\n",
        _badges(order, verdict),
        _made_of(job, recipe),
        *_calibrated_on(job, recipe),
        "## Measured\n",
        _measured(verdict, told, _reference(job, recipe)),
        *([f"![weights, KL divergence beside its gate, and noise by layer]({told.chart})\n"] if told.chart else []),
        *_source_checked(told.checked),
        "## Use it\n",
        *(_loading(runtime, recipe, repo, told) for runtime in checkers(recipe.format, order.runtimes)),
        *_other_runtimes(order, repo, told),
        "## Train on it\n",
        training(recipe, repo, told.loader),
        *_siblings(job, order),
        *_continued(verdict),
    ]
    if told.fallbacks:
        parts += ["## Deviations from the recipe\n", "".join(f"- {line}\n" for line in told.fallbacks)]
    parts += ["## Make it again\n", _made_with(job, order, told.environment, zoo)]
    return "\n".join(parts)


def _badges(order: Order, verdict: Verdict) -> str:
    """The facts that a reader looks for first, as small pictures with their text."""
    facts = [("format", order.recipe.format)]
    if verdict.metrics is not None:
        facts.append(("KL divergence", f"{verdict.metrics.kl_mean:.2g} nats"))
        facts.append(("top-1 agreement", f"{100 * verdict.metrics.top1_agreement:.1f} %"))
    for runtime in verdict.runtimes:
        kind = "checked in" if runtime.verdict == CHECKED else "loader checked"
        facts.append((kind, f"{runtime.name} {runtime.version}"))
    return " ".join(_badge(*fact) for fact in facts) + "\n"


def _badge(what: str, value: str) -> str:
    path = "-".join(quote(text.replace("-", "--").replace("_", "__"), safe="") for text in (what, value))
    return f"![{what}: {value}]({BADGE}/{path}-informational)"


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


# ------------------------------------------------------------------------------------------- measured


def _measured(verdict: Verdict, told: Told, reference: str) -> str:
    metrics = verdict.metrics
    if metrics is None:
        return "Nothing: the artifact failed before it could be measured.\n"
    recovered = 100 * metrics.reference_perplexity / metrics.perplexity if metrics.perplexity > 0 else 0.0
    lines = [
        f"Against {reference}, on {metrics.eval_tokens} held-out tokens:\n",
        "| | this checkpoint | original |",
        "|---|---|---|",
        *_sizes(told),
        f"| perplexity (recovered) | {metrics.perplexity:.4f} ({recovered:.2f} %) | "
        f"{metrics.reference_perplexity:.4f} |",
        f"| KL divergence, mean (bound; p99), nats | {metrics.kl_mean:.5f} ({metrics.kl_mean_upper:.5f}; "
        f"{metrics.kl_p99:.4f}) | 0 |",
        f"| top-1 agreement (95 % bound) | {metrics.top1_agreement:.4f} ({metrics.top1_agreement_lower:.4f}) | 1 |",
    ]
    lines += map(_loaded, verdict.runtimes)
    if verdict.picture is not None:
        lines.append(_picture(verdict.picture))
    return "\n".join(lines) + "\n"


def _sizes(told: Told) -> Iterator[str]:
    if told.bytes and told.reference_bytes:
        share = 100 * told.bytes / told.reference_bytes
        yield f"| weights | {_size(told.bytes)} ({share:.0f} %) | {_size(told.reference_bytes)} |"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


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


# ------------------------------------------------------------------------------------------- use


def _loading(runtime: Runtime, recipe: Recipe, repo: str, told: Told) -> str:
    """How to load and use it in a runtime."""
    needs = recipe.scheme.packages if isinstance(recipe, TransformersRecipe) else ()
    install = " ".join([runtime.install(recipe.format), *needs])
    return f"```\n{install}\n```\n\n```python\n{runtime.snippet(repo, told.loader, told.chats)}```\n"


def _other_runtimes(order: Order, repo: str, told: Told) -> Iterator[str]:
    """What is known about the runtimes that it wasn't checked in."""
    recipe = order.recipe
    checked = checkers(recipe.format, order.runtimes)
    for runtime in RUNTIMES.values():
        if runtime in checked or recipe.format not in runtime.rules:
            continue
        why = runtime.reads(recipe.format, recipe.scheme, told.kinds)
        if why:
            yield f"{runtime.name}: the quantized layers {why}.\n"
        else:
            seen = f"; files of this scheme and format were read by {runtime.tried}" if runtime.tried else ""
            yield f"Not checked in {runtime.name}{seen}:\n\n{_loading(runtime, recipe, repo, told)}"


def training(recipe: Recipe, repo: str, loader: str) -> str:
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
        'checkpointing = {"use_reentrant": False}\n'
        "model = prepare_model_for_kbit_training(model, True, checkpointing)\n"
        'model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", '
        'task_type="CAUSAL_LM"))\n```\n'
    )


# ------------------------------------------------------------------------------------------- and the rest


def _siblings(job: Job, order: Order) -> Iterator[str]:
    """The artifacts of the same model that were ordered with it."""
    others = [one for one in job.orders if one.repo_id and one.repo_id != order.repo_id]
    if others:
        yield "## Other recipes of this model\n"
        yield "".join(f"- `{one.repo_id}`: {words(one.recipe)}, format {one.recipe.format}\n" for one in others)


def _continued(verdict: Verdict) -> Iterator[str]:
    """Greedy continuations next to the original's, up to the first differing token."""
    if not verdict.generations:
        return
    yield "## How it goes on\n"
    yield "Greedy continuations of held-out text, this checkpoint's and the original's up to where they part:\n"
    for one in verdict.generations:
        alike = f"{one.same_tokens} of {one.tokens} tokens alike"
        said = f"{one.prompt[-160:].strip()}\n→ {one.artifact.strip()}"
        parted = "" if one.same_tokens == one.tokens else f"\noriginal → {one.reference.strip()}"
        yield f"{alike}:\n\n{_fenced(said + parted)}"


def _fenced(text: str) -> str:
    """A text as a block of Markdown, whatever fences it holds."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}\n"


def _made_with(job: Job, order: Order, environment: Mapping[str, str], zoo: str) -> str:
    """A zoo file that makes the same artifact, and with what it was made."""
    version = f" {environment['quantmill']}" if "quantmill" in environment else ""
    local = "" if job.model.folder is None else " The model was a folder of that name, pinned by its content."
    return (
        f"With quantmill{version} installed from its repository, `quantmill run again.yaml` makes it from this zoo:\n\n"
        f"<details><summary>again.yaml</summary>\n\n```yaml\n{zoo}```\n\n</details>\n\n"
        f"Data files are those beside the zoo file, by their names.{local}\n\n"
        f"Fingerprint `{order.fingerprint}`; `quantmill.json` has the sha256 of every file. Made with "
        f"{', '.join(f'{package} {version}' for package, version in environment.items())}.\n"
    )
