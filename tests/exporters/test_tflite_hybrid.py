"""Int8 weights beside float activations: layers with a dynamic range, and weights that only the file holds as int8."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from tflite_tools import model, node, op_names, run_onnx, run_tflite

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite import convert, convert_with_notes


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(name: str, weights: np.ndarray, axis: int | None) -> tuple[dict[str, np.ndarray], onnx.NodeProto]:
    """Int8 constants, with one scale or one per index of an axis, and the node that makes real numbers of them."""
    others = tuple(index for index in range(weights.ndim) if index != axis)
    scale = np.abs(weights).max(axis=None if axis is None else others, keepdims=True) / 127
    numbers = np.clip(np.rint(weights / scale), -127, 127).astype(np.int8)
    scale = scale.reshape(() if axis is None else -1).astype(np.float32)
    constants = {f"{name}_q": numbers, f"{name}_s": scale, f"{name}_z": np.zeros(scale.shape, np.int8)}
    return constants, node("DequantizeLinear", [*constants], name, **({} if axis is None else {"axis": axis}))


def dynamic(name: str) -> list[onnx.NodeProto]:
    parts = [f"{name}_{part}" for part in "qsz"]
    return [node("DynamicQuantizeLinear", [name], parts), node("DequantizeLinear", parts, f"{name}_dq")]


def dense(op: str, shape: tuple[int, ...], axis: int | None, quantized: bool, **attributes: Any) -> onnx.ModelProto:
    """x · w + b with 96 features and 64 channels."""
    transposed = attributes.get("transB", 0)
    weights = random(64, 96, seed=1) * np.linspace(0.2, 3, 64, dtype=np.float32)[:, None]
    axis = axis if axis is None or not transposed else 1 - axis
    constants, dequantize = stored("w", weights if transposed else weights.T.copy(), axis)
    constants["b"] = random(64, seed=2)
    x = "x_dq" if quantized else "x"
    nodes = [dequantize, *(dynamic("x") if quantized else [])]
    if op == "Gemm":
        nodes.append(node("Gemm", [x, "w", "b"], "y", **attributes))
    else:
        nodes += [node("MatMul", [x, "w"], "p"), node("Add", ["p", "b"], "y")]
    return model(nodes, {"x": random(*shape)}, constants)


DENSE = [("MatMul", (1, 96), {}), ("MatMul", (2, 5, 96), {}), ("Gemm", (7, 96), {}), ("Gemm", (7, 96), {"transB": 1})]


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize(("op", "shape", "attributes"), DENSE)
def test_dynamic_layer_is_hybrid_and_no_less_exact(
    op: str, shape: tuple[int, ...], attributes: dict[str, int], axis: int | None
) -> None:
    """Against the same int8 weights and float inputs: TFLite quantizes each row of inputs, ONNX all of them at once."""
    feeds = {"x": random(*shape)}
    made = dense(op, shape, axis, True, **attributes)
    exact = run_onnx(dense(op, shape, axis, False, **attributes), feeds, optimized=False)["y"]
    theirs = np.abs(run_onnx(made, feeds, optimized=False)["y"] - exact)
    converted = convert_with_notes(made)
    assert (
        op_names(converted.data) == ["FULLY_CONNECTED"] and converted.min_runtime == f"2.{3 if axis is None else 17}.0"
    )
    for xnnpack in (True, False):
        ours = np.abs(run_tflite(converted.data, feeds, xnnpack)["y"] - exact)
        assert ours.mean() <= 1.1 * theirs.mean() + 1e-6 and ours.max() > 0


def test_value_read_by_a_dynamic_layer_and_in_float_is_quantized_for_the_layer_alone() -> None:
    made = dense("MatMul", (3, 96), 1, True)
    made.graph.node.append(node("Relu", ["x"], "z"))
    made.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [3, 96]))
    feeds = {"x": random(3, 96)}
    np.testing.assert_array_equal(run_tflite(convert(made), feeds)["z"], np.maximum(feeds["x"], 0))


def test_dynamic_layer_that_tflite_lacks_is_float_and_noted() -> None:
    feeds = {"x": random(1, 4, 6, 6)}
    constants, dequantize = stored("w", random(8, 4, 3, 3, seed=1), 0)
    made = model([dequantize, *dynamic("x"), node("Conv", ["x_dq", "w"])], feeds, constants)
    exact = run_onnx(model([dequantize, node("Conv", ["x", "w"])], feeds, constants), feeds)["y"]
    converted = convert_with_notes(made)
    assert any("dynamic range" in note for note in converted.notes)
    np.testing.assert_allclose(run_tflite(converted.data, feeds)["y"], exact, rtol=1e-4, atol=1e-4)


def test_dynamic_quantization_that_is_read_otherwise_is_refused() -> None:
    feeds = {"x": random(2, 3)}
    made = model([node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])], feeds, {}, ("q", "s", "z"))
    with pytest.raises(EdgeKitError, match="scale or zero point is not constant"):
        convert(made)


def int8_bytes(data: bytes) -> int:
    """Bytes of int8 constants in a file."""
    root = schema.Model.GetRootAs(data, 0)
    graphs = [root.Subgraphs(index) for index in range(root.SubgraphsLength())]
    tensors = [graph.Tensors(index) for graph in graphs for index in range(graph.TensorsLength())]
    buffers = {tensor.Buffer() for tensor in tensors if tensor.Type() == schema.TensorType.INT8}
    return sum(root.Buffers(buffer).DataLength() for buffer in buffers)


WEIGHT_ONLY = [
    ("MatMul", (2, 3, 64), (64, 80), 1, {}),
    ("MatMul", (2, 3, 64), (64, 80), None, {}),
    ("Gemm", (5, 64), (80, 64), 0, {"transB": 1}),
    ("Conv", (1, 8, 9, 9), (16, 8, 3, 3), 0, {"pads": [1] * 4}),
    ("Conv", (1, 16, 9, 9), (16, 1, 3, 3), 0, {"group": 16}),
    ("Conv", (1, 8, 9), (16, 8, 3), 0, {}),
    ("ConvTranspose", (1, 8, 5, 5), (8, 16, 2, 2), 1, {"strides": [2, 2]}),
]


@pytest.mark.parametrize(("op", "shape", "weights", "axis", "attributes"), WEIGHT_ONLY)
def test_weights_alone_are_int8_in_the_file_and_exact(
    op: str, shape: tuple[int, ...], weights: tuple[int, ...], axis: int | None, attributes: dict[str, Any]
) -> None:
    feeds = {"x": random(*shape)}
    constants, dequantize = stored("w", random(*weights, seed=1), axis)
    made = model([dequantize, node(op, ["x", "w"], **attributes)], feeds, constants)
    data = convert(made)
    assert int8_bytes(data) == np.prod(weights) and op_names(data).count("DEQUANTIZE") == 1
    expected = run_onnx(made, feeds, optimized=False)["y"]  # optimized, it quantizes the inputs of some layers as well
    for xnnpack in (True, False):
        actual = run_tflite(data, feeds, xnnpack)["y"]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("where", [np.array([[3, 0, -1], [7, 7, 2]]), np.array(5), np.array([-2])])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("scales", [None, 0, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_embedding_gathers_int8_and_then_makes_real_numbers(
    axis: int, scales: int | None, known: bool, where: np.ndarray
) -> None:
    """Only what is gathered becomes float."""
    constants, dequantize = stored("table", random(10, 12), scales)
    places = where.astype(np.int64)
    feeds = {"x": random(*np.take(np.zeros((10, 12)), where, axis).shape)}
    (constants if known else feeds)["i"] = places
    nodes = [dequantize, node("Gather", ["table", "i"], "g", axis=axis), node("Add", ["g", "x"])]
    made = model(nodes, feeds, constants)
    data = convert(made)
    assert known or int8_bytes(data) == 120
    for xnnpack in (True, False):
        np.testing.assert_array_equal(run_tflite(data, feeds, xnnpack)["y"], run_onnx(made, feeds)["y"])


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("axis", [None, 1])
def test_recurrent_weights_are_int8_in_the_file(op: str, axis: int | None) -> None:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    feeds = {"x": random(6, 2, 12)}
    w, dequantize_w = stored("w", random(1, gates * 16, 12, seed=1), axis)
    r, dequantize_r = stored("r", random(1, gates * 16, 16, seed=2) / 4, axis)
    constants = w | r | {"b": random(1, 2 * gates * 16, seed=3)}
    attributes = {"linear_before_reset": 1} if op == "GRU" else {}
    layer = node(op, ["x", "w", "r", "b"], ["y", "h"], hidden_size=16, **attributes)
    made = model([dequantize_w, dequantize_r, layer], feeds, constants, ("y", "h"))
    data = convert(made)
    assert int8_bytes(data) == gates * 16 * (12 + 16)
    for xnnpack in (True, False):
        for name, array in run_onnx(made, feeds, optimized=False).items():
            np.testing.assert_allclose(run_tflite(data, feeds, xnnpack)[name], array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("axis", [None, 1])
def test_dynamic_recurrent_layer_is_hybrid(op: str, axis: int | None) -> None:
    """Its state is quantized at run time like its input, which ONNX does not do: both are near to exact."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    feeds = {"x": random(20, 2, 12)}
    w, dequantize_w = stored("w", random(1, gates * 16, 12, seed=1), axis)
    r, dequantize_r = stored("r", random(1, gates * 16, 16, seed=2) / 4, axis)
    attributes = {"hidden_size": 16} | ({"linear_before_reset": 1} if op == "GRU" else {})

    def layer(x: str) -> onnx.ModelProto:
        nodes = [dequantize_w, dequantize_r, *(dynamic("x") if x != "x" else []), node(op, [x, "w", "r"], **attributes)]
        return model(nodes, feeds, w | r)

    data = convert(layer("x_dq"))
    assert "DEQUANTIZE" not in op_names(data) and int8_bytes(data) == gates * 16 * (12 + 16)
    exact = run_onnx(layer("x"), feeds, optimized=False)["y"]
    for xnnpack in (True, False):
        off = np.abs(run_tflite(data, feeds, xnnpack)["y"] - exact)
        assert 0 < off.max() < 0.1 and off.mean() < 0.01
