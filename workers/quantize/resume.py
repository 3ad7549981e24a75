"""Checkpoints a pass on disk after a layer, so that a later attempt resumes it after a kill.

A checkpoint holds the last layer's output for each micro-batch, and every maker's state. The next attempt runs the
model's own forward with the finished layers replaced: the last of them returns the stored output, the others NaN. If
the next layer's arguments then differ (a model that uses earlier layers' outputs), the pass starts over.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.engines.maker import MakerState
from workers.machine.files import write_text
from workers.model import trees
from workers.model.cards import AnyLanes
from workers.spec.base import Frozen
from workers.spec.job import ArtifactMade

# Errors of state that was damaged, or saved of another model.
MISREAD = (ValueError, LookupError, AttributeError, TypeError, RuntimeError, StopIteration)
STATE = "state.json"
LOCK = ".lock"


class NotResumable(Exception):
    """The state on disk can't be resumed; the pass starts over."""


class GroupState(Frozen):
    """A group of lanes: the structure of a layer's output, and a digest of the next layer's inputs (``door``)."""

    structure: str
    door: str


class PassState(Frozen):
    """A pass after ``layers`` of its layers. ``makers`` and ``failed`` by fingerprint; ``groups`` of lanes by name."""

    layers: int = Field(ge=1)
    micro_batch_tokens: int = Field(ge=1)
    makers: dict[str, MakerState]
    failed: dict[str, ArtifactMade]
    groups: dict[str, GroupState]


class PassFolder:
    """Folder of a pass's state and unfinished artifacts; locked by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def partial(self, fingerprint: str) -> Path:
        """The folder of an unfinished artifact."""
        return self.path / fingerprint[:16]

    def load(self) -> PassState | None:
        """The last saved state; None if there is none or it can't be read."""
        try:
            return PassState.model_validate_json((self.path / STATE).read_text())
        except (OSError, ValueError):
            return None

    def save(self, state: PassState, groups: Mapping[str, AnyLanes]) -> None:
        """Save a state and the last layer's outputs; the previous state is kept until this one is complete.

        Raises:
            NotResumable: a layer returns something other than tensors.
        """
        hidden_file = self._hidden(state.layers)
        partial = hidden_file.with_suffix(".partial")
        tensors = {
            f"{name}.{lane:06d}.{leaf:02d}": tensor.contiguous()
            for name, lanes in groups.items()
            for lane, output in enumerate(lanes.last_outputs())
            for leaf, (_, tensor) in enumerate(trees.leaves(output))
        }
        save_file(tensors, partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.rename(hidden_file)
        write_text(self.path / STATE, state.model_dump_json())
        for old in self.path.glob("hidden-*"):
            if old != hidden_file:
                old.unlink()

    def replay(self, state: PassState, groups: Mapping[str, AnyLanes]) -> None:
        """Advance all lanes to the layer at which ``state`` was saved.

        Raises:
            NotResumable: the outputs can't be read, or the next layer's arguments differ.
        """
        if set(state.groups) != set(groups):
            raise NotResumable(f"other groups of lanes: {sorted(state.groups)}, now {sorted(groups)}")
        for name, lanes in groups.items():
            saved = state.groups[name]
            try:
                stored = load_file(self._hidden(state.layers))
                outputs = [_rebuilt(saved.structure, tensors, lanes.device) for tensors in _by_lane(stored, name)]
                lanes.replay(state.layers, outputs)
            except (OSError, SafetensorError, *MISREAD) as error:
                raise NotResumable(f"{type(error).__name__}: {error}") from error
            if group_state(lanes, outputs) != saved or _any_nan(lanes):
                raise NotResumable(f"{name}: the next layer's arguments aren't what they were")

    def clear(self) -> None:
        """Remove everything except the lock."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink()

    def _hidden(self, layers: int) -> Path:
        return self.path / f"hidden-{layers:05d}.safetensors"


@contextmanager
def locked_pass_folder(path: Path) -> Iterator[PassFolder]:
    """Lock the pass's folder while the context lasts. If another process holds it, yield one that is never resumed."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = PassFolder(path)
        except BlockingIOError:
            folder = PassFolder(path.with_name(f"{path.name}-{os.getpid()}"))
            folder.path.mkdir(parents=True, exist_ok=True)
        yield folder


def group_state(lanes: AnyLanes, outputs: Sequence[Any]) -> GroupState:
    """The state that lanes must reproduce when they are replayed.

    Raises:
        NotResumable: a layer returns something other than tensors.
    """
    structures = {_structure(output) for output in outputs}
    if len(structures) != 1:
        raise NotResumable(f"a layer returns different things: {sorted(structures)}")
    digest = hashlib.sha256()
    for path, tensor in trees.leaves(lanes.next_inputs()[0]):
        digest.update(f"{path}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return GroupState(structure=structures.pop(), door=digest.hexdigest())


def _any_nan(lanes: AnyLanes) -> bool:
    tensors = (tensor for inputs in lanes.next_inputs() for _, tensor in trees.leaves(inputs))
    return any(bool(tensor.isnan().any()) for tensor in tensors if tensor.is_floating_point())


def _structure(output: Any) -> str:
    """T for a tensor, (T-T) for a tuple of a tensor, None and a tensor."""
    if isinstance(output, Tensor):
        return "T"
    if isinstance(output, tuple) and all(item is None or isinstance(item, Tensor) for item in output):
        return f"({''.join('-' if item is None else 'T' for item in output)})"
    raise NotResumable(f"a layer returns {type(output).__name__}")


def _rebuilt(structure: str, tensors: Sequence[Tensor], device: str) -> Any:
    moved = (tensor.to(device) for tensor in tensors)
    if structure == "T":
        return next(moved)
    return tuple(next(moved) if kind == "T" else None for kind in structure[1:-1])


def _by_lane(stored: Mapping[str, Tensor], group: str) -> list[list[Tensor]]:
    """The tensors of a group's lanes, in lane order; keys are GROUP.LANE.LEAF."""
    lanes: dict[str, list[Tensor]] = {}
    for key in sorted(stored):
        name, lane, _ = key.rsplit(".", 2)
        if name == group:
            lanes.setdefault(lane, []).append(stored[key])
    return list(lanes.values())
