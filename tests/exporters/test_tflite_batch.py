"""An open batch: files whose inputs can be resized, or a refusal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from test_tflite_int8 import small_cnn
from tflite_tools import interpreter, model, node, op_names, run_onnx

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite import convert, convert_with_notes
from edgekit.exporters.tflite.read import batch

Arrays = dict[str, np.ndarray]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def opened(made: onnx.ModelProto, axis: int = 0, name: str | None = "N") -> onnx.ModelProto:
    """The model with one size of all its inputs open; outputs and values in between say nothing of their sizes."""
    for value in made.graph.input:
        dim = value.type.tensor_type.shape.dim[axis]
        dim.Clear()
        if name is None:
            dim.dim_value = -1
        else:
            dim.dim_param = name
    del made.graph.value_info[:]
    for value in made.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    return made


def cnn() -> tuple[onnx.ModelProto, Arrays]:
    feeds = {"x": random(2, 3, 12, 12)}
    constants = {"w": random(8, 3, 3, 3), "s": np.array([0, -1]), "fc": random(8 * 25, 10), "b": random(10)}
    nodes = [
        node("Conv", ["x", "w"], "a", pads=[0] * 4),
        node("Relu", ["a"], "c"),
        node("MaxPool", ["c"], "d", kernel_shape=[2, 2], strides=[2, 2]),
        node("Reshape", ["d", "s"], "e"),
        node("Gemm", ["e", "fc", "b"], "f"),
        node("Softmax", ["f"], "y"),
    ]
    return model(nodes, feeds, constants), feeds


def attention() -> tuple[onnx.ModelProto, Arrays]:
    """Four heads over tokens, with shapes that the graph computes from its input, and a mask."""
    feeds = {"x": random(2, 6, 16), "mask": np.ones((2, 1, 1, 6), np.float32)}
    constants = {"w": random(16, 48), "three": np.array([3, 4, 4]), "zero": np.array([0]), "axes": np.array([0])}
    constants |= {"tokens": np.array([6]), "width": np.array([16])}
    nodes = [
        node("MatMul", ["x", "w"], "qkv"),
        node("Shape", ["x"], "shape"),
        node("Gather", ["shape", "zero"], "n"),
        node("Concat", ["n", "tokens", "three"], "split", axis=0),
        node("Reshape", ["qkv", "split"], "heads"),
        node("Transpose", ["heads"], "turned", perm=[2, 0, 3, 1, 4]),
        node("Split", ["turned"], ["q1", "k1", "v1"], axis=0, num_outputs=3),
        *(node("Squeeze", [f"{name}1", "axes"], name) for name in "qkv"),
        node("Transpose", ["k"], "kt", perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "kt"], "scores"),
        node("Mul", ["scores", "mask"], "masked"),
        node("Softmax", ["masked"], "p"),
        node("MatMul", ["p", "v"], "o"),
        node("Transpose", ["o"], "back", perm=[0, 2, 1, 3]),
        node("Concat", ["n", "tokens", "width"], "join", axis=0),
        node("Reshape", ["back", "join"], "y"),
    ]
    return model(nodes, feeds, constants), feeds


def recurrent(op: str, steps: int) -> tuple[onnx.ModelProto, Arrays]:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    feeds = {"x": random(2, steps, 5)}
    constants = {"w": random(1, gates * 6, 5), "r": random(1, gates * 6, 6), "b": random(1, 2 * gates * 6)}
    nodes = [
        node("Transpose", ["x"], "t", perm=[1, 0, 2]),
        node(op, ["t", "w", "r", "b"], ["", "h"], hidden_size=6),
        node("Sigmoid", ["h"], "y"),
    ]
    return model(nodes, feeds, constants), feeds


KEPT: dict[str, Callable[[], tuple[onnx.ModelProto, Arrays]]] = {
    "cnn": cnn,
    "attention": attention,
    "lstm": lambda: recurrent("LSTM", 4),
    "long lstm": lambda: recurrent("LSTM", 20),
    "gru": lambda: recurrent("GRU", 4),
    "rnn": lambda: recurrent("RNN", 4),
}


def resized(data: bytes, feeds: Arrays) -> Arrays:
    """Resizes strictly: only sizes that the file declares as open change."""
    made = interpreter(data)
    for detail in made.get_input_details():
        made.resize_tensor_input(detail["index"], feeds[detail["name"]].shape, strict=True)
    made.allocate_tensors()
    for detail in made.get_input_details():
        made.set_tensor(detail["index"], feeds[detail["name"]])
    made.invoke()
    return {detail["name"]: made.get_tensor(detail["index"]) for detail in made.get_output_details()}


@pytest.mark.parametrize("name", ["N", None, "unnamed"])
@pytest.mark.parametrize("case", KEPT)
def test_inputs_can_be_resized_along_an_open_batch(case: str, name: str | None) -> None:
    made, feeds = KEPT[case]()
    made = opened(made, name="" if name == "unnamed" else name)
    data = convert(made)
    (output,) = interpreter(data).get_output_details()
    assert not any(f"[{size}," in note for note in convert_with_notes(made).notes for size in batch.SIZES)
    assert output["shape_signature"].tolist().count(-1) == 1 and 1 in output["shape"]
    for size in (1, 2, 5):
        given = {key: np.resize(array, (size, *array.shape[1:])) for key, array in feeds.items()}
        expected = run_onnx(made, given)["y"]
        np.testing.assert_allclose(resized(data, given)["y"], expected, rtol=1e-4, atol=1e-5)


def test_channels_last_file_with_an_open_batch() -> None:
    made, feeds = cnn()
    data = convert(opened(made), layout="nhwc")
    (detail,) = interpreter(data).get_input_details()
    assert detail["shape_signature"].tolist() == [-1, 12, 12, 3] and op_names(data)[0] == "CONV_2D"
    actual = resized(data, {"x": np.ascontiguousarray(feeds["x"].transpose(0, 2, 3, 1))})["y"]
    np.testing.assert_allclose(actual, run_onnx(made, feeds)["y"], rtol=1e-4, atol=1e-5)


def test_int8_file_with_an_open_batch_computes_what_a_fixed_one_does() -> None:
    _, made = small_cnn()
    feeds = {"image": random(4, 3, 16, 16)}
    made = opened(made)
    expected = resized(convert(made, shapes={"image": (4, 3, 16, 16)}), feeds)
    for name, array in resized(convert(made), feeds).items():
        np.testing.assert_array_equal(array, expected[name])


def expanded() -> onnx.ModelProto:
    """A class token for each sample."""
    constants = {"token": random(1, 1, 8), "zero": np.array([0]), "rest": np.array([1, 8])}
    nodes = [
        node("Shape", ["x"], "shape"),
        node("Gather", ["shape", "zero"], "n"),
        node("Concat", ["n", "rest"], "size", axis=0),
        node("Expand", ["token", "size"], "tokens"),
        node("Concat", ["tokens", "x"], "y", axis=1),
    ]
    return opened(model(nodes, {"x": random(2, 3, 8)}, constants))


def last_sample() -> onnx.ModelProto:
    constants = {"start": np.array([-1]), "end": np.array([2**31 - 1]), "axis": np.array([0])}
    return opened(model([node("Slice", ["x", "start", "end", "axis"])], {"x": random(2, 3)}, constants))


def baked() -> onnx.ModelProto:
    return opened(model([node("Reshape", ["x", "s"])], {"x": random(1, 6)}, {"s": np.array([1, 2, 3])}))


def merged() -> onnx.ModelProto:
    """No row of the result belongs to a sample, and not every size can be cut into four."""
    return opened(model([node("Reshape", ["x", "s"])], {"x": random(2, 6)}, {"s": np.array([4, -1])}))


def unknown() -> onnx.ModelProto:
    return opened(model([node("Det", ["x"])], {"x": random(2, 4, 4)}, {}))


def two_names() -> onnx.ModelProto:
    made = opened(model([node("Add", ["x", "z"])], {"x": random(2, 6), "z": random(2, 6)}, {}))
    made.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "M"
    return made


def other_axis() -> onnx.ModelProto:
    return opened(model([node("Relu", ["x"])], {"x": random(2, 6)}, {}), axis=1)


REFUSED = [
    (expanded, "depends on it"),
    (last_sample, "depends on it"),
    (baked, "leaves its batch size open.*reshapes"),
    (merged, "incompatible shapes"),
    (unknown, "no lowering for ONNX op 'Det'"),
    (two_names, "dynamic dimension 'N'"),
    (other_axis, "dynamic dimension 'N'"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_what_is_not_computed_for_each_sample_alike_is_refused(make: Callable[[], onnx.ModelProto], words: str) -> None:
    with pytest.raises(EdgeKitError, match=words) as caught:
        convert(make())
    assert caught.value.what


def test_file_that_is_wrong_for_another_size_is_not_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of defense: a conversion that got the batch wrong is found by running it."""
    made, _ = cnn()
    monkeypatch.setattr(batch, "run", lambda fixed, feeds: [np.zeros((len(feeds["x"]), 10), np.float32)])
    with pytest.raises(EdgeKitError, match="computes something else with 1"):
        convert(opened(made))
