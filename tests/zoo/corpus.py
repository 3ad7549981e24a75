"""Text that every machine with Python has: the standard library's own sources, split by file so that nothing leaks."""

from __future__ import annotations

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
