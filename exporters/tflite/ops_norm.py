"""Normalizations that are computed at run time, from means and variances of the input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekit.exporters.tflite.builder import FLOAT, Builder
from edgekit.exporters.tflite.ir import Node, Perm, Tensor
from edgekit.exporters.tflite.ops_activation import operand, scaled
from edgekit.exporters.tflite.ops_reduce import reduced
from edgekit.exporters.tflite.registry import lowers, unsupported


def _standardized(b: Builder, x: Tensor, axes: Sequence[int], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x − mean) / √(variance + ε) over physical axes, the mean, and 1 / √(variance + ε)."""
    mean = reduced(b, "MEAN", x, axes)
    centered = b.op("SUB", [x, mean], x.shape, fusedActivationFunction="NONE")
    variance = reduced(b, "MEAN", b.op("SQUARE", [centered], x.shape), axes)
    inverse = b.op("RSQRT", [scaled(b, variance, 1, epsilon)], variance.shape)
    return b.op("MUL", [centered, inverse], x.shape, fusedActivationFunction="NONE"), mean, inverse


def _affine(b: Builder, x: Tensor, perm: Perm, names: Sequence[str], first: int, rank: int) -> Tensor:
    """x · scale + offset, whose axes are `rank` logical axes of x from `first` on."""
    for name, kind in zip(names, ("MUL", "ADD"), strict=False):
        if not name:
            continue
        value = b.settle(b.value(name))
        shape = [1] * len(perm)
        given = value.shape
        shape[first + rank - len(given) : first + rank] = given
        factor = b.as_float(b.in_layout(b.settle(b.reshape(value, tuple(shape))), perm))
        x = b.op(kind, [x, factor], x.shape, fusedActivationFunction="NONE")
    return x


@lowers("LayerNormalization")
def layer_normalization(b: Builder, node: Node, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> None:
    """Normalize over the last axes; mean and inverse deviation are outputs where the graph asks for them."""
    x, perm = operand(b, node, False)
    rank = len(perm)
    first = axis % rank
    y, mean, inverse = _standardized(b, x, [perm.index(axis) for axis in range(first, rank)], epsilon)
    b.bind(node.outputs[0], _affine(b, y, perm, node.inputs[1:], first, rank - first), perm)
    for name, tensor in zip(node.outputs[1:], (mean, inverse), strict=False):
        if name:
            b.bind(name, tensor, perm)


@lowers("InstanceNormalization")
def instance_normalization(b: Builder, node: Node, *, epsilon: float = 1e-5) -> None:
    """Normalize each channel of each sample over its spatial axes."""
    x, perm = operand(b, node, False)
    y, _, _ = _standardized(b, x, [perm.index(axis) for axis in range(2, len(perm))], epsilon)
    b.bind(node.outputs[0], _affine(b, y, perm, node.inputs[1:], 1, 1), perm)


@lowers("LpNormalization")
def lp_normalization(b: Builder, node: Node, *, axis: int = -1, p: int = 2) -> None:
    """x / ‖x‖ over one axis, and 0 where the norm is 0."""
    x, perm = operand(b, node, False)
    if p not in (1, 2):
        raise unsupported(node, f"p = {p}; 1 and 2 are handled")
    powers = b.op("SQUARE" if p == 2 else "ABS", [x], x.shape)
    norm = reduced(b, "SUM", powers, [perm.index(axis % len(perm))])
    if p == 2:
        norm = b.op("SQRT", [norm], norm.shape)
    # A smallest normal number in place of 0 keeps 0 / 0 from being made.
    norm = b.op("MAXIMUM", [norm, np.array([np.finfo(np.float32).tiny], np.float32)], norm.shape)
    b.bind(node.outputs[0], b.op("DIV", [x, norm], x.shape, fusedActivationFunction="NONE"), perm)


@lowers("LRN")
def local_response_normalization(
    b: Builder, node: Node, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> None:
    """LOCAL_RESPONSE_NORMALIZATION over channels; ONNX divides α by the window's size."""
    if size % 2 == 0:
        raise unsupported(node, "an even window")
    perm = (0, 2, 3, 1)
    if len(b.shape(node.inputs[0])) != 4:
        raise unsupported(node, "other than 4 axes")
    x = b.take(node.inputs[0], perm)
    y = b.op(
        "LOCAL_RESPONSE_NORMALIZATION", [x], x.shape, FLOAT, radius=size // 2, bias=bias, alpha=alpha / size, beta=beta
    )
    b.bind(node.outputs[0], y, perm)


@lowers("RMSNormalization")
def rms_normalization(b: Builder, node: Node, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> None:
    """x / √(mean of x² + ε) · scale over the last axes."""
    x, perm = operand(b, node, False)
    rank = len(perm)
    first = axis % rank
    power = reduced(b, "MEAN", b.op("SQUARE", [x], x.shape), [perm.index(axis) for axis in range(first, rank)])
    inverse = b.op("RSQRT", [scaled(b, power, 1, epsilon)], power.shape)
    y = b.op("MUL", [x, inverse], x.shape, fusedActivationFunction="NONE")
    b.bind(node.outputs[0], _affine(b, y, perm, node.inputs[1:2], first, rank - first), perm)
