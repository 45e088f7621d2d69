"""Reductions: over axes, wherever the layout put them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekit.exporters.tflite.builder import FLOAT, Builder, number
from edgekit.exporters.tflite.ir import Node, Perm, QParams, Tensor
from edgekit.exporters.tflite.registry import lowers, unsupported

REDUCTIONS = {
    "ReduceMean": "MEAN",
    "ReduceSum": "SUM",
    "ReduceMax": "REDUCE_MAX",
    "ReduceMin": "REDUCE_MIN",
    "ReduceProd": "REDUCE_PROD",
}
SELECTING = {"REDUCE_MAX", "REDUCE_MIN"}
AVERAGING = {"MEAN", "SUM"}


def reduce(b: Builder, node: Node, kind: str, axes: Sequence[int], keepdims: bool) -> None:
    """Lower a reduction over logical axes. MEAN and SUM rescale in int8; MAX and MIN keep the parameters."""
    name = node.inputs[0]
    if kind in SELECTING:
        q = b.common_q(node, [name])
        held = out_q = q
    elif kind in AVERAGING and b.int8(name) and b.target(node):
        held, out_q = b.int8(name), b.target(node)
    else:
        held = out_q = None
    value = b.settle(b.value(name))
    tensor = b.held_as(value.tensor, held)
    result = reduced(b, kind, tensor, [value.axis(axis) for axis in axes], keepdims, out_q)
    if kind in SELECTING and result.dtype == FLOAT and _asked_for_infinity(b, node):
        result = _with_infinity(b, kind, result)
    dropped = {axis % len(value.perm) for axis in axes} if not keepdims else set()
    left = [axis for axis in value.perm if axis not in dropped]
    order = sorted(left)
    b.bind(node.outputs[0], b.activate(result, node.activation), tuple(order.index(axis) for axis in left))


def _asked_for_infinity(b: Builder, node: Node) -> bool:
    return any(reader.op in ("Equal", "IsInf", "IsNaN") for reader in b.graph.readers().get(node.outputs[0], []))


def _with_infinity(b: Builder, kind: str, x: Tensor) -> Tensor:
    """The runtime's own kernels start from the largest finite number: where that is left, all was infinite."""
    sign = 1 if kind == "REDUCE_MIN" else -1
    bound = number(sign * float(np.finfo(np.float32).max), x)
    untouched = b.op("EQUAL", [x, bound], x.shape, np.bool_)
    return b.op("SELECT_V2", [untouched, number(sign * np.inf, x), x], x.shape, FLOAT)


def reduced(
    b: Builder, kind: str, tensor: Tensor, axes: Sequence[int], keepdims: bool = True, q: QParams | None = None
) -> Tensor:
    """Emit a reduction over physical axes."""
    axes = sorted(axis % len(tensor.shape) for axis in axes)
    if keepdims:
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(tensor.shape))
    else:
        shape = tuple(size for axis, size in enumerate(tensor.shape) if axis not in axes)
    return b.op(kind, [tensor, np.array(axes, np.int32)], shape, tensor.dtype, q, keepDims=bool(keepdims))


def averaged_q(b: Builder, node: Node) -> QParams | None:
    """Parameters for an int8 op that averages but cannot rescale: its input's.

    None where rounding to them first would move a result by more than one step of the output.
    """
    held, target = b.int8(node.inputs[0]), b.target(node)
    if held is None or target is None or target.scale[0] * 2 < held.scale[0]:
        return None
    return held


def reduction_axes(b: Builder, node: Node, axes: Sequence[int] | None, noop_with_empty_axes: int) -> list[int] | None:
    """Axes from the attribute or, since opset 18 (13 for ReduceSum), from the second input; None: do nothing."""
    if len(node.inputs) > 1 and node.inputs[1]:
        array = b.array(node.inputs[1])
        if array is None:
            raise unsupported(node, "its axes are not constant")
        axes = [int(axis) for axis in array.reshape(-1)]
    if not axes:
        return None if noop_with_empty_axes else list(range(len(b.shape(node.inputs[0]))))
    return list(axes)


def _register(op: str, kind: str) -> None:
    @lowers(op)
    def lowering(
        b: Builder, node: Node, *, axes: Sequence[int] | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> None:
        wanted = reduction_axes(b, node, axes, noop_with_empty_axes)
        if not wanted:
            b.bind(node.outputs[0], b.value(node.inputs[0]))
            return
        if kind == "MEAN" and b.dtype(node.inputs[0]) != FLOAT:
            raise unsupported(node, f"the mean of {b.dtype(node.inputs[0])}")
        reduce(b, node, kind, wanted, bool(keepdims))


for _op, _kind in REDUCTIONS.items():
    _register(_op, _kind)


# ONNX op → what is done to each element before they are added up, and to the sum.
NORMS: dict[str, tuple[str | None, str | None]] = {
    "ReduceL1": ("ABS", None),
    "ReduceL2": ("SQUARE", "SQRT"),
    "ReduceLogSum": (None, "LOG"),
    "ReduceSumSquare": ("SQUARE", None),
}


def _register_norm(op: str, before: str | None, after: str | None) -> None:
    @lowers(op)
    def lowering(
        b: Builder, node: Node, *, axes: Sequence[int] | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> None:
        x, perm, wanted = _elements(b, node, axes, noop_with_empty_axes)
        if before == "SQUARE" and x.dtype != FLOAT:
            x = b.op("MUL", [x, x], x.shape, fusedActivationFunction="NONE")
        elif before:
            x = b.op(before, [x], x.shape)
        x = reduced(b, "SUM", x, wanted) if wanted else x
        x = b.op(after, [x], x.shape) if after else x
        _bind_reduced(b, node, x, perm, wanted, bool(keepdims))


for _op, (_before, _after) in NORMS.items():
    _register_norm(_op, _before, _after)


@lowers("ReduceLogSumExp")
def log_sum_exp(
    b: Builder, node: Node, *, axes: Sequence[int] | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> None:
    """log Σ exp(x), as the maximum + log Σ exp(x − maximum), which does not overflow."""
    x, perm, wanted = _elements(b, node, axes, noop_with_empty_axes)
    if wanted:
        top = reduced(b, "REDUCE_MAX", x, wanted)
        below = b.op("SUB", [x, top], x.shape, fusedActivationFunction="NONE")
        total = reduced(b, "SUM", b.op("EXP", [below], x.shape), wanted)
        x = b.op("ADD", [b.op("LOG", [total], total.shape), top], top.shape, fusedActivationFunction="NONE")
    _bind_reduced(b, node, x, perm, wanted, bool(keepdims))


def _elements(
    b: Builder, node: Node, axes: Sequence[int] | None, noop_with_empty_axes: int
) -> tuple[Tensor, Perm, list[int]]:
    """The input as it lies, and the physical axes to reduce: none where there is nothing to add up."""
    wanted = reduction_axes(b, node, axes, noop_with_empty_axes) or []
    value = b.settle(b.value(node.inputs[0]))
    return b.as_float(value.tensor), value.perm, sorted(value.axis(axis) for axis in wanted)


def _bind_reduced(b: Builder, node: Node, x: Tensor, perm: Perm, axes: list[int], keepdims: bool) -> None:
    """Bind a result whose reduced axes were kept, without them unless they are wanted."""
    if keepdims:
        b.bind(node.outputs[0], x, perm)
        return
    left = [axis for place, axis in enumerate(perm) if place not in axes]
    order = sorted(left)
    shape = tuple(size for place, size in enumerate(x.shape) if place not in axes)
    b.bind(node.outputs[0], b.raw_reshape(x, shape), tuple(order.index(axis) for axis in left))
