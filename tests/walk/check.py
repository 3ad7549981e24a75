"""What every family has to do: stream bit by bit, be quantized by GPTQ and AWQ, load in transformers as read here."""

from __future__ import annotations

from collections.abc import Set
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
from workers.spec.families import family_of, forward_of
from workers.spec.formats import COMPRESSED_TENSORS
from workers.spec.job import ArtifactMade, Job, ModelPin
from workers.spec.layers import LayerKinds, Layout, quantizable
from workers.spec.runtimes import misfit
from workers.spec.schemes import Float8Scheme, IntScheme
from workers.spec.workspace import artifact_folder, folds_folder, layout_path
from workers.verify.activations import rounded_inputs

PACKED = {"bits": 4, "group_size": 32, "indivisible": "keep"}
# For the few whose packed weights transformers can't load: eight bits in a plain tensor.
PLAIN = {"bits": 8, "group_size": None, "activations": "int8"}
# How far transformers' logits may be from ours, beside their deviation: both compute in float32 from the same weights.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Outcome:
    """What a family did.

    ``share``: of the numbers in its layers' matrices, how many belong to linear layers that recipes turn into codes, in
    the ``format`` if one is named;
    ``packed``: four bits; ``refused``: why it got no codes of ours; ``folds``: layers that AWQ scaled; ``format``:
    what it was checked in, where compressed-tensors doesn't hold integers of it.
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
    """Take the smallest model of a family all the way; past what the plan refuses, if it isn't ``planned``.

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
    if planned and (others := other_recipes(model_type, multimodal=multimodal)):
        of = job(model, folder / "work", *others.values())
        made, _ = quantize(of, model)
        places = [artifact_folder(of.workspace, order) for order in of.orders]
        for artifact, place in zip(made, places, strict=True):
            check_artifact(artifact, place, auto)
        return Outcome(_share_of(places[0], model), True, format=" and ".join(others))
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
    return Outcome(share, False, refused[0])


def other_recipes(model_type: str, *, multimodal: bool) -> dict[str, Any]:
    """What a family is checked in where the plan refuses integers in compressed-tensors, by name; else nothing."""
    kinds = LayerKinds(conv1d=family_of(model_type).conv1d, model_type=model_type, multimodal=multimodal)
    if misfit(COMPRESSED_TENSORS.name, IntScheme.model_validate(PACKED), kinds) is None:
        return {}
    float8 = Float8Scheme(activations="none")
    if misfit(COMPRESSED_TENSORS.name, float8, kinds):
        return {"bitsandbytes": "bnb-nf4"}
    return {"fp8": recipe(name="walk-fp8", method="rtn", scheme=float8.model_dump()), "bitsandbytes": "bnb-nf4"}


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
        expected = [forward_of(plain)(input_ids=batch, use_cache=False).logits for batch in tokens()]
    assert all(bool(want.isfinite().all()) and want.std() > 1e-3 for want in expected), "the model itself is no good"
    with open_source(model, _pin(model)) as source:
        streamed = StreamedModel(model, source, dtype=torch.float32)
        head = LogitsHead(streamed)
        for hidden, want in zip(stream(streamed, tokens()), expected, strict=True):
            torch.testing.assert_close(head.logits(hidden), want, rtol=0, atol=1e-5 * float(want.std()))
        return _quantizable_share(streamed, {weight.module for weight in streamed.weights})


def _share_of(place: Path, model: Path) -> float:
    """Which share of the layers' matrices has codes in an artifact."""
    with open_source(model, _pin(model)) as source:
        layout = Layout.model_validate_json(layout_path(place).read_text())
        return _quantizable_share(StreamedModel(model, source, dtype=torch.float32), set(layout.modules))


def _quantizable_share(streamed: StreamedModel, modules: Set[str]) -> float:
    parameters = {name for name, _ in streamed.model.named_parameters()}
    sizes = {
        key: prod(streamed.source.headers[key].shape)
        for index in range(len(streamed.layers))
        for key in streamed.keys_of_layer(index)
        if len(streamed.source.headers[key].shape) > 1 and streamed.owners[key] in parameters
    }
    coded = (weight.key for weight in streamed.weights if weight.module in modules)
    return sum(sizes[key] for key in coded) / sum(sizes.values())


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
            got = forward_of(theirs.eval())(input_ids=batch, use_cache=False).logits
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
