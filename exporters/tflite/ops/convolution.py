"""Convolutions: CONV_2D, DEPTHWISE_CONV_2D, CONV_3D, TRANSPOSE_CONV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekit.exporters.tflite.builder import Builder
from edgekit.exporters.tflite.ir import Node, QParams, Tensor, Value, channels_last
from edgekit.exporters.tflite.operands import Linear, constant, operands
from edgekit.exporters.tflite.padding import Window, pad_spatial, padding, windows
from edgekit.exporters.tflite.registry import lowers, unsupported

NHWC = channels_last(4)


@lowers("Conv")
def conv(
    b: Builder,
    node: Node,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> None:
    """Conv of 1, 2 or 3 spatial axes; one axis is a 2-d convolution over height 1."""
    x, w, out = b.value(node.inputs[0]), b.value(node.inputs[1]), b.shape(node.outputs[0])
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    if len(x.shape) != len(w.shape) or x.shape[1] != w.shape[1] * group or w.shape[0] % group:
        raise unsupported(node, f"weights {list(w.shape)} in {group} groups for {x.shape[1]} input channels")
    axes = windows(node, auto_pad, pads, w.shape[2:], strides, dilations, x.shape[2:], out[2:])
    if len(axes) == 1:
        x, w = b.reshape(x, _flat(x.shape)), b.reshape(w, _flat(w.shape))
        axes = [Window(1, 1, 1, 1, 1, 0), *axes]
        result = Value(_conv_2d(b, node, x, w, bias, axes, group), NHWC)
        b.bind(node.outputs[0], b.reshape(result, out))
    elif len(axes) == 2:
        b.bind(node.outputs[0], _conv_2d(b, node, x, w, bias, axes, group), NHWC)
    elif len(axes) == 3:
        b.bind(node.outputs[0], _conv_3d(b, node, x, w, bias, axes, group), channels_last(5))
    else:
        raise unsupported(node, f"{len(axes)} spatial axes; 1, 2 and 3 are handled")


def _flat(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:2], 1, shape[2])


def _conv_2d(b: Builder, node: Node, x: Value, w: Value, bias: str, axes: list[Window], group: int) -> Tensor:
    channels_in, channels = x.shape[1], w.shape[0]
    depthwise = group == channels_in and group > 1
    layer = operands(b, node, x, w, bias, (NHWC, (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)), channels)
    tensor, scheme = layer.x, padding(axes)
    if scheme is None:
        tensor, scheme = pad_spatial(b, tensor, axes), "VALID"
    shape = (x.shape[0], axes[0].out, axes[1].out, channels)
    options: dict[str, Any] = {
        "padding": scheme,
        "strideH": axes[0].stride,
        "strideW": axes[1].stride,
        "dilationHFactor": axes[0].dilation,
        "dilationWFactor": axes[1].dilation,
        "fusedActivationFunction": node.activation,
    }
    if depthwise:
        options["depthMultiplier"] = channels // channels_in
    kind = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
    return b.op(kind, [tensor, layer.w, layer.bias], shape, q=layer.q, **options)


def _conv_3d(b: Builder, node: Node, x: Value, w: Value, bias: str, axes: list[Window], group: int) -> Tensor:
    ndhwc = channels_last(5)
    tensor = b.as_float(b.in_layout(x, ndhwc))
    if padding(axes) is None:
        tensor = pad_spatial(b, tensor, axes)
    weights = b.as_float(b.in_layout(w, (2, 3, 4, 1, 0)))
    if any(axis.dilation > 1 for axis in axes):
        if weights.data is None:
            raise unsupported(node, "dilation of weights that are not constant")
        weights = b.const(_spread(weights.data, [axis.dilation for axis in axes]))
    channels = w.shape[0] // group
    shape = (x.shape[0], *(axis.out for axis in axes), channels)
    offsets = b.as_float(b.in_layout(b.value(bias), (0,))) if bias else b.const(np.zeros(w.shape[0], np.float32))
    options: dict[str, Any] = {
        "padding": padding(axes) or "VALID",
        "strideD": axes[0].stride,
        "strideH": axes[1].stride,
        "strideW": axes[2].stride,
        "fusedActivationFunction": node.activation,
    }
    if group == 1:
        return b.op("CONV_3D", [tensor, weights, offsets], shape, **options)
    pieces: list[Tensor | np.ndarray | None] = []
    inputs, kernels, biases = _split(b, tensor, 4, group), _split(b, weights, 4, group), _split(b, offsets, 0, group)
    for piece in zip(inputs, kernels, biases, strict=True):
        pieces.append(b.op("CONV_3D", list(piece), shape, **options))
    return b.op("CONCATENATION", pieces, (*shape[:-1], w.shape[0]), axis=4, fusedActivationFunction="NONE")


def _split(b: Builder, tensor: Tensor, axis: int, parts: int) -> list[Tensor]:
    if tensor.data is not None:
        return [b.const(piece) for piece in np.split(tensor.data, parts, axis)]
    shape = tuple(size // parts if index == axis else size for index, size in enumerate(tensor.shape))
    pieces = [Tensor("", shape, tensor.dtype, None, tensor.q) for _ in range(parts)]
    b.ops_out("SPLIT", [np.array(axis, np.int32), tensor], pieces, numSplits=parts)
    return pieces


def _spread(weights: np.ndarray, dilations: Sequence[int], first: int = 0) -> np.ndarray:
    """Write dilation into a kernel as zeros between its elements; spatial axes start at `first`."""
    shape = list(weights.shape)
    index = [slice(None)] * weights.ndim
    for axis, dilation in enumerate(dilations, first):
        shape[axis] = (shape[axis] - 1) * dilation + 1
        index[axis] = slice(None, None, dilation)
    result = np.zeros(shape, weights.dtype)
    result[tuple(index)] = weights
    return result


@lowers("ConvTranspose")
def conv_transpose(
    b: Builder,
    node: Node,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> None:
    """ConvTranspose of 1, 2 or 3 spatial axes: TRANSPOSE_CONV of the whole reach, cropped by the pads."""
    x, w, out = b.value(node.inputs[0]), b.value(node.inputs[1]), b.shape(node.outputs[0])
    rank = len(x.shape) - 2
    if len(x.shape) != len(w.shape) or x.shape[1] != w.shape[0] or w.shape[0] % group:
        raise unsupported(node, f"weights {list(w.shape)} in {group} groups for {x.shape[1]} input channels")
    if rank not in (1, 2, 3):
        raise unsupported(node, f"{rank} spatial axes; 1, 2 and 3 are handled")
    strides, dilations = list(strides or [1] * rank), list(dilations or [1] * rank)
    extra, pads = list(output_padding or [0] * rank), list(pads or [0] * (2 * rank))
    begins = []
    for axis in range(rank):
        span = (w.shape[2 + axis] - 1) * dilations[axis] + 1
        reach = (x.shape[2 + axis] - 1) * strides[axis] + span + extra[axis]
        total = max(reach - out[2 + axis], 0)
        if auto_pad == "NOTSET" and output_shape is None:
            begins.append(pads[axis])
        else:
            begins.append(total // 2 if auto_pad == "SAME_UPPER" else total - total // 2)
    stored = w.tensor.data
    if stored is None and (group > 1 or max(dilations) > 1):
        raise unsupported(node, "groups or dilation with weights that are not constant")
    q = w.tensor.q
    if stored is not None and q is not None and not q.symmetric and (group > 1 or max(dilations) > 1):
        stored = q.dequantize(stored)  # what is written between the elements is 0, and not the code 0
        w = Value(b.const(stored, None, w.tensor.name), w.perm)
    if stored is not None and max(dilations) > 1:
        w = constant(b, w, _spread(stored, dilations, 2))
    if group > 1:
        w = _dense(b, w, group)
    final = out
    if rank == 1:
        x, w, out = b.reshape(x, _flat(x.shape)), b.reshape(w, _flat(w.shape)), _flat(out)
        strides, begins = [1, *strides], [0, *begins]
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    layout = (channels_last(5), (2, 3, 4, 1, 0)) if rank == 3 else (NHWC, (1, 2, 3, 0))
    layer = operands(b, node, x, w, bias, layout, out[1], int8=rank != 3, channel_axis=1)
    result = _transposed(b, layer, strides, begins, out)
    b.bind(node.outputs[0], b.reshape(Value(b.activate(result, node.activation), layout[0]), final))


def _dense(b: Builder, w: Value, group: int) -> Value:
    """Grouped weights [C, O/g, ...] as dense ones [C, O, ...] with zeros between the groups."""
    stored, q = w.tensor.data, w.tensor.q
    assert stored is not None
    step, width = stored.shape[0] // group, stored.shape[1]
    dense = np.zeros((stored.shape[0], width * group, *stored.shape[2:]), stored.dtype)
    for index in range(group):
        rows = slice(index * step, (index + 1) * step)
        dense[rows, index * width : (index + 1) * width] = stored[rows]
    if q is not None and q.axis == 1 and len(q.scale) == width:
        q = QParams(q.scale * group, q.zero_point * group, 1)
    return constant(b, w, dense, q)


def _transposed(b: Builder, layer: Linear, strides: Sequence[int], begins: Sequence[int], out: Sequence[int]) -> Tensor:
    """TRANSPOSE_CONV to `out` (channels first), by SAME where that crops exactly so, else by VALID and a SLICE."""
    deep = len(out) == 5
    sizes, kernel, wanted = layer.x.shape[1:-1], layer.w.shape[:3] if deep else layer.w.shape[1:3], out[2:]
    same = all(
        size == -(-target // stride) and begin == max((size - 1) * stride + span - target, 0) // 2
        for size, span, stride, begin, target in zip(sizes, kernel, strides, begins, wanted, strict=True)
    )
    full = list(wanted)
    if not same:
        full = [
            max((size - 1) * stride + span, begin + target)
            for size, span, stride, begin, target in zip(sizes, kernel, strides, begins, wanted, strict=True)
        ]
    shape = (out[0], *full, out[1])
    result = b.op(
        "CONV_3D_TRANSPOSE" if deep else "TRANSPOSE_CONV",
        [np.array(shape, np.int32), layer.w, layer.x, layer.bias],
        shape,
        layer.x.dtype,
        layer.q,
        padding="SAME" if same else "VALID",
        **dict(zip(("strideD", "strideH", "strideW")[-len(strides) :], strides, strict=True)),
    )
    if (full == list(wanted) and not any(begins)) or same:
        return result
    start, size = np.array([0, *begins, 0], np.int32), np.array([out[0], *wanted, out[1]], np.int32)
    return b.op("SLICE", [result, start, size], tuple(size), q=layer.q)
