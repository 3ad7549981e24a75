"""Store repositories and collections on disk, as plain readable files; knows nothing of HTTP.

    ROOT/hub.json                         layout version and the key that signs upload addresses
    ROOT/lock                             lock file (flock) of the one server that owns the root
    ROOT/objects/ab/<sha256>              contents, immutable
    ROOT/models/<ns>/<name>/repo.json     visibility, gate, creation time
                           /commits/<oid>.json   immutable: parent, message and the whole tree
                           /refs/heads/main      the id of a commit; replacing this file *is* the commit
                           /refs/tags/<tag>      the id of a commit, then the tag's message
    ROOT/collections/<ns>/<slug>.json
    ROOT/incoming                         partial files; emptied at the start

Every file is written to a partial file, synced and renamed, so a kill at any time leaves the old state or the new one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import re
import secrets
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

from pipeline.loopback import tree as trees
from pipeline.loopback.errors import (
    AlreadyExists,
    HeadMoved,
    InvalidRequest,
    RepoNotFound,
    RevisionNotFound,
)
from pipeline.loopback.objects import ObjectStore, make_directory, sync_directory, write_file
from pipeline.loopback.tree import File, Operation, Put
from workers.errors import UserError

LAYOUT = 1
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,150}")
_OID = re.compile(r"[0-9a-f]{40}")
_RESERVED = frozenset({"api", "collections", "datasets", "kernels", "lfs", "models", "spaces"})

RefKind = Literal["heads", "tags"]


@dataclass(frozen=True, slots=True)
class Repo:
    """A model repository; times are ISO 8601 in UTC."""

    id: str
    private: bool
    created_at: str
    gated: str | bool = False


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit and all of its files; `oid` is the sha1 of the other fields, 40 hex digits."""

    oid: str
    parent: str | None
    title: str
    message: str
    date: str
    tree: Mapping[str, File]


class Store:
    """The Hub's state in one folder, which this process locks until `close`.

    Raises UserError if another server owns the folder or it has another layout.
    """

    def __init__(self, root: Path) -> None:
        make_directory(root.absolute())
        _refuse_foreign(root)
        self.root = root
        self._lockfile = (root / "lock").open("a+")
        try:
            fcntl.flock(self._lockfile, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lockfile.close()
            raise UserError(
                f"the loopback Hub's root {root} is in use by another server; stop that one or choose another root"
            ) from error
        self._scratch = root / "incoming"
        shutil.rmtree(self._scratch, ignore_errors=True)
        make_directory(self._scratch)
        self.signing_key = self._open_layout()
        self.objects = ObjectStore(root / "objects", self._scratch)
        self._changing = threading.RLock()

    def close(self) -> None:
        """Release the root's lock."""
        self._lockfile.close()

    # Repositories

    def repos(self) -> list[Repo]:
        """All repositories, sorted by id."""
        ids = sorted("/".join(path.parts[-3:-1]) for path in self.root.glob("models/*/*/repo.json"))
        return [self.repo(repo_id) for repo_id in ids]

    def repo(self, repo_id: str) -> Repo:
        """The repository of that id; raises RepoNotFound."""
        try:
            data = json.loads((self._folder(repo_id) / "repo.json").read_bytes())
        except FileNotFoundError as error:
            raise _no_repo(repo_id) from error
        return Repo(id=self._standing_id(repo_id), **data)

    def create_repo(self, repo_id: str, *, private: bool) -> Repo:
        """Create a repository with one commit that holds .gitattributes, as on the Hub; raises AlreadyExists."""
        _check_name(repo_id)
        with self._changing:
            folder = self._folder(repo_id)
            if folder.exists():
                raise AlreadyExists(f"the repository {self._standing_id(repo_id)} exists already")
            repo = Repo("/".join(folder.parts[-2:]), private, _now())
            partial = self._scratch / secrets.token_hex(8)
            self._write_repo(partial, repo)
            self.objects.put(trees.GITATTRIBUTES)
            first = {".gitattributes": trees.regular_file(trees.GITATTRIBUTES)}
            commit = self._write_commit(partial, None, "initial commit", "", first)
            self._write_ref(partial, "heads", "main", commit.oid)
            self._rename(partial, folder)
        return repo

    def change_settings(self, repo_id: str, *, private: bool | None = None, gated: str | bool | None = None) -> Repo:
        """Change a repository's visibility, its gate, or both."""
        with self._changing:
            repo = self.repo(repo_id)
            repo = dataclasses.replace(
                repo,
                private=repo.private if private is None else private,
                gated=repo.gated if gated is None else gated,
            )
            self._write_repo(self._folder(repo_id), repo)
        return repo

    def delete_repo(self, repo_id: str) -> None:
        """Remove a repository; its objects remain, as others may share them."""
        with self._changing:
            self.repo(repo_id)
            partial = self._scratch / secrets.token_hex(8)
            self._rename(self._folder(repo_id), partial)
        shutil.rmtree(partial)

    def move_repo(self, repo_id: str, new_id: str) -> None:
        """Rename a repository; raises AlreadyExists."""
        _check_name(new_id)
        with self._changing:
            source, target = self._folder(self.repo(repo_id).id), self._folder(new_id)
            if target == source:  # the same name, perhaps in another case
                target = source.with_name(new_id.split("/")[1])
            elif target.exists():
                raise AlreadyExists(f"the repository {self._standing_id(new_id)} exists already")
            self._rename(source, target)

    # Revisions

    def refs(self, repo_id: str, kind: RefKind) -> dict[str, str]:
        """The commit of each branch (`heads`) or tag, by name."""
        self.repo(repo_id)
        paths = sorted((self._folder(repo_id) / "refs" / kind).glob("*"))
        return {unquote(path.name): path.read_text().split("\n", 1)[0] for path in paths}

    def resolve(self, repo_id: str, revision: str) -> Commit:
        """The commit of a branch, tag or commit id, looked up in this order; raises RevisionNotFound."""
        self.repo(repo_id)
        for kind in ("heads", "tags"):
            oid = self._read_ref(repo_id, kind, revision.removeprefix(f"refs/{kind}/"))
            if oid is not None:
                return self._read_commit(repo_id, oid)
        return self._read_commit(repo_id, revision)

    def history(self, repo_id: str, revision: str) -> list[Commit]:
        """A commit and its ancestors, newest first."""
        commits = [self.resolve(repo_id, revision)]
        while commits[-1].parent is not None:
            commits.append(self._read_commit(repo_id, commits[-1].parent))
        return commits

    def create_ref(self, repo_id: str, kind: RefKind, name: str, revision: str, message: str = "") -> None:
        """Create a branch or tag at a revision; raises AlreadyExists."""
        if not _is_ref(name) or ".." in name or "//" in name or name.endswith(("/", ".", ".lock")):
            raise InvalidRequest(
                f"got {name!r} as the name of a branch or tag: expected letters, digits and any of _ . + - /"
            )
        with self._changing:
            commit = self.resolve(repo_id, revision)
            if self._read_ref(repo_id, kind, name) is not None:
                raise AlreadyExists(f"{repo_id} has a {_ref_word(kind)} {name!r} already")
            self._write_ref(self._folder(repo_id), kind, name, commit.oid, message)

    def delete_ref(self, repo_id: str, kind: RefKind, name: str) -> None:
        """Remove a branch other than main, or a tag; its commits remain."""
        if (kind, name) == ("heads", "main"):
            raise InvalidRequest("the branch 'main' can't be deleted")
        with self._changing:
            self.repo(repo_id)
            path = _ref_path(self._folder(repo_id), kind, name)
            if not path.is_file():
                raise RevisionNotFound(f"{repo_id} has no {_ref_word(kind)} {name!r}")
            path.unlink()
            sync_directory(path.parent)

    def commit(
        self,
        repo_id: str,
        branch: str,
        operations: Sequence[Operation],
        *,
        title: str,
        message: str = "",
        parent: str | None = None,
    ) -> Commit:
        """Apply the operations to a branch as one commit, or return its head if they change nothing.

        parent: the expected head of the branch (at least 7 digits of its id); HeadMoved if it is another.
        Raises InvalidRequest for a file that was never uploaded, EntryNotFound if a path to delete doesn't exist.
        """
        self._require_objects(operations)
        name = branch.removeprefix("refs/heads/")
        with self._changing:
            self.repo(repo_id)
            oid = self._read_ref(repo_id, "heads", name)
            if oid is None:
                raise RevisionNotFound(f"{repo_id} has no branch {branch!r} to commit to")
            if parent is not None and (len(parent) < 7 or not oid.startswith(parent)):
                raise HeadMoved(f"{repo_id}: the branch {name!r} is at {oid}, not at the expected parent {parent!r}")
            head = self._read_commit(repo_id, oid)
            files = trees.apply(head.tree, operations)
            if files == head.tree:
                return head
            commit = self._write_commit(self._folder(repo_id), oid, title, message, files)
            self._write_ref(self._folder(repo_id), "heads", name, commit.oid)
        return commit

    # Collections

    def collection(self, slug: str) -> dict[str, Any] | None:
        """The stored form of a collection by slug (`namespace/title-id`), None if it doesn't exist."""
        try:
            data: dict[str, Any] = json.loads(self._collection_path(slug).read_bytes())
        except FileNotFoundError:
            return None
        return data

    def collections(self, namespace: str) -> dict[str, dict[str, Any]]:
        """The collections of a namespace ('' for all), by slug."""
        if namespace and not _NAME.fullmatch(namespace):
            return {}
        paths = sorted(self.root.glob(f"collections/{namespace or '*'}/*.json"))
        return {f"{path.parent.name}/{path.stem}": json.loads(path.read_bytes()) for path in paths}

    def create_collection(self, slug: str, data: Mapping[str, Any]) -> None:
        """Create a collection; raises AlreadyExists."""
        with self._changing:
            if self.collection(slug) is not None:
                raise AlreadyExists(f"the collection {slug} exists already", slug=slug)
            self._write_json(self._collection_path(slug), {**data, "updated_at": _now()})

    def add_to_collection(self, slug: str, item: Mapping[str, Any]) -> None:
        """Append an item to an existing collection; raises AlreadyExists if it has an item with that `_id`."""
        with self._changing:
            data = self.collection(slug)
            assert data is not None
            if any(old["_id"] == item["_id"] for old in data["items"]):
                raise AlreadyExists(f"{item['id']} is in the collection {slug} already")
            data["items"].append({**item, "position": len(data["items"])})
            self._write_json(self._collection_path(slug), {**data, "updated_at": _now()})

    # Files

    def _open_layout(self) -> bytes:
        path = self.root / "hub.json"
        if not path.exists():
            self._write_json(path, {"layout": LAYOUT, "signing_key": secrets.token_hex(32)})
        data = json.loads(path.read_bytes())
        if data.get("layout") != LAYOUT:
            self.close()
            raise UserError(f"{path}: got layout {data.get('layout')!r}, expected {LAYOUT}; start with an empty root")
        return bytes.fromhex(data["signing_key"])

    def _folder(self, repo_id: str) -> Path:
        parts = repo_id.split("/")
        if len(parts) != 2 or not all(_NAME.fullmatch(part) for part in parts) or ".." in repo_id:
            raise _no_repo(repo_id)
        namespace = _alike(self.root / "models", parts[0])
        return _alike(namespace, parts[1])

    def _standing_id(self, repo_id: str) -> str:
        """The id as it is written where the repository stands: names don't differ by case alone, as on the Hub."""
        return "/".join(self._folder(repo_id).parts[-2:])

    def _collection_path(self, slug: str) -> Path:
        namespace, _, name = slug.partition("/")
        if not (_NAME.fullmatch(namespace) and _NAME.fullmatch(name)):
            raise InvalidRequest(f"a collection's slug is 'namespace/title-id', got {slug!r}")
        return self.root / "collections" / namespace / f"{name}.json"

    def _require_objects(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            if isinstance(operation, Put):
                stored = self.objects.size(operation.file.sha256)
                if stored != operation.file.size:
                    raise InvalidRequest(
                        f"{operation.path!r} points to the object {operation.file.sha256} of {operation.file.size} "
                        f"bytes; {'it was never uploaded' if stored is None else f'the stored one has {stored}'}"
                    )

    def _read_ref(self, repo_id: str, kind: str, name: str) -> str | None:
        if not _is_ref(name):
            return None
        try:
            return _ref_path(self._folder(repo_id), kind, name).read_text().split("\n", 1)[0]
        except FileNotFoundError:
            return None

    def _read_commit(self, repo_id: str, oid: str) -> Commit:
        missing = RevisionNotFound(f"{repo_id} has no branch, tag or commit {oid!r}")
        if not _OID.fullmatch(oid):
            raise missing
        try:
            data = json.loads((self._folder(repo_id) / "commits" / f"{oid}.json").read_bytes())
        except FileNotFoundError as error:
            raise missing from error
        files = {path: File(**entry) for path, entry in data.pop("tree").items()}
        return Commit(oid=oid, tree=files, **data)

    def _write_commit(
        self, folder: Path, parent: str | None, title: str, message: str, files: Mapping[str, File]
    ) -> Commit:
        date = _now()
        content = {
            "parent": parent,
            "title": title,
            "message": message,
            "date": date,
            "tree": {path: dataclasses.asdict(files[path]) for path in sorted(files)},
        }
        data = json.dumps(content, indent=1).encode()
        oid = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        write_file(folder / "commits" / f"{oid}.json", data, self._scratch)
        return Commit(oid, parent, title, message, date, dict(files))

    def _write_ref(self, folder: Path, kind: RefKind, name: str, oid: str, message: str = "") -> None:
        write_file(_ref_path(folder, kind, name), f"{oid}\n{message}".encode(), self._scratch)

    def _write_repo(self, folder: Path, repo: Repo) -> None:
        data = {"private": repo.private, "created_at": repo.created_at, "gated": repo.gated}
        self._write_json(folder / "repo.json", data)

    def _write_json(self, path: Path, data: Mapping[str, Any]) -> None:
        write_file(path, json.dumps(data, indent=1).encode(), self._scratch)

    def _rename(self, source: Path, target: Path) -> None:
        make_directory(target.parent)
        source.rename(target)
        sync_directory(target.parent)
        sync_directory(source.parent)


def _refuse_foreign(root: Path) -> None:
    # The Hub empties ROOT/incoming, which would delete a user's files if ROOT were, say, a home directory.
    names = {path.name for path in root.iterdir()}
    if "hub.json" not in names and names - {"lock", "incoming"}:
        raise UserError(
            f"{root} is not a loopback Hub's root: it holds {min(names - {'lock', 'incoming'})!r} but no hub.json; "
            "choose an empty or a new folder"
        )


def _alike(folder: Path, name: str) -> Path:
    """The entry of a folder with this name, or with one that differs by case alone; else the name's own path."""
    path = folder / name
    if path.exists() or not folder.is_dir():
        return path
    return next((entry for entry in sorted(folder.iterdir()) if entry.name.lower() == name.lower()), path)


def _check_name(repo_id: str) -> None:
    """Refuse a name that the Hub gives no repository."""
    parts = repo_id.split("/")
    if len(parts) != 2 or not all(_NAME.fullmatch(part) for part in parts) or ".." in repo_id or "--" in repo_id:
        raise InvalidRequest(
            f"no repository can have the name {repo_id[:300]!r}: expected namespace/name of letters, digits and _ . -, "
            "at most 96 each, without '--' and '..'"
        )
    if parts[0].lower() in _RESERVED:
        raise InvalidRequest(f"the namespace of {repo_id!r} is reserved; choose another")
    if parts[1].lower().endswith((".git", ".ipynb")):
        raise InvalidRequest(f"no repository can have the name {repo_id!r}: it ends as a clone's or a notebook's does")


def _is_ref(name: str) -> bool:
    return bool(_REF.fullmatch(name)) and len(quote(name, safe="")) <= trees.MAX_PART_BYTES


def _ref_path(folder: Path, kind: str, name: str) -> Path:
    return folder / "refs" / kind / quote(name, safe="")


def _ref_word(kind: RefKind) -> str:
    return "branch" if kind == "heads" else "tag"


def _no_repo(repo_id: str) -> RepoNotFound:
    return RepoNotFound(f"no repository {repo_id!r} here; create it first")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
