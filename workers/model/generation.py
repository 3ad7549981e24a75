"""Greedy settings of our own to generate by: a checkpoint's generation_config.json decides only where a text ends.

Stop strings, several sequences, penalties, forced tokens and the like would change what is compared, or fail where only
the model's own arguments are given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
# Token ids are compared as int64, and no vocabulary is near this.
HIGHEST_TOKEN = 2**31 - 1


def greedy(folder: Path, config: Any, new_tokens: int) -> Any:
    """A ``GenerationConfig`` for the most likely ``new_tokens`` tokens, at most.

    Ids of special tokens are those of generation_config.json in ``folder``, where it has valid ones, else those of the
    model's ``config``.
    """
    from transformers import GenerationConfig

    said, text = _read(folder / GENERATION_CONFIG), config.get_text_config(decoder=True)

    def ids(name: str) -> list[int]:
        return (
            token_ids(said.get(name)) or token_ids(getattr(text, name, None)) or token_ids(getattr(config, name, None))
        )

    ends = ids("eos_token_id")
    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=ends or None,
        bos_token_id=next(iter(ids("bos_token_id")), None),
        pad_token_id=next(iter(ids("pad_token_id") or ends), None),
    )


def token_ids(value: object) -> list[int]:
    """The token ids in a setting, which may be one, several, or anything else."""
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= HIGHEST_TOKEN]


def unreadable(folder: Path) -> str | None:
    """Why transformers fails to load a model for its generation_config.json; None if it doesn't."""
    failing = failing_settings(folder)
    return failing[1] if failing and failing[0] == GENERATION_CONFIG else None


def failing_settings(folder: Path) -> tuple[str, str] | None:
    """The file for whose settings of generation transformers fails to load a model, and why; None if it doesn't.

    If generation_config.json is no JSON, or isn't there, transformers takes the settings in config.json.
    """
    from transformers import GenerationConfig

    def failure(**where: Any) -> str | None:
        try:
            GenerationConfig.from_pretrained(folder, **where)
        except OSError:
            raise
        except Exception as error:  # whatever a setting of an unexpected type leads to
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return None

    try:
        file, reason = GENERATION_CONFIG, failure()
    except OSError:
        file, reason = CONFIG, failure(config_file_name=CONFIG, _from_model_config=True)
    return (file, reason) if reason else None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        read = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}
