"""Int8: every QDQ op within one step of ONNX Runtime, and the scales of the ONNX file kept exactly."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from tflite_tools import interpreter, model, node, op_names, run_onnx, run_tflite

from edgekit.exporters.tflite import convert_with_notes

INT8, UINT8 = np.dtype(np.int8), np.dtype(np.uint8)


def params_for(array: np.ndarray, dtype: np.dtype = INT8) -> tuple[np.ndarray, np.ndarray]:
    """Asymmetric parameters that cover an array and zero."""
    low, high = min(0.0, float(array.min())), max(0.0, float(array.max()))
    info = np.iinfo(dtype)
    scale = np.float32((high - low) / 255 or 1)
    return scale, np.array(np.clip(round(info.min - low / scale), info.min, info.max), dtype)


class Qdq:
    """Builds a QDQ graph from float tensors: what `quantize` names is computed in ONNX Runtime to find its range."""

    def __init__(self, inputs: dict[str, np.ndarray], opset: int = 20, dtype: np.dtype = INT8) -> None:
        self.inputs, self.opset, self.dtype = inputs, opset, dtype
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.params: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def constant(self, name: str, array: Any) -> str:
        self.constants[name] = np.asarray(array)
        return name

    def op(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(node(op, inputs, output, **attributes))
        return output

    def quantize(self, name: str, params: tuple[Any, Any] | None = None) -> str:
        if params is None:
            value = self.inputs[name] if name in self.inputs else run_onnx(self.model(name), self.inputs, False)[name]
            params = params_for(value, self.dtype)
        self.params[name] = params
        scale, zero = self.constant(f"{name}_s", np.float32(params[0])), self.constant(f"{name}_z", params[1])
        self.op("QuantizeLinear", [name, scale, zero], f"{name}_q")
        return self.op("DequantizeLinear", [f"{name}_q", scale, zero], f"{name}_dq")

    def weights(self, name: str, array: np.ndarray, axis: int | None = 0) -> str:
        others = tuple(index for index in range(array.ndim) if index != axis)
        scale = (np.abs(array).max(axis=others, keepdims=True) / 127).astype(np.float32)
        stored = np.clip(np.rint(array / scale), -127, 127).astype(np.int8)
        self.constant(f"{name}_q", stored)
        scales = scale.reshape(-1) if axis is not None else scale.reshape(())
        names = [self.constant(f"{name}_s", scales), self.constant(f"{name}_z", np.zeros_like(scales, np.int8))]
        attributes = {} if axis is None else {"axis": axis}
        return self.op("DequantizeLinear", [f"{name}_q", *names], name, **attributes)

    def bias(self, name: str, array: np.ndarray, x: str, w: str) -> str:
        scale = (self.params[x][0] * self.constants[f"{w}_s"]).astype(np.float32)
        self.constant(f"{name}_q", np.rint(array / scale).astype(np.int32))
        zero = self.constant(f"{name}_z", np.zeros(scale.shape, np.int32))
        return self.op("DequantizeLinear", [f"{name}_q", self.constant(f"{name}_s", scale), zero], name, axis=0)

    def model(self, output: str) -> onnx.ModelProto:
        return model(self.nodes, self.inputs, self.constants, (output,), self.opset)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Case(NamedTuple):
    """One op between Q/DQ: input shapes, int8 weights (name → shape, axis), float bias, attributes, activation."""

    op: str
    inputs: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[int, ...], int | None] | None = None
    bias: str = ""
    activation: str = ""
    attrs: tuple[tuple[str, Any], ...] = ()
    constants: tuple[Any, ...] = ()
    kinds: tuple[str, ...] = ()
    same: bool = False


def q(
    op: str,
    *inputs: tuple[int, ...],
    weights: Any = None,
    bias: str = "",
    activation: str = "",
    constants: Any = (),
    kinds: str = "",
    same: bool = False,
    **attrs: Any,
) -> Case:
    """A case; `kinds` are the TFLite ops it must become, `same` gives the output the input's parameters."""
    return Case(op, inputs, weights, bias, activation, tuple(attrs.items()), constants, tuple(kinds.split()), same)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


CASES = [
    q("Conv", (2, 3, 8, 8), weights=((4, 3, 3, 3), 0), bias="float", kinds="CONV_2D"),
    q("Conv", (1, 3, 8, 8), weights=((4, 3, 3, 3), 0), bias="int32", kinds="CONV_2D", pads=[1, 1, 1, 1]),
    q("Conv", (1, 3, 8, 8), weights=((4, 3, 3, 3), None), kinds="CONV_2D", pads=[1, 1, 1, 1]),
    q("Conv", (1, 3, 8, 8), weights=((4, 3, 3, 3), 0), bias="int32", activation="Relu", kinds="CONV_2D"),
    q("Conv", (1, 3, 8, 8), weights=((4, 3, 3, 3), 0), bias="float", activation="Clip", kinds="CONV_2D"),
    q("Conv", (1, 3, 8, 8), weights=((4, 3, 3, 3), 0), kinds="PAD CONV_2D", pads=[1, 1, 1, 1], strides=[2, 2]),
    q("Conv", (1, 4, 8, 8), weights=((4, 1, 3, 3), 0), bias="int32", kinds="DEPTHWISE_CONV_2D", group=4, pads=[1] * 4),
    q("Conv", (1, 4, 8, 8), weights=((8, 1, 3, 3), 0), bias="float", kinds="DEPTHWISE_CONV_2D", group=4),
    q("Conv", (1, 4, 8, 8), weights=((6, 2, 3, 3), 0), bias="float", kinds="CONV_2D", group=2),
    # As many input as output channels, and scales along the wrong ones: TFLite has no such int8 convolution.
    q("Conv", (1, 8, 6, 6), weights=((8, 8, 3, 3), 1), bias="float"),
    q("ConvTranspose", (1, 4, 5, 5), weights=((4, 4, 2, 2), 0), strides=[2, 2]),
    q("MatMul", (2, 8), weights=((8, 8), 0)),
    q("Conv", (1, 3, 16), weights=((3, 3, 3), 0), bias="int32", kinds="CONV_2D"),
    q("Conv", (2, 3, 16), weights=((4, 3, 3), 0), bias="float", kinds="CONV_2D", pads=[1, 1]),
    q("ConvTranspose", (1, 3, 5, 5), weights=((3, 4, 2, 2), 1), bias="float", kinds="TRANSPOSE_CONV", strides=[2, 2]),
    q("ConvTranspose", (1, 3, 5, 5), weights=((3, 4, 3, 3), None), kinds="TRANSPOSE_CONV", strides=[2, 2]),
    q("Gemm", (3, 16), weights=((5, 16), 0), bias="int32", kinds="FULLY_CONNECTED", transB=1),
    q("Gemm", (3, 16), weights=((16, 5), 1), bias="float", activation="Relu", kinds="FULLY_CONNECTED"),
    q("MatMul", (2, 3, 16), weights=((16, 5), 1), kinds="FULLY_CONNECTED"),
    q("MatMul", (2, 3, 16), weights=((16, 5), None), kinds="FULLY_CONNECTED"),
    q("MatMul", (2, 3, 4, 16), (2, 3, 16, 5), kinds="BATCH_MATMUL"),
    q("Add", (1, 3, 4, 4), (1, 3, 4, 4), kinds="ADD"),
    q("Add", (1, 3, 4, 4), (1, 3, 4, 4), activation="Relu", kinds="ADD"),
    q("Sub", (1, 3, 4, 4), (1, 3, 1, 1), kinds="SUB"),
    q("Mul", (1, 3, 4, 4), (1, 3, 4, 4), kinds="MUL"),
    q("Mul", (1, 3, 4, 4), (1, 3, 1, 1), kinds="MUL"),
    q("Mul", (1, 3, 4, 4), constants=(np.float32(0.37),), kinds="MUL"),
    q("Add", (1, 3, 4, 4), constants=(np.float32(3),), kinds="ADD"),
    q("Max", (1, 3, 4, 4), (1, 3, 4, 4), kinds="MAXIMUM"),
    q("Min", (1, 3, 4, 4), (1, 3, 4, 4), kinds="MINIMUM"),
    q("Relu", (1, 3, 4, 4)),
    q("Clip", (1, 3, 4, 4), constants=(np.float32(-0.5), np.float32(0.7))),
    q("LeakyRelu", (1, 3, 4, 4), kinds="LEAKY_RELU", alpha=0.1),
    q("PRelu", (1, 3, 4, 4), (3, 1, 1), kinds="PRELU"),
    q("PRelu", (1, 3, 4, 4), constants=(np.float32([0.3]),), kinds="LEAKY_RELU"),
    q("HardSwish", (1, 3, 4, 4), kinds="MUL ADD"),
    q("HardSigmoid", (1, 3, 4, 4), kinds="MUL ADD", alpha=1 / 6, beta=0.5),
    q("Elu", (1, 3, 4, 4), kinds="ELU"),
    q("Sigmoid", (1, 3, 4, 4), kinds="LOGISTIC"),
    q("Tanh", (1, 3, 4, 4), kinds="TANH"),
    q(
        "BatchNormalization",
        (1, 3, 4, 4),
        constants=[np.array(row, np.float32) for row in ((1, -2, 0), (0.5, 0, 1), (0, 0.3, 0), (1, 0.5, 2))],
        kinds="DEPTHWISE_CONV_2D",
    ),
    q("Softmax", (1, 30)),
    q("MaxPool", (1, 3, 8, 8), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
    q("MaxPool", (1, 3, 8, 8), kinds="MAX_POOL_2D", same=True, kernel_shape=[2, 2], strides=[2, 2]),
    q("AveragePool", (1, 3, 8, 8), kinds="AVERAGE_POOL_2D", same=True, kernel_shape=[2, 2], strides=[2, 2]),
    q("AveragePool", (1, 3, 8, 8), kernel_shape=[3, 3], pads=[1] * 4),
    q("AveragePool", (1, 3, 8, 8), kinds="DEPTHWISE_CONV_2D", kernel_shape=[3, 3], strides=[2, 2]),
    q("GlobalAveragePool", (1, 3, 8, 8), kinds="MEAN"),
    q("GlobalAveragePool", (1, 3, 8, 8), kinds="MEAN", same=True),
    q("ReduceMean", (1, 3, 8, 8), constants=(i64(-1, -2),), kinds="MEAN"),
    q("ReduceSum", (1, 3, 8, 8), constants=(i64(1),), kinds="SUM"),
    q("ReduceMax", (1, 3, 8, 8), constants=(i64(1),), kinds="REDUCE_MAX"),
    q("Concat", (1, 3, 4, 4), (1, 2, 4, 4), kinds="CONCATENATION", axis=1),
    q("Reshape", (1, 3, 4, 4), constants=(i64(3, 16),), same=True),
    q("Transpose", (1, 3, 4, 5), same=True, perm=[0, 2, 3, 1]),
    q("Slice", (1, 6, 4, 4), constants=(i64(0, 0), i64(9, 9), i64(2, 3), i64(2, 2)), kinds="STRIDED_SLICE"),
    q("Pad", (1, 2, 4, 4), constants=(i64(0, 1, 1, 0, 0, 2, 0, 1),), kinds="PAD"),
    q("Pad", (1, 2, 4, 4), constants=(i64(0, 1, 1, 0, 0, 2, 0, 1), np.float32(0.8)), kinds="PADV2"),
    q(
        "Resize",
        (1, 2, 4, 4),
        constants=("", np.array([1, 1, 2, 2], np.float32)),
        kinds="RESIZE_BILINEAR",
        mode="linear",
    ),
    q("Resize", (1, 2, 4, 4), constants=("", np.array([1, 1, 2, 2], np.float32)), mode="nearest"),
    q("DepthToSpace", (1, 8, 3, 3), kinds="DEPTH_TO_SPACE", same=True, blocksize=2),
    q("Gather", (5, 6), constants=(i64(0, 3, -1),), kinds="GATHER", same=True),
]


def build(case: Case, dtype: np.dtype = INT8) -> tuple[Qdq, onnx.ModelProto]:
    graph = Qdq({f"x{index}": random(*shape, seed=index) for index, shape in enumerate(case.inputs)}, dtype=dtype)
    names = [graph.quantize(name) for name in list(graph.inputs)]
    if case.weights is not None:
        shape, axis = case.weights
        names.append(
            graph.weights(
                "w",
                random(*shape, seed=7)
                * np.linspace(0.2, 3, shape[axis or 0])
                .reshape([-1 if index == (axis or 0) else 1 for index in range(len(shape))])
                .astype(np.float32),
                axis,
            )
        )
        channels = shape[0] if case.op == "Conv" or dict(case.attrs).get("transB") else shape[1]
        if case.bias == "int32":
            names.append(graph.bias("b", random(channels, seed=9), "x0", "w"))
        elif case.bias == "float":
            names.append(graph.constant("b", random(channels, seed=9)))
    for index, array in enumerate(case.constants):
        names.append("" if isinstance(array, str) else graph.constant(f"c{index}", array))
    output = graph.op(case.op, names, "t", **dict(case.attrs))
    if case.activation == "Relu":
        output = graph.op("Relu", [output], "r")
    elif case.activation == "Clip":
        bounds = [graph.constant("lo", np.float32(0)), graph.constant("hi", np.float32(6))]
        output = graph.op("Clip", [output, *bounds], "r")
    final = graph.quantize(output, graph.params["x0"] if case.same else None)
    return graph, graph.model(final)


def case_id(case: Case) -> str:
    return f"{case.op}-{zlib.crc32(repr(case).encode()) % 10000}"


@pytest.mark.parametrize("dtype", [INT8, UINT8], ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_op_is_within_one_step_of_onnxruntime(case: Case, dtype: np.dtype) -> None:
    graph, made = build(case, dtype)
    ((name, expected),) = run_onnx(made, graph.inputs, optimized=False).items()
    converted = convert_with_notes(made)
    step = float(graph.params[name.removesuffix("_dq")][0])
    for xnnpack in (True, False):
        actual = run_tflite(converted.data, graph.inputs, xnnpack)[name]
        assert np.abs(actual - expected).max() / step < 1.01
    kinds = set(op_names(converted.data))
    assert set(case.kinds) <= kinds
    if case.kinds:
        assert not converted.notes or all("transpose" in note for note in converted.notes)


def small_cnn(dtype: np.dtype = INT8) -> tuple[Qdq, onnx.ModelProto]:
    """conv → relu → residual conv → add → relu → strided depthwise → global pool → fully connected."""
    graph = Qdq({"image": random(1, 3, 16, 16)}, dtype=dtype)

    def conv(x: str, name: str, shape: tuple[int, ...], **attributes: Any) -> str:
        w = graph.weights(f"{name}_w", random(*shape, seed=len(name)) / 3)
        b = graph.bias(f"{name}_b", random(shape[0], seed=3), x.removesuffix("_dq"), f"{name}_w")
        return graph.op("Conv", [x, w, b], name, **attributes)

    def relu(x: str) -> str:
        return graph.op("Relu", [x], f"{x}_relu")

    x = graph.quantize("image")
    x = graph.quantize(relu(conv(x, "stem", (8, 3, 3, 3), pads=[1] * 4)))
    y = graph.quantize(conv(x, "inner", (8, 8, 3, 3), pads=[1] * 4))
    x = graph.quantize(relu(graph.op("Add", [x, y], "sum")))
    x = graph.quantize(conv(x, "depthwise", (8, 1, 3, 3), pads=[1] * 4, strides=[2, 2], group=8))
    x = graph.quantize(graph.op("GlobalAveragePool", [x], "pool"))
    x = graph.quantize(graph.op("Flatten", [x], "flat"), graph.params["pool"])
    w = graph.weights("fc_w", random(10, 8, seed=5))
    x = graph.quantize(graph.op("Gemm", [x, w, graph.constant("fc_b", random(10))], "logits", transB=1))
    return graph, graph.model(x)


@pytest.mark.parametrize("dtype", [INT8, UINT8], ids=str)
def test_cnn_is_int8_throughout_and_keeps_every_scale(dtype: np.dtype) -> None:
    graph, made = small_cnn(dtype)
    converted = convert_with_notes(made)
    assert op_names(converted.data) == [
        "QUANTIZE", "TRANSPOSE", "CONV_2D", "CONV_2D", "ADD", "PAD", "DEPTHWISE_CONV_2D", "MEAN", "RESHAPE",
        "FULLY_CONNECTED", "DEQUANTIZE",
    ]  # fmt: skip
    assert [note for note in converted.notes if "transpose of 'image_int8'" not in note] == []
    shift = 128 if dtype == UINT8 else 0
    activations = {(float(scale), int(zero) - shift) for scale, zero in graph.params.values()}
    written = [
        details["quantization_parameters"]
        for details in interpreter(converted.data, xnnpack=False).get_tensor_details()
        if details["dtype"] == np.int8
    ]
    per_tensor = {(float(q["scales"][0]), int(q["zero_points"][0])) for q in written if len(q["scales"]) == 1}
    assert per_tensor == activations
    per_channel = {tuple(map(float, q["scales"])) for q in written if len(q["scales"]) > 1}
    weights = {tuple(map(float, graph.constants[f"{name}_w_s"])) for name in ("stem", "inner", "depthwise", "fc")}
    assert per_channel == weights
    ((name, expected),) = run_onnx(made, graph.inputs, optimized=False).items()
    step = float(graph.params["logits"][0])
    assert np.abs(run_tflite(converted.data, graph.inputs)[name] - expected).max() <= 2.01 * step


def test_equal_vectors_are_written_once() -> None:
    """Zero points take eight bytes a channel, and are all 0."""
    from ai_edge_litert import schema_py_generated as schema

    _, made = small_cnn()
    subgraph = schema.Model.GetRootAs(convert_with_notes(made).data, 0).Subgraphs(0)
    quantized = [subgraph.Tensors(index).Quantization() for index in range(subgraph.TensorsLength())]
    vectors = [(q._tab.Vector(q._tab.Offset(10)), q.ZeroPointAsNumpy().tobytes()) for q in quantized if q is not None]
    vectors = [(place, zeros) for place, zeros in vectors if len(zeros) > 8]
    assert len(vectors) == 8 and len(set(vectors)) == len({zeros for _, zeros in vectors}) == 2


def test_nhwc_int8_model_has_no_transpose() -> None:
    graph, made = small_cnn()
    converted = convert_with_notes(made, layout="nhwc")
    assert "TRANSPOSE" not in op_names(converted.data) and converted.notes == ()
    feeds = {"image": np.ascontiguousarray(graph.inputs["image"].transpose(0, 2, 3, 1))}
    (expected,) = run_tflite(convert_with_notes(made).data, graph.inputs).values()
    (actual,) = run_tflite(converted.data, feeds).values()
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("stored", ["float", "int32"])
@pytest.mark.parametrize("axis", [None, 0])
def test_bias_that_int32_sums_do_not_hold_is_not_wrapped_around(axis: int | None, stored: str) -> None:
    """A dead channel: its weights are next to nothing, and its bias counts billions of their steps."""
    graph = Qdq({"x": random(1, 3, 8, 8)})
    x = graph.quantize("x")
    weights = random(4, 3, 3, 3) * np.array([1, 1e-10, 1, 1], np.float32).reshape(-1, 1, 1, 1)
    w = graph.weights("w", weights if axis == 0 else weights * 1e-9, axis)
    bias = np.array([0.5, -3, 1, 2], np.float32) * (1 if axis == 0 else np.float32(1e-3))
    if stored == "float":
        b = graph.constant("b", bias)
    else:
        scale = np.maximum(graph.params["x"][0] * graph.constants["w_s"], np.abs(bias).max() / (2**31 - 300))
        graph.constant("b_q", np.rint(bias / scale).astype(np.int32))
        b = graph.op("DequantizeLinear", ["b_q", graph.constant("b_s", np.float32(scale))], "b", axis=0)
    made = graph.model(graph.quantize(graph.op("Conv", [x, w, b], "conv")))
    ((name, expected),) = run_onnx(made, graph.inputs, optimized=False).items()
    step = float(graph.params["conv"][0])
    converted = convert_with_notes(made)
    for xnnpack in (True, False):
        assert np.abs(run_tflite(converted.data, graph.inputs, xnnpack)[name] - expected).max() <= 1.01 * step
    assert axis == 0 or any("float fallback" in note for note in converted.notes)


def test_int32_bias_is_kept_bit_for_bit() -> None:
    graph, made = small_cnn()
    model_interpreter = interpreter(convert_with_notes(made).data, xnnpack=False)
    stored = {
        tuple(model_interpreter.get_tensor(details["index"]))
        for details in model_interpreter.get_tensor_details()
        if details["dtype"] == np.int32 and details["quantization_parameters"]["scales"].size
    }
    for name in ("stem", "inner", "depthwise"):
        assert tuple(graph.constants[f"{name}_b_q"]) in stored


def test_clip_within_the_range_leaves_no_op_and_clip_before_quantize_is_fused() -> None:
    graph = Qdq({"x": random(1, 3, 8, 8)})
    x = graph.quantize("x")
    w = graph.weights("w", random(4, 3, 3, 3))
    bounds = [graph.constant("lo", np.float32(0)), graph.constant("hi", np.float32(6))]
    x = graph.op("Conv", [x, w], "conv", pads=[1] * 4)
    x = graph.quantize(x)
    x = graph.quantize(graph.op("Clip", [x, *bounds], "clip"))
    made = graph.model(x)
    data = convert_with_notes(made).data
    assert op_names(data) == ["QUANTIZE", "TRANSPOSE", "CONV_2D", "QUANTIZE", "TRANSPOSE", "DEQUANTIZE"]
    ((name, expected),) = run_onnx(made, graph.inputs, optimized=False).items()
    assert np.abs(run_tflite(data, graph.inputs)[name] - expected).max() <= 1.01 * float(graph.params["conv"][0])


def test_pad_before_a_strided_convolution_becomes_same() -> None:
    graph = Qdq({"x": random(1, 3, 8, 8)})
    pads = graph.constant("pads", i64(0, 0, 0, 0, 0, 0, 1, 1))
    x = graph.quantize(graph.op("Pad", ["x", pads], "padded"))
    w = graph.weights("w", random(4, 3, 3, 3))
    x = graph.quantize(graph.op("Conv", [x, w], "conv", strides=[2, 2]))
    made = graph.model(x)
    data = convert_with_notes(made).data
    assert "PAD" not in op_names(data)
    ((name, expected),) = run_onnx(made, graph.inputs, optimized=False).items()
    assert np.abs(run_tflite(data, graph.inputs)[name] - expected).max() <= 1.01 * float(graph.params["conv"][0])


def test_float_op_between_int8_ones_is_noted() -> None:
    graph = Qdq({"x": random(1, 3, 8, 8)})
    x = graph.op("Erf", [graph.quantize("x")], "erf")
    made = graph.model(graph.quantize(x))
    assert any("between int8 ops" in note and "Erf" in note for note in convert_with_notes(made).notes)


def test_unequal_readers_keep_the_value_in_float() -> None:
    """A value that is quantized in two ways is computed in float once: no way is better than the other."""
    graph = Qdq({"x": random(1, 3, 8, 8)})
    w = graph.weights("w", random(3, 3, 1, 1))
    conv = graph.op("Conv", [graph.quantize("x"), w], "conv")
    first = graph.quantize(conv)
    scale, zero = graph.constant("s2", np.float32(0.3)), graph.constant("z2", np.int8(5))
    graph.op("QuantizeLinear", [conv, scale, zero], "second_q")
    second = graph.op("DequantizeLinear", ["second_q", scale, zero], "second")
    made = graph.model(graph.op("Add", [first, second], "sum"))
    ((name, expected),) = run_onnx(made, graph.inputs, optimized=False).items()
    actual = run_tflite(convert_with_notes(made).data, graph.inputs)[name]
    assert np.abs(actual - expected).max() <= 0.31
    assert np.abs(actual - expected).mean() < 0.01


def test_int8_input_and_output_of_the_onnx_model_stay_int8() -> None:
    graph = Qdq({"x": np.arange(-24, 24, dtype=np.int8).reshape(1, 3, 4, 4)})
    scale, zero = graph.constant("s", np.float32(0.1)), graph.constant("z", np.int8(3))
    x = graph.op("DequantizeLinear", ["x", scale, zero], "real")
    w = graph.weights("w", random(2, 3, 1, 1))
    x = graph.op("Conv", [x, w], "conv")
    graph.op("QuantizeLinear", [x, scale, zero], "y")
    made = graph.model("y")
    (expected,) = run_onnx(made, graph.inputs, optimized=False).values()
    (actual,) = run_tflite(convert_with_notes(made).data, graph.inputs).values()
    assert actual.dtype == np.int8
    assert np.abs(actual.astype(int) - expected).max() <= 1


def test_pt2e_model_of_torchao() -> None:
    """What torchao's PT2E and torch's exporter make of a small CNN is int8 from end to end."""
    torch = pytest.importorskip("torch")
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 64, 10),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 16, 16)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(net, (x,)).module(), quantizer)
    prepared(x)
    made = torch.onnx.export(convert_pt2e(prepared), (x,), dynamo=True, verbose=False).model_proto
    feeds = {made.graph.input[0].name: x.numpy()}
    converted = convert_with_notes(made)
    kinds = op_names(converted.data)
    assert kinds.count("QUANTIZE") == kinds.count("DEQUANTIZE") == 1
    assert [note for note in converted.notes if "transpose" not in note] == []
    (expected,) = run_onnx(made, feeds, optimized=False).values()
    (actual,) = run_tflite(converted.data, feeds).values()
    assert np.abs(actual - expected).max() <= 0.02 * np.abs(expected).max()
