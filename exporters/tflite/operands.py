"""Operands of the layers that multiply by weights: float, or int8 with an int32 bias at s_in · s_w."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekit.exporters.tflite.builder import FLOAT, INT8, INT32, Builder
from edgekit.exporters.tflite.ir import Node, Perm, QParams, Tensor, Value
from edgekit.exporters.tflite.kernel_support import rescales
from edgekit.exporters.tflite.registry import unsupported

INT32_LIMIT = 2**31 - 1
INPUT_RANGE = 255  # the largest distance of an int8 input from its zero point


@dataclass(frozen=True)
class Linear:
    """Tensors of a linear layer, and the parameters of its int8 output (None: the layer is float, or hybrid).

    A hybrid layer has int8 weights and quantizes its float input by itself.
    """

    x: Tensor
    w: Tensor
    bias: Tensor
    q: QParams | None
    hybrid: bool = False


def operands(
    b: Builder,
    node: Node,
    x: Value,
    w: Value,
    bias: str,
    layout: tuple[Perm, Perm],
    channels: int,
    int8: bool = True,
    channel_axis: int = 0,
    hybrid: bool = False,
) -> Linear:
    """Choose int8 or float for a linear layer and bring input and weights to `layout` (permutations of x and w).

    It is int8 only if the input is held as int8, the weights are constant, symmetric and quantized per tensor or along
    the axis of the output channels, the bias is constant, and the output is asked for as int8. With `hybrid`, a layer
    whose input is quantized at run time keeps such weights in int8.
    """
    x_tensor, w_tensor = b.in_layout(x, layout[0]), b.in_layout(w, layout[1])
    if bias and b.shape(bias) != (channels,):
        raise unsupported(node, f"a bias of shape {list(b.shape(bias))} for {channels} output channels")
    constant_bias = not bias or bias in b.graph.constants
    q = b.target(node) if int8 else None
    if q is not None and constant_bias and _int8(x_tensor) and _int8(w_tensor) and w_tensor.data is not None:
        assert x_tensor.q is not None and w_tensor.q is not None
        scales = w_tensor.q.scale
        matches = w_tensor.q.per_tensor or w_tensor.q.axis == layout[1].index(channel_axis)
        step = x_tensor.q.scale[0] * max(scales)
        if x_tensor.q.per_tensor and w_tensor.q.symmetric and matches and rescales(q, step, x_tensor.q, w_tensor.q):
            roomy = _with_room(b, bias, x_tensor.q, w_tensor, channels)
            if roomy is not None and roomy.q is not None:
                return Linear(x_tensor, roomy, int32_bias(b, bias, x_tensor.q, roomy.q, channels), q)
        b.note(f"float fallback at ONNX node '{node.name}': its scales are not those of TFLite's int8 layers")
    if not bias:
        bias_tensor = b.const(np.zeros(channels, np.float32), name=f"{node.name}_bias")
    else:
        bias_tensor = b.as_float(b.in_layout(b.value(bias), (0,)))
    if node.dynamic:
        q = w_tensor.q
        suits = q is not None and q.symmetric and (q.per_tensor or q.axis == layout[1].index(channel_axis))
        if hybrid and _int8(w_tensor) and w_tensor.data is not None and suits:
            return Linear(b.as_float(x_tensor), w_tensor, bias_tensor, None, hybrid=True)
        b.note(f"ONNX node '{node.name}' computes in float: TFLite has no such layer with a dynamic range")
    return Linear(b.as_float(x_tensor), b.as_float(w_tensor), bias_tensor, None)


def _with_room(b: Builder, name: str, x: QParams, w: Tensor, channels: int) -> Tensor | None:
    """Weights whose scales let the int32 sums hold the bias: TFLite's wrap around where ONNX has a large number.

    A channel that needs larger scales has weights next to nothing beside its bias, and they lose next to nothing by
    being rounded to them. None where that cannot be: one scale for all channels, or sums that do not fit by themselves.
    """
    assert w.q is not None and w.data is not None
    real = b.array(name) if name else None
    bias = np.zeros(channels) if real is None else np.abs(real.reshape(channels).astype(np.float64))
    others = tuple(axis for axis in range(w.data.ndim) if axis != w.q.axis)
    if w.q.axis is None:
        sums = np.abs(w.data.astype(np.int16)).sum(dtype=np.int64) * INPUT_RANGE
    else:
        sums = np.abs(w.data.astype(np.int16)).sum(axis=others, dtype=np.int64) * INPUT_RANGE
    scales = np.array(w.q.scale, np.float64)
    fits = bias / (scales * x.scale[0]) + sums <= INT32_LIMIT
    if np.all(fits):
        return w
    if w.q.axis is None or np.any(sums > INT32_LIMIT // 2):
        return None
    wider = np.where(fits, scales, bias / (x.scale[0] * (INT32_LIMIT // 2))).astype(np.float32)
    shape = [-1 if axis == w.q.axis else 1 for axis in range(w.data.ndim)]
    rounded = np.rint(w.data * (scales / wider).reshape(shape)).astype(np.int8)
    return b.const(rounded, QParams.of(wider, 0, w.q.axis), w.name)


def int32_bias(b: Builder, name: str, x: QParams, w: QParams, channels: int) -> Tensor:
    """The bias at scale s_in · s_w: as stored if the file has it so, else rounded from its real values."""
    scale = np.float32(x.scale[0]) * np.array(w.scale, np.float32)
    q = QParams.of(scale, 0, 0 if len(scale) > 1 else None)
    stored = b.graph.constants.get(name)
    held = b.graph.held.get(name)
    if stored is not None and held is not None and stored.dtype == INT32 and held.symmetric:
        own, wanted = (np.broadcast_to(scales, (channels,)) for scales in (held.scale, scale))
        if np.allclose(own, wanted, rtol=1e-5, atol=0):
            return b.const(stored.reshape(channels), q, name)
    real = b.array(name) if name else np.zeros(channels, np.float32)
    assert real is not None
    rounded = np.rint(real.reshape(channels).astype(np.float64) / scale.astype(np.float64))
    return b.const(np.clip(rounded, -INT32_LIMIT, INT32_LIMIT).astype(np.int32), q, name or "bias")


def constant(b: Builder, like: Value, data: np.ndarray, q: QParams | None = None) -> Value:
    """A constant value with other data, stored as `like` is (int8 with parameters, float16, float32)."""
    tensor = b.const(data, q if q is not None else like.tensor.q, like.tensor.name)
    return Value(tensor, tuple(range(data.ndim)))


def _int8(tensor: Tensor) -> bool:
    return tensor.q is not None and tensor.dtype == INT8


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor holds real numbers as such."""
    return tensor.q is None and tensor.dtype == FLOAT
