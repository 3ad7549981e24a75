"""The source as transformers loads it, against the streamed reference: what is misread fails before it is sealed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from tests.workers.families import save_random
from tests.workers.jobs import ZOO, job
from workers.checkpoint.source import Source
from workers.errors import CheckpointError, OutOfMemory, UnsupportedModel
from workers.machine import child
from workers.model import reference
from workers.model.cut import first_layers
from workers.model.forward import stream
from workers.model.loading import StreamedModel
from workers.run import StageRequest, run_stage
from workers.spec.job import Job, ModelPin, SourceCheck, Stage, StageResult
from workers.spec.workspace import MANIFEST, artifact_folder
from workers.verify import source_check
from workers.verify.runtimes import source as runtime
from workers.verify.source_check import Checked

LLAMA = ZOO / "models" / "llama-tiny"
TOKENS = torch.randint(3, 96, (4, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is asked in this process: many checks in a second."""

    def answer(entry: str, request: runtime.SourceRequest, *_: object) -> dict[str, Any]:
        assert entry == source_check.ENTRY
        found: dict[str, Any] = json.loads(runtime.answer(request.model_dump_json()))
        return found

    monkeypatch.setattr(source_check, "in_a_process", answer)
    monkeypatch.setattr(runtime, "be_quiet", lambda: None)  # it's for the rest of a process, which is this one


class Changed:
    """A source with one tensor read wrongly."""

    def __init__(self, source: Source, key: str, change: Callable[[Tensor], Tensor]) -> None:
        self.headers = source.headers
        self._source, self._key, self._change = source, key, change

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        return self._change(tensor) if name == self._key else tensor


def check(folder: Path, source: Any, workspace: Path) -> SourceCheck:
    def opened(layers: int | None = None) -> StreamedModel:
        return StreamedModel(folder, source, dtype=torch.float32, layers=layers)

    model, streamed = ModelPin(id=folder.name, revision="1", folder=str(folder)), opened()
    file = reference.reference_file(model, workspace, TOKENS, torch.float32)
    (workspace / "references").mkdir(parents=True, exist_ok=True)
    of = Checked(model, folder, streamed, opened, file, workspace)
    return source_check.check(of, TOKENS, lambda: stream(streamed, reference.micro_batches(TOKENS)))


def disturbed(tensor: Tensor) -> Tensor:
    """A tenth of noise is added: a mere factor may vanish in the next norm."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7))
    return tensor + 0.1 * noise * max(float(tensor.std()) if tensor.numel() > 1 else 0.0, 0.1)


def keys_of(family: str, folder: Path) -> list[str]:
    save_random(family, folder)
    return sorted(load_file(folder / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "mamba"])
def test_any_tensor_that_is_read_wrongly_is_caught(family: str, tmp_path: Path) -> None:
    keys, folder = keys_of(family, tmp_path / "model"), tmp_path / "model"

    with Source(folder) as source:
        right = check(folder, source, tmp_path / "right")
        assert right.relative_logit_difference < 1e-5
        assert (right.layers, right.all_layers, right.tokens, right.unchecked) == (3, 3, 80, "")
        for number, key in enumerate(keys):
            with pytest.raises(UnsupportedModel, match="quantmill reads the source otherwise than transformers"):
                check(folder, Changed(source, key, disturbed), tmp_path / str(number))


@pytest.mark.usefixtures("here")
def test_a_tie_that_transformers_does_not_make_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the ties as they were made before: embeddings and head by config.json alone."""
    keys_of("llama", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    with Source(tmp_path / "model") as source:
        assert check(tmp_path / "model", source, tmp_path).relative_logit_difference < 1e-5
        tie = tf.LlamaForCausalLM.tie_weights

        def by_config(model: Any, missing_keys: object = None, recompute_mapping: bool = True) -> None:
            ours = all(parameter.is_meta for parameter in model.model.layers.parameters())
            tie(model, None if ours else missing_keys, recompute_mapping)

        monkeypatch.setattr(tf.LlamaForCausalLM, "tie_weights", by_config)
        with pytest.raises(UnsupportedModel, match=r"logits differ by"):
            check(tmp_path / "model", source, tmp_path / "b")


@pytest.mark.usefixtures("here")
def test_an_agreement_is_kept_and_a_disagreement_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys_of("llama", tmp_path / "model")
    with Source(tmp_path / "model") as source:
        wrong = Changed(source, "model.norm.weight", lambda tensor: 1.1 * tensor)
        with pytest.raises(UnsupportedModel):
            check(tmp_path / "model", wrong, tmp_path)
        assert list((tmp_path / "references").iterdir()) == []
        first = check(tmp_path / "model", source, tmp_path)
        monkeypatch.setattr(source_check, "in_a_process", None)  # asked again, it would fail
        assert first.host_bytes > 0
        assert check(tmp_path / "model", source, tmp_path) == first.model_copy(update={"host_bytes": 0})
        (kept,) = (tmp_path / "references").glob("*.source.json")
        kept.write_text("{")
        with pytest.raises(TypeError):
            check(tmp_path / "model", source, tmp_path)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_what_does_not_fit_is_compared_by_its_first_layers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, folder = keys_of(family, tmp_path / "model"), tmp_path / "model"
    monkeypatch.setattr(source_check, "FIRST_LAYERS", 2)
    monkeypatch.setattr(source_check, "available_host_bytes", lambda: 0)
    with Source(folder) as source:
        found = check(folder, source, tmp_path)
        assert (found.layers, found.all_layers, found.unchecked) == (2, 3, "")
        assert found.relative_logit_difference < 1e-5
        layer = next(key for key in keys if ".1." in key and "experts.3" not in key and ".norm" not in key)
        with pytest.raises(UnsupportedModel, match="otherwise than transformers"):
            check(folder, Changed(source, layer, disturbed), tmp_path / "b")


@pytest.mark.usefixtures("here")
def test_memory_that_runs_out_nonetheless_cuts_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys_of("llama", tmp_path / "model")
    asked: list[int | None] = []
    answer = source_check.in_a_process

    def small(entry: str, request: runtime.SourceRequest, *rest: Any) -> dict[str, Any]:
        asked.append(request.layers)
        if request.layers is None:
            raise OutOfMemory("source check: out of memory")
        return answer(entry, request, *rest)

    monkeypatch.setattr(source_check, "in_a_process", small)
    monkeypatch.setattr(source_check, "FIRST_LAYERS", 1)
    with Source(tmp_path / "model") as source:
        assert check(tmp_path / "model", source, tmp_path).layers == 1
    assert asked == [None, 1]


@pytest.mark.usefixtures("here")
def test_what_cannot_be_cut_is_said_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys_of("llama", tmp_path / "model")

    def uncut(config: Any, count: int) -> Any:
        raise ZeroDivisionError("num_hidden_layers - 1")

    monkeypatch.setattr("workers.model.loading.first_layers", uncut)
    monkeypatch.setattr(source_check, "available_host_bytes", lambda: 0)
    with Source(tmp_path / "model") as source:
        found = check(tmp_path / "model", source, tmp_path)
    assert (found.tokens, found.layers) == (0, 0)
    assert "doesn't fit in memory" in found.unchecked
    assert "num_hidden_layers - 1" in found.unchecked
    assert list((tmp_path / "references").iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"missing": ["a.bias", "b.bias"], "mismatched": []}, "lacks a.bias, b.bias, which transformers then draws"),
        ({"missing": [], "mismatched": ["a.bias"]}, "has other shapes of a.bias"),
        ({"error": "ImportError: needs a kernel", "not_here": True}, r"can't run its source \(ImportError: needs"),
    ],
)
def test_what_transformers_does_not_load_is_named(
    answer: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys_of("llama", tmp_path / "model")
    monkeypatch.setattr(source_check, "in_a_process", lambda *_: {"version": "5", **answer})
    with Source(tmp_path / "model") as source, pytest.raises(CheckpointError, match=said):
        check(tmp_path / "model", source, tmp_path)


def test_a_cut_config_is_of_the_first_layers_alone() -> None:
    layers = {"num_hidden_layers": 12, "layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 7}
    text = tf.Gemma3TextConfig(**layers)
    for config in (text, tf.Gemma3Config(text_config=text.to_dict())):
        before = config.to_dict()
        cut = first_layers(config, 7).get_text_config()
        assert cut.num_hidden_layers == 7
        assert cut.layer_types == [*layers["layer_types"][:5], "full_attention", "full_attention"]
        assert config.to_dict() == before
        assert first_layers(config, 12).to_dict() == first_layers(config, 99).to_dict() == before
    assert first_layers(tf.GPT2Config(n_layer=5), 2).n_layer == 2
    with pytest.raises(UnsupportedModel, match="no num_hidden_layers"):
        first_layers(tf.BltConfig(), 2)


# ------------------------------------------------------------------------------------------ in a stage


def verified(of: Job, name: str) -> StageResult:
    assert run_stage(of, Stage.QUANTIZE).failure is None
    return run_stage(of, Stage.VERIFY, name)


@pytest.mark.usefixtures("forked")
def test_a_misread_source_fails_every_artifact_by_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Source.read

    def misread(source: Source, name: str) -> Tensor:
        tensor = read(source, name)
        return 1.05 * tensor if source.folder == LLAMA and name.endswith("1.mlp.down_proj.weight") else tensor

    monkeypatch.setattr(Source, "read", misread)
    of = job(LLAMA, tmp_path, "rtn-w4-g128", "bnb-nf4")
    for order in of.orders:
        result = verified(of, order.recipe.name)
        assert result.failure is not None
        assert result.failure.kind == "UnsupportedModel"
        assert result.failure.message.startswith("model 'llama-tiny': quantmill reads the source otherwise")
        assert not (artifact_folder(tmp_path, order) / MANIFEST).exists()
    monkeypatch.setattr(Source, "read", read)
    again = run_stage(of, Stage.VERIFY, "bnb-nf4")
    assert again.manifest is not None
    assert again.manifest.source_check is not None, "the wrong reference isn't taken again"


@pytest.mark.usefixtures("forked")
def test_two_at_once_both_end_well_and_say_so(tmp_path: Path) -> None:
    of = job(LLAMA, tmp_path, "rtn-w4-g128", "bnb-nf4")
    assert run_stage(of, Stage.QUANTIZE).failure is None

    def one(recipe: str) -> StageResult:
        request = StageRequest(job=of, stage=Stage.VERIFY, recipe=recipe, seconds=600)
        done = child.run("workers.run:answer", request.model_dump_json())
        assert done.answer is not None, done.said
        return StageResult.model_validate_json(done.answer)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(one, ["rtn-w4-g128", "bnb-nf4"]))
    for result in results:
        assert result.manifest is not None, result.failure
        assert result.manifest.verdict.accepted, result.manifest.verdict.reasons
        found = result.manifest.source_check
        assert found is not None
        assert (found.tokens, found.layers, found.all_layers, found.unchecked) == (256, 4, 4, "")
        folder = artifact_folder(tmp_path, of.order(result.recipe or ""))
        assert (
            f"checked against transformers {tf.__version__}: logits of 256 tokens" in (folder / "README.md").read_text()
        )


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("kind", ["pickles", "code of its own"])
def test_sources_of_every_kind_are_checked(kind: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    if kind == "pickles":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    else:
        code = "from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    pass\n"
        (folder / "modeling_own.py").write_text(code)
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
        (folder / "config.json").write_text(json.dumps(config))
    of = job(folder, tmp_path, "rtn-w4-g128", allow_pickle=kind == "pickles")
    of = of.model_copy(update={"model": of.model.model_copy(update={"trust_remote_code": kind != "pickles"})})
    result = verified(of, "rtn-w4-g128")
    assert result.manifest is not None, result.failure
    assert result.manifest.verdict.accepted, result.manifest.verdict.reasons
    assert result.manifest.source_check is not None
    assert result.manifest.source_check.layers == 4


@pytest.mark.usefixtures("forked")
def test_tensors_that_nobody_uses_are_left_out_and_no_fault(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    unused = {f"v_head.{name}.weight": torch.zeros(1, 256) for name in "abcd"}
    declared = {"model.rotary_emb.inv_freq": torch.zeros(32)}
    save_file({**tensors, **unused, **declared}, folder / "model.safetensors", metadata={"format": "pt"})
    of = job(folder, tmp_path, "rtn-w4-g128", "bnb-nf4")
    for order in of.orders:
        result = verified(of, order.recipe.name)
        assert result.manifest is not None, result.failure
        assert result.manifest.verdict.accepted, result.manifest.verdict.reasons
        (note,) = [note for note in result.manifest.fallbacks if note.startswith("left out")]
        assert "LlamaForCausalLM has no place for them: 4 of the source's tensors (v_head.a.weight, " in note
        assert "and 1 more" in note
        with Source(artifact_folder(tmp_path, order)) as artifact:
            assert not set(unused) & set(artifact.headers)
            assert set(declared) <= set(artifact.headers), "what the class declares to ignore stays"
