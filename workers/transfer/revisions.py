"""The names of an artifact's revisions: one tag of its identity, one of the day; and which of them are kept."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import date

OF_IDENTITY = re.compile(r"quantmill-[0-9a-f]{12}")
OF_A_DAY = re.compile(r"(\d{4}-\d{2}-\d{2})(?:\.([1-9]\d*))?")


def tag_name(fingerprint: str) -> str:
    """The tag under which an artifact stays reachable after later ones."""
    return f"quantmill-{fingerprint[:12]}"


def day_tag(taken: Collection[str], today: date) -> str:
    """The day's first tag that isn't taken: 2026-11-21, then 2026-11-21.2 and so on."""
    name, number = today.isoformat(), 1
    while name in taken:
        number += 1
        name = f"{today.isoformat()}.{number}"
    return name


def age(tag: str) -> tuple[str, int]:
    """Sorts the tags of days by time."""
    found = OF_A_DAY.fullmatch(tag)
    assert found is not None
    return found[1], int(found[2] or 1)


def newest(days: Mapping[str, str], current: str) -> list[str]:
    """What the tags of days point to, the ``current`` one first, then by age."""
    return list(dict.fromkeys([current, *(days[name] for name in sorted(days, key=age, reverse=True))]))


def stale(tags: Mapping[str, str], current: str, keep: int | None) -> list[str]:
    """Tags of quantmill's that a rule of keeping the newest ``keep`` revisions lets go; the ``current`` one stays.

    A day's tag counts as ours where its commit has a tag of identity too: another one is somebody's own.
    """
    if keep is None:
        return []
    ours = {target for name, target in tags.items() if OF_IDENTITY.fullmatch(name)}
    days = {name: target for name, target in tags.items() if OF_A_DAY.fullmatch(name) and target in ours}
    kept = newest(days, current)[:keep]
    return sorted(
        name
        for name, target in tags.items()
        if target in ours and target not in kept and (OF_IDENTITY.fullmatch(name) or OF_A_DAY.fullmatch(name))
    )
