"""Recurrent cells to recurrent layers: a loop over an LSTMCell, GRUCell or RNNCell is one op over a sequence.

Written in Python, such a loop is unrolled when a model is captured: 160 steps are 160 cells. Runtimes have one op, or a
loop, for a whole sequence, and quantization counts its weights once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten

# cell → the op that runs it over a sequence
LAYERS = {
    aten.lstm_cell.default: aten.lstm.input,
    aten.gru_cell.default: aten.gru.input,
    aten.rnn_tanh_cell.default: aten.rnn_tanh.input,
    aten.rnn_relu_cell.default: aten.rnn_relu.input,
}


@dataclass
class _Cell:
    """A node of LAYERS: what it reads, and the nodes of its states after it."""

    node: Node
    x: Node
    before: list[Node]
    weights: list[Node]
    after: list[Node | None] = field(default_factory=list)


def cells_to_layers(model: GraphModule) -> None:
    """Spells each chain of cells, of which one continues the other, as one recurrent layer."""
    cells = [cell for node in model.graph.nodes if (cell := _read(node)) is not None]
    if not cells:
        return
    for chain in _chains(model.graph, cells):
        # Read anew: other chains may have replaced what these cells read.
        _replace(model, [cell for old in chain if (cell := _read(old.node)) is not None])
    _sort(model.graph)


def _read(node: Node) -> _Cell | None:
    if node.target not in LAYERS or node.kwargs:
        return None
    x, state, *weights = node.args
    biases = [bias for bias in weights[2:] if bias is not None]
    if x.meta["val"].ndim != 2 or len(biases) == 1:
        return None
    cell = _Cell(node, x, [*state] if isinstance(state, (list, tuple)) else [state], [*weights[:2], *biases])
    if node.target != aten.lstm_cell.default:
        cell.after = [node]
        return cell
    parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    cell.after = [parts.get(0), parts.get(1)]
    return cell if len(parts) == len(node.users) else None


def _chains(graph: Graph, cells: Sequence[_Cell]) -> list[list[_Cell]]:
    """Groups cells that continue one another, in order; no cell's input depends on another of its chain."""
    bits = {cell.node: 1 << index for index, cell in enumerate(cells)}
    above: dict[Node, int] = {}  # node → the cells that it depends on
    for node in graph.nodes:
        above[node] = bits.get(node, 0)
        for source in node.all_input_nodes:
            above[node] |= above[source]
    chains: list[list[_Cell]] = []
    ends: dict[Node, list[_Cell]] = {}  # the first state after a chain → the chain
    for cell in cells:
        chain = ends.get(cell.before[0])
        if chain is None or not _continues(cell, chain, above, bits):
            chain = []
            chains.append(chain)
        chain.append(cell)
        for end in [end for end, other in ends.items() if other is chain]:
            del ends[end]
        if cell.after[0] is not None:
            ends[cell.after[0]] = chain
    return chains


def _continues(cell: _Cell, chain: Sequence[_Cell], above: dict[Node, int], bits: dict[Node, int]) -> bool:
    last = chain[-1]
    own = sum(bits[other.node] for other in chain)
    return (
        cell.node.target == last.node.target
        and cell.before == last.after
        and [w.target for w in cell.weights] == [w.target for w in last.weights]
        and all(w.op == "get_attr" for w in cell.weights)
        and not above[cell.x] & own
        # A layer gives only the last of its second state.
        and all(set(state.users) == {cell.node} for state in last.after[1:] if state is not None)
    )


def _replace(model: GraphModule, chain: Sequence[_Cell]) -> None:
    first, last, steps = chain[0], chain[-1], len(chain)
    batch, hidden = first.before[0].meta["val"].shape
    with model.graph.inserting_before(last.node):
        sequence = _sequence(model.graph, [cell.x for cell in chain])
        states = [_call(model.graph, aten.unsqueeze.default, state, 0) for state in first.before]
        biased = len(first.weights) > 2
        lstm = first.node.target == aten.lstm_cell.default
        hx = states if lstm else states[0]
        options = (biased, 1, 0.0, False, False, False)
        layer = model.graph.call_function(LAYERS[first.node.target], (sequence, hx, last.weights, *options))
        like = first.before[0].meta["val"]
        ends = [like.new_empty(1, *state.meta["val"].shape) for state in first.before]
        layer.meta["val"] = (like.new_empty(steps, batch, hidden), *ends)
        y, *lasts = [_call(model.graph, operator.getitem, layer, index) for index in range(1 + len(states))]
        for index, cell in enumerate(chain):
            if cell.after[0] is not None:
                cell.after[0].replace_all_uses_with(_call(model.graph, aten.select.int, y, 0, index))
        if lstm and last.after[1] is not None:
            last.after[1].replace_all_uses_with(_call(model.graph, aten.select.int, lasts[1], 0, 0))


def _sequence(graph: Graph, steps: Sequence[Node]) -> Node:
    """The inputs of all steps as one tensor: what they were taken from, where they are all of it in order."""
    taken = [_taken(step) for step in steps]
    source, dim = taken[0][:2] if taken[0] is not None else (None, 0)
    if source is not None and taken == [(source, dim, index) for index in range(source.meta["val"].shape[dim])]:
        return source if dim == 0 else _call(graph, aten.transpose.int, source, 0, dim)
    if len(steps) == 1:
        return _call(graph, aten.unsqueeze.default, steps[0], 0)
    return _call(graph, aten.stack.default, list(steps), 0)


def _taken(step: Node) -> tuple[Node, int, int] | None:
    """What tensor of three dimensions a step is taken from, along which of its first two, and where."""
    if step.target is operator.getitem and step.args[0].target == aten.unbind.int:
        source, index = step.args[0].args[0], step.args[1]
        dim = step.args[0].args[1] if len(step.args[0].args) > 1 else 0
    elif step.target == aten.select.int:
        source, dim, index = step.args
    else:
        return None
    shape = source.meta["val"].shape
    dim %= len(shape)
    return (source, dim, index % shape[dim]) if len(shape) == 3 and dim < 2 else None


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    node = graph.call_function(target, args)
    values = torch.fx.node.map_arg(args, lambda arg: arg.meta["val"])
    node.meta["val"] = target(*values)
    return node


def _sort(graph: Graph) -> None:
    """Puts nodes behind what they read, and else leaves their order."""
    end, seen = graph.output_node(), set()
    for root in list(graph.nodes):
        pending = [root]
        while pending:
            node = pending[-1]
            missing = [source for source in node.all_input_nodes if source not in seen]
            if not missing or node in seen:
                pending.pop()
                if node not in seen and node is not end:
                    seen.add(node)
                    end.prepend(node)
            else:
                pending.extend(missing)
