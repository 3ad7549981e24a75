"""Compares a checkpoint with its reference: predictions, runtime logits, and greedy continuations."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Self

import torch
from torch import Tensor

from workers.checkpoint.source import ModelSource, Source, TensorSource
from workers.errors import CheckpointError
from workers.formats.decoded import Decoded
from workers.formats.kept import QuantizedSource
from workers.machine.phase import tell
from workers.model import reference
from workers.model.device import checkpoint_dtype, compute_device
from workers.model.forward import LogitsHead, stream
from workers.model.loading import StreamedModel
from workers.model.pictures import processor_of
from workers.model.reference import ReferenceFile
from workers.model.text import Sequences, check_ids, held_out_tokens, load_tokenizer
from workers.numerics import divergence
from workers.spec.auto_classes import loader_of
from workers.spec.bounds import fit_to_show
from workers.spec.data import Verification
from workers.spec.formats import FORMATS, Format, recognised
from workers.spec.job import CHECKED, LOADER_CHECKED, Generation, Job, Metrics, ModelPin, RuntimeAgreement, SourceCheck
from workers.spec.runtimes import Runtime, RuntimeRequest, checking, runtime_named
from workers.spec.workspace import LOGITS_ROWS
from workers.verify import fidelity, gates, source_check
from workers.verify.activations import rounded_inputs
from workers.verify.integrity import Findings
from workers.verify.runtimes.ask import RuntimeAnswer, ask
from workers.verify.source_check import Checked

RUNTIME_SEQUENCES, RUNTIME_TOKENS = 2, 128
# Number of held-out prompts to generate from, and tokens per prompt.
PROMPTS, PROMPT_TOKENS = 4, 32
# Held-out sequences that prompts are chosen from.
PROMPT_CANDIDATES = 64


@dataclass(frozen=True)
class Comparison:
    """A source model, and the text on which its checkpoints are compared with it."""

    model: ModelPin
    source: ModelSource
    verification: Verification
    workspace: Path
    runtimes: tuple[str, ...] = ()

    @classmethod
    def of_job(cls, job: Job, source: ModelSource, runtimes: tuple[str, ...] = ()) -> Self:
        """The comparison of a job's artifacts; ``runtimes`` check them, empty: the one of their format."""
        return cls(job.model, source, job.verification, Path(job.workspace), runtimes)

    @cached_property
    def tokenizer(self) -> Any:
        """The source's tokenizer."""
        return load_tokenizer(self.source.folder, self.model)

    @cached_property
    def held_out(self) -> Sequences:
        """The held-out sequences."""
        processor = processor_of([self.verification.shown], self.source.folder, self.model)
        held_out = held_out_tokens(self.verification, self.tokenizer, processor)
        check_ids(held_out.rows, self.reference.embedding_rows, "verify.dataset")
        return held_out

    @property
    def tokens(self) -> Tensor:
        """The held-out tokens, int64 [N, T]."""
        return self.held_out.tokens_NT

    @property
    def begin_with(self) -> tuple[str, ...]:
        """The special tokens that each sequence begins with."""
        return tuple(map(str, self.tokenizer.convert_ids_to_tokens(list(self.held_out.prefix))))

    @cached_property
    def prompts(self) -> Tensor:
        """Beginnings of held-out sequences that are fit to be shown, else the first ones: int64 [P, PROMPT_TOKENS]."""
        beginnings = self.tokens[:PROMPT_CANDIDATES, :PROMPT_TOKENS]
        fit = [row for row, tokens in enumerate(beginnings) if fit_to_show(self.tokenizer.decode(tokens.tolist()))]
        return beginnings[fit[:PROMPTS] or slice(PROMPTS)].clone()

    @cached_property
    def reference(self) -> StreamedModel:
        """The source model, streamed."""
        return self._streamed(self.source.folder, self.source)

    def left_out(self, fmt: str) -> frozenset[str]:
        """Keys of the source's tensors that an artifact in a format leaves out."""
        return self.unused if FORMATS[fmt].towers else self.unused | set(self.reference.towers)

    def load(self) -> None:
        """Load the source and the text first, so that their errors aren't attributed to the artifact.

        Raises:
            QuantmillError: the source or the text can't be loaded.
        """
        _ = self.tokens, self.reference

    def check_source(self) -> SourceCheck:
        """Compare the streamed source with the source as transformers loads it, unless that was done before.

        Raises:
            QuantmillError: they disagree, or transformers can't load the source.
        """
        if isinstance(self.source, QuantizedSource):
            return self._check_kept()
        checked = Checked(
            self.model,
            self.source.folder,
            self.reference,
            lambda layers: self._streamed(self.source.folder, self.source, layers),
            self._reference_file,
            self.workspace,
        )
        return source_check.check(checked, self.tokens, self._reference_hidden)

    def _check_kept(self) -> SourceCheck:
        """Compare a source that is quantized already, as we decode it, with the runtime that reads its format."""
        if (known := source_check.kept(self._reference_file)) is not None:
            return known
        (answer,), layers = self._ask(self.source.folder, ()), len(self.reference.layers)
        if answer.infeasible:
            return SourceCheck(all_layers=layers, unchecked="; ".join(answer.infeasible))
        agreement, problems = self._agreement(answer, LogitsHead(self.reference), self._reference_hidden())
        if agreement is None or problems:
            raise CheckpointError(
                f"model {self.model.id!r}: its own runtime can't run the source: {'; '.join(problems)}"
            )
        found = SourceCheck(
            version=agreement.version,
            relative_logit_difference=agreement.relative_logit_difference,
            tokens=self.tokens[:RUNTIME_SEQUENCES, :RUNTIME_TOKENS].numel(),
            layers=layers,
            all_layers=layers,
        )
        source_check.keep(found, self._reference_file, self.model, source_check.MOST_DIFFERENT_IN_HALF)
        return found

    @property
    def transposed(self) -> frozenset[str]:
        """Keys of the source's weights that are stored as (in, out)."""
        return frozenset(weight.key for weight in self.reference.weights if weight.transposed)

    @property
    def unused(self) -> frozenset[str]:
        """Keys of the source's tensors that have no place in the model."""
        return frozenset(self.reference.unused)

    def measure(self, folder: Path, artifact: Source | Decoded, findings: Findings) -> gates.Evidence:
        """Measure an artifact's fidelity, runtime and continuations; ``findings`` are those of its files."""
        # The runtime's process runs beside this one, which computes what its answer is compared with.
        runtime = _Asking(lambda: self._ask(folder, self.runtimes))
        ours = self._streamed(folder, WithTowers(artifact, self.source, self.reference.towers))
        with rounded_inputs(ours, artifact) as rounded:
            hidden = stream(ours, self.held_out.batches())
        head = LogitsHead(ours)
        metrics = self._metrics(head, hidden)
        tell("waiting for the runtime")
        answers = runtime.answer()
        compared = [self._agreement(answer, head, hidden) for answer in answers]
        agreements = tuple(agreement for agreement, _ in compared if agreement is not None)
        return gates.Evidence(
            integrity=[*findings.problems, *rounded.problems],
            runtime_problems=[problem for _, problems in compared for problem in problems],
            infeasible=[reason for answer in answers for reason in answer.infeasible],
            metrics=metrics,
            runtime=agreements[0] if agreements else None,
            other_runtimes=agreements[1:],
            worst_layers=findings.worst,
            layer_noise=findings.by_layer,
            generations=self.generations(answers[0]),
            promised_tokens=self.verification.tokens,
        )

    def only_runtime(self, folder: Path, integrity: list[str], infeasible: list[str]) -> gates.Evidence:
        """Evidence from the runtime alone, for files that we can't decode."""
        answers = self._ask(folder, self.runtimes)
        return gates.Evidence(
            integrity=integrity,
            runtime_problems=[problem for answer in answers for problem in answer.problems],
            infeasible=[*infeasible, *(reason for answer in answers for reason in answer.infeasible)],
            generations=self.generations(answers[0]),
        )

    def _metrics(self, head: LogitsHead, hidden: list[Tensor]) -> Metrics:
        return self.metrics(_pieces(head, ours) for ours in fidelity.rows(hidden))

    def metrics(self, logits: Iterable[Iterable[Tensor]], sequences: int | None = None) -> Metrics:
        """Metrics of an artifact's logits against the reference's.

        ``logits``: of each held-out sequence, float32 [T, V] in pieces of ``LOGITS_ROWS`` rows. ``sequences``: the
        first so many alone.
        """
        reference_hidden, head = self._reference_hidden(), LogitsHead(self.reference)

        def pairs(theirs: Tensor, ours: Iterable[Tensor]) -> Iterator[fidelity.Pair]:
            for reference_RV, ours_RV in zip(_pieces(head, theirs), ours, strict=True):
                yield reference_RV, ours_RV.to(reference_RV.device)

        hidden = islice(fidelity.rows(reference_hidden), sequences)
        compared = (pairs(theirs, ours) for theirs, ours in zip(hidden, logits, strict=True))
        return fidelity.compare(compared, self.held_out.rows[:sequences])

    @property
    def _reference_file(self) -> ReferenceFile:
        return reference.reference_file(self.model, self.workspace, self.held_out.tensors, self.reference.dtype)

    def _reference_hidden(self) -> list[Tensor]:
        file = self._reference_file
        if file.exists:
            with suppress(FileNotFoundError):  # removed meanwhile, by a process whose source check failed
                return reference.load(file)
        hidden = stream(self.reference, self.held_out.batches())
        reference.store(file, hidden)
        return hidden

    def _ask(self, folder: Path, runtimes: tuple[str, ...]) -> tuple[RuntimeAnswer, ...]:
        """Load a checkpoint in the users' libraries, one after the other, each in its own process.

        Those that are named check it, whether they know its format or not; the format's own, if none is.
        """
        row = recognised(json.loads((folder / "config.json").read_text()).get("quantization_config") or {})

        def answer(runtime: Runtime) -> RuntimeAnswer:
            with self.scratch() as scratch:
                return self.ask_one(runtime, folder, scratch)

        asked = tuple(map(runtime_named, runtimes)) or (checking(row.name if row else None),)
        return tuple(map(answer, asked))

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A folder that passes things to a runtime's process, removed with its context."""
        root = self.workspace / "scratch"
        root.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=root)

    def ask_one(self, runtime: Runtime, folder: Path, scratch: str, *, held_out: bool = False) -> RuntimeAnswer:
        """Load a checkpoint in one library; with ``held_out``, it leaves the logits of all held-out text in scratch."""
        config = json.loads((folder / "config.json").read_text())
        declared = config.get("quantization_config") or {}
        row = recognised(declared)
        request = RuntimeRequest(
            artifact=str(folder),
            scratch=scratch,
            trust_remote_code=self.model.trust_remote_code,
            arithmetic=row.arithmetic(declared) if row else "any",
            loader=loader_of(config),
            unused=self.reference.unused,
            device_bytes=self._on_a_card(folder, row),
            decodes_on_loading=row is not None and row.decodes_on_loading,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what this process keeps for later, the other can't have
        tokens = self.tokens[:RUNTIME_SEQUENCES, :RUNTIME_TOKENS].clone()
        return ask(runtime, request, tokens, self.prompts, self.tokens if held_out else None)

    def _on_a_card(self, folder: Path, row: Format | None) -> int:
        """Bytes of an artifact's weights in a runtime on a card: packed as they are stored, or in half precision."""
        if row is not None and row.packed_on_card:
            return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        weights: int = sum(parameter.numel() for parameter in self.reference.model.parameters())
        return 2 * weights

    def _agreement(
        self, answer: RuntimeAnswer, head: LogitsHead, hidden: list[Tensor]
    ) -> tuple[RuntimeAgreement | None, tuple[str, ...]]:
        """Difference between the runtime's logits and ours, and other problems of its answer."""
        if answer.logits is None:
            return None, answer.problems
        return self.agreement(answer, head.logits(_first_rows(hidden)).float().cpu())

    def agreement(self, answer: RuntimeAnswer, ours: Tensor) -> tuple[RuntimeAgreement | None, tuple[str, ...]]:
        """Difference between the runtime's logits and ``ours`` (float32 [N, T, V]), and its answer's other problems."""
        if not bool(torch.isfinite(answer.logits).all()):
            return None, (*answer.problems, f"runtime {answer.name}: NaN or Inf in its logits")
        difference = answer.logits - ours
        agreement = RuntimeAgreement(
            name=answer.name,
            version=answer.version,
            max_abs_logit_difference=difference.abs().max().item(),
            # Root mean square, not the maximum: half-precision noise occasionally routes a token to another expert.
            relative_logit_difference=difference.square().mean().sqrt().item() / max(ours.std().item(), 1e-9),
            generated=self.tokenizer.decode(answer.generated[0]) if answer.generated else "",
            host_bytes=answer.host_bytes,
            kl_mean=divergence.kl_divergence(ours, answer.logits).mean().item(),
            processor=answer.processor,
            verdict=LOADER_CHECKED if answer.kernels else CHECKED,
            kernels=answer.kernels,
        )
        return agreement, answer.problems

    def generations(self, answer: RuntimeAnswer) -> tuple[Generation, ...]:
        """The artifact's continuations next to its reference's, from one forward pass over all of them.

        The reference's text after the first differing token is omitted: it would take one pass per token.
        """
        generated = [row for row in answer.generated if row]
        if not self.verification.continuations or not generated or len(generated) != len(answer.generated):
            return ()
        prompts = self.prompts[: len(generated)]
        longest = max(map(len, generated))
        padded = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in generated])
        tokens = torch.cat([prompts, padded], dim=1)
        head = LogitsHead(self.reference)
        (hidden,) = stream(self.reference, [tokens])
        chosen = head.logits(hidden).argmax(-1)[:, prompts.shape[1] - 1 : -1].cpu().tolist()
        found = (
            self._generation(prompt.tolist(), list(row), theirs[: len(row)])
            for prompt, row, theirs in zip(prompts, generated, chosen, strict=True)
        )
        return tuple(one for one in found if fit_to_show(one.prompt, one.artifact, one.reference))

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

    def _streamed(self, folder: Path, tensors: TensorSource, layers: int | None = None) -> StreamedModel:
        device, dtype = compute_device()
        return StreamedModel(
            folder,
            tensors,
            dtype=dtype or checkpoint_dtype(self.source),
            device=device,
            trust_remote_code=self.model.trust_remote_code,
            layers=layers,
        )


def _first_rows(hidden: list[Tensor]) -> Tensor:
    """Hidden states of the text that runtimes are asked about: float [RUNTIME_SEQUENCES, RUNTIME_TOKENS, hidden]."""
    return torch.stack([row[:RUNTIME_TOKENS] for row in islice(fidelity.rows(hidden), RUNTIME_SEQUENCES)])


class WithTowers:
    """An artifact (a ``source.TensorSource``) with those towers of its source that its file leaves out."""

    def __init__(self, artifact: TensorSource, source: TensorSource, towers: Iterable[str]) -> None:
        self._artifact, self._source = artifact, source
        self._added = frozenset(towers) - set(artifact.headers)
        self.headers = {**artifact.headers, **{key: source.headers[key] for key in self._added}}

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, contiguous."""
        return self._source.read(name) if name in self._added else self._artifact.read(name)


class _Asking:
    """Runtimes that are asked in a thread, which doesn't keep this process from ending."""

    def __init__(self, ask: Callable[[], tuple[RuntimeAnswer, ...]]) -> None:
        self._ended: SimpleQueue[tuple[RuntimeAnswer, ...] | BaseException] = SimpleQueue()
        Thread(target=self._run, args=(ask,), name="runtime check", daemon=True).start()

    def _run(self, ask: Callable[[], tuple[RuntimeAnswer, ...]]) -> None:
        try:
            self._ended.put(ask())
        except BaseException as error:
            self._ended.put(error)

    def answer(self) -> tuple[RuntimeAnswer, ...]:
        """The runtimes' answers, once there are all.

        Raises:
            OutOfMemory, WorkerDied: as ``ask`` says.
        """
        ended = self._ended.get()
        if isinstance(ended, BaseException):
            raise ended
        return ended


def _pieces(head: LogitsHead, hidden_TH: Tensor) -> Iterator[Tensor]:
    """Logits of a sequence, float32 [R, V] for some rows after the other."""
    for piece_RH in torch.split(hidden_TH, LOGITS_ROWS):
        yield head.logits(piece_RH[None])[0].float()
