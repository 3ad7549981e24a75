"""A Hub that answers wrongly: one wrong answer for each model that it has, all else as a Hub would."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef" * 2 + "01234567"


@dataclass(frozen=True)
class Answer:
    """A response: a body, or chunks that may never end; ``headers`` replace the usual ones, None removes one."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str | None] = field(default_factory=dict)
    chunks: Callable[[], Iterator[bytes]] | None = None
    drop: bool = False


@dataclass(frozen=True)
class Wrong:
    """A model whose Hub answers wrongly: to the listing, to a file by its name (at all, or from a byte on)."""

    name: str
    listing: Answer | Callable[[dict[str, Any]], Any] | None = None
    files: Mapping[str, Answer | Callable[[bytes], bytes]] = field(default_factory=dict)
    says: str = ""
    kinds: tuple[str, ...] = ()


def _json(value: Any) -> Answer:
    return Answer(json.dumps(value).encode())


def _edited(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda info: {**info, **changes}


def _siblings(*more: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda info: {**info, "siblings": [*info["siblings"], *more]}


def _endless() -> Iterator[bytes]:
    while True:
        yield b" " * 2**20


USER = ("HubRefused", "CheckpointError", "UnsupportedModel", "ModelNotFound")
BUSY = ("HubUnavailable",)


def of_the_listing() -> Iterator[Wrong]:
    """Wrong answers to the question for a model's files."""
    texts = {
        "html": b"<html>", "empty": b"", "list": b"[]", "number": b"3", "null": b"null", "text": b'"x"',
        "deep": b"[" * 100_000 + b"]" * 100_000, "not-utf8": b'{"sha": "\xff"}', "cut": b'{"sha": "0123',
    }  # fmt: skip
    for name, body in texts.items():
        yield Wrong(f"listing-{name}", Answer(body), kinds=(*USER, *BUSY))
    yield Wrong("listing-huge", Answer(b" " * (65 * 2**20)), says="larger", kinds=USER)
    yield Wrong("listing-endless", Answer(chunks=_endless), says="larger", kinds=USER)
    bomb = Answer(gzip.compress(b" " * (80 * 2**20)), headers={"Content-Encoding": "gzip"})
    yield Wrong("listing-gzip-bomb", bomb, says="larger", kinds=USER)
    shas = {
        "missing": None, "number": 3, "short": "abc", "long": COMMIT + "0", "upper": COMMIT.upper(), "list": [COMMIT],
        "path": "../../../../etc/cron.d/evil-and-some-more-of-it", "control": "\x1b]0;x\x07" + COMMIT[:35],
    }  # fmt: skip
    for name, sha in shas.items():
        yield Wrong(f"sha-{name}", _edited(sha=sha), says="names no commit", kinds=USER)
    for name, siblings in {"text": "config.json", "number": 3, "mapping": {"a": 1}}.items():
        yield Wrong(f"siblings-{name}", _edited(siblings=siblings), kinds=USER)
    for name, siblings in {"null": None, "empty": [], "missing-config": [{"rfilename": "README.md"}]}.items():
        yield Wrong(f"siblings-{name}", _edited(siblings=siblings), says="has no config.json", kinds=USER)
    yield Wrong("siblings-many", _edited(siblings=[{"rfilename": f"{n}"} for n in range(100_001)]), kinds=USER)
    names: dict[str, Any] = {
        "parent": "../evil.json", "absolute": "/etc/cron.d/evil", "through": "a/../../evil.json", "empty": "",
        "dot": ".", "number": 3, "null": None, "double": "a//b.json",
    }  # fmt: skip
    for name, file in names.items():
        yield Wrong(f"file-{name}", _siblings({"rfilename": file}), says="leads out of the repository", kinds=USER)
    yield Wrong("sibling-is-text", _siblings("config.json"), kinds=USER)
    for status, kinds in ((500, BUSY), (503, BUSY), (429, BUSY), (401, USER), (403, USER), (404, USER), (418, USER)):
        yield Wrong(f"status-{status}", Answer(b"{}", status), kinds=kinds)
    yield Wrong("status-418-and-a-story", Answer(b"\x1b[2J" * 10_000, 418), kinds=USER)
    yield Wrong("retry-after-text", Answer(b"", 429, {"Retry-After": "soon"}), kinds=BUSY)
    yield Wrong("retry-after-forever", Answer(b"", 503, {"Retry-After": "999999999"}), kinds=BUSY)
    yield Wrong("redirect-to-itself", Answer(b"", 302, {"Location": "?again"}), kinds=(*USER, *BUSY))
    yield Wrong("redirect-elsewhere", Answer(b"", 302, {"Location": "file:///etc/passwd"}), kinds=(*USER, *BUSY))
    yield Wrong("listing-dropped", Answer(drop=True), kinds=BUSY)
    yield Wrong("listing-shorter-than-said", Answer(b"{}", headers={"Content-Length": "999"}), kinds=BUSY)


def of_files() -> Iterator[Wrong]:
    """Wrong answers to the question for config.json, or for the header of the weights."""
    texts = {
        "html": b"<html>", "empty": b"", "list": b"[]", "not-utf8": b"\xff", "deep": b"[" * 100_000,
        "types": b'{"model_type": 3}', "unknown": b'{"model_type": "llama9"}',
    }  # fmt: skip
    for name, body in texts.items():
        yield Wrong(f"config-{name}", files={"config.json": Answer(body)}, kinds=USER)
    yield Wrong("config-endless", files={"config.json": Answer(chunks=_endless)}, says="larger", kinds=USER)
    yield Wrong("config-gone", files={"config.json": Answer(b"", 404)}, kinds=USER)
    yield Wrong("config-busy", files={"config.json": Answer(b"", 503)}, kinds=BUSY)
    heads = {
        "empty": b"", "short": b"\0\0", "html": b"<html>" * 100, "length": b"\xff" * 100,
        "not-json": (4).to_bytes(8, "little") + b"{{{{", "deep": (10_000).to_bytes(8, "little") + b"[" * 10_000,
        "no-shape": (9).to_bytes(8, "little") + b'{"a": {}}',
    }  # fmt: skip
    for name, head in heads.items():
        yield Wrong(f"weights-{name}", files={"model.safetensors": Answer(head)}, says="model.safetensors", kinds=USER)
    yield Wrong("weights-gone", files={"model.safetensors": Answer(b"", 404)}, kinds=(*USER, *BUSY))
    yield Wrong("weights-busy", files={"model.safetensors": Answer(b"", 500)}, kinds=BUSY)
    yield Wrong(
        "weights-truncated", files={"model.safetensors": lambda body: body[:-100]}, says="truncated", kinds=USER
    )
    said = {"Content-Range": "bytes 0-131071/99999999999999999999"}
    yield Wrong("weights-of-an-odd-size", files={"model.safetensors": Answer(b"\0" * 1000, 206, said)}, kinds=USER)
    said = {"Content-Range": "bytes x-y/z"}
    yield Wrong("weights-of-an-odd-range", files={"model.safetensors": Answer(b"\0" * 1000, 206, said)}, kinds=USER)
    yield Wrong("weights-endless", files={"model.safetensors": Answer(chunks=_endless)}, kinds=USER)


class HostileHub:
    """Serves one model for each wrong answer, under org/NAME; its files are those of ``folder``."""

    def __init__(self, folder: Path, wrong: list[Wrong]) -> None:
        self.wrong = {each.name: each for each in wrong}
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        # How often each file was given; a test may change what comes the second time.
        self.given: list[str] = []
        self.spoiled: dict[str, Callable[[int, bytes], bytes]] = {}

    def info(self, name: str) -> dict[str, Any]:
        """What an honest Hub says of a model."""
        siblings = [
            {
                "rfilename": file,
                "size": len(body),
                "blobId": hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest(),
                **({"lfs": {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body)}} if _lfs(file) else {}),
            }
            for file, body in sorted(self.files.items())
        ]
        return {"id": f"org/{name}", "modelId": f"org/{name}", "sha": COMMIT, "siblings": siblings, "private": False}

    def _entry(self, file: str) -> dict[str, Any]:
        """A file as an entry of the repository's tree."""
        body = self.files[file]
        entry = {"type": "file", "path": file, "size": len(body), "oid": "0" * 40}
        return {
            **entry,
            **({"lfs": {"oid": _tag(file, body), "size": len(body), "pointerSize": 134}} if _lfs(file) else {}),
        }

    def answer(self, path: str) -> Answer:
        """The answer to a GET or HEAD."""
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts[:3] == ["api", "models", "org"]:
            name = parts[3]
            listing = self.wrong[name].listing if name in self.wrong else None
            if isinstance(listing, Answer):
                return listing
            if parts[4:5] == ["tree"]:
                return _json([self._entry(file) for file in sorted(self.files)])
            info = self.info(name)
            return _json(listing(info) if listing else info)
        if parts[:1] == ["org"] and parts[2:3] == ["resolve"]:
            return self._file(parts[1], "/".join(parts[4:]))
        return Answer(b"", 404)

    def _file(self, name: str, file: str) -> Answer:
        wrong = self.wrong[name].files.get(file) if name in self.wrong else None
        if isinstance(wrong, Answer):
            return wrong
        body = self.files.get(file)
        if body is None:
            return Answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
        tag = _tag(file, body)
        self.given.append(file)
        if file in self.spoiled:
            body = self.spoiled[file](self.given.count(file), body)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        return Answer(wrong(body) if wrong else body, headers=headers)

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serve on a port of this machine; yields the address."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _lfs(file: str) -> bool:
    return file.endswith(".safetensors")


def _tag(file: str, body: bytes) -> str:
    """sha256 of an LFS file, git's blob id of another."""
    return hashlib.sha256(body).hexdigest() if _lfs(file) else hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _handler(hub: HostileHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._give(hub.answer(self.path), with_body=True)

        def do_HEAD(self) -> None:
            self._give(hub.answer(self.path), with_body=False)

        def _give(self, answer: Answer, *, with_body: bool) -> None:
            if answer.drop:
                self.close_connection = True
                return
            body, status, wanted = answer.body, answer.status, self.headers.get("Range", "")
            headers: dict[str, str | None] = {"Content-Length": str(len(body)), "Connection": "close"}
            if wanted.startswith("bytes=") and status == 200 and answer.headers and not answer.chunks:
                start, end = wanted.removeprefix("bytes=").split("-")
                body = body[int(start) : int(end) + 1 if end else None]
                status = 206
                headers |= {
                    "Content-Length": str(len(body)),
                    "Content-Range": f"bytes {start}-{end or ''}/{len(answer.body)}",
                }
            headers |= answer.headers
            if answer.chunks:
                headers["Content-Length"] = None
            self.send_response(status)
            for name, value in headers.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            try:
                for chunk in answer.chunks() if answer.chunks and with_body else [body] if with_body else []:
                    self.wfile.write(chunk)
            except OSError:
                self.close_connection = True  # the client has read enough

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
