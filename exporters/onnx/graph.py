"""What the ONNX passes share: reading and writing constants, following values, and sweeping what is not read."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

LIGHT = 1 << 16  # bytes of a constant up to which the checker may copy it: shapes and axes, which it reads, are small
WEIGHTED = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0}  # op → weight axis of the output channels


def check(proto: onnx.ModelProto) -> None:
    """Lets ONNX check a model and its shapes; large weights, of which it makes copies, stand as inputs meanwhile."""
    light = onnx.ModelProto()
    light.ir_version = proto.ir_version
    light.opset_import.extend(proto.opset_import)
    light.functions.extend(proto.functions)
    graph = light.graph
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    graph.value_info.extend(proto.graph.value_info)
    for tensor in proto.graph.initializer:
        if is_light(ir.TensorProtoTensor(tensor)):
            graph.initializer.add().CopyFrom(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(light, full_check=True)


def is_light(tensor: ir.TensorProtocol) -> bool:
    """Whether a constant is small enough for the checker to copy it."""
    return tensor.dtype == ir.DataType.STRING or tensor.nbytes <= LIGHT


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
