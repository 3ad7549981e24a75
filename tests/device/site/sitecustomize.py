"""Gives a process, and its children, the cards that its environment names (tests/device/card.py)."""

import builtins
import os

if os.environ.get("TEST_CARD"):
    from tests.device import card

    # Kept where tests.device.card's users find it: a second import of the module has the same object.
    builtins.TEST_CARD = card.install()
