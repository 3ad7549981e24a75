"""The format gguf: one file that is read back under the checkpoint's names, and that gguf and llama.cpp read alike."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers as tf
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.planning import sizing, sources
from pipeline.zoo import shipped
from pipeline.zoo.zoo import ModelEntry
from tests.workers import jobs
from workers.checkpoint import gguf_file
from workers.checkpoint.gguf_file import GgufSource, GgufWriter, Piece, Place, Skeleton
from workers.errors import CheckpointError, PreflightError
from workers.formats.decoded import Decoded, open_decoded
from workers.formats.llama_converter import QWEN2, _order, _rearranged, _shift, pre_tokenizer
from workers.machine.environments import interpreter
from workers.machine.ggml_library import ENVIRONMENT
from workers.numerics import ggml
from workers.quantize.one_pass import quantize
from workers.spec.ggml import FILE_TYPES, IMATRIX, TYPES, Mix, ModelFacts, choose
from workers.spec.job import ReasonCode
from workers.spec.layers import LayerKinds
from workers.spec.runtimes import misfit
from workers.verify.stage import verify

RECIPES = [name for name in shipped.recipe_names() if shipped.recipe(name).method == "ggml"]
LLAMA = jobs.ZOO / "models" / "llama-tiny"


def environment() -> Path | None:
    try:
        return interpreter(ENVIRONMENT)
    except PreflightError:
        return None


SHARED = jobs.ZOO.parents[2] / "shared" / "models"
with_llama_cpp = pytest.mark.skipif(environment() is None, reason="`quantmill env create llama-cpp` wasn't run here")


# ------------------------------------------------------------------------------------- without the environment

orders = st.tuples(*[st.integers(1, 4)] * 4)


@given(order=orders)
def test_an_exchange_of_rows_is_found_and_undone(order: tuple[int, int, int, int]) -> None:
    rows = _rearranged(order)
    found = _order(rows, "x")
    count = torch.arange(len(rows))
    assert gguf_file.reordered(count, found).tolist() == rows
    assert torch.equal(gguf_file.restored(gguf_file.reordered(count, order), order), count)


def test_other_orders_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blk\.0\.x: its rows are rearranged"):
        _order([0, 3, 1, 2], "blk.0.x")


@given(st.lists(st.floats(-4, 4, width=16), min_size=2, max_size=40), st.sampled_from([0.0, 1.0]))
def test_norms_that_are_stored_with_one_added_are_read_back(values: list[float], shift: float) -> None:
    norm = torch.tensor(values).bfloat16()
    with tempfile.TemporaryDirectory() as scratch:
        piece = Piece(key="norm.weight", shift=shift)
        written(
            Path(scratch), [Place(name="norm", shape=(len(norm),), kept="F32", pieces=(piece,))], {"norm.weight": norm}
        )
        with GgufSource(Path(scratch)) as source:
            assert torch.equal(source.read("norm.weight"), source.as_stored("norm.weight", norm))
            assert torch.allclose(source.read("norm.weight").float(), norm.float(), atol=2**-23, rtol=2**-8)


def test_what_is_added_to_a_vector_is_told_from_its_places() -> None:
    assert _shift(numpy.arange(5.0)) == 0
    assert _shift(numpy.arange(5.0) + 1) == 1
    assert _shift(numpy.array([0.0, 2.0, 1.0, 3.0])) == 0
    assert _shift(numpy.array([1.0, 3.0, 5.0])) == 0, "not a sum"


def skeleton(*places: Place) -> Skeleton:
    return Skeleton(count=0, metadata="", places=places)


def written(folder: Path, places: list[Place], tensors: dict[str, torch.Tensor], journaled: bool = False) -> None:
    writer = GgufWriter(folder)
    for number, (name, tensor) in enumerate(tensors.items()):
        writer.add(name, tensor)
        if journaled and number == 0:
            journal = writer.journal()
            writer.add("lost", torch.zeros(3))
            writer.release()
            writer = GgufWriter(folder, journal=journal)
    writer.describe(skeleton(*places), "m-Q4_0.gguf", 2)
    writer.close()
    config = {"quantization_config": {"quant_method": "gguf", "file": "m-Q4_0.gguf", "file_type": "q4_0"}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("journaled", [False, True], ids=["at once", "resumed"])
def test_a_file_is_read_back_under_the_checkpoints_names(tmp_path: Path, journaled: bool) -> None:
    torch.manual_seed(0)
    norm, router = torch.randn(64).bfloat16(), torch.randn(4, 64).bfloat16()
    conv = torch.randn(32, 8).bfloat16()  # stored (I, O)
    raw = {f"e.{e}": torch.randint(0, 256, (16, 2 * 18), dtype=torch.uint8) for e in range(2)}
    places = [
        Place(name="norm", shape=(64,), kept="F32", pieces=(Piece(key="norm.weight", order=(2, 2, 16, 1)),)),
        Place(name="router", shape=(4, 64), kept="F32", pieces=(Piece(key="router.weight"),)),
        Place(name="conv", shape=(8, 32), kept="BF16", pieces=(Piece(key="conv.weight", transposed=True),)),
        Place(name="exps", shape=(2, 16, 64), kept="BF16",
              pieces=tuple(Piece(key=f"{name}.weight", order=(2, 2, 4, 1)) for name in raw)),
        Place(name="ropes", shape=(3,), kept="F32", data=base64.b64encode(torch.ones(3).numpy().tobytes()).decode()),
    ]  # fmt: skip
    plain = {"norm.weight": norm, "router.weight": router, "conv.weight": conv}
    blocks = {f"{name}.weight_q4_0": tensor for name, tensor in raw.items()}
    written(tmp_path, places, plain | blocks, journaled)
    assert [path.name for path in tmp_path.iterdir() if path.name != "config.json"] == ["m-Q4_0.gguf"]
    with GgufSource(tmp_path) as source:
        assert {name: source.read(name).dtype for name in plain} == dict.fromkeys(plain, torch.bfloat16)
        for name, tensor in (plain | blocks).items():
            assert torch.equal(source.read(name), tensor), name
            assert source.headers[name].shape == tuple(tensor.shape)
    with open_decoded(tmp_path) as opened:
        assert isinstance(opened, Decoded)
        assert opened.quantized == {"e.0", "e.1"}
        assert torch.equal(opened.read("e.1.weight"), ggml.decode("q4_0", raw["e.1"]))


def test_a_tensor_that_was_not_written_is_named(tmp_path: Path) -> None:
    place = Place(name="a", shape=(4,), kept="F32", pieces=(Piece(key="a.weight"),))
    with pytest.raises(CheckpointError, match=r"1 tensors weren't written, as \['a\.weight'\]"):
        written(tmp_path, [place], {})


@given(cut=st.integers(0, 400), flip=st.integers(0, 255))
@example(cut=229, flip=189)  # a tensor of billions of dimensions
def test_a_damaged_file_is_a_checkpoint_error(tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    place = Place(name="a", shape=(4,), kept="F32", pieces=(Piece(key="a.weight"),))
    written(folder, [place], {"a.weight": torch.ones(4)})
    path = folder / "m-Q4_0.gguf"
    data = bytearray(path.read_bytes())
    at = min(cut, len(data) - 17)
    data[at] ^= flip
    path.write_bytes(data[: len(data) - 17])
    try:
        with GgufSource(folder) as source:
            for name in source.headers:
                source.read(name)
    except CheckpointError as error:
        assert str(path) in str(error) or "gguf" in str(error)  # noqa: PT017
    else:
        pytest.fail("its data ends early")


def test_the_converters_names_are_needed(tmp_path: Path) -> None:
    place = Place(name="a", shape=(4,), kept="F32", pieces=(Piece(key="a.weight"),))
    written(tmp_path, [place], {"a.weight": torch.ones(4)})
    path = tmp_path / "m-Q4_0.gguf"
    path.write_bytes(path.read_bytes().replace(gguf_file.NAMES.encode(), b"somebodys.tensors"))
    with pytest.raises(CheckpointError, match=r"wasn't made by quantmill"):
        GgufSource(tmp_path)


def of_a_llama(layers: int, tied: bool = False) -> dict[str, int]:
    parts = {"attn_q": 4096, "attn_k": 4096, "attn_v": 4096, "attn_output": 4096, "ffn_gate": 4096, "ffn_up": 4096}
    parts |= {"ffn_down": 14336}
    names = {f"blk.{i}.{part}.weight": width for i in range(layers) for part, width in parts.items()}
    return names | {"token_embd.weight": 4096} | ({} if tied else {"output.weight": 4096})


@pytest.mark.parametrize(
    ("mix", "shared", "counts"),
    [
        # As llama.cpp lists the types of the published files of Llama-2-7B (shared 1) and Llama-3-8B (4).
        ("q4_k_m", 4, {"q4_k": 193, "q6_k": 33}),
        ("q5_k_m", 1, {"q5_k": 193, "q6_k": 33}),
        ("q3_k_m", 1, {"q3_k": 129, "q4_k": 92, "q5_k": 4, "q6_k": 1}),
        ("q2_k", 4, {"q2_k": 129, "q3_k": 64, "q4_k": 32, "q6_k": 1}),
        ("q8_0", 1, {"q8_0": 226}),
        # With an importance matrix the first eighth of ffn_down has minima.
        ("q4_0", 1, {"q4_0": 221, "q4_1": 4, "q6_k": 1}),
    ],
)
def test_types_are_those_that_llama_cpp_chooses(mix: Mix, shared: int, counts: dict[str, int]) -> None:
    chosen = choose(mix, of_a_llama(32), ModelFacts(layers=32, heads_per_key=shared))
    assert Counter(choice.kind for choice in chosen.values() if choice) == counts


def test_a_tied_embedding_has_the_type_of_the_head_and_a_narrow_one_falls_back() -> None:
    chosen = choose("q4_k_m", of_a_llama(8, tied=True), ModelFacts(layers=8))
    assert chosen["token_embd.weight"] is not None
    assert chosen["token_embd.weight"].kind == "q6_k"
    narrow = choose("q4_k_m", {"blk.0.ffn_up.weight": 160, "blk.0.ffn_gate.weight": 100}, ModelFacts(layers=1))
    up = narrow["blk.0.ffn_up.weight"]
    assert up is not None
    assert up.kind == "q5_0"
    assert "256 doesn't divide the width 160" in str(up.why)
    assert narrow["blk.0.ffn_gate.weight"] is None, "kept as it is"


@given(mix=st.sampled_from(sorted(FILE_TYPES)), width=st.integers(1, 2048), layers=st.integers(1, 8))
def test_a_chosen_type_always_fits(mix: Mix, width: int, layers: int) -> None:
    for choice in choose(mix, dict.fromkeys(of_a_llama(layers), width), ModelFacts(layers=layers)).values():
        assert choice is None or width % TYPES[choice.kind].block == 0


def test_a_pre_tokenizer_is_told_by_what_it_does() -> None:
    split = {"type": "Split", "pattern": {"Regex": QWEN2}}
    byte_level = {"type": "ByteLevel", "use_regex": False}
    assert pre_tokenizer({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}) == "qwen2"
    assert pre_tokenizer({"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}) == "gpt-2"
    for other in (None, byte_level, {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, byte_level]}):
        with pytest.raises(ValueError, match="none that llama"):
            pre_tokenizer({"pre_tokenizer": other})


# ---------------------------------------------------------------------------------------- with the environment

READ = """
import json, sys, gguf, numpy
reader = gguf.GGUFReader(sys.argv[1])
out = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(numpy.float32) for t in reader.tensors}
numpy.savez(sys.argv[2], **out)
fields = {f.name: f.contents() for f in reader.fields.values() if f.name.startswith(("general.", "imatrix."))}
print(json.dumps({k: v for k, v in fields.items() if isinstance(v, (str, int))}))
"""


def read_by_gguf(file: Path, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """General metadata, and all tensors, as the package gguf reads them."""
    python = environment()
    assert python is not None
    done = subprocess.run(
        [python, "-c", READ, file, folder / "x.npz"], capture_output=True, text=True, check=True, cwd=folder
    )
    loaded = numpy.load(folder / "x.npz")
    return json.loads(done.stdout), {name: torch.from_numpy(loaded[name]) for name in loaded.files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """All recipes of llama-tiny from one pass."""
    job = jobs.job(LLAMA, tmp_path_factory.mktemp("gguf"), *RECIPES)
    artifacts, _ = quantize(job, LLAMA)
    assert [artifact.error for artifact in artifacts] == [None] * len(RECIPES)
    return job, {artifact.recipe: artifact for artifact in artifacts}


@with_llama_cpp
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RECIPES)
def test_gguf_reads_our_weights_bit_for_bit(made: tuple[Any, dict[str, Any]], name: str, tmp_path: Path) -> None:
    folder = Path(made[1][name].path)
    file = weights_of(folder)
    facts, theirs = read_by_gguf(file, tmp_path)
    mix = shipped.recipe(name).scheme
    assert facts["general.file_type"] == FILE_TYPES[mix.mix].number  # type: ignore[union-attr]
    assert facts["general.architecture"] == "llama"
    with open_decoded(folder) as ours:
        checked = 0
        for place in gguf_file._Reader(file).header()[1] or ():
            rows = [gguf_file.reordered(ours.read(piece.key).float(), piece.order) for piece in place.pieces]
            assert torch.equal(torch.cat(rows).view(place.shape), theirs[place.name].view(place.shape)), place.name
            checked += 1
        assert checked == len(theirs)
    source = sources.resolve(ModelEntry(id="llama-tiny"), LLAMA.parent)
    planned = sizing.estimate(source, shipped.recipe(name), made[0].calibration, made[0].verification)
    assert planned.artifact_bytes == pytest.approx(made[1][name].bytes, rel=0.02)


def weights_of(folder: Path) -> Path:
    return folder / json.loads((folder / "config.json").read_text())["quantization_config"]["file"]


@with_llama_cpp
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_importance_matrix_is_one_of_llama_cpp(tmp_path: Path) -> None:
    """As tools/imatrix writes it, of a mixture: a row for each expert; the rules of llama.cpp's loader hold."""
    folder = jobs.ZOO / "models" / "qwen3-moe-tiny"
    job = jobs.job(folder, tmp_path / "runs", "gguf-q8_0")
    (artifact,), _ = quantize(job, folder)
    assert artifact.error is None
    facts, theirs = read_by_gguf(Path(artifact.path) / IMATRIX, tmp_path)
    assert facts["general.type"] == "imatrix"
    assert facts["imatrix.chunk_count"] == 8
    assert facts["imatrix.chunk_size"] == 128
    names = {name.rpartition(".")[0] for name in theirs}
    assert {f"{name}.{part}" for name in names for part in ("in_sum2", "counts")} == set(theirs)
    quantized = {name for name, shape, _ in sizes_of(weights_of(Path(artifact.path))) if len(shape) > 1}
    assert names <= quantized
    assert {name for name in quantized if name.startswith("blk.") and "gate_inp" not in name} <= names
    experts, attention = theirs["blk.0.ffn_up_exps.weight.in_sum2"], theirs["blk.0.attn_q.weight.in_sum2"]
    assert experts.shape == (8, 256)
    assert attention.shape == (1, 256)
    assert theirs["blk.0.attn_q.weight.counts"].flatten().tolist() == [8 * 128]
    assert bool((attention > 0).all())
    assert torch.equal(attention, theirs["blk.0.attn_k.weight.in_sum2"])
    assert verify(job, job.orders[0], folder).verdict.accepted
    assert artifact.bytes == weights_of(Path(artifact.path)).stat().st_size


def sizes_of(file: Path) -> list[tuple[str, tuple[int, ...], int]]:
    return [(name, shape, kind) for name, (shape, kind, _) in gguf_file._Reader(file).header()[0].items()]


@with_llama_cpp
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "model",
    [pytest.param("qwen3-moe-tiny", marks=pytest.mark.slow), pytest.param("gpt2-tiny", marks=pytest.mark.night)],
)
def test_mixtures_and_conv1d_are_checked_in_llama_cpp(model: str, tmp_path: Path) -> None:
    folder = jobs.ZOO / "models" / model
    job = jobs.job(folder, tmp_path / "runs", "gguf-q4_k_m", "gguf-q3_k_s")
    artifacts, _ = quantize(job, folder)
    source = sources.resolve(ModelEntry(id=model), folder.parent)
    for artifact, order in zip(artifacts, job.orders, strict=True):
        assert artifact.error is None
        planned = sizing.estimate(source, order.recipe, job.calibration, job.verification)
        assert planned.artifact_bytes == pytest.approx(artifact.bytes, rel=0.02)
        manifest = verify(job, order, folder)
        assert manifest.verdict.accepted, manifest.verdict.reasons
        assert manifest.verdict.runtime is not None
        assert manifest.verdict.runtime.name == "llama.cpp"
        assert 1 <= len(manifest.verdict.generations) <= 4, "those that name people are left out"
    assert any("256 doesn't divide" in line for line in artifacts[0].fallbacks) == (model == "qwen3-moe-tiny")


@with_llama_cpp
@pytest.mark.parametrize("mix", ["q4_k_m", "q8_0"])
@pytest.mark.parametrize("model", ["qwen3-moe-tiny", "stories260K"])
def test_the_plan_says_what_types_widths_leave(model: str, mix: Mix, tmp_path: Path) -> None:
    """Each fallback that an artifact records is counted in the plan, under its own words."""
    folder = next((at for at in (jobs.ZOO / "models" / model, SHARED / model) if at.is_dir()), SHARED / model)
    if not folder.is_dir():
        pytest.skip(f"{folder} isn't here")
    recipe = jobs.recipe(
        name="r", method="ggml", scheme={"type": "gguf-mix", "mix": mix}, format="gguf", options={"codes": "llama.cpp"}
    )
    source = sources.resolve(ModelEntry(id=str(folder)), Path())
    said = list(sizing.deviations(source, recipe))
    (made,), _ = quantize(jobs.job(folder, tmp_path, recipe, samples=1), folder)
    assert made.error is None, made.error
    counts = Counter(line.rpartition(": ")[0] for line in made.fallbacks if "doesn't divide" in line)
    for why, count in counts.items():
        assert any(f": {count} of " in line and f"matrices: {why} (" in line for line in said), (why, said)
    assert len(said) == len(counts)


@with_llama_cpp
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_planted_faults_are_found(tmp_path: Path) -> None:
    """Rows exchanged in the file are seen by our comparison; rows that only llama.cpp reads wrongly, by its logits."""
    job = jobs.job(LLAMA, tmp_path / "runs", "gguf-q4_0")
    order = job.orders[0]
    (artifact,), _ = quantize(job, LLAMA)
    file = weights_of(Path(artifact.path))
    data = bytearray(file.read_bytes())
    tensors, places = gguf_file._Reader(file).header()
    assert places is not None
    # llama.cpp is told of another base of its rotary embedding, which our reading doesn't look at.
    at = data.index(b"llama.rope.freq_base") + len(b"llama.rope.freq_base") + 4
    data[at : at + 4] = torch.tensor(50.0).numpy().tobytes()
    file.write_bytes(data)
    verdict = verify(job, order, LLAMA).verdict
    assert set(verdict.codes) == {ReasonCode.RUNTIME_LOGITS}
    assert "llama.cpp" in verdict.reasons[0]
    shape, _, start = tensors["blk.1.ffn_up.weight"]
    rows = shape[0] * shape[1] // 32 * 18
    half = rows // 2
    data[start : start + rows] = data[start + half : start + rows] + data[start : start + half]
    file.write_bytes(data)
    verdict = verify(job, order, LLAMA).verdict
    assert set(verdict.codes) == {ReasonCode.INTEGRITY}
    assert "model.layers.1.mlp.up_proj.weight" in verdict.reasons[0]


def test_a_family_without_a_converter_is_refused_by_name() -> None:
    scheme = shipped.recipe("gguf-q4_0").scheme
    for family in ("gptj", "deepseek_v3"):
        why = misfit("gguf", scheme, LayerKinds(model_type=family))
        assert why is not None
        assert f"the family {family}" in why
    assert misfit("gguf", scheme, LayerKinds(model_type="gemma3_text")) is None


@with_llama_cpp
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gemmas_norms_are_right_in_llama_cpp(tmp_path: Path) -> None:
    """The file has them with one added; llama.cpp and our reading agree."""
    folder = tmp_path / "gemma3"
    torch.manual_seed(0)
    config = tf.Gemma3TextConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, sliding_window=64, query_pre_attn_scalar=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LLAMA / name, folder / name)
    job = jobs.job(folder, tmp_path / "runs", "gguf-q8_0")
    (artifact,), _ = quantize(job, folder)
    assert artifact.error is None, artifact.error
    verdict = verify(job, job.orders[0], folder).verdict
    assert verdict.accepted, verdict.reasons
    assert verdict.runtime is not None
    assert verdict.runtime.relative_logit_difference < 0.05
