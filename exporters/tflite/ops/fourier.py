"""Fourier transforms as products with constant matrices: TFLite's own are of one length and need FLEX or CUSTOM ops."""

from __future__ import annotations

import numpy as np

from edgekit.exporters.tflite.builder import Builder
from edgekit.exporters.tflite.ir import Node, Tensor, Value, identity
from edgekit.exporters.tflite.registry import lowers, unsupported

LARGEST = 2**24  # numbers of a matrix: 64 MB


def _matrix(node: Node, length: int, size: int, count: int, parts: int, inverse: bool) -> np.ndarray:
    """The transform of `size` numbers, cut or padded to `length`, to the first `count` frequencies: [count · 2, size ·
    parts], real and imaginary parts side by side; `parts` is 1 for real numbers.
    """
    if 2 * count * size * parts > LARGEST:
        raise unsupported(node, f"a transform of {length} numbers, whose matrix is too large")
    angle = 2 * np.pi * np.outer(np.arange(count), np.arange(size)) % (2 * np.pi * length) / length
    share = np.where(np.arange(size) < length, 1 / length if inverse else 1.0, 0.0)
    cosine, sine = np.cos(angle) * share, np.sin(angle) * share * (1 if inverse else -1)
    matrix = np.empty((count, 2, size, parts))
    matrix[:, 0, :, 0], matrix[:, 1, :, 0] = cosine, sine
    if parts == 2:
        matrix[:, 0, :, 1], matrix[:, 1, :, 1] = -sine, cosine
    return matrix.reshape(2 * count, size * parts).astype(np.float32)


@lowers("DFT")
def dft(b: Builder, node: Node, *, axis: int | None = None, inverse: int = 0, onesided: int = 0) -> None:
    """The discrete transform along one axis of real or complex numbers, whose parts are the last axis."""
    value, out = b.settle(b.value(node.inputs[0])), b.shape(node.outputs[0])
    rank = len(value.shape)
    given = b.array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    if len(node.inputs) > 2 and node.inputs[2] and given is None:
        raise unsupported(node, "its axis is not constant")
    where = (int(given.reshape(())) if given is not None else 1 if axis is None else axis) % rank
    length = _number(b, node, 1, value.shape[where])
    if inverse and onesided:
        raise unsupported(node, "an inverse transform of one side")
    if where == rank - 1:
        raise unsupported(node, "a transform along the parts of complex numbers")
    rest = [other for other in range(rank - 1) if other != where]
    perm = (*rest, where, rank - 1)
    size, parts = value.shape[where], value.shape[-1]
    x = b.as_float(b.in_layout(value, perm))
    lead = x.shape[:-2]
    matrix = _matrix(node, length, size, out[where], parts, bool(inverse))
    flat = b.raw_reshape(x, (int(np.prod(lead)), size * parts))
    y = b.raw_reshape(_product(b, flat, matrix), (*lead, out[where], 2))
    b.bind(node.outputs[0], y, perm)


def _product(b: Builder, x: Tensor, matrix: np.ndarray) -> Tensor:
    return b.op(
        "FULLY_CONNECTED",
        [x, matrix, np.zeros(len(matrix), np.float32)],
        (x.shape[0], len(matrix)),
        keepNumDims=False,
        asymmetricQuantizeInputs=False,
        fusedActivationFunction="NONE",
    )


def _number(b: Builder, node: Node, index: int, default: int) -> int:
    if len(node.inputs) <= index or not node.inputs[index]:
        return default
    array = b.array(node.inputs[index])
    if array is None:
        raise unsupported(node, "its lengths are not constant")
    return int(array.reshape(()))


@lowers("STFT")
def stft(b: Builder, node: Node, *, onesided: int = 1) -> None:
    """The transforms of windowed frames: a convolution over the signal with stride frame_step."""
    step = _number(b, node, 1, 0)
    windowed = len(node.inputs) > 2 and bool(node.inputs[2])
    window = b.array(node.inputs[2]) if windowed else np.ones(())
    if window is None:
        raise unsupported(node, "its window is not constant")
    length = _number(b, node, 3, window.size if windowed else 0)
    if windowed and window.size != length:
        raise unsupported(node, f"a window of {window.size} numbers for frames of {length}")
    signal, out = b.settle(b.value(node.inputs[0])), b.shape(node.outputs[0])
    if len(signal.shape) == 2:
        signal = b.reshape(signal, (*signal.shape, 1))
    batch, total, parts = signal.shape
    frames, count = out[1], out[2]
    matrix = _matrix(node, length, length, count, parts, False).reshape(2 * count, length, parts)
    kernel = (matrix * np.broadcast_to(window, (length,))[:, None]).astype(np.float32)[:, None]
    x = b.raw_reshape(b.as_float(b.in_layout(b.settle(signal), identity(3))), (batch, 1, total, parts))
    y = b.op(
        "CONV_2D",
        [x, kernel, np.zeros(2 * count, np.float32)],
        (batch, 1, frames, 2 * count),
        padding="VALID",
        strideH=1,
        strideW=step,
        dilationHFactor=1,
        dilationWFactor=1,
        fusedActivationFunction="NONE",
    )
    b.bind(node.outputs[0], Value(b.raw_reshape(y, (batch, frames, count, 2)), identity(4)))
