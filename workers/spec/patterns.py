"""The language that recipes name modules in: shell patterns, regular expressions, and numbers of layers."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

# The number of a layer in a tensor's or a module's name.
LAYER = re.compile(r"(?:^|\.)(\d+)\.")
# Parts of names, before a layer's number, of what isn't the text model's decoder: towers for images, video and sound,
# what projects their features, speech synthesis, prediction heads. Learnt from the classes of transformers 5.23.
BESIDE = re.compile(
    r"^blocks$|^mlp1(?=\.|$)|^encoder\.layers$|^encoder\.(?!layer\b)|^transformer\.attentions$|(^|[._])(vision|visual|"
    r"vit|vpm|image|images|video|audio|speech|sound|acoustic|semantic|conformer|whisper|sam|vqmodel|vq|qformer|resampler|perceiver|projectors?|"
    r"projections?|local_(de|en)coder|patcher|qwen2_model|connector|adapter|adaptor|aligner|merger|abstractor|talker|"
    r"code_predictor|code2wav|token2wav|mtp|eagle)(?=[._\d]|model|tower|encoder|$)"
)
# Part of names, after a layer's number, of a block that several layers share: zamba's and zamba2's attention.
_SHARED = re.compile(r"^shared_transf(ormer)?\.")
# Part of names of a speculative block, which predicts the tokens after the next one.
_SPECULATIVE = re.compile(r"(?:^|\.)mtp(?:_layers)?\.")
# Layers, as in 0-3,-1: numbers, and ranges with both ends; negative ones from the end.
LAYERS = r"^\s*-?\d+(\s*-\s*\d+)?(\s*,\s*-?\d+(\s*-\s*\d+)?)*\s*$"
_ONE = re.compile(r"(-?\d+)(?:-(\d+))?")


def layer_of(name: str) -> str | None:
    """The number of the decoder layer that a tensor belongs to, by its name; None if it belongs to none."""
    match = LAYER.search(name)
    if match is None or BESIDE.search(name[: match.start()]) or _SHARED.search(name[match.end() :]):
        return None
    return match.group(1)


def is_speculative(name: str, layers: int) -> bool:
    """Whether a tensor or module belongs to a block that predicts further tokens (MTP), of a model of so many layers.

    Publishers call it mtp, or give it the number after the last layer's.
    """
    if _SPECULATIVE.search(name):
        return True
    number = layer_of(name)
    return number is not None and int(number) >= layers


def part_of_layer(name: str) -> str | None:
    """A module's or tensor's name within its layer, or within its speculative block's; None if it's in neither."""
    match = LAYER.search(name)
    return name[match.end() :] if match else None


def matches(pattern: str, name: str) -> bool:
    """Whether a module name matches a pattern of a recipe."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def compiled(field: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The patterns, if all are valid.

    Raises:
        ValueError: one is no regular expression; ``field`` begins the message.
    """
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{field}: {pattern!r} is no regular expression ({error}); mend it") from error
    return patterns


def chosen_layers(layers: str, count: int) -> frozenset[int]:
    """The numbers that ``layers`` names in a model of ``count`` layers.

    Raises:
        ValueError: one isn't among them, or a range runs backwards.
    """
    found: set[int] = set()
    for part in layers.replace(" ", "").split(","):
        match = _ONE.fullmatch(part)
        assert match is not None, "the field's pattern says so"
        first = int(match[1])
        first += count if first < 0 else 0
        last = int(match[2]) if match[2] else first
        if not 0 <= first <= last < count:
            what = "runs backwards" if first > last else "is beyond them"
            raise ValueError(f"layers: {part!r} {what}, the model has layers 0 to {count - 1}; correct it")
        found.update(range(first, last + 1))
    return frozenset(found)


def in_ranges(numbers: Iterable[int]) -> str:
    """Numbers as a recipe's ``layers``: 0-3,31."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def is_among(layers: str, number: int) -> bool:
    """Whether ``layers``, without numbers from the end, names a layer."""
    bounds = [part.split("-") for part in layers.replace(" ", "").split(",")]
    return any(int(ends[0]) <= number <= int(ends[-1]) for ends in bounds)
