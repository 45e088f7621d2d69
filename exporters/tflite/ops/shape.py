"""Ops that move, cut and join: int8 values pass through them unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from edgekit.exporters.tflite.builder import FLOAT, Builder
from edgekit.exporters.tflite.ir import Node, QParams, Shape, Tensor, Value, channels_last
from edgekit.exporters.tflite.operands import int32_bias
from edgekit.exporters.tflite.padding import pad as pad_tensor
from edgekit.exporters.tflite.passes.fuse import slice_arrays
from edgekit.exporters.tflite.registry import lowers, unsupported

NHWC = channels_last(4)
SPLITS = 4  # XNNPACK's SPLIT makes no more parts


def moved(b: Builder, node: Node, *numbers: float) -> Value:
    """The first input, settled, and held with what the output asks for or as it is; `numbers` go beside its own."""
    value = b.settle(b.value(node.inputs[0]))
    return Value(b.held_as(value.tensor, b.common_q(node, node.inputs[:1], *numbers)), value.perm)


@lowers("Identity", "StoredOutput")
def alias(b: Builder, node: Node) -> None:
    """Another name for a value."""
    b.bind(node.outputs[0], b.value(node.inputs[0]))


@lowers("Quantize")
def quantize(b: Builder, node: Node) -> None:
    """A float value held as int8 from here on: `bind` converts."""
    b.bind(node.outputs[0], b.value(node.inputs[0]))


@lowers("Reshape")
def reshape(b: Builder, node: Node, *, allowzero: int = 0) -> None:
    """Reshape to the shape that shape inference found."""
    _reshape(b, node)


@lowers("Flatten")
def flatten(b: Builder, node: Node, *, axis: int = 1) -> None:
    """Flatten to two axes."""
    _reshape(b, node)


@lowers("Squeeze", "Unsqueeze")
def squeeze(b: Builder, node: Node, *, axes: Sequence[int] | None = None) -> None:
    """Drop or insert axes of size 1."""
    _reshape(b, node)


def _reshape(b: Builder, node: Node) -> None:
    value = b.value(node.inputs[0])
    b.bind(node.outputs[0], b.reshape(value, b.shape(node.outputs[0])))


@lowers("Transpose")
def transpose(b: Builder, node: Node, *, perm: Sequence[int] | None = None) -> None:
    """Rename the axes; the data move only where an op asks for another order."""
    value = b.settle(b.value(node.inputs[0]))
    order = list(perm) if perm is not None else list(range(len(value.perm)))[::-1]
    b.bind(node.outputs[0], Value(value.tensor, tuple(order.index(axis) for axis in value.perm)))


@lowers("Concat")
def concat(b: Builder, node: Node, *, axis: int) -> None:
    """Concatenation; in int8 all inputs take the output's parameters, as the runtime wants."""
    rank = len(b.shape(node.outputs[0]))
    perm = b.layout_of(node.inputs, rank)
    q = b.common_q(node, node.inputs)
    names = [name for name in node.inputs if 0 not in b.shape(name)] or node.inputs[:1]
    tensors = [b.take(name, perm, q) for name in names]
    if len(tensors) == 1:
        b.bind(node.outputs[0], tensors[0], perm)
        return
    physical = perm.index(axis % rank)
    shape = list(tensors[0].shape)
    shape[physical] = sum(tensor.shape[physical] for tensor in tensors)
    result = b.op(
        "CONCATENATION", [*tensors], tuple(shape), tensors[0].dtype, q, axis=physical, fusedActivationFunction="NONE"
    )
    b.bind(node.outputs[0], result, perm)


@lowers("Split")
def split(
    b: Builder, node: Node, *, axis: int = 0, num_outputs: int | None = None, split: Sequence[int] | None = None
) -> None:
    """Split along one axis: SPLIT into few equal parts, else cuts, which XNNPACK takes and SPLIT_V it does not."""
    value = b.settle(b.value(node.inputs[0]))
    # The outputs may ask for different parameters, so that each is requantized where it is bound.
    x, physical = value.tensor, value.axis(axis)
    sizes = [b.shape(name)[axis] for name in node.outputs]
    if len(set(sizes)) == 1 and 2 <= len(sizes) <= SPLITS:
        shape = (*x.shape[:physical], sizes[0], *x.shape[physical + 1 :])
        outputs = [Tensor("", shape, x.dtype, None, x.q) for _ in sizes]
        b.ops_out("SPLIT", [np.array(physical, np.int32), x], [*outputs], numSplits=len(sizes))
    else:
        ends = np.cumsum(sizes)
        whole = [range(size) for size in x.shape]
        cuts = [range(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True)]
        outputs = [sliced(b, x, [*whole[:physical], cut, *whole[physical + 1 :]]) for cut in cuts]
    for name, output in zip(node.outputs, outputs, strict=True):
        b.bind(name, output, value.perm)


@lowers("Slice")
def slice_(b: Builder, node: Node) -> None:
    """Slice by constant bounds: SLICE for step 1, STRIDED_SLICE otherwise, after REVERSE_V2 for negative steps."""
    value = moved(b, node)
    arrays = slice_arrays(b.graph, node)
    if arrays is None:
        raise unsupported(node, "its bounds are not constant")
    ranges = [range(size) for size in value.tensor.shape]
    for start, end, axis, step in zip(*arrays, strict=True):
        physical = value.axis(axis)
        ranges[physical] = _steps(int(start), int(end), int(step), value.tensor.shape[physical])
    b.bind(node.outputs[0], sliced(b, value.tensor, ranges), value.perm)


def _steps(start: int, end: int, step: int, size: int) -> range:
    """The indices of a slice: where a negative step starts before the first element, ONNX takes it, unlike Python."""
    start, end = (bound + size if bound < 0 else bound for bound in (start, end))
    if step > 0:
        return range(min(max(start, 0), size), min(max(end, 0), size), step)
    return range(min(max(start, 0), size - 1), min(max(end, -1), size - 1), step)


def sliced(b: Builder, x: Tensor, ranges: Sequence[range]) -> Tensor:
    """Cut physical ranges out of a tensor; ranges with negative steps are cut from the reversed tensor."""
    for axis, indices in enumerate(ranges):
        if indices.step < 0:
            x = b.op("REVERSE_V2", [x, np.array([axis], np.int32)], x.shape, q=x.q)
            last = x.shape[axis] - 1
            forward = range(last - indices.start, last - indices.stop, -indices.step)
            ranges = [*ranges[:axis], forward, *ranges[axis + 1 :]]
    # Cut to what the steps reach, so that what is left is a plain cut or a plain stride.
    reach = [range(indices.start, indices[-1] + 1) if len(indices) else indices for indices in ranges]
    strides = [indices.step if len(indices) > 1 else 1 for indices in ranges]
    shape = tuple(len(indices) for indices in ranges)
    if max(strides, default=1) == 1:
        return _cut(b, x, reach)
    if len(shape) == 4 and strides[0] == strides[3] == 1 and 0 not in shape and (x.q or x.dtype == FLOAT):
        # Rows after the last one taken may stay, unless there is another step's worth of them.
        room = [
            range(cut.start, size) if (size - cut.start - 1) // step + 1 == count else cut
            for cut, size, step, count in zip(reach, x.shape, strides, shape, strict=True)
        ]
        return _stride(b, _cut(b, x, room), strides[1], strides[2], shape)
    begin, end = (np.array([getattr(indices, side) for indices in reach], np.int32) for side in ("start", "stop"))
    return b.op("STRIDED_SLICE", [x, begin, end, np.array(strides, np.int32)], shape, q=x.q)


def _cut(b: Builder, x: Tensor, ranges: Sequence[range]) -> Tensor:
    shape = tuple(len(indices) for indices in ranges)
    if shape == x.shape:
        return x
    if 0 in shape:
        return b.const(np.zeros(shape, x.dtype), x.q)
    begin = np.array([indices.start for indices in ranges], np.int32)
    return b.op("SLICE", [x, begin, np.array(shape, np.int32)], shape, q=x.q)


def _stride(b: Builder, x: Tensor, height: int, width: int, shape: Shape) -> Tensor:
    """Every n-th row and column as a 1×1 depthwise convolution by one, which is exact.

    XNNPACK has no strided slice: with one, its graph falls to pieces.
    """
    channels = x.shape[3]
    ones, zeros = np.ones((1, 1, 1, channels), np.float32), np.zeros(channels, np.float32)
    weights, bias = b.const(ones), b.const(zeros)
    if x.q is not None:
        q = QParams.of(1 / 127, 0)
        weights, bias = b.const(q.quantize(ones), q), int32_bias(b, "", x.q, q, channels)
    return b.op(
        "DEPTHWISE_CONV_2D",
        [x, weights, bias],
        shape,
        q=x.q,
        padding="VALID",
        strideH=height,
        strideW=width,
        depthMultiplier=1,
        fusedActivationFunction="NONE",
    )


@lowers("Pad")
def pad(b: Builder, node: Node, *, mode: str = "constant") -> None:
    """Pad with a constant, or mirrored; edges are repeated slices. Negative amounts cut."""
    amounts = b.array(node.inputs[1])
    if amounts is None:
        raise unsupported(node, "its amounts are not constant")
    constant = b.array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else np.zeros(())
    if constant is None:
        raise unsupported(node, "its value is not constant")
    value = moved(b, node, constant.reshape(()).item())
    x, rank = value.tensor, len(value.perm)
    axes = b.array(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else np.arange(rank)
    if axes is None:
        raise unsupported(node, "its axes are not constant")
    table = np.zeros((rank, 2), np.int64)
    for axis, begin, end in zip(axes, amounts[: len(axes)], amounts[len(axes) :], strict=True):
        table[value.axis(int(axis))] = begin, end
    if (table < 0).any():
        x = sliced(
            b, x, [range(max(0, -begin), size + min(0, end)) for (begin, end), size in zip(table, x.shape, strict=True)]
        )
        table = np.maximum(table, 0)
    if not table.any():
        result = x
    elif mode == "constant":
        result = pad_tensor(b, x, table, constant.reshape(()).item())
    elif mode == "reflect":
        if any(max(amount) >= size for amount, size in zip(table, x.shape, strict=True) if max(amount)):
            raise unsupported(node, "reflection by more than the size of an axis")
        shape = tuple(size + int(sum(amount)) for size, amount in zip(x.shape, table, strict=True))
        result = b.op("MIRROR_PAD", [x, table.astype(np.int32)], shape, q=x.q, mode="REFLECT")
    elif mode in ("edge", "wrap"):
        result = _extend(b, x, table, mode)
    else:
        raise unsupported(node, f"mode {mode}")
    b.bind(node.outputs[0], result, value.perm)


def _extend(b: Builder, x: Tensor, table: np.ndarray, mode: str) -> Tensor:
    """Gather along each padded axis: the edge's index repeated, or indices wrapped around."""
    for axis, (begin, end) in enumerate(table):
        if begin or end:
            indices = np.arange(-begin, x.shape[axis] + end)
            size = x.shape[axis]
            indices = indices % size if mode == "wrap" else np.clip(indices, 0, size - 1)
            x = gathered(b, x, indices, axis)
    return x


def gathered(b: Builder, x: Tensor, indices: np.ndarray, axis: int) -> Tensor:
    """Take constant indices along a physical axis."""
    shape = (*x.shape[:axis], len(indices), *x.shape[axis + 1 :])
    return b.op("GATHER", [x, indices.astype(np.int32)], shape, q=x.q, axis=axis, batchDims=0)


@lowers("Expand")
def expand(b: Builder, node: Node) -> None:
    """Broadcast to the shape that shape inference found."""
    out = b.shape(node.outputs[0])
    perm = b.layout_of(node.inputs[:1], len(out))
    x = b.broadcastable(node.inputs[0], perm, b.common_q(node, node.inputs[:1]))
    shape = tuple(out[axis] for axis in perm)
    if x.shape == shape:
        b.bind(node.outputs[0], x, perm)
        return
    b.bind(node.outputs[0], b.op("BROADCAST_TO", [x, np.array(shape, np.int32)], shape, q=x.q), perm)


@lowers("Tile")
def tile(b: Builder, node: Node) -> None:
    """Repeat along axes."""
    value = moved(b, node)
    repeats = b.array(node.inputs[1])
    if repeats is None:
        raise unsupported(node, "its repeats are not constant")
    physical = np.array([repeats[axis] for axis in value.perm], np.int32)
    shape = tuple(int(size * count) for size, count in zip(value.tensor.shape, physical, strict=True))
    b.bind(node.outputs[0], b.op("TILE", [value.tensor, physical], shape, q=value.tensor.q), value.perm)


@lowers("DepthToSpace")
def depth_to_space(b: Builder, node: Node, *, blocksize: int, mode: str = "DCR") -> None:
    """DCR is TFLite's order of channels; CRD needs the channels reordered first."""
    q = b.common_q(node, node.inputs[:1])
    x = b.take(node.inputs[0], NHWC, q)
    n, h, w, c = x.shape
    if mode == "CRD":
        order = np.arange(c).reshape(-1, blocksize * blocksize).T.reshape(-1)
        x = gathered(b, x, order, 3)
    shape = (n, h * blocksize, w * blocksize, c // blocksize**2)
    b.bind(node.outputs[0], b.op("DEPTH_TO_SPACE", [x], shape, q=q, blockSize=blocksize), NHWC)


@lowers("SpaceToDepth")
def space_to_depth(b: Builder, node: Node, *, blocksize: int) -> None:
    """SpaceToDepth, channels-last."""
    q = b.common_q(node, node.inputs[:1])
    x = b.take(node.inputs[0], NHWC, q)
    n, h, w, c = x.shape
    shape = (n, h // blocksize, w // blocksize, c * blocksize**2)
    b.bind(node.outputs[0], b.op("SPACE_TO_DEPTH", [x], shape, q=q, blockSize=blocksize), NHWC)


@lowers("Cast")
def cast(b: Builder, node: Node, *, to: int, saturate: int = 1, round_mode: str = "up") -> None:
    """Cast between types that TFLite holds."""
    value = b.settle(b.value(node.inputs[0]))
    wanted = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(to))
    if wanted == b.dtype(node.inputs[0]):
        b.bind(node.outputs[0], value)
        return
    tensor = b.as_float(value.tensor)
    b.bind(node.outputs[0], b.op("CAST", [tensor], tensor.shape, wanted), value.perm)
