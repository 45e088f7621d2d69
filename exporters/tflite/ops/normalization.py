"""Normalizations that are computed at run time, from means and variances of the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from edgekit.exporters.tflite.builder import FLOAT, Builder, number
from edgekit.exporters.tflite.ir import Node, Perm, Tensor, Value, channels_last, identity
from edgekit.exporters.tflite.ops.activation import operand, scaled
from edgekit.exporters.tflite.ops.reduction import reduced
from edgekit.exporters.tflite.registry import lowers, unsupported

LONG_SUM = 4096  # elements: float32 sums that are longer lose digits


def _standardized(
    b: Builder, x: Tensor, average: Callable[[Tensor], Tensor], epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x − mean) / √(variance + ε), the mean, and 1 / √(variance + ε); `average` keeps the axes."""
    mean = average(x)
    centered = b.op("SUB", [x, mean], x.shape, fusedActivationFunction="NONE")
    variance = average(b.op("SQUARE", [centered], x.shape))
    inverse = b.op("RSQRT", [scaled(b, variance, 1, epsilon)], variance.shape)
    return b.op("MUL", [centered, inverse], x.shape, fusedActivationFunction="NONE"), mean, inverse


def _mean(b: Builder, x: Tensor, axes: Sequence[int]) -> Tensor:
    """MEAN with axes kept. The kernel adds up one by one, so that many elements are averaged axis by axis."""
    if math.prod(x.shape[axis] for axis in axes) <= LONG_SUM:
        return reduced(b, "MEAN", x, axes)
    for axis in sorted(axes, reverse=True):
        x = reduced(b, "MEAN", x, [axis])
    return x


def _affine(b: Builder, x: Tensor, perm: Perm, names: Sequence[str], first: int, rank: int) -> Tensor:
    """x · scale + offset, whose axes are `rank` logical axes of x from `first` on."""
    for name, kind in zip(names, ("MUL", "ADD"), strict=False):
        known = b.array(name) if name else None
        if not name or (known is not None and (known == (1 if kind == "MUL" else 0)).all()):
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
    axes = [perm.index(axis) for axis in range(first, rank)]
    y, mean, inverse = _standardized(b, x, lambda tensor: _mean(b, tensor, axes), epsilon)
    b.bind(node.outputs[0], _affine(b, y, perm, node.inputs[1:], first, rank - first), perm)
    for name, tensor in zip(node.outputs[1:], (mean, inverse), strict=False):
        if name:
            b.bind(name, tensor, perm)


@lowers("InstanceNormalization")
def instance_normalization(b: Builder, node: Node, *, epsilon: float = 1e-5) -> None:
    """Normalize each channel of each sample over its spatial axes."""
    grouped = _groups_of_channels(b.value(node.inputs[0]))
    if grouped is not None:
        _group_normalization(b, node, grouped, epsilon)
        return
    x, perm = operand(b, node, False)
    axes = [perm.index(axis) for axis in range(2, len(perm))]
    y, _, _ = _standardized(b, x, lambda tensor: _mean(b, tensor, axes), epsilon)
    b.bind(node.outputs[0], _affine(b, y, perm, node.inputs[1:], 1, 1), perm)


def _groups_of_channels(value: Value) -> Value | None:
    """The value if it is an image with a pending reshape to [batch, groups, everything else]: group normalization."""
    shape, base = value.pending, value.base_shape
    if shape is None or len(shape) != 3 or len(base) < 3 or value.perm != channels_last(len(base)):
        return None
    return value if shape[0] == base[0] and shape[1] > 0 and base[1] % shape[1] == 0 else None


def _group_normalization(b: Builder, node: Node, value: Value, epsilon: float) -> None:
    """Normalize groups of channels where they lie, channels last; the reshape back to an image is then free."""
    assert value.pending is not None
    x, (batch, groups, _) = b.as_float(value.tensor), value.pending
    channels = x.shape[-1]
    split, row = (batch, groups, channels // groups), (batch, *[1] * (len(x.shape) - 2), channels)

    def mean(tensor: Tensor) -> Tensor:
        """The groups' means, repeated for each of their channels."""
        each = b.raw_reshape(_mean(b, tensor, range(1, len(x.shape) - 1)), split)
        ones = np.ones((1, 1, split[2]), np.float32)
        return b.raw_reshape(b.op("MUL", [_mean(b, each, [2]), ones], split, fusedActivationFunction="NONE"), row)

    y, _, _ = _standardized(b, x, mean, epsilon)
    y = _affine(b, b.raw_reshape(y, (batch, math.prod(x.shape[1:-1]), *split[1:])), identity(4), node.inputs[1:], 2, 1)
    b.bind(node.outputs[0], Value(b.raw_reshape(y, x.shape), value.perm, value.pending))


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
    norm = b.op("MAXIMUM", [norm, number(float(np.finfo(np.float32).tiny), norm)], norm.shape)
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
