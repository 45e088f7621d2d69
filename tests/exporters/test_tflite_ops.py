"""Every lowering against ONNX Runtime in float32, with and without XNNPACK."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
import pytest
from tflite_tools import model, node, run_onnx, run_tflite

from edgekit.exporters.tflite import convert
from edgekit.exporters.tflite.registry import LOWERINGS


class Case(NamedTuple):
    """One op: shapes of its float inputs (or arrays), constant inputs by position, attributes, outputs."""

    op: str
    inputs: dict[str, Any]
    constants: dict[str, Any]
    attrs: dict[str, Any]
    outputs: tuple[str, ...]
    opset: int


def c(
    op: str, inputs: Any, constants: Any = None, outputs: tuple[str, ...] = ("y",), opset: int = 20, **attrs: Any
) -> Case:
    """A case; a shape stands for random float32 numbers."""
    inputs = {"x": inputs} if isinstance(inputs, tuple | np.ndarray) else inputs
    return Case(op, inputs, constants or {}, attrs, outputs, opset)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


CONV = [
    c("Conv", (1, 3, 8, 8), {"w": (4, 3, 3, 3)}),
    c("Conv", (2, 3, 9, 7), {"w": (4, 3, 3, 3), "b": (4,)}, pads=[1, 1, 1, 1]),
    c("Conv", (1, 3, 8, 8), {"w": (4, 3, 3, 3), "b": (4,)}, pads=[1, 1, 1, 1], strides=[2, 2]),
    c("Conv", (1, 3, 8, 8), {"w": (4, 3, 3, 3)}, pads=[0, 0, 1, 1], strides=[2, 2]),
    c("Conv", (1, 3, 8, 8), {"w": (4, 3, 3, 3)}, pads=[2, 1, 0, 3], strides=[2, 1]),
    c("Conv", (1, 3, 8, 8), {"w": (4, 3, 2, 2)}, auto_pad="SAME_UPPER"),
    c("Conv", (1, 3, 8, 8), {"w": (4, 3, 2, 2)}, auto_pad="SAME_LOWER"),
    c("Conv", (1, 3, 8, 8), {"w": (4, 3, 2, 2)}, auto_pad="VALID", strides=[2, 3]),
    c("Conv", (1, 4, 9, 9), {"w": (6, 4, 3, 3)}, dilations=[2, 2], pads=[2, 2, 2, 2]),
    c("Conv", (1, 4, 8, 8), {"w": (6, 2, 3, 3), "b": (6,)}, group=2, pads=[1, 1, 1, 1]),
    c("Conv", (1, 4, 8, 8), {"w": (4, 1, 3, 3), "b": (4,)}, group=4, pads=[1, 1, 1, 1], strides=[2, 2]),
    c("Conv", (1, 4, 8, 8), {"w": (8, 1, 5, 5)}, group=4, pads=[2, 2, 2, 2], kernel_shape=[5, 5]),
    c("Conv", (1, 4, 9, 9), {"w": (4, 1, 3, 3)}, group=4, dilations=[2, 2], pads=[2, 2, 2, 2]),
    c("Conv", (2, 3, 16), {"w": (4, 3, 3), "b": (4,)}, pads=[1, 1], strides=[2]),
    c("Conv", (1, 4, 16), {"w": (4, 1, 3)}, group=4, pads=[2, 0], dilations=[2]),
    c("Conv", (1, 1, 8, 8), {"w": (4, 1, 3, 3)}),
    c("Conv", {"x": (1, 3, 8, 8), "w": (4, 3, 3, 3)}, pads=[1, 1, 1, 1]),
    c("Conv", (1, 3, 5, 6, 7), {"w": (4, 3, 3, 3, 3), "b": (4,)}, pads=[1, 1, 1, 1, 1, 1]),
    c("Conv", (1, 4, 5, 6, 7), {"w": (4, 2, 2, 3, 3)}, group=2, strides=[1, 2, 2], pads=[0, 1, 1, 0, 1, 1]),
    c("Conv", (1, 2, 7, 7, 7), {"w": (3, 2, 2, 2, 2)}, dilations=[2, 2, 2]),
    c("ConvTranspose", (1, 3, 5, 5), {"w": (3, 4, 2, 2), "b": (4,)}, strides=[2, 2]),
    c("ConvTranspose", (1, 3, 5, 6), {"w": (3, 4, 4, 4)}, strides=[2, 2], pads=[1, 1, 1, 1]),
    c("ConvTranspose", (1, 3, 5, 5), {"w": (3, 4, 3, 3)}, strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    c("ConvTranspose", (1, 3, 5, 5), {"w": (3, 4, 3, 3)}, strides=[3, 2], pads=[0, 1, 2, 1]),
    c("ConvTranspose", (1, 3, 5, 5), {"w": (3, 4, 3, 3)}, dilations=[2, 2]),
    c("ConvTranspose", (1, 4, 5, 5), {"w": (4, 2, 3, 3), "b": (4,)}, group=2, strides=[2, 2]),
    c("ConvTranspose", (1, 4, 5, 5), {"w": (4, 1, 4, 4)}, group=4, strides=[2, 2], pads=[1, 1, 1, 1]),
    c("ConvTranspose", (1, 3, 5, 5), {"w": (3, 4, 3, 3)}, strides=[2, 2], auto_pad="SAME_UPPER"),
    c("ConvTranspose", (1, 3, 5, 5), {"w": (3, 4, 3, 3)}, strides=[2, 2], output_shape=[10, 10]),
    c("ConvTranspose", (1, 2, 3, 4, 5), {"w": (2, 3, 2, 2, 2), "b": (3,)}, strides=[2, 2, 2]),
    c("ConvTranspose", (1, 2, 3, 4, 5), {"w": (2, 3, 3, 3, 3)}, strides=[2, 1, 2], pads=[1, 1, 1, 1, 1, 1]),
    c("ConvTranspose", (2, 3, 9), {"w": (3, 4, 4), "b": (4,)}, strides=[2], pads=[1, 1]),
]
POOL = [
    c("MaxPool", (1, 3, 8, 8), kernel_shape=[2, 2], strides=[2, 2]),
    c("MaxPool", (1, 3, 8, 8), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    c("MaxPool", (1, 3, 7, 7), kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    c("MaxPool", (1, 3, 8, 8), kernel_shape=[3, 3], auto_pad="SAME_LOWER"),
    c("MaxPool", (1, 3, 9), kernel_shape=[3], strides=[2]),
    c("MaxPool", (1, 3, 6, 6, 6), kernel_shape=[2, 2, 2], strides=[2, 2, 2]),
    c("MaxPool", (1, 3, 5, 6, 7), kernel_shape=[3, 3, 3], pads=[1, 1, 1, 1, 1, 1]),
    c("AveragePool", (1, 3, 8, 8), kernel_shape=[2, 2], strides=[2, 2]),
    c("AveragePool", (1, 3, 8, 8), kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    c("AveragePool", (1, 3, 8, 8), kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
    c("AveragePool", (1, 3, 8, 8), kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    c("AveragePool", (1, 3, 7, 7), kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    c(
        "AveragePool",
        (1, 3, 7, 8),
        kernel_shape=[3, 3],
        strides=[2, 2],
        pads=[1, 1, 1, 1],
        ceil_mode=1,
        count_include_pad=1,
    ),
    c("AveragePool", (1, 3, 8, 8), kernel_shape=[3, 3], auto_pad="SAME_UPPER", strides=[2, 2]),
    c("AveragePool", (1, 3, 8, 8), kernel_shape=[8, 8]),
    c("AveragePool", (1, 3, 9), kernel_shape=[3], strides=[2], pads=[1, 1]),
    c("AveragePool", (1, 3, 5, 6, 7), kernel_shape=[2, 3, 3], pads=[1, 1, 1, 0, 1, 1]),
    c("GlobalAveragePool", (2, 3, 5, 7)),
    c("GlobalAveragePool", (2, 3, 5)),
    c("GlobalMaxPool", (2, 3, 5, 7)),
]
SPREAD = np.linspace(-8, 8, 3 * 4 * 5 * 6, dtype=np.float32).reshape(3, 4, 5, 6)
POSITIVE = np.linspace(0.01, 8, 120, dtype=np.float32).reshape(1, 4, 5, 6)
ACTIVATION = [
    *(
        c(op, SPREAD)
        for op in [
            "Abs",
            "Ceil",
            "Cos",
            "Exp",
            "Floor",
            "HardSwish",
            "Neg",
            "Sign",
            "Sin",
            "Relu",
            "LeakyRelu",
            "HardSigmoid",
            "Elu",
            "Selu",
            "Celu",
            "Softplus",
            "Softsign",
            "Mish",
            "Gelu",
            "Erf",
            "ThresholdedRelu",
            "Softmax",
            "LogSoftmax",
            "Sigmoid",
            "Tanh",
        ]
    ),
    c("Round", np.array([[-1.5, -0.5, 0.5, 1.5, 2.4, 2.6]], np.float32)),
    c("Log", POSITIVE),
    c("Sqrt", POSITIVE),
    c("Reciprocal", POSITIVE),
    c("LeakyRelu", SPREAD, alpha=0.3),
    c("HardSigmoid", SPREAD, alpha=1 / 6, beta=0.5),
    c("HardSigmoid", SPREAD, alpha=0.5, beta=0.0),
    c("Elu", SPREAD, alpha=0.5),
    c("Celu", SPREAD, alpha=2.0),
    c("Gelu", SPREAD, approximate="tanh"),
    c("Softmax", SPREAD, axis=1),
    c("LogSoftmax", SPREAD, axis=0),
    c("Relu", np.array([[-3, 0, 4]], np.int32)),
    c("Clip", SPREAD, {"lo": f32(0)[0], "hi": f32(6)[0]}),
    c("Clip", SPREAD, {"lo": f32(-2)[0], "hi": f32(3)[0]}),
    c("Clip", SPREAD, {"lo": f32(-2)[0]}),
    c("Clip", np.array([[-9, 0, 9]], np.int32), {"lo": np.int32(-3), "hi": np.int32(5)}),
    c("PRelu", SPREAD, {"slope": (4, 1, 1)}),
    c("PRelu", SPREAD, {"slope": (1,)}),
    c("PRelu", SPREAD, {"slope": (3, 4, 5, 6)}),
]
FOUR = np.arange(1, 121, dtype=np.float32).reshape(1, 4, 5, 6)
INTS = np.array([[7, -7, 5, 9]], np.int32)
BOOLS = np.array([[True, False, True, False]])
MATH = [
    *(c(op, {"x": (2, 3, 4, 5), "z": (2, 3, 4, 5)}) for op in ["Add", "Sub", "Mul", "Max", "Min", "Sum"]),
    *(c(op, {"x": (2, 3, 4, 5)}, {"z": (3, 1, 1)}) for op in ["Add", "Sub", "Mul", "Max", "Min", "Sum"]),
    *(c(op, {"x": (3, 1, 5), "z": (2, 1, 4, 1)}) for op in ["Add", "Sub", "Mul", "Max", "Min", "Sum"]),
    c("Max", {"x": (2, 3), "z": (2, 3), "t": (3,)}),
    c("Max", (2, 3)),
    c("Sum", {"x": (2, 3), "z": (2, 3), "t": (3,)}),
    c("Div", {"x": FOUR, "z": FOUR[:, :, ::-1] + 1}),
    c("Div", FOUR, {"z": f32(3)}),
    *(
        c(op, {"x": INTS, "z": np.array([[2, 2, -3, 4]], np.int32)})
        for op in ["Add", "Sub", "Mul", "Div", "Max", "Min"]
    ),
    *(
        c(op, {"x": SPREAD, "z": np.ascontiguousarray(SPREAD[::-1])})
        for op in ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]
    ),
    *(c(op, {"x": BOOLS, "z": np.array([[True, True, False, False]])}) for op in ("And", "Or")),
    c("Not", BOOLS),
    *(c("Pow", POSITIVE, {"e": f32(exponent)}) for exponent in (2, 0.5, -0.5, 3, 1, 1.7)),
    c("Pow", POSITIVE, {"e": f32(2, 3, 0.5, 1, 2, 3)}),
    c("BatchNormalization", (2, 3, 4, 5), {"s": (3,), "o": (3,), "m": (3,), "v": f32(0.5, 1, 2)}, epsilon=1e-3),
    c("Where", {"c": BOOLS, "x": (3, 4), "z": (1, 4)}),
]
MATMUL = [
    c("Gemm", (2, 5), {"w": (5, 4), "b": (4,)}),
    c("Gemm", (2, 5), {"w": (4, 5)}, transB=1),
    c("Gemm", (5, 2), {"w": (4, 5), "b": (1, 4)}, transA=1, transB=1, alpha=0.5, beta=2.0),
    c("Gemm", (2, 5), {"w": (4, 5), "b": (2, 4)}, transB=1, beta=0.5),
    c("Gemm", (2, 5), {"w": (4, 5), "b": (1,)}, transB=1),
    c("Gemm", {"x": (2, 5), "w": (5, 4), "b": (2, 4)}, alpha=0.5),
    c("MatMul", (2, 5), {"w": (5, 4)}),
    c("MatMul", (2, 3, 5), {"w": (5, 4)}),
    c("MatMul", {"x": (2, 3, 4, 5), "w": (2, 3, 5, 6)}),
    c("MatMul", {"x": (2, 3, 4, 5), "w": (5, 6)}),
    c("MatMul", {"x": (1, 3, 4, 5), "w": (2, 1, 5, 6)}),
    c("MatMul", {"x": (1, 2, 3, 2, 4, 5), "w": (1, 2, 3, 2, 5, 6)}),
    c("MatMul", {"x": (5,), "w": (5, 6)}),
    c("MatMul", {"x": (3, 5), "w": (5,)}),
    c("MatMul", {"x": (5,), "w": (5,)}),
]
REDUCE = [
    *(
        c(f"Reduce{kind}", (2, 3, 4, 5), {"axes": i64(*axes)}, keepdims=keep)
        for kind in ["Mean", "Sum", "Max", "Min", "Prod"]
        for axes, keep in (((2, 3), 1), ((1,), 0), ((-1, 0), 0))
    ),
    c("ReduceMean", (2, 3, 4)),
    c("ReduceMean", (2, 3, 4), opset=13, axes=[1]),
    c("ReduceSum", (2, 3, 4), noop_with_empty_axes=1),
    c("ReduceSum", np.arange(6, dtype=np.int32).reshape(2, 3), {"axes": i64(1)}),
]
SHAPE = [
    c("Identity", (2, 3)),
    c("Reshape", (2, 3, 4), {"s": i64(4, -1)}),
    c("Reshape", (2, 3, 4), {"s": i64(0, 12)}),
    c("Flatten", (2, 3, 4), axis=2),
    c("Squeeze", (2, 1, 4, 1), {"a": i64(1, -1)}),
    c("Squeeze", (2, 1, 4, 1)),
    c("Unsqueeze", (2, 4), {"a": i64(0, 2)}),
    c("Transpose", (2, 3, 4, 5), perm=[3, 1, 0, 2]),
    c("Transpose", (2, 3, 4)),
    c("Concat", {"x": (2, 3, 4), "z": (2, 5, 4)}, axis=1),
    c("Concat", {"x": (2, 3, 4)}, {"z": (2, 3, 2)}, axis=-1),
    c("Split", (2, 6, 4), outputs=("y", "z"), axis=1, num_outputs=2),
    c("Split", (2, 6, 4), {"s": i64(1, 3, 2)}, outputs=("y", "z", "t"), axis=1),
    c("Slice", (4, 6, 5), {"s": i64(1, 0), "e": i64(3, 100), "a": i64(0, 2)}),
    c("Slice", (4, 6, 5), {"s": i64(1, 0), "e": i64(-1, 100), "a": i64(1, 2), "t": i64(2, 3)}),
    c("Slice", (4, 6, 5), {"s": i64(-1, 4), "e": i64(-100, 0), "a": i64(1, 2), "t": i64(-1, -2)}),
    c("Pad", (1, 2, 4, 5), {"p": i64(0, 0, 1, 2, 0, 0, 3, 0)}),
    c("Pad", (1, 2, 4, 5), {"p": i64(0, 1, 1, 2, 0, 0, 3, 0), "v": f32(1.5)[0]}),
    c("Pad", (1, 2, 4, 5), {"p": i64(0, 0, 1, -2, 0, 0, -1, 1)}),
    *(c("Pad", (1, 2, 4, 5), {"p": i64(0, 0, 1, 2, 0, 0, 3, 1)}, mode=mode) for mode in ("reflect", "edge", "wrap")),
    c("Expand", (3, 1), {"s": i64(2, 3, 4)}),
    c("Tile", (2, 3), {"r": i64(2, 2)}),
    c("DepthToSpace", (1, 8, 2, 3), blocksize=2),
    c("DepthToSpace", (1, 8, 2, 3), blocksize=2, mode="CRD"),
    c("SpaceToDepth", (1, 2, 4, 6), blocksize=2),
    c("Cast", (2, 3), to=6),
    c("Cast", np.array([[1, 2]], np.int32), to=1),
    c("Gather", (4, 5), {"i": np.array([[0, -1], [2, 1]], np.int64)}),
    c("Gather", (4, 5), {"i": np.int64(1)}, axis=1),
    c("Gather", {"x": (4, 5), "i": np.array([0, -2], np.int64)}, axis=1),
]
HALF = {"roi": f32(), "scales": f32(1, 1, 2, 2)}
RESIZE = [
    *(
        c("Resize", (1, 2, 5, 6), HALF, mode=mode, coordinate_transformation_mode=coordinates)
        for mode in ("nearest", "linear", "cubic")
        for coordinates in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    ),
    c("Resize", (1, 2, 5, 6), HALF, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    c("Resize", (1, 2, 5, 6), {"roi": f32(), "s": f32(), "sizes": i64(1, 2, 7, 3)}, mode="linear"),
    c("Resize", (1, 2, 5, 6), {"roi": f32(), "s": f32(), "sizes": i64(1, 2, 3, 4)}, mode="nearest"),
    c("Resize", (1, 2, 8, 6), {"roi": f32(), "scales": f32(1, 1, 0.5, 0.5)}, mode="linear", antialias=1),
    c("Resize", (1, 2, 6), {"roi": f32(), "scales": f32(1, 1, 2)}, mode="nearest"),
]
PERMUTED = np.random.default_rng(1).permutation(60).astype(np.float32).reshape(3, 4, 5)
SMALLS = np.linspace(-0.9, 0.9, 24, dtype=np.float32).reshape(2, 12)
MORE = [
    *(c(op, SMALLS) for op in ["Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Atanh"]),
    c("Acosh", 2 + SMALLS),
    c("Mean", {"x": (2, 3), "z": (2, 3), "t": (3,)}),
    c("Mod", {"x": INTS, "z": np.array([[3, 3, -2, -4]], np.int32)}),
    c("Mod", {"x": INTS, "z": np.array([[3, 3, -2, -4]], np.int32)}, fmod=1),
    c("Mod", {"x": f32(-4.3, 7.2, 5, 4.3), "z": f32(2.1, -3.4, 8, -2)}, fmod=1),
    c("IsNaN", f32(1, np.nan, np.inf)),
    c("IsInf", f32(1, np.nan, np.inf, -np.inf)),
    c("IsInf", f32(1, np.nan, np.inf, -np.inf), detect_positive=0),
    c("Xor", {"x": BOOLS, "z": np.array([[True, True, False, False]])}),
    c("Pow", POSITIVE, {"e": i64(2, 1, 0, 1, 2, 3)}),
]
INDEX = [
    *(c(op, PERMUTED, axis=axis, keepdims=keep) for op in ("ArgMax", "ArgMin") for axis, keep in ((1, 1), (-1, 0))),
    c("ArgMax", f32(1, 3, 3, 2), axis=0, select_last_index=1),
    c("TopK", PERMUTED, {"k": i64(3)}, ("y", "z")),
    c("TopK", PERMUTED, {"k": i64(2)}, ("y", "z"), axis=1, largest=0),
    c("GatherND", PERMUTED, {"i": np.array([[0, 1], [-1, 2]])}),
    c("GatherND", {"x": PERMUTED, "i": np.array([[0, 1], [-1, 2]])}),
    c("GatherElements", PERMUTED, {"i": np.array([[[0, -1]], [[2, 1]]])}, axis=2),
    c("GatherElements", {"x": PERMUTED, "i": np.array([[[0, -1]], [[2, 1]]])}, axis=1),
    c("ScatterND", {"x": (4, 3)}, {"i": np.array([[1], [-1]]), "u": (2, 3)}),
    c("ScatterND", {"x": (4, 3), "i": np.array([[1], [3]]), "u": (2, 3)}, reduction="add"),
    c("ScatterElements", {"x": (3, 4), "i": np.array([[1, 0], [2, -1]]), "u": (2, 2)}, axis=1),
    c("CumSum", (3, 4), {"a": np.int64(1)}),
    c("CumSum", (3, 4), {"a": np.int64(0)}, exclusive=1, reverse=1),
    c("OneHot", np.array([0, -1, 2]), {"d": np.int64(4), "v": f32(0.5, 2)}, axis=0),
    c("Hardmax", (3, 4, 5), axis=1),
    c("Trilu", (2, 4, 5), {"k": np.int64(1)}),
    c("Trilu", (2, 4, 5), upper=0),
    c("ReverseSequence", (4, 3), {"l": i64(1, 4, 2)}),
]
NORM = [
    c("LayerNormalization", (2, 3, 8), {"s": (8,), "o": (8,)}),
    c("LayerNormalization", (2, 3, 8), {"s": (3, 8)}, ("y", "m", "d"), axis=1, epsilon=1e-3),
    c("InstanceNormalization", (2, 3, 5, 6), {"s": (3,), "o": (3,)}),
    c("LpNormalization", (2, 3, 4), axis=1),
    c("LpNormalization", (2, 3, 4), p=1),
    c("LRN", (1, 8, 3, 3), size=5, alpha=0.02, beta=0.6, bias=1.5),
    c("RMSNormalization", (2, 3, 8), {"s": (8,)}, opset=23),
]
EINSUM = [
    c("Einsum", {"x": (2, 3, 4), "z": (2, 4, 5)}, equation="bij,bjk->bik"),
    c("Einsum", {"x": (2, 3, 4, 5), "z": (2, 6, 4, 5)}, equation="bqhd,bkhd->bhqk"),
    c("Einsum", {"x": (3, 4), "z": (5, 4)}, equation="ij,kj"),
    c("Einsum", {"x": (2, 3, 4), "z": (5, 4)}, equation="...j,kj->...k"),
    c("Einsum", {"x": (3, 4), "z": (5,)}, equation="ij,k->kji"),
    c("Einsum", (3, 4, 5), equation="ijk->ki"),
    c("Einsum", {"x": (2, 3, 4), "z": (2, 3, 5), "w": (2, 3, 4)}, equation="bld,bln,bld->bldn"),
    c("Einsum", {"x": (3, 4), "z": (4, 5), "w": (5, 2), "v": (2,)}, equation="ij,jk,kl,l->i"),
]
RECURRENT = [
    c("LSTM", (4, 2, 3), {"w": (1, 20, 3), "r": (1, 20, 5), "b": (1, 40)}, ("y", "yh", "yc"), hidden_size=5),
    c("LSTM", (4, 2, 3), {"w": (2, 20, 3), "r": (2, 20, 5)}, hidden_size=5, direction="bidirectional"),
    c(
        "LSTM",
        {"x": (3, 2, 3), "h": (1, 2, 5), "c": (1, 2, 5)},
        {"w": (1, 20, 3), "r": (1, 20, 5), "b": (1, 40), "p": (1, 15)},
        ("y", "yh", "yc"),
        hidden_size=5,
        direction="reverse",
    ),
    *(
        c(
            "GRU",
            (4, 2, 3),
            {"w": (1, 15, 3), "r": (1, 15, 5), "b": (1, 30)},
            ("y", "yh"),
            hidden_size=5,
            linear_before_reset=linear,
        )
        for linear in (0, 1)
    ),
    c(
        "GRU",
        {"x": (3, 2, 3), "h": (2, 2, 5)},
        {"w": (2, 15, 3), "r": (2, 15, 5), "b": (2, 30)},
        ("y", "yh"),
        hidden_size=5,
        direction="bidirectional",
    ),
    # So many steps that their weights are shared.
    c("LSTM", (70, 1, 3), {"w": (1, 256, 3), "r": 0.1 * np.ones((1, 256, 64), np.float32)}, hidden_size=64),
    c("RNN", (4, 2, 3), {"w": (1, 5, 3), "r": (1, 5, 5), "b": (1, 10)}, ("y", "yh"), hidden_size=5),
]
GRID = np.random.default_rng(3).uniform(-1.4, 1.4, (2, 5, 6, 2)).astype(np.float32)
GRID_3D = np.random.default_rng(4).uniform(-1.4, 1.4, (2, 2, 3, 4, 3)).astype(np.float32)
ROWS_TWICE = np.array([[0, 1], [2, 0], [0, 1], [-1, 3]], np.int64)
SAMPLED = [
    *(
        c("GridSample", {"x": (2, 3, 5, 4), "grid": GRID}, mode=mode, padding_mode=padding, align_corners=corners)
        for mode in ("linear", "nearest", "cubic")
        for padding in ("zeros", "border", "reflection")
        for corners in (0, 1)
    ),
    *(
        c("GridSample", {"x": (2, 3, 2, 5, 4)}, {"grid": GRID_3D}, mode=mode, padding_mode=padding)
        for mode, padding in (("linear", "zeros"), ("nearest", "border"), ("linear", "reflection"))
    ),
    c("GridSample", {"x": (2, 3, 5, 4), "grid": GRID}, opset=16, mode="bilinear"),
    c("Col2Im", (2, 12, 16), {"size": i64(5, 5), "block": i64(2, 2)}),
    c(
        "Col2Im",
        (1, 18, 6),
        {"size": i64(6, 5), "block": i64(3, 3)},
        pads=[1, 0, 1, 1],
        strides=[2, 2],
        dilations=[1, 1],
    ),
    c("Col2Im", (1, 10, 5), {"size": i64(1, 9), "block": i64(1, 5)}),
    c("Col2Im", (1, 4, 6), {"size": i64(2, 7), "block": i64(1, 2)}, dilations=[1, 4]),
    c("DFT", (2, 6, 5, 1), {"n": np.array(4, np.int64), "axis": np.array(1, np.int64)}),
    c("DFT", (2, 6, 5, 2), {"n": np.array(8, np.int64), "axis": np.array(-2, np.int64)}),
    c("DFT", (3, 7, 1), {"n": np.array(7, np.int64), "axis": np.array(1, np.int64)}, onesided=1),
    c("DFT", (3, 7, 2), {"n": np.array(7, np.int64), "axis": np.array(1, np.int64)}, inverse=1),
    c("DFT", (3, 7, 4, 1), opset=17, axis=2),
    c("STFT", (2, 32, 1), {"step": np.array(4, np.int64), "w": np.hanning(8).astype(np.float32)}, onesided=1),
    c("STFT", (1, 20, 2), {"step": np.array(3, np.int64), "w": np.hanning(7).astype(np.float32)}, onesided=0),
]
COMBINED = [
    *(
        c("ScatterND", (4, 5, 2), {"i": ROWS_TWICE, "u": (4, 2)}, reduction=reduction)
        for reduction in ("max", "min", "mul", "add")
    ),
    *(
        c(
            "ScatterElements",
            {"x": (4, 5), "i": np.array([[0, 1, 1, -1], [3, 0, 0, 2]], np.int64)},
            {"u": (2, 4)},
            axis=1,
            reduction=reduction,
        )
        for reduction in ("max", "min", "mul")
    ),
    c("GatherND", (2, 3, 4), {"i": np.array([[[1, -1], [0, 2]], [[2, 0], [1, 1]]], np.int64)}, batch_dims=1),
    c("GatherND", {"x": (2, 3, 4, 2), "i": np.array([[[1], [0], [2]], [[2], [-1], [0]]], np.int64)}, batch_dims=2),
    c("Clip", {"x": (2, 3, 4), "low": np.float32(-0.4), "high": np.float32(0.6)}),
    c("Clip", {"x": (2, 3, 4), "low": np.float32(0.4)}, {"high": np.float32(0.1)}),
    c("Dropout", (2, 3), {}, ("y", "mask")),
    *(
        c("Slice", (5, 6), {"s": i64(start), "e": i64(end), "a": i64(1), "p": i64(step)})
        for start, end, step in ((-9, -100, -1), (9, -100, -2), (-1, 0, -2), (-9, 9, 2), (3, -1, 1))
    ),
    *(
        c(op, np.array([[5, 0, -3], [-128, 127, 1]], dtype))
        for op in ("Abs", "Neg", "Sign")
        for dtype in (np.int8, np.int32, np.int64)
    ),
    c("BitwiseXor", {"x": np.array([5, -3, 7], np.int32), "z": np.array([1, 2, -9], np.int32)}),
    c("BitwiseNot", np.array([5, 0, 255], np.uint8)),
    c("BitwiseNot", np.array([5, -3, 7], np.int8)),
    c("MaxPool", (1, 3, 9, 8), kernel_shape=[3, 2], dilations=[2, 3], strides=[2, 1], pads=[1, 1, 2, 1]),
    c("MaxPool", (2, 3, 9), kernel_shape=[3], dilations=[2]),
    c("MaxPool", (1, 2, 6, 6, 6), kernel_shape=[2, 2, 2], dilations=[2, 1, 3]),
    c("AveragePool", (1, 3, 9, 8), kernel_shape=[3, 2], dilations=[2, 3], pads=[2, 1, 2, 1]),
    c("AveragePool", (1, 3, 9, 8), kernel_shape=[3, 2], dilations=[2, 3], pads=[2, 1, 2, 1], count_include_pad=1),
    *(
        c(op, (2, 3, 4, 5), {"axes": i64(*axes)} if axes else {}, keepdims=keepdims)
        for op in ("ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceSumSquare")
        for axes, keepdims in (((1, -1), 1), ((2,), 0), ((), 0))
    ),
    c("ReduceLogSum", np.linspace(0.1, 3, 24, dtype=np.float32).reshape(2, 3, 4), {"axes": i64(1)}, keepdims=0),
    c("ReduceLogSumExp", np.array([[80.0, 90.0, 100.0]], np.float32), opset=13, axes=[1]),
    c("ReduceL1", np.array([[-3, 2], [5, -1]], np.int32), {"axes": i64(0)}),
    c("LpPool", (1, 3, 7, 8), kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], p=1),
    c("LpPool", (1, 3, 7, 8), kernel_shape=[3, 2], dilations=[2, 2], p=2),
    c("LpPool", (1, 3, 9), kernel_shape=[4], strides=[2]),
    c("GlobalLpPool", (2, 3, 5, 4), p=2),
    c("GlobalLpPool", (2, 3, 5), p=1),
]
# The inputs of the recurrent ops by position: x, w, r, b, sequence lengths, h, c, peepholes.
POSITIONS = {
    "LSTM": ("x", "w", "r", "b", "", "h", "c", "p"),
    "GRU": ("x", "w", "r", "b", "", "h"),
    "RNN": ("x", "w", "r", "b"),
}
CASES = [
    *SAMPLED,
    *COMBINED,
    *MORE,
    *INDEX,
    *NORM,
    *EINSUM,
    *RECURRENT,
    *CONV,
    *POOL,
    *ACTIVATION,
    *MATH,
    *MATMUL,
    *REDUCE,
    *SHAPE,
    *RESIZE,
]
INTERNAL = {"Quantize", "StoredOutput"}  # made by the converter's own passes


def arrays(given: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: random.standard_normal(item).astype(np.float32) if isinstance(item, tuple) else np.asarray(item)
        for name, item in given.items()
    }


def build(case: Case) -> tuple[Any, dict[str, np.ndarray]]:
    seed = zlib.crc32(repr(case).encode())
    feeds, constants = arrays(case.inputs, seed), arrays(case.constants, seed + 1)
    names = [*feeds, *constants]
    if case.op == "Resize":
        names = ["x", *("" if name in ("roi", "s") else name for name in constants)]
        constants = {name: array for name, array in constants.items() if name in names}
    if case.op in POSITIONS:
        names = [name if name in (*feeds, *constants) else "" for name in POSITIONS[case.op]]
    made = model([node(case.op, names, case.outputs, **case.attrs)], feeds, constants, case.outputs, case.opset)
    return made, feeds


def case_id(case: Case) -> str:
    return f"{case.op}-{zlib.crc32(repr(case).encode()) % 10000}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_op_matches_onnxruntime(case: Case) -> None:
    made, feeds = build(case)
    expected = run_onnx(made, feeds)
    data = convert(made)
    for xnnpack in (True, False):
        actual = run_tflite(data, feeds, xnnpack)
        assert set(actual) == set(expected)
        for name, array in expected.items():
            assert actual[name].shape == array.shape and actual[name].dtype == array.dtype
            scale = max(1e-3, float(np.abs(array).max(initial=0))) if array.dtype.kind == "f" else 1
            np.testing.assert_allclose(actual[name], array, rtol=1e-5, atol=1e-5 * scale)


def test_every_lowering_has_a_case() -> None:
    assert {case.op for case in CASES} | INTERNAL == set(LOWERINGS)
