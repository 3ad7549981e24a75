"""Serve the Hub's HTTP routes for repositories, revisions, listings and collections; transfer.py serves files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.loopback import card, pages, views
from pipeline.loopback import tree as trees
from pipeline.loopback.call import Call, page, route, take, visible_repo
from pipeline.loopback.errors import (
    AlreadyExists,
    EntryNotFound,
    InvalidRequest,
    NotFound,
    RepoNotFound,
    Unauthorized,
)
from pipeline.loopback.faults import FaultFunction, FaultInjector
from pipeline.loopback.store import Commit, Repo, Store
from pipeline.loopback.transfer import Limits, Transfer

__all__ = ["Limits", "build_app"]

USER = "loopback"
_ANY_METHOD = ("GET", "POST", "PUT", "PATCH", "DELETE")


def build_app(store: Store, *, token: str | None, limits: Limits, fault: FaultFunction | None) -> ASGIApp:
    """The ASGI application over a store; see server.LoopbackHub for the arguments."""
    api = Api(store)
    read, write = partial(route, token=token), partial(route, token=token, write=True)
    model = "/api/models/{ns}/{name}"
    routes = [
        read("GET", "/", api.index_page),
        read("GET", "/api/whoami-v2", api.whoami),
        read("POST", "/api/validate-yaml", api.validate_card),
        write("POST", "/api/repos/create", api.create_repo),
        write("DELETE", "/api/repos/delete", api.delete_repo),
        write("POST", "/api/repos/move", api.move_repo),
        write("PUT", f"{model}/settings", api.change_settings),
        read("GET", "/api/models", api.list_models),
        read("GET", model, api.repo_info),
        read("GET", f"{model}/revision/{{rev}}", api.repo_info),
        read("GET", f"{model}/tree/{{rev}}", api.list_tree),
        read("GET", f"{model}/tree/{{rev}}/{{path:path}}", api.list_tree),
        read("POST", f"{model}/paths-info/{{rev}}", api.paths_info),
        read("GET", f"{model}/refs", api.list_refs),
        read("GET", f"{model}/commits/{{rev}}", api.list_commits),
        write("POST", f"{model}/tag/{{rev}}", api.create_tag),
        write("DELETE", f"{model}/tag/{{rev}}", api.delete_tag),
        write("POST", f"{model}/branch/{{rev}}", api.create_branch),
        write("DELETE", f"{model}/branch/{{rev}}", api.delete_branch),
        read("GET", "/api/collections", api.list_collections),
        write("POST", "/api/collections", api.create_collection),
        read("GET", "/api/collections/{ns}/{slug}", api.get_collection),
        write("POST", "/api/collections/{ns}/{slug}/items", api.add_collection_item),
        *Transfer(store, limits).routes(token),
        read("GET", "/{ns}/{name}", api.repo_page),
        read("GET", "/{ns}/{name}/tree/{rev}", api.repo_page),
        read("GET", "/{ns}/{name}/commit/{rev}", api.repo_page),
        *(read(method, "/{path:path}", _unknown_path) for method in _ANY_METHOD),
    ]
    app: ASGIApp = Starlette(routes=routes)
    # Refuse other host names, to prevent DNS rebinding by web pages.
    app = _RawPaths(TrustedHostMiddleware(app, allowed_hosts=["127.0.0.1", "localhost"]))
    return app if fault is None else FaultInjector(app, fault)


class _RawPaths:
    """Routes on the undecoded path, so that a revision such as refs%2Fpr%2F1 is one part of it, not three."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "path": scope["raw_path"].decode("ascii")}, receive, send)


def _unknown_path(call: Call) -> Response:
    raise RepoNotFound(f"nothing here: {call.request.method} {call.request.url.path}; this Hub holds models only")


class Api:
    """The handlers; each takes a Call, queries or changes the store, and returns the response."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def whoami(self, call: Call) -> Response:
        if not call.trusted:
            raise Unauthorized("Invalid username or password.")
        names = sorted({repo.id.split("/")[0] for repo in self._store.repos()} - {USER})
        orgs = [{"type": "org", "id": name, "name": name, "fullname": name, "roleInOrg": "admin"} for name in names]
        access = {"type": "access_token", "accessToken": {"displayName": USER, "role": "write"}}
        return JSONResponse(
            {"type": "user", "id": USER, "name": USER, "fullname": USER, "isPro": False, "orgs": orgs, "auth": access}
        )

    def validate_card(self, call: Call) -> Response:
        errors, warnings = card.problems(take(call.json(), "content", str))
        body = {"errors": _messages(errors), "warnings": _messages(warnings)}
        return JSONResponse(body, 400 if errors else 200)

    # Repositories

    def create_repo(self, call: Call) -> Response:
        body = call.json()
        repo_id = _named_repo(body)
        try:
            repo_id = self._store.create_repo(repo_id, private=_is_private(body)).id
        except AlreadyExists as error:
            return JSONResponse({"error": str(error), "url": f"{call.base}/{self._store.repo(repo_id).id}"}, 409)
        return JSONResponse({"url": f"{call.base}/{repo_id}", "name": repo_id, "id": repo_id})

    def delete_repo(self, call: Call) -> Response:
        self._store.delete_repo(_named_repo(call.json()))
        return JSONResponse({})

    def move_repo(self, call: Call) -> Response:
        body = call.json()
        _require_model(body)
        self._store.move_repo(take(body, "fromRepo", str), take(body, "toRepo", str))
        return JSONResponse({})

    def change_settings(self, call: Call) -> Response:
        body = call.json()
        gated = body.get("gated")
        if gated not in (None, False, "auto", "manual"):
            raise InvalidRequest(f"the field 'gated' must be 'auto', 'manual' or false, got {gated!r}")
        private = _is_private(body) if {"visibility", "private"} & set(body) else None
        repo = self._store.change_settings(call.repo_id, private=private, gated=gated)
        return JSONResponse({"private": repo.private, "gated": repo.gated})

    def list_models(self, call: Call) -> Response:
        author, search = call.query("author"), call.query("search").lower()
        matches = [
            (repo, self._store.resolve(repo.id, "main"))
            for repo in self._store.repos()
            if (call.trusted or not repo.private)
            and author.lower() in ("", repo.id.split("/")[0].lower())
            and search in repo.id.lower()
        ]
        matches.sort(key=lambda pair: pair[1].date, reverse=True)
        infos = [self._info(call, repo, commit) for repo, commit in matches]
        if not call.flag("full"):
            infos = [{k: v for k, v in info.items() if k != "siblings"} for info in infos]
        return page(call, infos)

    def repo_info(self, call: Call) -> Response:
        repo, commit = self._repo_and_commit(call)
        return JSONResponse(self._info(call, repo, commit))

    def _info(self, call: Call, repo: Repo, commit: Commit) -> dict[str, Any]:
        info = views.repo_info(repo, commit, self._read(commit, "README.md"), blobs=call.flag("blobs"))
        wanted = call.request.query_params.getlist("expand")
        return {k: v for k, v in info.items() if not wanted or k in ("_id", "id", *wanted)}

    # Files and revisions

    def list_tree(self, call: Call) -> Response:
        _, commit = self._repo_and_commit(call)
        folder = call.param("path").strip("/")
        try:
            files = trees.listing(commit.tree, folder, recursive=call.flag("recursive"))
        except EntryNotFound as error:
            raise EntryNotFound(str(error), commit.oid) from error
        return page(call, [views.entry(commit.tree, path, file) for path, file in files])

    def paths_info(self, call: Call) -> Response:
        _, commit = self._repo_and_commit(call)
        paths = (path.strip("/") for path in call.form("paths"))
        existing = [p for p in paths if p in commit.tree or trees.is_folder(commit.tree, p)]
        return JSONResponse([views.entry(commit.tree, path, commit.tree.get(path)) for path in existing])

    def list_refs(self, call: Call) -> Response:
        visible_repo(self._store, call)
        branches, tags = (self._store.refs(call.repo_id, kind) for kind in ("heads", "tags"))
        return JSONResponse(
            {
                "branches": views.refs("heads", branches),
                "converts": [],
                "tags": views.refs("tags", tags),
                "pullRequests": [],
            }
        )

    def list_commits(self, call: Call) -> Response:
        visible_repo(self._store, call)
        history = self._store.history(call.repo_id, call.param("rev"))
        return page(call, [views.commit(commit, USER) for commit in history])

    def create_tag(self, call: Call) -> Response:
        body = call.json()
        name, message = take(body, "tag", str), take(body, "message", str, "")
        self._store.create_ref(call.repo_id, "tags", name, call.param("rev"), message)
        return JSONResponse({})

    def delete_tag(self, call: Call) -> Response:
        self._store.delete_ref(call.repo_id, "tags", call.param("rev"))
        return JSONResponse({})

    def create_branch(self, call: Call) -> Response:
        start = take(call.json(), "startingPoint", str, "main")
        self._store.create_ref(call.repo_id, "heads", call.param("rev"), start)
        return JSONResponse({})

    def delete_branch(self, call: Call) -> Response:
        self._store.delete_ref(call.repo_id, "heads", call.param("rev"))
        return JSONResponse({})

    # Collections

    def create_collection(self, call: Call) -> Response:
        body = call.json()
        title, namespace = take(body, "title", str), take(body, "namespace", str)
        data = {
            "title": title,
            "namespace": namespace,
            "description": take(body, "description", str, ""),
            "private": take(body, "private", bool, False),
            "items": [],
        }
        # The id is a hash of namespace and title, so that a repeated creation is recognised.
        digest = hashlib.sha256(f"{namespace}/{title}".encode()).hexdigest()[:24]
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "collection"
        slug = f"{namespace}/{name}-{digest}"
        self._store.create_collection(slug, data)
        return JSONResponse(self._collection(slug, call))

    def list_collections(self, call: Call) -> Response:
        stored = self._store.collections(call.query("owner"))
        listed = [views.collection(slug, data) for slug, data in stored.items() if call.trusted or not data["private"]]
        # As on the Hub: list at most four items, without positions, which the client counts itself.
        listed = [
            {**{k: v for k, v in entry.items() if k != "position"}, "items": entry["items"][:4]} for entry in listed
        ]
        return page(call, listed)

    def get_collection(self, call: Call) -> Response:
        return JSONResponse(self._collection(f"{call.param('ns')}/{call.param('slug')}", call))

    def add_collection_item(self, call: Call) -> Response:
        slug = f"{call.param('ns')}/{call.param('slug')}"
        self._collection(slug, call)
        body = call.json()
        item = take(body, "item", dict)
        repo_id, kind = take(item, "id", str), take(item, "type", str)
        if kind != "model":
            raise InvalidRequest(f"this Hub's collections hold models, got an item of type {kind!r}")
        repo_id = self._store.repo(repo_id).id
        key = hashlib.sha256(repo_id.encode()).hexdigest()[:24]
        note = {"text": take(body, "note", str)} if body.get("note") else None
        self._store.add_to_collection(slug, {"_id": key, "id": repo_id, "type": kind, "note": note})
        return JSONResponse(self._collection(slug, call))

    def _collection(self, slug: str, call: Call) -> dict[str, Any]:
        data = self._store.collection(slug)
        if data is None or (data["private"] and not call.trusted):
            raise NotFound(f"no collection {slug!r} here")
        return views.collection(slug, data)

    # Pages for people

    def index_page(self, call: Call) -> Response:
        repos = [repo for repo in self._store.repos() if call.trusted or not repo.private]
        return pages.index([(repo, self._store.resolve(repo.id, "main")) for repo in repos])

    def repo_page(self, call: Call) -> Response:
        repo, commit = self._repo_and_commit(call)
        return pages.repo(
            repo,
            commit,
            history=self._store.history(repo.id, commit.oid),
            branches=self._store.refs(repo.id, "heads"),
            tags=self._store.refs(repo.id, "tags"),
            readme=self._read(commit, "README.md"),
        )

    def _repo_and_commit(self, call: Call) -> tuple[Repo, Commit]:
        repo = visible_repo(self._store, call)
        return repo, self._store.resolve(repo.id, call.param("rev") or "main")

    def _read(self, commit: Commit, path: str) -> str | None:
        file = commit.tree.get(path)
        if file is None:
            return None
        return self._store.objects.path(file.sha256).read_text(errors="replace")


def _messages(texts: Iterable[str]) -> list[dict[str, str]]:
    return [{"message": text} for text in texts]


def _named_repo(body: Mapping[str, Any]) -> str:
    _require_model(body)
    return f"{take(body, 'organization', str, USER)}/{take(body, 'name', str)}"


def _require_model(body: Mapping[str, Any]) -> None:
    kind = take(body, "type", str, "model")
    if kind != "model":
        raise InvalidRequest(f"this Hub holds models only, got a repository of type {kind!r}")


def _is_private(body: Mapping[str, Any]) -> bool:
    default = "private" if body.get("private") is True else "public"
    visibility = take(body, "visibility", str, default)
    if visibility not in ("public", "private"):
        raise InvalidRequest(f"a model's visibility is 'public' or 'private', got {visibility!r}")
    return visibility == "private"
