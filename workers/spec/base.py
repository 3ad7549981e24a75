"""What all values of this room are made of."""

from __future__ import annotations

import json
import re

from pydantic import BaseModel, ConfigDict

SLUG = re.compile(r"^[a-z0-9][a-z0-9._-]*$")


class Frozen(BaseModel):
    """A value: immutable, and closed to unknown keys."""

    # JSON has no numbers for what a broken model measures: they travel as "NaN" and "Infinity".
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN.

    Raises:
        TypeError: for anything that isn't plain JSON; identity is never ``str()`` of an object.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
