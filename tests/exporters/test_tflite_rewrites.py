"""Operators of ONNX Runtime and operators on integers, converted and compared with ONNX Runtime's own kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tflite_tools import run_onnx, run_tflite

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite import convert, convert_with_notes

RANDOM = np.random.default_rng(1)
IMAGE = RANDOM.standard_normal((1, 4, 6, 6)).astype(np.float32)
ROWS = RANDOM.standard_normal((3, 8)).astype(np.float32)
CONTRIB = "com.microsoft"


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def made(nodes: list[onnx.NodeProto], feeds: dict[str, np.ndarray], constants: dict[str, Any]) -> onnx.ModelProto:
    """A model whose output is `y`, its shape unknown: ONNX infers none for operators of other domains."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in feeds.items()
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    shape = run_onnx(model, feeds, optimized=False)["y"].shape
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape))
    return model


FLOAT: dict[str, tuple[str, list[str], dict[str, Any], dict[str, Any], np.ndarray]] = {
    "Gelu": ("Gelu", ["x"], {}, {}, IMAGE),
    "BiasGelu": ("BiasGelu", ["x", "b"], {}, {"b": floats(8)}, ROWS),
    "FastGelu": ("FastGelu", ["x", "b"], {}, {"b": floats(8)}, ROWS),
    "FastGelu without bias": ("FastGelu", ["x"], {}, {}, ROWS),
    "QuickGelu": ("QuickGelu", ["x"], {"alpha": 1.5}, {}, ROWS),
    "SkipLayerNormalization": (
        "SkipLayerNormalization", ["x", "x", "g", "b"], {"epsilon": 1e-3}, {"g": floats(8), "b": floats(8)},
        floats(1, 3, 8),
    ),
    "FusedConv": (
        "FusedConv", ["x", "w", "b"], {"activation": "LeakyRelu", "activation_params": [0.1], "pads": [1, 1, 1, 1]},
        {"w": floats(4, 4, 3, 3), "b": floats(4)}, IMAGE,
    ),
    "FusedGemm": (
        "FusedGemm", ["x", "w", "b"], {"activation": "Relu", "transB": 1}, {"w": floats(5, 8), "b": floats(5)}, ROWS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOAT)
def test_a_float_operator_of_onnxruntime(case: str) -> None:
    op, names, attributes, constants, x = FLOAT[case]
    model = made([helper.make_node(op, names, ["y"], domain=CONTRIB, **attributes)], {"x": x}, constants)
    expected = run_onnx(model, {"x": x}, optimized=False)["y"]
    data = convert(model)
    for xnnpack in (True, False):
        np.testing.assert_allclose(run_tflite(data, {"x": x}, xnnpack)["y"], expected, rtol=1e-4, atol=1e-4)


def numbers(dtype: Any, scales: dict[str, Any]) -> dict[str, Any]:
    """Scales and zero points: `xs` and `xz` for "x"."""
    middle = 120 if dtype == np.uint8 else 3
    constants: dict[str, Any] = {}
    for name, scale in scales.items():
        constants |= {f"{name}s": np.asarray(scale, np.float32), f"{name}z": np.full(np.shape(scale), middle, dtype)}
    return constants


def integers(dtype: Any, *shape: int) -> np.ndarray:
    info = np.iinfo(dtype)
    return RANDOM.integers(info.min, info.max + 1, shape).astype(dtype)


X, Y = ["q", "xs", "xz"], ["ys", "yz"]
# operator → its domain, inputs after quantization of x, attributes, further constants by dtype, and x
QUANTIZED: dict[str, tuple[str, list[str], dict[str, Any], Any, np.ndarray]] = {
    "QLinearConv": (
        "", [*X, "w", "ws", "wz", *Y, "b"], {"pads": [1, 1, 1, 1]},
        lambda d: {"w": integers(np.int8, 5, 4, 3, 3), "ws": np.linspace(0.002, 0.01, 5, dtype=np.float32),
                   "wz": np.zeros(5, np.int8), "b": RANDOM.integers(-900, 900, 5).astype(np.int32)}, IMAGE,
    ),
    "QLinearMatMul": (
        "", [*X, "w", "ws", "wz", *Y], {},
        lambda d: {"w": integers(np.int8, 8, 5), "ws": np.float32(0.004), "wz": np.int8(0)}, ROWS,
    ),
    "QLinearAdd": (CONTRIB, [*X, *X, *Y], {}, lambda d: {}, IMAGE),
    "QLinearMul": (
        CONTRIB, [*X, "k", "ks", "kz", *Y], {}, lambda d: {"k": integers(d, 4, 1, 1), **numbers(d, {"k": 0.02})}, IMAGE,
    ),
    "QLinearGlobalAveragePool": (CONTRIB, [*X, *Y], {}, lambda d: {}, IMAGE),
    "QLinearAveragePool": (CONTRIB, [*X, *Y], {"kernel_shape": [2, 2], "strides": [2, 2]}, lambda d: {}, IMAGE),
    "QLinearConcat": (CONTRIB, [*Y, *X, *X], {"axis": 1}, lambda d: {}, IMAGE),
    "QLinearSigmoid": (CONTRIB, [*X, *Y], {}, lambda d: {}, IMAGE),
    "QLinearLeakyRelu": (CONTRIB, [*X, *Y], {"alpha": 0.2}, lambda d: {}, IMAGE),
    "QLinearSoftmax": (CONTRIB, [*X, *Y], {"axis": -1, "opset": 13}, lambda d: {}, ROWS),
    "QGemm": (
        CONTRIB, [*X, "w", "ws", "wz", "b", *Y], {"transB": 1},
        lambda d: {"w": integers(np.int8, 5, 8), "ws": np.float32(0.004), "wz": np.int8(0),
                   "b": RANDOM.integers(-900, 900, 5).astype(np.int32)}, ROWS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.int8, np.uint8], ids=["int8", "uint8"])
@pytest.mark.parametrize("op", QUANTIZED)
def test_an_operator_on_integers(op: str, dtype: Any) -> None:
    domain, names, attributes, more, x = QUANTIZED[op]
    constants = numbers(dtype, {"x": 0.03, "y": 0.04}) | more(dtype)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node(op, names, ["r"], domain=domain, **attributes),
        helper.make_node("DequantizeLinear", ["r", *Y], ["y"]),
    ]
    used = {name for node in nodes for name in node.input}
    model = made(nodes, {"x": x}, {name: array for name, array in constants.items() if name in used})
    expected = run_onnx(model, {"x": x}, optimized=False)["y"]
    converted = convert_with_notes(model)
    assert converted.qparams
    for xnnpack in (True, False):
        actual = run_tflite(converted.data, {"x": x}, xnnpack)["y"]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=0.0401)  # one step


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_what_quantize_dynamic_writes(tmp_path: Any, signed: bool, per_channel: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    constants = {"w": floats(16, 32), "b": floats(32), "v": floats(32, 4)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]), helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]  # fmt: skip
    feeds = {"x": floats(3, 16)}
    (tmp_path / "float.onnx").write_bytes(made(nodes, feeds, constants).SerializeToString())
    kind = QuantType.QInt8 if signed else QuantType.QUInt8
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "int8.onnx", weight_type=kind, per_channel=per_channel)
    model = onnx.load(tmp_path / "int8.onnx")
    assert any(node.op_type == "MatMulInteger" for node in model.graph.node)
    expected = run_onnx(model, feeds, optimized=False)["y"]
    for xnnpack in (True, False):
        actual = run_tflite(convert(model), feeds, xnnpack)["y"]
        assert np.abs(actual - expected).max() < 0.03 * np.abs(expected).max()


def test_a_layout_that_no_standard_operator_has_is_refused() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("QLinearGlobalAveragePool", [*X, *Y], ["r"], domain=CONTRIB, channels_last=1),
        helper.make_node("DequantizeLinear", ["r", *Y], ["y"]),
    ]
    model = made(nodes, {"x": IMAGE}, numbers(np.uint8, {"x": 0.03, "y": 0.04}))
    with pytest.raises(EdgeKitError, match="channels_last"):
        convert(model)
