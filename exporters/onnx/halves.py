"""ONNX weights as float16: wherever a file holds them, in its graph, in the branches of nodes or in functions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from edgekit.errors import EdgeKitError
from edgekit.exporters.onnx.graph import constant, sweep

SMALLEST = 64  # elements of a weight, below which a Cast takes as much as it saves
GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def halve(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns `proto` with its weights stored as float16; see `halve_weights`."""
    dense = onnx.ModelProto()
    dense.CopyFrom(proto)
    for graph in graphs(dense.graph):
        _spell_out(graph)
    for function in dense.functions:
        for node in function.node:
            _densify(node)
    model = ir.from_proto(dense)
    halve_weights(model)
    return ir.to_proto(model)


def halve_weights(model: ir.Model) -> None:
    """Stores float32 constants of at least SMALLEST elements as float16 behind a Cast.

    They are initializers, those that old files list among the inputs too, and Constant nodes. Runtimes fold the Cast
    when they load the file: half the size at the speed of float32. Raises EdgeKitError where a weight lies outside
    float16's range.
    """
    _halve_initializers(model.graph)
    for graph in model.graphs():
        if graph is not model.graph:
            _halve_initializers(graph)
    for part in (model.graph, *model.functions.values()):
        for node in list(ir.traversal.RecursiveGraphIterator(part)):
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                _halve_constant(node)
    sweep(model)


def has_halves(proto: onnx.ModelProto) -> bool:
    """Whether a model holds a constant as float16."""
    tensors = [tensor for graph in graphs(proto.graph) for tensor in graph.initializer]
    nodes = [node for graph in graphs(proto.graph) for node in graph.node]
    nodes += [node for function in proto.functions for node in function.node]
    tensors += [attribute.t for node in nodes if node.op_type == "Constant" for attribute in node.attribute]
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in tensors)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yields a graph and those of its nodes' branches, at any depth."""
    pending = [graph]
    while pending:
        current = pending.pop()
        yield current
        attributes = [a for node in current.node for a in node.attribute if a.type in GRAPHS]
        for attribute in attributes:
            pending += attribute.graphs if attribute.type == onnx.AttributeProto.GRAPHS else [attribute.g]


def _halve_initializers(graph: ir.Graph) -> None:
    for value in list(graph.initializers.values()):
        array = constant(value)
        if not _is_weight(array) or value.is_graph_output():
            continue
        half = ir.Value(name=f"{value.name}_half", const_value=ir.tensor(_half(array, value.name)))
        half.name = _free(half.name or "", graph)
        half.const_value.name = half.name
        half.shape, half.type = value.shape, ir.TensorType(ir.DataType.FLOAT16)
        graph.register_initializer(half)
        cast = ir.node("Cast", [half], attributes={"to": ir.DataType.FLOAT.value})
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
        graph.insert_before(graph[0], cast)
        value.replace_all_uses_with(cast.outputs[0])
        if value in graph.inputs:  # the default of an input, which then would have none
            graph.inputs.remove(value)
        graph.initializers.pop(value.name)


def _free(name: str, graph: ir.Graph) -> str:
    while name in graph.initializers:
        name += "_"
    return name


def _halve_constant(node: ir.Node) -> None:
    """Halves what a Constant node holds, as a tensor or as a list of floats."""
    output = node.outputs[0]
    tensor = ir.convenience.get_const_tensor(output)
    if tensor is None or not _is_weight(array := tensor.numpy()) or output.is_graph_output():
        return
    held = ir.node("Constant", [], attributes={"value": ir.tensor(_half(array, output.name))})
    cast = ir.node("Cast", [held.outputs[0]], attributes={"to": ir.DataType.FLOAT.value})
    held.outputs[0].shape, held.outputs[0].type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT16)
    cast.outputs[0].shape, cast.outputs[0].type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
    owner = node.graph
    assert owner is not None
    owner.insert_before(node, [held, cast])
    output.replace_all_uses_with(cast.outputs[0])
    owner.remove(node, safe=True)


def _is_weight(array: np.ndarray) -> bool:
    return array.dtype == np.float32 and array.size >= SMALLEST


def _half(array: np.ndarray, name: str | None) -> np.ndarray:
    largest = np.abs(array, where=np.isfinite(array), out=np.zeros_like(array)).max()
    if largest > np.finfo(np.float16).max:
        raise EdgeKitError(f"weight '{name}' does not fit float16", "export with --precision fp32 or int8")
    return array.astype(np.float16)


def _spell_out(graph: onnx.GraphProto) -> None:
    """Stores the sparse constants of a graph whole, which is what runtimes load them as."""
    for sparse in graph.sparse_initializer:
        graph.initializer.append(_whole(sparse))
    del graph.sparse_initializer[:]
    for node in graph.node:
        _densify(node)


def _densify(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "Constant" and attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
            whole = onnx.helper.make_attribute("value", _whole(attribute.sparse_tensor))
            attribute.CopyFrom(whole)


def _whole(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    array = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        array.reshape(-1)[indices] = values
    else:
        array[tuple(indices.T)] = values
    return numpy_helper.from_array(array, sparse.values.name)
