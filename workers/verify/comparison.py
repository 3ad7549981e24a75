"""A checkpoint beside its reference: what both predict, how the runtime sees it, what both go on with."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from workers.checkpoint.source import Source
from workers.formats.decoded import Decoded
from workers.model import reference
from workers.model.device import checkpoint_dtype, compute_device
from workers.model.forward import LogitsHead, stream
from workers.model.loading import StreamedModel
from workers.model.text import held_out_tokens, load_tokenizer
from workers.spec.families import family_of
from workers.spec.formats import recognised
from workers.spec.job import Generation, Job, Metrics, ModelPin, Runtime, Verification
from workers.spec.runtimes import RuntimeRequest, checking
from workers.verify import fidelity, gates
from workers.verify.activations import rounded_inputs
from workers.verify.integrity import Findings
from workers.verify.runtimes.ask import RuntimeAnswer, ask

RUNTIME_SEQUENCES, RUNTIME_TOKENS = 2, 128
# Held-out sequences to generate from, and tokens of each that make the prompt.
PROMPTS, PROMPT_TOKENS = 4, 32


@dataclass(frozen=True)
class Comparison:
    """A source model, and the text on which checkpoints of it are compared with it."""

    model: ModelPin
    source: Source
    verification: Verification
    workspace: Path

    @classmethod
    def of_job(cls, job: Job, source: Source) -> Self:
        """That of a job's artifacts."""
        return cls(job.model, source, job.verification, Path(job.workspace))

    @cached_property
    def tokenizer(self) -> Any:
        """The source's."""
        return load_tokenizer(self.source.folder, self.model)

    @cached_property
    def tokens(self) -> Tensor:
        """The held-out text, int64 [N, T]."""
        return held_out_tokens(self.verification, self.tokenizer)

    @cached_property
    def reference(self) -> StreamedModel:
        """The source, streamed."""
        return self._streamed(self.source.folder, self.source)

    def load(self) -> None:
        """Read the source and the text now: what is wrong with them isn't the artifact's fault.

        Raises:
            QuantmillError: what is wrong with them.
        """
        _ = self.tokens, self.reference

    @property
    def transposed(self) -> frozenset[str]:
        """Keys of the source's weights that are stored with their inputs first."""
        return frozenset(weight.key for weight in self.reference.weights if weight.transposed)

    def measure(self, place: Path, artifact: Source | Decoded, found: Findings) -> gates.Evidence:
        """Fidelity, runtime and continuations of an artifact; ``found`` is what its files have told."""
        ours = self._streamed(place, artifact)
        with rounded_inputs(ours, artifact) as rounded:
            hidden = stream(ours, reference.micro_batches(self.tokens))
        head = LogitsHead(ours)
        metrics = self._metrics(head, hidden)
        answer = self._ask(place)
        agreement, problems = self._agreement(answer, head, hidden)
        return gates.Evidence(
            integrity=[*found.problems, *rounded.problems],
            runtime_problems=problems,
            infeasible=answer.infeasible,
            metrics=metrics,
            runtime=agreement,
            worst_layers=found.worst,
            generations=self._generations(answer),
            promised_tokens=self.verification.tokens,
        )

    def only_runtime(self, place: Path, integrity: list[str], infeasible: list[str]) -> gates.Evidence:
        """What the runtime alone says of files that we can't decode."""
        answer = self._ask(place)
        return gates.Evidence(
            integrity=integrity,
            runtime_problems=answer.problems,
            infeasible=(*infeasible, *answer.infeasible),
            generations=self._generations(answer),
        )

    def _metrics(self, head: LogitsHead, hidden: list[Tensor]) -> Metrics:
        reference_hidden = self._reference_hidden()
        reference_head = LogitsHead(self.reference)

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for theirs, ours in zip(fidelity.rows(reference_hidden), fidelity.rows(hidden), strict=True):
                yield reference_head.logits(theirs[None])[0].float(), head.logits(ours[None])[0].float()

        return fidelity.compare(pairs(), self.tokens)

    def _reference_hidden(self) -> list[Tensor]:
        place = reference.reference_file(self.model, self.workspace, self.tokens, self.reference.dtype)
        if not place.exists:
            reference.store(place, stream(self.reference, reference.micro_batches(self.tokens)))
        return reference.load(place)

    def _ask(self, place: Path) -> RuntimeAnswer:
        """What the library that users have makes of the artifact, in a process of its own."""
        tokens = self.tokens[:RUNTIME_SEQUENCES, :RUNTIME_TOKENS].contiguous()
        prompts = self.tokens[:PROMPTS, :PROMPT_TOKENS].contiguous()
        scratch_root = self.workspace / "scratch"
        scratch_root.mkdir(parents=True, exist_ok=True)
        config = json.loads((place / "config.json").read_text())
        declared = config.get("quantization_config") or {}
        row = recognised(declared)
        with tempfile.TemporaryDirectory(dir=scratch_root) as scratch:
            request = RuntimeRequest(
                artifact=str(place),
                scratch=scratch,
                trust_remote_code=self.model.trust_remote_code,
                arithmetic=row.arithmetic(declared) if row else "any",
                loader=family_of(config.get("model_type")).loader,
            )
            return ask(checking(row.name if row else None), request, tokens, prompts)

    def _agreement(
        self, answer: RuntimeAnswer, head: LogitsHead, hidden: list[Tensor]
    ) -> tuple[Runtime | None, tuple[str, ...]]:
        """How far the runtime's logits are from ours, and what else is wrong with its answer."""
        if answer.logits is None:
            return None, answer.problems
        if not bool(torch.isfinite(answer.logits).all()):
            return None, (*answer.problems, f"runtime {answer.name}: NaN or Inf in its logits")
        ours = head.logits(torch.cat(hidden)[:RUNTIME_SEQUENCES, :RUNTIME_TOKENS]).float().cpu()
        difference = answer.logits - ours
        found = Runtime(
            name=answer.name,
            version=answer.version,
            max_abs_logit_difference=difference.abs().max().item(),
            # Not the largest: half-precision noise sends a token to another expert now and then.
            relative_logit_difference=difference.square().mean().sqrt().item() / max(ours.std().item(), 1e-9),
            generated=self.tokenizer.decode(answer.generated[0]) if answer.generated else "",
            host_bytes=answer.host_bytes,
        )
        return found, answer.problems

    def _generations(self, answer: RuntimeAnswer) -> tuple[Generation, ...]:
        """The artifact's continuations beside its reference's, which one pass over them all tells.

        What the reference says after the first token that differs would take a pass for each further token.
        """
        made = [row for row in answer.generated if row]
        if not made or len(made) != len(answer.generated):
            return ()
        prompts = self.tokens[: len(made), :PROMPT_TOKENS]
        longest = max(map(len, made))
        padded = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in made])
        tokens = torch.cat([prompts, padded], dim=1)
        head = LogitsHead(self.reference)
        (hidden,) = stream(self.reference, [tokens])
        chosen = head.logits(hidden).argmax(-1)[:, prompts.shape[1] - 1 : -1].cpu().tolist()
        return tuple(
            self._generation(prompt.tolist(), list(row), theirs[: len(row)])
            for prompt, row, theirs in zip(prompts, made, chosen, strict=True)
        )

    def _generation(self, prompt: list[int], ours: list[int], theirs: list[int]) -> Generation:
        same = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
        decode = self.tokenizer.decode
        return Generation(
            prompt=decode(prompt),
            artifact=decode(ours),
            reference=decode(theirs[: same + 1]),
            same_tokens=same,
            tokens=len(ours),
        )

    def _streamed(self, folder: Path, tensors: Source | Decoded) -> StreamedModel:
        device, dtype = compute_device()
        return StreamedModel(
            folder,
            tensors,
            dtype=dtype or checkpoint_dtype(self.source),
            device=device,
            trust_remote_code=self.model.trust_remote_code,
        )
