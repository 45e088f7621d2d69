"""Small ONNX graphs, and running them in ONNX Runtime and in LiteRT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from onnx import helper, numpy_helper

from edgekit.runtimes.ort import session_options

OPSET = 20


def node(op: str, inputs: Sequence[str], outputs: Sequence[str] | str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [outputs] if isinstance(outputs, str) else outputs, **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, np.ndarray],
    constants: dict[str, np.ndarray],
    outputs: Sequence[str] = ("y",),
    opset: int = OPSET,
) -> onnx.ModelProto:
    """A checked model whose inputs have the shapes and types of the given arrays."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in inputs.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    made = onnx.shape_inference.infer_shapes(made, strict_mode=True)
    onnx.checker.check_model(made)
    return made


def run_onnx(made: onnx.ModelProto, feeds: dict[str, np.ndarray], optimized: bool = True) -> dict[str, np.ndarray]:
    options = session_options(1)
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def interpreter(data: bytes, xnnpack: bool = True) -> Interpreter:
    resolver = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    made = Interpreter(model_content=data, experimental_op_resolver_type=resolver, num_threads=1)
    made.allocate_tensors()
    return made


def run_tflite(data: bytes, feeds: dict[str, np.ndarray], xnnpack: bool = True) -> dict[str, np.ndarray]:
    """Run by the signature's names, so that a wrong name fails."""
    runner = interpreter(data, xnnpack).get_signature_runner("serving_default")
    return {name: np.array(array) for name, array in runner(**feeds).items()}


def op_names(data: bytes) -> list[str]:
    made = Interpreter(
        model_content=data, experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    return [details["op_name"] for details in made._get_ops_details()]
