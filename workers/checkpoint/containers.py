"""The tables of containers, in which a format's weights are stored: how they are written, and opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from workers.checkpoint.gguf_file import GgufSource, GgufWriter
from workers.checkpoint.shards import MlxShardWriter, ShardWriter
from workers.checkpoint.source import Source

WRITERS: dict[str, type[ShardWriter]] = {"shards": ShardWriter, "mlx-shards": MlxShardWriter, "file": GgufWriter}
SOURCES: dict[str, Callable[[Path], Source | GgufSource]] = {"shards": Source, "mlx-shards": Source, "file": GgufSource}
