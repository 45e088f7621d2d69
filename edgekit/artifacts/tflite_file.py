"""Reads what a .tflite file holds, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from edgekit.artifacts.contents import FLOATS, INTEGERS, Contents, Kind, Node, QParams
from edgekit.types import TensorSpec

SIGNATURE = "serving_default"
MOVES = {
    "BATCH_TO_SPACE_ND", "BROADCAST_TO", "CAST", "CONCATENATION", "DEPTH_TO_SPACE", "EXPAND_DIMS", "GATHER",
    "GATHER_ND", "MIRROR_PAD", "PACK", "PAD", "PADV2", "RESHAPE", "REVERSE_V2", "SLICE", "SPACE_TO_BATCH_ND",
    "SPACE_TO_DEPTH", "SPLIT", "SPLIT_V", "SQUEEZE", "STRIDED_SLICE", "TILE", "TRANSPOSE", "UNPACK",
}  # fmt: skip


def _names(enum: type) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if isinstance(value, int)}


OPERATORS = _names(schema.BuiltinOperator)
DTYPES = {value: name.lower() for value, name in _names(schema.TensorType).items()}


def read(path: Path) -> Contents:
    """Returns the contents of a TFLite file. Raises ValueError, IndexError or struct.error where it is damaged."""
    data = path.read_bytes()
    model = schema.Model.GetRootAs(data, 0)
    buffers = list(_each(model, "Buffers", data))
    codes = [_operator(code) for code in _each(model, "OperatorCodes", data)]
    graphs = [Graph(graph, buffers, codes, data) for graph in _each(model, "Subgraphs", data)]
    if not graphs:
        raise ValueError("it holds no graph")
    signature = _signature(model, data)
    main = graphs[0]
    inputs = tuple(main.spec(index, signature[0]) for index in main.inputs)
    outputs = tuple(main.spec(index, signature[1]) for index in main.outputs)
    tensors = [*zip(inputs, main.inputs, strict=True), *zip(outputs, main.outputs, strict=True)]
    qparams = {spec.name: q for spec, index in tensors if (q := main.io_qparams(index)) is not None}
    sizes: Counter[str] = Counter()
    stored = {number: (dtype, size) for graph in graphs for number, dtype, size in graph.constants()}
    for dtype, size in stored.values():
        sizes[dtype] += size
    hybrid = sum(graph.hybrid for graph in graphs)
    return Contents(
        version=f"schema {model.Version()}",
        inputs=inputs,
        outputs=outputs,
        qparams=qparams,
        graphs=tuple(graph.nodes for graph in graphs),
        parameter_bytes=dict(sizes),
        delegates={},
        undelegated={},
        notes=(f"{hybrid} ops have int8 weights and float activations (dynamic range)",) if hybrid else (),
    )


class Graph:
    """One subgraph."""

    def __init__(self, graph: Any, buffers: list[Any], codes: list[str], data: bytes) -> None:
        """`codes` are the names of the file's operators."""
        self.tensors = list(_each(graph, "Tensors", data))
        self.buffers = buffers
        self.inputs = _indices(graph, "Inputs", data)
        self.outputs = _indices(graph, "Outputs", data)
        self.hybrid = 0
        self.nodes = tuple(self._node(op, codes, data) for op in _each(graph, "Operators", data))

    def spec(self, index: int, names: dict[int, str]) -> TensorSpec:
        """Name, dtype and shape of a tensor; `names` are those of the signature."""
        tensor = self.tensors[index]
        shape = [tensor.Shape(i) for i in range(tensor.ShapeLength())]
        return TensorSpec(names.get(index, _text(tensor.Name())), self.dtype(index), tuple(map(int, shape)))

    def dtype(self, index: int) -> str:
        """The dtype name of a tensor."""
        return DTYPES[self.tensors[index].Type()]

    def io_qparams(self, index: int) -> QParams | None:
        """The parameters of an input or output: its own, or those of the integers beside its only (de)quantization."""
        if self.dtype(index) in INTEGERS:
            return self._qparams(index)
        name = str(index)
        for node in self.nodes:
            reads, writes = node.reads == (name,), name in node.writes
            if (node.op == "QUANTIZE" and reads) or (node.op == "DEQUANTIZE" and writes and node.reads):
                return self._qparams(int((node.writes if node.op == "QUANTIZE" else node.reads)[0]))
        return None

    def constants(self) -> Iterator[tuple[int, str, int]]:
        """Number of the buffer, dtype name and bytes of each constant tensor."""
        for index, tensor in enumerate(self.tensors):
            if self._constant(index):
                buffer = self.buffers[tensor.Buffer()]
                yield tensor.Buffer(), self.dtype(index), buffer.DataLength() or buffer.Size()

    def _constant(self, index: int) -> bool:
        buffer = self.buffers[self.tensors[index].Buffer()]
        return bool(buffer.DataLength() or buffer.Size())

    def _qparams(self, index: int) -> QParams | None:
        q = self.tensors[index].Quantization()
        if q is None or q.ScaleLength() != 1:
            return None
        return QParams(self.dtype(index), float(q.Scale(0)), int(q.ZeroPoint(0)) if q.ZeroPointLength() else 0)

    def _node(self, op: Any, codes: list[str], data: bytes) -> Node:
        name = codes[op.OpcodeIndex()]
        inputs = [i for i in _indices(op, "Inputs", data) if i >= 0]
        reads = [i for i in inputs if not self._constant(i)]
        writes = _indices(op, "Outputs", data)
        kind = self._kind(name, reads, writes)
        if kind == "float" and any(self.dtype(i) == "int8" for i in inputs if self._constant(i)):
            self.hybrid += 1
        return Node(name, kind, tuple(map(str, reads)), tuple(map(str, writes)))

    def _kind(self, name: str, reads: list[int], writes: list[int]) -> Kind:
        if not reads or not writes:
            return "other"
        read, written = self.dtype(reads[0]), self.dtype(writes[0])
        if name == "QUANTIZE":
            return "requantize" if read in INTEGERS else "quantize"
        if name == "DEQUANTIZE":
            return "dequantize"
        if name in MOVES:
            return "move"
        if written in INTEGERS and read in INTEGERS:
            return "int8"
        return "float" if FLOATS & {read, written} else "other"


def _each(table: Any, field: str, data: bytes) -> Iterator[Any]:
    """The tables of a vector; a length that the file cannot hold raises ValueError rather than running for hours."""
    count = getattr(table, f"{field}Length")()
    if 4 * count > len(data):
        raise ValueError(f"{count} {field} do not fit into the file")
    get = getattr(table, field)
    return (get(index) for index in range(count))


def _indices(table: Any, field: str, data: bytes) -> list[int]:
    return [int(index) for index in _each(table, field, data)]


def _operator(code: Any) -> str:
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())  # codes above 127 are in the newer field
    if number == schema.BuiltinOperator.CUSTOM:
        return f"CUSTOM {_text(code.CustomCode())}"
    return OPERATORS.get(number, f"operator {number}")


def _signature(model: Any, data: bytes) -> tuple[dict[int, str], dict[int, str]]:
    """Tensor index → name of the inputs and outputs in the signature; empty where the file has none."""
    for signature in _each(model, "SignatureDefs", data):
        if _text(signature.SignatureKey()) == SIGNATURE:
            maps = (_each(signature, field, data) for field in ("Inputs", "Outputs"))
            inputs, outputs = ({int(m.TensorIndex()): _text(m.Name()) for m in entries} for entries in maps)
            return inputs, outputs
    return {}, {}


def _text(raw: bytes | None) -> str:
    return raw.decode() if raw is not None else ""
