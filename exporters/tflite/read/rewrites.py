"""Write operators of ONNX Runtime, and ONNX's operators on integers, as standard ones: the lowerings know only those.

A quantized operator is a real one between DequantizeLinear and QuantizeLinear with its scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite.ir import Node
from edgekit.exporters.tflite.registry import unsupported

OPSET = 21  # of what is written here
CONTRIB = "com.microsoft"


class Rewriter:
    """Collects the standard nodes that replace one node; values in between are called after it."""

    def __init__(self, proto: onnx.NodeProto, attributes: dict[str, Any], scales: Callable[[str], int | None]) -> None:
        self.proto = proto
        self.attributes = attributes
        self.nodes: list[onnx.NodeProto] = []
        self._scales = scales

    def input(self, index: int) -> str:
        """The name of an input, "" for an absent one."""
        return self.proto.input[index] if len(self.proto.input) > index else ""

    def add(self, op: str, *inputs: str, last: bool = False, **attributes: Any) -> str:
        """Add a node; `last` makes the first output of what is replaced."""
        output = self.proto.output[0] if last else f"{self.proto.name}/{op}_{len(self.nodes)}"
        name = f"{self.proto.name}/{len(self.nodes)}"
        names = list(inputs)
        while names and not names[-1]:
            names.pop()
        self.nodes.append(helper.make_node(op, names, [output], name, **attributes))
        return output

    def constant(self, value: float) -> str:
        """A float constant."""
        return self.add("Constant", value=numpy_helper.from_array(np.array(value, np.float32)))

    def real(self, first: int, axis: int = 1) -> str:
        """The real values of the three inputs from `first` on: integers, scale and zero point."""
        codes, scale, zero = (self.input(first + offset) for offset in range(3))
        several = self._scales(scale) not in (None, 1)
        attributes: dict[str, Any] = {"axis": axis} if several else {}
        return self.add("DequantizeLinear", codes, scale, zero, **attributes)

    def quantized(self, real: str, first: int) -> str:
        """The output, quantized with the scale and zero point that are inputs from `first` on."""
        return self.add("QuantizeLinear", real, self.input(first), self.input(first + 1), last=True)

    def refuse(self, what: str) -> EdgeKitError:
        """The error for a case that is not rewritten."""
        return unsupported(Node(self.proto.op_type, self.proto.name, [], []), what)


def _gelu(r: Rewriter) -> None:
    r.add("Gelu", r.input(0), last=True)


def _bias_gelu(r: Rewriter) -> None:
    r.add("Gelu", r.add("Add", r.input(0), r.input(1)), last=True)


def _fast_gelu(r: Rewriter) -> None:
    x = r.add("Add", r.input(0), r.input(1)) if r.input(1) else r.input(0)
    r.add("Gelu", x, last=True, approximate="tanh")


def _quick_gelu(r: Rewriter) -> None:
    gate = r.add("Sigmoid", r.add("Mul", r.input(0), r.constant(r.attributes.get("alpha", 1.702))))
    r.add("Mul", r.input(0), gate, last=True)


def _skip_layer_normalization(r: Rewriter) -> None:
    if any(name for name in r.proto.output[1:3]):
        raise r.refuse("its mean and deviation are outputs")
    total = r.add("Add", r.input(0), r.input(1))
    total = r.add("Add", total, r.input(4)) if r.input(4) else total
    r.add("LayerNormalization", total, r.input(2), r.input(3), last=True, epsilon=r.attributes.get("epsilon", 1e-12))
    if len(r.proto.output) > 3 and r.proto.output[3]:
        r.nodes.append(helper.make_node("Identity", [total], [r.proto.output[3]], f"{r.proto.name}/sum"))


def _activated(r: Rewriter, op: str, inputs: Sequence[str], attributes: dict[str, Any]) -> None:
    """An operator with a fused activation, and for a convolution with a sum between the two."""
    activation = attributes.pop("activation", "")
    numbers = attributes.pop("activation_params", [])
    made = r.add(op, *inputs[:3], **attributes)
    if len(inputs) > 3 and inputs[3]:
        made = r.add("Add", made, inputs[3])
    if activation in ("", "Relu", "Sigmoid", "Tanh"):
        r.add(activation or "Identity", made, last=True)
    elif activation == "LeakyRelu":
        r.add("LeakyRelu", made, last=True, alpha=numbers[0])
    elif activation == "Clip":
        r.add("Clip", made, *(r.constant(number) for number in numbers), last=True)
    else:
        raise r.refuse(f"the activation {activation}")


def _fused_conv(r: Rewriter) -> None:
    _activated(r, "Conv", r.proto.input, dict(r.attributes))


def _fused_gemm(r: Rewriter) -> None:
    known = {name: r.attributes[name] for name in ("alpha", "beta", "transA", "transB") if name in r.attributes}
    own = {name: value for name, value in r.attributes.items() if name in ("activation", "activation_params")}
    _activated(r, "Gemm", r.proto.input, known | own)


def _linear(r: Rewriter) -> None:
    """QLinearConv, with an int32 bias at the product of the scales."""
    bias = []
    if r.input(8):
        bias = [r.add("DequantizeLinear", r.input(8), r.add("Mul", r.input(1), r.input(4)), axis=0)]
    r.quantized(r.add("Conv", r.real(0), r.real(3, axis=0), *bias, **r.attributes), 6)


def _matmul(r: Rewriter) -> None:
    r.quantized(r.add("MatMul", r.real(0), r.real(3, axis=-1)), 6)


def _gemm(r: Rewriter) -> None:
    """QGemm: without scales for its output it is real."""
    transposed = r.attributes.get("transB", 0)
    bias = []
    if r.input(6):
        bias = [r.add("DequantizeLinear", r.input(6), r.add("Mul", r.input(1), r.input(4)), axis=0)]
    inputs = [r.real(0), r.real(3, axis=0 if transposed else 1), *bias]
    if r.input(7):
        r.quantized(r.add("Gemm", *inputs, **r.attributes), 7)
    else:
        r.add("Gemm", *inputs, last=True, **r.attributes)


def _binary(op: str) -> Callable[[Rewriter], None]:
    return lambda r: _done(r.quantized(r.add(op, r.real(0), r.real(3)), 6))


def _unary(op: str, *dropped: str) -> Callable[[Rewriter], None]:
    """An operator of one tensor; `dropped` attributes are those that have to be 0."""

    def rewrite(r: Rewriter) -> None:
        if any(r.attributes.get(name) for name in dropped):
            raise r.refuse(f"attribute {dropped[0]}")
        kept = {name: value for name, value in r.attributes.items() if name not in (*dropped, "opset")}
        if r.attributes.get("opset", 13) < 13:
            raise r.refuse("Softmax as before opset 13")
        _done(r.quantized(r.add(op, r.real(0), **kept), 3))

    return rewrite


def _reduce_mean(r: Rewriter) -> None:
    axes = r.attributes.get("axes", [])
    names = [r.add("Constant", value=numpy_helper.from_array(np.array(axes, np.int64)))] if axes else []
    r.quantized(r.add("ReduceMean", r.real(0), *names, keepdims=r.attributes.get("keepdims", 1)), 3)


def _concat(r: Rewriter) -> None:
    parts = [r.real(first) for first in range(2, len(r.proto.input), 3)]
    r.quantized(r.add("Concat", *parts, axis=r.attributes["axis"]), 0)


def _where(r: Rewriter) -> None:
    r.quantized(r.add("Where", r.input(0), r.real(1), r.real(4)), 7)


def _done(_: str) -> None:
    """End a rewriting whose last node is not looked at."""


REWRITES: dict[tuple[str, str], Callable[[Rewriter], None]] = {
    ("", "QLinearConv"): _linear,
    ("", "QLinearMatMul"): _matmul,
    (CONTRIB, "BiasGelu"): _bias_gelu,
    (CONTRIB, "FastGelu"): _fast_gelu,
    (CONTRIB, "FusedConv"): _fused_conv,
    (CONTRIB, "FusedGemm"): _fused_gemm,
    (CONTRIB, "Gelu"): _gelu,
    (CONTRIB, "QGemm"): _gemm,
    (CONTRIB, "QLinearAdd"): _binary("Add"),
    (CONTRIB, "QLinearAveragePool"): _unary("AveragePool", "channels_last"),
    (CONTRIB, "QLinearConcat"): _concat,
    (CONTRIB, "QLinearGlobalAveragePool"): _unary("GlobalAveragePool", "channels_last"),
    (CONTRIB, "QLinearLeakyRelu"): _unary("LeakyRelu"),
    (CONTRIB, "QLinearMul"): _binary("Mul"),
    (CONTRIB, "QLinearReduceMean"): _reduce_mean,
    (CONTRIB, "QLinearSigmoid"): _unary("Sigmoid"),
    (CONTRIB, "QLinearSoftmax"): _unary("Softmax"),
    (CONTRIB, "QLinearWhere"): _where,
    (CONTRIB, "QuickGelu"): _quick_gelu,
    (CONTRIB, "SkipLayerNormalization"): _skip_layer_normalization,
}


def rewritten(
    proto: onnx.NodeProto, attributes: dict[str, Any], scales: Callable[[str], int | None]
) -> list[onnx.NodeProto] | None:
    """The standard nodes (of opset OPSET) that compute what a node does, or None where it is left as it is.

    `scales` tells how many numbers a constant has, and None for another value.
    """
    rewrite = REWRITES.get(("" if proto.domain == "ai.onnx" else proto.domain, proto.op_type))
    if rewrite is None:
        return None
    rewriter = Rewriter(proto, attributes, scales)
    rewrite(rewriter)
    return rewriter.nodes


def real_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write integer products whose input is quantized at run time as real ones of dequantized values.

    ONNX Runtime's quantize_dynamic writes Cast(MatMulInteger(q, w, z, wz)) · (s · ws), with q, s and z made by a
    DynamicQuantizeLinear; what else reads integers is left as it is.
    """
    if not any(node.op_type in ("MatMulInteger", "ConvInteger") for node in model.graph.node):
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        found = _integer_product(node, makers, readers, outputs)
        if found is None:
            nodes.append(node)
            continue
        product, scale = found
        x, w = f"{product.output[0]}/input", f"{product.output[0]}/weights"
        quantize = makers[product.input[0]]
        conv = product.op_type == "ConvInteger"
        axis = 0 if conv else max(ranks.get(product.input[1], 2) - 1, 0)
        zero = [product.input[3]] if len(product.input) > 3 else []
        real = helper.make_node("Conv" if conv else "MatMul", [x, w], [node.output[0]], node.name)
        real.attribute.extend(product.attribute)
        nodes += [
            helper.make_node("DequantizeLinear", [*quantize.output], [x], x),
            helper.make_node("DequantizeLinear", [product.input[1], scale, *zero], [w], w, axis=axis),
            real,
        ]
    del graph.node[:]
    graph.node.extend(_needed(nodes, outputs))
    return changed


def _integer_product(
    node: onnx.NodeProto,
    makers: dict[str, onnx.NodeProto],
    readers: dict[str, list[onnx.NodeProto]],
    outputs: set[str],
) -> tuple[onnx.NodeProto, str] | None:
    """The integer product that a Mul makes real, and the name of its weights' scale."""
    if node.op_type != "Mul":
        return None
    for cast_name, scale_name in (tuple(node.input), tuple(node.input)[::-1]):
        cast, scales = makers.get(cast_name), makers.get(scale_name)
        product = makers.get(cast.input[0]) if cast is not None and cast.op_type == "Cast" else None
        if product is None or product.op_type not in ("MatMulInteger", "ConvInteger"):
            continue
        quantize = makers.get(product.input[0])
        inner = (cast_name, product.output[0])
        alone = all(len(readers[name]) == 1 and name not in outputs for name in inner)
        if scales is None or scales.op_type != "Mul" or quantize is None or not alone:
            continue
        matched = quantize.op_type == "DynamicQuantizeLinear" and quantize.output[1] in scales.input
        if matched and [*product.input[2:3]] == [quantize.output[2]]:
            return product, next(name for name in scales.input if name != quantize.output[1])
    return None


def _needed(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """The nodes that outputs depend on."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & {*node.output}:
            kept.append(node)
            wanted.update(node.input)
            wanted.update(name for attribute in node.attribute for each in attribute.g.node for name in each.input)
    return kept[::-1]
