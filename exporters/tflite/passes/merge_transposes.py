"""Merge chains of reshapes and transposes: split the axes, permute the parts, and join them, which moves data once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgekit.exporters.tflite.ir import Graph, Info, Node, Shape

RESHAPES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}


@dataclass(eq=False)
class _Part:
    """A factor of an axis of the first value of a chain."""

    axis: int
    size: int


class _Moved:
    """The parts of a value in their first order and in their present one, and its present shape."""

    def __init__(self, shape: Shape) -> None:
        self.first = [_Part(axis, size) for axis, size in enumerate(shape) if size != 1]
        self.now = [*self.first]
        self.shape = shape

    def reshape(self, shape: Shape) -> bool:
        """Split parts where the new axes begin; False where a part does not divide so."""
        if 0 in shape or 0 in self.shape:
            return False
        rest = [*self.now]
        cuts: list[tuple[_Part, _Part, _Part]] = []
        now: list[_Part] = []
        for size in shape:
            while size > 1:
                part = rest.pop(0)
                if part.size > size:
                    if part.size % size:
                        return False
                    outer, inner = _Part(part.axis, size), _Part(part.axis, part.size // size)
                    cuts.append((part, outer, inner))
                    rest.insert(0, inner)
                    part = outer
                elif size % part.size:
                    return False
                size //= part.size
                now.append(part)
        for part, outer, inner in cuts:
            place = self.first.index(part)
            self.first[place : place + 1] = [outer, inner]
        self.now, self.shape = now, shape
        return True

    def transpose(self, perm: list[int]) -> None:
        """Reorder the axes with all their parts."""
        rest, groups = [*self.now], []
        for size in self.shape:
            group: list[_Part] = []
            while math.prod(part.size for part in group) < size:
                group.append(rest.pop(0))
            groups.append(group)
        self.now = [part for axis in perm for part in groups[axis]]
        self.shape = tuple(self.shape[axis] for axis in perm)

    def order(self) -> tuple[Shape, list[int]]:
        """Sizes of the parts in their first order, with neighbors joined that stay so, and their present order."""
        runs: list[list[_Part]] = []
        for part in self.first:
            last = runs[-1][-1] if runs else None
            if last is not None and last.axis == part.axis and self.now.index(last) + 1 == self.now.index(part):
                runs[-1].append(part)
            else:
                runs.append([part])
        by_place = sorted(range(len(runs)), key=lambda run: self.now.index(runs[run][0]))
        return tuple(math.prod(part.size for part in run) for run in runs), by_place


def merge_moves(graph: Graph) -> None:
    """Replace each chain with more than one reshape or transpose inside by reshape, transpose and reshape."""
    readers = graph.readers()
    done: set[int] = set()
    nodes: list[Node] = []
    for node in graph.nodes:
        if id(node) in done:
            continue
        chain = _chain(graph, readers, node)
        moved = _moved(graph, chain) if len(chain) > 2 else None
        if moved is None:
            nodes.append(node)
            continue
        done.update(map(id, chain))
        nodes += _rewritten(graph, chain, moved)
    graph.nodes = nodes


def _chain(graph: Graph, readers: dict[str, list[Node]], node: Node) -> list[Node]:
    chain: list[Node] = []
    while node.op in RESHAPES or node.op == "Transpose":
        chain.append(node)
        output = node.outputs[0]
        following = readers.get(output, [])
        if len(following) != 1 or output in graph.outputs or following[0].inputs[0] != output:
            break
        node = following[0]
        if graph.held.get(node.outputs[0]) != graph.held.get(output):
            break
    return chain


def _moved(graph: Graph, chain: list[Node]) -> _Moved | None:
    """What a chain does to its input, or None where that is no more than splitting, permuting and joining once."""
    moved = _Moved(graph.info[chain[0].inputs[0]].shape)
    for node in chain:
        if node.op == "Transpose":
            rank = len(moved.shape)
            moved.transpose(list(node.attrs.get("perm", range(rank)[::-1])))
        elif not moved.reshape(graph.info[node.outputs[0]].shape):
            return None
    return moved


def _rewritten(graph: Graph, chain: list[Node], moved: _Moved) -> list[Node]:
    name, source, target = chain[-1].name, chain[0].inputs[0], chain[-1].outputs[0]
    parts, order = moved.order()
    dtype = graph.info[source].dtype
    held = graph.held.get(target)
    steps: list[tuple[str, Shape, dict[str, list[int]]]] = []
    if parts != graph.info[source].shape:
        steps.append(("Reshape", parts, {}))
    if order != sorted(order):
        steps.append(("Transpose", tuple(parts[place] for place in order), {"perm": order}))
    if not steps or steps[-1][1] != moved.shape:
        steps.append(("Reshape", moved.shape, {}))
    nodes = []
    for number, (op, shape, attrs) in enumerate(steps):
        output = target if number == len(steps) - 1 else f"{target}_{op.lower()}{number}"
        while output != target and output in graph.info:
            output += "_"
        graph.info[output] = Info(shape, np.dtype(dtype))
        if held is not None:
            graph.held[output] = held
        nodes.append(Node(op, name, [source], [output], dict(attrs)))
        source = output
    return nodes
