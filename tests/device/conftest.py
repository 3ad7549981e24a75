"""Tests on a stand-in for a card; skipped where no compiler can build it."""

import pytest

from tests.device import card

NO_COMPILER = "no C++ compiler (g++ or clang++): the stand-in for a card can't be built"


@pytest.fixture(scope="session", autouse=True)
def library() -> str:
    """The stand-in's library, built once."""
    if card.compiler() is None:
        pytest.skip(NO_COMPILER)
    return str(card.build())
