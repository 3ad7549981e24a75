"""The makers of ``method: keep``: the codes of a source that is quantized already, stored in another format."""

from __future__ import annotations

from workers.engines.ggml import GgmlMaker
from workers.engines.maker import Maker
from workers.engines.stored import StoredMaker
from workers.errors import UnsupportedRecipe
from workers.formats.kept import KeptSource, blocks, converted
from workers.methods.layer import LayerWork
from workers.model.loading import QuantizableWeight
from workers.spec.formats import GGUF
from workers.spec.kept import schemes_in
from workers.spec.recipes import KeepRecipe, Recipe
from workers.spec.schemes import GgmlScheme, IntScheme, LinearScheme


def maker_of(recipe: Recipe) -> type[Maker]:
    """The maker for a recipe's format."""
    return KeepInOneFile if recipe.format == GGUF.name else KeepMaker


def _schemes(maker: Maker, source: object, weights: dict[str, QuantizableWeight]) -> dict[str, IntScheme | GgmlScheme]:
    """The scheme of each quantized weight in the recipe's format, by checkpoint key.

    Raises:
        UnsupportedRecipe: the format would lose something, or quantized modules aren't layers of the model.
    """
    recipe = maker.order.recipe
    assert isinstance(recipe, KeepRecipe)
    if not isinstance(source, KeptSource):
        raise UnsupportedRecipe(
            f"recipe {recipe.name!r}: method keep converts a checkpoint that is quantized already, and this one isn't"
        )
    found = schemes_in(source.kept, recipe.format)
    if isinstance(found, str):
        raise UnsupportedRecipe(f"recipe {recipe.name!r}: {recipe.format} would lose {found}")
    strange = [module for module in found if f"{module}.weight" not in weights]
    if strange:
        raise UnsupportedRecipe(
            f"recipe {recipe.name!r}: {strange[0]} is quantized, but isn't a linear layer that can be streamed; name "
            "the original checkpoint"
        )
    conv1d = [module for module in found if weights[f"{module}.weight"].transposed]
    if conv1d:
        raise UnsupportedRecipe(f"recipe {recipe.name!r}: {conv1d[0]} is a Conv1D, whose codes aren't converted")
    return {f"{module}.weight": scheme for module, scheme in found.items()}


class KeepMaker(StoredMaker):
    """Stores the source's codes by the codec of another format."""

    def _chosen(self) -> tuple[dict[str, QuantizableWeight], dict[str, LinearScheme]]:
        weights = {weight.key: weight for weight in self._streamed.weights}
        found = _schemes(self, self._source, weights)
        return weights, {key: scheme for key, scheme in found.items() if isinstance(scheme, IntScheme)}

    def layer(self, work: LayerWork) -> None:
        """Store one layer's codes, and copy its other tensors."""
        assert isinstance(self._source, KeptSource)
        self._stacks = {}
        for key in self._streamed.keys_of_layer(work.index):
            scheme = self._schemes.get(key)
            if not isinstance(scheme, IntScheme):
                self.copy({key: work.tensors.as_read[key]})
                continue
            module = self._weights[key].module
            weight = converted(module, self._source.codes(module), scheme, self.order.recipe.format)
            self.put(module, self._encode(weight, scheme))
        self._write_stacks()


class KeepInOneFile(GgmlMaker):
    """Stores the source's codes as Q4_0 and Q8_0 in one GGUF file."""

    def _chosen(self) -> dict[str, str]:
        found = _schemes(self, self._source, self._weights)
        return {key: scheme.kind for key, scheme in found.items() if isinstance(scheme, GgmlScheme)}

    def layer(self, work: LayerWork) -> None:
        """Store one layer's codes, and copy its other tensors."""
        assert isinstance(self._source, KeptSource)
        for key in self._streamed.keys_of_layer(work.index):
            if key not in self._kinds:
                self.copy({key: work.tensors.as_read[key]})
            else:
                module = key.removesuffix(".weight")
                self._put(
                    self._pieces[key], self._kinds[key], blocks(module, self._source.codes(module), self._kinds[key])
                )

    def outside(self, key: str) -> None:
        """Copy one of the tensors outside of the layers that the file has a place for."""
        if key in self._pieces:
            self.copy({key: self._source.read(key)})
