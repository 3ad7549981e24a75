"""What a stage of ``bench_fleet`` does in a process of its own; a real one's modules are the parent's already, too."""

from __future__ import annotations

import json
import os
import sys
import time


def doze(request: str) -> str:
    """Pass time with a card, and give the answer that was told."""
    nap, answer = json.loads(request)
    assert {"torch", "transformers"} <= set(sys.modules)
    assert len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")) == 1
    time.sleep(nap)
    return str(answer)
