"""Build the Hub API's JSON values for repositories, files, revisions and collections."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline.loopback import card
from pipeline.loopback import tree as trees
from pipeline.loopback.store import Commit, RefKind, Repo
from pipeline.loopback.tree import File, Tree


def repo_info(repo: Repo, commit: Commit, readme: str | None, *, blobs: bool) -> dict[str, Any]:
    """A repository at a commit; with `blobs`, also sizes and ids of its files."""
    metadata = _metadata(readme)
    tags = metadata.get("tags") or []
    return {
        "_id": hashlib.sha256(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": repo.created_at,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [tags] if isinstance(tags, str) else tags,
        "library_name": metadata.get("library_name"),
        "pipeline_tag": metadata.get("pipeline_tag"),
        "cardData": metadata,
        "siblings": [_sibling(path, commit.tree[path], blobs=blobs) for path in sorted(commit.tree)],
        "usedStorage": sum(file.size for file in commit.tree.values()),
    }


def entry(tree: Tree, path: str, file: File | None) -> dict[str, Any]:
    """An entry of tree and paths-info: a file, or a folder if `file` is None."""
    if file is None:
        return {"type": "directory", "oid": trees.folder_oid(tree, path), "size": 0, "path": path}
    result: dict[str, Any] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
    if file.lfs:
        result["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return result


def refs(kind: RefKind, targets: Mapping[str, str]) -> list[dict[str, str]]:
    """Branches or tags, for the refs listing."""
    return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in targets.items()]


def commit(commit: Commit, user: str) -> dict[str, Any]:
    """A commit, for the listing of a history."""
    return {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.message,
        "date": commit.date,
        "authors": [{"user": user}],
    }


def collection(slug: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """A collection; `data` is its stored form."""
    return {
        "slug": slug,
        "title": data["title"],
        "description": data["description"],
        "owner": {"name": data["namespace"], "type": "org"},
        "items": data["items"],
        "lastUpdated": data["updated_at"],
        "position": 0,
        "private": data["private"],
        "theme": "blue",
        "upvotes": 0,
    }


def _sibling(path: str, file: File, *, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    result: dict[str, Any] = {"rfilename": path, "blobId": file.oid, "size": file.size}
    if file.lfs:
        result["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return result


def _metadata(readme: str | None) -> dict[str, Any]:
    try:
        metadata = card.front_matter(readme or "") or {}
    except ValueError:
        # An unreadable card counts as having no metadata; its author gets the error from validate-yaml.
        return {}
    # YAML has dates, which JSON lacks.
    plain: dict[str, Any] = json.loads(json.dumps(metadata, default=str))
    return plain
