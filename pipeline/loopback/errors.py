"""Define the loopback Hub's errors. call.py turns them into HTTP responses; quantmill's own code never sees them.

HubError
├── InvalidRequest      the request itself is wrong
├── TooLarge            a body, or what it announces, is above the Hub's limits
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
    """Base class of errors that the loopback Hub answers with an error status."""


class InvalidRequest(HubError):
    """The request is invalid; repeating it fails again."""


class TooLarge(HubError):
    """The body, or the file that it announces, is above the Hub's limits."""


class Unauthorized(HubError):
    """The required token is missing or wrong."""


class NotFound(HubError):
    """Something that the request names doesn't exist."""


class RepoNotFound(NotFound):
    """The repository doesn't exist, or is private and the request has no token."""


class RevisionNotFound(NotFound):
    """The branch, tag or commit doesn't exist."""


class EntryNotFound(NotFound):
    """The file or folder doesn't exist at that revision.

    commit: the commit that lacks it, which clients cache with the absence; None if unknown.
    """

    def __init__(self, message: str, commit: str | None = None) -> None:
        super().__init__(message)
        self.commit = commit


class AlreadyExists(HubError):
    """The name is taken.

    slug: the existing collection's slug, which clients read from the response; None for other things.
    """

    def __init__(self, message: str, slug: str | None = None) -> None:
        super().__init__(message)
        self.slug = slug


class HeadMoved(HubError):
    """The branch's head isn't the parent that the commit names."""
