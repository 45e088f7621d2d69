"""Whole int8 networks: one .pte delegate, and nothing that computes in float between the first and last layer."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from edgekit.exporters.executorch.lower import to_executorch
from edgekit.exporters.onnx.export import to_onnx
from edgekit.exporters.onnx.ort_passes import for_onnxruntime
from edgekit.exporters.tflite import convert
from edgekit.quant.ptq import recipes

SOURCE = Path(__file__).parents[2] / "benchmarks" / "networks.py"
SIZES = {"resnet20": 32}  # pixels; 64 for the others

# What ONNX Runtime runs on codes, computing or moving them, in the graph that it has optimized.
ON_CODES = {
    *("QLinearConv", "QLinearAdd", "QLinearMul", "QLinearGlobalAveragePool", "QLinearConcat", "QGemm"),
    *("Clip", "MaxPool", "NhwcMaxPool", "Pad", "Transpose", "Reshape", "Slice", "Split", "Concat"),
}


def load_networks():
    spec = importlib.util.spec_from_file_location("networks", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["networks"] = module
    spec.loader.exec_module(module)
    return module


networks = load_networks()


@pytest.fixture(scope="module", params=networks.NETWORKS)
def program(request: pytest.FixtureRequest) -> torch.export.ExportedProgram:
    """The network in int8, with weights rounded to nearest: what runs in which type does not hang on the rounding."""
    size = SIZES.get(request.param, 64)
    torch.manual_seed(0)
    images = torch.randn(16, 3, size, size)
    module = networks.build(request.param, images)
    batches = [(image[None],) for image in images[:2]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "round_weights", lambda *_: {})
        return recipes.int8_static(module, batches[0], batches).program


@pytest.fixture(scope="module")
def proto(program: torch.export.ExportedProgram) -> onnx.ModelProto:
    return to_onnx(program, ["image"], ["scores"])


def test_executorch_takes_the_network_as_one_delegate(program: torch.export.ExportedProgram) -> None:
    lowered = to_executorch(program)
    assert lowered.undelegated == {}
    assert lowered.delegates == 1


def test_onnxruntime_runs_codes_from_end_to_end(proto: onnx.ModelProto, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    file = for_onnxruntime(proto).SerializeToString()
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert ops[0] == "QuantizeLinear" and ops[-1] == "DequantizeLinear"
    assert set(ops[1:-1]) <= ON_CODES


def test_tflite_runs_codes_from_end_to_end(proto: onnx.ModelProto) -> None:
    interpreter = Interpreter(
        model_content=convert(proto), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    types = {tensor["index"]: tensor["dtype"] for tensor in interpreter.get_tensor_details()}
    ops = interpreter._get_ops_details()
    assert [
        op["op_name"] for op in ops if np.float32 in {types[i] for i in (*op["inputs"], *op["outputs"]) if i >= 0}
    ] == [
        "QUANTIZE",
        "DEQUANTIZE",
    ]
