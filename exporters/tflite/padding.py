"""Sliding windows: what ONNX pads say, and whether TFLite's SAME or VALID says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.exporters.tflite.builder import Builder
from edgekit.exporters.tflite.ir import Node, QParams, Tensor
from edgekit.exporters.tflite.registry import unsupported


@dataclass(frozen=True)
class Window:
    """One spatial axis of a convolution or pooling: sizes in elements, `span` = (kernel − 1) · dilation + 1."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    begin: int

    @property
    def span(self) -> int:
        """Reach of the kernel over the input."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def end(self) -> int:
        """Padding that is read after the input; less than ONNX's where windows do not reach all of it."""
        return max(0, (self.out - 1) * self.stride + self.span - self.size - self.begin)

    @property
    def same(self) -> bool:
        """Whether TFLite's SAME pads exactly so."""
        total = max((self.out - 1) * self.stride + self.span - self.size, 0)
        return self.out == -(-self.size // self.stride) and self.begin == total // 2

    @property
    def valid(self) -> bool:
        """Whether TFLite's VALID (no padding) computes exactly this."""
        return self.begin == 0 and self.out == (self.size - self.span) // self.stride + 1


def windows(
    node: Node,
    auto_pad: str,
    pads: Sequence[int] | None,
    kernel: Sequence[int],
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    sizes: Sequence[int],
    outs: Sequence[int],
) -> list[Window]:
    """One Window per spatial axis from the attributes that ONNX's convolutions and poolings share."""
    rank = len(sizes)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    pads = pads or [0] * (2 * rank)
    if auto_pad not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise unsupported(node, f"auto_pad {auto_pad}")
    if min(pads, default=0) < 0:
        raise unsupported(node, "negative pads")
    result = []
    for axis in range(rank):
        span = (kernel[axis] - 1) * dilations[axis] + 1
        total = max((outs[axis] - 1) * strides[axis] + span - sizes[axis], 0)
        begin = {"NOTSET": pads[axis], "VALID": 0, "SAME_UPPER": total // 2, "SAME_LOWER": total - total // 2}[auto_pad]
        result.append(Window(sizes[axis], outs[axis], kernel[axis], strides[axis], dilations[axis], begin))
    return result


def padding(axes: Sequence[Window]) -> str | None:
    """TFLite's name for these windows' padding, or None if it needs an explicit PAD."""
    if all(axis.valid for axis in axes):
        return "VALID"
    return "SAME" if all(axis.same for axis in axes) else None


def pad_spatial(b: Builder, tensor: Tensor, axes: Sequence[Window], value: float | None = None) -> Tensor:
    """Pad a channels-last tensor by what the windows read outside of it: with zero, or with a value (PADV2)."""
    if all(axis.begin == axis.end == 0 for axis in axes):
        return tensor
    amounts = np.array([(0, 0), *((axis.begin, axis.end) for axis in axes), (0, 0)], np.int32)
    return pad(b, tensor, amounts, value)


def pad(b: Builder, tensor: Tensor, amounts: np.ndarray, value: float | None = None) -> Tensor:
    """Pad physically; `amounts` is [rank, 2]. The value None means 0, which an int8 PAD writes as the zero point."""
    shape = tuple(size + int(sum(amount)) for size, amount in zip(tensor.shape, amounts, strict=True))
    if not value:
        return b.op("PAD", [tensor, amounts.astype(np.int32)], shape, q=tensor.q)
    constant = np.array([value])
    stored = b.const(tensor.q.quantize(constant), tensor.q) if tensor.q else b.const(constant.astype(tensor.dtype))
    return b.op("PADV2", [tensor, amounts.astype(np.int32), stored], shape, q=tensor.q)


def lowest(q: QParams | None, dtype: np.dtype) -> float:
    """The value that never wins a maximum."""
    return q.bounds()[0] if q else float(np.finfo(dtype).min)
