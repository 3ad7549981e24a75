"""Names an artifact's revisions by an identity tag and a day tag, and decides which revisions are retained."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import date

OF_IDENTITY = re.compile(r"quantmill-[0-9a-f]{12}")
OF_A_DAY = re.compile(r"(\d{4}-\d{2}-\d{2})(?:\.([1-9]\d*))?")


def tag_name(fingerprint: str) -> str:
    """The identity tag, under which an artifact stays reachable after later ones."""
    return f"quantmill-{fingerprint[:12]}"


def day_tag(existing: Collection[str], today: date) -> str:
    """The day's first unused tag: 2026-11-21, then 2026-11-21.2 and so on."""
    name, number = today.isoformat(), 1
    while name in existing:
        number += 1
        name = f"{today.isoformat()}.{number}"
    return name


def age(tag: str) -> tuple[str, int]:
    """Sort key of day tags, by time."""
    match = OF_A_DAY.fullmatch(tag)
    assert match is not None
    return match[1], int(match[2] or 1)


def newest(days: Mapping[str, str], current: str) -> list[str]:
    """Targets of the day tags: ``current`` first, then the newest first."""
    return list(dict.fromkeys([current, *(days[name] for name in sorted(days, key=age, reverse=True))]))


def stale(tags: Mapping[str, str], current: str, keep: int | None) -> list[str]:
    """Our tags outside of the newest ``keep`` revisions; ``current`` is always retained.

    A day tag counts as ours only if its commit also has an identity tag: otherwise someone else set it.
    """
    if keep is None:
        return []
    ours = {target for name, target in tags.items() if OF_IDENTITY.fullmatch(name)}
    days = {name: target for name, target in tags.items() if OF_A_DAY.fullmatch(name) and target in ours}
    retained = newest(days, current)[:keep]
    return sorted(
        name
        for name, target in tags.items()
        if target in ours and target not in retained and (OF_IDENTITY.fullmatch(name) or OF_A_DAY.fullmatch(name))
    )
