"""Opens pages in headless Chromium, where there is one: measures them, and takes pictures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=20000",
)  # fmt: skip
DARK = "(prefers-color-scheme: dark)"
# Runs in the page; what it finds is read from an attribute of the document.
MEASURE = """
const opaque = colour => colour && !/^rgba\\(.*, 0\\)$/.test(colour) && colour !== "transparent";
const channels = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
const luminance = colour => {
  const [r, g, b] = channels(colour).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = element => {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (opaque(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
};
const low = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
  if (!text || ["SCRIPT", "STYLE", "OPTION"].includes(element.tagName) || !element.getClientRects().length) continue;
  const style = getComputedStyle(element), colour = element.closest("svg") ? style.fill : style.color;
  const [a, b] = [luminance(colour), luminance(behind(element))].sort((x, y) => y - x);
  const contrast = (a + 0.05) / (b + 0.05);
  if (contrast < 4.5) low.push([text.slice(0, 40), Math.round(contrast * 100) / 100]);
}
let sorted = null;
const table = document.getElementById("all");
if (table) {
  const began = performance.now();
  table.tHead.rows[0].cells[3].click();
  document.body.offsetHeight;
  const column = [...table.tBodies[0].rows].map(row => row.cells[3].dataset.v);
  const find = document.getElementById("find");
  find.value = SEARCH; find.dispatchEvent(new Event("input"));
  document.body.offsetHeight;
  sorted = { milliseconds: performance.now() - began, column,
    left: [...table.tBodies[0].rows].filter(row => !row.hidden).length };
}
const root = document.documentElement;
root.dataset.found = JSON.stringify({ overflow: root.scrollWidth - root.clientWidth, low, sorted,
  narrowest: Math.min(...[...document.querySelectorAll("#all td")].filter(cell => cell.getClientRects().length &&
    cell.textContent.trim().length > 8).map(cell => cell.getBoundingClientRect().width)),
  top: (document.querySelector("h2") || root).getBoundingClientRect().top,
  problems: Math.max(0, ...[...document.querySelectorAll(".problem")].map(p => p.getBoundingClientRect().bottom)) });
"""


def measured(page: Path, width: int, height: int, *, dark: bool = False, search: str = "") -> dict[str, Any]:
    """What a page is like in a window of that size: pixels of overflow, texts of low contrast, how the table sorts."""
    assert CHROMIUM is not None
    content = page.read_text()
    if dark:
        assert DARK in content
        content = content.replace(DARK, "all")
    script = MEASURE.replace("SEARCH", json.dumps(search))
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "page.html"
        # Chromium's windows are at least 500 pixels wide; a frame is as narrow as a phone.
        inner = Path(scratch) / "inner.html"
        inner.write_text(content.replace("</body>", f"<script>(() => {{ {script} }})()</script></body>"))
        copy.write_text(
            f'<iframe id="f" src="inner.html" style="width:{width}px;height:{height}px;border:0"></iframe><script>'
            'document.getElementById("f").onload = () => { document.documentElement.dataset.found = '
            'document.getElementById("f").contentDocument.documentElement.dataset.found; };</script>'
        )
        done = subprocess.run(
            [CHROMIUM, *FLAGS, "--allow-file-access-from-files", f"--user-data-dir={scratch}/profile", "--dump-dom",
             copy.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stdout[:2000] + done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(unescape(found[1]))
    return answer
