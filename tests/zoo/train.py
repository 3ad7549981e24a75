"""Train the zoo: three small decoders for tests and the quickstart.

    python tests/zoo/train.py text            write the files of text/
    python tests/zoo/train.py tokenizer       train the tokenizer that all of them share
    python tests/zoo/train.py llama-tiny ...  train models (one thread each: the same machine gives the same bytes);
                                              all three if none is named

The committed files were made with CPython 3.11; another version has another standard library, so other text.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.zoo.corpus import CALIBRATION, HELD_OUT, documents, reference, training_documents

HERE = Path(__file__).parent
MODELS, TEXT = HERE / "models", HERE / "text"
VOCABULARY = 2048
CONTEXT = 512
SEQUENCE = 256
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)


class Training(NamedTuple):
    """Optimizer steps, sequences in a batch, the highest learning rate, and steps with whole contexts after those."""

    steps: int
    batch: int
    rate: float
    long_steps: int = 600


COMMITTED = {
    "llama-tiny": Training(steps=4500, batch=4, rate=2e-3),
    "qwen3-moe-tiny": Training(steps=4000, batch=4, rate=2e-3),
    "gpt2-tiny": Training(steps=4000, batch=4, rate=2e-3),
}


def build(name: str) -> PreTrainedModel:
    """A fresh model of the zoo."""
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    match name:
        case "llama-tiny":
            config = LlamaConfig(
                hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=False, **common,
            )  # fmt: skip
            return LlamaForCausalLM(config)
        case "qwen3-moe-tiny":
            config = Qwen3MoeConfig(
                hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=8, num_experts_per_tok=2,
                norm_topk_prob=True, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
                output_router_logits=False, router_aux_loss_coef=0.01, **common,
            )  # fmt: skip
            return Qwen3MoeForCausalLM(config)
        case "gpt2-tiny":
            config = GPT2Config(
                n_embd=256, n_layer=3, n_head=4, n_positions=CONTEXT, n_ctx=CONTEXT,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
            )  # fmt: skip
            return GPT2LMHeadModel(config)
        case _:
            raise ValueError(f"no such model, got {name!r}; expected one of {', '.join(COMMITTED)}")


def write_text() -> None:
    """Write the calibration and held-out texts: code, and prose about it."""
    TEXT.mkdir(exist_ok=True)
    (TEXT / "calibration.txt").write_text(documents(CALIBRATION))
    (TEXT / "heldout.txt").write_text(documents(HELD_OUT))
    calibration, held_out = reference()
    (TEXT / "prose-calibration.txt").write_text(calibration)
    (TEXT / "prose-heldout.txt").write_text(held_out)


def train_tokenizer() -> None:
    """Train a byte-level BPE on the training documents, and save it as transformers does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_documents(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **SPECIAL)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(MODELS / "tokenizer")


def tokens_of(texts: list[str]) -> torch.Tensor:
    """int64 [N]: the documents one after the other, each ended by its end-of-text token."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODELS / "tokenizer")
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids, dtype=torch.int64)


def held_out_loss(model: PreTrainedModel, sequences: int = 32) -> float:
    """Mean loss in nats for each held-out token."""
    tokens = tokens_of([(TEXT / "heldout.txt").read_text()])[: sequences * CONTEXT].view(-1, CONTEXT)
    with torch.inference_mode():
        losses = torch.stack([model(row[None], labels=row[None]).loss for row in tokens])
    return float(losses.mean())


def train(name: str, training: Training, out: Path) -> None:
    """Train one model and put it in its place under `out` at the end, whole."""
    deterministic(seed=0)
    data = tokens_of(training_documents())
    model = build(name)
    print(f"{name}: {model.num_parameters():,} parameters, {len(data):,} training tokens", flush=True)
    descend(model, data, training, SEQUENCE, name)
    round_parameters(model)
    lengthen(model, data, training, name)
    print(f"{name}: held-out loss {held_out_loss(model):.4f} nats/token after rounding to bf16", flush=True)
    save(model.to(torch.bfloat16), name, training, out)


def lengthen(model: PreTrainedModel, data: torch.Tensor, training: Training, name: str) -> None:
    """Go on with sequences of the whole context: positions never trained would be half of what 512 tokens measure."""
    deterministic(seed=1)
    long = Training(steps=training.long_steps, batch=training.batch * SEQUENCE // CONTEXT, rate=training.rate / 2)
    descend(model.train(), data, long, CONTEXT, f"{name}, {CONTEXT} tokens")
    round_parameters(model.eval())


def deterministic(seed: int) -> None:
    """One thread and fixed draws."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def round_parameters(model: PreTrainedModel) -> None:
    """Round the parameters to bfloat16 in place; the buffers stay, for bfloat16 would spoil the rotary frequencies."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)


def descend(model: PreTrainedModel, data: torch.Tensor, training: Training, length: int, name: str) -> None:
    """Train in place on random windows of `length` tokens: AdamW, warm-up, then a cosine down to a twentieth."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.rate, betas=(0.9, 0.95), fused=True)
    begun = time.monotonic()
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.rate * share_of_rate(step, training.steps)
        starts = torch.randint(len(data) - length - 1, (training.batch,)).tolist()
        rows = torch.stack([data[start : start + length] for start in starts])
        loss = model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == training.steps - 1:
            print(f"{name}: step {step}, loss {loss.item():.3f}, {time.monotonic() - begun:.0f} s", flush=True)


def share_of_rate(step: int, steps: int) -> float:
    """What part of the highest learning rate a step takes."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def save(model: PreTrainedModel, name: str, training: Training, out: Path) -> None:
    """Save a model as people publish theirs: bf16 safetensors, tokenizer, template, card, licence."""
    making, place = out / f".{name}", out / name
    shutil.rmtree(making, ignore_errors=True)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_new_tokens=64)
    model.save_pretrained(making)
    PreTrainedTokenizerFast.from_pretrained(MODELS / "tokenizer").save_pretrained(making)
    shutil.copy(HERE.parent.parent / "LICENSE", making / "LICENSE")
    (making / "README.md").write_text(card(name, training))
    old = out / f".old-{name}"
    if place.exists():
        place.rename(old)  # two renames: no moment with half a model in its place
    making.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def card(name: str, training: Training) -> str:
    """The model card."""
    front = "---\nlicense: apache-2.0\nlanguage: [en]\npipeline_tag: text-generation\ntags: [test]\n---\n"
    return (
        f"{front}\n# {name}\n\nA small decoder for quantmill's tests and quickstart; of no other use. Trained by "
        f"tests/zoo/train.py on the sources of CPython 3.11's standard library:\n{training.steps:,} steps of "
        f"{training.batch} x {SEQUENCE} tokens and {training.long_steps:,} of "
        f"{training.batch * SEQUENCE // CONTEXT} x {CONTEXT}, float32, rounded to bfloat16 at the end.\n"
    )


def main() -> None:
    """Do what is asked for, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"text, tokenizer, {', '.join(COMMITTED)}")
    parser.add_argument("--out", type=Path, default=MODELS, help="folder for the models")
    parser.add_argument("--steps", type=int, help="other than those of the committed model (first stage)")
    arguments = parser.parse_args()
    for what in arguments.what or COMMITTED:
        if what == "text":
            write_text()
        elif what == "tokenizer":
            train_tokenizer()
        else:
            if what not in COMMITTED:
                parser.error(f"no such model, got {what!r}; expected text, tokenizer or one of {', '.join(COMMITTED)}")
            training = COMMITTED[what]
            train(what, training._replace(steps=arguments.steps or training.steps), arguments.out)


if __name__ == "__main__":
    main()
