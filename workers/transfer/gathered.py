"""A gathered repository: several artifacts of one model, each of one weight file, with one card.

    README.md                   the card: a table of all files
    quantmill.png               its chart
    quantmill.json              the index: whose files these are, with their sha256
    <model>-<TYPE>.gguf         the weight file of each artifact
    tokenizer.json, ...         what artifacts share, of the last that was published
    quantmill/<recipe>/         an artifact's own manifest, card, chart and config.json

The index has a fingerprint and files as an artifact's manifest has, so that a publish is tagged, and checked for what
somebody else changed, in the same way.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from workers.errors import HubRefused
from workers.spec.base import Frozen, canonical_json
from workers.spec.bounded_yaml import BadYaml, parse_yaml
from workers.spec.bounds import printable_lines
from workers.spec.checkpoint_files import CONFIG, WEIGHTS
from workers.spec.formats import can_be_gathered, gathered_formats
from workers.spec.ggml import IMATRIX, PROJECTOR, is_beside
from workers.spec.job import FileEntry
from workers.spec.recipes import words
from workers.spec.workspace import CHART, MANIFEST
from workers.transfer import charts
from workers.transfer.artifact import Artifact

CARD = "README.md"
# Files that each artifact has its own of.
OWN = (MANIFEST, CARD, CHART, CONFIG)
OWN_FOLDER = "quantmill"
# Mean KL divergence to the original, in nats for each token, up to which a file is called near to it.
NEAR = 0.01


class Member(Frozen):
    """One artifact of a gathered repository; ``kl_mean`` in nats for each token."""

    recipe: str
    fingerprint: str
    model: str
    revision: str
    words: str
    file: str
    bytes: int
    kl_mean: float | None = None
    top1_agreement: float | None = None
    text: str = Field("", description="What stands for the held-out text that it was compared on.")

    @property
    def manifest_path(self) -> str:
        """Where its manifest is."""
        return own_path(self.recipe, MANIFEST)

    @property
    def paths(self) -> frozenset[str]:
        """The files that are its own."""
        return frozenset({self.file, *(own_path(self.recipe, name) for name in OWN)})


class Index(Frozen):
    """``quantmill.json`` of a gathered repository; ``latest`` is the recipe of the last commit."""

    schema_version: Literal[1] = 1
    kind: Literal["gathered"] = "gathered"
    fingerprint: str
    latest: str
    members: tuple[Member, ...]
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Content:
    """What a repository is to show: the files of an artifact by their paths there, and those that stay as they are.

    ``places`` are paths in the artifact's folder, ``written`` the files that are made for the repository alone.
    """

    artifact: Artifact
    fingerprint: str
    places: Mapping[str, str]
    written: Mapping[str, bytes]
    kept: frozenset[str] = frozenset()

    @property
    def paths(self) -> tuple[str, ...]:
        """All files that are this content's to send."""
        return (*self.places, *self.written)

    def local(self, path: str) -> Path:
        """The file of the artifact that is sent as this one."""
        return self.artifact.folder / self.places[path]

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return len(self.written[path]) if path in self.written else self.artifact.sizes[self.places[path]]

    def is_at(self, path: str, identity: str) -> bool:
        """Whether a file has the identity that a Hub reports: sha256 (LFS) or git blob sha1."""
        if path in self.places:
            return self.artifact.is_at(self.places[path], identity)
        data = self.written[path]
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        return identity in (hashlib.sha256(data).hexdigest(), blob)

    def read(self, path: str) -> bytes:
        """A small file's content.

        Raises:
            CheckpointError: the file changed since it was verified.
        """
        return self.written[path] if path in self.written else self.artifact.read(self.places[path])

    def check(self, path: str, sha256: str) -> None:
        """Raise CheckpointError if a file changed since it was verified."""
        if path in self.places:
            self.artifact.check(self.places[path], sha256)


def alone(artifact: Artifact) -> Content:
    """The content of a repository of one artifact."""
    return Content(artifact, artifact.manifest.fingerprint, {path: path for path in artifact.sha256}, {})


def own_path(recipe: str, name: str) -> str:
    """Path of a file that each artifact has its own of."""
    return f"{OWN_FOLDER}/{recipe}/{name}"


def is_gathered(tree: Iterable[str]) -> bool:
    """Whether paths of a repository are those of a gathered one."""
    own = re.compile(rf"{OWN_FOLDER}/[^/]+/{re.escape(MANIFEST)}")
    return any(own.fullmatch(path) for path in tree)


def read_index(text: bytes) -> Index | None:
    """The index in a ``quantmill.json``; None: it is that of a single artifact, or of another version."""
    try:
        return Index.model_validate_json(text)
    except ValidationError:
        return None


def member_of(artifact: Artifact) -> Member:
    """An artifact's entry in the index.

    Raises:
        HubRefused: it has several weight files.
    """
    manifest = artifact.manifest
    weights = [name for name in manifest.files if name.endswith(WEIGHTS) and name == _declared_file(artifact)]
    if not can_be_gathered(manifest.recipe.format) or len(weights) != 1:
        raise HubRefused(
            f"publish: {manifest.recipe.name} has the format {manifest.recipe.format}, whose artifacts are several "
            f"files with names that others have, too; only {' or '.join(gathered_formats())} can share a repository: "
            "choose another publish.name (with {recipe})"
        )
    metrics = manifest.verdict.metrics
    return Member(
        recipe=manifest.recipe.name,
        fingerprint=manifest.fingerprint,
        model=manifest.model,
        revision=manifest.revision,
        words=words(manifest.recipe),
        file=weights[0],
        bytes=manifest.files[weights[0]].size,
        kl_mean=metrics.kl_mean if metrics else None,
        top1_agreement=metrics.top1_agreement if metrics else None,
        text=manifest.verification.data,
    )


def _declared_file(artifact: Artifact) -> str | None:
    """The weight file that config.json names."""
    config = json.loads(artifact.read(CONFIG)) if CONFIG in artifact.sha256 else {}
    declared = config.get("quantization_config")
    return declared.get("file") if isinstance(declared, dict) else None


def beside(
    repo_id: str, artifact: Artifact, index: Index | None, changed: Collection[str] = (), *, force: bool
) -> Content:
    """The content of a repository that shows an artifact beside those that ``index`` lists.

    Where the index lists this very artifact, index and card stay as they are. ``force`` drops others in its way, and
    those of which somebody else ``changed`` a file: what was published of them isn't there any more.

    Raises:
        HubRefused: the artifact can't be gathered; others are of another model, or have its file.
    """
    member = member_of(artifact)
    others = [other for other in index.members if other.recipe != member.recipe] if index else []
    foreign = [other for other in others if Path(other.model).name != Path(member.model).name]
    taken = [other for other in others if other.file == member.file]
    if (foreign or taken) and not force:
        raise HubRefused(_in_the_way(repo_id, member, foreign, taken))
    broken = [other for other in others if not other.paths.isdisjoint(changed)]
    others = [other for other in others if other not in (*foreign, *taken, *broken)]
    places = {_place(member, name): name for name in artifact.sha256}
    kept = frozenset(path for other in others for path in other.paths)
    if others and index:  # a projector is for all of them, also where this artifact was made without one
        kept |= {path for path in index.files if path.startswith(PROJECTOR) and path not in places}
    listed = index.files.get(member.manifest_path) if index else None
    listed_so = listed is not None and listed.sha256 == artifact.sha256[MANIFEST]
    if index is not None and listed_so and not changed:
        own = {path: name for path, name in places.items() if path in member.paths}
        return Content(artifact, index.fingerprint, own, {}, frozenset(index.files) - set(own) | {MANIFEST})
    members = tuple(sorted([*others, member], key=lambda each: (-each.bytes, each.recipe)))
    written = {} if (chart := _chart(members, member)) is None else {CHART: chart}
    beside_them = sorted(filter(is_beside, {*places, *kept}))
    card = render_card(repo_id, members, member, _front_matter(artifact), beside_them, chart=bool(written))
    written[CARD] = card.encode()
    files = {path: index.files[path] for path in sorted(kept) if index and path in index.files}
    files |= {path: FileEntry(sha256=artifact.sha256[n], size=artifact.sizes[n]) for path, n in places.items()}
    files |= {p: FileEntry(sha256=hashlib.sha256(data).hexdigest(), size=len(data)) for p, data in written.items()}
    state = hashlib.sha256(canonical_json({each.recipe: each.fingerprint for each in members}).encode()).hexdigest()
    new = Index(fingerprint=state, latest=member.recipe, members=members, files=dict(sorted(files.items())))
    text = new.model_dump_json(indent=1) + "\n"
    return Content(artifact, state, places, {**written, MANIFEST: text.encode()}, kept)


def _place(member: Member, name: str) -> str:
    """The path in the repository of one of the artifact's files."""
    return own_path(member.recipe, name) if name in OWN else name


def _in_the_way(repo_id: str, member: Member, foreign: list[Member], taken: list[Member]) -> str:
    if foreign:
        what = f"holds files of {foreign[0].model!r}, and this is one of {member.model!r}"
    else:
        what = f"has {member.file!r} from the recipe {taken[0].recipe!r} already, and this is that of {member.recipe!r}"
    return f"publish {repo_id}: it {what}; choose another publish.name, or overwrite them with --force (publish.force)"


# ---------------------------------------------------------------------------------------------------- card


def _front_matter(artifact: Artifact) -> dict[str, Any]:
    """The metadata of the artifact's own card; empty if there is none."""
    text = artifact.read(CARD).decode() if CARD in artifact.sha256 else ""
    block = re.match(r"---\r?\n(.*?\n)---", text, re.DOTALL)
    try:
        loaded = parse_yaml(block[1]) if block else None
    except BadYaml:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _chart(members: tuple[Member, ...], latest: Member) -> bytes | None:
    """The files that were compared on the text of the ``latest``."""
    alike = [member for member in members if member.text == latest.text]
    return charts.of_files([charts.Point(_label(m), m.bytes, m.kl_mean) for m in alike if m.kl_mean is not None])


def render_card(
    repo_id: str,
    members: tuple[Member, ...],
    latest: Member,
    metadata: Mapping[str, Any],
    beside: Collection[str],
    *,
    chart: bool = False,
) -> str:
    """The card of all files; ``metadata`` is that of the card of the ``latest``, ``beside`` what is no weight file."""
    name = Path(latest.model).name
    alike = [member for member in members if member.text == latest.text]
    results = [result for member in alike if (result := _result(member, metadata))]
    front = {key: value for key, value in metadata.items() if key != "model-index"}
    if results:
        front["model-index"] = results
    parts = [
        f"# {name}, GGUF",
        f"GGUF files of {name}, for llama.cpp and what builds on it; made and compared with the original by quantmill.",
        "\n".join(_table(members)),
        *([f"![KL divergence against size]({CHART})"] if chart else []),
        _advice(repo_id, members),
        *_shared(repo_id, beside),
        f"Each recipe's folder in `{OWN_FOLDER}/` has a card of its own, with all that was measured and how to make "
        f"the file again, and its manifest; `{MANIFEST}` has the sha256 of every file.",
    ]
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n\n" + printable_lines("\n\n".join(parts)) + "\n"


def _shared(repo_id: str, beside: Collection[str]) -> Iterator[str]:
    """What the files beside the weights are for."""
    if IMATRIX in beside:
        yield (
            f"`{IMATRIX}` is the importance matrix that the scales were chosen with, from the calibration text: "
            f"llama.cpp's `llama-quantize --imatrix {IMATRIX}` takes it for other types."
        )
    for name in beside:
        if name.startswith(PROJECTOR):
            yield (
                f"`{name}` has the towers and the projector, in float16, for each of these files; written by "
                f"llama.cpp's converter, and not checked here. `llama-mtmd-cli -hf {repo_id}` takes it along."
            )


def _result(member: Member, metadata: Mapping[str, Any]) -> Any:
    """The entry of model-index for one file: this artifact's own, or one of the same form."""
    own = metadata.get("model-index")
    if not isinstance(own, list) or not own or not isinstance(own[0], dict) or member.kl_mean is None:
        return None
    results = own[0].get("results")
    if not isinstance(results, list) or not results or not isinstance(results[0], dict):
        return None
    values = (
        ("kl_divergence_to_reference", "KL divergence to the original, nats", member.kl_mean),
        ("top1_agreement_with_reference", "Top-1 agreement with the original", member.top1_agreement),
    )
    metrics = [
        {"type": kind, "value": round(value, 6), "name": title}
        for kind, title, value in values
        if value is not None and abs(value) < float("inf")
    ]
    name = f"{Path(member.model).name}-{member.recipe}"
    return {"name": name, "results": [{**deepcopy(results[0]), "metrics": metrics}]} if metrics else None


def _table(members: tuple[Member, ...]) -> list[str]:
    several = len({member.revision for member in members}) > 1
    lines = [
        "| file | type | size | KL to the original, nats | top-1 agreement | which to choose |" + " of |" * several,
        "|---|---|---|---|---|---|" + "---|" * several,
    ]
    for member in members:
        kl = "" if member.kl_mean is None else f"{member.kl_mean:.5f}"
        top1 = "" if member.top1_agreement is None else f"{member.top1_agreement:.4f}"
        revision = f" `{member.revision[:12]}` |" if several else ""
        lines.append(
            f"| [{member.file}](./{member.file}) | {member.words.partition(',')[0]} | {_size(member.bytes)} | {kl} | "
            f"{top1} | {_choice(member, members)} |{revision}"
        )
    return lines


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _choice(member: Member, members: tuple[Member, ...]) -> str:
    """Who a file is for, by what was measured: nearer and smaller ones, and the ends of the range."""
    if member.kl_mean is None:
        return ""
    measured = [each for each in members if each.kl_mean is not None and each.kl_mean == each.kl_mean]
    better = [each for each in measured if each.bytes <= member.bytes and _kl(each) < _kl(member)]
    if better:
        best = min(better, key=_kl)
        return f"rather {_label(best)}: no larger, and nearer to the original"
    said = []
    if member == min(measured, key=lambda each: (_kl(each), each.bytes)):
        said.append("nearest to the original")
    near = [each for each in measured if _kl(each) <= NEAR]
    if near and member == min(near, key=lambda each: (each.bytes, _kl(each))):
        said.append(f"smallest within {NEAR} nats of the original")
    if member == min(measured, key=lambda each: (each.bytes, _kl(each))) and len(measured) > 1:
        said.append("smallest")
    return "; ".join(said)


def _kl(member: Member) -> float:
    return float("inf") if member.kl_mean is None else member.kl_mean


def _label(member: Member) -> str:
    """The type in a file's name, as llama.cpp's ``-hf`` takes it."""
    return Path(member.file).stem.rpartition("-")[2]


def _advice(repo_id: str, members: tuple[Member, ...]) -> str:
    same = "the same held-out text" if len({each.text for each in members}) == 1 else "held-out texts, not all the same"
    usual = next((each for each in members if "smallest within" in _choice(each, members)), members[0])
    return (
        "Take the nearest to the original that fits into memory beside the context. KL divergence and agreement are "
        f"against the half-precision original, on {same}.\n\n"
        f"```\nllama-cli -hf {repo_id}:{_label(usual)}\n```"
    )
