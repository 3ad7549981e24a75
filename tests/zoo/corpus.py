"""Text that every machine with Python has: the standard library's own sources, split by file so that nothing leaks, and
the language reference that comes with it, split by topic and paragraph."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

HELD_OUT = ("argparse.py", "statistics.py", "zipfile.py", "heapq.py", "asyncio/tasks.py", "email/message.py")
CALIBRATION = ("datetime.py", "_pydatetime.py", "tarfile.py", "difflib.py", "logging/__init__.py", "fractions.py")
PACKAGES = (
    "", "asyncio", "collections", "concurrent/futures", "ctypes", "dbm", "email", "html", "http", "importlib", "json",
    "logging", "multiprocessing", "re", "sqlite3", "tomllib", "unittest", "urllib", "wsgiref", "xml/dom", "xml/etree",
    "xml/sax", "xmlrpc", "zipfile",
)  # fmt: skip


def document(path: Path) -> str:
    """A source file as ASCII text."""
    return path.read_bytes().decode("utf-8").encode("ascii", "ignore").decode("ascii")


def training_documents() -> list[str]:
    """The files to train on, sorted by name, of this interpreter's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {*HELD_OUT, *CALIBRATION, "zipfile/__init__.py"}  # what zipfile.py is from CPython 3.12 on
    files = [path for package in PACKAGES for path in sorted((root / package).glob("*.py"))]
    return [document(path) for path in files if str(path.relative_to(root)) not in left_out]


def documents(names: tuple[str, ...]) -> str:
    """The named files one after the other, as far as this interpreter's standard library has them."""
    root = Path(sysconfig.get_path("stdlib"))
    return "\n".join(document(root / name) for name in names if (root / name).is_file())


# Topics of the language reference that are held out; their paragraphs stand nowhere else.
READ = ("compound", "context-managers", "debugger", "execmodel", "import", "strings", "typesmapping")


def reference() -> tuple[str, str]:
    """The language reference as prose: what is calibrated on, and what is held out.

    Without its grammar (lines of ``::=`` and what they go on with), underlines and heads of sections; a paragraph that
    several topics share stands in one of them.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    held_out = [_prose(topics[name], seen) for name in READ]
    calibration = [_prose(topics[name], seen) for name in sorted(set(topics) - set(READ))]
    return "\n".join(calibration), "\n".join(held_out)


def _prose(topic: str, seen: set[str]) -> str:
    kept = []
    plain = topic.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-"})
    for paragraph in re.split(r"\n{2,}", plain.encode("ascii", "ignore").decode("ascii").strip("\n")):
        lines = paragraph.splitlines()
        if "::=" in paragraph or re.fullmatch(r"[*=\-~^]+", lines[-1]) or paragraph in seen:
            continue
        seen.add(paragraph)
        kept.append(f"{paragraph}\n")
    return "\n".join(kept)
