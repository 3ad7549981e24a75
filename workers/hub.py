"""The Hub: read models and manifests, publish artifacts in one atomic commit. No torch; the driver uses it too.

What a publisher has to handle itself is in huggingface_hub's own source: it retries uploads and listings, but raises on
the first 503 of create_repo, create_commit, create_tag and model_info, and its default client waits for ever.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from workers.content import file_sha256
from workers.errors import (
    CheckpointError,
    DiskFull,
    HubRefused,
    HubUnavailable,
    ModelNotFound,
    QuantmillError,
    ZooError,
)
from workers.job import MANIFEST, Manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OFFICIAL = "https://huggingface.co"
CALL_DEADLINE_SECONDS = 60.0
# What a checkpoint in another framework or format would add to the download.
PICKLES = ("*.bin", "*.pt", "*.pth")
NOT_FETCHED = (*PICKLES, "*.gguf", "*.onnx", "*.msgpack", "*.h5", "*.ot", "*.tflite", "onnx/*")
# Written by the Hub itself into every new repository.
HUB_OWN_FILES = frozenset({".gitattributes"})


def default_endpoint() -> str:
    """``HF_ENDPOINT``, else the public Hub."""
    return os.environ.get("HF_ENDPOINT", OFFICIAL).rstrip("/")


def connect(endpoint: str | None = None) -> HfApi:
    """A client of that Hub on which no call waits for ever. The token is the environment's or the stored login's."""
    endpoint = (endpoint or default_endpoint()).rstrip("/")
    # huggingface_hub reads both when it is imported; a self-hosted Hub speaks LFS, and 2.x doesn't negotiate.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if endpoint != OFFICIAL:
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    from huggingface_hub import HfApi

    _set_deadlines()
    return HfApi(endpoint=endpoint, library_name="quantmill")


@cache
def _set_deadlines() -> None:
    """Once in a process: setting the factory closes the client under the requests of other threads."""
    from huggingface_hub import set_client_factory

    set_client_factory(_client_with_deadline)


def _client_with_deadline() -> Any:
    import httpx2
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.timeout = httpx2.Timeout(CALL_DEADLINE_SECONDS, connect=10.0)
    return client


@contextmanager
def hub_errors(thing: str) -> Iterator[None]:
    """Turn whatever a Hub call raises into this package's tree; ``thing`` names what was being done to what."""
    import httpx2
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
    )

    try:
        yield
    except QuantmillError:
        raise
    except HfHubHTTPError as error:
        raise _from_status(error, thing) from error
    except HFValidationError as error:
        raise ZooError(f"{thing}: no valid name of a repository ({_brief(error)}); choose another") from error
    except NotASafetensorsRepoError as error:
        raise CheckpointError(f"{thing}: its safetensors have no usual names ({_brief(error)})") from error
    except (httpx2.HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError, LocalEntryNotFoundError) as error:
        raise HubUnavailable(f"{thing}: no usable answer from the Hub ({_brief(error)})") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(f"{thing}: no space left on the device; free some, or choose another --out") from error
        raise


def _from_status(error: Any, thing: str) -> QuantmillError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = error.response.status_code if error.response is not None else 0
    if isinstance(error, GatedRepoError):
        return HubRefused(f"{thing}: the repository is gated; accept its terms with the account of HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(f"{thing}: no such revision; name a branch, tag or commit of the repository")
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFound(f"{thing}: no such repository, or HF_TOKEN can't see it; check the name and the token")
    if status in (401, 403):
        return HubRefused(f"{thing}: refused ({status}); set HF_TOKEN to a token with write access to the namespace")
    if status in (408, 409, 412, 429) or status >= 500:
        return HubUnavailable(f"{thing}: the Hub answered {status}", _retry_after(error.response))
    return HubRefused(f"{thing}: the Hub answered {status} ({_brief(error)})")


def _retry_after(response: Any) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------ reading


def fetch(api: HfApi, repo_id: str, revision: str, allow_pickle: bool, offline: bool = False) -> Path:
    """A model's folder in the client's cache, downloaded at that commit; ``offline`` expects it to be there.

    Raises:
        ModelNotFound, HubRefused, HubUnavailable, DiskFull: as ``hub_errors`` says.
    """
    skip = [pattern for pattern in NOT_FETCHED if not (allow_pickle and pattern in PICKLES)]
    with hub_errors(f"fetch {repo_id}@{revision[:12]}"):
        return Path(api.snapshot_download(repo_id, revision=revision, ignore_patterns=skip, local_files_only=offline))


def read_file(api: HfApi, repo_id: str, path: str, revision: str = "main") -> tuple[bytes, str] | None:
    """A small file's content now, never a cached copy, and the commit it's from; None if it isn't there."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    url = hf_hub_url(repo_id, path, revision=revision, endpoint=api.endpoint)
    with hub_errors(f"read {path} of {repo_id} on {api.endpoint}"):
        try:
            response = get_session().get(url, headers=build_hf_headers(token=api.token), follow_redirects=True)
            hf_raise_for_status(response)
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
        return bytes(response.content), str(response.headers.get("X-Repo-Commit", ""))


def read_manifest(api: HfApi, repo_id: str, revision: str = "main") -> tuple[Manifest, str] | None:
    """The manifest at a revision and its commit; None if there is none, or one of another schema."""
    found = read_file(api, repo_id, MANIFEST, revision)
    if found is None:
        return None
    try:
        return Manifest.model_validate_json(found[0]), found[1]
    except ValidationError:
        return None


# --------------------------------------------------------------------------------------------- publishing


def publish(api: HfApi, repo_id: str, folder: Path, *, private: bool, message: str) -> str:
    """Publish a verified artifact as one commit and one tag; return the commit that ``main`` then shows.

    Idempotent: the same artifact makes no second commit, also when the first commit's answer was lost.

    Raises:
        CheckpointError: a file isn't what was verified.
        HubRefused: a rejected artifact, a repository that holds somebody else's files, a token that may not write.
        HubUnavailable: worth trying again.
    """
    manifest = check_bytes(folder)
    thing = f"publish {repo_id}"
    if not manifest.verdict.accepted:
        raise HubRefused(f"{thing}: {folder} was rejected ({'; '.join(manifest.verdict.reasons)}); it stays here")
    with hub_errors(thing):
        api.create_repo(repo_id, private=private, exist_ok=True)
    head, remote = _remote_tree(api, repo_id)
    local = _local_tree(folder, manifest)
    if not _holds(remote, local):
        _refuse_foreign(repo_id, remote)
        head = _commit(api, repo_id, folder, local, remote, head, message)
    with hub_errors(f"tag {repo_id}"):
        api.create_tag(repo_id, tag=tag_name(manifest.fingerprint), revision=head, exist_ok=True)
    return head


def tag_name(fingerprint: str) -> str:
    """The tag under which an artifact stays reachable after later ones."""
    return f"quantmill-{fingerprint[:12]}"


def check_bytes(folder: Path) -> Manifest:
    """The artifact's manifest, after its sha256 of every file was compared with the bytes on disk.

    Raises:
        CheckpointError: no manifest, a file changed since it was verified, one too many or one missing.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"artifact {folder}: no readable {MANIFEST} ({_brief(error)}); run its zoo again"
        ) from error
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    present = {str(path.relative_to(folder)) for path in files} - {MANIFEST}
    if present != set(manifest.files):
        odd = sorted(present ^ set(manifest.files))
        raise CheckpointError(f"artifact {folder}: files differ from the manifest, got {odd}; run its zoo again")
    for name, entry in manifest.files.items():
        if file_sha256(folder / name) != entry.sha256:
            raise CheckpointError(f"artifact {folder}: {name} changed since it was verified; run its zoo again")
    return manifest


def _local_tree(folder: Path, manifest: Manifest) -> dict[str, tuple[str, str]]:
    """Path -> (sha256, git blob sha1): the Hub shows the first for LFS files, the second for the others."""
    ids = {name: entry.sha256 for name, entry in manifest.files.items()}
    ids[MANIFEST] = file_sha256(folder / MANIFEST)
    # Large files are always LFS: their git identity is never asked for.
    small = {name for name in ids if (folder / name).stat().st_size < 64 << 20}
    return {name: (ids[name], _git_blob_sha1(folder / name) if name in small else "") for name in sorted(ids)}


def _git_blob_sha1(path: Path) -> str:
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _remote_tree(api: HfApi, repo_id: str) -> tuple[str, dict[str, str]]:
    """The head of ``main``, and path -> sha256 (LFS) or git blob sha1 at that very commit."""
    from huggingface_hub.hf_api import RepoFile

    with hub_errors(f"list {repo_id}"):
        head = next(ref.target_commit for ref in api.list_repo_refs(repo_id).branches if ref.name == "main")
        entries = api.list_repo_tree(repo_id, recursive=True, revision=head)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return head, {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def _holds(remote: dict[str, str], local: dict[str, tuple[str, str]]) -> bool:
    return set(remote) - HUB_OWN_FILES == set(local) and all(remote[path] in ids for path, ids in local.items())


def _refuse_foreign(repo_id: str, remote: dict[str, str]) -> None:
    foreign = sorted(set(remote) - HUB_OWN_FILES)
    if foreign and MANIFEST not in remote:
        raise HubRefused(
            f"publish {repo_id}: the repository holds files that quantmill didn't publish, got {foreign[:5]}; "
            "choose another publish.name, or empty the repository"
        )


def _commit(
    api: HfApi,
    repo_id: str,
    folder: Path,
    local: dict[str, tuple[str, str]],
    remote: dict[str, str],
    head: str,
    message: str,
) -> str:
    """One commit that makes the tree ours; if its answer is lost, the remote tree tells whether it landed."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    adds = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=folder / path) for path in local]
    stale = sorted(set(remote) - set(local) - HUB_OWN_FILES)
    thing = f"commit to {repo_id}"
    with hub_errors(thing):
        api.preupload_lfs_files(repo_id, additions=adds)
    try:
        with hub_errors(thing):
            deletions = [CommitOperationDelete(path_in_repo=path) for path in stale]
            operations: list[CommitOperationAdd | CommitOperationDelete] = [*adds, *deletions]
            info = api.create_commit(repo_id, operations, commit_message=message, parent_commit=head)
        return str(info.oid)
    except HubUnavailable:
        landed, now = _remote_tree(api, repo_id)
        if _holds(now, local):
            return landed
        raise
