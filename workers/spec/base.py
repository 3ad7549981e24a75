"""The base class of all values in this package."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

SLUG = re.compile(r"^[a-z0-9][a-z0-9._-]*$")


class Frozen(BaseModel):
    """An immutable value that rejects unknown keys."""

    # JSON has no NaN or Infinity, which a broken model's metrics may be: they are serialized as strings.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


def meant(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'? `` for the known name that is closest to one that isn't known; empty if none is close."""
    folded = {one.casefold(): one for one in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f"did you mean {folded[close[0]]!r}? " if close else ""


def canonical_json(value: object) -> str:
    """The canonical JSON text of a value: sorted keys, no spaces, no NaN.

    Raises:
        TypeError: the value isn't plain JSON; identities never depend on an object's ``str()``.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
