"""What the ONNX passes share: reading and writing constants, following values, and sweeping what is not read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

WEIGHTED = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0}  # op → weight axis of the output channels


def producer(node: ir.Node, op_type: str) -> ir.Node | None:
    """Returns the node that makes the first input of `node` where its op is `op_type`, else None."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    return source if source is not None and source.op_type == op_type else None


def is_weight(node: ir.Node) -> bool:
    """Whether `node` dequantizes a constant that, transposed or not, some layer multiplies by."""
    if node.op_type != "DequantizeLinear" or not node.inputs[0].is_initializer():
        return False
    readers = list(node.outputs[0].uses())
    while readers and all(use.node.op_type == "Transpose" for use in readers):
        readers = [use for transpose in readers for use in transpose.node.outputs[0].uses()]
    return any(use.idx == 1 and use.node.op_type in (*WEIGHTED, "MatMul") for use in readers)


def qparams(node: ir.Node) -> tuple[bytes, ...]:
    """Returns scale and zero point of a QuantizeLinear or DequantizeLinear, to be compared with another's."""
    return tuple(constant(value).tobytes() for value in node.inputs[1:])


def constant(value: ir.Value) -> np.ndarray:
    """Returns the array of an initializer or Constant."""
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None, f"'{value.name}' is not a constant"
    return tensor.numpy()


def initializer(model: ir.Model, name: str, data: np.ndarray) -> ir.Value:
    """Adds an initializer called `name`, or with underscores behind it where that is taken."""
    while name in model.graph.initializers:
        name += "_"
    value = ir.Value(
        name=name,
        shape=ir.Shape(data.shape),
        type=ir.TensorType(ir.DataType.from_numpy(data.dtype)),
        const_value=ir.tensor(data, name=name),
    )
    model.graph.register_initializer(value)
    return value


def sweep(model: ir.Model) -> None:
    """Removes nodes and initializers that nothing reads any more."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
