"""A source checkpoint with an artifact's scales folded in, for comparison with the artifact.

AWQ and SmoothQuant change norms, and multiply rows and columns of weights. The scales stored beside the artifact apply
the same changes to the source, so that every tensor of the artifact has a counterpart. quantmill's own methods store
norms as they come out (``replaced``), and compensate for their rounding in the weights' scales; of libraries there are
the scales alone, by which the source's norms and biases are divided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from workers.checkpoint.source import Header, ModelSource
from workers.errors import CheckpointError
from workers.numerics.smoothing import scaled
from workers.spec.checkpoint_files import CheckpointFiles


class Folded:
    """A checkpoint (a ``source.TensorSource``) with the scales in ``folder`` applied; unchanged if there are none.

    Raises:
        CheckpointError: there are scales for tensors that the source lacks.
    """

    def __init__(self, source: ModelSource, folder: Path, transposed: frozenset[str]) -> None:
        self._source = source
        self._transposed = transposed
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as reader:
                self._files |= dict.fromkeys(reader.keys(), path)
        unknown = sorted(key for key in self.changed if key not in source.headers)
        if unknown:
            raise CheckpointError(f"{folder}: scales for tensors that the source lacks: {unknown[:3]}; make it again")

    @property
    def changed(self) -> frozenset[str]:
        """Keys of the tensors that differ from the source's."""
        return frozenset(name.partition("|")[2] for name in self._files)

    @property
    def headers(self) -> Mapping[str, Header]:
        """Shape and dtype of every tensor, as the source stores it."""
        return self._source.headers

    @property
    def files(self) -> CheckpointFiles:
        """The source's files."""
        return self._source.files

    @property
    def folder(self) -> Path:
        """The source's folder."""
        return self._source.folder

    @property
    def bytes(self) -> int:
        """Bytes of the source's weight files."""
        return self._source.bytes

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU; a matrix that is scaled before rounding in float32."""
        replaced = self._folded_tensor("replaced", name)
        if replaced is not None:
            return replaced
        columns_I, rows_O = self._folded_tensor("columns", name), self._folded_tensor("rows", name)
        tensor = self._source.read(name)
        if columns_I is None and rows_O is None:
            return tensor
        if tensor.dim() == 1:
            assert rows_O is not None, "vectors have no columns"
            return (tensor.float() / rows_O).to(tensor.dtype)
        if name in self._transposed:
            return scaled(tensor.T, columns_I, rows_O).T.contiguous()
        return scaled(tensor, columns_I, rows_O)

    def _folded_tensor(self, kind: str, name: str) -> Tensor | None:
        path = self._files.get(f"{kind}|{name}")
        if path is None:
            return None
        with safe_open(path, framework="pt") as reader:
            tensor: Tensor = reader.get_tensor(f"{kind}|{name}")
        return tensor
