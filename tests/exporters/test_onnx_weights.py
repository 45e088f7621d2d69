"""Int8 weights beside float or dynamic inputs, in ONNX Runtime and LiteRT."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from int8_nets import sqnr
from onnx import TensorProto, helper, numpy_helper
from tflite_tools import run_tflite
from weight_nets import NAMES, PRECISIONS, batch, cases, program

from edgekit.errors import EdgeKitError
from edgekit.exporters.onnx.export import to_onnx
from edgekit.exporters.onnx.ort_passes import for_onnxruntime
from edgekit.exporters.tflite import convert
from edgekit.quant.ptq.recipes import float32
from edgekit.runtimes.ort import session_options

WEIGHTED = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Gather", "LSTM", "GRU"}

# network → the ops that ONNX Runtime computes its dynamic linear layers with
FUSED = {
    "mlp": {"DynamicQuantizeMatMul": 3},
    "attention": {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 3, "DynamicQuantizeMatMul": 1},
    "shared": {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 2, "DynamicQuantizeMatMul": 1},
    "tied": {"DynamicQuantizeMatMul": 1},
    "lstm": {"DynamicQuantizeMatMul": 1},
    "lstm_two_ways": {"DynamicQuantizeMatMul": 1},
    "gru": {"DynamicQuantizeMatMul": 1},
    "conv_head": {"DynamicQuantizeMatMul": 1},
    "conv1d": {"DynamicQuantizeMatMul": 1},
}


@functools.cache
def exported(name: str, precision: str) -> onnx.ModelProto:
    return to_onnx(program(name, precision), ["x"], ["y"])


def run(model: onnx.ModelProto, name: str, optimized: Path | None = None) -> torch.Tensor:
    options = session_options(1)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": batch(name)[0].numpy()})[0])


def test_the_table_of_fused_ops() -> None:
    assert FUSED.keys() == set(NAMES)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_dynamic_layers_compute_in_int8(name: str, tmp_path: Path) -> None:
    model = for_onnxruntime(exported(name, "int8-dynamic"))
    graph = program(name, "int8-dynamic").module()(*batch(name))
    assert sqnr(graph, run(model, name, tmp_path / "optimized.onnx")) > 38
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    integer = {op: count for op, count in ops.items() if "Integer" in op or "Dynamic" in op}
    assert integer == FUSED[name]
    assert "DequantizeLinear" not in ops


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_weights_alone_are_dequantized_when_the_file_is_loaded(name: str, tmp_path: Path) -> None:
    model = for_onnxruntime(exported(name, "int8-weight-only"))
    graph = program(name, "int8-weight-only").module()(*batch(name))
    assert sqnr(graph, run(model, name, tmp_path / "optimized.onnx")) > 80
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    embedding = int("embedding" in cases()[name].layers)
    assert "DequantizeLinear" not in ops and ops["Cast"] == embedding


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_shared_model_is_weights_behind_dequantize_and_its_runtimes_agree(name: str, precision: str) -> None:
    """What TFLite's lowering starts from."""
    model = exported(name, precision)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = {name: node for node in model.graph.node for name in node.input}
    dequantized = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
    assert dequantized
    for node in dequantized:
        assert stored[node.input[0]].data_type == TensorProto.INT8
        assert not numpy_helper.to_array(stored[node.input[2]]).any()
        reader = readers[node.output[0]]
        reader = readers[reader.output[0]] if reader.op_type == "Transpose" else reader
        assert reader.op_type in WEIGHTED
    kinds = {d.op_type for d in model.graph.node} & {"QuantizeLinear"}
    assert not kinds
    expected = program(name, precision).module()(*batch(name))
    assert sqnr(expected, torch.from_numpy(run_tflite(convert(model), {"x": batch(name)[0].numpy()})["y"])) > 30


@pytest.mark.parametrize("name", ["mlp", "tied", "lstm", "conv_head"])
def test_files_are_smaller(name: str) -> None:
    full = sum(t.numel() for t in float32(cases()[name].module, batch(name)).program.state_dict.values()) * 4
    for precision in PRECISIONS:
        model = for_onnxruntime(exported(name, precision))
        assert sum(len(t.raw_data) for t in model.graph.initializer) < 0.42 * full


def gemm(**attributes: float) -> onnx.ModelProto:
    """A dynamic Gemm as someone else's exporter could spell it."""
    generator = np.random.default_rng(0)
    constants = {
        "w_q": generator.integers(-127, 128, (12, 6)).astype(np.int8),
        "w_s": np.array(0.01, np.float32),
        "w_z": np.zeros((), np.int8),
        "b": generator.standard_normal(6).astype(np.float32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w_q", "w_s", "w_z"], ["w"]),
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x_dq"]),
        helper.make_node("Gemm", ["x_dq", "w", "b"], ["y"], **attributes),
    ]
    shape = [12, 4] if attributes.get("transA") else [4, 12]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", [4, 6]))]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "gemm", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_a_plain_gemm_becomes_integer() -> None:
    model, x = gemm(), np.random.default_rng(1).standard_normal((4, 12)).astype(np.float32)
    changed = for_onnxruntime(model)
    assert "MatMulInteger" in {n.op_type for n in changed.graph.node}
    sessions = [onnxruntime.InferenceSession(m.SerializeToString(), session_options(1)) for m in (model, changed)]
    results = [session.run(None, {"x": x})[0] for session in sessions]
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}])
def test_gemms_that_are_more_than_a_layer_are_refused(attributes: dict[str, float]) -> None:
    with pytest.raises(EdgeKitError, match="no plain linear layer"):
        for_onnxruntime(gemm(**attributes))
