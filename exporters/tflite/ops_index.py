"""Ops that pick elements by index."""

from __future__ import annotations

import numpy as np

from edgekit.exporters.tflite.builder import Builder
from edgekit.exporters.tflite.ir import Node, Tensor, Value, identity
from edgekit.exporters.tflite.ops_shape import moved
from edgekit.exporters.tflite.registry import lowers


@lowers("Gather")
def gather(b: Builder, node: Node, *, axis: int = 0) -> None:
    """Take slices along one axis, wherever it lies; negative indices are wrapped, which the runtime does not do."""
    value = moved(b, node)
    rank, size = len(value.perm), value.shape[axis]
    axis %= rank
    physical = value.axis(axis)
    array = b.array(node.inputs[1])
    count = len(b.shape(node.inputs[1]))
    indices: Tensor | np.ndarray
    if array is not None:
        indices = np.where(array < 0, array + size, array).astype(np.int32)
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
    b.bind(node.outputs[0], Value(result, tuple(perm) if perm else identity(0)))


def wrapped(b: Builder, indices: Tensor, size: int) -> Tensor:
    """Indices with `size` added to the negative ones."""
    zero, length = np.zeros((), indices.dtype), np.array(size, indices.dtype)
    negative = b.op("LESS", [indices, zero], indices.shape, np.bool_)
    shifted = b.op("ADD", [indices, length], indices.shape, fusedActivationFunction="NONE")
    return b.op("SELECT_V2", [negative, shifted, indices], indices.shape, indices.dtype)
