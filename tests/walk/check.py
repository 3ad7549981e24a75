"""What every family has to do: stream bit by bit, be quantized by GPTQ and AWQ, load in transformers as read here."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from pipeline.planning.fitting import model_problem
from pipeline.planning.sources import resolve
from pipeline.zoo.zoo import ModelEntry
from tests.walk.smallest import VOCABULARY, load_plain, loader, save_smallest
from tests.workers.families import save_tokenizer
from tests.workers.jobs import job, recipe
from workers.formats.decoded import Decoded, open_decoded
from workers.formats.kept import open_source
from workers.model.forward import LogitsHead, stream
from workers.model.loading import StreamedModel, find_layers
from workers.quantize.one_pass import quantize
from workers.spec.families import family_of
from workers.spec.job import ArtifactMade, Job, ModelPin
from workers.spec.layers import quantizable
from workers.spec.workspace import artifact_folder, folds_folder
from workers.verify.activations import rounded_inputs

PACKED = {"bits": 4, "group_size": 32, "indivisible": "keep"}
# For the few whose packed weights transformers can't load: eight bits in a plain tensor.
PLAIN = {"bits": 8, "group_size": None, "activations": "int8"}
# How far transformers' logits may be from ours, beside their deviation: both compute in float32 from the same weights.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Outcome:
    """What a family did.

    ``share``: of the numbers in its layers' matrices, how many belong to linear layers that recipes turn into codes;
    ``packed``: four bits; ``refused``: why it got no codes of ours; ``folds``: layers that AWQ scaled; ``format``: the
    one that it was checked in, where compressed-tensors doesn't hold its layers.
    """

    share: float
    packed: bool
    refused: str = ""
    folds: int = 0
    format: str = ""


def tokens() -> list[Tensor]:
    """Two batches, int64 [2, 24]."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, VOCABULARY // 4, (2, 24), generator=generator) for _ in range(2)]


def check(model_type: str, folder: Path, *, multimodal: bool = False, planned: bool = True) -> Outcome:
    """Take the smallest model of a family all the way; past the plan's refusal, if it isn't ``planned``.

    Raises:
        AssertionError, QuantmillError, or whatever the library raises: where it doesn't get there.
    """
    model = folder / "model"
    auto = loader(model_type, multimodal=multimodal)
    save_smallest(model_type, model, multimodal=multimodal)
    save_tokenizer(model, VOCABULARY)
    if planned:
        check_plan(model)
    share = check_stream(model, auto)
    for scheme in (PACKED, PLAIN):
        of = job(
            model,
            folder / "work",
            recipe(name="walk-gptq", method="gptq", scheme=scheme),
            recipe(name="walk-awq", method="awq", scheme=scheme),
        )
        made, _ = quantize(of, model)
        refused = [a.error.message for a in made if a.error and a.error.kind == "UnsupportedRecipe"]
        if not refused:
            for artifact, order in zip(made, of.orders, strict=True):
                check_artifact(artifact, artifact_folder(of.workspace, order), auto)
            return Outcome(share, scheme is PACKED, folds=_folded_layers(of))
        assert len(refused) == len(made), refused
    if family_of(model_type).conv1d:
        of = job(model, folder / "work", "bnb-nf4")
        (artifact,), _ = quantize(of, model)
        check_artifact(artifact, artifact_folder(of.workspace, of.orders[0]), auto)
        return Outcome(share, True, format="bitsandbytes")
    return Outcome(share, False, refused[0])


def _folded_layers(of: Job) -> int:
    return len(list(folds_folder(artifact_folder(of.workspace, of.orders[1])).glob("*.safetensors")))


def check_plan(model: Path) -> None:
    """The plan takes it, and counts those tensors as layers' that the worker quantizes."""
    source = resolve(ModelEntry(id=str(model)), model.parent)
    assert model_problem(source) is None, model_problem(source)
    plain = recipe(name="walk-plain", method="rtn", scheme=PACKED, ignore=[])
    planned = {tensor.name for tensor in source.tensors if quantizable(tensor, plain)}
    with open_source(model, _pin(model)) as opened:
        streamed = StreamedModel(model, opened, dtype=torch.float32)
        missed = {weight.key for weight in streamed.weights} - planned
        beside = planned & set(streamed.outside_keys)
    assert not missed, f"the plan doesn't count {sorted(missed)[:3]}"
    assert not beside, f"the plan counts {sorted(beside)[:3]}, which belong to no layer"


def _pin(model: Path) -> ModelPin:
    return ModelPin(id=model.name, revision="0" * 40, folder=str(model))


def check_stream(model: Path, auto: Any = tf.AutoModelForCausalLM) -> float:
    """Streamed logits are the plain ones; which share of the layers' matrices can be quantized."""
    plain = load_plain(model, auto)
    with torch.inference_mode():
        expected = [plain(input_ids=batch, use_cache=False).logits for batch in tokens()]
    assert all(bool(want.isfinite().all()) and want.std() > 1e-3 for want in expected), "the model itself is no good"
    with open_source(model, _pin(model)) as source:
        streamed = StreamedModel(model, source, dtype=torch.float32)
        head = LogitsHead(streamed)
        for hidden, want in zip(stream(streamed, tokens()), expected, strict=True):
            torch.testing.assert_close(head.logits(hidden), want, rtol=0, atol=1e-5 * float(want.std()))
        return _quantizable_share(streamed)


def _quantizable_share(streamed: StreamedModel) -> float:
    parameters = {name for name, _ in streamed.model.named_parameters()}
    sizes = {
        key: prod(streamed.source.headers[key].shape)
        for index in range(len(streamed.layers))
        for key in streamed.keys_of_layer(index)
        if len(streamed.source.headers[key].shape) > 1 and streamed.owners[key] in parameters
    }
    return sum(sizes[weight.key] for weight in streamed.weights) / sum(sizes.values())


def check_artifact(made: ArtifactMade, place: Path, auto: Any = tf.AutoModelForCausalLM) -> None:
    """transformers loads what was made, with nothing missing or left over, and computes what we decode."""
    assert made.error is None, made.error
    with open_decoded(place) as decoded:
        assert isinstance(decoded, Decoded)
        streamed = StreamedModel(place, decoded, dtype=torch.float32)
        head = LogitsHead(streamed)
        with rounded_inputs(streamed, decoded):
            hidden = stream(streamed, tokens())
        ours = [head.logits(states) for states in hidden]
    theirs, info = auto.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    found = {kind: keys for kind, keys in info.items() if keys}
    assert found == {}, str(found)[:300]
    if hasattr(theirs, "set_experts_implementation"):
        theirs.set_experts_implementation("eager")
    with torch.inference_mode():
        for batch, want in zip(tokens(), ours, strict=True):
            got = theirs.eval()(input_ids=batch, use_cache=False).logits
            difference = float((got - want).square().mean().sqrt() / want.std())
            assert difference < TOLERANCE, f"{made.recipe}: logits differ by {difference:.2g} of their deviation"


def layer_kinds(config: tf.PretrainedConfig) -> set[frozenset[str]]:
    """What a model's layers are made of, each kind once: the names of their modules, with the classes."""
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    return {
        frozenset(
            f"{name}: {type(module).__name__}"
            for name, module in layer.named_modules()
            if not any(part.isdigit() for part in name.split("."))
        )
        for layer in find_layers(model)[1]
    }
