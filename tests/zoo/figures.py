"""Measure how much rounding hurts the zoo's models, and write FIGURES.md beside this file.

python tests/zoo/figures.py
"""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from tests.zoo.train import COMMITTED
from workers.numerics import divergence, rounding

HERE = Path(__file__).parent
NAMES = tuple(COMMITTED)
WIDTHS = (8, 4, 3)
GROUP = 128


def load(name: str) -> tuple[Any, Any]:
    """A model of the zoo in float32, and its tokenizer."""
    folder = HERE / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def held_out(tokenizer: Any, sequences: int, length: int = 512) -> torch.Tensor:
    """int64 [sequences, length] from the start of the held-out text."""
    ids = tokenizer((HERE / "text" / "heldout.txt").read_text(), verbose=False)["input_ids"]
    return torch.tensor(ids[: sequences * length]).view(sequences, length)


def rounded(model: Any, bits: int) -> dict[str, torch.Tensor]:
    """The weights of all decoder matrices after symmetric min-max rounding to nearest, groups of 128 inputs."""
    made = {}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        in_layer = any(part.isdigit() for part in name.split("."))
        if not in_layer or parameter.dim() < 2 or name.endswith("mlp.gate.weight"):
            continue
        weight = parameter.data.mT.contiguous() if isinstance(owner, Conv1D) else parameter.data
        scale, _ = rounding.minmax_params(weight, bits, GROUP, symmetric=True)
        nearest = rounding.dequantize(rounding.quantize(weight, scale, None, bits), scale, None)
        made[name] = nearest.mT.contiguous() if isinstance(owner, Conv1D) else nearest
    return made


@torch.inference_mode()
def measure(name: str, sequences: int = 16) -> dict[str, Any]:
    """Held-out loss, and mean KL and perplexity after rounding to each width."""
    model, tokenizer = load(name)
    tokens = held_out(tokenizer, sequences)
    reference = [model(row[None]).logits[0] for row in tokens]
    loss = _loss(reference, tokens)
    found: dict[str, Any] = {"parameters": model.num_parameters(), "loss": loss, "perplexity": math.exp(loss)}
    original = {key: value.clone() for key, value in model.state_dict().items()}
    for bits in WIDTHS:
        model.load_state_dict({**original, **rounded(model, bits)})
        logits = [model(row[None]).logits[0] for row in tokens]
        kl = torch.cat([divergence.kl_divergence(*pair) for pair in zip(reference, logits, strict=True)]).mean().item()
        found[f"w{bits}"] = {"kl": kl, "perplexity": math.exp(_loss(logits, tokens))}
        model.load_state_dict(original)
    return found


def _loss(logits: list[torch.Tensor], tokens: torch.Tensor) -> float:
    pairs = zip(logits, tokens, strict=True)
    return torch.cat([divergence.negative_log_likelihood(lg[:-1], row[1:]) for lg, row in pairs]).mean().item()


def main() -> None:
    """Measure all and write the table."""
    lines = [
        "# The zoo's models, measured",
        "",
        f"Round to nearest, symmetric, min-max, groups of {GROUP} inputs, all matrices of the decoder layers (experts "
        "too; embeddings, head and router as they are). KL in nats for each of 8,192 held-out tokens, against the same "
        f"model in float32. Steps: with 256 and with 512 tokens. "
        f"Made by `python -m tests.zoo.figures` on {platform.machine()}, torch {torch.__version__}.",
        "",
        "| model | parameters | steps | held-out loss | KL w8 | KL w4 | KL w3 | perplexity | w8 | w4 | w3 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        found = measure(name)
        print(name, json.dumps(found))
        kls = " | ".join(f"{found[f'w{bits}']['kl']:.2e}" for bits in WIDTHS)
        perplexities = " | ".join(f"{found[f'w{bits}']['perplexity']:.3f}" for bits in WIDTHS)
        steps = f"{COMMITTED[name].steps:,} + {COMMITTED[name].long_steps:,}"
        lines.append(
            f"| {name} | {found['parameters']:,} | {steps} | {found['loss']:.4f} | {kls} | "
            f"{found['perplexity']:.3f} | {perplexities} |"
        )
    (HERE / "FIGURES.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
