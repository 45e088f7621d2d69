"""Whole graphs: layout, names, storage of weights, and errors a person can act on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tflite_tools import interpreter, model, node, op_names, run_onnx, run_tflite

import edgekit
from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite import convert, convert_with_notes
from edgekit.exporters.tflite.ir import Node
from edgekit.exporters.tflite.registry import lower, lowers


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check(made: onnx.ModelProto, feeds: dict[str, np.ndarray], tolerance: float = 1e-5) -> bytes:
    data = convert(made)
    expected = run_onnx(made, feeds)
    for xnnpack in (True, False):
        actual = run_tflite(data, feeds, xnnpack)
        assert set(actual) == set(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(actual[name], array, rtol=tolerance, atol=tolerance * np.abs(array).max())
    return data


def test_lenet_has_no_transpose() -> None:
    """The flattened channels-last feature map is read as it lies: the weights of the dense layer are reordered."""
    feeds = {"x": random(1, 1, 12, 12)}
    weights = {"w1": random(6, 1, 3, 3), "w2": random(8, 6, 3, 3), "w3": random(10, 8 * 36), "b3": random(10)}
    nodes = [
        node("Conv", ["x", "w1"], "a", pads=[1] * 4),
        node("Relu", ["a"], "b"),
        node("MaxPool", ["b"], "c", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["c", "w2"], "d", pads=[1] * 4),
        node("Flatten", ["d"], "e"),
        node("Gemm", ["e", "w3", "b3"], "y", transB=1),
    ]
    data = check(model(nodes, feeds, weights), feeds)
    assert op_names(data) == ["RESHAPE", "CONV_2D", "MAX_POOL_2D", "CONV_2D", "RESHAPE", "FULLY_CONNECTED"]


def test_nhwc_layout_takes_and_returns_channels_last_without_a_transpose() -> None:
    feeds, weights = {"x": random(1, 3, 5, 7)}, {"w": random(4, 3, 3, 3)}
    made = model([node("Conv", ["x", "w"], pads=[1] * 4)], feeds, weights)
    data = convert(made, layout="nhwc")
    assert op_names(data) == ["CONV_2D"]
    actual = run_tflite(data, {"x": feeds["x"].transpose(0, 2, 3, 1)})["y"]
    np.testing.assert_allclose(actual, run_onnx(made, feeds)["y"].transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_equal_axes_are_not_confused(size: int) -> None:
    """Channels = height = width = batch: a layout guessed from shapes would pass here with wrong numbers."""
    feeds = {"x": random(size, size, size, size)}
    weights = {"w": random(size, size, 3, 3), "scale": random(size, 1, 1), "row": random(size), "axes": np.array([1])}
    nodes = [
        node("Conv", ["x", "w"], "a", pads=[1] * 4),
        node("Mul", ["a", "scale"], "b"),
        node("Transpose", ["b"], "c", perm=[0, 2, 1, 3]),
        node("Add", ["c", "a"], "d"),
        node("Concat", ["d", "x"], "e", axis=2),
        node("Split", ["e"], ["f", "g"], axis=2, num_outputs=2),
        node("Sub", ["f", "row"], "h"),
        node("Mul", ["h", "g"], "i"),
        node("Softmax", ["i"], "j", axis=1),
        node("ReduceSum", ["j", "axes"], "y", keepdims=0),
        node("MatMul", ["i", "c"], "z"),
    ]
    check(model(nodes, feeds, weights, ("y", "z")), feeds)


def test_channel_shuffle_costs_one_transpose() -> None:
    feeds, weights = {"x": random(2, 6, 4, 4)}, {"w": random(6, 6, 1, 1)}
    weights |= {"split": np.array([2, 2, 3, 4, 4]), "join": np.array([2, 6, 4, 4])}
    nodes = [
        node("Conv", ["x", "w"], "a"),
        node("Reshape", ["a", "split"], "b"),
        node("Transpose", ["b"], "c", perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["c", "join"], "d"),
        node("Conv", ["d", "w"], "e"),
    ]
    data = check(model(nodes, feeds, weights, ("e",)), feeds)
    assert op_names(data).count("TRANSPOSE") == 3  # at the input, in the shuffle, at the output


def test_reshape_of_channels_last_value_to_tokens() -> None:
    feeds, weights = {"x": random(2, 3, 4, 4)}, {"w": random(5, 3, 2, 2), "shape": np.array([2, 5, 4])}
    nodes = [
        node("Conv", ["x", "w"], "a", strides=[2, 2]),
        node("Reshape", ["a", "shape"], "b"),
        node("Transpose", ["b"], "c", perm=[0, 2, 1]),
        node("Softmax", ["c"], "y"),
    ]
    data = check(model(nodes, feeds, weights), feeds)
    assert op_names(data).count("TRANSPOSE") == 1  # only at the input


def test_batch_normalization_and_bias_are_folded() -> None:
    feeds = {"x": random(1, 3, 6, 6)}
    weights = {"w": random(4, 3, 3, 3), "s": random(4), "o": random(4, seed=1), "m": random(4, seed=2)}
    weights["v"] = np.abs(random(4, seed=3)) + 0.5
    nodes = [
        node("Conv", ["x", "w"], "a"),
        node("BatchNormalization", ["a", "s", "o", "m", "v"], "b"),
        node("Relu", ["b"], "y"),
    ]
    data = check(model(nodes, feeds, weights), feeds)
    assert op_names(data) == ["TRANSPOSE", "CONV_2D", "TRANSPOSE"]


@pytest.mark.parametrize("order", range(3))
def test_erf_formula_becomes_gelu(order: int) -> None:
    feeds = {"x": random(4, 8)}
    constants = {"r": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    head = [node("Div", ["x", "r"], "a"), node("Erf", ["a"], "b"), node("Add", ["b", "one"], "c")]
    tails = [
        [node("Mul", ["x", "half"], "d"), node("Mul", ["d", "c"], "y")],
        [node("Mul", ["x", "c"], "d"), node("Mul", ["d", "half"], "y")],
        [node("Mul", ["c", "half"], "d"), node("Mul", ["x", "d"], "y")],
    ]
    data = check(model([*head, *tails[order]], feeds, constants), feeds)
    assert op_names(data) == ["GELU"]


def test_names_of_inputs_and_outputs_are_kept() -> None:
    feeds = {"b.image/0": random(1, 2), "a image": random(1, 2, seed=1)}
    nodes = [node("Add", [*feeds], "sum:0"), node("Sub", [*feeds], "difference")]
    data = check(model(nodes, feeds, {}, ("sum:0", "difference")), feeds)
    made = interpreter(data)
    assert [details["name"] for details in made.get_input_details()] == [*feeds]
    assert [details["name"] for details in made.get_output_details()] == ["sum:0", "difference"]


def test_output_that_is_an_input_a_constant_or_another_output() -> None:
    feeds, constants = {"x": random(2, 3)}, {"k": random(2, 2)}
    nodes = [
        node("Identity", ["x"], "copy"),
        node("Identity", ["k"], "constant"),
        node("Relu", ["x"], "r"),
        node("Identity", ["r"], "again"),
    ]
    check(model(nodes, feeds, constants, ("copy", "constant", "r", "again")), feeds)


def test_shape_arithmetic_is_folded() -> None:
    feeds, constants = {"x": random(2, 3, 4)}, {"zero": np.int64(0), "minus": np.array([-1]), "axes": np.array([0])}
    nodes = [
        node("Shape", ["x"], "s"),
        node("Gather", ["s", "zero"], "n"),
        node("Unsqueeze", ["n", "axes"], "n1"),
        node("Concat", ["n1", "minus"], "t", axis=0),
        node("Reshape", ["x", "t"], "y"),
    ]
    assert op_names(check(model(nodes, feeds, constants), feeds)) == ["RESHAPE"]


def test_if_with_a_constant_condition_is_its_branch() -> None:
    branch = helper.make_graph([node("Neg", ["x"], "n")], "then", [], [onnx.ValueInfoProto(name="n")])
    other = helper.make_graph([node("Abs", ["x"], "m")], "else", [], [onnx.ValueInfoProto(name="m")])
    feeds = {"x": random(2, 3)}
    nodes = [node("If", ["c"], "t", then_branch=branch, else_branch=other), node("Relu", ["t"], "y")]
    assert op_names(check(model(nodes, feeds, {"c": np.array(True)}), feeds)) == ["NEG", "RELU"]


def test_float16_weights_stay_float16_behind_dequantize() -> None:
    feeds, weights = {"x": random(1, 3, 6, 6)}, {"w": random(8, 3, 3, 3).astype(np.float16)}
    nodes = [node("Cast", ["w"], "wide", to=TensorProto.FLOAT), node("Conv", ["x", "wide"])]
    data = check(model(nodes, feeds, weights), feeds)
    made = interpreter(data, xnnpack=False)
    halves = [details for details in made.get_tensor_details() if details["dtype"] == np.float16]
    assert [tuple(details["shape"]) for details in halves] == [(8, 3, 3, 3)]
    assert "DEQUANTIZE" in op_names(data)


def test_weight_only_int8_stays_int8_in_the_file() -> None:
    feeds = {"x": random(1, 64)}
    weights = {"w": np.random.default_rng(0).integers(-127, 127, (32, 64)).astype(np.int8)}
    weights |= {"s": np.linspace(0.01, 0.03, 32).astype(np.float32), "z": np.zeros(32, np.int8)}
    nodes = [node("DequantizeLinear", ["w", "s", "z"], "wide", axis=0), node("Gemm", ["x", "wide"], transB=1)]
    data = check(model(nodes, feeds, weights), feeds)
    assert any(details["dtype"] == np.int8 for details in interpreter(data, xnnpack=False).get_tensor_details())


def test_buffers_are_aligned() -> None:
    """The schema asks for 16 bytes: accelerated kernels read constants in place."""
    from ai_edge_litert import schema_py_generated as schema

    data = convert(model([node("Gemm", ["x", "w", "b"])], {"x": random(1, 7)}, {"w": random(7, 3), "b": random(3)}))
    raw = np.frombuffer(data, np.uint8)
    root = schema.Model.GetRootAs(data, 0)
    for index in range(root.BuffersLength()):
        if root.Buffers(index).DataLength():
            array = root.Buffers(index).DataAsNumpy()
            assert (array.__array_interface__["data"][0] - raw.__array_interface__["data"][0]) % 16 == 0


def test_conversion_is_deterministic_and_leaves_the_model_alone() -> None:
    made = model([node("Conv", ["x", "w"])], {"x": random(1, 3, 6, 6)}, {"w": random(4, 3, 3, 3)})
    before = made.SerializeToString(deterministic=True)
    assert convert(made) == convert(made)
    assert made.SerializeToString(deterministic=True) == before


def dynamic() -> onnx.ModelProto:
    made = model([node("Relu", ["x"])], {"x": random(1, 3)}, {})
    made.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"
    return made


def old_model(nodes: list[onnx.NodeProto], shape: list[int | str], opset: int = 11) -> onnx.ModelProto:
    """As exporters of old wrote them: an open dimension is −1 or a name, and the output says nothing of its shape."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["?"] * len(shape))
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "s")
    graph = helper.make_graph(nodes, "graph", [x], [y], [scales])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def unchecked_opset() -> onnx.ModelProto:
    """ONNX Runtime does not run what is that old, so that nothing says whether the upgrade is right."""
    return old_model([node("Add", ["x", "s"], broadcast=1, axis=1)], [1, 4, 2, 2], 6)


def old_and_open() -> onnx.ModelProto:
    return old_model([node("Softmax", ["x"])], [3, -1])


def unknown_op() -> onnx.ModelProto:
    nodes = [helper.make_node("Det", ["x"], ["y"], name="/head/det")]
    return model(nodes, {"x": random(1, 2, 4, 4)}, {})


def unknown_domain() -> onnx.ModelProto:
    made = model([node("Relu", ["x"])], {"x": random(1, 3)}, {})
    made.graph.node[0].domain = "com.example"
    made.opset_import.append(helper.make_opsetid("com.example", 1))
    return made


def data_dependent() -> onnx.ModelProto:
    return model([node("NonZero", ["x"])], {"x": random(1, 3)}, {})


def int16() -> onnx.ModelProto:
    nodes = [node("QuantizeLinear", ["x", "s", "z"], "q"), node("DequantizeLinear", ["q", "s", "z"])]
    return model(nodes, {"x": random(1, 3)}, {"s": np.float32(0.1), "z": np.int16(0)}, opset=21)


def negative_scale() -> onnx.ModelProto:
    nodes = [node("QuantizeLinear", ["x", "s", "z"], "q"), node("DequantizeLinear", ["q", "s", "z"])]
    return model(nodes, {"x": random(1, 3)}, {"s": np.float32(-0.1), "z": np.int8(0)})


def wrong_channels() -> onnx.ModelProto:
    made = model([node("Conv", ["x", "w"])], {"x": random(1, 4, 6, 6)}, {"w": random(4, 4, 3, 3)})
    made.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    return made


def undefined() -> onnx.ModelProto:
    made = model([node("Relu", ["x"])], {"x": random(2)}, {})
    made.graph.node[0].input[0] = "missing"
    return made


def training() -> onnx.ModelProto:
    return model([node("Dropout", ["x", "r", "t"])], {"x": random(2)}, {"r": np.float32(0.5), "t": np.array(True)})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (dynamic, "dynamic dimension 'width'"),
        (unchecked_opset, "uses opset 6"),
        (old_and_open, "dynamic dimension"),
        (unknown_op, "no lowering for ONNX op 'Det' (node '/head/det')"),
        (unknown_domain, "no lowering for ONNX op 'com.example.Relu'"),
        (data_dependent, "dynamic dimension"),
        (int16, "int16"),
        (training, "training mode"),
        (undefined, "not valid"),
        (negative_scale, "not a positive number"),
        (wrong_channels, "for 3 input channels"),
    ],
)
def test_what_cannot_be_done_is_an_error_with_help(make: object, words: str) -> None:
    with pytest.raises(EdgeKitError) as caught:
        convert(make())
    assert words in caught.value.what
    assert caught.value.help or "training" not in words


@pytest.mark.parametrize("batch", [-1, "batch", 2])
def test_old_opset_is_upgraded_and_open_dimensions_take_the_shapes_given(batch: int | str) -> None:
    """Softmax over all axes from the second on, as it was before opset 13."""
    made = old_model([node("Softmax", ["x"])], [batch, 3, "width"])
    feeds = {"x": random(2, 3, 5)}
    before = made.SerializeToString(deterministic=True)
    actual = run_tflite(convert(made, shapes={"x": (2, 3, 5)}), feeds)["y"]
    np.testing.assert_allclose(actual, run_onnx(made, feeds)["y"], rtol=1e-5, atol=1e-6)
    assert made.SerializeToString(deterministic=True) == before


def test_foreign_onnx_file_is_exported_as_it_is(tmp_path: Path) -> None:
    """Old operators, an open batch, an open size that --input gives, and no precision named: checked and said so."""
    made = old_model([node("Softmax", ["x"])], [-1, 3, "width"])
    onnx.save(made, tmp_path / "theirs.onnx")
    bundle = edgekit.export(
        tmp_path / "theirs.onnx", target="android", formats=["tflite", "onnx"], inputs=["2x3x5"], out=tmp_path
    )
    assert [entry["format"] for entry in bundle.manifest["artifacts"]] == ["tflite", "onnx"]
    assert all(
        entry["parity"]["sqnr_db"] is None or entry["parity"]["sqnr_db"] > 100 for entry in bundle.manifest["artifacts"]
    )
    assert any("not quantized" in note for note in bundle.manifest["notes"])
    (detail,) = interpreter((bundle.path / "model.tflite").read_bytes()).get_input_details()
    assert detail["shape"].tolist() == [2, 3, 5]


def test_upgrade_that_changes_results_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = old_model([node("Softmax", ["x"])], [2, 3, 5])

    def only_the_number(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        changed.opset_import[0].version = opset
        return changed

    monkeypatch.setattr("onnx.version_converter.convert_version", only_the_number)
    with pytest.raises(EdgeKitError, match="upgrading it changed its results"):
        convert(made)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [({"y": (1, 3)}, "no input 'y'"), ({"x": (2, 3)}, "not \\[2, 3\\]"), ({"x": (3,)}, "not \\[3\\]")],
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(EdgeKitError, match=words):
        convert(dynamic(), shapes=shapes)


def test_attribute_that_a_lowering_does_not_name_is_an_error() -> None:
    with pytest.raises(EdgeKitError, match="attribute 'slope' of ONNX op 'Relu'"):
        lower(None, Node("Relu", "r", ["x"], ["y"], {"slope": 0.5}))


def test_two_lowerings_of_one_op_are_refused() -> None:
    with pytest.raises(ValueError, match="two lowerings"):
        lowers("Conv")(lambda b, node: None)


def test_notes_name_the_transposes() -> None:
    made = model([node("Conv", ["x", "w"])], {"x": random(1, 3, 6, 6)}, {"w": random(4, 3, 3, 3)})
    assert len([note for note in convert_with_notes(made).notes if note.startswith("transpose of")]) == 2


def external() -> onnx.ModelProto:
    made = model([node("MatMul", ["x", "w"])], {"x": random(1, 4)}, {"w": random(4, 2)})
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    return made


def bomb() -> onnx.ModelProto:
    nodes = [
        node("ConstantOfShape", ["s"], "zeros"),
        node("ReduceSum", ["zeros"], "total"),
        node("Add", ["x", "total"]),
    ]
    return model(nodes, {"x": random(1, 4)}, {"s": np.array([2**20, 2**16])})


@pytest.mark.parametrize(("make", "words"), [(external, "another file"), (bomb, "68719476736 elements")])
def test_hostile_files_are_refused(make: object, words: str) -> None:
    with pytest.raises(EdgeKitError, match=words):
        convert(make())


def test_initializers_may_be_listed_as_inputs() -> None:
    feeds, weights = {"x": random(1, 4)}, {"w": random(4, 2)}
    made = model([node("MatMul", ["x", "w"])], feeds, weights)
    made.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 2]))
    check(made, feeds)
    assert numpy_helper.to_array(made.graph.initializer[0]).shape == (4, 2)
