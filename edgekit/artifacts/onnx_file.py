"""Reads what an .onnx file holds, without running it and without its external weights."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from edgekit.artifacts.contents import FLOATS, Contents, Kind, Node, QParams
from edgekit.screening.onnx_graphs import screen
from edgekit.types import TensorSpec, stored_bytes

CONSTANTS = {"Constant", "ConstantOfShape", "Shape", "Size", "Range"}
MOVES = {
    "Cast", "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
    "Identity", "Pad", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
FOLDED_ACTIVATIONS = {"Relu", "Clip"}  # runtimes fold them into the quantization that follows
FIRST_INPUT_ONLY = {"Clip", "Resize"}  # the others are bounds and sizes, never quantized
INTEGER_OPS = {"ConvInteger", "MatMulInteger", "MatMulInteger16", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
DTYPE_NAMES = {"float": "float32", "double": "float64"}


def read(path: Path) -> Contents:
    """Returns the contents of an ONNX file. Raises ValueError where it is not one, or is damaged."""
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(str(error)) from None
    if not model.graph.node and not model.graph.output:
        raise ValueError("it holds no graph")
    screen(model, path, beside=False)
    bodies = list(_graphs(model.graph))
    _check_text(model, bodies)
    opsets = {o.domain or "ai.onnx": o.version for o in model.opset_import}
    initializers = {tensor.name for tensor in model.graph.initializer}
    dtypes = _dtypes(model)
    graphs = [Graph(graph, dtypes) for graph in bodies]
    inputs = tuple(_spec(value) for value in model.graph.input if value.name not in initializers)
    outputs = tuple(_spec(value) for value in model.graph.output)
    sizes: Counter[str] = Counter()
    for tensor in _tensors(model):
        sizes[_dtype(tensor.data_type)] += _bytes(tensor)
    places = _weight_files(model)
    names = "; ".join(f"{domain} {version}" for domain, version in opsets.items())
    return Contents(
        version=f"opset {opsets.get('ai.onnx', '–')}, IR {model.ir_version}"
        + (f" ({names})" if len(opsets) > 1 else ""),
        inputs=inputs,
        outputs=outputs,
        qparams=graphs[0].io_qparams([s.name for s in inputs], [s.name for s in outputs]),
        graphs=tuple(tuple(graph.nodes()) for graph in graphs),
        parameter_bytes=dict(sizes),
        delegates={},
        undelegated={},
        notes=tuple(_notes(inputs, places, path)),
        weight_files=places,
    )


class Graph:
    """One graph with its edges indexed."""

    def __init__(self, graph: GraphProto, dtypes: dict[str, str]) -> None:
        """`dtypes` holds the dtype name of each value that has a known one."""
        self.graph = graph
        self.dtypes = dtypes
        self.producer = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.constant = set(self.initializers)
        for node in graph.node:
            given = [name for name in node.input if name]
            if node.op_type in CONSTANTS or (given and self.constant.issuperset(given)):
                self.constant.update(node.output)
        self.int8: set[str] = set()  # values that int8 arithmetic writes

    def nodes(self) -> Iterator[Node]:
        """The nodes with their kinds, in order."""
        for node in self.graph.node:
            kind = self._kind(node)
            if kind == "int8":
                self.int8.update(node.output)
            reads = tuple(name for name in node.input if name and name not in self.constant)
            yield Node(node.op_type, kind, reads, tuple(name for name in node.output if name))

    def io_qparams(self, inputs: list[str], outputs: list[str]) -> dict[str, QParams]:
        """Parameters of inputs that are quantized at once, and of outputs that come from integers."""
        found: dict[str, QParams] = {}
        for name in inputs:
            quantizers = [node for node in self.readers[name] if node.op_type == "QuantizeLinear"]
            if quantizers and len(quantizers) == len(self.readers[name]):
                found |= self._qparams(name, quantizers[0])
        for name in outputs:
            node = self.producer.get(name)
            if node is not None and node.op_type == "DequantizeLinear":
                found |= self._qparams(name, node)
        return found

    def _qparams(self, name: str, node: NodeProto) -> dict[str, QParams]:
        scale, zero = self._value(node, 1), self._value(node, 2)
        if scale is None or scale.size != 1:
            return {}
        dtype = "uint8" if zero is None else str(zero.dtype)
        return {name: QParams(dtype, float(scale.item()), 0 if zero is None else int(zero.item()))}

    def _value(self, node: NodeProto, index: int) -> np.ndarray | None:
        """The constant at an input; None where there is none, or it lies in another file."""
        tensor = self.initializers.get(node.input[index]) if len(node.input) > index else None
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)

    def _kind(self, node: NodeProto) -> Kind:
        if self.constant.issuperset(node.output):
            return "other"
        if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
            return "requantize" if self._requantizes(node) else "quantize"
        if node.op_type == "DequantizeLinear":
            return "dequantize"
        if node.op_type.startswith("QLinear") or node.op_type in INTEGER_OPS:
            return "int8"
        if node.op_type in MOVES:
            return "move"
        if all(self.dtypes.get(name, "float32") not in FLOATS for name in node.output if name):
            return "other"
        return "int8" if self._is_int8(node) else "float"

    def _is_int8(self, node: NodeProto) -> bool:
        """Whether every float input comes from DequantizeLinear and every output goes to QuantizeLinear alone."""
        count = 1 if node.op_type in FIRST_INPUT_ONLY else len(node.input)
        inputs = [n for n in node.input[:count] if n and self.dtypes.get(n, "float32") in FLOATS]
        return all(map(self._comes_from_int8, inputs)) and all(self._goes_to_int8(n) for n in node.output if n)

    def _comes_from_int8(self, name: str) -> bool:
        producer = self.producer.get(name)
        return name in self.int8 or (producer is not None and producer.op_type == "DequantizeLinear")

    def _goes_to_int8(self, name: str) -> bool:
        readers = self.readers[name]
        if not readers or name in self.outputs:
            return False
        if len(readers) == 1 and readers[0].op_type in FOLDED_ACTIVATIONS:
            return self._goes_to_int8(readers[0].output[0])
        return all(node.op_type == "QuantizeLinear" for node in readers)

    def _requantizes(self, node: NodeProto) -> bool:
        """Whether a quantized value reaches this node unchanged, at another scale or zero point."""
        pending, sources = [node.input[0]], []
        seen: set[str] = set()  # a damaged file can hold a cycle
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            producer = self.producer.get(name)
            if producer is None or producer.op_type not in (*MOVES, "DequantizeLinear"):
                return False
            if producer.op_type == "DequantizeLinear":
                sources.append(producer)
            else:
                pending += [name for name in producer.input if name not in self.constant]
        return any(self._parameters(source) != self._parameters(node) for source in sources)

    def _parameters(self, node: NodeProto) -> tuple[bytes | str, ...]:
        values = [self._value(node, index) for index in (1, 2)]
        names = (*node.input[1:], "")  # the zero point may be left out
        return tuple(name if value is None else value.tobytes() for name, value in zip(names, values, strict=False))


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and the bodies of its control flow."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _graphs(body)


def _check_text(model: ModelProto, bodies: list[GraphProto]) -> None:
    """Raises ValueError for a name that is not UTF-8: protobuf hands those out as bytes."""
    nodes = [node for graph in bodies for node in graph.node]
    texts = [text for node in nodes for text in (node.op_type, *node.input, *node.output)]
    texts += [value.name for value in (*model.graph.input, *model.graph.output)]
    texts += [opset.domain for opset in model.opset_import]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("it has names that are not text")


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    for graph in _graphs(model.graph):
        yield from graph.initializer
        for node in graph.node:
            yield from (a.t for a in node.attribute if a.HasField("t"))


def _dtypes(model: ModelProto) -> dict[str, str]:
    """The dtype of each value, inferred where the file does not say."""
    found: dict[str, str] = {}
    for graph in _graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            found[value.name] = _dtype(value.type.tensor_type.elem_type)
        for tensor in graph.initializer:
            found[tensor.name] = _dtype(tensor.data_type)
    if all(name in found for node in model.graph.node for name in node.output if name):
        return found
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except (onnx.shape_inference.InferenceError, ValueError):  # an op that onnx does not know, or a model over 2 GB
        return found
    return {v.name: _dtype(v.type.tensor_type.elem_type) for v in inferred.graph.value_info} | found


def _dtype(number: int) -> str:
    name = TensorProto.DataType.Name(number).lower()
    return DTYPE_NAMES.get(name, name)


def _bytes(tensor: TensorProto) -> int:
    """The size of a tensor's values; raises ValueError where a stored one is shorter than its shape says."""
    dtype = _dtype(tensor.data_type)
    if dtype in ("string", "undefined"):
        return sum(map(len, tensor.string_data))
    if min(tensor.dims, default=0) < 0:
        raise ValueError(f"tensor '{tensor.name}' has the shape {list(tensor.dims)}")
    expected = stored_bytes(dtype, tensor.dims)
    inline = tensor.HasField("raw_data") and tensor.data_location != TensorProto.EXTERNAL
    if inline and len(tensor.raw_data) != expected:
        raise ValueError(f"tensor '{tensor.name}' has {len(tensor.raw_data)} bytes in place of {expected}")
    return expected


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    """A dimension that the file leaves open is -1."""
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    return TensorSpec(value.name, _dtype(tensor.elem_type), shape)


def _weight_files(model: ModelProto) -> tuple[str, ...]:
    places = {
        entry.value
        for tensor in _tensors(model)
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(sorted(places))


def _notes(inputs: tuple[TensorSpec, ...], places: tuple[str, ...], path: Path) -> Iterator[str]:
    for place in places:
        there = "" if (path.parent / place).is_file() else ", which is missing"
        yield f"weights lie in another file, {place}{there}: the size shown is that of {path.name} alone"
    for spec in inputs:
        if -1 in spec.shape:
            yield f"input {spec.name} has open dimensions (-1)"
