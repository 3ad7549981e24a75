"""Publishes an artifact to a Hub: look, decide, act, until nothing is left to do. One commit, then its tags.

``decide`` is pure. A publish that was interrupted at any point, or whose answers were lost, resumes by looking again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from workers.errors import HubRefused, HubUnavailable, ModelNotFound
from workers.spec.bounds import MANIFEST_BYTES
from workers.spec.job import Destination, Manifest
from workers.spec.workspace import MANIFEST
from workers.transfer import from_hub, gathered, hub
from workers.transfer.artifact import Artifact, PublishedFiles, published_files
from workers.transfer.from_hub import read_file
from workers.transfer.gathered import CARD, Content
from workers.transfer.hub import hub_errors
from workers.transfer.pace import Pace
from workers.transfer.patience import PUBLISH_SECONDS, Patience, transfer_seconds
from workers.transfer.revisions import OF_A_DAY, day_tag, stale, tag_name

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

T = TypeVar("T")

# Files that the Hub itself writes into every new repository.
HUB_OWN_FILES = frozenset({".gitattributes"})
# Size in bytes up to which a file is sent as the bytes that were checked; larger ones are LFS, checked by sha256.
SENT_FROM_MEMORY = 10 << 20
NEW = "the new commit"


@dataclass(frozen=True)
class Repository:
    """State of a repository: path -> sha256 (LFS) or git blob sha1 at its head, tag -> commit."""

    exists: bool
    head: str = ""
    tree: Mapping[str, str] | None = None
    tags: Mapping[str, str] | None = None
    gated: object = False
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class HubChange:
    """The remaining actions of a publish, in this order."""

    create: bool = False
    gate: bool = False
    moved: tuple[str, ...] = ()
    add: tuple[str, ...] = ()
    delete: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    stale_tags: tuple[str, ...] = ()

    @property
    def commits(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self.add or self.delete)


def decide(repo_id: str, repo: Repository, content: Content, to: Destination, today: date) -> HubChange:
    """The actions that make the repository show the content, and retain the revisions that it should.

    Raises:
        HubRefused: someone else changed the repository, and ``to`` doesn't force.
    """
    if repo.changed and not to.force:
        raise HubRefused(_changed_by_others(repo_id, repo))
    tree, tags = repo.tree or {}, dict(repo.tags or {})
    add = tuple(path for path in content.paths if path not in tree or not content.is_at(path, tree[path]))
    delete = tuple(sorted(set(tree) - set(content.paths) - content.kept - HUB_OWN_FILES))
    target = NEW if add or delete else repo.head
    identity = tag_name(content.fingerprint)
    # Deleted before the commit, so that an identity tag off the head always means that someone else committed.
    moved = (identity,) if tags.get(identity, target) != target else ()
    wanted = []
    if not any(OF_A_DAY.fullmatch(name) and at == target for name, at in tags.items()):
        wanted.append(day_tag(tags, today))
    if tags.get(identity) != target:
        wanted.append(identity)  # last: with this tag, the artifact counts as published
    after = {**tags, **dict.fromkeys(wanted, target)}
    return HubChange(
        create=not repo.exists,
        gate=to.gated is not False and repo.gated != to.gated,
        moved=moved,
        add=add,
        delete=delete,
        tags=tuple(wanted),
        stale_tags=tuple(stale(after, target, to.keep)),
    )


def _changed_by_others(repo_id: str, repo: Repository) -> str:
    names = ", ".join(repr(name) for name in repo.changed[:5])
    more = f" and {len(repo.changed) - 5} more" if len(repo.changed) > 5 else ""
    if MANIFEST not in (repo.tree or {}):
        return (
            f"publish {repo_id}: the repository holds files that quantmill didn't publish, got {names}{more}; "
            "choose another publish.name, empty the repository, or overwrite it with --force (publish.force)"
        )
    return (
        f"publish {repo_id}: somebody else changed {names}{more} on main since quantmill published it; keep the "
        "changes elsewhere and undo them there, or overwrite them with --force (publish.force)"
    )


def publish(
    api: HfApi,
    repo_id: str,
    artifact: Artifact,
    to: Destination,
    *,
    patience: Patience | None = None,
    today: Callable[[], date] = lambda: datetime.now(UTC).date(),
) -> str:
    """Make ``main`` show the artifact by one commit and its tags; return that commit.

    Idempotent: the same artifact makes no second commit, even if an answer was lost or a publisher died.

    Raises:
        CheckpointError: a file changed since it was verified.
        HubRefused: someone else changed the repository, the Hub refuses the card, or the token may not write.
        HubUnavailable: try again later.
    """
    patience = patience or Patience(PUBLISH_SECONDS + transfer_seconds(artifact.size))
    return _Publisher(api, repo_id, artifact, to, patience).run(today)


def preview(api: HfApi, repo_id: str, artifact: Artifact, to: Destination, today: date) -> HubChange:
    """The actions that ``publish`` would take now; writes nothing."""
    publisher = _Publisher(api, repo_id, artifact, to, Patience(300.0))
    return decide(repo_id, publisher.look(), publisher.content, to, today)


class _Publisher:
    """One publish: its calls with retries, and a cache of the trees of commits, which can't change."""

    def __init__(self, api: HfApi, repo_id: str, artifact: Artifact, to: Destination, patience: Patience) -> None:
        self._api = api
        self._repo_id = repo_id
        self._artifact = artifact
        # What the repository is to show: of a gathered one, with the others that the last look found.
        self.content = gathered.alone(artifact)
        self._to = to
        self._patience = patience
        self._trees: dict[str, dict[str, str]] = {}
        self._committed: str | None = None

    def run(self, today: Callable[[], date]) -> str:
        """Look and act until nothing is left; after a failure, wait and look again."""
        done, failures = 0, 0
        while True:
            repo = self.look()
            change = decide(self._repo_id, repo, self.content, self._to, today())
            if change == HubChange():
                return repo.head
            if done > 1:  # created and filled: a remaining change means that the Hub's answers lag behind
                failures += 1
                unseen = HubUnavailable(f"publish {self._repo_id}: the Hub doesn't show yet what was done")
                self._patience.wait(unseen, failures)
            if change.commits and repo.head == self._committed:
                raise HubRefused(
                    f"publish {self._repo_id}: its commit {repo.head} holds other files than were sent, got "
                    f"{[*change.add, *change.delete][:5]}; look at the repository"
                )
            try:
                if change.create:
                    self._create()
                else:
                    self._act(change, repo.head)
                done += 1
            except HubUnavailable as error:
                failures += 1
                self._patience.wait(error, failures)

    def look(self) -> Repository:
        """The current state of the repository."""
        try:
            refs = self._call("list the revisions of", lambda: self._api.list_repo_refs(self._repo_id))
        except ModelNotFound:
            self.content = self._content("", {}, ())
            return Repository(exists=False)
        head = next((str(ref.target_commit) for ref in refs.branches if ref.name == "main"), None)
        if head is None:
            raise HubRefused(f"publish {self._repo_id}: the repository has no branch main; create it anew")
        gated: object = False
        if self._to.gated is not False:
            gated = self._call(
                "ask for the gate of", lambda: self._api.model_info(self._repo_id, expand=["gated"]).gated
            )
        tags = {str(ref.name): str(ref.target_commit) for ref in refs.tags}
        tree = self._tree(head)
        changed = self._changed(head, tree, tags) if gathered.is_gathered(tree) else ()
        self.content = self._content(head, tree, changed)
        if not gathered.is_gathered(tree) and not self._is_published(tree):
            changed = self._changed(head, tree, tags)
        return Repository(exists=True, head=head, tree=tree, tags=tags, gated=gated, changed=changed)

    def _content(self, head: str, tree: Mapping[str, str], changed: tuple[str, ...]) -> Content:
        """What the repository is to show, with what a gathered one has at ``head``.

        Raises:
            HubRefused: the artifact can't be put beside what is there.
        """
        index = None
        if gathered.is_gathered(tree):
            text = self._read(MANIFEST, head)
            index = gathered.read_index(text) if text is not None else None
        elif not self._to.gather:
            return gathered.alone(self._artifact)
        elif MANIFEST in tree and not self._to.force:
            raise HubRefused(
                f"publish {self._repo_id}: the repository holds one artifact alone, and this is to share one with "
                "others; choose another publish.name, or overwrite it with --force (publish.force)"
            )
        return gathered.beside(self._repo_id, self._artifact, index, changed, force=self._to.force)

    def _is_published(self, tree: Mapping[str, str]) -> bool:
        files = {path: identity for path, identity in tree.items() if path not in HUB_OWN_FILES}
        return set(files) == set(self.content.paths) and all(self.content.is_at(*file) for file in files.items())

    def _changed(self, head: str, tree: Mapping[str, str], tags: Mapping[str, str]) -> tuple[str, ...]:
        """Files on ``main`` that differ from quantmill's last publish there."""
        files = {path: identity for path, identity in tree.items() if path not in HUB_OWN_FILES}
        if MANIFEST not in files:
            return tuple(sorted(files))
        manifest_text = self._read(MANIFEST, head)
        contents = published_files(manifest_text) if manifest_text is not None else None
        if contents is None:
            return (MANIFEST,)
        published = tags.get(tag_name(contents.fingerprint))
        if published == head:
            return ()
        if published is None:  # a publish that was interrupted between commit and tag
            return tuple(
                sorted(
                    path
                    for path in {*files, *contents.files} - {MANIFEST}
                    if self._differs(path, head, files, contents)
                )
            )
        before = self._tree(published)
        return tuple(sorted(p for p in {*files, *before} - HUB_OWN_FILES if files.get(p) != before.get(p)))

    def _differs(self, path: str, head: str, files: Mapping[str, str], contents: PublishedFiles) -> bool:
        if path not in files or path not in contents.files:
            return True
        sha256 = contents.files[path].sha256
        if len(files[path]) == len(sha256):
            return files[path] != sha256
        content = self._read(path, head)
        return content is None or hashlib.sha256(content).hexdigest() != sha256

    def _create(self) -> None:
        self._call("create", lambda: self._api.create_repo(self._repo_id, private=self._to.private, exist_ok=True))

    def _act(self, change: HubChange, head: str) -> None:
        """Apply the change; raises HubUnavailable if only another look can tell how far it got."""
        api, repo_id = self._api, self._repo_id
        if change.gate:
            gated = self._to.gated
            self._call("set the gate of", lambda: api.update_repo_settings(repo_id, gated=gated))
        for tag in change.moved:
            self._delete_tag(tag)
        target = self._commit(change, head) if change.commits else head
        for tag in change.tags:
            self._call(f"tag {tag} of", partial(api.create_tag, repo_id, tag=tag, revision=target, exist_ok=True))
        for tag in change.stale_tags:
            self._delete_tag(tag)

    def _commit(self, change: HubChange, head: str) -> str:
        """Make one commit with ``head`` as its parent, or fail."""
        from huggingface_hub import CommitOperationDelete

        if CARD in change.add:
            self._check_card()
        size = sum(self.content.size(path) for path in change.add)
        additions = self._call("upload the files of", lambda: self._upload(change), transfer_seconds(size))
        operations: list[Any] = [*additions, *(CommitOperationDelete(path_in_repo=path) for path in change.delete)]

        def commit() -> str:
            with hub_errors(f"commit to {self._repo_id}"):
                title = self._artifact.message
                info = self._api.create_commit(self._repo_id, operations, commit_message=title, parent_commit=head)
                return str(info.oid)

        # No retry: looking again tells a lost answer from a moved head.
        self._committed = self._patience.once(f"commit to {self._repo_id}", commit)
        return self._committed

    def _upload(self, change: HubChange) -> list[CommitOperationAdd]:
        """Upload the LFS files; the operations are created for each attempt, since they cache the Hub's answers."""
        from huggingface_hub import CommitOperationAdd

        additions = []
        for path in change.add:
            small = self.content.size(path) <= SENT_FROM_MEMORY
            data = self.content.read(path) if small else self.content.local(path)
            additions.append(CommitOperationAdd(path_in_repo=path, path_or_fileobj=data))
            self.content.check(path, additions[-1].upload_info.sha256.hex())
        self._api.preupload_lfs_files(self._repo_id, additions=additions)
        return additions

    def _check_card(self) -> None:
        """Let the Hub check the card's metadata before the upload; a Hub without that service is skipped.

        ``ModelCard.validate`` isn't used: it asks the Hub of HF_ENDPOINT, whatever the destination.
        """
        from huggingface_hub.utils._http import get_session

        text = self.content.read(CARD).decode()

        def check() -> Any:
            body = {"content": text, "repoType": "model"}
            answer = get_session().post(f"{self._api.endpoint}/api/validate-yaml", json=body)
            if answer.status_code == 429 or answer.status_code >= 500:
                raise HubUnavailable(f"check the card of {self._repo_id}: the Hub answered {answer.status_code}")
            return answer.json() if answer.status_code in (200, 400) else {}

        errors = [str(error.get("message")) for error in self._call("check the card of", check).get("errors", [])]
        if errors:
            raise HubRefused(
                f"publish {self._repo_id}: the Hub refuses the card's metadata ({'; '.join(errors)}); "
                "mend the source model's card, whose metadata is inherited, and run the zoo again"
            )

    def _delete_tag(self, tag: str) -> None:
        try:
            self._call(f"delete tag {tag} of", lambda: self._api.delete_tag(self._repo_id, tag=tag))
        except ModelNotFound:
            return  # already deleted, by a call whose answer was lost

    def _tree(self, commit: str) -> dict[str, str]:
        from huggingface_hub.hf_api import RepoFile

        def listed() -> dict[str, str]:
            entries = self._api.list_repo_tree(self._repo_id, recursive=True, revision=commit)
            files = [entry for entry in entries if isinstance(entry, RepoFile)]
            return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}

        if commit not in self._trees:
            self._trees[commit] = self._call("list", listed)
        return self._trees[commit]

    def _read(self, path: str, commit: str) -> bytes | None:
        content = self._call(f"read {path} of", lambda: read_file(self._api, self._repo_id, path, commit))
        return content[0] if content else None

    def _call(self, what: str, action: Callable[[], T], extra_seconds: float = 0.0) -> T:
        thing = f"{what} {self._repo_id}"

        def translated() -> T:
            with hub_errors(thing):
                return action()

        return self._patience.call(thing, translated, extra_seconds)


# ----------------------------------------------------------------------------------- as a destination


def takes(endpoint: str) -> bool:
    """Whether an endpoint is the URL of a Hub."""
    return endpoint.startswith(("http://", "https://"))


def publish_to(to: Destination, repo_id: str, artifact: Artifact, pace: Pace | None, today: Callable[[], date]) -> str:
    """Make ``main`` show the artifact; return its commit. Raises as ``publish``."""
    return publish(hub.connect(to.endpoint, pace), repo_id, artifact, to, today=today)


def preview_of(to: Destination, repo_id: str, artifact: Artifact, today: date) -> list[str]:
    """The actions that ``publish_to`` would take now, one per line."""
    publisher = _Publisher(hub.connect(to.endpoint), repo_id, artifact, to, Patience(300.0))
    todo = decide(repo_id, publisher.look(), publisher.content, to, today)
    return [
        *([f"create {repo_id} ({'private' if to.private else 'public'})"] if todo.create else []),
        *([f"set gated to {to.gated}"] if todo.gate else []),
        *(f"upload {path} ({publisher.content.size(path):,} bytes)" for path in todo.add),
        *(f"delete {path}" for path in todo.delete),
        *(["commit once"] if todo.commits else []),
        *(f"tag {tag}" for tag in todo.tags),
        *(f"delete tag {tag}" for tag in todo.stale_tags),
    ]


def standing(endpoint: str, repo_id: str, fingerprint: str) -> tuple[Manifest, str] | None:
    """Manifest and commit of the current artifact, if it has that fingerprint and is complete.

    It is complete once it has the tag that is set after the commit; later changes on ``main`` don't count.
    """
    api = hub.connect(endpoint)
    found = read_file(api, repo_id, MANIFEST, "main", MANIFEST_BYTES)
    if found is None:
        return None
    index = gathered.read_index(found[0])
    if index is not None:
        return _standing_member(api, repo_id, index, fingerprint)
    current = from_hub.parse_manifest(found[0])
    if current is None or current.fingerprint != fingerprint:
        return None
    tagged = from_hub.read_manifest(api, repo_id, tag_name(fingerprint))
    return tagged if tagged and tagged[0].fingerprint == fingerprint else None


def _standing_member(api: HfApi, repo_id: str, index: gathered.Index, fingerprint: str) -> tuple[Manifest, str] | None:
    """The same of one artifact of a gathered repository, whose commits are tagged by what they hold together.

    A commit without its tag leaves only the artifact that it added incomplete.
    """
    member = next((each for each in index.members if each.fingerprint == fingerprint), None)
    if member is None:
        return None
    revisions = [tag_name(index.fingerprint), *(["main"] if member.recipe != index.latest else [])]
    for revision in revisions:
        found = from_hub.read_manifest(api, repo_id, revision, member.manifest_path)
        if found and found[0].fingerprint == fingerprint:
            return found
    return None
