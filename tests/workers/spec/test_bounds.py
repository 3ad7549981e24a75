"""What is printed where everybody reads it."""

import pytest

from workers.spec.bounds import fit_to_show


@pytest.mark.parametrize(
    "text",
    [
        "# Author: Jane Doe <jane@example.org>",
        "see https://example.org/x",
        "Copyright (c) 2001-2026 Somebody",
        "call +44 20 7946 0958 now",
        "Contributed by a friend",
        "mail a.b@c.d",
    ],
)
def test_what_names_people_or_addresses_is_not_shown(text: str) -> None:
    assert not fit_to_show("fine", text)


FINE = ["def f(x):\n    return x @ y", "It was the best of times.", "12345 and 2026-11-26", ""]


@pytest.mark.parametrize("text", FINE)
def test_other_text_is(text: str) -> None:
    assert fit_to_show(text)
