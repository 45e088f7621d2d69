"""Pooling over windows and over everything."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from edgekit.exporters.tflite.builder import Builder
from edgekit.exporters.tflite.ir import Node, QParams, Tensor, Value, channels_last
from edgekit.exporters.tflite.operands import int32_bias
from edgekit.exporters.tflite.ops.activation import scaled
from edgekit.exporters.tflite.ops.reduction import averaged_q, reduce, reduced
from edgekit.exporters.tflite.ops.shape import gathered
from edgekit.exporters.tflite.padding import Window, lowest, pad_spatial, padding, windows
from edgekit.exporters.tflite.registry import lowers, unsupported

NHWC = channels_last(4)
UNIT = Window(1, 1, 1, 1, 1, 0)
Pool = Callable[[Tensor, tuple[int | None, int | None], str], Tensor]


@lowers("MaxPool")
def max_pool(
    b: Builder,
    node: Node,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
) -> None:
    """MaxPool without indices."""
    if len(node.outputs) > 1 and node.outputs[1]:
        raise unsupported(node, "its indices output")
    x, out = b.value(node.inputs[0]), b.shape(node.outputs[0])
    axes = windows(node, auto_pad, pads, kernel_shape, strides, dilations, x.shape[2:], out[2:])
    _refuse_padding_alone(node, axes, auto_pad)
    if any(axis.dilation > 1 for axis in axes):
        x, axes = _spread(b, x, axes, b.common_q(node, node.inputs[:1]), least=True)

    def pool(tensor: Tensor, pair: tuple[int | None, int | None], activation: str) -> Tensor:
        window = [UNIT if index is None else axes[index] for index in pair]
        scheme = padding(window)
        if scheme is None:
            tensor, scheme = pad_spatial(b, tensor, window, _never_wins(b, tensor)), "VALID"
        return _window_op(b, "MAX_POOL_2D", tensor, window, scheme, activation)

    _pool(b, node, x, b.common_q(node, node.inputs[:1]), pool)


def _never_wins(b: Builder, tensor: Tensor) -> float | None:
    """The padding value of a maximum: 0 (None) is one where nothing is negative, and PAD is faster than PADV2."""
    if tensor.q is not None:
        return None if tensor.q.zero_point[0] == -128 else lowest(tensor.q, tensor.dtype)
    maker = b.maker(tensor)
    rectified = maker is not None and (
        maker.kind in ("RELU", "RELU6") or maker.options.get("fusedActivationFunction") in ("RELU", "RELU6")
    )
    return None if rectified else lowest(None, tensor.dtype)


@lowers("AveragePool")
def average_pool(
    b: Builder,
    node: Node,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> None:
    """AveragePool; TFLite divides by the elements inside, so other counts are pads or a factor per position."""
    x, out = b.value(node.inputs[0]), b.shape(node.outputs[0])
    axes = windows(node, auto_pad, pads, kernel_shape, strides, dilations, x.shape[2:], out[2:])
    _refuse_padding_alone(node, axes, auto_pad)
    if len(axes) == 2 and all(axis.size == axis.kernel and axis.valid for axis in axes):
        reduce(b, node, "MEAN", [2, 3], keepdims=True)
        return
    # ONNX counts the padding that it names; what ceil_mode reads beyond it is not counted.
    named = auto_pad in ("SAME_UPPER", "SAME_LOWER")
    ends = [axis.end for axis in axes] if named else list(pads or [0] * 2 * len(axes))[len(axes) :]
    divisors = [_divisors(axis, end, bool(count_include_pad)) for axis, end in zip(axes, ends, strict=True)]
    dilated = any(axis.dilation > 1 for axis in axes)
    if dilated:
        x, axes = _spread(b, x, axes, averaged_q(b, node), least=False)

    def pool(tensor: Tensor, pair: tuple[int | None, int | None], activation: str) -> Tensor:
        window = [UNIT if index is None else axes[index] for index in pair]
        wanted = np.outer(*(np.ones(1) if index is None else divisors[index] for index in pair))
        scheme = padding(window)
        if scheme is not None and np.array_equal(wanted, np.outer(*(_divisors(axis, 0, False) for axis in window))):
            return _window_op(b, "AVERAGE_POOL_2D", tensor, window, scheme, activation)
        padded = pad_spatial(b, tensor, window) if scheme != "VALID" else tensor
        whole = window[0].kernel * window[1].kernel
        if (wanted == whole).all():
            return _window_op(b, "AVERAGE_POOL_2D", padded, window, "VALID", activation)
        pooled = b.as_float(_window_op(b, "AVERAGE_POOL_2D", b.as_float(padded), window, "VALID", "NONE"))
        factor = (whole / wanted).astype(np.float32)[None, :, :, None]
        return b.op("MUL", [pooled, factor], pooled.shape, fusedActivationFunction=activation)

    held, target = b.int8(node.inputs[0]), b.target(node)
    even = [index for index, axis in enumerate(axes) if (divisors[index] == axis.kernel).all()]
    if held is not None and target is not None and held != target and not dilated and len(even) == len(axes) == 2:
        tensor = pad_spatial(b, b.take(node.inputs[0], NHWC, held), axes)
        b.bind(node.outputs[0], _averaging(b, tensor, axes, target, node.activation), NHWC)
        return
    _pool(b, node, x, averaged_q(b, node), pool)


def _averaging(b: Builder, x: Tensor, axes: list[Window], q: QParams, activation: str) -> Tensor:
    """An int8 average with other parameters than its input's: a depthwise convolution, which rounds once."""
    assert x.q is not None
    kernel = (1, axes[0].kernel, axes[1].kernel, x.shape[3])
    share = QParams.of(1 / (127 * kernel[1] * kernel[2]), 0)
    weights = b.const(np.full(kernel, 127, np.int8), share)
    return b.op(
        "DEPTHWISE_CONV_2D",
        [x, weights, int32_bias(b, "", x.q, share, x.shape[3])],
        (x.shape[0], axes[0].out, axes[1].out, x.shape[3]),
        q=q,
        padding="VALID",
        strideH=axes[0].stride,
        strideW=axes[1].stride,
        depthMultiplier=1,
        fusedActivationFunction=activation,
    )


def _refuse_padding_alone(node: Node, axes: list[Window], auto_pad: str) -> None:
    """Runtimes disagree on whether a window that holds nothing but padding exists, and on SAME with dilations."""
    if auto_pad.startswith("SAME") and any(axis.dilation > 1 for axis in axes):
        raise unsupported(node, f"dilations with auto_pad {auto_pad}, which runtimes read differently")
    if any(axis.begin >= axis.span or (axis.out - 1) * axis.stride - axis.begin >= axis.size for axis in axes):
        raise unsupported(node, "a window that lies in its padding")


def _divisors(axis: Window, end: int, include: bool) -> np.ndarray:
    """By how much each window divides; with padding counted, up to the end that ONNX pads and no further."""
    low, high = (-axis.begin, axis.size + end) if include else (0, axis.size)
    places = _places(axis)
    return ((places >= low) & (places < high)).sum(1)


def _places(axis: Window) -> np.ndarray:
    """The elements of each window, [out, kernel]; those before 0 and after the end are padding."""
    starts = np.arange(axis.out) * axis.stride - axis.begin
    return starts[:, None] + np.arange(axis.kernel) * axis.dilation


def _spread(b: Builder, x: Value, axes: list[Window], q: QParams | None, least: bool) -> tuple[Value, list[Window]]:
    """The elements of dilated windows side by side, and the windows over them, which neither overlap nor dilate."""
    perm = channels_last(len(axes) + 2)
    tensor = b.held_as(b.in_layout(x, perm), q)
    tensor = pad_spatial(b, tensor, axes, _never_wins(b, tensor) if least else None)
    for place, axis in enumerate(axes, 1):
        if axis.dilation > 1:
            tensor = gathered(b, tensor, (_places(axis) + axis.begin).reshape(-1), place)
    sizes = tensor.shape[1:-1]
    return Value(tensor, perm), [
        Window(size, axis.out, axis.kernel, axis.kernel, 1, 0)
        if axis.dilation > 1
        else Window(size, axis.out, axis.kernel, axis.stride, 1, 0)
        for size, axis in zip(sizes, axes, strict=True)
    ]


def _pool(b: Builder, node: Node, x: Value, q: QParams | None, pool: Pool) -> None:
    """Run a separable 2-d pooling over 1, 2 or 3 spatial axes; three are two passes."""
    rank, out = len(x.shape) - 2, b.shape(node.outputs[0])
    if rank == 1:
        x = b.reshape(x, (*x.shape[:2], 1, x.shape[2]))
        result = pool(b.held_as(b.in_layout(x, NHWC), q), (None, 0), node.activation)
        b.bind(node.outputs[0], b.reshape(Value(result, NHWC), out))
    elif rank == 2:
        b.bind(node.outputs[0], pool(b.held_as(b.in_layout(x, NHWC), q), (0, 1), node.activation), NHWC)
    elif rank == 3:
        n, d, h, w, c = (tensor := b.held_as(b.in_layout(x, channels_last(5)), q)).shape
        planes = pool(b.raw_reshape(tensor, (n * d, h, w, c)), (1, 2), "NONE")
        columns = pool(b.raw_reshape(planes, (n, d, out[3] * out[4], c)), (0, None), node.activation)
        b.bind(node.outputs[0], b.raw_reshape(columns, (n, *out[2:], c)), channels_last(5))
    else:
        raise unsupported(node, f"{rank} spatial axes; 1, 2 and 3 are handled")


def _window_op(b: Builder, kind: str, x: Tensor, axes: list[Window], scheme: str, activation: str) -> Tensor:
    return b.op(
        kind,
        [x],
        (x.shape[0], axes[0].out, axes[1].out, x.shape[3]),
        q=x.q,
        padding=scheme,
        strideH=axes[0].stride,
        strideW=axes[1].stride,
        filterHeight=axes[0].kernel,
        filterWidth=axes[1].kernel,
        fusedActivationFunction=activation,
    )


@lowers("GlobalAveragePool")
def global_average_pool(b: Builder, node: Node) -> None:
    """Mean over all spatial axes."""
    reduce(b, node, "MEAN", list(range(2, len(b.shape(node.inputs[0])))), keepdims=True)


@lowers("GlobalMaxPool")
def global_max_pool(b: Builder, node: Node) -> None:
    """Maximum over all spatial axes."""
    reduce(b, node, "REDUCE_MAX", list(range(2, len(b.shape(node.inputs[0])))), keepdims=True)


@lowers("LpPool")
def lp_pool(
    b: Builder,
    node: Node,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> None:
    """The p-norm of each window: the root of the average of powers, times the window's size."""
    value, out = b.settle(b.value(node.inputs[0])), b.shape(node.outputs[0])
    axes = windows(node, auto_pad, pads, kernel_shape, strides, dilations, value.shape[2:], out[2:])
    _refuse_padding_alone(node, axes, auto_pad)
    x = Value(_powers(b, node, b.as_float(value.tensor), p), value.perm)
    perm = channels_last(len(value.shape))
    tensor = pad_spatial(b, b.in_layout(x, perm), axes)
    padded = [Window(size, each.out, each.kernel, each.stride, each.dilation, 0)
              for size, each in zip(tensor.shape[1:-1], axes, strict=True)]  # fmt: skip
    x, padded = _spread(b, Value(tensor, perm), padded, None, least=False)

    def pool(tensor: Tensor, pair: tuple[int | None, int | None], activation: str) -> Tensor:
        window = [UNIT if index is None else padded[index] for index in pair]
        return _window_op(b, "AVERAGE_POOL_2D", tensor, window, "VALID", activation)

    hidden = Node(node.op, node.name, node.inputs, [f"{node.outputs[0]}/powers"])
    b.graph.info[hidden.outputs[0]] = b.graph.info[node.outputs[0]]
    _pool(b, hidden, x, None, pool)
    mean = b.settle(b.value(hidden.outputs[0]))
    total = scaled(b, mean.tensor, math.prod(kernel_shape))
    b.bind(node.outputs[0], b.op("SQRT", [total], total.shape) if p == 2 else total, mean.perm)


@lowers("GlobalLpPool")
def global_lp_pool(b: Builder, node: Node, *, p: int = 2) -> None:
    """The p-norm over all spatial axes."""
    value = b.settle(b.value(node.inputs[0]))
    powers = _powers(b, node, b.as_float(value.tensor), p)
    total = reduced(b, "SUM", powers, [value.axis(axis) for axis in range(2, len(value.perm))])
    b.bind(node.outputs[0], b.op("SQRT", [total], total.shape) if p == 2 else total, value.perm)


def _powers(b: Builder, node: Node, x: Tensor, p: int) -> Tensor:
    if p not in (1, 2):
        raise unsupported(node, f"p = {p}; 1 and 2 are handled")
    return b.op("SQUARE" if p == 2 else "ABS", [x], x.shape)
