"""float16 weights of ONNX files, in every place that a file can hold them; outputs are ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from edgekit.errors import EdgeKitError
from edgekit.exporters.onnx.halves import halve, has_halves

SIZE = 1000
WEIGHT = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
TENSOR = numpy_helper.from_array(WEIGHT, "w")
FLOAT = onnx.TensorProto.FLOAT


def model(
    nodes: list,
    initializers: Sequence[onnx.TensorProto] = (),
    inputs: tuple[str, ...] = (),
    functions: Sequence[onnx.FunctionProto] = (),
    **more: object,
) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, FLOAT, (SIZE,)) for name in "xy")
    extra = [helper.make_tensor_value_info(name, FLOAT, (SIZE,)) for name in inputs]
    graph = helper.make_graph(nodes, "g", [x, *extra], [y], initializers, **more)
    domains = [helper.make_opsetid("", 18), *(helper.make_opsetid("own", 1) for _ in functions)]
    return helper.make_model(graph, opset_imports=domains, ir_version=8, functions=functions)


def add(weight: str = "w") -> onnx.NodeProto:
    return helper.make_node("Add", ["x", weight], ["y"])


def held(**attributes: object) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["w"], **attributes)


def sparse(coordinates: bool = False) -> onnx.SparseTensorProto:
    places = np.arange(0, SIZE, 10)
    values = numpy_helper.from_array(WEIGHT[places], "w")
    indices = numpy_helper.from_array(places[:, None] if coordinates else places, "places")
    return helper.make_sparse_tensor(values, indices, [SIZE])


def branches() -> onnx.ModelProto:
    y = helper.make_tensor_value_info("y", FLOAT, (SIZE,))
    inner = helper.make_tensor_value_info("z", FLOAT, (SIZE,))
    then = helper.make_graph([held(value=TENSOR), helper.make_node("Add", ["x", "w"], ["z"])], "then", [], [inner])
    other = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["z"])], "else", [], [inner], [TENSOR])
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], [y.name], then_branch=then, else_branch=other),
    ]
    return model(nodes, [numpy_helper.from_array(np.float32(0), "zero")])


def function() -> onnx.ModelProto:
    body = [held(value=TENSOR), helper.make_node("Add", ["a", "w"], ["b"])]
    made = helper.make_function("own", "AddWeight", ["a"], ["b"], body, [helper.make_opsetid("", 18)])
    return model([helper.make_node("AddWeight", ["x"], ["y"], domain="own")], functions=[made])


# where the weight lies → a model, and the share of its bytes that is left
PLACES: dict[str, tuple[Callable[[], onnx.ModelProto], float]] = {
    "initializer": (lambda: model([add()], [TENSOR]), 0.6),
    "initializer_among_the_inputs": (lambda: model([add()], [TENSOR], inputs=("w",)), 0.6),
    "constant": (lambda: model([held(value=TENSOR), add()]), 0.6),
    "list": (lambda: model([held(value_floats=WEIGHT.tolist()), add()]), 0.6),
    "branches": (branches, 0.6),
    "function": (function, 0.6),
    "sparse_constant": (lambda: model([held(sparse_value=sparse()), add()]), 2.0),
    "sparse_coordinates": (lambda: model([held(sparse_value=sparse(coordinates=True)), add()]), 2.0),
    "sparse_initializer": (lambda: model([add()], sparse_initializer=[sparse()]), 2.0),
}


def run(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x"]
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("name", PLACES)
def test_weights_are_halved_wherever_they_lie(name: str) -> None:
    make, share = PLACES[name]
    proto = make()
    before = proto.SerializeToString()
    half = halve(proto)
    onnx.checker.check_model(half, full_check=True)
    assert proto.SerializeToString() == before
    assert has_halves(half) and not has_halves(proto)
    assert half.ByteSize() < share * proto.ByteSize()
    for x in (np.ones(SIZE, np.float32), -np.ones(SIZE, np.float32)):
        np.testing.assert_allclose(run(half, x), run(proto, x), rtol=0, atol=2e-3)


@pytest.mark.parametrize("stored", ["initializer", "constant"])
def test_weights_beyond_float16_are_refused(stored: str) -> None:
    large = numpy_helper.from_array(np.where(np.arange(SIZE) == 7, np.float32(1e6), WEIGHT), "w")
    proto = model([add()], [large]) if stored == "initializer" else model([held(value=large), add()])
    with pytest.raises(EdgeKitError, match="does not fit float16"):
        halve(proto)


def test_few_elements_stay_as_they_are() -> None:
    few = numpy_helper.from_array(WEIGHT[:1], "w")
    for proto in (model([add()], [few]), model([held(value=few), add()])):
        half = halve(proto)
        assert not has_halves(half)
        np.testing.assert_array_equal(run(half, WEIGHT), run(proto, WEIGHT))
