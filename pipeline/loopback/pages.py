"""Render the loopback Hub's HTML pages: a list of repositories, and one page for each, with its card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from urllib.parse import quote

from markdown_it import MarkdownIt
from markdown_it.token import Token
from starlette.responses import HTMLResponse

from pipeline.loopback.store import Commit, Repo

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24;
  background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin-top: 2rem }
a { color: #0b57d0; text-decoration: none } a:hover { text-decoration: underline }
table { border-collapse: collapse; width: 100% }
article img { max-width: 100% } article { border-bottom: 1px solid #dfe3e8 }
td, th { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #dfe3e8; vertical-align: top }
th { font-weight: 600; color: #57606a } .n { text-align: right; white-space: nowrap }
code, pre { font: 13px/1.5 ui-monospace, monospace } .dim { color: #57606a }
pre { background: #f4f6f8; padding: 1rem; border-radius: 6px; overflow-x: auto; white-space: pre-wrap }
@media (prefers-color-scheme: dark) {
  body { background: #14171a; color: #e3e6ea } a { color: #8ab4f8 } pre { background: #1f2429 }
  td, th, article { border-color: #31373d } th, .dim { color: #9aa4ae }
}
"""


def index(repos: Sequence[tuple[Repo, Commit]]) -> HTMLResponse:
    """Page of all repositories with the heads of their main branches, newest first."""
    rows = [
        (_link(f"/{repo.id}", repo.id), _visibility(repo), escape(head.title), _size(head), _when(head.date))
        for repo, head in sorted(repos, key=lambda pair: pair[1].date, reverse=True)
    ]
    body = _table(("repository", "", "last commit", "size", "when (UTC)"), rows) if rows else "<p>No models yet.</p>"
    return _page("Loopback Hub", f"<h1>Loopback Hub</h1>{body}")


def repo(
    repo: Repo,
    commit: Commit,
    *,
    history: Sequence[Commit],
    branches: Mapping[str, str],
    tags: Mapping[str, str],
    readme: str | None,
) -> HTMLResponse:
    """Page of a repository at a commit: the card, files and revisions."""
    files = [
        (_link(f"/{repo.id}/resolve/{commit.oid}/{path}", path), _number(f.size), "LFS" if f.lfs else "")
        for path, f in sorted(commit.tree.items())
    ]
    refs = [
        (_link(f"/{repo.id}/tree/{quote(name, safe='')}", name, quoted=True), kind, _oid(repo, oid))
        for kind, names in (("branch", branches), ("tag", tags))
        for name, oid in names.items()
    ]
    commits = [(_oid(repo, c.oid), escape(c.title), _when(c.date)) for c in history]
    card = f"<article>{_card(readme, f'/{repo.id}/resolve/{commit.oid}')}</article>" if readme is not None else ""
    body = (
        f'<p><a href="/">all models</a></p><h1>{escape(repo.id)} <span class="dim">{_visibility(repo)}</span></h1>'
        f"<p>at <code>{commit.oid}</code>, {_size(commit)} bytes</p>{card}"
        f"<h2>Files</h2>{_table(('file', 'bytes', ''), files)}"
        f"<h2>Branches and tags</h2>{_table(('name', '', 'commit'), refs)}"
        f"<h2>Commits</h2>{_table(('commit', 'title', 'when (UTC)'), commits)}"
    )
    return _page(repo.id, body)


def _page(title: str, body: str) -> HTMLResponse:
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body>{body}</body></html>"
    )
    # Allow only inline style and this Hub's own pictures: text of a card or commit must not load or run anything else.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'"
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


# The HTML that cards of ours have; all other is shown as text.
_FOLDED = re.compile(r"\s*(?:<details><summary>[\w .-]+</summary>|</details>)\s*")


def _card(readme: str, files: str) -> str:
    """A card as HTML, its metadata folded; ``files`` is the address of the repository's files."""
    front = re.match(r"---\r?\n(.*?\n)---\r?\n", readme, re.DOTALL)
    markdown = MarkdownIt("commonmark").enable("table")
    tokens = markdown.parse(readme[front.end() :] if front else readme)
    for token in tokens:
        for each in (token, *(token.children or ())):
            _make_safe(each, files)
    shown: str = markdown.renderer.render(tokens, markdown.options, {})
    metadata = f"<details><summary>metadata</summary><pre>{escape(front[1])}</pre></details>" if front else ""
    return metadata + shown


def _make_safe(token: Token, files: str) -> None:
    """Show HTML, and what pictures from elsewhere say, as text; relative addresses are the repository's."""
    if token.type in ("html_block", "html_inline") and not _FOLDED.fullmatch(token.content):
        token.content = escape(token.content)
    for name in ("src", "href"):
        address = token.attrGet(name)
        if not isinstance(address, str):
            continue
        if not re.match(r"[a-z][a-z0-9+.-]*:|[/#]", address, re.I):
            token.attrSet(name, f"{files}/{address.removeprefix('./')}")
        elif token.type == "image":
            token.type, token.tag, token.attrs = "code_inline", "code", {}  # its content is what the picture says


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    numeric = {n for n, head in enumerate(heads) if head in ("size", "bytes")}
    marks = [' class="n"' if n in numeric else "" for n in range(len(heads))]
    head = "".join(f"<th{mark}>{text}</th>" for mark, text in zip(marks, heads, strict=True))
    lines = ("".join(f"<td{mark}>{cell}</td>" for mark, cell in zip(marks, row, strict=True)) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _link(path: str, text: str, *, quoted: bool = False) -> str:
    return f'<a href="{escape(path if quoted else quote(path))}">{escape(text)}</a>'


def _oid(repo: Repo, oid: str) -> str:
    return f'<a href="/{quote(repo.id)}/commit/{oid}"><code>{oid[:12]}</code></a>'


def _visibility(repo: Repo) -> str:
    return "private" if repo.private else ""


def _size(commit: Commit) -> str:
    return _number(sum(file.size for file in commit.tree.values()))


def _number(value: int) -> str:
    return f"{value:,}"


def _when(date: str) -> str:
    return date[:16].replace("T", " ")
