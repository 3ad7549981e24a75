"""What the benchmarks run on: random models of a chosen size, and jobs on them with the zoo's text."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch
import transformers

from pipeline.zoo import shipped
from tests.workers.families import save_tokenizer
from workers.spec.data import Calibration, Dataset, Verification
from workers.spec.job import Job, ModelPin, Order, Thresholds
from workers.spec.recipes import Recipe

TEXT = Path(__file__).parents[1] / "zoo" / "text"


def save_llama(folder: Path, *, layers: int, hidden: int, intermediate: int, vocabulary: int = 512) -> int:
    """Save a random llama in bfloat16 with a tokenizer of characters; the bytes of its weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 256, 1),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    save_tokenizer(folder, vocabulary)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def job(model: Path, workspace: Path, *recipes: str | Recipe, samples: int = 128, length: int = 512) -> Job:
    """A job of shipped recipes, or others; nothing is verified by it."""
    pin = ModelPin(id=model.name, revision="bench", folder=str(model))
    chosen = [shipped.recipe(item) if isinstance(item, str) else item for item in recipes]
    gates = Thresholds(kl_mean=100, top1_agreement=0.01, perplexity_ratio=1e9, runtime_logit_difference=1)
    return Job(
        model=pin,
        orders=tuple(Order(recipe=item, fingerprint=f"{item.name:0<64}", thresholds=gates) for item in chosen),
        calibration=Calibration(dataset=_text("calibration"), samples=samples, sequence_length=length),
        verification=Verification(dataset=_text("heldout"), tokens=2 * length, sequence_length=length),
        destination=None,
        workspace=str(workspace),
    )


def _text(name: str) -> Dataset:
    return Dataset(path="text", data_files=(str(TEXT / f"{name}.txt"),))


def machine() -> str:
    """The processor's name where the system tells it, its cores, the load, and torch's version."""
    listing = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", listing.read_text()) if listing.exists() else []
    busy = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores{busy}, torch {torch.__version__}"
