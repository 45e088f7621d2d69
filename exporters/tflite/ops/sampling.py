"""Ops that read or write an image at computed or overlapping places: grid sampling and column to image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from edgekit.exporters.tflite.builder import FLOAT, INT32, Builder
from edgekit.exporters.tflite.ir import Node, Tensor, Value, channels_last, identity
from edgekit.exporters.tflite.ops.activation import add, mul, scaled
from edgekit.exporters.tflite.registry import lowers, unsupported

FARTHEST = 1e6  # elements beyond an image, where float32 still counts and int32 does not overflow
CUBIC = -0.75  # ONNX Runtime's coefficient
MODES = {"bilinear": "linear", "bicubic": "cubic"}
Tap = tuple[Tensor, Tensor | None]  # int32 places along an axis, and the weights of what lies there


@lowers("GridSample")
def grid_sample(
    b: Builder, node: Node, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> None:
    """Interpolate at the grid's points: GATHER of the neighbors along all axes, times their weights."""
    mode = MODES.get(mode, mode)
    image, out = b.value(node.inputs[0]), b.shape(node.outputs[0])
    rank = len(image.shape) - 2
    sizes = image.shape[2:]
    if padding_mode not in ("zeros", "border", "reflection") or mode not in ("linear", "nearest", "cubic"):
        raise unsupported(node, f"mode {mode} with padding {padding_mode}")
    if mode == "cubic" and rank != 2:
        raise unsupported(node, "cubic interpolation of other than 2 axes")
    x = b.as_float(b.in_layout(image, channels_last(rank + 2)))
    batch, channels = x.shape[0], x.shape[-1]
    count = int(np.prod(out[2:]))
    grid = b.raw_reshape(b.take(node.inputs[1]), (batch * count, rank))
    flat = b.raw_reshape(x, (batch * int(np.prod(sizes)), channels))
    first = np.repeat(np.arange(batch) * int(np.prod(sizes)), count).astype(np.int32)[:, None]
    taps = []
    for axis, size in enumerate(sizes):
        begin = np.array([0, rank - 1 - axis], np.int32)
        place = b.op("SLICE", [grid, begin, np.array([batch * count, 1], np.int32)], (batch * count, 1))
        factor, offset = ((size - 1) / 2, (size - 1) / 2) if align_corners else (size / 2, (size - 1) / 2)
        place = b.op("MINIMUM", [scaled(b, place, factor, offset), np.full((1,), FARTHEST, np.float32)], place.shape)
        place = b.op("MAXIMUM", [place, np.full((1,), -FARTHEST, np.float32)], place.shape)
        taps.append([_kept(b, tap, size, padding_mode, bool(align_corners)) for tap in _taps(b, place, mode)])
    result: Tensor | None = None
    for corner in product(*taps):
        position: Tensor | None = None
        weight: Tensor | None = None
        for (index, share), size in zip(corner, sizes, strict=True):
            scaled_position = None if position is None else _integers(b, "MUL", position, size)
            position = index if scaled_position is None else _integers(b, "ADD", scaled_position, index)
            weight = share if weight is None else weight if share is None else mul(b, weight, share)
        assert position is not None
        rows = b.raw_reshape(_integers(b, "ADD", position, first), (batch * count,))
        found = b.op("GATHER", [flat, rows], (batch * count, channels), axis=0, batchDims=0)
        if weight is not None:
            found = b.op("MUL", [found, weight], found.shape, fusedActivationFunction="NONE")
        result = found if result is None else add(b, result, found)
    assert result is not None
    b.bind(node.outputs[0], b.raw_reshape(result, (batch, *out[2:], channels)), channels_last(rank + 2))


def _integers(b: Builder, kind: str, x: Tensor, y: Tensor | np.ndarray | int) -> Tensor:
    other = np.full((1,), y, np.int32) if isinstance(y, int) else y
    return b.op(kind, [x, other], x.shape, fusedActivationFunction="NONE")


def _taps(b: Builder, place: Tensor, mode: str) -> list[Tap]:
    """The neighbors of places along an axis, and their weights."""
    if mode == "nearest":
        return [(b.op("CAST", [b.op("ROUND", [place], place.shape)], place.shape, INT32), None)]
    low = b.op("FLOOR", [place], place.shape)
    after = b.op("SUB", [place, low], place.shape, fusedActivationFunction="NONE")
    before = scaled(b, after, -1, 1.0)
    index = b.op("CAST", [low], place.shape, INT32)
    if mode == "linear":
        return [(index, before), (_integers(b, "ADD", index, 1), after)]
    shares = [
        _outer(b, scaled(b, after, 1, 1.0)), _inner(b, after), _inner(b, before), _outer(b, scaled(b, before, 1, 1.0)),
    ]  # fmt: skip
    return [(_integers(b, "ADD", index, step), share) for step, share in zip((-1, 0, 1, 2), shares, strict=True)]


def _polynomial(b: Builder, x: Tensor, coefficients: Sequence[float]) -> Tensor:
    result = scaled(b, x, coefficients[0], coefficients[1])
    for coefficient in coefficients[2:]:
        result = mul(b, result, x)
        result = scaled(b, result, 1, coefficient) if coefficient else result
    return result


def _inner(b: Builder, x: Tensor) -> Tensor:
    """The cubic weight at a distance below 1."""
    return _polynomial(b, x, (CUBIC + 2, -(CUBIC + 3), 0, 1))


def _outer(b: Builder, x: Tensor) -> Tensor:
    """The cubic weight at a distance between 1 and 2."""
    return _polynomial(b, x, (CUBIC, -5 * CUBIC, 8 * CUBIC, -4 * CUBIC))


def _kept(b: Builder, tap: Tap, size: int, padding_mode: str, align_corners: bool) -> Tap:
    """A neighbor within the image: the edge's, the mirrored one, or one that weighs nothing."""
    index, weight = tap
    if padding_mode == "reflection":
        period = max(2 * size - 2, 1) if align_corners else 2 * size
        index = b.op("FLOOR_MOD", [index, np.full((1,), period, np.int32)], index.shape)
        mirrored = b.op(
            "SUB",
            [np.full((1,), period if align_corners else period - 1, np.int32), index],
            index.shape,
            INT32,
            fusedActivationFunction="NONE",
        )
        return b.op("MINIMUM", [index, mirrored], index.shape), weight
    inside = b.op("MINIMUM", [index, np.full((1,), size - 1, np.int32)], index.shape)
    inside = b.op("MAXIMUM", [inside, np.zeros((1,), np.int32)], index.shape)
    if padding_mode == "border":
        return inside, weight
    known = b.op("CAST", [b.op("EQUAL", [inside, index], index.shape, np.bool_)], index.shape, FLOAT)
    return inside, known if weight is None else mul(b, weight, known)


@lowers("Col2Im")
def col2im(
    b: Builder,
    node: Node,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> None:
    """Add up overlapping blocks: SCATTER_ND, which adds, of rows into the padded image."""
    image, block = (b.array(name) for name in node.inputs[1:3])
    if image is None or block is None:
        raise unsupported(node, "its sizes are not constant")
    rank = len(image)
    strides, dilations, pads = strides or [1] * rank, dilations or [1] * rank, pads or [0] * 2 * rank
    value, out = b.settle(b.value(node.inputs[0])), b.shape(node.outputs[0])
    batch, channels, kernel = value.shape[0], out[1], int(np.prod(block))
    wide = [int(size) + pads[axis] + pads[axis + rank] for axis, size in enumerate(image)]
    counts = [(wide[axis] - dilations[axis] * (int(block[axis]) - 1) - 1) // strides[axis] + 1 for axis in range(rank)]
    if int(np.prod(counts)) != value.shape[2]:
        raise unsupported(node, f"{value.shape[2]} blocks where {int(np.prod(counts))} fit")
    inside = np.indices([int(size) for size in block]).reshape(rank, -1, 1)
    blocks = np.indices(counts).reshape(rank, 1, -1)
    along = [inside[axis] * dilations[axis] + blocks[axis] * strides[axis] for axis in range(rank)]
    rows = np.ravel_multi_index(along, wide).astype(np.int32).reshape(-1, 1)
    x = b.reshape(value, (batch, channels, kernel, value.shape[2]))
    columns = b.as_float(b.in_layout(b.settle(x), (2, 3, 0, 1)))
    updates = b.raw_reshape(columns, (rows.size, batch * channels))
    shape = (int(np.prod(wide)), batch * channels)
    summed = b.op("SCATTER_ND", [rows, updates, np.array(shape, np.int32)], shape, FLOAT)
    y = b.raw_reshape(summed, (*wide, batch, channels))
    cut = (*(int(size) for size in image), batch, channels)
    if y.shape != cut:
        y = b.op("SLICE", [y, np.array([*pads[:rank], 0, 0], np.int32), np.array(cut, np.int32)], cut)
    lies = Value(y, (*range(2, rank + 2), 0, 1))
    b.bind(node.outputs[0], b.in_layout(lies, identity(rank + 2)))
