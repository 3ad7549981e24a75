"""Loads a causal LM on the meta device, and fills and frees it layer by layer.

This is the only module that uses transformers' internals: its tables map checkpoint keys to parameters, and its loader
converts tensors (renames, fused experts). Both are internal to transformers 5.23; tests/workers/model/test_loading.py
fails loudly when they move.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workers.checkpoint.source import Header, TensorSource
from workers.errors import CheckpointError, UnsupportedModel
from workers.model.buffers import make_buffers
from workers.model.cut import first_layers
from workers.spec.auto_classes import is_multimodal, loader_of
from workers.spec.families import family_of, forward_of
from workers.spec.layers import is_tiny
from workers.spec.patterns import is_speculative


@dataclass(frozen=True)
class KeyTarget:
    """Target of a checkpoint key: a parameter or buffer, and the pattern of the key series that the loader fuses."""

    owner: str
    series: str | None


class InputName(NamedTuple):
    """Name of a product's input: the parameter it is multiplied with, and the expert if the parameter is fused."""

    parameter: str
    expert: int | None

    @property
    def module(self) -> str:
        """The module in the model whose weight the parameter is."""
        return self.parameter.removesuffix(".weight")


@dataclass(frozen=True)
class QuantizableWeight:
    """A matrix of a decoder layer that recipes quantize, by its name in the checkpoint.

    ``input`` names its input. Weights of different checkpoint keys that are fused in memory have the same input.
    """

    key: str
    layer: int
    input: InputName
    shape_OI: tuple[int, int]
    transposed: bool

    @property
    def module(self) -> str:
        """The module's name in the checkpoint: the key without its last part."""
        return self.key.rpartition(".")[0]


class StreamedModel:
    """A causal language model with the weights of one decoder layer at a time in memory.

    All weights are on the meta device until ``load_outside`` and ``load_layer`` read them from ``source``.
    ``unexpected`` are the checkpoint's keys that the model doesn't use; ``unused`` are those of them that its class
    doesn't declare to ignore either (a value head of training, the layers of another model). ``speculative`` are those
    of the unexpected that predict further tokens, declared or not. ``layers`` cuts the model to its first ones. Weights
    that several layers share (the attention block of zamba) belong to none of them: they stay loaded, and as they are.

    Raises:
        UnsupportedModel: a class that transformers doesn't know as a causal LM, or without a list of layers.
        CheckpointError: the checkpoint lacks a tensor that the model needs.
    """

    def __init__(
        self,
        folder: Path,
        source: TensorSource,
        *,
        dtype: torch.dtype,
        device: str = "cpu",
        trust_remote_code: bool = False,
        layers: int | None = None,
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.device = device
        self.model = build_on_meta(folder, dtype, trust_remote_code, layers)
        self.layers_name, self.layers = find_layers(self.model)
        targets = targets_of_keys(self.model, source.headers)
        self.owners = {key: target.owner for key, target in targets.items()}
        self._shared = _shared_by_layers(self.model, self.layers_name)
        self._keys_of_layer = self._by_layer(targets)
        inside = {key for keys in self._keys_of_layer.values() for key in keys}
        self._outside = [key for key in source.headers if key not in inside]
        self.unexpected = tuple(key for key in self._outside if key not in targets)
        # Of a model that was cut, further layers are no speculative block.
        count = len(self.layers) if layers is None else sys.maxsize
        self.speculative = frozenset(key for key in self.unexpected if is_speculative(key, count))
        self.unused = tuple(key for key in _undeclared(self.model, self.unexpected) if key not in self.speculative)
        self.weights = list(self._quantizable(targets))
        self.outside_loaded = False
        # Set by ``unpackable_modules``.
        self.unpackable: frozenset[str] | None = None

    @property
    def language_model(self) -> Any:
        """The module whose forward takes token ids, with its embeddings and head: the model, but for a few families."""
        return forward_of(self.model)

    @property
    def base_name(self) -> str:
        """The name of the module that is the decoder without its head.

        A few classes have a wrong ``base_model_prefix``. Some multimodal ones hold a whole causal LM, head and all.
        """
        prefix: str = self.model.base_model_prefix
        name = prefix if hasattr(self.model, prefix) else self.layers_name.partition(".")[0]
        while True:
            module = self.model.get_submodule(name)
            inner = f"{name}.{getattr(module, 'base_model_prefix', '')}"
            get_head = getattr(module, "get_output_embeddings", None)
            if get_head is None or get_head() is None or not self.layers_name.startswith(f"{inner}."):
                return name
            name = inner

    @property
    def towers(self) -> tuple[str, ...]:
        """The checkpoint keys of a multimodal model that belong to no part of its text model."""
        if not is_multimodal(self.model.config.to_dict()):
            return ()
        text = f"{self.layers_name.rpartition('.')[0]}."
        head = self.language_model.get_output_embeddings()
        heads = {f"{name}." for name, module in self.model.named_modules() if head is not None and module is head}
        return tuple(key for key in self._outside if not self.owners.get(key, text).startswith((text, *heads)))

    @property
    def base(self) -> nn.Module:
        """The decoder without its head: the streamed part."""
        module: nn.Module = self.model.get_submodule(self.base_name)
        return module

    @property
    def embedding_rows(self) -> int:
        """Number of token ids that the embedding has a row for."""
        rows: int = self.language_model.get_input_embeddings().weight.shape[0]
        return rows

    def keys_of_layer(self, index: int) -> list[str]:
        """The checkpoint keys of one layer, in checkpoint order."""
        return self._keys_of_layer[index]

    @property
    def outside_keys(self) -> list[str]:
        """The checkpoint keys that belong to no layer: embeddings, norms, the head, and all ``unexpected`` ones."""
        return self._outside

    @property
    def shared_keys(self) -> list[str]:
        """The checkpoint keys that several layers share."""
        return [key for key in self._outside if self.owners.get(key) in self._shared]

    def load_outside(self) -> None:
        """Load all tensors that belong to no layer, tie the tied weights, and initialize non-persistent buffers."""
        # Unexpected keys are skipped: they may be as large as a layer (the prediction heads of DeepSeek-V3).
        unexpected = set(self.unexpected)
        self._fill(key for key in self._outside if key not in unexpected)
        # As in from_pretrained: which of two tied tensors is taken, and whether they are tied at all, depends on those
        # that the checkpoint lacks.
        missing = set(self.model.state_dict()) - set(self.owners.values())
        with _without_bias_adjustment(self.model):
            self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        make_buffers(self.model, self.device)
        inside = tuple(f"{self.layers_name}.{index}." for index in range(len(self.layers)))
        self._check(name for name in _on_meta(self.model) if not name.startswith(inside))
        self.outside_loaded = True

    def load_layer(self, index: int, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Load one layer's weights, from ``tensors`` (by checkpoint key) or from the source."""
        if tensors is None:
            self._fill(self._keys_of_layer[index])
        else:
            load_tensors(self.model, tensors, self.dtype, self.device)
        prefix = f"{self.layers_name}.{index}."
        self._check(prefix + name for name in _on_meta(self.layers[index]))

    def free_layer(self, index: int) -> None:
        """Move one layer's weights back to the meta device; non-persistent buffers and what layers share stay."""
        prefix = f"{self.layers_name}.{index}."
        stored = {name for name in self.layers[index].state_dict() if prefix + name not in self._shared}
        for name, tensor in [*self.layers[index].named_parameters(), *self.layers[index].named_buffers()]:
            if name in stored:
                _replace(self.layers[index], name, tensor)

    def _fill(self, keys: Iterable[str]) -> None:
        tensors = {key: self.source.read(key) for key in keys}
        load_tensors(self.model, tensors, self.dtype, self.device)

    def _check(self, missing: Iterable[str]) -> None:
        names = sorted(missing)
        if names:
            raise CheckpointError(
                f"checkpoint: no tensors for {names[:5]} of {type(self.model).__name__}; name a "
                "checkpoint that holds them, or whose config.json fits what it holds"
            )

    def _by_layer(self, targets: Mapping[str, KeyTarget]) -> dict[int, list[str]]:
        pattern = re.compile(re.escape(self.layers_name) + r"\.(\d+)\.")
        keys_of_layer: dict[int, list[str]] = {index: [] for index in range(len(self.layers))}
        for key, target in targets.items():
            match = pattern.match(target.owner)
            if match and target.owner not in self._shared:
                keys_of_layer[int(match.group(1))].append(key)
        return keys_of_layer

    def _quantizable(self, targets: Mapping[str, KeyTarget]) -> Iterator[QuantizableWeight]:
        """Yield the quantizable weights by module type: Linear, Conv1D, and matrices fused into 3-D parameters."""
        from transformers.pytorch_utils import Conv1D

        modules = dict(self.model.named_modules())
        keys_per_owner = Counter(target.owner for target in targets.values())
        for layer, keys in self._keys_of_layer.items():
            position = _positions_in_series(keys, targets)
            for key in sorted(keys, key=_natural):
                owner, shape = targets[key].owner, self.source.headers[key].shape
                module_name, _, leaf = owner.rpartition(".")
                module = modules[module_name]
                if len(shape) != 2 or not key.endswith(".weight") or is_tiny(shape):
                    continue
                if isinstance(module, nn.Linear) and leaf == "weight" and keys_per_owner[owner] == 1:
                    if module.weight.shape != shape:  # the loader splits it among several modules
                        continue
                    yield QuantizableWeight(key, layer, InputName(owner, None), (shape[0], shape[1]), False)
                elif isinstance(module, Conv1D) and leaf == "weight":
                    yield QuantizableWeight(key, layer, InputName(owner, None), (shape[1], shape[0]), True)
                elif key in position and getattr(module, leaf).dim() == 3:
                    name = InputName(owner, position[key])
                    yield QuantizableWeight(key, layer, name, (shape[0], shape[1]), False)
            self._check(_absent_experts(self.model, position, targets))


def build_on_meta(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False, layers: int | None = None) -> Any:
    """Build the model of a checkpoint's config, or its first ``layers``, on the meta device, in ``eval`` mode.

    Raises:
        UnsupportedModel: transformers builds no model of the config by the family's loader.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if layers is not None:
            config = first_layers(config, layers)
        config.use_cache = False
        # A quantized checkpoint is decoded before its tensors get here.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        loader = getattr(transformers, loader_of(read_config(folder)))
        with torch.device("meta"):
            model = loader.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            if family_of(config.model_type).split_experts:
                _split_experts(model, dtype)
    except (ValueError, KeyError, ImportError, OSError) as error:
        # The first line names the config's class and the loader; what follows lists every class of the loader.
        reason = str(error).partition("\n")[0]
        raise UnsupportedModel(f"model {folder.name!r}: transformers builds no model of it ({reason})") from error
    if hasattr(model, "set_experts_implementation"):
        # The eager implementation multiplies expert by expert, so that each expert's input can be observed.
        model.set_experts_implementation("eager")
    return model.eval()


def _split_experts(model: Any, dtype: torch.dtype) -> None:
    """Replace experts in stacks by linear layers, as transformers does for a quantized checkpoint."""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as PATCHES

    for name, module in list(model.named_modules()):
        if patch := PATCHES.get(type(module).__name__):
            model.set_submodule(name, patch["module_name"](model.config.get_text_config()).to(dtype))


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's config.json.

    Raises:
        OSError, ValueError: there is none, or it is no JSON.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def _shared_by_layers(model: Any, layers_name: str) -> frozenset[str]:
    """The parameters of layers that are tied to those of other layers, and these."""
    prefix = f"{layers_name}."
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = ((one, other) for one, other in tied.items() if one.startswith(prefix) and other.startswith(prefix))
    return frozenset(name for pair in pairs for name in pair)


def find_layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Find the decoder's layers and the name of their list: the outermost ModuleList with the most parameters.

    Lists of the text model are preferred over those of image and audio models, however large these are; the row of the
    model's family may name the module that holds the text model.

    Raises:
        UnsupportedModel: the model has no such list.
    """
    prefix = family_of(getattr(getattr(model, "config", None), "model_type", None)).text_prefix
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.startswith(f"{prefix}." if prefix else "")
    ]
    outermost = [
        (name, module) for name, module in lists if not any(name.startswith(other + ".") for other, _ in lists)
    ]
    if not outermost:
        raise UnsupportedModel(f"model {type(model).__name__}: found no list of decoder layers to stream")
    text_lists = [(name, module) for name, module in outermost if _reads_text(model, name)]
    name, layers = max(text_lists or outermost, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return name, list(layers)


def _reads_text(model: nn.Module, name: str) -> bool:
    """Whether the innermost model around a module is built from the text part of the config."""
    from transformers import PreTrainedModel

    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts))]
    owner = next((module for module in reversed(around) if isinstance(module, PreTrainedModel)), None)
    root = getattr(model, "config", None)
    return owner is not None and root is not None and type(owner.config) is type(root.get_text_config())


def owners_of_keys(model: Any, headers: Mapping[str, Header]) -> dict[str, str]:
    """The parameter or buffer of each checkpoint key that the model uses."""
    return {key: target.owner for key, target in targets_of_keys(model, headers).items()}


def targets_of_keys(model: Any, headers: Mapping[str, Header]) -> dict[str, KeyTarget]:
    """The loader's target of each checkpoint key that the model uses."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    targets = {}
    for key in headers:
        name, series = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, series = rename_source_key(key, [], [], model.base_model_prefix, state)
        if name in state:
            targets[key] = KeyTarget(name, series)
    return targets


def _undeclared(model: Any, unexpected: Sequence[str]) -> tuple[str, ...]:
    """The unexpected keys that transformers warns about on loading: the class doesn't declare to ignore them."""
    from transformers.utils.loading_report import LoadStateDictInfo

    info = LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(unexpected),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)
    return tuple(key for key in unexpected if key in info.unexpected_keys)


def _positions_in_series(keys: Iterable[str], targets: Mapping[str, KeyTarget]) -> dict[str, int]:
    """Index of each key's slice in its fused parameter: the loader stacks a series in natural order of its keys."""
    next_position: Counter[KeyTarget] = Counter()
    positions = {}
    for key in sorted(keys, key=_natural):
        target = targets[key]
        if target.series is not None:
            positions[key] = next_position[target]
            next_position[target] += 1
    return positions


def _absent_experts(model: nn.Module, fused: Iterable[str], targets: Mapping[str, KeyTarget]) -> Iterator[str]:
    """Keys missing from a series whose parameter holds more slices than there are keys."""
    series = defaultdict(list)
    for key in fused:
        series[targets[key]].append(key.split("."))
    for target, members in series.items():
        module, _, leaf = target.owner.rpartition(".")
        parameter = getattr(model.get_submodule(module), leaf)
        if parameter.dim() == 3 and 1 < len(members) < len(parameter):
            yield from _gaps(members, len(parameter))


def _gaps(members: Sequence[list[str]], count: int) -> Iterator[str]:
    """Names missing from a series numbered 0 to ``count`` - 1; its members differ only in that number."""
    column = next(index for index, parts in enumerate(zip(*members, strict=True)) if len(set(parts)) > 1)
    present = {parts[column] for parts in members}
    first = members[0]
    for number in map(str, range(count)):
        if number not in present:
            yield ".".join([*first[:column], number, *first[column + 1 :]])


def load_tensors(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> None:
    """Load checkpoint tensors into the model through transformers' own loader.

    Raises:
        CheckpointError: a tensor's shape differs from the parameter's, or a tensor can't be converted.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    # A mapping stores its matches: each call takes a fresh one.
    config = LoadStateDictConfig(
        dtype=dtype,
        device_map={"": device},
        weight_mapping=get_model_conversion_mapping(model),
        # Parameters that the model keeps in float32 (a router's correction bias), whatever the dtype of the rest.
        dtype_plan=model._get_dtype_plan(dtype),
    )
    with _without_progress_bar():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    if info.mismatched_keys or info.conversion_errors or info.error_msgs:
        # A conversion error is a whole traceback; only its last line is reported.
        errors = [f"{key}: {text.strip().splitlines()[-1]}" for key, text in info.conversion_errors.items()]
        problems = [*sorted(map(str, info.mismatched_keys)), *errors, *info.error_msgs]
        raise CheckpointError(
            f"checkpoint: tensors don't fit the model's config.json, got {problems[:3]}; name a checkpoint whose "
            "config.json is its own"
        )


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _without_bias_adjustment(model: Any) -> Iterator[None]:
    """Disable ``_adjust_bias``, which pads a head's bias before tying: here both have the embedding's length."""
    original = model._adjust_bias
    model._adjust_bias = lambda *args: None
    try:
        yield
    finally:
        model._adjust_bias = original


def _on_meta(module: nn.Module) -> list[str]:
    """Names of a module's persistent tensors that are on the meta device."""
    return [name for name, tensor in module.state_dict().items() if tensor.is_meta]


def _replace(root: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = root.get_submodule(path)
    if isinstance(tensor, nn.Parameter):
        owner._parameters[leaf] = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
    else:
        owner._buffers[leaf] = torch.empty_like(tensor, device="meta")


def _natural(key: str) -> Any:
    """Sort key that orders layer 10 after layer 9, as the loader does."""
    from transformers.core_model_loading import dot_natural_key

    return dot_natural_key(key)
