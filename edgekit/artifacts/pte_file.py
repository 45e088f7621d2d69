"""Reads what a .pte file holds, XNNPACK's parts included, without executorch: its own reader takes seconds to import.

The layouts are those of the schemas that ExecuTorch 1.5 carries: exir/_serialize/program.fbs and
backends/xnnpack/serialization/runtime_schema.fbs. Fields are only ever added to them at the end.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from edgekit.artifacts.contents import FLOATS, Contents, Kind, Node
from edgekit.types import TensorSpec, stored_bytes

# The fields of each table in the order of the schema; a union takes two, its type and its value.
PROGRAM = (
    "version execution_plan constant_buffer backend_delegate_data segments constant_segment mutable_data named_data"
)
PLAN = "name container values inputs outputs chains operators delegates"
TENSOR = "scalar_type storage_offset sizes dim_order requires_grad data_buffer_idx allocation_info"
GRAPH = "version xnodes xvalues num_externs input_ids output_ids constant_buffer mem_buffer_sizes constant_data"
XNN_TENSOR = "datatype num_dims dims constant_buffer_idx external_id flags id_out dq_datatype"

VALUES = {2: "Int", 3: "Bool", 4: "Double", 5: "Tensor"}  # of the union KernelTypes: what an input or output can be
SCALARS = {"Int": "int64", "Bool": "bool", "Double": "float64"}
DTYPES = {
    0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64",
    8: "complex32", 9: "complex64", 10: "complex128", 11: "bool", 12: "int8", 13: "uint8", 14: "int32", 15: "bfloat16",
    16: "uint4", 17: "uint2", 18: "uint1", 19: "uint2", 20: "uint4", 21: "uint8", 22: "uint16", 23: "float8e5m2",
    24: "float8e4m3fn", 25: "float8e5m2fnuz", 26: "float8e4m3fnuz", 27: "uint16", 28: "uint32", 29: "uint64",
}  # fmt: skip
XNN_DTYPES = {
    1: "float32", 2: "float16", 3: "int8", 4: "uint8", 5: "int32", 6: "int8", 7: "int32", 8: "int4", 9: "int8",
    10: "int4", 11: "int8", 12: "int32", 13: "float32", 14: "bfloat16",
}  # fmt: skip
XNN_INTEGERS = {3, 4, 9, 11}  # what XNNPACK holds activations in: int8, uint8, and int8 quantized as it runs

UNARY, BINARY = "input_id output_id flags", "input1_id input2_id output_id flags"
CONV = (
    "padding_top padding_right padding_bottom padding_left kernel_height kernel_width subsampling_height "
    "subsampling_width dilation_height dilation_width group_input_channels group_output_channels groups "
    "adjustment_height adjustment_width input1_id filter_id bias_id output_id flags"
)
POOL = (
    "padding_top padding_right padding_bottom padding_left pooling_height pooling_width stride_height stride_width "
    "dilation_height dilation_width input_id output_id flags"
)
CONCATENATE = "axis input1_id input2_id input3_id input4_id output_id flags input5_id"
# The members of XNodeUnion in order, from 1.
XNODES = (
    ("Add", BINARY),
    ("FullyConnected", "input1_id filter_id bias_id output_id flags"),
    ("Softmax", UNARY),
    ("Sigmoid", UNARY),
    ("StaticTranspose", "num_dims perm input_id output_id flags"),
    ("Clamp", UNARY),
    ("Conv2d", CONV),
    ("Div", BINARY),
    ("StaticResizeBilinear2D", "new_height new_width input_id output_id flags"),
    ("StaticConstantPad", "pre_paddings post_paddings padding_value input_id output_id flags"),
    ("AvgPooling2d", POOL),
    ("Minimum", BINARY),
    ("DepthwiseConv2d", CONV),
    ("MaxPooling2d", POOL),
    ("Multiply", BINARY),
    ("Subtract", BINARY),
    ("Floor", UNARY),
    ("Convert", UNARY),
    ("GlobalAvgPooling2d", UNARY),
    ("StaticReshape", "num_dims new_shape input_id output_id flags"),
    ("ArgMaxPooling2d", "top right bottom left height width input_id output_id index_id flags"),
    ("SquareRoot", UNARY),
    ("Ceiling", UNARY),
    ("Hardswish", UNARY),
    ("LeakyReLU", "negative_slope input_id output_id flags"),
    ("Maximum", BINARY),
    ("Negate", UNARY),
    ("Square", UNARY),
    ("ELU", "alpha input_id output_id flags"),
    ("Abs", UNARY),
    ("PReLU", BINARY),
    ("Concatenate2", CONCATENATE),
    ("Concatenate3", CONCATENATE),
    ("Concatenate4", CONCATENATE),
    ("StaticSlice", "num_dims offsets sizes input_id output_id flags"),
    ("ScaledDotProductAttention", "input1_id input2_id input3_id input4_id input5_id output_id flags"),
    ("BatchMatrixMultiply", BINARY),
    ("Concatenate5", CONCATENATE),
    ("ConvTranspose2d", CONV),
    ("ReciprocalSquareRoot", UNARY),
    ("Log", UNARY),
    ("Gelu", UNARY),
    ("Tanh", UNARY),
    ("Exp", UNARY),
    ("Sin", UNARY),
    ("Copy", UNARY),
    ("Cos", UNARY),
)
OPERANDS = {"Concatenate2": 2, "Concatenate3": 3, "Concatenate4": 4}  # the table has room for five
XNN_MOVES = {"StaticTranspose", "StaticReshape", "StaticSlice", "StaticConstantPad", "Copy"}
KERNEL_MOVES = {
    "aten::as_strided_copy", "aten::cat", "aten::clone", "aten::constant_pad_nd", "aten::expand_copy",
    "aten::permute_copy", "aten::select_copy", "aten::slice_copy", "aten::split_with_sizes_copy",
    "aten::squeeze_copy", "aten::t_copy", "aten::transpose_copy", "aten::unsqueeze_copy", "aten::view_copy",
    "aten::_to_copy", "dim_order_ops::_clone_dim_order", "dim_order_ops::_to_dim_order_copy",
    "executorch_prim::et_view",
}  # fmt: skip
DELEGATE_CALL, KERNEL_CALL = 2, 1


class Table:
    """One flatbuffer table, read by field name. Everything out of bounds raises ValueError or struct.error."""

    def __init__(self, data: bytes, position: int, fields: str) -> None:
        """`fields` are the names of the first fields in the order of the schema."""
        self.data = data
        self.position = position
        self.slots = {name: slot for slot, name in enumerate(fields.split())}
        self.vtable = position - self._read("<i", position)
        self.vtable_size = self._read("<H", self.vtable)

    def number(self, field: str, format: str = "<I", default: int = 0) -> int:
        """The scalar of a field."""
        place = self._place(field)
        return self._read(format, place) if place else default

    def text(self, field: str) -> str:
        """The string of a field; empty where it is absent."""
        start, count = self._vector(field, 1)
        return self.data[start : start + count].decode()

    def raw(self, field: str) -> bytes:
        """The bytes of a field; empty where it is absent."""
        start, count = self._vector(field, 1)
        return self.data[start : start + count]

    def numbers(self, field: str, letter: str = "i") -> tuple[int, ...]:
        """The vector of a field; `letter` is the format of one item."""
        size = struct.calcsize(f"<{letter}")
        start, count = self._vector(field, size)
        return struct.unpack_from(f"<{count}{letter}", self.data, start)

    def table(self, field: str, fields: str) -> Table | None:
        """The table of a field; None where it is absent."""
        place = self._place(field)
        return Table(self.data, place + self._read("<I", place), fields) if place else None

    def tables(self, field: str, fields: str) -> list[Table]:
        """The vector of tables of a field."""
        start, count = self._vector(field, 4)
        places = range(start, start + 4 * count, 4)
        return [Table(self.data, place + self._read("<I", place), fields) for place in places]

    def _place(self, field: str) -> int:
        offset = 4 + 2 * self.slots[field]
        if offset >= self.vtable_size:
            return 0
        relative = self._read("<H", self.vtable + offset)
        return self.position + relative if relative else 0

    def _vector(self, field: str, size: int) -> tuple[int, int]:
        place = self._place(field)
        if not place:
            return 0, 0
        start = place + self._read("<I", place)
        count = self._read("<I", start)
        if start + 4 + size * count > len(self.data):
            raise ValueError(f"{count} {field} do not fit into the file")
        return start + 4, count

    def _read(self, format: str, place: int) -> int:
        if place < 0:  # struct counts a negative place from the end
            raise ValueError("an offset points before the file")
        return struct.unpack_from(format, self.data, place)[0]


def read(path: Path) -> Contents:
    """Returns the contents of a .pte file. Raises ValueError, IndexError or struct.error where it is damaged."""
    file = Program(path.read_bytes())
    inputs = tuple(file.spec(index, f"input_{i}") for i, index in enumerate(file.plan.numbers("inputs")))
    outputs = tuple(file.spec(index, f"output_{i}") for i, index in enumerate(file.plan.numbers("outputs")))
    outside: Counter[str] = Counter()
    delegates: Counter[str] = Counter()
    nodes: list[Node] = []
    for backend, name, inside in file.calls():
        (delegates if backend else outside)[name] += 1
        nodes += inside
    sizes: Counter[str] = Counter()
    for dtype, size in file.parameters().values():
        sizes[dtype] += size
    unknown = [name for name in delegates if name != "XnnpackBackend"]
    return Contents(
        version=f"schema {file.identifier}",
        inputs=inputs,
        outputs=outputs,
        qparams={},
        graphs=(tuple(nodes),),
        parameter_bytes=dict(sizes),
        delegates=dict(delegates),
        undelegated=dict(outside),
        notes=tuple(f"what {name} holds is not read: its ops and weights are not counted" for name in unknown),
    )


class Program:
    """The program of a .pte file: its first method, or `forward` where there is one."""

    def __init__(self, data: bytes) -> None:
        """Raises ValueError where the file is shorter than its header says, or has no method."""
        self.data = data
        self.identifier = data[4:8].decode()
        size, self.segment_base = len(data), 0
        if data[8:12] == b"eh00":
            size, self.segment_base, segments = struct.unpack_from("<QQQ", data, 16 if len(data) >= 40 else len(data))
            if max(size, self.segment_base + segments if self.segment_base else 0) > len(data):
                raise ValueError("it is shorter than its header says")
        program = data[:size]
        self.root = Table(program, struct.unpack_from("<I", program, 0)[0], PROGRAM)
        plans = {plan.text("name"): plan for plan in self.root.tables("execution_plan", PLAN)}
        if not plans:
            raise ValueError("it holds no method")
        self.plan = plans.get("forward", next(iter(plans.values())))
        self.values = self.plan.tables("values", "type val")
        self.segments = [
            (s.number("offset", "<Q"), s.number("size", "<Q")) for s in self.root.tables("segments", "offset size")
        ]

    def spec(self, index: int, name: str) -> TensorSpec:
        """Name, dtype and shape of an input or output; numbers that are no tensors have the shape ()."""
        kind = VALUES.get(self.values[index].number("type", "<B"), "")
        if kind in SCALARS:
            return TensorSpec(name, SCALARS[kind], ())
        tensor = self.tensor(index)
        if tensor is None:
            raise ValueError(f"'{name}' is neither a tensor nor a number")
        return TensorSpec(name, _dtype(tensor), tensor.numbers("sizes"))

    def tensor(self, index: int) -> Table | None:
        """The tensor that a value is; None for other values."""
        value = self.values[index]
        return value.table("val", TENSOR) if VALUES.get(value.number("type", "<B")) == "Tensor" else None

    def calls(self) -> Iterator[tuple[bool, str, list[Node]]]:
        """Each call in order: whether it goes to a delegate, the backend or operator, and the nodes that it stands for.

        The nodes of an XNNPACK part are linked to what surrounds it: the values of its interface keep their names.
        """
        operators = [operator.text("name") for operator in self.plan.tables("operators", "name overload")]
        for chain in self.plan.tables("chains", "inputs outputs instructions"):
            for number, instruction in enumerate(chain.tables("instructions", "type args")):
                kind = instruction.number("type", "<B")
                call = instruction.table("args", "index args")
                if call is None or kind not in (KERNEL_CALL, DELEGATE_CALL):
                    continue
                args = call.numbers("args")
                if kind == KERNEL_CALL:
                    name = operators[call.number("index")]
                    yield False, name, [self._kernel(name, args)]
                    continue
                name, payload = self.delegates[call.number("index")]
                if isinstance(payload, XnnGraph):
                    yield True, name, list(payload.nodes(f"part {number}", list(map(str, args))))
                else:
                    yield True, name, [Node(name, "other", tuple(map(str, args)), ())]

    @cached_property
    def delegates(self) -> list[tuple[str, XnnGraph | bytes]]:
        """Backend and payload of each delegate; XNNPACK's is read."""
        inline = self.root.tables("backend_delegate_data", "data")
        found: list[tuple[str, XnnGraph | bytes]] = []
        for delegate in self.plan.tables("delegates", "id processed"):
            place = delegate.table("processed", "location index")
            if place is None:
                raise ValueError("a delegate has no data")
            index = place.number("index")
            payload = self._segment(index) if place.number("location", "<b") else inline[index].raw("data")
            name = delegate.text("id")
            found.append((name, XnnGraph(payload) if name == "XnnpackBackend" else payload))
        return found

    def parameters(self) -> dict[object, tuple[str, int]]:
        """Dtype name and bytes of each constant, by what identifies it: constants that are shared count once."""
        found: dict[object, tuple[str, int]] = {}
        for index in range(len(self.values)):
            tensor = self.tensor(index)
            if tensor is not None and self._constant(tensor):
                dtype = _dtype(tensor)
                found[tensor.number("data_buffer_idx")] = dtype, stored_bytes(dtype, tensor.numbers("sizes"))
        for number, (_, payload) in enumerate(self.delegates):
            if isinstance(payload, XnnGraph):
                found |= {key or (number, i): entry for i, (key, entry) in enumerate(payload.constants())}
        return found

    def constant_values(self) -> Iterator[tuple[str, tuple[int, ...], bytes]]:
        """Dtype name, shape and bytes of each constant: those of kernels, then those of XNNPACK's parts."""
        segment = self.root.table("constant_segment", "segment_index offsets")
        if segment is not None:
            held, offsets = self._segment(segment.number("segment_index")), segment.numbers("offsets", "Q")
            for index in range(len(self.values)):
                tensor = self.tensor(index)
                if tensor is not None and self._constant(tensor):
                    dtype, shape = _dtype(tensor), tensor.numbers("sizes")
                    start = offsets[tensor.number("data_buffer_idx")]
                    yield dtype, shape, held[start : start + stored_bytes(dtype, shape)]
        named = {n.text("key"): n.number("segment_index") for n in self.root.tables("named_data", "key segment_index")}
        for _, payload in self.delegates:
            if isinstance(payload, XnnGraph):
                for dtype, shape, key, inline in payload.constant_values():
                    raw = self._segment(named[key]) if key else inline
                    yield dtype, shape, raw[: stored_bytes(dtype, shape)]

    def _constant(self, tensor: Table) -> bool:
        return tensor.number("data_buffer_idx") > 0 and tensor.table("allocation_info", "memory_id") is None

    def _segment(self, index: int) -> bytes:
        offset, size = self.segments[index]
        start = self.segment_base + offset
        if start + size > len(self.data):
            raise ValueError("a segment lies beyond the end")
        return self.data[start : start + size]

    def _kernel(self, name: str, args: Sequence[int]) -> Node:
        tensors = {i: tensor for i in args if (tensor := self.tensor(i)) is not None}
        values = [str(i) for i, tensor in tensors.items() if not self._constant(tensor)]
        # The last argument is what the kernel writes; one that returns several tensors has a list there.
        return Node(name, self._kernel_kind(name, tensors.values()), tuple(values[:-1]), tuple(values[-1:]))

    def _kernel_kind(self, name: str, tensors: Iterable[Table]) -> Kind:
        if name.startswith("quantized_decomposed::"):
            return "dequantize" if "dequantize" in name else "quantize"
        if name in KERNEL_MOVES:
            return "move"
        return "float" if FLOATS.intersection(map(_dtype, tensors)) else "other"


class XnnGraph:
    """The graph that one XNNPACK delegate was given."""

    def __init__(self, payload: bytes) -> None:
        """Raises ValueError where the payload is shorter than its header says."""
        start, size, self.constant_base = 0, len(payload), 0
        if payload[4:8] == b"XH00":
            start, size, self.constant_base = struct.unpack_from("<III", payload, 10)
            if start + size > len(payload):
                raise ValueError("an XNNPACK part is shorter than its header says")
        data = payload[start : start + size]
        self.payload = payload
        self.root = Table(data, struct.unpack_from("<I", data, 0)[0], GRAPH)
        self.tensors: dict[int, Table] = {}
        for value in self.root.tables("xvalues", "type value"):
            quantized = value.number("type", "<B") == 2
            outer = value.table("value", "tensor_value" if quantized else XNN_TENSOR)
            tensor = outer.table("tensor_value", XNN_TENSOR) if quantized and outer is not None else outer
            if tensor is None:
                raise ValueError("an XNNPACK value is empty")
            self.tensors[tensor.number("id_out")] = tensor

    def nodes(self, part: str, args: list[str]) -> Iterator[Node]:
        """The graph's nodes with their kinds, in order; `args` are what the surrounding program calls its interface."""
        interface = [*sorted(self.root.numbers("input_ids", "I")), *sorted(self.root.numbers("output_ids", "I"))]
        outer = dict(zip(interface, args, strict=True))

        def label(value: int) -> str:
            return outer.get(value, f"{part}: {value}")

        for xnode in self.root.tables("xnodes", "type node"):
            number = xnode.number("type", "<B")
            if not 1 <= number <= len(XNODES):
                yield Node(f"XNNPACK node {number}", "other", (), ())
                continue
            name, fields = XNODES[number - 1]
            node = xnode.table("node", fields)
            if node is None:
                raise ValueError(f"an XNNPACK {name} is empty")
            operands = [field for field in sorted(fields.split()) if field.startswith("input")]
            reads = [node.number(field) for field in operands[: OPERANDS.get(name, len(operands))]]
            reads = [i for i in reads if i in self.tensors and not self._constant(i)]
            written = node.number("output_id")
            yield Node(name, self._kind(name, reads, written), tuple(map(label, reads)), (label(written),))

    def constants(self) -> Iterator[tuple[str, tuple[str, int]]]:
        """Key (empty where it has none), dtype name and bytes of each constant."""
        keys = [entry.text("named_key") for entry in self.root.tables("constant_data", "offset size named_key")]
        for tensor in self.tensors.values():
            index = tensor.number("constant_buffer_idx")
            if index:
                dtype = XNN_DTYPES[tensor.number("datatype", "<h")]
                shape = tensor.numbers("dims", "I")
                yield keys[index] if index < len(keys) else "", (dtype, stored_bytes(dtype, shape))

    def constant_values(self) -> Iterator[tuple[str, tuple[int, ...], str, bytes]]:
        """Dtype name, shape, key and bytes of each constant; with a key the bytes lie in the program's named data."""
        places = self.root.tables("constant_data", "offset size named_key")
        for tensor in self.tensors.values():
            index = tensor.number("constant_buffer_idx")
            if not index:
                continue
            key, raw = "", b""
            if index < len(places):
                place = places[index]
                key = place.text("named_key")
                start = self.constant_base + place.number("offset", "<Q")
                raw = b"" if key else self.payload[start : start + place.number("size", "<Q")]
            yield XNN_DTYPES[tensor.number("datatype", "<h")], tensor.numbers("dims", "I"), key, raw

    def _constant(self, value: int) -> bool:
        return self.tensors[value].number("constant_buffer_idx") > 0

    def _kind(self, name: str, reads: list[int], written: int) -> Kind:
        if name in XNN_MOVES or name.startswith("Concatenate"):
            return "move"
        integer = [self._datatype(value) in XNN_INTEGERS for value in (*reads[:1], written)]
        if name == "Convert":
            kinds: dict[tuple[bool, ...], Kind] = {
                (False, True): "quantize", (True, False): "dequantize", (True, True): "requantize"
            }  # fmt: skip
            return kinds.get(tuple(integer), "move")
        return "int8" if integer[0] else "float"

    def _datatype(self, value: int) -> int:
        return self.tensors[value].number("datatype", "<h")


def _dtype(tensor: Table) -> str:
    number = tensor.number("scalar_type", "<b")
    if number not in DTYPES:
        raise ValueError(f"it has a tensor of torch's scalar type {number}")
    return DTYPES[number]
