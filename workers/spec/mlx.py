"""What mlx-lm reads: model families, the names that it has for experts, and its keys of config.json. No torch.

Taken from mlx-lm 0.32.2: ``mlx_lm/models`` and ``MODEL_REMAPPING`` of ``mlx_lm.utils``; experts from the ``sanitize``
methods there, those of families alone whose experts the source stores one by one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

VERSION = "0.32.2"

# model_type of config.json; for each there is a class in mlx-lm.
_NAMES = (
    "Klear afm7 afmoe apertus baichuan_m1 bailing_hybrid bailing_moe bailing_moe_linear bitnet cohere cohere2 "
    "dbrx deepseek deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe "
    "falcon_h1 falcon_mamba gemma gemma2 gemma3 gemma3_text gemma3n gemma4 gemma4_text gemma4_unified glm glm4 "
    "glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe "
    "granitemoehybrid helium hunyuan hunyuan_v1_dense internlm2 internlm3 iquestcoder iquestloopcoder jamba "
    "joyai_llm_flash kimi_k2 kimi_k25 kimi_linear kimi_vl lfm2 lfm2-vl lfm2_moe lille-130m llama llama4 "
    "llama4_text llava longcat_flash mamba mamba2 mellum mimo mimo_v2_flash minicpm minicpm3 minimax minimax_m2 "
    "ministral3 mistral mistral3 mistral4 mixtral nanbeige nanochat nemotron nemotron-nas nemotron_h olmo olmo2 "
    "olmo3 olmo_hybrid olmoe openelm phi phi-msft phi3 phi3small phimoe phixtral pixtral plamo plamo2 plamo3 qwen "
    "qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe "
    "recurrent_gemma rwkv7 seed_oss smollm3 stablelm starcoder2 step3p5 talkie telechat3 xverse youtu_llm"
)
FAMILIES = frozenset(_NAMES.split())

# Families whose experts are stacked by the names of the source's: the block that holds the stacks.
STACKS: dict[str, str] = {
    "afmoe": "experts",
    "deepseek": "switch_mlp",
    "deepseek_v2": "switch_mlp",
    "dots1": "experts",
    "ernie4_5_moe": "switch_mlp",
    "glm4_moe": "switch_mlp",
    "jamba": "switch_mlp",
    "mellum": "switch_mlp",
    "mixtral": "switch_mlp",
    "olmoe": "switch_mlp",
    "phimoe": "switch_mlp",
    "qwen2_moe": "switch_mlp",
    "qwen3_moe": "switch_mlp",
}
# Names that differ, of Mixtral's kind.
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT = re.compile(r"^(?P<block>.*)\.experts\.(?P<expert>\d+)\.(?P<projection>[^.]+)(?P<rest>\..*)?$")


class Place(NamedTuple):
    """Where one expert's tensor or module is stored: in the stack of this name, at this index."""

    name: str
    expert: int


def place(model_type: str, name: str) -> Place | None:
    """Where a tensor or module of the source is stored if it is an expert's; None: under its own name."""
    found = _EXPERT.match(name)
    stack = STACKS.get(model_type)
    if found is None or stack is None:
        return None
    block, expert, projection, rest = found.group("block", "expert", "projection", "rest")
    return Place(f"{block}.{stack}.{_PROJECTIONS.get(projection, projection)}{rest or ''}", int(expert))


def expert_name(model_type: str, stacked: str, expert: int) -> str | None:
    """The source's name of one expert's tensor or module in a stack: the inverse of ``place``; None if it's no stack's.

    Blocks named block_sparse_moe have Mixtral's names for projections.
    """
    stack = STACKS.get(model_type)
    found = re.match(rf"^(.*)\.{stack}\.(gate_proj|up_proj|down_proj)(\..*)?$", stacked) if stack else None
    if found is None:
        return None
    block, projection, rest = found.groups()
    if block.endswith("block_sparse_moe"):
        projection = {there: here for here, there in _PROJECTIONS.items()}[projection]
    return f"{block}.experts.{expert}.{projection}{rest or ''}"


def fused_experts(name: str) -> tuple[str, ...]:
    """mlx-lm's modules of gpt-oss's experts, by the name of the source's tensor: it splits gates from the others."""
    parent, _, leaf = name.rpartition(".")
    leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    return tuple(f"{parent}.{leaf}" for leaf in leaves)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json that mlx-lm needs beside the source's; ``config`` has its ``quantization_config``.

    ``quantization`` is what mlx-lm reads; transformers 5 saves ``rope_parameters`` and ``num_local_experts``, for which
    mlx-lm has the older names.
    """
    added: dict[str, Any] = {"quantization": config["quantization_config"]}
    older = {**_rope(config.get("rope_parameters")), **_experts(config)}
    return added | {key: value for key, value in older.items() if key not in config}


def _rope(parameters: object) -> dict[str, Any]:
    if not isinstance(parameters, dict):
        return {}
    if isinstance(full := parameters.get("full_attention"), dict):  # parameters for each type of layers
        sliding = parameters.get("sliding_attention")
        local = sliding.get("rope_theta") if isinstance(sliding, dict) else None
        return {**_rope(full), **({} if local is None else {"rope_local_base_freq": local})}
    named = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
    scaling = {key: value for key, value in parameters.items() if key not in named}
    return named if scaling.get("rope_type", "default") == "default" else {**named, "rope_scaling": scaling}


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    count = config.get("num_local_experts")
    return {} if count is None else {"num_experts": count}
