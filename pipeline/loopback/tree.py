"""Model the files of a commit as a flat, immutable mapping from path to file, with pure functions over it."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.loopback.errors import EntryNotFound, InvalidRequest

# Files above this size are stored in LFS whatever their name, as on the Hub.
MAX_REGULAR_BYTES = 10 * 2**20
# Longest part of a path, and path, that file systems hold: UTF-8 bytes.
MAX_PART_BYTES, MAX_PATH_BYTES = 255, 4095

LFS_SUFFIXES = (
    ".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".h5", ".msgpack", ".npy", ".npz", ".parquet",
    ".arrow", ".model", ".tflite", ".pickle", ".pkl", ".ckpt", ".zip", ".gz", ".xz", ".zst", ".tar", ".wasm",
)  # fmt: skip

GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True, slots=True)
class File:
    """One file: sha256 of its content, its git blob id (of the pointer, if LFS), and its size in bytes."""

    sha256: str
    oid: str
    size: int
    lfs: bool

    @property
    def pointer_size(self) -> int:
        """Size of the LFS pointer text, in bytes."""
        return len(lfs_pointer(self.sha256, self.size))


Tree = Mapping[str, File]


@dataclass(frozen=True, slots=True)
class Put:
    """Add or replace a file."""

    path: str
    file: File


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a file, or a folder with its content."""

    path: str
    folder: bool


Operation = Put | Delete


def git_blob_oid(data: bytes) -> str:
    """The git blob id of these bytes: 40 hex digits (git-hash-object)."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The pointer that git stores instead of an LFS file (git-lfs docs/spec.md)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def regular_file(data: bytes) -> File:
    """The entry of a file stored in git itself."""
    return File(hashlib.sha256(data).hexdigest(), git_blob_oid(data), len(data), lfs=False)


def lfs_file(sha256: str, size: int) -> File:
    """The entry of a file stored in LFS."""
    return File(sha256, git_blob_oid(lfs_pointer(sha256, size)), size, lfs=True)


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether a file should be uploaded through LFS, by its name, size in bytes and first bytes."""
    return path.lower().endswith(LFS_SUFFIXES) or size > MAX_REGULAR_BYTES or b"\0" in sample


def apply(tree: Tree, operations: Iterable[Operation]) -> dict[str, File]:
    """The tree after applying the operations in order.

    Raises EntryNotFound if a path to delete doesn't exist, InvalidRequest for a path that git can't store.
    """
    result = dict(tree)
    for operation in operations:
        if isinstance(operation, Put):
            check_path(operation.path)
            result[operation.path] = operation.file
        elif operation.folder:
            for path in _below(result, operation.path):
                del result[path]
        elif result.pop(operation.path, None) is None:
            # Keep the Hub's wording: huggingface_hub searches for it to add a hint.
            raise EntryNotFound(f"A file with this name doesn't exist: {operation.path!r}")
    for path in result:
        clash = next((parent for parent in _parents(path) if parent in result), None)
        if clash is not None:
            raise InvalidRequest(f"{clash!r} can't be a file and the folder of {path!r} at once")
    return result


def check_path(path: str) -> None:
    """Refuse a path that is absolute, has empty, '.', '..' or '.git' parts, control characters, or a part too long."""
    parts = path.split("/")
    problem = None
    if any(part.lower() in ("", ".", "..", ".git") for part in parts):
        problem = "empty, '.', '..' or '.git' parts"
    elif any(unicodedata.category(character) in ("Cc", "Cs") for character in path):
        problem = "control characters and surrogates"
    elif any(len(part.encode()) > MAX_PART_BYTES for part in parts) or len(path.encode()) > MAX_PATH_BYTES:
        problem = f"parts above {MAX_PART_BYTES} bytes, or more than {MAX_PATH_BYTES} in all"
    if problem:
        raise InvalidRequest(f"a file can't have the path {path[:300]!r}: expected a relative path without {problem}")


def listing(tree: Tree, folder: str, *, recursive: bool) -> list[tuple[str, File | None]]:
    """The entries of a folder ('' is the root), sorted by path; a subfolder's File is None.

    Raises EntryNotFound if there is no such folder.
    """
    entries: dict[str, File | None] = {}
    prefix = f"{folder}/" if folder else ""
    for path in _below(tree, folder) if folder else tree:
        entries.update((parent, None) for parent in _parents(path) if parent.startswith(prefix))
        entries[path] = tree[path]
    return sorted((p, f) for p, f in entries.items() if recursive or "/" not in p.removeprefix(prefix))


def folder_oid(tree: Tree, folder: str) -> str:
    """An id of a folder that changes exactly when its content does: 40 hex digits, but not git's tree id."""
    lines = (f"{path}\0{tree[path].oid}\n" for path in sorted(_below(tree, folder)))
    return hashlib.sha1("".join(lines).encode(), usedforsecurity=False).hexdigest()


def is_folder(tree: Tree, path: str) -> bool:
    """Whether some file lies below this path."""
    return any(name.startswith(f"{path}/") for name in tree)


def _below(tree: Tree, folder: str) -> list[str]:
    prefix = folder.rstrip("/") + "/"
    paths = [path for path in tree if path.startswith(prefix)]
    if not paths:
        raise EntryNotFound(f"A folder with this name doesn't exist: {folder!r}")
    return paths


def _parents(path: str) -> Iterator[str]:
    parts = path.split("/")
    return ("/".join(parts[:n]) for n in range(1, len(parts)))
