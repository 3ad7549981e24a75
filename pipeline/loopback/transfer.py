"""Serve uploads (preupload, LFS, commit) and downloads (resolve) of files.

LFS: github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md, with the Hub's own multipart transfer.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from pipeline.loopback import tree as trees
from pipeline.loopback.call import Call, answer_error, json_object, route, take, visible_repo
from pipeline.loopback.errors import EntryNotFound, HubError, InvalidRequest, TooLarge
from pipeline.loopback.objects import Incoming
from pipeline.loopback.store import Store
from pipeline.loopback.tree import Delete, Operation, Put

_WRITE_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes: LFS files larger than `multipart_above` are uploaded in parts of `part_bytes`.

    An LFS file has `object_bytes` at most, as on the Hub; the body of a commit, with its regular files, `commit_bytes`.
    """

    multipart_above: int = 5 * 10**9
    part_bytes: int = 512 * 2**20
    object_bytes: int = 500 * 10**9
    commit_bytes: int = 512 * 2**20


class Transfer:
    """The handlers for the contents of files."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store = store
        self._limits = limits

    def routes(self, token: str | None) -> list[Route]:
        """The routes for files. Signed /lfs/ URLs need no token, as those of a storage bucket."""
        read, write = partial(route, token=token), partial(route, token=token, write=True)
        return [
            write("POST", "/api/models/{ns}/{name}/preupload/{rev}", self.preupload),
            write("POST", "/api/models/{ns}/{name}/commit/{rev}", self.commit, body_bytes=self._limits.commit_bytes),
            write("POST", "/{ns}/{name}.git/info/lfs/objects/batch", self.batch),
            write("POST", "/lfs/verify", self.verify),
            Route("/lfs/objects/{sha256}", self.receive, methods=["PUT"]),
            Route("/lfs/parts/{sha256}/{number:int}", self.receive, methods=["PUT"]),
            route("POST", "/lfs/objects/{sha256}", self.complete, token=None),
            read("GET", "/{ns}/{name}/resolve/{rev}/{path:path}", self.resolve),
        ]

    # Upload

    def preupload(self, call: Call) -> Response:
        tree = self._store.resolve(call.repo_id, call.param("rev")).tree
        answers = []
        for file in _objects(call.json(), "files"):
            path, size = take(file, "path", str), take(file, "size", int)
            trees.check_path(path)
            lfs = trees.is_lfs(path, size, _from_base64(take(file, "sample", str, "")))
            answer: dict[str, Any] = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in tree:
                answer["oid"] = tree[path].sha256 if tree[path].lfs else tree[path].oid
            answers.append(answer)
        return JSONResponse({"files": answers})

    def batch(self, call: Call) -> Response:
        self._store.repo(call.repo_id)
        body = call.json()
        operation = take(body, "operation", str)
        if operation != "upload":
            raise InvalidRequest(f"this Hub serves files by /resolve/, got the LFS operation {operation!r}")
        objects = [
            self._instruct(call.base, take(object_, "oid", str), take(object_, "size", int))
            for object_ in _objects(body, "objects")
        ]
        # `chunk_size` in an object's header makes its upload multipart.
        return JSONResponse({"transfer": "basic", "objects": objects})

    def _instruct(self, base: str, sha256: str, size: int) -> dict[str, Any]:
        if not 0 <= size <= self._limits.object_bytes:
            raise TooLarge(f"object {sha256}: got {size} bytes, expected 0 to {self._limits.object_bytes}")
        answer: dict[str, Any] = {"oid": sha256, "size": size}
        if self._store.objects.size(sha256) == size:
            return answer
        upload: dict[str, Any] = {"href": base + self._signed(f"/lfs/objects/{sha256}", size)}
        if size > self._limits.multipart_above:
            part = self._limits.part_bytes
            sizes = [min(part, size - part * n) for n in range(math.ceil(size / part))]
            urls = {
                f"{n:05}": base + self._signed(f"/lfs/parts/{sha256}/{n}", bytes_) for n, bytes_ in enumerate(sizes, 1)
            }
            upload["header"] = {"chunk_size": str(part), **urls}
        return {**answer, "actions": {"upload": upload, "verify": {"href": f"{base}/lfs/verify"}}}

    async def receive(self, request: Request) -> Response:
        """Handle the PUT of an object or of one part, streamed to disk."""
        chunks = request.stream()
        try:
            size = self._check_signature(request)
            return await self._receive(request, chunks, size)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody receives it: the client disconnected
        except HubError as error:
            # Read the rest: a client that is still sending would see a connection reset instead of this response.
            async for _ in chunks:
                pass
            return answer_error(error, trusted=True)

    async def _receive(self, request: Request, chunks: AsyncIterator[bytes], size: int) -> Response:
        sha256 = request.path_params["sha256"]
        number: int | None = request.path_params.get("number")
        with Incoming(self._store.objects.scratch) as incoming:
            await _write_all(chunks, incoming, size)
            if number is None:
                await run_in_threadpool(self._store.objects.adopt, incoming, sha256, size)
                return Response()
            if incoming.size != size:
                raise InvalidRequest(f"object {sha256}, part {number}: got {incoming.size} bytes, expected {size}")
            tag = await run_in_threadpool(self._store.objects.adopt_part, incoming, sha256, number)
            return Response(headers={"ETag": f'"{tag}"'})

    def complete(self, call: Call) -> Response:
        size = self._check_signature(call.request)
        parts = [
            (take(part, "partNumber", int), take(part, "etag", str).strip('"'))
            for part in _objects(call.json(), "parts")
        ]
        self._store.objects.assemble(call.param("sha256"), size, parts)
        return JSONResponse({})

    def verify(self, call: Call) -> Response:
        body = call.json()
        sha256, size = take(body, "oid", str), take(body, "size", int)
        stored = self._store.objects.size(sha256)
        if stored != size:
            raise InvalidRequest(f"object {sha256}: {stored or 'no'} bytes are stored, expected {size}")
        return JSONResponse({})

    def commit(self, call: Call) -> Response:
        if call.query("create_pr"):
            raise InvalidRequest("this Hub has no pull requests; commit to a branch")
        lines = [json_object(line) for line in call.body.splitlines() if line.strip()]
        header = next((take(line, "value", dict) for line in lines if line.get("key") == "header"), None)
        if header is None:
            raise InvalidRequest("a commit needs a line with the key 'header'")
        commit = self._store.commit(
            call.repo_id,
            call.param("rev"),
            [self._operation(line) for line in lines if line.get("key") != "header"],
            title=take(header, "summary", str),
            message=take(header, "description", str, ""),
            parent=take(header, "parentCommit", str) if header.get("parentCommit") is not None else None,
        )
        return JSONResponse(
            {"success": True, "commitOid": commit.oid, "commitUrl": f"{call.base}/{call.repo_id}/commit/{commit.oid}"}
        )

    def _operation(self, line: Mapping[str, Any]) -> Operation:
        value = take(line, "value", dict)
        path = take(value, "path", str)
        match line.get("key"):
            case "file":
                data = _from_base64(take(value, "content", str))
                trees.check_path(path)
                if len(data) > (most := trees.MAX_REGULAR_BYTES):
                    raise TooLarge(f"{path!r} has {len(data)} bytes: above {most} it goes through LFS")
                self._store.objects.put(data)
                return Put(path, trees.regular_file(data))
            case "lfsFile":
                sha256 = take(value, "oid", str)
                # Requests that copy a stored file have no size.
                size = take(value, "size", int, self._store.objects.size(sha256) or 0)
                return Put(path, trees.lfs_file(sha256, size))
            case "deletedFile":
                return Delete(path, folder=False)
            case "deletedFolder":
                return Delete(path, folder=True)
            case key:
                raise InvalidRequest(f"a commit's line has the key {key!r}: expected file, lfsFile or a deletion")

    def _signed(self, path: str, size: int) -> str:
        return f"{path}?size={size}&signature={self._signature(path, size)}"

    def _signature(self, path: str, size: int) -> str:
        return hmac.new(self._store.signing_key, f"{path}?{size}".encode(), hashlib.sha256).hexdigest()

    def _check_signature(self, request: Request) -> int:
        size = request.query_params.get("size", "")
        signature = request.query_params.get("signature", "")
        if not size.isdecimal() or not hmac.compare_digest(
            signature.encode(), self._signature(request.url.path, int(size)).encode()
        ):
            raise InvalidRequest("the upload address is not one that this Hub gave out; ask the LFS batch API anew")
        return int(size)

    # Download

    def resolve(self, call: Call) -> Response:
        repo = visible_repo(self._store, call)
        commit = self._store.resolve(repo.id, call.param("rev"))
        path = call.param("path")
        file = commit.tree.get(path)
        if file is None:
            raise EntryNotFound(f"{repo.id} at {commit.oid} has no file {path!r}", commit.oid)
        headers = {
            "ETag": f'"{file.sha256 if file.lfs else file.oid}"',
            "X-Repo-Commit": commit.oid,
            # Files of untrusted models must not run as a page of this Hub.
            "X-Content-Type-Options": "nosniff",
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rsplit('/', 1)[-1])}",
        }
        if file.lfs:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.size)}
        picture = path.endswith(".png")  # of a card
        media = "image/png" if picture else "application/octet-stream" if file.lfs else "text/plain"
        return _Download(self._store.objects.path(file.sha256), headers=headers, media_type=media)


class _Download(FileResponse):
    chunk_size = 2**20


async def _write_all(chunks: AsyncIterator[bytes], incoming: Incoming, size: int) -> None:
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        if incoming.size + len(buffer) > size:
            raise InvalidRequest(f"got more than the {size} bytes that were announced for this upload")
        if len(buffer) >= _WRITE_BYTES:
            await run_in_threadpool(incoming.write, bytes(buffer))
            buffer.clear()
    await run_in_threadpool(incoming.write, bytes(buffer))


def _objects(body: Mapping[str, Any], name: str) -> Iterable[Mapping[str, Any]]:
    items = take(body, name, list)
    for item in items:
        if not isinstance(item, dict):
            raise InvalidRequest(f"the field {name!r} must be a list of objects, got {item!r} in it")
    return items


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise InvalidRequest(f"expected base64, got {text[:40]!r}: {error}") from error
