"""Tell from a tokenizer's files, without loading it, whether it may begin texts with special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

# Bytes read of tokenizer.json: its post-processor stands before the vocabulary.
HEAD_BYTES = 2 * 2**20
_PROCESSOR = re.compile(rb'"post_processor"\s*:\s*')


def adds_special_tokens(head: Callable[[str, int], bytes | None]) -> bool:
    """Whether texts begin with special tokens; True also where the files don't say.

    It's part of a calibrated artifact's identity, so that it errs toward making anew: the worker asks the tokenizer
    itself. ``head`` returns the first bytes of a file, None if there's no such file.
    """
    settings = _settings(head("tokenizer_config.json", HEAD_BYTES))
    if settings.get("add_bos_token") is True:
        return True
    text = head("tokenizer.json", HEAD_BYTES)
    found = _PROCESSOR.search(text) if text else None
    if text is None or found is None:
        return True
    try:
        processor, _ = json.JSONDecoder().raw_decode(text[found.end() :].decode("utf-8", "ignore"))
    except (ValueError, RecursionError):
        return True
    return _begins(processor)


def _settings(text: bytes | None) -> dict[str, Any]:
    try:
        settings = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _begins(processor: Any) -> bool:
    """Whether a post-processor of the tokenizers library puts a special token before a text."""
    if not isinstance(processor, dict):
        return False
    match processor.get("type"):
        case "ByteLevel":
            return False
        case "TemplateProcessing":
            single = processor.get("single")
            first = single[0] if isinstance(single, list) and single else {}
            return not isinstance(first, dict) or "Sequence" not in first
        case "Sequence":
            inner = processor.get("processors")
            return any(map(_begins, inner)) if isinstance(inner, list) else True
    return True  # BertProcessing, RobertaProcessing, and those to come
