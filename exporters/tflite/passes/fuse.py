"""Graph passes before lowering: fold what TFLite computes in one op."""

from __future__ import annotations

import math

import numpy as np

from edgekit.exporters.tflite.builder import FLOAT
from edgekit.exporters.tflite.ir import Graph, Info, Node, unused
from edgekit.exporters.tflite.passes.merge_transposes import merge_moves

ACTIVATED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "AveragePool", "MaxPool",
             "BatchNormalization"}  # fmt: skip
BOUNDS = {(0.0, 6.0): "RELU6", (-1.0, 1.0): "RELU_N1_TO_1", (0.0, math.inf): "RELU"}


def fuse_activations(graph: Graph) -> None:
    """Fold, before quantization is read: batch normalization, biases, erf formulas, then activations."""
    _fold_batch_normalization(graph)
    _fuse_bias(graph)
    _fuse_gelu(graph)
    _fuse_hard_swish(graph)
    _fuse_relu(graph)


def fuse(graph: Graph) -> None:
    """Fold, once int8 values are known: constant padding into the convolution that reads it, limits of int8 values."""
    _fold_pad(graph)
    _fuse_limits(graph)
    _merge_slices(graph)
    merge_moves(graph)


def _only_reader(graph: Graph, readers: dict[str, list[Node]], name: str) -> Node | None:
    """The one node that reads a value once, if the value is not an output."""
    found = readers.get(name, [])
    return found[0] if len(found) == 1 and name not in graph.outputs else None


def _drop(graph: Graph, dead: list[Node]) -> None:
    gone = {id(node) for node in dead}
    graph.nodes = [node for node in graph.nodes if id(node) not in gone]


def _fuse_relu(graph: Graph) -> None:
    readers, dead = graph.readers(), []
    for node in graph.nodes:
        reader = _only_reader(graph, readers, node.outputs[0]) if node.op in ACTIVATED else None
        if reader is None or graph.info[node.outputs[0]].dtype != FLOAT:
            continue
        activation = _activation(graph, reader)
        if activation:
            node.activation, node.outputs[0] = activation, reader.outputs[0]
            dead.append(reader)
    _drop(graph, dead)


def _fuse_limits(graph: Graph) -> None:
    """Limit an int8 value in the op that makes it: rounding keeps order, so that the limits may come before it."""
    readers = graph.readers()
    for node in graph.nodes:
        output = node.outputs[0]
        if node.op not in ACTIVATED or node.activation != "NONE" or output not in graph.held:
            continue
        reader = _only_reader(graph, readers, output)
        activation = _activation(graph, reader) if reader is not None else None
        if reader is not None and activation:
            node.activation = activation
            # What is left of the reader is a change of parameters, or nothing.
            reader.op, reader.inputs = "Identity", [output]
            # The value itself is another one now, which no tensor of the model is.
            graph.stored = {name: value for name, value in graph.stored.items() if value != output}


def _activation(graph: Graph, node: Node) -> str | None:
    return "RELU" if node.op == "Relu" else _clip(graph, node) if node.op == "Clip" else None


def _clip(graph: Graph, node: Node) -> str | None:
    bounds = []
    for index, default in ((1, -math.inf), (2, math.inf)):
        array = (
            graph.array(node.inputs[index]) if len(node.inputs) > index and node.inputs[index] else np.array(default)
        )
        if array is None:
            return None
        bounds.append(float(array.reshape(())))
    return BOUNDS.get((bounds[0], bounds[1]))


def _fold_batch_normalization(graph: Graph) -> None:
    """Fold inference-time BatchNormalization into the weights and bias of the convolution before it."""
    producers, readers, dead = graph.producers(), graph.readers(), []
    for node in graph.nodes:
        conv = producers.get(node.inputs[0]) if node.op == "BatchNormalization" else None
        if conv is None or conv.op not in ("Conv", "ConvTranspose") or any(node.outputs[1:]):
            continue
        if _only_reader(graph, readers, conv.outputs[0]) is not node or node.attrs.get("training_mode"):
            continue
        weights = graph.array(conv.inputs[1])
        bias_name = conv.inputs[2] if len(conv.inputs) > 2 else ""
        bias = graph.array(bias_name) if bias_name else np.zeros(1, np.float32)
        parameters = [graph.array(name) for name in node.inputs[1:]]
        foldable = conv.op == "Conv" or conv.attrs.get("group", 1) == 1
        if weights is None or bias is None or conv.inputs[1] in graph.held or not foldable:
            continue
        if any(parameter is None for parameter in parameters):
            continue
        gamma, beta, mean, var = (array.astype(np.float64) for array in parameters if array is not None)
        factor = gamma / np.sqrt(var + node.attrs.get("epsilon", 1e-5))
        shape = [1] * weights.ndim
        shape[0 if conv.op == "Conv" else 1] = -1
        folded = (weights * factor.reshape(shape)).astype(graph.constants[conv.inputs[1]].dtype)
        conv.inputs = [
            conv.inputs[0],
            _constant(graph, f"{node.name}_weights", folded),
            _constant(graph, f"{node.name}_bias", ((bias - mean) * factor + beta).astype(np.float32)),
        ]
        conv.outputs[0] = node.outputs[0]
        dead.append(node)
    _drop(graph, dead)


def _constant(graph: Graph, name: str, stored: np.ndarray) -> str:
    """Adds a constant, and returns its name: `name`, or one like it where a value of the model is called so."""
    name = unused(name, graph.info)
    graph.constants[name] = stored
    graph.info[name] = Info(stored.shape, FLOAT if stored.dtype == np.float16 else stored.dtype)
    return name


def _fuse_bias(graph: Graph) -> None:
    """Turn MatMul(x, constant matrix) + constant row into a MatMul with a third input."""
    readers, dead = graph.readers(), []
    for node in graph.nodes:
        if node.op != "MatMul" or node.inputs[1] not in graph.constants or len(graph.info[node.inputs[1]].shape) != 2:
            continue
        reader = _only_reader(graph, readers, node.outputs[0])
        if reader is None or reader.op != "Add" or len(graph.info[node.outputs[0]].shape) < 2:
            continue
        row = next(name for name in reader.inputs if name != node.outputs[0])
        if row in graph.constants and graph.info[row].shape == graph.info[node.inputs[1]].shape[1:]:
            node.inputs.append(row)
            node.outputs[0] = reader.outputs[0]
            dead.append(reader)
    _drop(graph, dead)


def _number(graph: Graph, name: str) -> float | None:
    array = graph.array(name) if name else None
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def _is(value: float | None, wanted: float) -> bool:
    return value is not None and math.isclose(value, wanted, rel_tol=1e-5)


def _factors(graph: Graph, node: Node) -> tuple[list[str], float]:
    """The non-constant operands of a Mul or Div by a constant, and the product of the constants."""
    names, product = [], 1.0
    for index, name in enumerate(node.inputs):
        number = _number(graph, name)
        if number is None or (node.op == "Div" and index == 0):
            names.append(name)
        else:
            product *= 1 / number if node.op == "Div" and number else number
    return names, product


def _fuse_gelu(graph: Graph) -> None:
    """x · ½ · (1 + erf(x / √2)), in any order of its factors, is Gelu."""
    producers, readers, dead = graph.producers(), graph.readers(), []
    for node in list(graph.nodes):
        scale = producers.get(node.inputs[0]) if node.op == "Erf" else None
        if scale is None or scale.op not in ("Mul", "Div"):
            continue
        names, factor = _factors(graph, scale)
        plus = _only_reader(graph, readers, node.outputs[0])
        if len(names) != 1 or not _is(factor, math.sqrt(0.5)) or plus is None or plus.op != "Add":
            continue
        if not any(_is(_number(graph, name), 1.0) for name in plus.inputs):
            continue
        x, chain, product, seen = names[0], [node, plus], 1.0, False
        last = plus
        while not (seen and _is(product, 0.5)):
            step = _only_reader(graph, readers, last.outputs[0])
            if step is None or step.op not in ("Mul", "Div") or len(chain) > 4:
                break
            if step.op == "Div" and step.inputs[0] != last.outputs[0]:  # divided by it
                break
            others, number = _factors(graph, step)
            others.remove(last.outputs[0])
            half = producers.get(others[0]) if others else None
            if others and others[0] == x and not seen:
                seen = True
            elif half is not None and half.op in ("Mul", "Div") and _factors(graph, half)[0] == [x] and not seen:
                seen, number = True, number * _factors(graph, half)[1]
            elif others:
                break
            product *= number
            chain.append(step)
            last = step
        if seen and _is(product, 0.5):
            graph.nodes[graph.nodes.index(last)] = Node("Gelu", last.name, [x], [last.outputs[0]])
            dead += chain
    _drop(graph, dead)


def _fuse_hard_swish(graph: Graph) -> None:
    """x · HardSigmoid(x) with slope 1/6 and offset 1/2 is HardSwish."""
    readers, dead = graph.readers(), []
    for node in graph.nodes:
        if node.op != "HardSigmoid" or not _is(node.attrs.get("alpha", 0.2), 1 / 6):
            continue
        product = _only_reader(graph, readers, node.outputs[0])
        if product is None or product.op != "Mul" or not _is(node.attrs.get("beta", 0.5), 0.5):
            continue
        if node.inputs[0] in product.inputs:
            product.op, product.inputs = "HardSwish", [node.inputs[0]]
            dead.append(node)
    _drop(graph, dead)


def _fold_pad(graph: Graph) -> None:
    """Let a convolution pad by itself where a Pad adds zeros around its spatial axes.

    A padded value held as int8 is quantized first and then padded, which is the same.
    """
    readers = graph.readers()
    nodes: list[Node] = []
    for node in graph.nodes:
        conv = _only_reader(graph, readers, node.outputs[0]) if node.op == "Pad" else None
        pads = _spatial_pads(graph, node, conv) if conv is not None else None
        if conv is None or pads is None:
            nodes.append(node)
            continue
        conv.attrs["pads"] = pads
        q = graph.held.get(node.outputs[0])
        if q is None or q == graph.held.get(node.inputs[0]):
            conv.inputs[0] = node.inputs[0]
        else:
            graph.info[node.outputs[0]] = graph.info[node.inputs[0]]
            nodes.append(Node("Quantize", node.name, node.inputs[:1], node.outputs, qparams=q))
    graph.nodes = nodes


def _spatial_pads(graph: Graph, node: Node, conv: Node) -> list[int] | None:
    """The pads of the convolution with those of a Pad node added, or None if it does more than add zeros around."""
    amounts = graph.array(node.inputs[1])
    value = _number(graph, node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else 0.0
    axes = graph.array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else None
    plain = node.attrs.get("mode", "constant") == "constant" and value == 0
    if conv.op != "Conv" or conv.inputs[0] != node.outputs[0] or conv.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        return None
    if amounts is None or not plain:
        return None
    rank = len(graph.info[node.inputs[0]].shape)
    table = np.zeros((2, rank), np.int64)
    table[:, list(range(rank)) if axes is None else axes] = amounts.reshape(2, -1)
    if table.min() < 0 or table[:, :2].any():
        return None
    pads = conv.attrs.get("pads", [0] * (2 * (rank - 2)))
    return [int(a + p) for a, p in zip(table[:, 2:].reshape(-1), pads, strict=True)]


def _merge_slices(graph: Graph) -> None:
    """Cut several axes at once where one Slice after another cuts one each."""
    readers, dead = graph.readers(), []
    for node in graph.nodes:
        reader = _only_reader(graph, readers, node.outputs[0]) if node.op == "Slice" else None
        if reader is None or reader.op != "Slice" or reader.inputs[0] != node.outputs[0]:
            continue
        first, second = slice_arrays(graph, node), slice_arrays(graph, reader)
        same = graph.held.get(node.outputs[0]) == graph.held.get(reader.outputs[0])
        if first is None or second is None or not same or set(first[2]) & set(second[2]):
            continue
        merged = [np.array([*before, *after], np.int64) for before, after in zip(first, second, strict=True)]
        parts = zip(("starts", "ends", "axes", "steps"), merged, strict=True)
        reader.inputs = [node.inputs[0], *(_constant(graph, f"{reader.name}_{part}", array) for part, array in parts)]
        dead.append(node)
    _drop(graph, dead)


def slice_arrays(graph: Graph, node: Node) -> list[list[int]] | None:
    """Starts, ends, non-negative axes and steps of a Slice, or None if one is not constant."""
    arrays = [graph.array(name) if name else None for name in node.inputs[1:]]
    if any(array is None and name for array, name in zip(arrays, node.inputs[1:], strict=True)):
        return None
    lists = [None if array is None else [int(number) for number in array] for array in arrays]
    starts, ends, axes, steps = lists + [None] * (4 - len(lists))
    if starts is None or ends is None:
        return None
    rank = len(graph.info[node.inputs[0]].shape)
    axes = list(range(len(starts))) if axes is None else [axis % rank for axis in axes]
    return [starts, ends, axes, [1] * len(starts) if steps is None else steps]
