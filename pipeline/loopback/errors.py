"""What the loopback Hub refuses; these become HTTP answers in app.py and never reach quantmill's own code.

HubError
├── InvalidRequest      the request itself is wrong
├── Unauthorized        no token where one is needed, or the wrong one
├── NotFound
│   ├── RepoNotFound
│   ├── RevisionNotFound
│   └── EntryNotFound
├── AlreadyExists       a repository, branch, tag, collection or item of that name
└── HeadMoved           the branch is not where the commit expected it
"""

from __future__ import annotations


class HubError(Exception):
    """Root of everything that the loopback Hub answers with an error status."""


class InvalidRequest(HubError):
    """The request itself is wrong; repeating it can't help."""


class Unauthorized(HubError):
    """No token where one is needed, or the wrong one."""


class NotFound(HubError):
    """Something that the request names is not here."""


class RepoNotFound(NotFound):
    """No such repository, or a private one to somebody without the token."""


class RevisionNotFound(NotFound):
    """No such branch, tag or commit."""


class EntryNotFound(NotFound):
    """No such file or folder at that revision.

    commit: the commit that was looked into, which clients record beside the absence; None if unknown.
    """

    def __init__(self, message: str, commit: str | None = None) -> None:
        super().__init__(message)
        self.commit = commit


class AlreadyExists(HubError):
    """The name is taken.

    slug: of the collection that has it, which clients read from the answer; None for other things.
    """

    def __init__(self, message: str, slug: str | None = None) -> None:
        super().__init__(message)
        self.slug = slug


class HeadMoved(HubError):
    """The branch is not at the parent that the commit names."""
