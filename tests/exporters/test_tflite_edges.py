"""Graphs at the edges of ops: scalars, stored constants as outputs, shared values, windows beyond their padding."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tflite_tools import model, node, run_onnx, run_tflite

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite import check_int8, convert, convert_with_notes

RANDOM = np.random.default_rng(0)
SCALAR = {"x": np.array(0.7, np.float32)}
X = {"x": RANDOM.standard_normal((3, 3, 3)).astype(np.float32)}
CODES = {"k": np.arange(-100, 100, dtype=np.int8), "s": np.float32(0.1), "z": np.int8(3)}
Q = {"s": np.float32(0.05), "z": np.int8(3)}


def agree(made: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    """Values, shapes and types are ONNX Runtime's, with and without XNNPACK."""
    expected, data = run_onnx(made, feeds, optimized=False), convert(made)
    for xnnpack in (True, False):
        actual = run_tflite(data, feeds, xnnpack)
        for name, array in expected.items():
            assert (actual[name].shape, actual[name].dtype) == (array.shape, array.dtype), name
            np.testing.assert_allclose(actual[name], array, rtol=1e-5, atol=1e-5)


PLAIN = [
    "Abs", "Ceil", "Celu", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
    "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh",
    "Softplus", "Softsign", "Sqrt", "Tan", "Tanh", "ThresholdedRelu", "Acos", "Asin", "Atan", "Asinh", "Atanh",
    "IsNaN", "IsInf", "Identity", "Sum", "Max", "Min", "Mean",
]  # fmt: skip
SCALARS: dict[str, dict[str, Any]] = {
    **{op: {} for op in PLAIN},
    "Elu": {"alpha": 0.5},
    "Celu": {"alpha": 0.5},
    "IsInf": {"detect_negative": 0},
}


@pytest.mark.parametrize("op", SCALARS)
def test_a_scalar_stays_a_scalar(op: str) -> None:
    names = ["x", "c"] if op in ("Sum", "Max", "Min", "Mean") else ["x"]
    agree(model([node(op, names, **SCALARS[op])], SCALAR, {"c": np.float32(0.3)}), SCALAR)


POOLS = [
    {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1, "count_include_pad": 1} | more
    for more in ({}, {"pads": [0, 0, 0, 0]}, {"pads": [1, 0, 1, 0]}, {"auto_pad": "SAME_LOWER"}, {"auto_pad": "VALID"})
]


@pytest.mark.parametrize("size", [(7, 5), (6, 6), (5, 8)], ids=str)
@pytest.mark.parametrize("attributes", POOLS, ids=str)
def test_averages_count_the_padding_that_is_named(attributes: dict[str, Any], size: tuple[int, int]) -> None:
    feeds = {"x": RANDOM.standard_normal((1, 2, *size)).astype(np.float32)}
    agree(model([node("AveragePool", ["x"], **attributes)], feeds, {}), feeds)


def test_ceil_mode_adds_no_window_to_those_of_same() -> None:
    made = node("AveragePool", ["x"], kernel_shape=[3, 4], strides=[1, 3], auto_pad="SAME_LOWER", ceil_mode=1)
    feeds = {"x": RANDOM.standard_normal((1, 2, 4, 3)).astype(np.float32)}
    agree(model([made], feeds, {}), feeds)


@pytest.mark.parametrize("perm", [perm for perm in itertools.permutations(range(3)) if perm != (0, 1, 2)], ids=str)
def test_the_product_of_a_transposed_matrix_with_itself(perm: tuple[int, ...]) -> None:
    agree(model([node("Transpose", ["x"], "t", perm=perm), node("MatMul", ["t", "t"])], X, {}), X)


@pytest.mark.parametrize("op", ["Exp", "HardSigmoid", "Neg", "Floor"])
def test_a_scalar_whose_source_is_read_later(op: str) -> None:
    feeds = {"x": np.array([0.4], np.float32)}
    agree(model([node("Relu", ["x"], "r"), node("Squeeze", ["r"], "s"), node(op, ["s"])], feeds, {}, ("y", "r")), feeds)


STORED = {
    "int8": (node("DequantizeLinear", ["k", "s", "z"], "c"), CODES),
    "int8 per channel": (
        node("DequantizeLinear", ["k", "s", "z"], "c", axis=0),
        {"k": CODES["k"].reshape(2, 100), "s": np.array([0.1, 0.2], np.float32), "z": np.zeros(2, np.int8)},
    ),
    "float16": (node("Cast", ["k"], "c", to=TensorProto.FLOAT), {"k": np.linspace(-2, 2, 200, dtype=np.float16)}),
}


@pytest.mark.parametrize("kind", STORED)
def test_a_stored_constant_is_an_output(kind: str) -> None:
    made, constants = STORED[kind]
    feeds = {"x": RANDOM.standard_normal(constants["k"].shape).astype(np.float32)}
    nodes = [made, node("Add", ["x", "c"]), node("Relu", ["x"], "r")]
    agree(model(nodes, feeds, constants, ("y", "c", "r")), feeds)


def test_a_constant_node_without_its_first_output() -> None:
    numbers = {
        "r": RANDOM.standard_normal((2, 2, 3)).astype(np.float32),
        "w": RANDOM.standard_normal((1, 4, 3)).astype(np.float32),
        "h": RANDOM.standard_normal((1, 4, 4)).astype(np.float32),
    }
    made = model(
        [
            node("RNN", ["r", "w", "h"], ["", "last"], hidden_size=4),
            node("ReduceSum", ["x"], "s", keepdims=0),
            node("Add", ["last", "s"]),
        ],
        X,
        numbers,
    )
    agree(made, X)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(("op", "opset"), [("Resize", 10), ("Upsample", 9)])
def test_old_resizes_read_coordinates_as_they_did(op: str, opset: int, mode: str) -> None:
    feeds = {"x": np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)}
    scales = {"s": np.array([1, 1, 1.5, 2], np.float32)}
    agree(model([node(op, ["x", "s"], mode=mode)], feeds, scales, opset=opset), feeds)


def choice(threshold: float, other: str = "Neg") -> onnx.ModelProto:
    """Relu of x or another op of it, by its maximum."""
    branches = [
        helper.make_graph(
            [node(op, ["x"], f"{op}_y")], op, [],
            [helper.make_tensor_value_info(f"{op}_y", TensorProto.FLOAT, [3, 3, 3 if op != "GlobalMaxPool" else 1])],
        )
        for op in ("Relu", other)
    ]  # fmt: skip
    nodes = [
        node("ReduceMax", ["x"], "m", keepdims=0),
        node("GreaterOrEqual", ["m", "t"], "c"),
        helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    return model(nodes, X, {"t": np.float32(threshold)}, opset=13)


@pytest.mark.parametrize("threshold", [-9, 9])
def test_a_computed_condition_chooses_between_branches_of_one_shape(threshold: float) -> None:
    agree(choice(threshold), X)


def test_branches_of_different_shapes_are_refused() -> None:
    with pytest.raises(EdgeKitError, match="branches make values of different shapes"):
        convert(choice(0, "GlobalMaxPool"))


DOUBLE = np.array([[0.5, -1.25], [2.0, 3.5]])
WIDE = {
    "input and output": [node("Mul", ["x", "c"])],
    "between casts": [node("Cast", ["x"], "f", to=TensorProto.FLOAT), node("Cast", ["f"], "d", to=TensorProto.DOUBLE),
                      node("Mul", ["d", "c"], "m"), node("Cast", ["m"], to=TensorProto.FLOAT)],
    "a constant output": [node("Identity", ["c"])],
    "CastLike": [node("Cast", ["x"], "f", to=TensorProto.FLOAT), node("CastLike", ["f", "c"])],
    "a reduction to a scalar": [node("ReduceSum", ["x"], keepdims=0)],
}  # fmt: skip


@pytest.mark.parametrize("case", WIDE)
def test_float64_is_kept_outside_and_float32_inside(case: str) -> None:
    made = model([*WIDE[case], node("Neg", ["x"], "z")], {"x": DOUBLE}, {"c": np.array(1.5)}, ("y", "z"))
    agree(made, {"x": DOUBLE})
    assert any("float64 values are computed in float32" in note for note in convert_with_notes(made).notes)


def test_a_float64_number_beyond_float32_is_refused() -> None:
    with pytest.raises(EdgeKitError, match="'c' of the ONNX model is too large for float32"):
        convert(model([node("Mul", ["x", "c"])], {"x": DOUBLE}, {"c": np.array(1e300)}))


def dequantized(dtype: Any) -> tuple[dict[str, np.ndarray], dict[str, Any], list[onnx.NodeProto]]:
    """A graph input of integers, its parameters, and the node that makes it real."""
    info = np.iinfo(dtype)
    feeds = {"x": RANDOM.integers(info.min, info.max + 1, (1, 4, 6, 6)).astype(dtype)}
    numbers = {"s": np.float32(0.05), "z": np.asarray(info.min + 120, dtype)}
    return feeds, numbers, [node("DequantizeLinear", ["x", "s", "z"], "d")]


FIRST: dict[str, dict[str, Any]] = {
    "Clip": {}, "Relu": {}, "Max": {}, "Abs": {}, "Flatten": {}, "MaxPool": {"kernel_shape": [2, 2]},
    "ReduceMean": {"keepdims": 0}, "Softmax": {},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.int8, np.uint8], ids=["int8", "uint8"])
@pytest.mark.parametrize("op", FIRST)
def test_the_first_op_of_an_integer_input_reads_real_numbers(op: str, dtype: Any) -> None:
    feeds, numbers, nodes = dequantized(dtype)
    names = ["d", "low", "high"] if op == "Clip" else ["d", "low"] if op == "Max" else ["d"]
    bounds = {"low": np.float32(-0.5), "high": np.float32(2)}
    agree(model([*nodes, node(op, names, **FIRST[op])], feeds, numbers | bounds), feeds)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8], ids=["int8", "uint8"])
def test_integers_go_in_and_come_out(dtype: Any) -> None:
    feeds, numbers, nodes = dequantized(dtype)
    nodes += [node("MaxPool", ["d"], "p", kernel_shape=[2, 2]), node("QuantizeLinear", ["p", "s", "z"], "y")]
    nodes += [node("Reshape", ["y", "shape"], "flat")]
    made = model(nodes, feeds, numbers | {"shape": np.array([4, -1])}, ("y", "flat"))
    agree(made, feeds)


def test_an_int8_file_is_checked_where_an_output_is_called_as_an_int8_tensor() -> None:
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], "q"), node("DequantizeLinear", ["q", "s", "z"], "d"),
        node("ReduceMax", ["d"], "m", keepdims=0), node("QuantizeLinear", ["m", "s", "z"], "n"),
        node("DequantizeLinear", ["n", "s", "z"]),
    ]  # fmt: skip
    made = model(nodes, X, Q, ("y", "d"))
    assert check_int8(made, convert_with_notes(made), X) == ()


READERS = {
    "Cast": [node("Cast", ["q"], to=TensorProto.FLOAT)],
    "Equal": [node("Equal", ["q", "z"])],
    "Max": [node("Max", ["q", "q"])],
    "DequantizeLinear with another scale": [node("DequantizeLinear", ["q", "t", "z"])],
}


@pytest.mark.parametrize("reader", READERS)
def test_integers_that_are_an_output_are_not_read_as_real_numbers(reader: str) -> None:
    nodes = [node("QuantizeLinear", ["x", "s", "z"], "q"), *READERS[reader]]
    with pytest.raises(EdgeKitError, match=r"integers|same parameters"):
        convert(model(nodes, X, Q | {"t": np.float32(0.1)}, ("q", "y")))
