"""The field's table of common errors: each is brought about, and its remedy read. Facts of GPUs are made up."""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from pipeline.zoo import shipped
from workers.machine import preflight
from workers.machine.failures import describe
from workers.machine.preflight import Device, MachineFacts, notes, problems
from workers.machine.remedies import REMEDIES, kind_of
from workers.spec.options import BitsAndBytesOptions

NF4 = shipped.recipe("bnb-nf4")
T4, A100, H100 = (
    Device(name=name, capability=capability, memory=16 << 30)
    for name, capability in (("T4", (7, 5)), ("A100", (8, 0)), ("H100", (9, 0)))
)
PACKAGES = dict.fromkeys(preflight.BASE_PACKAGES, "99") | {"bitsandbytes": "99", "torch": "99"}


def facts(**changes: Any) -> MachineFacts:
    made: dict[str, Any] = {
        "node": "n", "python": "3.11", "packages": PACKAGES, "host_memory": 1, "disk_free": 1, "cpus": 1,
    }  # fmt: skip
    return MachineFacts.model_validate({**made, **changes})


def without(name: str) -> dict[str, str]:
    return {key: version for key, version in PACKAGES.items() if key != name}


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"packages": without("bitsandbytes")}, {}, "package bitsandbytes is not installed, .*`pip install 'bitsandb"),
        ({"packages": without("accelerate")}, {}, "package accelerate is not installed, .*`pip install 'accelerate'`"),
        (
            {"packages": PACKAGES | {"accelerate": "0.9"}},
            {},
            "package accelerate is too old, got 0.9, expected 1.15 or later; run `pip install -U 'accelerate>=1.15'`",
        ),
        ({"cards": 2}, {}, r"2 NVIDIA card\(s\) on n, but torch 99 is built without CUDA; run `pip install -U torch"),
        ({"cards": 1, "torch_cuda": "13.0"}, {}, "torch built for CUDA 13.0 finds none; update the driver"),
        (
            {"devices": [H100], "torch_cuda": "13.0", "bitsandbytes_cuda": ["11.8", "12.4"]},
            {},
            "has libraries for CUDA 11.8, 12.4, expected 13.0, torch's; run `pip install -U bitsandbytes`",
        ),
        (
            {"devices": [T4]},
            {"compute_dtype": "bfloat16"},
            "got 'bfloat16', and T4 has compute capability 7.5, expected 8.0 or more .*; set float16",
        ),
        (
            {"devices": [Device(name="K80", capability=(3, 7), memory=1)]},
            {},
            "compute capability 3.7 of K80: bitsandbytes expects 6.0 or more; use the CPU",
        ),
        (
            {"devices": [H100], "torch_architectures": ["sm_75", "sm_80", "sm_86"]},
            {},
            "capability 9.0, and torch 99 has kernels for sm_75, sm_80, sm_86; install a build of torch for this card",
        ),
        ({"refused": {"bnb-nf4": "its own words; mend it"}}, {}, "its own words; mend it"),
    ],
)
def test_what_is_known_beforehand_is_said_with_its_remedy(
    changes: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    recipe = NF4.model_copy(update={"options": BitsAndBytesOptions(**options)})
    (found,) = problems(facts(**changes), recipe)
    assert re.search(says, found), found


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"compute_dtype": "bfloat16"}),
        ({"devices": [A100], "cards": 1, "torch_cuda": "12.8"}, {"compute_dtype": "bfloat16"}),
        ({"devices": [T4], "cards": 1, "torch_cuda": "12.8"}, {"compute_dtype": "float16"}),
        ({"devices": [H100], "torch_cuda": "12.9", "bitsandbytes_cuda": ["11.8", "12.8"]}, {}),
        (
            {"devices": [H100, T4], "torch_architectures": ["sm_75", "sm_80", "compute_80"]},
            {"compute_dtype": "float16"},
        ),
    ],
)
def test_what_runs_is_not_refused(changes: dict[str, Any], options: dict[str, Any]) -> None:
    assert problems(facts(**changes), NF4.model_copy(update={"options": BitsAndBytesOptions(**options)})) == []


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80", "sm_90"], (10, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),
        (["sm_100"], (10, 3), True),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["gfx90a"], (9, 0), True),
    ],
)
def test_a_builds_architectures_are_compared_with_the_card(
    architectures: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert preflight.has_kernels(architectures, capability) is runs


def test_fp8_on_an_older_card_is_a_note() -> None:
    fp8 = shipped.recipe("fp8-dynamic")
    assert "A100 has no FP8 kernels (capability 8.0, expected 8.9" in notes(facts(devices=[A100]), fp8)[0]
    assert notes(facts(devices=[H100]), fp8) == notes(facts(devices=[A100]), NF4) == []


def test_the_least_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    asked = {req.name: req for req in map(Requirement, project["dependencies"])}
    for name, least in preflight.LEAST_VERSIONS.items():
        assert f">={least}" in {str(part) for part in asked[name].specifier}


def test_this_machine_is_probed(tmp_path: Path) -> None:
    found = preflight.probe(tmp_path)
    assert found.torch_cuda == torch.version.cuda
    assert "12.8" in found.bitsandbytes_cuda
    assert problems(found, NF4) == []


# --------------------------------------------------------------------- what a library says once it runs


def of_bitsandbytes(**there: bool) -> None:
    module = importlib.import_module("transformers.quantizers.quantizer_bnb_4bit")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in there.items():
            patch.setattr(module, name, lambda *_, value=value, **__: value)
        quantizer = AutoHfQuantizer.from_config(transformers.BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
        quantizer.validate_environment(device_map={"a": 0, "b": "cpu"})


def raised(message: str) -> Callable[[], None]:
    def fail() -> None:
        raise RuntimeError(message)

    return fail


CAUSES: dict[str, Callable[[], Any]] = {
    "bitsandbytes missing": lambda: of_bitsandbytes(is_bitsandbytes_available=False),
    "accelerate missing or too old": lambda: of_bitsandbytes(is_accelerate_available=False),
    "CPU offload not enabled": of_bitsandbytes,
    "unknown quantization type": lambda: AutoQuantizationConfig.from_dict({"quant_method": "no-such"}),
    "dtypes differ": lambda: torch.bmm(torch.ones(1, 2, 2).half(), torch.ones(1, 2, 2)),
    # What these say needs a card, or another build: their words, from the libraries' sources.
    "no CUDA": raised("No CUDA GPUs are available") if torch.cuda.is_available() else lambda: torch.zeros(1).to("cuda"),
    "extension for another CUDA": raised("CUDA Setup failed despite CUDA being available"),
    "out of memory": raised("cublas: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    "capability too low": raised("FP8 models need a GPU with compute capability >= 8.9, actual = 7.5"),
}


@pytest.mark.parametrize("kind", REMEDIES)
def test_the_words_of_a_library_get_their_remedy(kind: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  whatever class the library chose
        CAUSES[kind]()
    assert kind_of(str(caught.value)) == kind, caught.value
    assert describe(caught.value).message.endswith(REMEDIES[kind].remedy)


@pytest.mark.parametrize(
    "words",
    ["CUDA extension not installed.", "undefined symbol: _ZN3c104cuda", "no kernel image is available for execution"],
)
def test_an_extension_of_another_build_is_recognised(words: str) -> None:
    assert kind_of(words) == "extension for another CUDA"


def test_what_is_not_known_stays_as_it_is() -> None:
    assert describe(KeyError("odd")).message == "'odd'"
