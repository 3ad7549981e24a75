"""``report.html``: one self-contained file, from ``results.json`` alone."""

from pipeline.report.render import render

__all__ = ["render"]
