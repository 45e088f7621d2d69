"""What the readers of the three formats find in a file, in one shape, and the counts that follow from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgekit.types import TensorSpec

Kind = Literal["int8", "float", "quantize", "dequantize", "requantize", "move", "other"]

FLOATS = {"float16", "bfloat16", "float32", "float64"}
INTEGERS = {"int8", "uint8", "int16", "uint16"}  # that activations are quantized to


@dataclass(frozen=True)
class QParams:
    """How the real values of an input or output map to integers: real = scale · (code − zero_point)."""

    dtype: str
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Node:
    """One op of a file, in execution order, and the values that it reads and writes (constants left out).

    `kind` is `int8` or `float` for arithmetic on activations; `quantize`, `dequantize` and `requantize` change their
    representation; `move` only rearranges or copies; `other` does not touch activations (constants, shapes, indices).
    """

    op: str
    kind: Kind
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """What one file holds. `graphs` are lists of nodes in execution order; `delegates` counts each backend's parts.

    `weight_files` are the places of weights that lie in other files, as this one names them, from its own folder.
    """

    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    qparams: dict[str, QParams]
    graphs: tuple[tuple[Node, ...], ...]
    parameter_bytes: dict[str, int]
    delegates: dict[str, int]
    undelegated: dict[str, int]
    notes: tuple[str, ...]
    weight_files: tuple[str, ...] = ()

    def ops(self) -> dict[str, int]:
        """Returns op → how many there are, the most frequent first."""
        counts = Counter(node.op for graph in self.graphs for node in graph)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def count(self, kind: Kind) -> int:
        """Returns how many nodes are of this kind."""
        return sum(node.kind == kind for graph in self.graphs for node in graph)


def float_islands(nodes: Sequence[Node]) -> list[list[str]]:
    """Returns the op names of each connected group of float arithmetic between quantized parts of one graph.

    A group counts where it depends on something dequantized and something quantized depends on it: a float head or
    tail of the network is no island.
    """
    below: set[str] = set()
    for node in nodes:
        if node.kind == "dequantize" or (node.kind not in ("quantize", "int8") and below.intersection(node.reads)):
            below.update(node.writes)
    above: set[str] = set()
    inside: list[Node] = []
    for node in reversed(nodes):
        leads = bool(above.intersection(node.writes))
        if node.kind == "quantize" or (leads and node.kind not in ("dequantize", "int8")):
            above.update(node.reads)
        if leads and node.kind in ("float", "move") and below.intersection(node.writes):
            inside.append(node)
    names = [[node.op for node in group if node.kind == "float"] for group in _connected(inside[::-1])]
    return [group for group in names if group]


def _connected(nodes: Sequence[Node]) -> list[list[Node]]:
    """Groups nodes that hand values to each other, in order of their first node."""
    groups: list[tuple[set[str], list[Node]]] = []
    for node in nodes:
        touching = [group for group in groups if group[0].intersection(node.reads)]
        values, members = set(node.writes), [node]
        for group in touching:
            values |= group[0]
            members = group[1] + members if group is touching[0] else [*members[:-1], *group[1], node]
            groups.remove(group)
        groups.append((values, members))
    order = {id(node): index for index, node in enumerate(nodes)}
    return [sorted(members, key=lambda node: order[id(node)]) for _, members in groups]
