"""Screen an ONNX graph before anything runs, checks or infers it: nesting, calls, and values that are there or not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf.message import Message
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto

from edgekit.errors import EdgeKitError
from edgekit.screening import limits
from edgekit.types import stored_bytes

DTYPE_NAMES = {"float": "float32", "double": "float64"}
# Where a tensor keeps its values when not as raw bytes; every other type keeps them as int32.
FIELDS = {
    "float32": "float_data", "complex64": "float_data", "float64": "double_data", "complex128": "double_data",
    "int64": "int64_data", "uint32": "uint64_data", "uint64": "uint64_data",
}  # fmt: skip
DEEPEST_CALL = 64  # functions that call one another


def screen(model: ModelProto, path: Path, beside: bool = True) -> None:
    """Raises EdgeKitError where a model nests or calls without bounds, or has tensors without their values.

    With `beside` values in other files have to lie in the folder of `path`, and to be as many as the shapes say.
    """
    what = str(path)
    _check_values_given(model, what)
    _Calls(model, what).check()
    folder = path.parent.resolve()
    asked, files = 0, set()
    for tensor in tensors(model):
        expected = expected_bytes(tensor, what)
        if tensor.data_location == TensorProto.EXTERNAL:
            if not beside:
                continue
            files.add(_beside(tensor, folder, what, expected))
            asked += expected
        else:
            _check_values(tensor, what, expected)
    stored = sum(file.stat().st_size for file in files)
    if asked > limits.ARCHIVE_GROWTH * stored + limits.ARCHIVE_SLACK:
        raise EdgeKitError(f"{what} reads {asked:,} bytes out of {stored:,} beside it", limits.UNTRUSTED)


def _check_values_given(model: ModelProto, what: str) -> None:
    """Inputs and outputs have names of a length that can be shown, and types that there are."""
    for given in (*model.graph.input, *model.graph.output):
        if len(given.name) > limits.NAME_CHARACTERS:
            raise EdgeKitError(f"{what} has a name of {len(given.name):,} characters", limits.UNTRUSTED)
        if given.type.tensor_type.elem_type not in TensorProto.DataType.values():
            raise EdgeKitError(
                f"{given.name!r} in {what} is of a type that ONNX does not have ({given.type.tensor_type.elem_type})",
                "export it again",
            )


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model: initializers and attributes, those of subgraphs and functions too."""
    pending: list[Message] = [model.graph, *model.functions]
    while pending:
        part = pending.pop()
        if not isinstance(part, FunctionProto):
            yield from part.initializer
            for sparse in part.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for node in part.node:
            for attribute in node.attribute:
                yield from _attribute_tensors(attribute)
                pending += _graphs(attribute)


def dtype_of(tensor: TensorProto) -> str:
    """The name of a tensor's type; raises ValueError for a number that is none."""
    name = TensorProto.DataType.Name(tensor.data_type).lower()
    return DTYPE_NAMES.get(name, name)


def expected_bytes(tensor: TensorProto, what: str) -> int:
    """The bytes that a tensor's shape stands for, 0 for text. Raises EdgeKitError for a shape that no tensor has."""
    if min(tensor.dims, default=0) < 0 or len(tensor.dims) > limits.RANK:
        raise EdgeKitError(f"the tensor {tensor.name!r} in {what} has a shape that no tensor has", limits.UNTRUSTED)
    dtype = dtype_of(tensor)
    if dtype == "string":
        return 0
    if dtype == "undefined":
        raise EdgeKitError(f"the tensor {tensor.name!r} in {what} has no type", limits.UNTRUSTED)
    return stored_bytes(dtype, tensor.dims)


def _attribute_tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    lone = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for sparse in (*lone, *attribute.sparse_tensors):
        yield from (sparse.values, sparse.indices)


def _graphs(attribute: AttributeProto) -> list[Message]:
    return [*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs]


def _check_values(tensor: TensorProto, what: str, expected: int) -> None:
    dtype, count = dtype_of(tensor), math.prod(tensor.dims)
    if dtype == "string":
        held, wanted = len(tensor.string_data), count
    elif tensor.HasField("raw_data"):
        held, wanted = len(tensor.raw_data), expected
    else:
        packed = dtype in ("int4", "uint4", "float4e2m1", "int2", "uint2")
        held = len(getattr(tensor, FIELDS.get(dtype, "int32_data")))
        wanted = expected if packed else 2 * count if dtype.startswith("complex") else count
    if held != wanted:
        raise EdgeKitError(
            f"the tensor {tensor.name!r} in {what} has {held:,} values or bytes in place of {wanted:,}",
            "copy the file again, or export it again",
        )


def _beside(tensor: TensorProto, folder: Path, what: str, expected: int) -> Path:
    """The file beside the model that holds a tensor's values; EdgeKitError where it is elsewhere, or does not."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    target = folder / location
    if not location or not target.resolve().is_relative_to(folder) or Path(location).is_absolute():
        raise EdgeKitError(
            f"{what} keeps the weights {tensor.name!r} outside its own folder, at {location!r}",
            "put the weights file beside the model and save it again",
        )
    if not target.is_file():
        raise EdgeKitError(
            f"{what} needs its weights file {location!r}, which is not there", "copy it beside the model"
        )
    if not all(entries.get(key, "0").isdecimal() for key in ("offset", "length")):
        raise EdgeKitError(f"{what} has no place for the weights {tensor.name!r}", "save it again")
    size, offset = target.stat().st_size, int(entries.get("offset", "0"))
    length = int(entries.get("length", "0")) or size - offset
    if length != expected or offset + length > size:
        raise EdgeKitError(
            f"the weights {tensor.name!r} of {what} take {expected:,} bytes, and {location!r} gives them "
            f"{min(length, max(size - offset, 0)):,}",
            "copy both files again, or export them again",
        )
    return target


class _Calls:
    """How deep a model nests, and how many nodes there are once every call of a function is written out."""

    def __init__(self, model: ModelProto, what: str) -> None:
        self.model, self.what = model, what
        self.functions = {(f.domain, f.name): f for f in model.functions}
        self.known: dict[tuple[str, str], tuple[int, int]] = {}
        self.open: list[tuple[str, str]] = []

    def check(self) -> None:
        """Raises EdgeKitError where either is beyond its limit."""
        self.measure(self.model.graph.node, 0)
        for key in self.functions:
            self.function(key, 0)

    def measure(self, nodes: Iterable[NodeProto], depth: int) -> tuple[int, int]:
        """The nodes written out, and the levels of subgraphs, below a graph that lies `depth` levels down."""
        count, levels = 0, 0
        for node in nodes if depth <= limits.SUBGRAPHS else ():
            count += 1
            inner = [(1, self.measure(g.node, depth + 1)) for a in node.attribute for g in _graphs(a)]
            key = (node.domain, node.op_type)
            if key in self.functions:
                inner.append((0, self.function(key, depth)))
            count += sum(found for _, (found, _) in inner)
            levels = max([levels, *(level + below for level, (_, below) in inner)])
            if depth + levels > limits.SUBGRAPHS:
                raise EdgeKitError(
                    f"{self.what} nests If, Loop or Scan more than {limits.SUBGRAPHS} levels deep",
                    "simplify the model: each level doubles what a runtime has to do",
                )
            if count > limits.NODES:
                raise EdgeKitError(f"{self.what} has more than {limits.NODES:,} nodes", limits.UNTRUSTED)
        return count, levels

    def function(self, key: tuple[str, str], depth: int) -> tuple[int, int]:
        """The same of a function's body."""
        if key in self.open or len(self.open) > DEEPEST_CALL:
            raise EdgeKitError(f"{self.what} has functions that call themselves: {key[1]}", limits.UNTRUSTED)
        if key not in self.known:
            self.open.append(key)
            self.known[key] = self.measure(self.functions[key].node, 0)
            self.open.pop()
        return self.known[key]
