"""Reads from a Hub within limits: listings, small files, headers, manifests; and checkpoints, checked by their sums."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pydantic import ValidationError

from workers.errors import CheckpointError, HubRefused, HubUnavailable
from workers.machine.files import file_sha256, git_blob_id
from workers.spec.bounds import CONFIG_BYTES, FILES, HEADER_BYTES, INDEX_BYTES, MANIFEST_BYTES, parse_json
from workers.spec.checkpoint_files import CONFIG, PICKLE_SUFFIXES, WEIGHTS, checkpoint_files
from workers.spec.job import Manifest
from workers.spec.tensors import TensorHeader, parse_header
from workers.spec.workspace import MANIFEST
from workers.transfer.hub import hub_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Most bytes of a Hub's list of a repository's files, and of a safetensors file read at first, for its header.
LISTING_BYTES, HEAD_BYTES = 64 * 2**20, 128 * 1024
# Threads that read headers, and that check sums of fetched files.
HEADER_THREADS, SUM_THREADS = 8, 4
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RepositoryFiles:
    """Files of a repository at a commit, with sizes in bytes (-1: not said).

    ``sums`` are the sha256 of LFS files, and the git blob ids (sha1) of the others, as far as the Hub says them.
    """

    commit: str
    sizes: Mapping[str, int]
    sums: Mapping[str, str]


def list_files(api: HfApi, repo_id: str, revision: str) -> RepositoryFiles:
    """The commit of a revision of a model, and its files.

    Raises:
        CheckpointError: it lists a file outside of itself, or more than any repository has.
        HubRefused: the answer isn't one of a Hub's.
        ModelNotFound, HubUnavailable: see ``hub_errors``.
    """
    from huggingface_hub.utils._http import hf_raise_for_status
    from huggingface_hub.utils._validators import validate_repo_id

    thing = f"models: {repo_id}@{revision} on {api.endpoint}"
    with hub_errors(thing):
        validate_repo_id(repo_id)
        url = f"{api.endpoint}/api/models/{repo_id}/revision/{quote(revision, safe='')}?blobs=true"
        response = _get(api, url, LISTING_BYTES, thing)
        hf_raise_for_status(response)
        try:
            answer = parse_json(response.content, thing, LISTING_BYTES)
        except CheckpointError as error:
            raise HubUnavailable(f"{thing}: no usable answer from the Hub ({error})") from error
    return _repository_files(answer, thing)


def _repository_files(answer: Any, thing: str) -> RepositoryFiles:
    commit = checked_commit(answer.get("sha") if isinstance(answer, dict) else None, thing)
    siblings = answer.get("siblings") or []
    if not isinstance(siblings, list) or len(siblings) > FILES:
        raise CheckpointError(f"{thing}: no list of files that a repository can have; name another repository")
    sizes, sums = {}, {}
    for sibling in siblings:
        name = sibling.get("rfilename") if isinstance(sibling, dict) else None
        if not isinstance(name, str) or any(part in ("", ".", "..") for part in name.split("/")):
            raise CheckpointError(
                f"{thing}: the Hub lists a file named {str(name)[:200]!r}, which leads out of the repository; "
                "name another repository"
            )
        lfs, size = sibling.get("lfs"), sibling.get("size")
        sizes[name] = size if type(size) is int and size >= 0 else -1
        total = lfs.get("sha256") if isinstance(lfs, dict) else sibling.get("blobId")
        if isinstance(total, str) and re.fullmatch(r"[0-9a-f]{64}" if isinstance(lfs, dict) else COMMIT, total):
            sums[name] = total
    return RepositoryFiles(commit, sizes, sums)


def checked_commit(sha: object, thing: str) -> str:
    """A commit that a Hub names.

    Raises:
        HubRefused: it isn't 40 hex digits.
    """
    if not isinstance(sha, str) or not COMMIT.fullmatch(sha):
        raise HubRefused(f"{thing}: the Hub names no commit, got sha {str(sha)[:60]!r}; expected 40 hex digits")
    return sha


def limit_of(name: str) -> int:
    """Most bytes of a file that is read to resolve a checkpoint."""
    return CONFIG_BYTES if name == CONFIG else INDEX_BYTES


def fetch(
    api: HfApi,
    repo_id: str,
    revision: str,
    allow_pickle: bool,
    offline: bool = False,
    variant: str | None = None,
    weights: bool = True,
) -> Path:
    """Download a model's checkpoint at that commit into the client's cache, check its sums, and return its folder.

    ``offline`` only looks in the cache; ``weights`` False leaves the weights out. Partial downloads are kept, and the
    next attempt resumes them.

    Raises:
        ModelNotFound, HubRefused, HubUnavailable, DiskFull: see ``hub_errors``.
        CheckpointError, UnsupportedModel: see ``checkpoint_files``.
    """
    thing = f"fetch {repo_id}@{revision[:12]}"
    if offline:
        with hub_errors(thing):
            return Path(api.snapshot_download(repo_id, revision=revision, local_files_only=True))
    listed = list_files(api, repo_id, revision)

    def read(name: str) -> bytes:
        found = read_file(api, repo_id, name, listed.commit, limit_of(name))
        return found[0] if found else b""

    what = f"models: {repo_id!r}"
    names = checkpoint_files(listed.sizes, read, what, variant=variant, allow_pickle=allow_pickle).taken
    if not weights:
        names = tuple(name for name in names if not name.endswith((*WEIGHTS, *PICKLE_SUFFIXES)))
    for _ in range(2):
        with hub_errors(thing):
            patterns = [glob.escape(name) for name in names]
            folder = Path(api.snapshot_download(repo_id, revision=listed.commit, allow_patterns=patterns))
        damaged = _damaged(folder, names, listed.sums)
        if not damaged:
            return folder
        for name in damaged:  # fetched anew, not found in the cache
            (folder / name).resolve().unlink(missing_ok=True)
            (folder / name).unlink(missing_ok=True)
    raise HubUnavailable(f"{thing}: {damaged[0]} arrived twice with another sha256 than the Hub names; run again later")


def _damaged(folder: Path, names: Sequence[str], sums: Mapping[str, str]) -> list[str]:
    """Files whose content isn't what the Hub says."""

    def differs(name: str) -> bool:
        path, expected = folder / name, sums[name]
        return (file_sha256(path) if len(expected) == 64 else git_blob_id(path)) != expected

    checked = [name for name in names if name in sums]
    with ThreadPoolExecutor(SUM_THREADS) as pool:
        return [name for name, wrong in zip(checked, pool.map(differs, checked), strict=True) if wrong]


def read_headers(
    api: HfApi,
    repo_id: str,
    names: Sequence[str],
    commit: str,
    patiently: Callable[[Callable[[], list[TensorHeader]]], list[TensorHeader]],
) -> tuple[TensorHeader, ...]:
    """Tensors of safetensors files, from their headers alone; ``patiently`` runs a request, with retries.

    Raises:
        CheckpointError: a file isn't safetensors, or its size isn't what its header says.
    """
    if not names:
        return ()
    with ThreadPoolExecutor(min(HEADER_THREADS, len(names))) as pool:
        read = pool.map(lambda name: patiently(lambda: _read_header(api, repo_id, name, commit)), names)
        return tuple(header for headers in read for header in headers)


def _read_header(api: HfApi, repo_id: str, name: str, commit: str) -> list[TensorHeader]:
    what = f"models: {repo_id!r}: {name}"
    head, size = read_range(api, repo_id, name, commit, HEAD_BYTES)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > HEADER_BYTES or 8 + length > size:
        raise CheckpointError(f"{what}: truncated or no safetensors file, got {size} bytes; upload it again")
    if len(head) < 8 + length:
        head, _ = read_range(api, repo_id, name, commit, 8 + length)
    return parse_header(head[8 : 8 + length], size - 8 - length, what)


def read_range(api: HfApi, repo_id: str, name: str, commit: str, count: int) -> tuple[bytes, int]:
    """The first bytes of a file, at most ``count``, and its size."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils._http import hf_raise_for_status

    thing = f"read {name} of {repo_id} on {api.endpoint}"
    with hub_errors(thing):
        url = hf_hub_url(repo_id, name, revision=commit, endpoint=api.endpoint)
        response = _get(api, url, count, thing, headers={"Range": f"bytes=0-{count - 1}"}, whole=False)
        if response.status_code == 416:  # nothing to read: an empty file
            return b"", 0
        hf_raise_for_status(response)
        said = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
        length = response.headers.get("X-Whole-Length", "")
        size = int(said[1]) if said else int(length) if length.isdigit() else len(response.content)
        return bytes(response.content[:count]), size


def _get(
    api: HfApi, url: str, limit: int, thing: str, *, headers: Mapping[str, str] | None = None, whole: bool = True
) -> Any:
    """The response to a GET, read up to ``limit`` bytes; ``whole``: a longer one is refused.

    Raises:
        HubRefused: the answer is larger.
    """
    import httpx2
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session

    sent = {**build_hf_headers(token=api.token), **(headers or {})}
    with get_session().stream("GET", url, headers=sent, follow_redirects=True) as response:
        content = bytearray()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > limit:
                if whole:
                    raise HubRefused(f"{thing}: the Hub's answer is larger than {limit} bytes, which no real one is")
                break
        kept = [(k, v) for k, v in response.headers.multi_items() if k.lower() not in _OF_THE_BODY]
        if response.status_code == 200 and "Content-Length" in response.headers:
            kept.append(("X-Whole-Length", response.headers["Content-Length"]))
        return httpx2.Response(response.status_code, headers=kept, content=bytes(content), request=response.request)


_OF_THE_BODY = frozenset({"content-encoding", "content-length", "transfer-encoding"})


def read_file(
    api: HfApi, repo_id: str, path: str, revision: str = "main", limit: int = CONFIG_BYTES
) -> tuple[bytes, str] | None:
    """A small file's current content, never from the cache, and its commit; None if it doesn't exist.

    Raises:
        HubRefused: it's larger than ``limit`` bytes.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils._http import hf_raise_for_status

    thing = f"read {path} of {repo_id} on {api.endpoint}"
    with hub_errors(thing):
        url = hf_hub_url(repo_id, path, revision=revision, endpoint=api.endpoint)
        try:
            response = _get(api, url, limit, thing)
            hf_raise_for_status(response)
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
        return bytes(response.content), str(response.headers.get("X-Repo-Commit", ""))


def read_manifest(
    api: HfApi, repo_id: str, revision: str = "main", path: str = MANIFEST
) -> tuple[Manifest, str] | None:
    """The manifest at a revision and its commit; None if there is none, or it has another schema."""
    content = read_file(api, repo_id, path, revision, MANIFEST_BYTES)
    manifest = parse_manifest(content[0]) if content else None
    return (manifest, content[1]) if content and manifest else None


def parse_manifest(text: bytes) -> Manifest | None:
    """A manifest's content; None if it has another schema."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError:
        return None
