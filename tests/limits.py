"""How long anything may take in a test: ten times what it takes on an idle machine, so that only a hang reaches it.

On two idle cores; each in seconds. No test asks for a speed: what is quick is shown by the CPU time that it took.
"""

from __future__ import annotations

IDLE_TIMES = 10

# A command that starts nothing: Python's start and the driver's imports.
COMMAND_SECONDS = 6 * IDLE_TIMES
# A run of a small zoo or a stage in a process of its own: Ray's start, torch's imports, an artifact or three.
RUN_SECONDS = 45 * IDLE_TIMES
# Ray's start: a head, its dashboard, its agents.
RAY_SECONDS = 12 * IDLE_TIMES
# A process that was told to end, or whose parent died, with all that it started; a thread that has nothing left to do.
GONE_SECONDS = 6 * IDLE_TIMES
# Ray's own agents of a killed driver: they give up after a minute without it.
AGENTS_SECONDS = 60 + GONE_SECONDS
# Something that another process does at once: a file written, an answer given, a thread woken.
SOON_SECONDS = 3 * IDLE_TIMES
# One test, with the fixtures that it makes (tests/conftest.py); what runs several zoos has a marker of its own.
TEST_SECONDS = 90 * IDLE_TIMES
LONG_TEST_SECONDS = 4 * TEST_SECONDS
NIGHT_TEST_SECONDS = 1500 * IDLE_TIMES
