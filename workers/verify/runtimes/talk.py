"""Talks with a checkpoint in the library that its users load it with: `python -m workers.verify.runtimes.talk`.

Run by the interpreter that has the library. Each line of standard input is a turn; what the model says is printed as it
comes. With a chat template a conversation goes on; without one, each line is a text that is continued.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A turn: the conversation so far and the new text in, pieces of the answer out.
Say = Callable[[list[dict[str, str]], str], Iterator[str]]


def main(folder: str, runtime: str, tokens: str) -> None:
    """Load a checkpoint, and answer until the input ends."""
    logging.disable(logging.WARNING)  # what libraries lack on this machine is no part of a talk
    say, chats = LOADERS[runtime](Path(folder), int(tokens))
    told: list[dict[str, str]] = []
    shown = sys.stdin.isatty()
    if shown:
        print("it chats; end with Ctrl+D" if chats else "no chat template: it goes on from what you write; Ctrl+D ends")
    while True:
        try:
            line = input("> " if shown else "")
        except EOFError:
            return
        if not line.strip():
            continue
        said = ""
        for piece in say(told if chats else [], line):
            said += piece
            print(piece, end="", flush=True)
        print(flush=True)
        told += [{"role": "user", "content": line}, {"role": "assistant", "content": said}]


def _transformers(folder: Path, tokens: int) -> tuple[Say, bool]:
    from threading import Thread

    import torch
    import transformers

    from workers.spec.auto_classes import loader_of
    from workers.spec.families import forward_of
    from workers.verify.runtimes.transformers import be_quiet

    be_quiet()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = json.loads((folder / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = forward_of(getattr(transformers, loader_of(config)).from_pretrained(folder, device_map=device))
    chats = bool(getattr(tokenizer, "chat_template", None))

    def say(told: list[dict[str, str]], line: str) -> Iterator[str]:
        if chats:
            turns = [*told, {"role": "user", "content": line}]
            line = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(line, return_tensors="pt", add_special_tokens=not chats).to(device)
        inputs.pop("token_type_ids", None)
        streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        arguments: dict[str, Any] = {**inputs, "streamer": streamer, "max_new_tokens": tokens}
        thread = Thread(target=model.generate, kwargs=arguments, daemon=True)
        thread.start()
        yield from streamer
        thread.join()

    return say, chats


def _mlx_lm(folder: Path, tokens: int) -> tuple[Say, bool]:
    from mlx_lm import load, stream_generate

    model, tokenizer = load(str(folder))
    chats = bool(getattr(tokenizer, "chat_template", None))

    def say(told: list[dict[str, str]], line: str) -> Iterator[str]:
        turns = [*told, {"role": "user", "content": line}]
        prompt: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True) if chats else line
        for part in stream_generate(model, tokenizer, prompt, max_tokens=tokens):
            yield part.text

    return say, chats


LOADERS: dict[str, Callable[[Path, int], tuple[Say, bool]]] = {
    "transformers": _transformers,
    "mlx-lm": _mlx_lm,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
