"""Arithmetic, comparison and logic on two or more values, with broadcasting."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.exporters.tflite.builder import FLOAT, INT32, Builder, number
from edgekit.exporters.tflite.ir import Node, QParams, Tensor, channels_last
from edgekit.exporters.tflite.kernel_support import WIDER, rescales, takes
from edgekit.exporters.tflite.registry import lowers, unsupported

LARGEST_BIAS = 1 << 24  # leaves room in int32 for the products

# ONNX op → TFLite op with a fused activation; those of RESCALE have an int8 kernel for any parameters.
ARITHMETIC = {"Add": "ADD", "Sub": "SUB", "Mul": "MUL", "Div": "DIV"}
RESCALE = {"ADD", "SUB", "MUL"}
COMPARISON = {
    "Equal": "EQUAL",
    "Greater": "GREATER",
    "GreaterOrEqual": "GREATER_EQUAL",
    "Less": "LESS",
    "LessOrEqual": "LESS_EQUAL",
    "Xor": "NOT_EQUAL",
    "And": "LOGICAL_AND",
    "Or": "LOGICAL_OR",
}
SELECTING = {"Max": "MAXIMUM", "Min": "MINIMUM"}


def binary(b: Builder, node: Node, kind: str, dtype: Any = None) -> None:
    """Lower an op of two broadcast inputs in the layout of the larger one; `dtype` is the result's if it differs."""
    names, out = node.inputs, node.outputs[0]
    rank = len(b.shape(out))
    perm = b.layout_of(names, rank)
    shape = tuple(b.shape(out)[axis] for axis in perm)
    q = _rescaled(b, node, kind)
    tensors = [b.broadcastable(name, perm, b.int8(name) if q else None) for name in names]
    options: dict[str, Any] = {"fusedActivationFunction": node.activation} if kind in ARITHMETIC.values() else {}
    if q is not None:
        b.bind(out, b.op(kind, [*tensors], shape, None, q, **options), perm)
        return
    narrow = b.dtype(names[0])
    wide = narrow if takes(kind, narrow) else WIDER.get(narrow, narrow)
    result = b.op(kind, [casted(b, tensor, wide) for tensor in tensors], shape, dtype, **options)
    b.bind(out, casted(b, result, b.dtype(out)), perm)


def _rescaled(b: Builder, node: Node, kind: str) -> QParams | None:
    """The parameters of an int8 result, or None where the op has to be float."""
    target = b.target(node)
    held = [q for q in map(b.int8, node.inputs) if q is not None]
    if kind not in RESCALE or target is None or len(held) != 2:
        return None
    steps = [q.scale[0] for q in held]
    product = steps[0] * steps[1] if kind == "MUL" else max(steps)
    return target if rescales(target, product, *held) else None


def casted(b: Builder, tensor: Tensor, dtype: np.dtype) -> Tensor:
    """The tensor as another type."""
    if tensor.dtype == dtype:
        return tensor
    if tensor.data is not None:
        return b.const(tensor.data.astype(dtype))
    return b.op("CAST", [tensor], tensor.shape, dtype)


def _register_arithmetic(op: str, kind: str) -> None:
    @lowers(op)
    def lowering(b: Builder, node: Node) -> None:
        if kind == "DIV" and b.dtype(node.inputs[0]) != FLOAT:
            _divide_integers(b, node)
        else:
            binary(b, node, kind)


def _register_comparison(op: str, kind: str) -> None:
    @lowers(op)
    def lowering(b: Builder, node: Node) -> None:
        binary(b, node, kind, np.bool_)


def _register_selecting(op: str, kind: str) -> None:
    @lowers(op)
    def lowering(b: Builder, node: Node) -> None:
        names, out = node.inputs, node.outputs[0]
        perm = b.layout_of(names, len(b.shape(out)))
        q = b.common_q(node, names)
        narrow = b.dtype(out)
        wide = narrow if takes(kind, narrow) else WIDER.get(narrow, narrow)
        result: Tensor | None = None
        for name in names:
            tensor = b.broadcastable(name, perm, q)
            tensor = casted(b, tensor, wide) if q is None else tensor
            shape = tensor.shape if result is None else np.broadcast_shapes(result.shape, tensor.shape)
            result = tensor if result is None else b.op(kind, [result, tensor], shape, q=q)
        assert result is not None
        result = casted(b, result, narrow) if q is None else result
        b.bind(out, result, perm if len(result.shape) == len(perm) else None)


for _op, _kind in ARITHMETIC.items():
    _register_arithmetic(_op, _kind)
for _op, _kind in COMPARISON.items():
    _register_comparison(_op, _kind)
for _op, _kind in SELECTING.items():
    _register_selecting(_op, _kind)


def _divide_integers(b: Builder, node: Node) -> None:
    """ONNX truncates toward zero, as the int32 kernel does; narrower types go through it."""
    if b.dtype(node.inputs[0]) not in (INT32, *(narrow for narrow, wide in WIDER.items() if wide == INT32)):
        raise unsupported(node, f"division of {b.dtype(node.inputs[0])}")
    binary(b, node, "DIV")


@lowers("BitwiseXor", "BitwiseNot")
def exclusive_or(b: Builder, node: Node) -> None:
    """BITWISE_XOR of two values, or of one and all bits."""
    if node.op == "BitwiseXor":
        binary(b, node, "BITWISE_XOR")
        return
    value = b.settle(b.value(node.inputs[0]))
    dtype = value.tensor.dtype
    bits = np.full((1,) * min(1, len(value.tensor.shape)), -1 if dtype.kind == "i" else np.iinfo(dtype).max, dtype)
    b.bind(node.outputs[0], b.op("BITWISE_XOR", [value.tensor, bits], value.tensor.shape), value.perm)


@lowers("Dropout")
def dropout(b: Builder, node: Node, *, seed: int = 0, ratio: float = 0.5) -> None:
    """At inference, the input and a mask that keeps all."""
    training = b.array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else np.False_
    if training is None or bool(training):
        raise unsupported(node, "training mode")
    value = b.value(node.inputs[0])
    if node.outputs[0]:
        b.bind(node.outputs[0], value)
    if len(node.outputs) > 1 and node.outputs[1]:
        b.bind(node.outputs[1], b.const(np.ones(value.shape, np.bool_)))


@lowers("Not")
def logical_not(b: Builder, node: Node) -> None:
    """Logical not."""
    value = b.settle(b.value(node.inputs[0]))
    b.bind(node.outputs[0], b.op("LOGICAL_NOT", [value.tensor], value.tensor.shape), value.perm)


@lowers("Sum", "Mean")
def total(b: Builder, node: Node) -> None:
    """Sum or mean of any number of inputs."""
    out = node.outputs[0]
    perm = b.layout_of(node.inputs, len(b.shape(out)))
    result = b.broadcastable(node.inputs[0], perm, None)
    for name in node.inputs[1:]:
        other = b.broadcastable(name, perm, None)
        shape = np.broadcast_shapes(result.shape, other.shape)
        result = b.op("ADD", [result, other], shape, fusedActivationFunction="NONE")
    if node.op == "Mean":
        share = number(1 / len(node.inputs), result)
        result = b.op("MUL", [result, share], result.shape, fusedActivationFunction="NONE")
    b.bind(out, result, perm if len(result.shape) == len(perm) else None)


@lowers("Pow")
def power(b: Builder, node: Node) -> None:
    """x ** y; squares, roots and products where the exponent is a constant that has a faster op."""
    exponent = b.array(node.inputs[1])
    if b.dtype(node.inputs[0]) == FLOAT and exponent is not None and exponent.size == 1:
        value = b.settle(b.value(node.inputs[0]))
        x = b.as_float(value.tensor)
        number = float(exponent.reshape(()))
        kind = {2.0: "SQUARE", 0.5: "SQRT", -0.5: "RSQRT"}.get(number)
        if b.shape(node.outputs[0]) == value.shape and (kind or number in (1.0, 3.0)):
            if number == 3:
                square = b.op("SQUARE", [x], x.shape)
                x = b.op("MUL", [square, x], x.shape, fusedActivationFunction="NONE")
            elif kind:
                x = b.op(kind, [x], x.shape)
            b.bind(node.outputs[0], x, value.perm)
            return
    if b.dtype(node.inputs[0]) == b.dtype(node.inputs[1]):
        binary(b, node, "POW")
        return
    if b.dtype(node.inputs[0]) != FLOAT:
        raise unsupported(node, "an integer to the power of another type")
    perm = b.layout_of(node.inputs, len(b.shape(node.outputs[0])))
    base, power_of = (b.broadcastable(name, perm, None) for name in node.inputs)
    shape = tuple(b.shape(node.outputs[0])[axis] for axis in perm)
    b.bind(node.outputs[0], b.op("POW", [base, casted(b, power_of, FLOAT)], shape), perm)


@lowers("Mod")
def modulo(b: Builder, node: Node, *, fmod: int = 0) -> None:
    """The remainder with the divisor's sign, or with the dividend's for fmod = 1."""
    if not fmod:
        if b.dtype(node.inputs[0]) == FLOAT:
            raise unsupported(node, "a floating-point remainder with fmod = 0, which ONNX leaves undefined")
        binary(b, node, "FLOOR_MOD")
        return
    narrow = b.dtype(node.inputs[0])
    wide = narrow if takes("ABS", narrow) else WIDER.get(narrow, narrow)
    perm = b.layout_of(node.inputs, len(b.shape(node.outputs[0])))
    x, y = (casted(b, b.broadcastable(name, perm, None), wide) for name in node.inputs)
    shape = tuple(b.shape(node.outputs[0])[axis] for axis in perm)
    sizes = [b.op("ABS", [operand], operand.shape) for operand in (x, y)]
    rest = b.op("FLOOR_MOD", [*sizes], shape)
    signed = b.op("MUL", [rest, b.op("SIGN", [x], x.shape)], shape, fusedActivationFunction="NONE")
    b.bind(node.outputs[0], casted(b, signed, narrow), perm)


@lowers("IsNaN")
def is_nan(b: Builder, node: Node) -> None:
    """What is not equal to itself."""
    value = b.settle(b.value(node.inputs[0]))
    x = b.as_float(value.tensor)
    b.bind(node.outputs[0], b.op("NOT_EQUAL", [x, x], x.shape, np.bool_), value.perm)


@lowers("IsInf")
def is_inf(b: Builder, node: Node, *, detect_negative: int = 1, detect_positive: int = 1) -> None:
    """Comparison with infinity, of one sign or both."""
    value = b.settle(b.value(node.inputs[0]))
    x = b.as_float(value.tensor)
    if detect_negative and detect_positive:
        x = b.op("ABS", [x], x.shape)
    sign = 1 if detect_positive else -1
    if not (detect_negative or detect_positive):
        raise unsupported(node, "detection of neither sign")
    infinity = number(sign * np.inf, x)
    b.bind(node.outputs[0], b.op("EQUAL", [x, infinity], x.shape, np.bool_), value.perm)


@lowers("BatchNormalization")
def batch_normalization(
    b: Builder, node: Node, *, epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0
) -> None:
    """Inference-time normalization that could not be folded into a convolution: x · factor + offset per channel."""
    if training_mode or any(node.outputs[1:]):
        raise unsupported(node, "training mode")
    arrays = [b.array(name) for name in node.inputs[1:]]
    if any(array is None for array in arrays):
        raise unsupported(node, "its parameters are not constant")
    gamma, beta, mean, var = (array.astype(np.float64) for array in arrays if array is not None)
    factor = gamma / np.sqrt(var + epsilon)
    offset = beta - mean * factor
    held, target = b.int8(node.inputs[0]), b.target(node)
    if held is not None and target is not None and len(b.shape(node.inputs[0])) == 4:
        _scale_channels(b, node, factor, offset, held)
        return
    value = b.settle(b.value(node.inputs[0]))
    shape = [1] * len(value.perm)
    shape[value.axis(1)] = -1
    x = b.as_float(value.tensor)
    x = b.op("MUL", [x, factor.astype(np.float32).reshape(shape)], x.shape, fusedActivationFunction="NONE")
    shift = offset.astype(np.float32).reshape(shape)
    b.bind(node.outputs[0], b.op("ADD", [x, shift], x.shape, fusedActivationFunction=node.activation), value.perm)


def _scale_channels(b: Builder, node: Node, factor: np.ndarray, offset: np.ndarray, held: QParams) -> None:
    """Int8 x · factor + offset per channel: a 1×1 depthwise convolution with weights of ±127.

    They are smaller where the offset is so much larger than the factor that int32 would not hold it at their scale.
    """
    x = b.take(node.inputs[0], channels_last(4), held)
    least = np.maximum(np.abs(offset) / (held.scale[0] * LARGEST_BIAS), np.finfo(np.float32).tiny)
    scale = np.maximum(np.abs(factor) / 127, least).astype(np.float32)
    weights = b.const(np.rint(factor / scale).astype(np.int8).reshape(1, 1, 1, -1), QParams.of(scale, 0, 3))
    steps = np.float32(held.scale[0]) * scale
    bias = b.const(np.rint(offset / steps).astype(np.int32), QParams.of(steps, 0, 0))
    result = b.op(
        "DEPTHWISE_CONV_2D",
        [x, weights, bias],
        x.shape,
        q=b.target(node),
        padding="VALID",
        strideH=1,
        strideW=1,
        depthMultiplier=1,
        fusedActivationFunction=node.activation,
    )
    b.bind(node.outputs[0], result, channels_last(4))


@lowers("Where")
def where(b: Builder, node: Node) -> None:
    """Where(condition, x, y)."""
    out = node.outputs[0]
    perm = b.layout_of(node.inputs, len(b.shape(out)))
    q: QParams | None = b.common_q(node, node.inputs[1:])
    condition = b.broadcastable(node.inputs[0], perm, None)
    x, y = (b.broadcastable(name, perm, q) for name in node.inputs[1:])
    shape = tuple(b.shape(out)[axis] for axis in perm)
    b.bind(out, b.op("SELECT_V2", [condition, x, y], shape, x.dtype, q), perm)
