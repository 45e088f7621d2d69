"""Constant folding: what does not depend on a network's inputs is computed once, before quantization and export.

Computed weights (weight and spectral norm, parametrizations, weight standardization), position tables, masks and
planes of coordinates then are constants like any other: weights among them are quantized, and BatchNorms fold into
them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from edgekit.quant.graph.fx import add_attribute, attribute, read_attribute

aten = torch.ops.aten

MOST_ADDED = 512 * 1024  # bytes that all folded constants together may add to the file of a small network
SHARE_ADDED = 0.25  # of the bytes of all constants, that they may add to that of a large one
MOST_COMPUTED = 256 * 2**20  # bytes of a result on the way: a larger one stays in the graph
# Of their first argument these take the shape alone.
LIKES = {
    getattr(aten, name).default
    for name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
}
# What makes codes of numbers, or numbers of codes, is how a constant is stored.
STORAGE = ("quantized_decomposed", "torchao", "quantized")


def fold_constants(model: GraphModule) -> None:
    """Puts a buffer in the place of each computed value that no input reaches and that something else reads.

    Values stay computed where they would make the file larger than MOST_ADDED and SHARE_ADDED allow (a small constant
    that is broadcast over an image, say), where the model returns them, and where they are random or made of a buffer
    that the model writes to.
    """
    constants = _constants(model)
    folded = _Folded(model, constants)
    for node in list(constants):
        if any(user not in constants for user in node.users):
            folded.fold(node)
    folded.put_in()


def written(model: GraphModule) -> set[str]:
    """Returns the names of the buffers that the graph writes to: they hold a state."""
    found = set()
    for node in model.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and (schema is None or schema.is_mutable):
            places = node.args if schema is None else _written_arguments(node)
            found |= {str(place.target) for place in places if isinstance(place, Node) and place.op == "get_attr"}
    return found


def _written_arguments(node: Node) -> Iterator[Any]:
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)


def _constants(model: GraphModule) -> dict[Node, None]:
    """Returns the nodes, in order, that read and compute what no input reaches."""
    states = written(model)
    found: dict[Node, None] = {}
    for node in model.graph.nodes:
        if node.op == "get_attr":
            constant = str(node.target) not in states and isinstance(read_attribute(model, node), torch.Tensor)
        else:
            constant = _is_pure(node) and all(source in found for source in _read(node))
        if constant:
            found[node] = None
    return found


def _is_pure(node: Node) -> bool:
    """Whether a node always gives the same result for the same arguments, and one that can be computed here."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace in STORAGE:
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and not node.target._schema.is_mutable and _size(node) <= MOST_COMPUTED


def _read(node: Node) -> list[Node]:
    """The nodes whose values a node depends on."""
    return [] if node.target in LIKES else node.all_input_nodes


def _size(node: Node) -> int:
    """The bytes of what a node gives."""
    value = node.meta.get("val")
    parts = value if isinstance(value, list | tuple) else [value]
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, torch.Tensor))


class _Folded:
    """The values that are to be stored, node by node, and what they may still add to the file."""

    def __init__(self, model: GraphModule, constants: dict[Node, None]) -> None:
        self.model, self.constants = model, constants
        self.values: dict[Node, torch.Tensor] = {}
        sizes: dict[str, int] = {}
        readers: dict[str, set[Node]] = {}
        for node in model.graph.nodes:
            if node.op == "get_attr" and node in constants:
                sizes[str(node.target)] = _size(node)
                readers.setdefault(str(node.target), set()).update(node.users)
        # A constant that nothing else reads makes room for what is computed of it.
        self.freed = {name: sizes[name] for name, users in readers.items() if all(user in constants for user in users)}
        self.left = max(MOST_ADDED, SHARE_ADDED * sum(sizes.values()))

    def fold(self, node: Node) -> None:
        """Takes the value of `node`, or of what it is computed of where that would add too much."""
        if node.op == "get_attr" or node in self.values:
            return
        result = node.meta.get("val")
        if isinstance(result, torch.Tensor) and not any(user.op == "output" for user in node.users):
            sources = list(dict.fromkeys(self._sources(node)))
            added = _size(node) - sum(self.freed.get(name, 0) for name in sources)
            if added <= self.left:
                self.left -= max(added, 0)
                for name in sources:
                    self.freed.pop(name, None)
                self.values[node] = self._compute(node, {})
                return
        for source in _read(node):
            self.fold(source)

    def _sources(self, node: Node) -> Iterator[str]:
        """The names of the constants that `node` is computed of."""
        pending, seen = [node], {node}
        while pending:
            current = pending.pop()
            if current.op == "get_attr":
                yield str(current.target)
            fresh = [source for source in _read(current) if source not in seen]
            seen.update(fresh)
            pending += fresh

    @torch.no_grad()
    def _compute(self, node: Node, known: dict[Node, Any]) -> Any:
        """Returns what `node` gives; computes what that takes, in the order of the graph."""
        needed = {node}
        for before in reversed(list(self.constants)):
            if before in needed and before not in self.values:
                needed.update(_read(before))
        for current in self.constants:
            if current in needed:
                known[current] = self._value(current, known)
            if current is node:
                break
        return known[node]

    def _value(self, node: Node, known: dict[Node, Any]) -> Any:
        if node in self.values:
            return self.values[node]
        if node.op == "get_attr":
            return attribute(self.model, node)
        if node.target in LIKES:
            like = node.args[0].meta["val"]
            known = {**known, node.args[0]: torch.empty((), dtype=like.dtype).expand(like.shape)}
        return node.target(*map_arg(node.args, known.__getitem__), **map_arg(node.kwargs, known.__getitem__))

    def put_in(self) -> None:
        """Lets the graph read the stored values."""
        for node, value in self.values.items():
            with self.model.graph.inserting_before(node):
                own = add_attribute(
                    self.model, f"{node.name}_constant", value.clone(memory_format=torch.contiguous_format)
                )
            own.meta.update({key: note for key, note in node.meta.items() if key != "val"})
            node.replace_all_uses_with(own)
