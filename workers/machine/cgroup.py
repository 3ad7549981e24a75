"""Memory limits of the control groups that this process is in, and kills for want of memory there. Linux; no torch.

Both versions of control groups are read, nested ones up to the mount point: the smallest limit holds. Standard library
only. ``root`` stands before every path, so that tests make trees of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
MOUNTINFO, OWN, VMSTAT = "proc/self/mountinfo", "proc/self/cgroup", "proc/vmstat"
# Where the file systems lie if mountinfo can't be read: version 2, and version 1's memory controller.
USUAL = (("cgroup2", "sys/fs/cgroup"), ("cgroup", "sys/fs/cgroup/memory"))


@dataclass(frozen=True)
class Group:
    """The group that this process is in, in one hierarchy: its folder, and the hierarchy's mount point."""

    version: int
    folder: Path
    mount: Path

    @property
    def upwards(self) -> list[Path]:
        """The folder, and those that it is nested in, up to the mount point."""
        return [self.folder, *(above for above in self.folder.parents if above.is_relative_to(self.mount))]


def memory_limit(root: Path = ROOT) -> int | None:
    """The smallest limit in bytes of this process's groups and those around them; None if there's none.

    ``memory.high`` counts as well: above it the kernel doesn't kill, but slows a process down until it seems to hang.
    """
    limits = [limit for group in _groups(root) for limit in _limits(group)]
    return min((limit for limit in limits if limit > 0), default=None)


def oom_kills(root: Path = ROOT) -> int | None:
    """How many processes of this process's groups the kernel has killed for want of memory; None if that isn't told.

    Where no group counts them, it is the machine's count.
    """
    counts = []
    for group in _groups(root):
        name = "memory.events" if group.version == 2 else "memory.oom_control"
        counts += [count for count in [_field(group.folder / name, "oom_kill")] if count is not None]
    return sum(counts) if counts else _field(root / VMSTAT, "oom_kill")


def peak_bytes(root: Path = ROOT) -> int:
    """The most that this process's groups have used at once, in bytes; 0 if that isn't told."""
    names = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}
    return max((_number(group.folder / names[group.version]) or 0 for group in _groups(root)), default=0)


def _limits(group: Group) -> Iterator[int]:
    if group.version == 2:
        for folder in group.upwards:
            for name in ("memory.max", "memory.high"):
                if (limit := _number(folder / name)) is not None:
                    yield limit
        return
    # Also covers groups around the mount point, which a container doesn't see.
    if (limit := _field(group.folder / "memory.stat", "hierarchical_memory_limit")) is not None:
        yield limit
    nested = _number(group.folder / "memory.use_hierarchy") == 1
    for folder in group.upwards if nested else [group.folder]:
        if (limit := _number(folder / "memory.limit_in_bytes")) is not None:
            yield limit


def _groups(root: Path) -> list[Group]:
    """This process's groups that may limit memory, one for each hierarchy that is mounted."""
    paths = _own_paths(root)
    groups = []
    for kind, inner, mount in _mounts(root):
        path = paths.get(kind)
        if path is not None:
            groups.append(Group(2 if kind == "cgroup2" else 1, _folder(mount, inner, path), mount))
    return groups


def _folder(mount: Path, inner: str, path: str) -> Path:
    """The folder of the group ``path`` where the mount point shows the hierarchy from ``inner`` on.

    In a container either both are the container's own group, or the path isn't below: then the mount point is it.
    """
    parts = [part for part in path.split("/") if part]
    base = [part for part in inner.split("/") if part]
    if ".." in parts or parts[: len(base)] != base:
        return mount
    folder = mount.joinpath(*parts[len(base) :])
    return folder if folder.is_dir() else mount


def _own_paths(root: Path) -> dict[str, str]:
    """The group of this process, by kind of hierarchy: lines ``4:memory:/path`` (version 1) and ``0::/path`` (2)."""
    paths = {}
    for line in _lines(root / OWN):
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    return paths


def _mounts(root: Path) -> list[tuple[str, str, Path]]:
    """Kind, shown root and mount point of the hierarchies (man 5 proc_pid_mountinfo)."""
    found = []
    for line in _lines(root / MOUNTINFO):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2" or (kind[0] == "cgroup" and "memory" in kind[2].split(",")):
            found.append((kind[0], _unescaped(fields[3]), root / _unescaped(fields[4]).lstrip("/")))
    return found or [(kind, "/", root / place) for kind, place in USUAL if (root / place).is_dir()]


def _unescaped(path: str) -> str:
    for code, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        path = path.replace(code, character)
    return path


def _lines(path: Path) -> list[str]:
    with suppress(OSError):
        return path.read_text(errors="replace").splitlines()
    return []


def _number(path: Path) -> int | None:
    """The number that a file holds; None for ``max``, for another text, and for no file."""
    text = "".join(_lines(path)[:1]).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _field(path: Path, name: str) -> int | None:
    """The number after a name in a file of ``name number`` lines."""
    for line in _lines(path):
        key, _, value = line.partition(" ")
        if key == name and value.strip().isascii() and value.strip().isdigit():
            return int(value)
    return None
