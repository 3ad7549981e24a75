"""YAML within limits of depth and of what its aliases multiply to, without duplicate keys."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import yaml

from workers.spec.bounds import DEPTH

# Most values of a file, aliases written out.
NODES = 2_000_000
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, several times as fast, where it's there


class BadYaml(ValueError):
    """The text isn't YAML, or beyond the limits."""


def parse_yaml(text: str) -> object:
    """The content of a YAML text; None if it's empty.

    Raises:
        BadYaml: no YAML, a key given twice, or beyond the limits.
    """
    try:
        _check_depth(text)
        loader = _UniqueKeys(text)
        try:
            # Nodes first: aliases share them, while the values built of them would be walked as copies.
            node = loader.get_single_node()
            _check_aliases(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except BadYaml:
        raise
    except yaml.MarkedYAMLError as error:
        raise BadYaml(f"not a readable YAML file: {_marked(error, text)}") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise BadYaml(f"not a readable YAML file: {' '.join(str(error).split())}; correct it there") from error


def _marked(error: yaml.MarkedYAMLError, text: str) -> str:
    """Where a YAML text stops to be one, what stands there, and the remedy."""
    mark, problem = error.problem_mark or error.context_mark, error.problem or "it can't be read"
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    got = f", got {line.strip()[:60]!r}" if line.strip() else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or "\\t" in problem:
        return f"{where}a tab{got}; YAML is indented by spaces alone: replace the tab by spaces"
    remedy = next((hint for words, hint in _REMEDIES.items() if words in problem), "correct it there")
    return f"{where}{problem}{got}; {remedy}"


_REMEDIES = {
    "mapping values are not allowed": "a text with ': ' in it is put in quotes; keys of a mapping begin in one column",
    "',' or": "close the bracket, or put a comma between its parts",
    "is given twice": "keep one of them",
    "did not find expected <document start>": "begin every line of a mapping with 'key:'",
    "could not find expected ':'": "write it as 'key: value'",
    "undefined alias": "a text that begins with '*' is put in quotes",
    "cannot start any token": "put the text in quotes",
}


def _check_depth(text: str) -> None:
    """Refuse deep nesting before a parser recurses into it."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise BadYaml(f"nested deeper than {DEPTH} levels; write it flatter")


def _check_aliases(root: yaml.Node | None) -> None:
    """Refuse aliases that contain themselves, or multiply to more than NODES."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise BadYaml(f"line {node.start_mark.line + 1}: an alias contains itself; write it out")
            return sizes[id(node)]
        sizes[id(node)] = 0  # while it's being counted
        sizes[id(node)] = total = 1 + sum(size(child) for child in _children(node))
        if total > NODES:
            raise BadYaml(f"its aliases multiply to more than {NODES} values; write out what is meant")
        return total

    if root is not None:
        size(root)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    """The nodes inside of a node: keys and values of a mapping, or items of a list."""
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


class _UniqueKeys(_Loader):  # type: ignore[misc, valid-type]
    """YAML loader that rejects duplicate keys instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key in seen:
                what = "is given twice" if isinstance(key, Hashable) else "is no text"
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} {what}", node.start_mark)
            seen.add(key)
        mapping: dict[object, object] = super().construct_mapping(node, deep)
        return mapping
