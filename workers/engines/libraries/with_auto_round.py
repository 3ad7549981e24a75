"""AutoRound (arXiv 2309.05516) into the format gptq (first version)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from workers.engines.libraries import speak


def make(request: dict[str, Any]) -> list[str]:
    """Quantize by auto-round, and leave its codes in the request's folder."""
    import torch
    import transformers
    from auto_round import AutoRound

    speak.progress("loading")
    source = request["source"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", trust_remote_code=request["trust_remote_code"], variant=request["variant"]
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=request["trust_remote_code"])
    tokens = speak.tokens_of(request)
    rows = [{"input_ids": torch.tensor([one]), "attention_mask": torch.ones(1, len(one)).long()} for one in tokens]
    scheme = request["recipe"]["scheme"]
    speak.progress("quantizing")
    with tempfile.TemporaryDirectory(dir=Path(request["out"]).parent) as saved:
        rounding = AutoRound(
            model,
            tokenizer,
            bits=scheme["bits"],
            group_size=scheme["group_size"] or -1,
            sym=scheme["symmetric"],
            iters=request["recipe"]["options"]["iterations"],
            dataset=rows,
            nsamples=len(rows),
            seqlen=len(tokens[0]),
            batch_size=min(8, len(rows)),
            # Compiling takes longer than it saves on a CPU.
            enable_torch_compile=torch.cuda.is_available(),
            device_map="cuda" if torch.cuda.is_available() else "cpu",
            layer_config={name: {"bits": 16} for name in request["left"] if ".layers." in name},
        )
        rounding.quantize_and_save(output_dir=saved, format="auto_gptq")
        speak.progress("saving")
        found = next(path.parent for path in Path(saved).rglob("config.json"))
        speak.declare(found, speak.gptq_exceptions(request))
        speak.store(request, found)
    return []


if __name__ == "__main__":
    speak.main(make)
