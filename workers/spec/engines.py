"""The table of engines, which make artifacts. Engines that take part in the pass are in ``engines.table``.

The other kind of engine makes a whole artifact in its own process (``engines.whole``): ``script`` is a module that
reads a ``WholeRequest`` as JSON from standard input and writes a ``WholeAnswer`` as one line of JSON to standard
output, in the prebuilt ``environment``, if set.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from workers.spec.base import Frozen
from workers.spec.layers import Layout
from workers.spec.recipes import Recipe


@dataclass(frozen=True)
class Engine:
    """One engine: the distributions that it needs, and the minimum compute capability of a GPU.

    ``asks``: the entry of a process in which a library says why recipes can't be made (``RegistryAnswer``).
    ``optional`` are distributions that some of its recipes need (``TransformersScheme.packages``), whose versions
    manifests record. ``loads_whole_model``: the plan counts all of the model's weights in float32 into the host memory
    of its stage.
    """

    name: str
    packages: tuple[str, ...] = ()
    least_capability: tuple[int, int] = (0, 0)
    script: str | None = None
    environment: str | None = None
    loads_whole_model: bool = False
    asks: str | None = None
    optional: tuple[str, ...] = ()


class WholeRequest(Frozen):
    """Request to a whole-artifact engine: make ``recipe`` of the checkpoint in ``source``, into the empty ``out``."""

    source: str
    out: str
    recipe: Recipe
    calibration: str | None = Field(None, description="safetensors with ``tokens`` int64 [N, T]; null: no calibration.")
    trust_remote_code: bool = False
    variant: str | None = Field(None, description="Of the weight files' names, as transformers' argument.")
    folds: str = Field("", description="Folder for the scales that the engine folds, which ``formats.folded`` reads.")
    modules: tuple[str, ...] = Field((), description="Modules to quantize, by their names in the checkpoint.")
    left: tuple[str, ...] = Field((), description="Other modules with a matrix, which stay as they are.")


class WholeAnswer(Frozen):
    """What a whole-artifact engine answers, as one line: ``layout`` and ``fallbacks`` of what it made, or ``error``.

    ``versions`` are those of distributions in its environment, for the manifest.
    """

    layout: Layout | None = None
    fallbacks: tuple[str, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    error: str | None = None


class WholeProgress(Frozen):
    """What a whole-artifact engine may say on lines before its answer; it goes to the stage's log."""

    progress: str


class RegistryRequest(Frozen):
    """Request to what an engine ``asks``: the recipes, whether each is also to be tried on a tiny model."""

    recipes: tuple[Recipe, ...]
    tried: bool = True


class RegistryAnswer(Frozen):
    """Why recipes can't be made, by their names: ``never``, whatever the machine, or not ``here``."""

    never: dict[str, str] = Field(default_factory=dict)
    here: dict[str, str] = Field(default_factory=dict)


LINEAR = Engine("linear")
# Its environment's library encodes, its converter names: both are called from the pass, which stays in this process.
GGML = Engine("ggml", environment="llama-cpp")
BITSANDBYTES = Engine("bitsandbytes", packages=("bitsandbytes",), least_capability=(6, 0))
# Stores codes that exist already; a GGUF file's names come from the environment of the runtime that checks it.
KEEP = Engine("keep")

TRANSFORMERS = Engine(
    "transformers",
    script="workers.engines.hf_script",
    loads_whole_model=True,
    asks="workers.engines.hf_registry:answer",
    optional=("torchao", "optimum-quanto", "hqq", "kernels", "fbgemm-gpu-genai", "sinq"),
)

# Libraries, by `engine` in a recipe (``spec.libraries``). gptqmodel also loads its own format in this environment.
GPTQMODEL = Engine(
    "gptqmodel", packages=("gptqmodel",), script="workers.engines.libraries.with_gptqmodel", loads_whole_model=True
)
LLMCOMPRESSOR = Engine(
    "llmcompressor",
    script="workers.engines.libraries.with_llmcompressor",
    environment="llmcompressor",
    loads_whole_model=True,
)
AUTO_ROUND = Engine(
    "auto-round",
    script="workers.engines.libraries.with_auto_round",
    environment="auto-round",
    loads_whole_model=True,
)

MODELOPT = Engine(
    "modelopt", script="workers.engines.libraries.with_modelopt", environment="modelopt", loads_whole_model=True
)
AUTOAWQ = Engine(
    "autoawq", script="workers.engines.libraries.with_autoawq", environment="autoawq", loads_whole_model=True
)
AUTO_GPTQ = Engine(
    "auto-gptq", script="workers.engines.libraries.with_auto_gptq", environment="auto-gptq", loads_whole_model=True
)

OWN = (LINEAR, BITSANDBYTES, GGML, KEEP, TRANSFORMERS)
ENGINES: dict[str, Engine] = {
    row.name: row for row in (*OWN, GPTQMODEL, LLMCOMPRESSOR, AUTO_ROUND, MODELOPT, AUTOAWQ, AUTO_GPTQ)
}
