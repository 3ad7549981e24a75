"""Limits of what is read from models, data and Hubs, far above any real one; and JSON within them."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from workers.errors import CheckpointError

# Bytes. The largest published config.json has 0.2 MB, the largest index 14 MB (Kimi K2, 100,000 tensors), the largest
# tokenizer.json 35 MB; safetensors itself refuses headers above 100 MB.
CONFIG_BYTES, INDEX_BYTES, HEADER_BYTES = 16 * 2**20, 256 * 2**20, 100_000_000
ZOO_BYTES, CARD_BYTES, MANIFEST_BYTES = 8 * 2**20, 4 * 2**20, 64 * 2**20
# Files of a folder or repository, and tensors of a checkpoint; the most published are 1,000 and 300,000.
FILES, TENSORS = 100_000, 10_000_000
# Largest whole number in a config, and dimension of a tensor; a model's are far below.
LARGEST_NUMBER = 2**48
# Levels of nesting in JSON; configs have 6.
DEPTH = 100


def parse_json(text: bytes, what: str, limit: int = CONFIG_BYTES) -> Any:
    """Parse JSON of a file named ``what``.

    Raises:
        CheckpointError: too large, too deep, not UTF-8, or no JSON.
    """
    if len(text) > limit:
        raise CheckpointError(
            f"{what}: larger than {limit} bytes, which no real one is; replace it by the original file"
        )
    try:
        parsed = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except RecursionError:
        raise CheckpointError(f"{what}: nested too deeply, expected at most {DEPTH} levels; replace it") from None
    except ValueError as error:
        raise CheckpointError(f"{what} is not readable JSON: {brief(error)}; replace it by the original file") from None
    if _deeper(parsed, DEPTH):
        raise CheckpointError(f"{what}: nested too deeply, expected at most {DEPTH} levels; replace it")
    return parsed


def _deeper(value: Any, levels: int) -> bool:
    layer = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        layer = [
            item
            for holder in layer
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, dict | list)
        ]
        if not layer:
            return False
    return True


def brief(error: BaseException) -> str:
    """The first line of an error's message, printable and short; its class if it has none."""
    lines = str(error).strip().splitlines()
    return printable(lines[0][:200]) if lines else type(error).__name__


def printable(text: str) -> str:
    """The text with control and format characters, and what isn't Unicode, escaped: safe on a terminal and in logs."""
    if text.isprintable():
        return text
    return "".join(_escaped(char) if unicodedata.category(char) in _UNSEEN else char for char in text)


def printable_lines(text: str) -> str:
    """``printable``, with line breaks and tabs kept."""
    return "".join(part if part in "\n\t" else printable(part) for part in re.split(r"([\n\t])", text))


# Control, format, surrogate, private and unassigned characters; line and paragraph separators.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "backslashreplace").decode("ascii")


# Addresses, numbers of telephones, and lines that say who wrote or owns a text: what cards don't show of people.
PERSONAL = re.compile(
    r"\S@\S|https?://|www\.|\(c\)|©|copyright|all rights reserved|\bauthors?\b|written by|contributed|maintained by"
    r"|\+\d[\d .()-]{7,}\d",
    re.IGNORECASE,
)


def fit_to_show(*texts: str) -> bool:
    """Whether texts may be printed where everybody reads them: none names an address, an author or an owner."""
    return not any(PERSONAL.search(text) for text in texts)
