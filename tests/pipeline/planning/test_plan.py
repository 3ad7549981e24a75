"""Planning: pin, expand, fingerprint, skip, estimate; and what a plan is refused for."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from pipeline.loopback import LoopbackHub
from pipeline.planning import plan, sizing, sources
from pipeline.zoo import shipped, zoo
from tests.pipeline.fleet import test_decisions as decisions
from workers.errors import HubRefused, HubUnavailable, UserError
from workers.spec.data import Dataset, Verification
from workers.spec.job import ModelPin
from workers.spec.runtimes import RUNTIMES
from workers.spec.tensors import TensorHeader
from workers.spec.workspace import MANIFEST, artifact_folder
from workers.transfer import destinations
from workers.transfer.patience import Silence
from workers.transfer.storage import Storage

ROOT = Path(__file__).parents[3]
LLAMA = ROOT / "tests/zoo/models/llama-tiny"
TEXT = ROOT / "tests/zoo/text"


def write(
    tmp_path: Path, recipes: str = "gptq-w4-g128, bnb-nf4", model: str = f"id: {LLAMA}", extra: str = ""
) -> zoo.Zoo:
    path = tmp_path / "zoo.yaml"
    path.write_text(
        f"""
name: small
models: [{{{model}}}]
recipes: [{recipes}]
calibration: {{dataset: {{path: text, data_files: [{TEXT}/calibration.txt]}}}}
verify: {{dataset: {{path: text, data_files: [{TEXT}/heldout.txt]}}}}
{extra}"""
    )
    return zoo.load(path)


def make(tmp_path: Path, made: zoo.Zoo, endpoint: str | None = None) -> plan.Plan:
    return plan.make_plan(made, tmp_path, tmp_path / "runs", endpoint, strict=True)


def copy_llama(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LLAMA, tmp_path / "model"))


def test_the_zoo_names_the_runtimes_and_the_plan_says_who_checks_what(tmp_path: Path) -> None:
    chosen = "gptq-w4-g128, bnb-nf4"
    plain = make(tmp_path, write(tmp_path, chosen))
    assert all(order.runtimes == () for job in plain.jobs for order in job.orders)
    named = zoo.load(_naming(tmp_path, chosen, "[vllm, Transformers]"))
    made = make(tmp_path, named)
    assert {order.runtimes for job in made.jobs for order in job.orders} == {("vLLM", "transformers")}
    prints = [[artifact.order.fingerprint for artifact in planned.artifacts] for planned in (plain, made)]
    assert prints[0] == prints[1], "who checks an artifact is no part of its identity"

    made = make(tmp_path, zoo.load(_naming(tmp_path, "gptq-w4-g128, gguf-q8_0", "[vllm]")))
    assert [order.runtimes for order in made.jobs[0].orders] == [("vLLM",), ("llama.cpp",)]
    (note,) = (note for note in made.notes if "verify.runtimes" in note)
    assert note == (
        "recipe 'gguf-q8_0': none of verify.runtimes (vLLM) reads the format gguf; it is checked in llama.cpp"
    )


def _naming(tmp_path: Path, recipes: str, runtimes: str) -> Path:
    write(tmp_path, recipes)
    path = tmp_path / "zoo.yaml"
    path.write_text(path.read_text().replace("heldout.txt]}}", f"heldout.txt]}}, runtimes: {runtimes}}}"))
    return path


def test_what_a_named_runtime_refuses_is_refused_for_the_pair(tmp_path: Path) -> None:
    own = "{name: mine, method: gptq, format: compressed-tensors, scheme: {bits: 4, group_size: 128}, overrides: "
    own += '[{modules: ["*.v_proj"], scheme: {bits: 8, group_size: 128}}]}'
    chosen = f"gptq-w3-g128, gptq-w4-g128, {own}"
    assert not plan.make_plan(write(tmp_path, chosen), tmp_path, tmp_path / "runs", None).refused
    made = plan.make_plan(zoo.load(_naming(tmp_path, chosen, "[transformers, vllm]")), tmp_path, tmp_path / "r", None)
    why = {cell.recipe: cell.failure.message for cell in made.refused}
    assert set(why) == {"gptq-w3-g128", "mine"}
    assert "have 3 bits, and vLLM has kernels of its own for 4 and 8" in why["gptq-w3-g128"]
    assert "have several schemes within what vLLM fuses into one layer" in why["mine"]
    assert all("take vLLM out of verify.runtimes" in message for message in why.values())
    assert [order.recipe.name for order in made.jobs[0].orders] == ["gptq-w4-g128"]


@pytest.mark.parametrize("recipe", ["fp8-static", "w8a8-int8", "nvfp4"])
def test_what_only_vllm_loads_is_made_where_it_alone_checks(tmp_path: Path, recipe: str) -> None:
    write(tmp_path, recipe)
    path = tmp_path / "zoo.yaml"
    path.write_text(path.read_text().replace("llama-tiny", "qwen3-moe-tiny"))
    plain = path.read_text()
    for runtimes, made in (("null", 0), ("[transformers, vllm]", 0), ("[vllm]", 1)):
        path.write_text(plain.replace("heldout.txt]}}", f"heldout.txt]}}, runtimes: {runtimes}}}"))
        planned = plan.make_plan(zoo.load(path), tmp_path, tmp_path / "runs", None)
        assert (len(planned.jobs), len(planned.refused)) == (made, 1 - made), runtimes


@pytest.mark.parametrize(
    ("runtimes", "said"),
    [
        ("[vlm]", "verify.runtimes: unknown runtime, got 'vlm'; did you mean 'vLLM'?"),
        ("[]", "verify.runtimes: expected at least 1"),
    ],
)
def test_runtimes_of_a_zoo_are_known(tmp_path: Path, runtimes: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        _ = zoo.load(_naming(tmp_path, "bnb-nf4", "null")), zoo.load(_naming(tmp_path, "bnb-nf4", runtimes))
    assert said in str(error.value)


def test_one_job_for_a_model_with_all_of_its_recipes(tmp_path: Path) -> None:
    made = make(tmp_path, write(tmp_path))
    assert [order.recipe.name for order in made.jobs[0].orders] == ["gptq-w4-g128", "bnb-nf4"]
    assert len(made.jobs) == 1
    assert made.jobs[0].destination is None
    assert made.artifacts[0].source.pin.revision == sources.folder_sha256(LLAMA)


def test_identity_is_content(tmp_path: Path) -> None:
    folder = copy_llama(tmp_path)
    first = make(tmp_path, write(tmp_path, model="id: model")).artifacts
    renamed = write(tmp_path, "gptq-w4-g128, {name: mine, method: bitsandbytes, scheme: {type: nf4}}", "id: model")
    assert make(tmp_path, renamed).artifacts[1].order.fingerprint == first[1].order.fingerprint
    other_seed = write(tmp_path, model="id: model")
    assert other_seed.calibration is not None
    calibration = other_seed.calibration.model_copy(update={"seed": 1})
    second = make(tmp_path, other_seed.model_copy(update={"calibration": calibration})).artifacts
    assert second[0].order.fingerprint != first[0].order.fingerprint
    assert second[1].order.fingerprint == first[1].order.fingerprint, "a data-free recipe doesn't depend on the text"
    (folder / "tokenizer_config.json").write_text("{}")
    third = make(tmp_path, write(tmp_path, model="id: model")).artifacts
    assert third[1].order.fingerprint != first[1].order.fingerprint


def test_a_gpu_holds_the_whole_source_in_its_own_dtype() -> None:
    """On a CPU all is float32, whatever it is stored in."""

    def verifying(dtype: str) -> sizing.Need:
        tensors = (TensorHeader("model.layers.0.mlp.up_proj.weight", (512, 256), dtype),)
        pinned = sources.PinnedModel(ModelPin(id="m", revision="1"), {"hidden_size": 256}, tensors, "m")
        verification = Verification(dataset=Dataset(path="text"))
        return sizing.estimate(pinned, shipped.recipe("bnb-nf4"), None, verification).verify

    assert verifying("F32").host == verifying("BF16").host
    assert verifying("F32").device - verifying("BF16").device == 2 * 512 * 256


def test_estimates_are_near_what_is_written(tmp_path: Path) -> None:
    recipes = "bnb-nf4, bnb-fp4, bnb-int8, gptq-w4-g128, gptq-w8-g128"
    cells = make(tmp_path, write(tmp_path, recipes)).artifacts
    sizes = {cell.order.recipe.name: cell.estimate.artifact_bytes for cell in cells}
    assert cells[0].estimate.source_bytes == pytest.approx((LLAMA / "model.safetensors").stat().st_size, rel=0.01)
    # The measured sizes stand in tests/bench/RESULTS.md; the end-to-end test compares them for one run.
    assert (
        sizes["bnb-nf4"] < sizes["bnb-fp4"] < sizes["bnb-int8"] < sizes["gptq-w8-g128"] < cells[0].estimate.source_bytes
    )
    assert all(cell.estimate.host_bytes > sizing.PROCESS_BYTES for cell in cells)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("id: ./nowhere", ["no such folder, got './nowhere'", "org/name"]),
        ("id: empty", ["'empty' has no config.json"]),
        ("id: pickled", ["pickle weights only", "pytorch_model.bin", "allow_pickle: true"]),
        ("id: encoder", ["no causal LM head", "BertForMaskedLM"]),
        ("id: coded", ["code of its own", "trust_remote_code: true"]),
        ("id: quantized", ["quantized already", "'awq'"]),
        ("id: truncated", ["truncated"]),
    ],
)
def test_models_that_are_refused(tmp_path: Path, model: str, said: list[str]) -> None:
    name = model.removeprefix("id: ")
    folder = tmp_path / name
    if name != "./nowhere":
        folder.mkdir()
    config = json.loads((LLAMA / "config.json").read_text())
    changes: dict[str, dict[str, object]] = {
        "pickled": {},
        "encoder": {"architectures": ["BertForMaskedLM"]},
        "coded": {"auto_map": {"AutoModelForCausalLM": "x.Y"}},
        "quantized": {"quantization_config": {"quant_method": "awq"}},
        "truncated": {},
    }
    if name in changes:
        (folder / "config.json").write_text(json.dumps({**config, **changes[name]}))
        weights = (LLAMA / "model.safetensors").read_bytes()
        (folder / ("pytorch_model.bin" if name == "pickled" else "model.safetensors")).write_bytes(
            weights[:-100] if name == "truncated" else weights
        )
    with pytest.raises(UserError) as caught:
        make(tmp_path, write(tmp_path, model=model))
    for words in said:
        assert words in str(caught.value)


def test_text_that_is_not_there_and_all_other_findings_come_at_once(tmp_path: Path) -> None:
    made = write(tmp_path, "{name: odd, method: rtn, scheme: {bits: 4, group_size: 96}, format: compressed-tensors}")
    verify = made.verify.model_copy(
        update={"dataset": made.verify.dataset.model_copy(update={"data_files": ("gone.txt",)})}
    )
    with pytest.raises(UserError) as caught:
        make(tmp_path, made.model_copy(update={"verify": verify}))
    assert "verify.dataset: no such file, got 'gone.txt'" in str(caught.value)
    assert "group size 96 doesn't divide the layer widths" in str(caught.value)
    assert "scheme.group_size: 256" in str(caught.value)


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        (
            "{name: odd, method: rtn, scheme: {bits: 4, group_size: 96}, format: compressed-tensors}",
            ["group size 96 doesn't divide", "set scheme.group_size: 256"],
        ),
        (
            "{name: odd, method: gptq, scheme: {bits: 4}, format: compressed-tensors,"
            " overrides: [{modules: ['*.v_proj'], scheme: {bits: 8, group_size: 96}}]}",
            ["group size 96 doesn't divide", "got [256] (of [256])", "set overrides.0.scheme.group_size: 128"],
        ),
        (
            "{name: odd, method: gptq, scheme: {bits: 4, group_size: null}, format: gptq, ignore: ['*.mlp.*']}",
            [],
        ),
    ],
)
def test_what_a_worker_would_refuse_by_shape_is_refused_by_the_plan(
    tmp_path: Path, definition: str, said: list[str]
) -> None:
    made = write(tmp_path, definition)
    if not said:
        assert len(make(tmp_path, made).artifacts) == 1
        return
    with pytest.raises(UserError) as caught:
        make(tmp_path, made)
    for words in said:
        assert words in str(caught.value)


def test_the_calibration_text_under_another_name_is_still_the_calibration_text(tmp_path: Path) -> None:
    made = write(tmp_path)
    shutil.copy(TEXT / "calibration.txt", tmp_path / "other.txt")
    dataset = made.verify.dataset.model_copy(update={"data_files": ("other.txt",)})
    made = made.model_copy(update={"verify": made.verify.model_copy(update={"dataset": dataset})})
    with pytest.raises(UserError, match="very text that was calibrated on"):
        make(tmp_path, made)


def test_two_models_of_one_name_would_share_a_repository(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        shutil.copytree(LLAMA, tmp_path / parent / "model")
    (tmp_path / "b/model/LICENSE").write_text("another")
    made = write(tmp_path, model="id: a/model}, {id: b/model", extra="publish: {namespace: acme}")
    with pytest.raises(UserError, match="'acme/model-gptq-w4-g128'"):
        make(tmp_path, made)


def test_gguf_files_of_a_model_share_a_repository(tmp_path: Path) -> None:
    made = write(tmp_path, "gguf-q4_0, gguf-q8_0, bnb-nf4", extra="publish: {namespace: acme}")
    orders = [artifact.order for artifact in make(tmp_path, made).artifacts]
    assert [(order.repo_id, order.gathered) for order in orders] == [
        ("acme/llama-tiny-GGUF", True), ("acme/llama-tiny-GGUF", True), ("acme/llama-tiny-bnb-nf4", False),
    ]  # fmt: skip
    own = write(
        tmp_path, "gguf-q4_0, gguf-q8_0", extra='publish: {namespace: acme, name: "{model}-{recipe}", endpoint: /x}'
    )
    assert [order.gathered for order in (a.order for a in make(tmp_path, own).artifacts)] == [False, False]


def test_two_recipes_of_one_file_name_would_share_a_file(tmp_path: Path) -> None:
    other = "{name: other, method: ggml, scheme: {type: gguf-mix, mix: q4_0}, options: {codes: llama.cpp}}"
    made = write(tmp_path, f"gguf-q4_0, {other}", extra="publish: {namespace: acme}")
    with pytest.raises(UserError, match=r"'gguf-q4_0' and 'other' would have one file in .*'acme/llama-tiny-GGUF'"):
        make(tmp_path, made)


def test_two_models_of_one_name_would_share_a_gathered_repository(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        shutil.copytree(LLAMA, tmp_path / parent / "model")
    (tmp_path / "b/model/LICENSE").write_text("another")
    made = write(tmp_path, "gguf-q4_0", "id: a/model}, {id: b/model", "publish: {namespace: acme}")
    with pytest.raises(UserError, match="'acme/model-GGUF'"):
        make(tmp_path, made)


def test_a_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "Silence", lambda: Silence(1.0))
    made = write(tmp_path, extra="publish: {namespace: acme}")
    with pytest.raises(HubUnavailable, match=r"127\.0\.0\.1:9"):
        make(tmp_path, made, "http://127.0.0.1:9")


def test_a_model_of_the_hub_is_pinned_to_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackHub(tmp_path / "hub") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        from workers.transfer.hub import connect

        api = connect(hub.endpoint)
        api.create_repo("acme/llama")
        commit = api.upload_folder(repo_id="acme/llama", folder_path=LLAMA).oid
        # huggingface_hub reads HF_ENDPOINT when it's imported: another process, as a user's would be.
        code = (
            "from pathlib import Path; from pipeline.planning import plan; from pipeline.zoo import zoo\n"
            f"zoo = zoo.load(Path({str(tmp_path / 'zoo.yaml')!r}))\n"
            "made = plan.make_plan(zoo, Path('.'), Path('runs'), None, strict=True)\n"
            "print(made.artifacts[0].source.pin.revision, len(made.artifacts[0].source.tensors))"
        )
        write(tmp_path, model="id: acme/llama")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.stdout.split() == [commit, str(len(sources.read_header(LLAMA / "model.safetensors")))], done.stderr
        write(tmp_path, model="id: acme/llama, revision: nope")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert "acme/llama@nope" in done.stderr
        assert "no such revision" in done.stderr


def test_a_token_that_is_missing_or_wrong_is_found_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(HubRefused, match="HF_TOKEN"):
        destinations.check("https://huggingface.co")
    with LoopbackHub(tmp_path / "hub", token="right") as hub:
        monkeypatch.setenv("HF_TOKEN", "wrong")
        with pytest.raises(HubRefused, match="HF_TOKEN"):
            destinations.check(hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "right")
        destinations.check(hub.endpoint)


def test_fingerprints_refuse_what_is_not_plain() -> None:
    from workers.spec.base import canonical_json

    assert canonical_json({"b": 1, "a": [True, None]}) == '{"a":[true,null],"b":1}'
    with pytest.raises(TypeError):
        canonical_json({"a": object()})
    with pytest.raises(ValueError, match=r"[Oo]ut of range"):
        canonical_json(float("nan"))


MOE = ROOT / "tests/zoo/models/qwen3-moe-tiny"
GPT2 = ROOT / "tests/zoo/models/gpt2-tiny"


@pytest.mark.parametrize(
    ("model", "recipe", "said"),
    [
        (
            MOE,
            "awq-w4-g128-gemm",
            "experts, which transformers loads wrongly .* format: compressed-tensors with symmetric",
        ),
        (MOE, "hqq-w4-g64", r"format gptq: model\.layers\.0\.mlp\.experts\.0\..* ignore them"),
        (MOE, "w8a8-int8", "choose activations: none"),
        (MOE, "fp8-static", "choose activations: dynamic or none"),
        (MOE, "nvfp4", "choose type: mxfp4"),
        (GPT2, "gptq-w4-g128", "Conv1D, .* choose method: bitsandbytes"),
        (GPT2, "fp8-block", "Conv1D, .* choose method: bitsandbytes"),
    ],
)
def test_layers_that_a_format_does_not_take_are_refused_with_what_does(
    tmp_path: Path, model: Path, recipe: str, said: str
) -> None:
    with pytest.raises(UserError, match=rf"recipe '{recipe}', .*{said}.*models: \[\{{id: \.\.\., recipes: "):
        make(tmp_path, write(tmp_path, recipe, model=f"id: {model}"))


def test_what_no_node_has_stands_in_the_storage(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    asked = write(tmp_path, "bnb-nf4", extra=f"storage: {shared}\n")
    first = make(tmp_path, asked).jobs[0]
    assert first.storage == str(shared)
    order, verification = first.orders[0], first.verification
    place = artifact_folder(first.workspace, order)
    place.mkdir(parents=True)
    done = decisions.manifest(first, "bnb-nf4", True)
    done = done.model_copy(update={"thresholds": order.thresholds, "verification": verification})
    (place / MANIFEST).write_text(done.model_dump_json())
    assert make(tmp_path, asked).jobs, "it's here, and nowhere else"
    Storage(str(shared)).keep(place)
    shutil.rmtree(place)
    assert not make(tmp_path, asked).jobs
    assert make(tmp_path, write(tmp_path, "bnb-nf4")).jobs
    (tmp_path / "file").write_text("")
    with pytest.raises(HubRefused, match=r"storage: .*no folder that this user may write to"):
        make(tmp_path, write(tmp_path, "bnb-nf4", extra=f"storage: {tmp_path}/file\n"))


def test_a_model_can_have_recipes_of_its_own(tmp_path: Path) -> None:
    made = write(
        tmp_path,
        "fp8-static, fp8-dynamic, bnb-nf4",
        model=f"id: {MOE}, recipes: [bnb-nf4, fp8-dynamic]}}, {{id: {LLAMA}",
    )
    found = make(tmp_path, made)
    got = [(cell.source.name, cell.order.recipe.name) for cell in found.artifacts]
    assert got == [
        ("qwen3-moe-tiny", "fp8-dynamic"),
        ("qwen3-moe-tiny", "bnb-nf4"),
        ("llama-tiny", "fp8-static"),
        ("llama-tiny", "fp8-dynamic"),
        ("llama-tiny", "bnb-nf4"),
    ]
    with pytest.raises(UserError, match=r"recipe 'gone' isn't among the zoo's recipes \(bnb-nf4\)"):
        write(tmp_path, "bnb-nf4", model=f"id: {LLAMA}, recipes: [gone]")


def test_a_family_that_is_not_supported_is_refused_with_its_reason(tmp_path: Path) -> None:
    folder = copy_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "hrm_text"}))
    with pytest.raises(
        UserError, match=r"model_type 'hrm_text' isn't supported: its forward runs the same layers .* leave it out"
    ):
        make(tmp_path, write(tmp_path, model=f"id: {folder}"))


def test_a_plan_tells_what_this_machine_has_no_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "bnb-nf4")
    command = ["plan", str(tmp_path / "zoo.yaml"), "--out", str(tmp_path / "runs")]
    fits = CliRunner().invoke(main, command)
    assert fits.exit_code == 0, fits.output
    monkeypatch.setattr("workers.machine.preflight.host_memory", lambda: 10**9)
    lacks = CliRunner().invoke(main, command)
    assert lacks.exit_code == 1
    assert "INFEASIBLE: 1 problem(s) for" in lacks.output
    assert "host memory: 1.0 GB" in lacks.output


def test_a_named_runtimes_process_counts_in_the_memory_of_its_check(tmp_path: Path) -> None:
    pinned = sources.resolve(zoo.ModelEntry(id=str(LLAMA)), tmp_path)
    chosen = shipped.recipe("bnb-nf4")
    verification = Verification(dataset=Dataset(path="text"))
    alone, both = (
        sizing.estimate(pinned, chosen, None, verification, runtimes).verify.host
        for runtimes in ((), ("transformers", "vLLM"))
    )
    assert both - alone == RUNTIMES["vLLM"].host_bytes > 0
