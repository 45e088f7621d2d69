"""Ops that pick elements by index."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.exporters.tflite.builder import FLOAT, INT32, Builder, Operand
from edgekit.exporters.tflite.ir import Node, Perm, QParams, Shape, Tensor, Value, identity
from edgekit.exporters.tflite.ops.arithmetic import casted
from edgekit.exporters.tflite.ops.shape import moved, sliced
from edgekit.exporters.tflite.registry import lowers, unsupported

TABLE = 2**22  # elements of a table of updates by places
# A scatter's reduction → that of all updates of a place, what joins it with the data, and the neutral number.
COMBINED = {
    "max": ("REDUCE_MAX", "MAXIMUM", -float(np.finfo(np.float32).max)),
    "min": ("REDUCE_MIN", "MINIMUM", float(np.finfo(np.float32).max)),
    "mul": ("REDUCE_PROD", "MUL", 1.0),
}
INT32_CODE, INT64_CODE = 2, 4  # TFLite's TensorType


@lowers("Gather")
def gather(b: Builder, node: Node, *, axis: int = 0) -> None:
    """Take slices along one axis, wherever it lies; negative indices are wrapped, which the runtime does not do."""
    value = b.settle(b.value(node.inputs[0]))
    rank, size = len(value.perm), value.shape[axis]
    axis %= rank
    scales = _separate_scales(b, node, value)
    if scales is not None:
        tensor = value.tensor
        value = Value(Tensor(tensor.name, tensor.shape, tensor.dtype, tensor.data), value.perm)
    elif value.tensor.data is None or value.tensor.q is None or not value.tensor.q.per_tensor or b.target(node):
        value = moved(b, node)
    physical = value.axis(axis)
    array = b.array(node.inputs[1])
    count = len(b.shape(node.inputs[1]))
    indices: Tensor | np.ndarray
    if array is not None:
        indices = np.where(array < 0, array + size, array).astype(np.int32)
        if indices.size == 1:
            # XNNPACK has no gather: one element is a cut.
            whole: list[range] = [range(extent) for extent in value.tensor.shape]
            whole[physical] = range(int(indices.reshape(())), int(indices.reshape(())) + 1)
            cut = b.reshape(Value(sliced(b, value.tensor, whole), value.perm), b.shape(node.outputs[0]))
            b.bind(node.outputs[0], cut if scales is None else _real(b, node, cut, scales, indices, axis))
            return
    else:
        indices = wrapped(b, b.take(node.inputs[1]), size)
    shape = (*value.tensor.shape[:physical], *b.shape(node.inputs[1]), *value.tensor.shape[physical + 1 :])
    result = b.op("GATHER", [value.tensor, indices], shape, q=value.tensor.q, axis=physical, batchDims=0)
    perm: list[int] = []
    for logical in value.perm:
        if logical == axis:
            perm += range(axis, axis + count)
        else:
            perm.append(logical if logical < axis else logical + count - 1)
    gathered = Value(result, tuple(perm) if perm else identity(0))
    b.bind(node.outputs[0], gathered if scales is None else _real(b, node, gathered, scales, indices, axis))


def _separate_scales(b: Builder, node: Node, table: Value) -> QParams | None:
    """Scales of an int8 table that are to be applied to what is gathered from it: those of rows, or of columns."""
    q = table.tensor.q
    if table.tensor.data is None or q is None or q.axis is None or not q.symmetric or b.target(node) is not None:
        return None
    return q.moved(table.perm[q.axis])


def _real(b: Builder, node: Node, gathered: Value, q: QParams, indices: Tensor | np.ndarray, axis: int) -> Value:
    """Gathered int8 numbers times their scales, which lie along the logical axis `q.axis` of the table."""
    assert q.axis is not None
    places = b.shape(node.inputs[1])
    rank = len(gathered.shape)
    scales: Tensor = b.const(np.array(q.scale, np.float32))
    if q.axis == axis:
        scales = b.op("GATHER", [scales, indices], places, FLOAT, axis=0, batchDims=0)
        shape = [*[1] * axis, *places, *[1] * (rank - axis - len(places))]
    else:
        shape = [1] * rank
        shape[q.axis if q.axis < axis else q.axis + len(places) - 1] = len(q.scale)
    factor = b.in_layout(b.settle(b.reshape(Value(scales, identity(len(scales.shape))), tuple(shape))), gathered.perm)
    numbers = b.op("CAST", [gathered.tensor], gathered.tensor.shape, FLOAT)
    return Value(b.op("MUL", [numbers, factor], numbers.shape, fusedActivationFunction="NONE"), gathered.perm)


def wrapped(b: Builder, indices: Tensor, size: int | np.ndarray) -> Tensor:
    """Indices with `size` added to the negative ones."""
    if indices.data is not None:
        return b.const(np.where(indices.data < 0, indices.data + size, indices.data).astype(indices.dtype))
    zero, length = np.zeros((), indices.dtype), np.array(size, indices.dtype)
    negative = b.op("LESS", [indices, zero], indices.shape, np.bool_)
    shifted = b.op("ADD", [indices, length], indices.shape, fusedActivationFunction="NONE")
    return b.op("SELECT_V2", [negative, shifted, indices], indices.shape, indices.dtype)


def _constant(b: Builder, node: Node, index: int, what: str) -> np.ndarray:
    array = b.array(node.inputs[index])
    if array is None:
        raise unsupported(node, f"its {what} is not constant")
    return array


def _as_int32(b: Builder, tensor: Tensor) -> Tensor:
    return casted(b, tensor, INT32)


def _axis_last(b: Builder, name: str, axis: int, q: QParams | None) -> tuple[Tensor, Perm]:
    value = b.settle(b.value(name))
    axis %= len(value.perm)
    perm = (*(other for other in value.perm if other != axis), axis)
    return b.held_as(b.in_layout(value, perm), q), perm


@lowers("ArgMax", "ArgMin")
def arg_max(b: Builder, node: Node, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> None:
    """Index of the largest or smallest element, the first or the last of equal ones."""
    value = b.settle(b.value(node.inputs[0]))
    x, rank = b.as_float(value.tensor), len(value.perm)
    axis %= rank
    physical = value.axis(axis)
    if select_last_index:
        x = b.op("REVERSE_V2", [x, np.array([physical], np.int32)], x.shape)
    shape = tuple(size for place, size in enumerate(x.shape) if place != physical)
    kind = "ARG_MAX" if node.op == "ArgMax" else "ARG_MIN"
    found = b.op(kind, [x, np.array(physical, np.int32)], shape, np.int64, outputType=INT64_CODE)
    if select_last_index:
        last = np.array(value.shape[axis] - 1, np.int64)
        found = b.op("SUB", [b.const(last), found], shape, fusedActivationFunction="NONE")
    left = [other for other in value.perm if other != axis]
    order = sorted(left)
    result = Value(found, tuple(order.index(other) for other in left))
    b.bind(node.outputs[0], b.reshape(result, b.shape(node.outputs[0])))


@lowers("TopK")
def top_k(b: Builder, node: Node, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> None:
    """TOPK_V2 over the last axis; the smallest are the largest of the negated values."""
    count = int(_constant(b, node, 1, "k").reshape(()))
    x, perm = _axis_last(b, node.inputs[0], axis, None)
    if not largest:
        x = b.op("NEG", [x], x.shape)
    shape = (*x.shape[:-1], count)
    values, indices = Tensor("", shape, x.dtype), Tensor("", shape, INT32)
    b.ops_out("TOPK_V2", [x, np.array(count, np.int32)], [values, indices])
    if node.outputs[0]:
        b.bind(node.outputs[0], values if largest else b.op("NEG", [values], shape), perm)
    if len(node.outputs) > 1 and node.outputs[1]:
        b.bind(node.outputs[1], casted(b, indices, np.dtype(np.int64)), perm)


@lowers("GatherND")
def gather_nd(b: Builder, node: Node, *, batch_dims: int = 0) -> None:
    """GATHER_ND, with negative indices wrapped."""
    q = b.common_q(node, node.inputs[:1])
    data = b.take(node.inputs[0], None, q)
    lead, shape = data.shape[:batch_dims], b.shape(node.inputs[1])
    indices = _wrapped_rows(b, node, data.shape[batch_dims:])
    if batch_dims:
        # The rows of each part of the batch, with the part's number before them.
        count = int(np.prod(lead))
        each = int(np.prod(shape[batch_dims:-1]))
        number = np.repeat(np.arange(count, dtype=np.int32), each).reshape(count, each, 1)
        rows = b.raw_reshape(indices, (count, each, shape[-1]))
        indices = b.op(
            "CONCATENATION", [number, rows], (count, each, shape[-1] + 1), axis=2, fusedActivationFunction="NONE"
        )
        data = b.raw_reshape(data, (count, *data.shape[batch_dims:]))
        found = b.op("GATHER_ND", [data, indices], (count, each, *data.shape[1 + shape[-1] :]), q=q)
        b.bind(node.outputs[0], b.raw_reshape(found, b.shape(node.outputs[0])))
        return
    b.bind(node.outputs[0], b.op("GATHER_ND", [data, indices], b.shape(node.outputs[0]), q=q))


def _wrapped_rows(b: Builder, node: Node, shape: Shape) -> Tensor:
    """Rows of indices into a tensor, each without negative ones."""
    array = b.array(node.inputs[1])
    depth = b.shape(node.inputs[1])[-1]
    sizes = np.array(shape[:depth])
    if array is not None:
        return b.const(np.where(array < 0, array + sizes, array).astype(np.int32))
    return wrapped(b, _as_int32(b, b.take(node.inputs[1])), sizes)


@lowers("GatherElements")
def gather_elements(b: Builder, node: Node, *, axis: int = 0) -> None:
    """GATHER from the flattened data, at positions computed from the indices."""
    q = b.common_q(node, node.inputs[:1])
    data = b.take(node.inputs[0], None, q)
    positions = _flat_positions(b, node, data.shape, axis % len(data.shape))
    flat = b.raw_reshape(data, (data.size,))
    shape = b.shape(node.outputs[0])
    b.bind(node.outputs[0], b.op("GATHER", [flat, positions], shape, q=q, axis=0, batchDims=0))


def _flat_positions(b: Builder, node: Node, shape: Shape, axis: int) -> Tensor:
    """Positions in the flattened data of the elements that indices along one axis name."""
    strides = np.array([int(np.prod(shape[place + 1 :])) for place in range(len(shape))])
    grid = np.indices(b.shape(node.inputs[1]))
    grid[axis] = 0
    base = np.tensordot(strides, grid, 1)
    array = b.array(node.inputs[1])
    if array is not None:
        along = np.where(array < 0, array + shape[axis], array)
        return b.const((base + along * strides[axis]).astype(np.int32))
    indices = wrapped(b, _as_int32(b, b.take(node.inputs[1])), shape[axis])
    scaled = b.op("MUL", [indices, np.array(strides[axis], np.int32)], indices.shape, fusedActivationFunction="NONE")
    return b.op("ADD", [scaled, base.astype(np.int32)], indices.shape, fusedActivationFunction="NONE")


@lowers("ScatterND")
def scatter_nd(b: Builder, node: Node, *, reduction: str = "none") -> None:
    """Replace or add slices at rows of indices; rows must differ where slices are replaced, as ONNX asks."""
    data, updates = b.take(node.inputs[0]), b.take(node.inputs[2])
    array = b.array(node.inputs[1])
    if array is not None:
        sizes = np.array(data.shape[: array.shape[-1]])
        _check_distinct(node, np.where(array < 0, array + sizes, array).reshape(-1, array.shape[-1]), reduction)
    indices = _wrapped_rows(b, node, data.shape)
    b.bind(node.outputs[0], _scattered(b, node, data, indices, updates, reduction))


@lowers("ScatterElements")
def scatter_elements(b: Builder, node: Node, *, axis: int = 0, reduction: str = "none") -> None:
    """Replace or add elements along one axis: SCATTER_ND into the flattened data."""
    data, updates = b.take(node.inputs[0]), b.take(node.inputs[2])
    positions = _flat_positions(b, node, data.shape, axis % len(data.shape))
    if positions.data is not None:
        _check_distinct(node, positions.data.reshape(-1, 1), reduction)
    rows = b.raw_reshape(positions, (positions.size, 1))
    flat = b.raw_reshape(data, (data.size,))
    result = _scattered(b, node, flat, rows, b.raw_reshape(updates, (updates.size,)), reduction)
    b.bind(node.outputs[0], b.raw_reshape(result, data.shape))


def _check_distinct(node: Node, rows: np.ndarray, reduction: str) -> None:
    if reduction == "none" and len(np.unique(rows, axis=0)) != len(rows):
        raise unsupported(node, "one place written twice")


def _scattered(b: Builder, node: Node, data: Tensor, rows: Tensor, updates: Tensor, reduction: str) -> Tensor:
    """SCATTER_ND adds into zeros: added to the data, or chosen where ones were scattered."""
    if reduction in COMBINED:
        return _combined(b, node, data, rows, updates, reduction)
    if reduction not in ("none", "add"):
        raise unsupported(node, f"reduction {reduction}")
    shape = np.array(data.shape, np.int32)
    written = b.op("SCATTER_ND", [rows, updates, shape], data.shape, updates.dtype)
    if reduction == "add":
        return b.op("ADD", [data, written], data.shape, fusedActivationFunction="NONE")
    ones = b.op("SCATTER_ND", [rows, np.ones(updates.shape, np.int32), shape], data.shape, INT32)
    touched = b.op("GREATER", [ones, np.zeros((), np.int32)], data.shape, np.bool_)
    return b.op("SELECT_V2", [touched, written, data], data.shape, data.dtype)


def _combined(b: Builder, node: Node, data: Tensor, rows: Tensor, updates: Tensor, reduction: str) -> Tensor:
    """Reduce, over all updates, what each writes to each place: a table of one by the other."""
    depth = rows.shape[-1]
    count, places = rows.size // depth, int(np.prod(data.shape[:depth]))
    width = data.size // places
    if count * places * width > TABLE:
        raise unsupported(
            node, f"reduction {reduction} of {count} updates of {places} places, whose table is too large"
        )
    strides = np.array([int(np.prod(data.shape[axis + 1 : depth])) for axis in range(depth)], np.int32)
    if rows.data is not None:
        flat = b.const((rows.data.reshape(count, depth) * strides).sum(1).astype(np.int32).reshape(count, 1))
    else:
        steps = b.op(
            "MUL", [b.raw_reshape(rows, (count, depth)), strides], (count, depth), fusedActivationFunction="NONE"
        )
        flat = b.op("SUM", [steps, np.array([1], np.int32)], (count, 1), keepDims=True)
    kind, combine, neutral = COMBINED[reduction]
    number = neutral if data.dtype == FLOAT or reduction == "mul" else np.iinfo(data.dtype).max * int(np.sign(neutral))
    hits = b.op("EQUAL", [flat, np.arange(places, dtype=np.int32)[None]], (count, places), np.bool_)
    table = b.op(
        "SELECT_V2",
        [
            b.raw_reshape(hits, (count, places, 1)),
            b.raw_reshape(updates, (count, 1, width)),
            np.full((1, 1, 1), number, data.dtype),
        ],
        (count, places, width),
        data.dtype,
    )
    found = b.op(kind, [table, np.array([0], np.int32)], (places, width), keepDims=False)
    options: dict[str, Any] = {"fusedActivationFunction": "NONE"} if combine == "MUL" else {}
    return b.op(combine, [data, b.raw_reshape(found, data.shape)], data.shape, **options)


@lowers("CumSum")
def cumulative_sum(b: Builder, node: Node, *, exclusive: int = 0, reverse: int = 0) -> None:
    """Running sum along one axis."""
    value = b.settle(b.value(node.inputs[0]))
    axis = int(_constant(b, node, 1, "axis").reshape(()))
    x = b.as_float(value.tensor)
    where = np.array(value.axis(axis), np.int32)
    result = b.op("CUMSUM", [x, where], x.shape, exclusive=bool(exclusive), reverse=bool(reverse))
    b.bind(node.outputs[0], result, value.perm)


@lowers("OneHot")
def one_hot(b: Builder, node: Node, *, axis: int = -1) -> None:
    """ONE_HOT; the indices may be floats in ONNX, and negative."""
    depth = int(_constant(b, node, 1, "depth").reshape(()))
    off, on = _constant(b, node, 2, "pair of values")
    indices = wrapped(b, _as_int32(b, b.take(node.inputs[0])), depth)
    shape = b.shape(node.outputs[0])
    inputs: list[Operand] = [indices, np.array(depth, np.int32), np.array(on), np.array(off)]
    b.bind(node.outputs[0], b.op("ONE_HOT", inputs, shape, on.dtype, axis=axis % len(shape)))


@lowers("Hardmax")
def hardmax(b: Builder, node: Node, *, axis: int = -1) -> None:
    """One at the first largest element along an axis, else zero."""
    x, perm = _axis_last(b, node.inputs[0], axis, None)
    last = len(x.shape) - 1
    found = b.op("ARG_MAX", [x, np.array(last, np.int32)], x.shape[:-1], INT32, outputType=INT32_CODE)
    inputs: list[Operand] = [found, np.array(x.shape[-1], np.int32), np.ones((), np.float32), np.zeros((), np.float32)]
    b.bind(node.outputs[0], b.op("ONE_HOT", inputs, x.shape, FLOAT, axis=last), perm)


@lowers("Trilu")
def trilu(b: Builder, node: Node, *, upper: int = 1) -> None:
    """Keep one triangle of the last two axes."""
    offset = int(_constant(b, node, 1, "offset").reshape(())) if len(node.inputs) > 1 and node.inputs[1] else 0
    q = b.common_q(node, node.inputs[:1], 0.0)
    x = b.take(node.inputs[0], None, q)
    ones = np.ones(x.shape[-2:], np.bool_)
    mask = np.triu(ones, offset) if upper else np.tril(ones, offset)
    mask = np.broadcast_to(mask, x.shape).copy()
    zero = b.const(q.quantize(np.zeros(1, np.float32)), q) if q else b.const(np.zeros(1, x.dtype))
    b.bind(node.outputs[0], b.op("SELECT_V2", [mask, x, zero], x.shape, x.dtype, q))


@lowers("ReverseSequence")
def reverse_sequence(b: Builder, node: Node, *, batch_axis: int = 1, time_axis: int = 0) -> None:
    """Reverse the first elements of each sequence."""
    x = b.take(node.inputs[0])
    lengths = _as_int32(b, b.take(node.inputs[1]))
    b.bind(node.outputs[0], b.op("REVERSE_SEQUENCE", [x, lengths], x.shape, seqDim=time_axis, batchDim=batch_axis))
