"""How much of a network is quantized: of its weights, and of the products that they take part in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from edgekit.quant.graph.passes import CONVOLUTIONS, TRANSPOSED, aten

LEAST_WEIGHTS = 0.1  # of all weights, below which quantizing is not worth a file …
LEAST_PRODUCTS = 0.5  # … unless so many of the multiplications are in int8

RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
# Layers that int8 leaves in float, because the runtimes have no int8 for them.
FLOAT_LAYERS = {
    aten.conv3d.default: "3-D convolution",
    aten.conv_transpose3d.input: "transposed 3-D convolution",
    aten.lstm.input: "LSTM",
    aten.gru.input: "GRU",
    aten.rnn_tanh.input: "RNN",
    aten.rnn_relu.input: "RNN",
}
PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, *RECURRENT}


@dataclass(frozen=True)
class Shares:
    """The parts, from 0 to 1, of the weights that are held as int8 and of the multiplications that are done in it.

    `left` counts the layers of FLOAT_LAYERS that are in float, by name.
    """

    weights: float
    products: float
    left: Counter[str]

    @property
    def worth_a_file(self) -> bool:
        """Whether quantizing changed enough for the files to be called by it."""
        return self.weights >= LEAST_WEIGHTS or self.products >= LEAST_PRODUCTS


def shares(program: ExportedProgram) -> Shares:
    """Returns how much of a converted `program` is quantized."""
    sizes: dict[str, tuple[int, bool]] = {}  # constant → its elements, and whether they are int8
    done = Counter[bool]()
    left: Counter[str] = Counter()
    constants = program.graph_signature.inputs_to_parameters | program.graph_signature.inputs_to_buffers
    for node in program.graph.nodes:
        if node.op != "call_function" or "dequantize" in str(node.target):
            continue
        for weight, stored in _weights(node, constants):
            quantized = stored.meta["val"].dtype == torch.int8
            sizes[constants[stored.name]] = stored.meta["val"].numel(), quantized
            integer = quantized and _is_dequantize(node.args[0])
            done[integer] += _products(node, weight)
            if not quantized and node.target in FLOAT_LAYERS and weight is stored:
                left[FLOAT_LAYERS[node.target]] += _first(node, weight)
    total = sum(size for size, _ in sizes.values())
    held = sum(size for size, quantized in sizes.values() if quantized)
    return Shares(held / max(total, 1), done[True] / max(done.total(), 1), left)


def left_in_float(layers: Counter[str], precision: str) -> tuple[str, ...]:
    """Returns a note that names the layers of FLOAT_LAYERS that `precision` leaves in float, if any."""
    if not layers:
        return ()
    named = " and ".join(f"{count} {name} layer{'s' if count > 1 else ''}" for name, count in layers.items())
    return (f"{precision} leaves {named} in float: the runtimes have no int8 for them",)


def _weights(node: Node, constants: dict[str, str]) -> Iterator[tuple[Node, Node]]:
    """Each constant of two dimensions or more that a node reads: as it reads it, and as it is stored."""
    for source in dict.fromkeys(_read(node)):
        stored = source.args[0] if _is_dequantize(source) else source
        if not isinstance(stored, Node) or stored.name not in constants:
            continue
        value = stored.meta["val"]
        if value.ndim > 1 and (value.is_floating_point() or value.dtype == torch.int8):
            yield source, stored


def _read(node: Node) -> list[Node]:
    """What may be a weight of a node: of a recurrent layer its parameters, not its first state."""
    read = node.args[2] if node.target in RECURRENT else (node.args, node.kwargs)
    return [each for each in pytree.tree_leaves(read) if isinstance(each, Node)]


def _is_dequantize(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and "dequantize" in str(node.target)


def _first(node: Node, weight: Node) -> bool:
    """Whether `weight` is the first constant of a node: each layer counts once."""
    matrices = [each for each in _read(node) if each.op == "placeholder"]
    weights = [a for a in matrices if a.meta["val"].ndim > 1 and a is not node.args[0]]
    return bool(weights) and weights[0] is weight


def _products(node: Node, weight: Node) -> int:
    """How many multiplications by a weight an inference takes."""
    size, result = weight.meta["val"].numel(), node.meta["val"]
    result = result[0] if isinstance(result, list | tuple) else result
    if node.target in CONVOLUTIONS:
        return result.numel() * size // weight.meta["val"].shape[0]
    if node.target in TRANSPOSED:
        return node.args[0].meta["val"].numel() * size // weight.meta["val"].shape[0]
    return size * max(result.numel() // result.shape[-1], 1) if node.target in PRODUCTS and result.ndim else 0
