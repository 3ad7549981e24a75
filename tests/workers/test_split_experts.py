"""Llama 4: experts that its checkpoints hold in one tensor are read, quantized and loaded as linear layers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.planning.sources import resolve
from pipeline.zoo.zoo import ModelEntry
from tests.walk.smallest import VOCABULARY, save_smallest
from tests.workers.families import save_tokenizer
from tests.workers.jobs import job, recipe
from tests.workers.test_low_bit import decoded_job
from workers.checkpoint.source import Source, SplitSource
from workers.formats.kept import open_source
from workers.run import run_stage
from workers.spec.job import Stage
from workers.spec.layers import LayerKinds
from workers.spec.runtimes import misfit
from workers.spec.schemes import IntScheme
from workers.spec.workspace import artifact_folder

SCHEMES = {
    "w4": {"bits": 4, "group_size": 32},
    "fp8": {"type": "fp8", "scales": "channel", "activations": "dynamic"},
}


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama4")
    save_smallest("llama4_text", folder)
    save_tokenizer(folder, VOCABULARY)
    return folder


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_parts_of_a_stack_are_its_experts(experts: int, columns: int, rows: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        stack, down = torch.randn(experts, columns, 2 * rows), torch.randn(experts, rows, columns)
        other = torch.randn(2, 3, 4)
        tensors = {"a.experts.gate_up_proj": stack, "a.experts.down_proj": down, "conv.gate_up_proj": other}
        save_file(tensors, f"{place}/model.safetensors")
        with SplitSource(Path(place)) as source:
            assert len(source.headers) == 3 * experts + 1
            assert torch.equal(source.read("conv.gate_up_proj"), other)
            for key, header in source.headers.items():
                assert tuple(source.read(key).shape) == header.shape
            for expert in range(experts):
                gate, up, out = (
                    source.read(f"a.experts.{expert}.{name}_proj.weight") for name in ("gate", "up", "down")
                )
                x = torch.randn(3, columns)
                torch.testing.assert_close(torch.cat([x @ gate.T, x @ up.T], -1), x @ stack[expert])
                assert torch.equal(out, down[expert].T)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCHEMES)
def test_it_is_quantized_loaded_and_quantized_again_from_that(kind: str, llama4: Path, tmp_path: Path) -> None:
    made_by = recipe(name=kind, method="rtn" if kind == "fp8" else "gptq", scheme=SCHEMES[kind])
    of = job(llama4, tmp_path / "1", made_by)
    made = run_stage(of, Stage.QUANTIZE).artifacts[0]
    assert made.error is None, made.error
    result = run_stage(of, Stage.VERIFY, kind)
    assert result.manifest is not None, result.failure
    assert result.manifest.verdict.accepted, result.manifest.verdict.reasons
    folder = artifact_folder(of.workspace, of.orders[0])
    with Source(folder) as stored, open_source(llama4, of.model) as source:
        experts = [key for key in source.headers if ".experts." in key]
        assert len(experts) == 24
        assert not [key for key in experts if key in stored.headers and stored.headers[key].dtype == torch.float32]
    # As others publish it: linear layers in compressed-tensors.
    again = decoded_job(folder, tmp_path / "2", made_by)
    twice = run_stage(again, Stage.QUANTIZE).artifacts[0]
    assert twice.error is None, twice.error
    assert any("bit for bit, for it has" in line for line in twice.fallbacks)


def test_the_plan_counts_its_linear_layers_and_refuses_other_formats(llama4: Path) -> None:
    planned = {tensor.name: tensor.shape for tensor in resolve(ModelEntry(id=str(llama4)), llama4.parent).tensors}
    with open_source(llama4, job(llama4, llama4).model) as source:
        assert planned == {key: header.shape for key, header in source.headers.items()}
    kinds = LayerKinds(experts=True, mixture=True, model_type="llama4_text")
    scheme = IntScheme(bits=4, group_size=128)
    assert misfit("compressed-tensors", scheme, kinds) is None
    for fmt in ("gptq", "bitsandbytes", "gguf", "mlx"):
        assert "take as linear layers in compressed-tensors alone" in (misfit(fmt, scheme, kinds) or "")
