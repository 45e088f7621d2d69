"""Matrix products: FULLY_CONNECTED with constant weights, BATCH_MATMUL otherwise."""

from __future__ import annotations

import numpy as np

from edgekit.exporters.tflite.builder import FLOAT, Builder
from edgekit.exporters.tflite.ir import Node, QParams, Shape, Tensor, Value, identity
from edgekit.exporters.tflite.kernel_support import rescales
from edgekit.exporters.tflite.layout import merge_groups
from edgekit.exporters.tflite.operands import constant, operands
from edgekit.exporters.tflite.ops.activation import scaled
from edgekit.exporters.tflite.registry import lowers, unsupported


@lowers("Gemm")
def gemm(b: Builder, node: Node, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0) -> None:
    """alpha · A · B + beta · C."""
    _float_only(b, node)
    out = b.shape(node.outputs[0])
    x, w = b.value(node.inputs[0]), b.settle(b.value(node.inputs[1]))
    x = swapped(b.settle(x)) if transA else x
    w = w if transB else swapped(w)
    if alpha != 1 and w.tensor.data is not None:
        w, alpha = _times(b, w, alpha), 1.0
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    row = _row(b, bias, beta, out[1]) if bias and alpha == 1 else None
    if row is not None or (not bias and alpha == 1):
        result, perm = fully_connected(b, node, x, w, row or "")
        b.bind(node.outputs[0], result, perm)
        return
    result, perm = fully_connected(b, node, x, w, "", plain=True)
    if alpha != 1:
        result = scaled(b, result, alpha)
    if bias:
        term = b.broadcastable(bias, identity(2), None)
        term = scaled(b, term, beta) if beta != 1 else term
        result = b.op("ADD", [result, term], out, fusedActivationFunction="NONE")
    b.bind(node.outputs[0], b.activate(result, node.activation), perm)


def _row(b: Builder, bias: str, beta: float, channels: int) -> str | None:
    """The name of a bias of one number per channel, or None where C is something else."""
    if beta == 1 and b.shape(bias) == (channels,):
        return bias
    array = b.array(bias)
    if array is None or (array.size != 1 and (array.size, array.shape[-1]) != (channels, channels)):
        return None
    return b.derive(bias, np.broadcast_to(array.reshape(-1) * np.float32(beta), (channels,)))


def _times(b: Builder, w: Value, factor: float) -> Value:
    """Constant weights times a number: in their scale if they are held as int8."""
    tensor, q = w.tensor, w.tensor.q
    assert tensor.data is not None
    if q is not None and factor > 0:
        q = QParams.of(np.array(q.scale, np.float32) * np.float32(factor), q.zero_point, q.axis)
        return Value(b.const(tensor.data, q, tensor.name), w.perm)
    real = q.dequantize(tensor.data) if q is not None else tensor.data
    return Value(b.const((real * real.dtype.type(factor)), None, tensor.name), w.perm)


def swapped(value: Value) -> Value:
    """The value with its last two logical axes exchanged: no data move."""
    rank = len(value.perm)
    exchange = {rank - 1: rank - 2, rank - 2: rank - 1}
    return Value(value.tensor, tuple(exchange.get(axis, axis) for axis in value.perm))


@lowers("MatMul")
def matmul(b: Builder, node: Node) -> None:
    """NumPy's matmul of any ranks; a third input is a bias that was fused into it."""
    _float_only(b, node)
    x, w = b.value(node.inputs[0]), b.settle(b.value(node.inputs[1]))
    out = b.shape(node.outputs[0])
    if len(x.shape) == 1:
        x = b.reshape(x, (1, *x.shape))
    if len(w.shape) == 1:
        w = b.reshape(w, (*w.shape, 1))
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    if w.tensor.data is not None and len(w.shape) == 2:
        result, perm = fully_connected(b, node, x, swapped(w), bias)
    else:
        result, perm = batched(b, node, b.settle(x), w)
    b.bind(node.outputs[0], b.reshape(Value(result, perm), out))


def fully_connected(
    b: Builder, node: Node, x: Value, w: Value, bias: str, plain: bool = False
) -> tuple[Tensor, tuple[int, ...]]:
    """x · wᵀ + bias over the last axis of x; w is [channels, features]. `plain`: float and without activation."""
    if x.shape[-1] != w.shape[1]:
        raise unsupported(node, f"{x.shape[-1]} features and weights for {w.shape[1]}")
    x, w = _reorder_weights(b, x, w)
    x = b.settle(x)
    last = len(x.perm) - 1
    perm = (*(axis for axis in x.perm if axis != last), last)
    channels = w.shape[0]
    layer = operands(b, node, x, w, bias, (perm, (0, 1)), channels, int8=not plain, hybrid=True)
    result = b.op(
        "FULLY_CONNECTED",
        [layer.x, layer.w, layer.bias],
        (*layer.x.shape[:-1], channels),
        q=layer.q,
        keepNumDims=len(perm) != 2,
        asymmetricQuantizeInputs=layer.hybrid,
        fusedActivationFunction="NONE" if plain else node.activation,
    )
    return result, perm


def _reorder_weights(b: Builder, x: Value, w: Value) -> tuple[Value, Value]:
    """Read a flattened channels-last value as it lies and order the weights' features accordingly."""
    if x.pending is None or w.tensor.data is None:
        return x, w
    groups = merge_groups(x.base_shape, x.pending)
    last = len(x.pending) - 1
    if groups is None or groups[-1][1] != [last] or any(len(group[0]) != 1 for group in groups[:-1]):
        return x, w
    merged = groups[-1][0]
    order = [axis for axis in x.perm if axis in merged]
    rest = [axis for axis in x.perm if x.base_shape[axis] != 1 and axis not in merged]
    lies = [axis for axis in x.perm if x.base_shape[axis] != 1]
    if lies != [*rest, *order] or rest != sorted(rest):
        return x, w
    data = b.in_layout(w, (0, 1))
    assert data.data is not None
    features = data.data.reshape(-1, *(x.base_shape[axis] for axis in merged))
    features = features.transpose(0, *(1 + merged.index(axis) for axis in order))
    weights = constant(b, Value(data, (0, 1)), np.ascontiguousarray(features.reshape(data.shape)))
    return Value(b.raw_reshape(x.tensor, x.pending), identity(len(x.pending))), weights


def batched(b: Builder, node: Node, x: Value, w: Value) -> tuple[Tensor, tuple[int, ...]]:
    """A product of stacks of matrices: int8 where both sides and the result are; a transposed one is read as such."""
    q = b.target(node)
    held = [item for item in (x.tensor.q, w.tensor.q) if item is not None and item.per_tensor]
    int8 = q is not None and len(held) == 2 and rescales(q, held[0].scale[0] * held[1].scale[0], *held)
    adj_x, left = _matrix(b, x)
    adj_y, right = _matrix(b, w)
    if not int8:
        left, right = b.as_float(left), b.as_float(right)
    maker = b.maker(right) if left is right else None
    if maker is not None and maker.kind == "TRANSPOSE":
        # XNNPACK takes the product of one TRANSPOSE's result with itself for that with its transpose.
        right = b.op("TRANSPOSE", [*maker.inputs], right.shape, right.dtype, right.q)
    shape: Shape
    batch = np.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    shape = (*batch, x.shape[-2], w.shape[-1])
    if len(shape) > 4 and x.shape[:-2] == w.shape[:-2]:
        count = int(np.prod(batch))
        left = b.raw_reshape(left, (count, *left.shape[-2:]))
        right = b.raw_reshape(right, (count, *right.shape[-2:]))
        shape = (count, *shape[-2:])
    result = b.op(
        "BATCH_MATMUL",
        [left, right],
        shape,
        q=q if int8 else None,
        adjX=adj_x,
        adjY=adj_y,
        asymmetricQuantizeInputs=False,
    )
    result = b.raw_reshape(result, (*batch, *shape[-2:]))
    return b.activate(result, node.activation), identity(len(result.shape))


def _matrix(b: Builder, value: Value) -> tuple[bool, Tensor]:
    """A stack of matrices as it lies, and whether they lie transposed."""
    rank = len(value.perm)
    transposed = (*range(rank - 2), rank - 1, rank - 2)
    if value.perm == transposed and value.tensor.data is None:
        return True, value.tensor
    return False, b.in_layout(value, identity(rank))


def _float_only(b: Builder, node: Node) -> None:
    if b.dtype(node.outputs[0]) != FLOAT:
        raise unsupported(node, f"matrix products of {b.dtype(node.outputs[0])}")
