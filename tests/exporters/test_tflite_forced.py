"""The check of int8 files, op by op on the file's own inputs."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from test_tflite_int8 import INT8, UINT8, Qdq, random, small_cnn
from tflite_tools import node, op_names, run_onnx, run_tflite

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite import Converted, check_int8, convert_with_notes
from edgekit.exporters.tflite.int8_check import NOTED, REFUSED, judged, steps


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [INT8, UINT8], ids=str)
def test_every_int8_tensor_is_checked_and_within_a_step(dtype: np.dtype, layout: str) -> None:
    graph, made = small_cnn(dtype)
    converted = convert_with_notes(made, layout=layout)
    found = steps(made, converted.data, converted.places, graph.inputs, layout)
    assert len(found) == sum(each.op_type == "QuantizeLinear" for each in made.graph.node) == 8
    assert max(step.most for step in found) <= 1
    assert check_int8(made, converted, graph.inputs, layout=layout) == ()


def spoiled(converted: Converted, tensor: str, add: int) -> Converted:
    """The file with another bias for one layer."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(converted.data, 0))
    subgraph = model.subgraphs[0]
    (op,) = [op for op in subgraph.operators if subgraph.tensors[op.outputs[0]].name == tensor.encode()]
    bias = model.buffers[subgraph.tensors[op.inputs[2]].buffer]
    bias.data = (bias.data.view(np.int32) + add).view(np.uint8)
    import flatbuffers

    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return dataclasses.replace(converted, pieces=(bytes(builder.Output()),))


def test_op_that_is_wrong_is_named_and_those_after_it_are_not_blamed() -> None:
    graph, made = small_cnn()
    converted = convert_with_notes(made)
    place = converted.places["inner_q"]
    bias_step = float(graph.params["stem_relu"][0]) * float(graph.constants["inner_w_s"].mean())
    per_step = place.q.scale[0] / bias_step
    for steps_off, error in ((6, False), (60, True)):
        bad = spoiled(converted, place.tensor, int(steps_off * per_step))
        found = steps(made, bad.data, bad.places, graph.inputs, "nchw")
        assert [step.place.source for step in found if step.most > NOTED] == [place.source]
        if error:
            with pytest.raises(EdgeKitError, match="CONV_2D for ONNX node 'Conv_"):
                judged(found)
        else:
            (note,) = judged(found)
            assert note.startswith("CONV_2D for ONNX node 'Conv_")


def test_float_file_has_nothing_to_check() -> None:
    graph = Qdq({"x": random(1, 3, 4, 4)})
    made = graph.model(graph.op("Relu", ["x"], "y"))
    converted = convert_with_notes(made)
    assert converted.places == {} and check_int8(made, converted, graph.inputs) == ()


def test_limits_that_move_before_the_rounding_are_not_taken_for_errors() -> None:
    """Conv, rounded, then limited: the file limits in the convolution, and holds no tensor from before."""
    graph = Qdq({"x": random(1, 3, 8, 8)})
    bounds = [graph.constant("lo", np.float32(0)), graph.constant("hi", np.float32(6))]
    x = graph.op("Conv", [graph.quantize("x"), graph.weights("w", random(4, 3, 3, 3))], "conv")
    x = graph.quantize(graph.op("Clip", [graph.quantize(x), *bounds], "clip"))
    made = graph.model(x)
    converted = convert_with_notes(made)
    assert set(converted.places) == {"x_q", "clip_q"} and check_int8(made, converted, graph.inputs) == ()


MOVES = [
    node("Transpose", ["q"], "m", perm=[0, 2, 3, 1]),
    node("Reshape", ["q", "flat"], "m"),
    node("Concat", ["q", "q"], "m", axis=1),
    node("MaxPool", ["q"], "m", kernel_shape=[2, 2], strides=[2, 2]),
    node("Slice", ["q", "one", "three", "one"], "m"),
    node("Gather", ["q", "one"], "m", axis=1),
    node("DepthToSpace", ["q"], "m", blocksize=2),
]


@pytest.mark.parametrize("dtype", [INT8, UINT8], ids=str)
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.op_type)
def test_moves_of_int8_numbers_are_those_of_the_real_ones(move: onnx.NodeProto, dtype: np.dtype) -> None:
    """As files for ONNX Runtime have them: Quantize, the move, Dequantize."""
    graph = Qdq({"x": random(1, 4, 6, 6)}, dtype=dtype)
    scale, zero = graph.constant("s", np.float32(0.02)), graph.constant("z", np.array(3, dtype))
    constants = {"flat": np.array([4, 36]), "one": np.array([1]), "three": np.array([3])}
    for name in move.input[1:]:
        if name in constants:
            graph.constant(name, constants[name])
    graph.op("QuantizeLinear", ["x", scale, zero], "q")
    graph.nodes.append(move)
    made = graph.model(graph.op("DequantizeLinear", ["m", scale, zero], "y"))
    converted = convert_with_notes(made)
    np.testing.assert_array_equal(run_tflite(converted.data, graph.inputs)["y"], run_onnx(made, graph.inputs)["y"])
    assert op_names(converted.data)[0] == "QUANTIZE" and op_names(converted.data)[-1] == "DEQUANTIZE"
    assert REFUSED > NOTED and check_int8(made, converted, graph.inputs) == ()


def test_int8_numbers_of_unequal_scales_are_not_joined() -> None:
    graph = Qdq({"x": random(1, 4)})
    zero = graph.constant("z", np.int8(0))
    scales = [graph.constant("s", np.float32(0.02)), graph.constant("t", np.float32(0.05))]
    for name, scale in zip(("q", "r"), scales, strict=True):
        graph.op("QuantizeLinear", ["x", scale, zero], name)
    graph.op("Concat", ["q", "r"], "m", axis=1)
    made = graph.model(graph.op("DequantizeLinear", ["m", scales[0], zero], "y"))
    with pytest.raises(EdgeKitError, match="different parameters"):
        convert_with_notes(made)
