"""Checks whether a token may publish to a namespace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.errors import HubRefused, ModelNotFound
from workers.transfer import hub


def check_token(endpoint: str, namespace: str | None) -> None:
    """Check that there is a token, if the Hub needs one, and that it may write to the namespace.

    Raises:
        HubRefused: there is no token, the Hub doesn't know it, or it may not write to the namespace.
        HubUnavailable: no answer.
    """
    api = hub.connect(endpoint)
    from huggingface_hub import get_token
    from huggingface_hub.errors import LocalTokenNotFoundError

    if endpoint == hub.OFFICIAL and not get_token():
        raise HubRefused(
            f"publish: no token for {endpoint}, got neither HF_TOKEN nor a stored login; "
            "set HF_TOKEN to a token with write access, or run `hf auth login`"
        )
    try:
        with hub.hub_errors(f"publish: token check on {endpoint}"):
            who = api.whoami()
    except LocalTokenNotFoundError:
        return  # a Hub without accounts, such as the loopback one
    except ModelNotFound as error:
        raise HubRefused(f"publish: {endpoint} does not know this token; set HF_TOKEN to a valid one") from error
    problem = token_problem(who, namespace, members_only=endpoint == hub.OFFICIAL)
    if problem is not None:
        raise HubRefused(problem)


def token_problem(who: Mapping[str, Any], namespace: str | None, *, members_only: bool) -> str | None:
    """Why the token described by ``whoami`` may not write to the namespace; None if nothing forbids it.

    ``members_only``: only the account itself and its organisations can be written to, as on the public Hub.
    """
    name = who.get("name")
    access = (who.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        return f"publish: the token of {name!r} may only read; set HF_TOKEN to one that may write"
    if namespace is None:
        return None
    if access.get("role") == "fineGrained" and not _may_write(access.get("fineGrained") or {}, namespace):
        return (
            f"publish: the fine-grained token of {name!r} lacks repo.write for {namespace!r}; give it write access to "
            "the repositories of that namespace in its settings, or set HF_TOKEN to another"
        )
    organisations = {str(org.get("name")).lower(): org for org in who.get("orgs") or []}
    organisation = organisations.get(namespace.lower())
    if organisation is not None and organisation.get("roleInOrg") == "read":
        return (
            f"publish: {name!r} may only read in the organisation {namespace!r}; ask its admins for the role "
            "contributor or write, or change publish.namespace"
        )
    if members_only and organisation is None and namespace.lower() != str(name).lower():
        known = ", ".join(sorted([str(name), *organisations]))
        return f"publish.namespace: got {namespace!r}, but the token can write to {known} at most; name one of them"
    return None


def _may_write(grants: Mapping[str, Any], namespace: str) -> bool:
    """Whether grants for the whole namespace or any of its repositories include repo.write."""
    if "repo.write" in (grants.get("global") or []):
        return True
    return any(
        "repo.write" in (scope.get("permissions") or [])
        and str((scope.get("entity") or {}).get("name", "")).lower().split("/")[0] == namespace.lower()
        for scope in grants.get("scoped") or []
    )
