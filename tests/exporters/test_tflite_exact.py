"""Graphs in which a lowering could silently compute something else: each is compared with ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tflite_tools import model, node, run_onnx, run_tflite

from edgekit.artifacts.summary import inspect_artifact
from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite import convert_with_notes

F32, I8, U8, I64 = np.float32, np.int8, np.uint8, np.int64
X = np.linspace(-12.8, 12.7, 2 * 12, dtype=F32).reshape(2, 12)
IMAGE = np.linspace(-12.8, 12.7, 96, dtype=F32).reshape(1, 4, 4, 6)
SCALES = {"s": F32(0.1), "z": I8(0)}


def qdq(source: str = "x", to: str = "d") -> list[onnx.NodeProto]:
    """Held as int8 from here on: −12.8 to 12.7 in steps of 0.1."""
    code = f"{to}_code"
    return [node("QuantizeLinear", [source, "s", "z"], code), node("DequantizeLinear", [code, "s", "z"], to)]


def after_qdq(*nodes: onnx.NodeProto, x: np.ndarray = X, **constants: Any) -> onnx.ModelProto:
    """What follows reads an int8 value, and is not quantized itself."""
    return model([*qdq(), *nodes], {"x": x}, {**SCALES, **constants})


def split_with_two_scales() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w"], "c"),
        helper.make_node("Split", ["c"], ["a", "b"], axis=1, num_outputs=2),
        *(
            each
            for name, scale in (("a", "fine"), ("b", "s"))
            for each in (
                node("QuantizeLinear", [name, scale, "z"], f"{name}_code"),
                node("DequantizeLinear", [f"{name}_code", scale, "z"], f"{name}_held"),
                node("Conv", [f"{name}_held", "v"], f"{name}_y"),
            )
        ),
        node("Concat", ["a_y", "b_y"], axis=1),
    ]
    w = np.zeros((2, 4, 1, 1), F32)
    w[0, 0], w[1, 1] = 0.05, 1.0
    return model(nodes, {"x": IMAGE}, {**SCALES, "fine": F32(0.01), "w": w, "v": np.ones((1, 1, 1, 1), F32)})


def branch(value: float, output: str) -> onnx.GraphProto:
    """An unnamed Add of a constant that is called `k` in every branch."""
    k = numpy_helper.from_array(np.array([value], F32), "k")
    made = helper.make_tensor_value_info(output, TensorProto.FLOAT, X.shape)
    return helper.make_graph([node("Add", ["x", "k"], output)], "branch", [], [made], [k])


def branches_that_share_names() -> onnx.ModelProto:
    def either(value: float, output: str) -> onnx.NodeProto:
        branches = {"then_branch": branch(value, "o"), "else_branch": branch(0, "o")}
        return helper.make_node("If", ["yes"], [output], **branches)

    nodes = [either(1, "p"), either(10, "q"), node("Mul", ["p", "q"])]
    return model(nodes, {"x": X}, {"yes": np.array(True)})


def nodes_that_share_a_name() -> onnx.ModelProto:
    """The name that the second one gets is that of the first; both are expanded into the function that defines them."""
    nodes = [node("Celu", ["x"], "a", name="Celu_1", alpha=2.0), node("Celu", ["a"], "y", alpha=0.5)]
    return model(nodes, {"x": X}, {})


def asymmetric_weights(**attributes: Any) -> onnx.ModelProto:
    """A transposed convolution into which zeros are written: between groups, or for dilation."""
    w = np.random.default_rng(0).integers(0, 256, (4, 2, 3, 3), U8)
    nodes = [node("DequantizeLinear", ["w_code", "s", "w_z"], "w"), node("ConvTranspose", ["x", "w"], **attributes)]
    return model(nodes, {"x": IMAGE}, {"s": F32(0.1), "w_code": w, "w_z": U8(100)})


def batch_norm(gamma: list[float], offset: list[float]) -> onnx.ModelProto:
    nodes = [*qdq(), node("BatchNormalization", ["d", "gamma", "beta", "mean", "var"], "n"), *qdq("n", "y")]
    zeros, ones = np.zeros(4, F32), np.ones(4, F32)
    numbers = {"gamma": np.array(gamma, F32), "beta": np.array(offset, F32), "mean": zeros, "var": ones}
    return model(nodes, {"x": IMAGE}, {**SCALES, **numbers})


def signed_without_zero_point() -> onnx.ModelProto:
    nodes = [
        node("QuantizeLinear", ["x", "s"], "code", output_dtype=TensorProto.INT8),
        node("DequantizeLinear", ["code", "s"], "y"),
    ]
    return model(nodes, {"x": X}, {"s": F32(0.1)}, opset=21)


def slices_that_share_starts() -> onnx.ModelProto:
    """As tools that store equal constants once leave them, under the name that merging would give another."""
    table = {f"{part}_{axis}": np.array([value], I64) for axis in (1, 2, 3) for part, value in (("e", 3), ("a", axis))}
    shared = {"slice_1_starts": np.array([1], I64)}
    cuts = [(0, "x", "u", 1), (1, "u", "v", 2), (2, "v", "y", 3)]
    nodes = [
        node("Slice", [source, "slice_1_starts", f"e_{axis}", f"a_{axis}"], to, name=f"slice_{i}")
        for i, source, to, axis in cuts
    ]
    return model(nodes, {"x": IMAGE}, {**table, **shared})


def a_quotient_like_gelu() -> onnx.ModelProto:
    nodes = [
        node("Abs", ["x"], "size"),
        node("Mul", ["size", "root"], "scaled"),
        node("Erf", ["scaled"], "erf"),
        node("Add", ["erf", "one"], "more"),
        node("Div", ["size", "more"], "quotient"),
        node("Mul", ["quotient", "half"]),
    ]
    return model(nodes, {"x": X}, {"root": F32(math.sqrt(0.5)), "one": F32(1), "half": F32(0.5)})


def padded_integers(value: int) -> onnx.ModelProto:
    pads = {"p": np.array([0, 1, 0, 1], I64), "v": np.int32(value)}
    return model([node("Pad", ["x", "p", "v"])], {"x": np.arange(6, dtype=np.int32).reshape(2, 3)}, pads)


SAME: dict[str, Callable[[], onnx.ModelProto]] = {
    "clip before a logarithm": lambda: after_qdq(
        node("Clip", ["d", "least"], "c"), node("Log", ["c"]), least=F32(1e-6)
    ),
    "clip on a step": lambda: after_qdq(node("Clip", ["d", "low", "high"]), low=F32(-1), high=F32(6)),
    "clip outside the range": lambda: after_qdq(node("Clip", ["d", "low", "high"]), low=F32(-99), high=F32(99)),
    "clip above the range": lambda: after_qdq(node("Clip", ["d", "low"]), low=F32(99)),
    "pad with a mask's value": lambda: after_qdq(
        node("Pad", ["d", "p", "v"]), p=np.array([0, 1, 0, 0], I64), v=F32(-1e9)
    ),
    "join a constant": lambda: after_qdq(node("Concat", ["k", "d"], axis=1), k=np.full((2, 1), 50.03, F32)),
    "the larger of a small constant": lambda: after_qdq(node("Max", ["d", "k"]), k=F32(0.04)),
    "mask": lambda: after_qdq(
        node("Where", ["m", "d", "k"], "w"), node("Softmax", ["w"]), m=np.arange(12) % 3 > 0, k=F32(-1e9)
    ),
    "split with two scales": split_with_two_scales,
    "branches that share names": branches_that_share_names,
    "nodes that share a name": nodes_that_share_a_name,
    "asymmetric weights in groups": lambda: asymmetric_weights(group=2),
    "asymmetric weights, dilated": lambda: asymmetric_weights(dilations=[2, 2]),
    "batch norm with a gamma near 0": lambda: batch_norm([1e-8, 1.0, -0.5, 0.0], [0.5, -0.2, 3.0, -1.5]),
    "batch norm with a denormal gamma": lambda: batch_norm([1e-42, 1.0, 1.0, 1.0], [0.0, 0.0, 0.1, -9.0]),
    "signed codes by output_dtype": signed_without_zero_point,
    "slices that share starts": slices_that_share_starts,
    "a quotient like gelu": a_quotient_like_gelu,
    "largest int32 around": lambda: padded_integers(2**31 - 1),
    "an odd int32 around": lambda: padded_integers(2**24 + 1),
}


@pytest.mark.parametrize("xnnpack", [True, False])
@pytest.mark.parametrize("case", SAME)
def test_computes_the_same(case: str, xnnpack: bool) -> None:
    made = SAME[case]()
    rng = np.random.default_rng(0)
    feeds = {}
    for value in made.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = (rng.uniform(-13, 13, shape) if dtype == F32 else np.arange(math.prod(shape))).astype(dtype)
        feeds[value.name] = feeds[value.name].reshape(shape)
    expected, got = run_onnx(made, feeds, False)["y"], run_tflite(convert_with_notes(made).data, feeds, xnnpack)["y"]
    step = 0.1 if "batch norm" in case or "split" in case else 1e-5 * max(float(np.abs(expected).max()), 1.0)
    if expected.dtype == np.int32:
        np.testing.assert_array_equal(got, expected)
    else:
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1.001 * step)


def codes_read_as_numbers() -> onnx.ModelProto:
    nodes = [node("QuantizeLinear", ["x", "s", "z"], "code"), node("Cast", ["code"], to=TensorProto.FLOAT)]
    return model(nodes, {"x": X}, SCALES)


def input_read_twice() -> onnx.ModelProto:
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], "d"),
        node("Cast", ["x"], "c", to=TensorProto.FLOAT),
        node("Add", ["c", "d"]),
    ]
    return model(nodes, {"x": X.astype(I8)}, SCALES)


def input_of_many_scales() -> onnx.ModelProto:
    numbers = {"s": np.full(4, 0.1, F32), "z": np.zeros(4, I8)}
    return model([node("DequantizeLinear", ["x", "s", "z"], axis=1)], {"x": IMAGE.astype(I8)}, numbers)


def op_of_another_domain() -> onnx.ModelProto:
    made = model([node("Relu", ["x"], "g"), node("Abs", ["g"])], {"x": X}, {})
    made.graph.node[0].op_type, made.graph.node[0].domain = "Inverse", "com.microsoft"
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return made


def products_of_rank_6() -> onnx.ModelProto:
    x, w = np.zeros((1, 2, 3, 2, 4, 5), F32), np.zeros((5, 6), F32)
    return model([node("MatMul", ["x", "w"])], {"x": x, "w": w}, {})


REFUSED = {
    "codes read as numbers": (codes_read_as_numbers, "computes on the integers of a quantized tensor"),
    "an input read as integers too": (input_read_twice, "also read as integers"),
    "an input with a scale per channel": (input_of_many_scales, "has a scale per channel"),
    "an op of another domain": (op_of_another_domain, "no lowering for ONNX op 'com.microsoft.Inverse'"),
    "products of rank 6": (products_of_rank_6, "BATCH_MATMUL"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_something_else_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(EdgeKitError, match=message):
        convert_with_notes(make())


def test_a_constant_output_stored_as_halves_is_read(tmp_path: Any) -> None:
    anchors = np.arange(128, dtype=np.float16)
    made = model(
        [node("Cast", ["k"], "a", to=TensorProto.FLOAT), node("Relu", ["x"])], {"x": X}, {"k": anchors}, ("a", "y")
    )
    path = tmp_path / "anchors.tflite"
    path.write_bytes(convert_with_notes(made).data)
    assert {spec.name for spec in inspect_artifact(path).outputs} == {"a", "y"}
