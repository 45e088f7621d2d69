"""Activations: ops of one input, and softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edgekit.exporters.tflite.builder import FLOAT, INT8, Builder, number
from edgekit.exporters.tflite.ir import Node, Perm, QParams, Tensor, channels_last
from edgekit.exporters.tflite.kernel_support import WIDER, takes
from edgekit.exporters.tflite.registry import lowers, unsupported

# Ops that only change their name, and have no int8 kernel that is as exact as the float one.
UNARY = {
    "Abs": "ABS",
    "Ceil": "CEIL",
    "Cos": "COS",
    "Exp": "EXP",
    "Floor": "FLOOR",
    "Log": "LOG",
    "Neg": "NEG",
    "Round": "ROUND",
    "Sign": "SIGN",
    "Sin": "SIN",
    "Sqrt": "SQRT",
}
# The runtime's int8 kernels of these fix the output's parameters: (TFLite op, parameters).
FIXED: dict[str, tuple[str, QParams]] = {
    "Sigmoid": ("LOGISTIC", QParams.of(1 / 256, -128)),
    "Tanh": ("TANH", QParams.of(1 / 128, 0)),
}
RELUS = {(0.0, math.inf): "RELU", (0.0, 6.0): "RELU6", (-1.0, 1.0): "RELU_N1_TO_1"}


def _register_unary(op: str, kind: str) -> None:
    @lowers(op)
    def lowering(b: Builder, node: Node) -> None:
        x, perm = operand(b, node, False)
        result = b.op(kind, [x], x.shape) if x.dtype == FLOAT else _of_integers(b, kind, x)
        b.bind(node.outputs[0], result, perm)


def _of_integers(b: Builder, kind: str, x: Tensor) -> Tensor:
    """ABS, NEG and SIGN of integers, in a type that has kernels: NEG and comparisons take more than the others."""
    narrow = x.dtype
    if narrow in WIDER:
        x = b.op("CAST", [x], x.shape, WIDER[narrow])
    if takes(kind, x.dtype):
        result = b.op(kind, [x], x.shape)
    elif kind == "ABS":
        result = b.op("MAXIMUM", [x, b.op("NEG", [x], x.shape)], x.shape)
    elif kind == "SIGN":
        zero = number(0, x, x.dtype)
        signs = [b.op("CAST", [b.op(op, [x, zero], x.shape, np.bool_)], x.shape, x.dtype) for op in ("GREATER", "LESS")]
        result = b.op("SUB", [*signs], x.shape, fusedActivationFunction="NONE")
    else:
        result = b.op(kind, [x], x.shape)
    return b.op("CAST", [result], x.shape, narrow) if narrow in WIDER else result


def _register_fixed(op: str, kind: str, fixed: QParams) -> None:
    @lowers(op)
    def lowering(b: Builder, node: Node) -> None:
        target = b.target(node)
        # Rounding to the runtime's steps first moves a result by one wanted step at most, if those are half as large.
        int8 = target is not None and b.int8(node.inputs[0]) is not None and target.scale[0] * 2 >= fixed.scale[0]
        x, perm = operand(b, node, int8)
        b.bind(node.outputs[0], b.op(kind, [x], x.shape, q=fixed if int8 else None), perm)


for _op, _kind in UNARY.items():
    _register_unary(_op, _kind)
for _op, (_kind, _fixed) in FIXED.items():
    _register_fixed(_op, _kind, _fixed)


def operand(b: Builder, node: Node, int8: bool) -> tuple[Tensor, Perm]:
    """The first input in whatever layout it has, as int8 or float."""
    value = b.settle(b.value(node.inputs[0]))
    q = b.int8(node.inputs[0]) if int8 else None
    return b.held_as(value.tensor, q), value.perm


@lowers("Reciprocal")
def reciprocal(b: Builder, node: Node) -> None:
    """1 / x."""
    x, perm = operand(b, node, False)
    b.bind(node.outputs[0], b.op("DIV", [np.array(1, x.dtype), x], x.shape, x.dtype), perm)


@lowers("Relu")
def relu(b: Builder, node: Node) -> None:
    """Relu; int8 with zero point −128 holds nothing negative, so that nothing is left to do."""
    if b.dtype(node.inputs[0]) != FLOAT:
        _clamp_integers(b, node, 0, None)
        return
    clamp(b, node, 0.0, math.inf)


@lowers("Clip")
def clip(b: Builder, node: Node) -> None:
    """Clip to constant bounds, or to scalars that the graph computes."""
    names = [name for name in node.inputs[1:] if name]
    if any(name not in b.graph.constants for name in names):
        _clip_computed(b, node)
        return
    bounds = []
    for index, default in ((1, -math.inf), (2, math.inf)):
        name = node.inputs[index] if len(node.inputs) > index else ""
        array = b.array(name) if name else np.array(default)
        assert array is not None
        bounds.append(array.reshape(()).item())
    if b.dtype(node.inputs[0]) != FLOAT:
        _clamp_integers(b, node, *(None if math.isinf(bound) else int(bound) for bound in bounds))
        return
    clamp(b, node, *bounds)


def _clip_computed(b: Builder, node: Node) -> None:
    x, perm = operand(b, node, False)
    for kind, name in zip(("MAXIMUM", "MINIMUM"), node.inputs[1:], strict=False):
        if name:
            bound = b.take(name)
            x = b.op(kind, [x, b.raw_reshape(bound, (1,) * min(1, len(x.shape)))], x.shape)
    b.bind(node.outputs[0], x, perm)


def _clamp_integers(b: Builder, node: Node, low: int | None, high: int | None) -> None:
    x, perm = operand(b, node, False)
    for kind, bound in (("MAXIMUM", low), ("MINIMUM", high)):
        if bound is not None:
            x = b.op(kind, [x, np.array(bound, x.dtype)], x.shape)
    b.bind(node.outputs[0], x, perm)


def clamp(b: Builder, node: Node, low: float, high: float) -> None:
    """Limit a float value, or one held as int8 within its own parameters, where quantized bounds do the same."""
    q = b.common_q(node, node.inputs[:1])
    if q is not None and b.target(node) is None:
        least, most = q.bounds()
        q = b.common_q(node, node.inputs[:1], *(bound for bound in (low, high) if least < bound < most))
        q = q if low < most and high > least else None
    value = b.settle(b.value(node.inputs[0]))
    x = b.held_as(value.tensor, q)
    if q is not None:
        # Within the limits after rounding: a bound that is the tensor's own largest number changes nothing.
        limits = q.quantize(np.array([low, high], np.float32))
        if limits[0] == -128 and limits[1] == 127:
            b.bind(node.outputs[0], x, value.perm)
            return
    kind = RELUS.get((low, high))
    if kind is not None:
        b.bind(node.outputs[0], b.op(kind, [x], x.shape, q=q), value.perm)
        return
    # ONNX lets the maximum win where the bounds cross.
    for kind, bound in (("MAXIMUM", low), ("MINIMUM", high)):
        if not math.isinf(bound):
            real = number(bound, x)
            limit = b.const(q.quantize(real), q) if q else b.const(real)
            x = b.op(kind, [x, limit], x.shape, q=q)
    b.bind(node.outputs[0], x, value.perm)


@lowers("LeakyRelu")
def leaky_relu(b: Builder, node: Node, *, alpha: float = 0.01) -> None:
    """LeakyRelu; the int8 kernel rescales."""
    q = b.target(node) if b.int8(node.inputs[0]) else None
    x, perm = operand(b, node, q is not None)
    b.bind(node.outputs[0], b.op("LEAKY_RELU", [x], x.shape, q=q, alpha=alpha), perm)


@lowers("PRelu")
def prelu(b: Builder, node: Node) -> None:
    """LEAKY_RELU for one slope, PRELU for one per channel, lying last; else max(0, x) + slope · min(0, x)."""
    slope, rank = b.array(node.inputs[1]), len(b.shape(node.inputs[0]))
    if slope is not None and slope.size == 1:
        leaky_relu(b, node, alpha=float(slope.reshape(())))
        return
    shape = b.shape(node.inputs[1])
    channels = b.shape(node.inputs[0])[1] if rank > 1 else 0
    if rank == 4 and (1,) * (4 - len(shape)) + shape == (1, channels, 1, 1):
        steepness = b.int8(node.inputs[1])
        if steepness is None and slope is not None and np.isfinite(slope).all():
            steepness = QParams.of(float(np.abs(slope).max()) / 127 or 1.0, 0)
        int8 = b.target(node) is not None and b.int8(node.inputs[0]) is not None and steepness is not None
        perm = channels_last(4)
        x = b.take(node.inputs[0], perm, b.int8(node.inputs[0]) if int8 else None)
        slopes = b.broadcastable(node.inputs[1], perm, steepness if int8 else None)
        operands = [x, b.raw_reshape(slopes, (1, 1, channels))]
        b.bind(node.outputs[0], b.op("PRELU", [*operands], x.shape, q=b.target(node) if int8 else None), perm)
        return
    x, perm = operand(b, node, False)
    below = b.op("MINIMUM", [x, number(0, x)], x.shape)
    sloped = b.op("MUL", [below, b.broadcastable(node.inputs[1], perm, None)], x.shape, fusedActivationFunction="NONE")
    b.bind(node.outputs[0], add(b, b.op("RELU", [x], x.shape), sloped), perm)


def scaled(b: Builder, x: Tensor, factor: float, offset: float = 0.0, activation: str = "NONE") -> Tensor:
    """Float x · factor + offset."""
    if factor != 1:
        kind = "NONE" if offset else activation
        x = b.op("MUL", [x, np.array(factor, np.float32)], x.shape, fusedActivationFunction=kind)
    if offset or factor == 1:
        x = b.op("ADD", [x, np.array(offset, np.float32)], x.shape, fusedActivationFunction=activation)
    return x


@lowers("HardSigmoid")
def hard_sigmoid(b: Builder, node: Node, *, alpha: float = 0.2, beta: float = 0.5) -> None:
    """max(0, min(1, αx + β)), written as relu6(6αx + 6β) / 6; in int8 as two rescaling ops."""
    held, q = b.int8(node.inputs[0]), b.target(node)
    if held is not None and q is not None and alpha > 0 and beta >= 0:
        x, perm = operand(b, node, True)
        b.bind(node.outputs[0], _gate(b, x, held, (alpha, beta), q), perm)
        return
    x, perm = operand(b, node, False)
    b.bind(node.outputs[0], scaled(b, scaled(b, x, 6 * alpha, 6 * beta, "RELU6"), 1 / 6), perm)


def _gate(b: Builder, x: Tensor, held: QParams, line: tuple[float, float], q: QParams) -> Tensor:
    """Int8 max(0, min(1, αx + β)): αx changes the scale and no number, so that only the sum rounds."""
    slope, offset = (b.const(number(127, x, INT8), QParams.of(term / 127 or 1.0, 0)) for term in line)
    if line[1] == 0:
        offset = b.const(number(0, x, INT8), QParams.of(1.0, 0))
    steeper = QParams.of(held.scale[0] * line[0], held.zero_point[0])
    y = b.op("MUL", [x, slope], x.shape, q=steeper, fusedActivationFunction="NONE")
    y = b.op("ADD", [y, offset], x.shape, q=q, fusedActivationFunction="RELU")
    one = q.quantize(number(1, x))
    return y if one.item() == 127 else b.op("MINIMUM", [y, b.const(one, q)], x.shape, q=q)


@lowers("HardSwish")
def hard_swish(b: Builder, node: Node) -> None:
    """HARD_SWISH; in int8 x times its gate: the runtime's int8 kernel of the one op takes longer than float."""
    held, q = b.int8(node.inputs[0]), b.target(node)
    x, perm = operand(b, node, held is not None and q is not None)
    if held is not None and q is not None:
        gate = _gate(b, x, held, (1 / 6, 0.5), QParams.of(1 / 255, -128))
        b.bind(node.outputs[0], b.op("MUL", [x, gate], x.shape, q=q, fusedActivationFunction="NONE"), perm)
        return
    b.bind(node.outputs[0], b.op("HARD_SWISH", [x], x.shape), perm)


@lowers("Elu")
def elu(b: Builder, node: Node, *, alpha: float = 1.0) -> None:
    """Elu, int8 where asked for; other slopes than 1 scale its negative part."""
    if alpha == 1 and b.target(node) is not None and b.int8(node.inputs[0]) is not None:
        x, perm = operand(b, node, True)
        b.bind(node.outputs[0], b.op("ELU", [x], x.shape, q=b.target(node)), perm)
        return
    x, perm = operand(b, node, False)
    b.bind(node.outputs[0], elu_like(b, x, 1.0, alpha), perm)


@lowers("Selu")
def selu(b: Builder, node: Node, *, alpha: float = 1.6732632, gamma: float = 1.0507010) -> None:
    """γ · elu(x, α)."""
    x, perm = operand(b, node, False)
    b.bind(node.outputs[0], elu_like(b, x, gamma, gamma * alpha), perm)


@lowers("Celu")
def celu(b: Builder, node: Node, *, alpha: float = 1.0) -> None:
    """max(0, x) + min(0, α · (exp(x / α) − 1))."""
    if alpha <= 0:
        raise unsupported(node, f"α = {alpha}")
    x, perm = operand(b, node, False)
    y = scaled(b, b.op("ELU", [scaled(b, x, 1 / alpha)], x.shape), alpha) if alpha != 1 else b.op("ELU", [x], x.shape)
    b.bind(node.outputs[0], y, perm)


def elu_like(b: Builder, x: Tensor, positive: float, negative: float) -> Tensor:
    """positive · max(0, x) + negative · min(0, exp(x) − 1)."""
    if positive == negative == 1:
        return b.op("ELU", [x], x.shape)
    up = b.op("RELU", [x], x.shape)
    down = b.op("ELU", [b.op("MINIMUM", [x, number(0, x)], x.shape)], x.shape)
    return add(b, scaled(b, up, positive) if positive != 1 else up, scaled(b, down, negative))


def add(b: Builder, x: Tensor, y: Tensor) -> Tensor:
    """Float x + y of one shape."""
    return b.op("ADD", [x, y], x.shape, fusedActivationFunction="NONE")


def mul(b: Builder, x: Tensor, y: Tensor) -> Tensor:
    """Float x · y of one shape."""
    return b.op("MUL", [x, y], x.shape, fusedActivationFunction="NONE")


@lowers("Softplus")
def softplus(b: Builder, node: Node) -> None:
    """log(1 + exp(x)) as max(0, x) + log(1 + exp(−|x|)), which does not overflow."""
    x, perm = operand(b, node, False)
    tail = b.op("EXP", [b.op("NEG", [b.op("ABS", [x], x.shape)], x.shape)], x.shape)
    tail = b.op("LOG", [scaled(b, tail, 1, 1.0)], x.shape)
    b.bind(node.outputs[0], add(b, b.op("RELU", [x], x.shape), tail), perm)


@lowers("Softsign")
def softsign(b: Builder, node: Node) -> None:
    """x / (1 + |x|)."""
    x, perm = operand(b, node, False)
    below = scaled(b, b.op("ABS", [x], x.shape), 1, 1.0)
    b.bind(node.outputs[0], b.op("DIV", [x, below], x.shape, fusedActivationFunction="NONE"), perm)


@lowers("Mish")
def mish(b: Builder, node: Node) -> None:
    """x · tanh(softplus(x)) = x · n / (n + 2) with n = e(e + 2), e = exp(min(x, 20)): beyond 20 the quotient is 1."""
    x, perm = operand(b, node, False)
    e = b.op("EXP", [b.op("MINIMUM", [x, number(20, x)], x.shape)], x.shape)
    n = mul(b, e, scaled(b, e, 1, 2.0))
    ratio = b.op("DIV", [n, scaled(b, n, 1, 2.0)], x.shape, fusedActivationFunction="NONE")
    b.bind(node.outputs[0], mul(b, x, ratio), perm)


@lowers("Gelu")
def gelu(b: Builder, node: Node, *, approximate: str = "none") -> None:
    """Gelu, exact or by tanh."""
    x, perm = operand(b, node, False)
    b.bind(node.outputs[0], b.op("GELU", [x], x.shape, approximate=approximate == "tanh"), perm)


@lowers("Erf")
def erf(b: Builder, node: Node) -> None:
    """erf(x) by Abramowitz and Stegun 7.1.26, error below 1.5e-7: TFLite has no such op.

    erf(|x|) = 1 − t(a1 + t(a2 + t(a3 + t(a4 + t·a5)))) · exp(−x²) with t = 1 / (1 + p|x|).
    """
    x, perm = operand(b, node, False)
    size = b.op("ABS", [x], x.shape)
    t = b.op("DIV", [number(1, x), scaled(b, size, 0.3275911, 1.0)], x.shape, fusedActivationFunction="NONE")
    poly = scaled(b, t, 1.061405429, -1.453152027)
    for coefficient in (1.421413741, -0.284496736, 0.254829592):
        poly = scaled(b, mul(b, poly, t), 1, coefficient)
    tail = mul(b, mul(b, poly, t), b.op("EXP", [b.op("NEG", [mul(b, x, x)], x.shape)], x.shape))
    magnitude = scaled(b, tail, -1, 1.0)
    b.bind(node.outputs[0], mul(b, magnitude, b.op("SIGN", [x], x.shape)), perm)


@lowers("ThresholdedRelu")
def thresholded_relu(b: Builder, node: Node, *, alpha: float = 1.0) -> None:
    """x where x > α, else 0."""
    x, perm = operand(b, node, False)
    above = b.op("GREATER", [x, number(alpha, x)], x.shape, np.bool_)
    b.bind(node.outputs[0], b.op("SELECT_V2", [above, x, number(0, x)], x.shape, x.dtype), perm)


@lowers("Softmax")
def softmax(b: Builder, node: Node, *, axis: int = -1) -> None:
    """Softmax over one axis, int8 where the output has the parameters that the runtime fixes."""
    fixed = QParams.of(1 / 256, -128)
    int8 = b.int8(node.inputs[0]) is not None and b.target(node) == fixed
    x, perm = _axis_last(b, node, axis, int8)
    b.bind(node.outputs[0], b.op("SOFTMAX", [x], x.shape, q=fixed if int8 else None, beta=1.0), perm)


@lowers("LogSoftmax")
def log_softmax(b: Builder, node: Node, *, axis: int = -1) -> None:
    """LogSoftmax over one axis."""
    x, perm = _axis_last(b, node, axis, False)
    b.bind(node.outputs[0], b.op("LOG_SOFTMAX", [x], x.shape), perm)


def _axis_last(b: Builder, node: Node, axis: int, int8: bool) -> tuple[Tensor, Perm]:
    value = b.settle(b.value(node.inputs[0]))
    axis %= len(value.perm)
    perm = (*(other for other in value.perm if other != axis), axis)
    return b.held_as(b.in_layout(value, perm), b.int8(node.inputs[0]) if int8 else None), perm


def _divide(b: Builder, x: Tensor, y: Tensor) -> Tensor:
    return b.op("DIV", [x, y], x.shape, fusedActivationFunction="NONE")


def _apply(b: Builder, kind: str, x: Tensor) -> Tensor:
    return b.op(kind, [x], x.shape)


def _atan2(b: Builder, y: Tensor, x: Tensor) -> Tensor:
    return b.op("ATAN2", [y, x], y.shape)


def _complement(b: Builder, x: Tensor) -> Tensor:
    """√(1 − x²), as √((1 − x)(1 + x)), which keeps its digits near 1."""
    return _apply(b, "SQRT", mul(b, scaled(b, x, -1, 1.0), scaled(b, x, 1, 1.0)))


def _exponentials(b: Builder, x: Tensor, sign: float) -> Tensor:
    """(exp(x) ± exp(−x)) / 2."""
    up, down = _apply(b, "EXP", x), _apply(b, "EXP", _apply(b, "NEG", x))
    return scaled(b, add(b, up, scaled(b, down, sign) if sign != 1 else down), 0.5)


def _area_sine(b: Builder, x: Tensor) -> Tensor:
    """sign(x) · log(|x| + √(x² + 1))."""
    size = _apply(b, "ABS", x)
    root = _apply(b, "SQRT", scaled(b, _apply(b, "SQUARE", x), 1, 1.0))
    return mul(b, _apply(b, "SIGN", x), _apply(b, "LOG", add(b, size, root)))


def _area_cosine(b: Builder, x: Tensor) -> Tensor:
    """log(x + √(x² − 1))."""
    root = _apply(b, "SQRT", mul(b, scaled(b, x, 1, -1.0), scaled(b, x, 1, 1.0)))
    return _apply(b, "LOG", add(b, x, root))


def _area_tangent(b: Builder, x: Tensor) -> Tensor:
    """½ · log((1 + x) / (1 − x))."""
    ratio = _divide(b, scaled(b, x, 1, 1.0), scaled(b, x, -1, 1.0))
    return scaled(b, _apply(b, "LOG", ratio), 0.5)


# Functions without an operator of their own: ONNX op → formula.
FORMULAS: dict[str, Callable[[Builder, Tensor], Tensor]] = {
    "Tan": lambda b, x: _divide(b, _apply(b, "SIN", x), _apply(b, "COS", x)),
    "Asin": lambda b, x: _atan2(b, x, _complement(b, x)),
    "Acos": lambda b, x: _atan2(b, _complement(b, x), x),
    "Atan": lambda b, x: _atan2(b, x, b.const(np.ones(x.shape, np.float32))),
    "Sinh": lambda b, x: _exponentials(b, x, -1),
    "Cosh": lambda b, x: _exponentials(b, x, 1),
    "Asinh": _area_sine,
    "Acosh": _area_cosine,
    "Atanh": _area_tangent,
}


def _register_formula(op: str, formula: Callable[[Builder, Tensor], Tensor]) -> None:
    @lowers(op)
    def lowering(b: Builder, node: Node) -> None:
        x, perm = operand(b, node, False)
        b.bind(node.outputs[0], formula(b, x), perm)


for _op, _formula in FORMULAS.items():
    _register_formula(_op, _formula)
