"""A plugin: a format, the runtime that reads it, and a recipe, from a file that isn't quantmill's."""

from __future__ import annotations

from pathlib import Path

from workers.spec import plugins
from workers.spec.formats import Format
from workers.spec.runtimes import Runtime
from workers.spec.schemes import IntScheme, Scheme
from workers.spec.tensors import TensorHeader


def _holds(scheme: Scheme) -> bool:
    return isinstance(scheme, IntScheme) and (scheme.bits, scheme.group_size, scheme.symmetric) == (8, None, True)


def _stored(scheme: Scheme, weight: TensorHeader) -> list[TensorHeader]:
    rows, columns = weight.shape
    return [TensorHeader("toy_codes", (rows, columns), "I8"), TensorHeader("toy_scale", (rows, 1), weight.dtype)]


plugins.add_format(
    Format(
        name="toy",
        says="symmetric int of 8 bits, one scale for each output",
        holds=_holds,
        stored=_stored,
        declares=lambda config: config.get("quant_method") == "toy",
        family=lambda config: ["w8"],
    ),
    codec="tests.toy.format:CODEC",
)
plugins.add_runtime(
    Runtime(
        name="toyrun",
        distribution="transformers",
        rules={"toy": lambda scheme, kinds: "are experts" if kinds.experts else None},
        snippet=lambda repo, loader, chats: f'import toyrun\n\nmodel = toyrun.load("{repo}")\n',
        entry="tests.toy.runtime:answer",
    )
)
plugins.add_recipes(Path(__file__).parent / "recipes")
