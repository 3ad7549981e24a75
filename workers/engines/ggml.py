"""The maker of GGUF files: each tensor in the type that llama.cpp would choose, its codes solved under the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.checkpoint import imatrix
from workers.checkpoint.gguf_file import GgufWriter, Piece
from workers.checkpoint.source import ModelSource
from workers.engines.maker import Maker
from workers.errors import UnsupportedModel, UnsupportedRecipe
from workers.formats import gguf
from workers.methods import ggml
from workers.methods.layer import LayerWork
from workers.methods.scaling import some
from workers.model.loading import QuantizableWeight, StreamedModel
from workers.model.statistics import InputStatistics
from workers.spec.ggml import FILE_TYPES, IMATRIX, PROJECTOR, ModelFacts, choose, fallbacks, is_quantized
from workers.spec.job import ArtifactMade, Job, Order
from workers.spec.layers import Layout
from workers.spec.options import GgufOptions
from workers.spec.recipes import GgufRecipe
from workers.spec.schemes import GgmlScheme, GgufScheme

# Weight of the plain sum of squares beside what the first layer sees, as a share of its mean diagonal: the residual
# stream carries the error on. 0 and 0.3 were tried on llama-tiny (tests/bench/RESULTS.md).
RESIDUAL = 0.15
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Norms of the first layer, and the weights that multiply what they give.
FIRST_LAYER = {
    "blk.0.attn_norm.weight": tuple(f"blk.0.attn_{part}.weight" for part in ("q", "k", "v", "qkv")),
    "blk.0.ffn_norm.weight": tuple(f"blk.0.ffn_{part}.weight" for part in ("gate", "up", "gate_exps", "up_exps")),
}


class GgmlMaker(Maker):
    """Quantizes matrices to ggml's blocks, and writes one file."""

    def __init__(self, job: Job, order: Order, streamed: StreamedModel, source: ModelSource, partial: Path) -> None:
        super().__init__(job, order, streamed, source, partial)
        if not isinstance(order.recipe.scheme, GgufScheme):
            raise UnsupportedRecipe(f"recipe {order.recipe.name!r}: no mix of types; the plan sets it from the source")
        self._mix = order.recipe.scheme.mix
        self._calibration = job.calibration
        self._name = name = Path(job.model.id).name
        self._file = gguf.file_name(name, self._mix)
        towers = frozenset(streamed.towers)
        inside = {key: header for key, header in source.headers.items() if key not in towers}
        self._skeleton, notes = gguf.skeleton_of(source.folder, name, inside)
        self._pieces = {piece.key: piece for place in self._skeleton.places for piece in place.pieces}
        self._names = {piece.key: place.name for place in self._skeleton.places for piece in place.pieces}
        self._check_pieces()
        self._weights = {weight.key: weight for weight in streamed.weights}
        self._kinds = self._chosen()
        self.fallbacks |= dict.fromkeys(notes)

    def _check_pieces(self) -> None:
        """Refuse a model of which the file would lack a tensor."""
        streamed = self._streamed
        unused = {*streamed.unexpected, *streamed.unused, *streamed.towers}
        inside = [key for index in range(len(streamed.layers)) for key in streamed.keys_of_layer(index)]
        left = [key for key in (*streamed.outside_keys, *inside) if key not in self._pieces and key not in unused]
        if left:
            raise UnsupportedModel(
                f"gguf: llama.cpp's converter has no place for {some(left)} of this model; choose another format for it"
            )

    def _chosen(self) -> dict[str, str]:
        """The type of each quantized tensor by its key."""
        places = {place.name: place for place in self._skeleton.places if place.pieces}
        ignored = {
            name
            for name, place in places.items()
            if any(self.order.recipe.ignores(piece.key.removesuffix(".weight")) for piece in place.pieces)
        }
        widths = {name: p.shape[-1] for name, p in places.items() if is_quantized(name, len(p.shape))}
        chosen = choose(self._mix, widths, ModelFacts.of(self._streamed.model.config.to_dict()))
        chosen = {name: choice for name, choice in chosen.items() if name not in ignored}
        self.fallbacks |= dict.fromkeys(fallbacks(chosen))
        kinds = {name: choice.kind for name, choice in chosen.items() if choice is not None}
        return {piece.key: kind for name, kind in kinds.items() for piece in places[name].pieces}

    @property
    def _options(self) -> GgufOptions:
        assert isinstance(self.order.recipe, GgufRecipe)
        return self.order.recipe.options

    def layout(self) -> Layout:
        """The type of each quantized module."""
        return Layout.of({key.removesuffix(".weight"): GgmlScheme(kind=kind) for key, kind in self._kinds.items()})

    def quantization_config(self) -> dict[str, Any]:
        """The description of the file."""
        return gguf.quantization_config(self._file, self._mix)

    def layer(self, work: LayerWork) -> None:
        """Quantize one layer's matrices, and copy its other tensors."""
        matrices = []
        for key in self._streamed.keys_of_layer(work.index):
            if key not in self._kinds:
                self.copy({key: work.tensors.as_read[key]})
            elif key not in self._weights:
                self._uncalibrated(key, work.tensors.as_read[key])
            else:
                matrices.append(self._matrix(work, self._weights[key]))
                self._note_squares(key, matrices[-1].statistics)
        for blocks in ggml.code_layer(self._options, matrices, work.factors):
            self._put(self._pieces[blocks.weight.key], blocks.kind, blocks.raw_OR)
            self.fallbacks |= dict.fromkeys(blocks.notes)
        self._note_borrowing(work, [matrix.weight for matrix in matrices])

    def _note_squares(self, key: str, statistics: InputStatistics | None) -> None:
        """Put the importances of a matrix's inputs into the spool, from which ``finish`` writes their file."""
        if statistics is not None:
            self._write(f"{imatrix.SPOOLED}{key}", imatrix.squares(statistics.gram_II, statistics.count))

    def _write_imatrix(self, folder: Path, names: list[str], read: Callable[[str], Tensor]) -> None:
        """Write the importance matrix beside the file."""
        calibration = self._calibration
        known = {name.removeprefix(imatrix.SPOOLED) for name in names if name.startswith(imatrix.SPOOLED)}
        found = list(imatrix.matrices(self._skeleton.places, known))
        if calibration is None or not found:
            return
        described = imatrix.Described(
            datasets=tuple(
                name for dataset in calibration.datasets for name in dataset.public.data_files or (dataset.public.path,)
            ),
            chunks=calibration.samples,
            chunk_size=calibration.sequence_length,
        )
        imatrix.write(folder / IMATRIX, described, found, lambda key: read(f"{imatrix.SPOOLED}{key}"))

    def _matrix(self, work: LayerWork, weight: QuantizableWeight) -> ggml.Matrix:
        stored = work.tensors.placed[weight.key]
        matrix_OI = stored.T.contiguous() if weight.transposed else stored
        statistics = None if work.observer is None else work.observer.of(weight.input)
        return ggml.Matrix(weight, self._kinds[weight.key], matrix_OI, statistics)

    def outside(self, key: str) -> None:
        """Write one of the tensors outside of the layers that the file has a place for."""
        if key in self._streamed.towers:
            return
        tensor, kind = self._source.read(key), self._kinds.get(key)
        gram_II = None if kind is None else self._gram_outside(self._names[key], tensor.shape[1])
        if kind is None or gram_II is None:
            self._uncalibrated(key, tensor)
        else:
            self._put(self._pieces[key], kind, ggml.under(self._options, kind, key, tensor, gram_II))

    def _gram_outside(self, name: str, width: int) -> Tensor | None:
        """What the error of the embeddings or of the head counts under, float32 (I, I); None: of another matrix.

        The head's: X^T X of the last hidden states. The embeddings': W^T W of what the first layer multiplies by them,
        and a little for themselves. Where one matrix serves for both, the two in equal parts.
        """
        tied = HEAD not in self._names.values()
        parts = []
        if name == EMBEDDING and (first_II := self._first_layer(width)) is not None:
            parts += [first_II, RESIDUAL * torch.eye(width)]
        if self.final is not None and (name == HEAD or (name == EMBEDDING and tied)):
            final_II = self.final.gram_II.to("cpu", torch.float32)
            parts.append(final_II / final_II.diagonal().mean().clamp(min=1e-30))
        return torch.stack(parts).sum(0) if parts else None

    def _first_layer(self, width: int) -> Tensor | None:
        """W^T W of all that the first layer multiplies its normed inputs with, with a mean diagonal of one, float32.

        None: the layer has no norms of that width with the usual names.
        """
        places = {place.name: place for place in self._skeleton.places}
        gram_II, found = torch.zeros(width, width), False
        for norm, inputs in FIRST_LAYER.items():
            if norm not in places or places[norm].shape != (width,):
                continue
            (piece,) = places[norm].pieces
            norm_I = self._source.read(piece.key).float() + piece.shift
            for place in (places[name] for name in inputs if name in places):
                for piece in place.pieces:
                    stored = self._source.read(piece.key).float()
                    matrix_OI = (stored.T if piece.transposed else stored) * norm_I
                    gram_II += matrix_OI.T @ matrix_OI / len(place.pieces)
                    found = True
        return gram_II / gram_II.diagonal().mean().clamp(min=1e-30) if found else None

    def _uncalibrated(self, key: str, tensor: Tensor) -> None:
        """Encode a matrix that nothing is calibrated for, by least squared error, or copy a tensor."""
        piece, kind = self._pieces.get(key), self._kinds.get(key)
        if piece is None:
            return
        if kind is None:
            self.copy({key: tensor})
        else:
            matrix_OI = tensor.T if piece.transposed else tensor
            self._put(piece, kind, ggml.least_squares(self._options, kind, key, matrix_OI))

    def _put(self, piece: Piece, kind: str, raw_OR: Tensor) -> None:
        self.put(piece.key.removesuffix(".weight"), {gguf.suffix(kind, transposed=piece.transposed): raw_OR})

    def _write_projector(self) -> None:
        """Let llama.cpp's converter write the towers and the projector beside the file, or note that it can't."""
        out = self._partial / f"{PROJECTOR}{self._name}-F16.gguf"
        why = gguf.write_projector(self._source.folder, self._name, out)
        if why is None:
            note = f"towers and projector are in {out.name}, in float16 by llama.cpp's converter, and weren't checked"
        else:
            out.unlink(missing_ok=True)
            note = (
                "towers and projector aren't here: this is the text model alone, and llama.cpp's converter makes no "
                f"projector of this checkpoint ({why}); with one of its own naming, make it with "
                "`convert_hf_to_gguf.py --mmproj`"
            )
        self.fallbacks[note] = None

    def finish(self) -> ArtifactMade:
        """Write the tensors outside of the layers, then the file, and move the artifact to its final path."""
        if self._streamed.towers:
            self._write_projector()
        assert isinstance(self._shards, GgufWriter)
        self._shards.describe(self._skeleton, self._file, FILE_TYPES[self._mix].number, self._write_imatrix)
        return super().finish()
