"""transformers' registry of quantizers: what a recipe of ``method: transformers`` names, and why it can't be made.

Nothing here lists quantizers: ``requires_calibration``, ``is_serializable`` and ``validate_environment`` are read from
the class that the installed transformers has for a config, and a tiny model is quantized, saved and loaded with it.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workers.errors import PreflightError, UnsupportedRecipe
from workers.spec.engines import RegistryAnswer, RegistryRequest
from workers.spec.recipes import TransformersRecipe
from workers.spec.schemes import TransformersScheme

# Names under which config classes take the modules that stay as they are.
SKIPS = ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules", "linear_weights_not_to_quantize")
# Messages about a package that isn't there.
PACKAGE = re.compile(
    r"pip install|not installed|No module named|be installed|to install it|requires the .* (library|package)", re.I
)
INSTALL = "install it, and run quantmill doctor again"
# Messages about a GPU that isn't there; mslk has kernels for GPUs alone.
ON_A_GPU = re.compile(r"gpu|cuda|xpu|mslk|compute capability", re.I)
# The last line of a traceback in transformers' report on loading, which its exception doesn't repeat.
CAUSE = re.compile(r"^([A-Za-z_.]*(?:Error|Exception)): (.+)$", re.M)
GENERAL = "issues during automatic conversion"
# Round trips of the tiny model through its files may change its logits by this much of their deviation.
ROUND_TRIP = 1e-2


def config_of(scheme: TransformersScheme, skipped: Iterable[str] = ()) -> Any:
    """The config object that ``from_pretrained`` takes; ``skipped`` names modules beside those of the arguments.

    Raises:
        UnsupportedRecipe: no such class, an argument that it doesn't have, or a value that it refuses.
        PreflightError: it needs a package that isn't installed.
    """
    cls = _config_class(scheme.config)
    arguments = dict(scheme.arguments)
    known = [name for name in inspect.signature(cls).parameters if name not in ("self", "kwargs")]
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {close[0]!r}? " if close else ""
            raise UnsupportedRecipe(
                f"scheme.arguments: {scheme.config} has no argument {name!r}; {meant}It has {', '.join(known)}"
            )
    names = sorted(set(skipped))
    if names:
        field = next((name for name in SKIPS if name in known), None)
        if field is None:
            raise UnsupportedRecipe(
                f"ignore: {scheme.config} has no list of modules to leave as they are, which {names[:3]} need; choose "
                "another config, or set ignore: []"
            )
        arguments[field] = sorted({*(arguments.get(field) or ()), *names})
    try:
        return cls.from_dict(arguments)
    except Exception as error:
        takes = f"correct them: it takes {', '.join(known) or 'none'}"
        raise _of_words(f"scheme.arguments: {scheme.config} refuses them: {_words(error)}", takes) from error


def _config_class(name: str) -> Any:
    import transformers
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    known = sorted({cls.__name__ for cls in AUTO_QUANTIZATION_CONFIG_MAPPING.values()})
    cls = getattr(transformers, name, None) if name in known else None
    if cls is None:
        close = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise UnsupportedRecipe(
            f"scheme.config: transformers {transformers.__version__} has no quantizer for {name!r}; {meant}It has "
            f"{', '.join(known)}"
        )
    return cls


def quantizer_of(config: Any) -> Any:
    """The quantizer for a config, about to quantize.

    Raises:
        UnsupportedRecipe: it only loads what was quantized elsewhere, or can't save.
    """
    import transformers
    from transformers.quantizers.auto import AutoHfQuantizer

    named, version = type(config).__name__, f"transformers {transformers.__version__}"
    try:
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    except ImportError as error:
        raise PreflightError(f"{named}: {_words(error)}") from error
    except Exception as error:
        raise UnsupportedRecipe(
            f"scheme.config: {version} can't quantize with {named}: {_words(error)}; take a published checkpoint of "
            "that kind, or another recipe"
        ) from error
    if getattr(quantizer, "requires_calibration", False):
        raise UnsupportedRecipe(
            f"scheme.config: {version}: {named} requires calibration, which transformers doesn't do on loading; choose "
            "a recipe of method: gptq or awq"
        )
    serializable = quantizer.is_serializable  # a property in some classes
    if not (serializable() if callable(serializable) else serializable):
        raise UnsupportedRecipe(
            f"scheme.config: {version}: what {named} makes is not serializable ({type(quantizer).__name__}."
            "is_serializable), it quantizes on loading alone; choose a recipe whose artifact is saved, such as rtn, "
            "hqq or torchao with the same bits"
        )
    return quantizer


def validate(recipe: TransformersRecipe) -> None:
    """Build a recipe's config, and let its quantizer look at this machine.

    Raises:
        UnsupportedRecipe: no machine can make it with this transformers.
        PreflightError: this one can't, in the quantizer's words.
    """
    quantizer = quantizer_of(config_of(recipe.scheme))
    try:
        quantizer.validate_environment(device_map={"": device()})
    except Exception as error:
        raise PreflightError(f"{recipe.scheme.config}: {_words(error)}{_without_gpu(error)}") from error


def device() -> str:
    """Where models are quantized: a GPU if there is one."""
    from workers.model.card_room import has_card

    return "cuda" if has_card() else "cpu"


@contextmanager
def said(what: str) -> Iterator[list[str]]:
    """Turn an exception of transformers into ours, with the cause that it only logs; ``what`` begins the message.

    Raises:
        UnsupportedRecipe: the quantizer isn't implemented.
        PreflightError: everything else but want of memory and a card's errors, which pass as they are.
    """
    from workers.machine.card_errors import card_error
    from workers.machine.memory import ran_out

    log: list[str] = []
    logger, handler = logging.getLogger("transformers"), _Keeping(log)
    logger.addHandler(handler)
    try:
        yield log
    except Exception as error:
        if ran_out(error) or type(error).__name__ == "OutOfMemoryError" or card_error(error) is not None:
            raise
        words = _cause(log) if GENERAL in str(error) else _words(error)
        if isinstance(error, NotImplementedError):
            raise UnsupportedRecipe(f"{what}: {words}") from error
        raise PreflightError(f"{what}: {words}{_without_gpu(error, words)}") from error
    finally:
        logger.removeHandler(handler)


def try_on_a_tiny_model(recipe: TransformersRecipe) -> None:
    """Quantize, save and load a model of one small layer with a recipe's quantizer, and compare the logits.

    Raises:
        UnsupportedRecipe: the quantizer isn't implemented, or what it saves isn't what it made.
        PreflightError: it doesn't run on this machine.
    """
    import torch
    import transformers

    small = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    tokens, where = torch.arange(1, 33)[None].to(device()), device()
    with tempfile.TemporaryDirectory() as folder, said(f"{recipe.scheme.config} on a tiny model"):
        plain, saved = Path(folder, "plain"), Path(folder, "saved")
        transformers.LlamaForCausalLM(small).to(torch.bfloat16).save_pretrained(plain)
        load = transformers.LlamaForCausalLM.from_pretrained
        made = load(plain, quantization_config=config_of(recipe.scheme), dtype="auto", device_map=where)
        made.save_pretrained(saved)
        loaded, loading = load(saved, dtype="auto", device_map=where, output_loading_info=True)
        with torch.inference_mode():
            ours, theirs = (model(tokens).logits.float() for model in (made, loaded))
    lost = sorted(key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loading[kind])
    difference = ((ours - theirs).square().mean().sqrt() / ours.std()).item()
    if lost or not difference <= ROUND_TRIP:
        raise UnsupportedRecipe(
            f"{recipe.scheme.config}: transformers {transformers.__version__} doesn't load what it saves: logits "
            f"differ by {difference:.2g} standard deviations, keys {lost[:3]}; choose another recipe"
        )


class _Keeping(logging.Handler):
    """Keeps the messages of a logger."""

    def __init__(self, kept: list[str]) -> None:
        super().__init__()
        self._kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(record.getMessage())


def _cause(log: Iterable[str]) -> str:
    """The first cause in transformers' reports, in a line."""
    found = CAUSE.search("\n".join(log))
    return f"{found[1]}: {found[2]}" if found else "its conversion of the weights failed"


def _words(error: BaseException) -> str:
    """An error's own words, in a line."""
    text = " ".join(str(error).split())
    return text[:500] if " " in text else f"{type(error).__name__} {text[:500]}".strip()


def _without_gpu(error: BaseException, words: str = "") -> str:
    """The remedy for what a quantizer misses here."""
    import torch

    if PACKAGE.search(words or str(error)):
        return f"; {INSTALL}"
    if ON_A_GPU.search(words or str(error)) and not torch.cuda.is_available():
        return "; run it on a node with a GPU, or choose a recipe that runs here"
    return "; give it what it asks for, or choose a recipe that runs here"


def _of_words(message: str, remedy: str) -> UnsupportedRecipe | PreflightError:
    """A missing package is the machine's fault; everything else that a config says is the recipe's."""
    if PACKAGE.search(message):
        return PreflightError(f"{message}; {INSTALL}")
    return UnsupportedRecipe(f"{message}; {remedy}")


def judged(request: RegistryRequest) -> RegistryAnswer:
    """Why recipes can't be made with this transformers, or not on this machine."""
    never: dict[str, str] = {}
    here: dict[str, str] = {}
    for recipe in request.recipes:
        if not isinstance(recipe, TransformersRecipe):
            continue
        try:
            validate(recipe)
            if request.tried:
                try_on_a_tiny_model(recipe)
        except UnsupportedRecipe as error:
            never[recipe.name] = f"recipe {recipe.name!r}: {error}"
        except PreflightError as error:
            here[recipe.name] = f"recipe {recipe.name!r}: {error}"
    return RegistryAnswer(never=never, here=here)


def answer(request: str) -> str:
    """A ``RegistryAnswer`` for a ``RegistryRequest``, both as JSON: the entry of a process of its own."""
    return judged(RegistryRequest.model_validate_json(request)).model_dump_json()
