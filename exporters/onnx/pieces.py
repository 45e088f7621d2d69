"""ONNX files in pieces: a large model's bytes are made one weight at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import onnx
import onnx_ir as ir

from edgekit.errors import EdgeKitError
from edgekit.exporters.onnx.graph import check, is_light

LARGEST = 2**31 - 1  # bytes of a protobuf message
LENGTH_DELIMITED = 2  # protobuf's wire type of messages and bytes

Piece: TypeAlias = bytes | ir.TensorProtocol


def file_pieces(model: ir.Model) -> Iterator[bytes]:
    """Returns the bytes of a model's file, checked, in pieces with each large weight alone; `model` is used up.

    Together they are what SerializeToString makes of `model` as a proto, which takes three times the weights' memory.
    Raises EdgeKitError for more than a file can hold.
    """
    heavy: dict[str, ir.TensorProtocol] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and not is_light(tensor):
            heavy[name] = tensor
            value.const_value = _emptied(name, tensor)
    proto = ir.to_proto(model)
    check(proto)
    tensors = [_tensor(tensor, heavy.get(tensor.name)) for tensor in proto.graph.initializer]
    front, back = _around(proto.graph, "initializer")
    fields = [piece for tensor in tensors for piece in _field(proto.graph, "initializer", tensor)]
    graph = [front, *fields, back]
    front, back = _around(proto, "graph")
    pieces = [front, *_field(proto, "graph", graph), back]
    if (size := _size(pieces)) > LARGEST:
        raise EdgeKitError(
            f"the ONNX file would take {size / 1e9:.1f} GB, and ends at 2 GB",
            "export with --precision int8 or fp16, or with --format executorch",
        )
    return (piece if isinstance(piece, bytes) else piece.tobytes() for piece in pieces)


def _emptied(name: str, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """What stands for a weight: all but its values."""
    shape, said = tensor.shape.numpy(), tensor.doc_string or None
    return ir.TensorProtoTensor(onnx.TensorProto(name=name, data_type=tensor.dtype.value, dims=shape, doc_string=said))


def _tensor(proto: onnx.TensorProto, content: ir.TensorProtocol | None) -> list[Piece]:
    if content is None:
        return [proto.SerializeToString()]
    front, back = _around(proto, "raw_data")
    return [front, *_field(proto, "raw_data", [content]), back]


def _around(message: Any, name: str) -> tuple[bytes, bytes]:
    """The fields of a message in front of one and behind it, as they are serialized: in the order of their numbers."""
    number = message.DESCRIPTOR.fields_by_name[name].number
    front, back = type(message)(), type(message)()
    front.CopyFrom(message)
    back.CopyFrom(message)
    for field, _ in message.ListFields():
        if field.number >= number:
            front.ClearField(field.name)
        if field.number <= number:
            back.ClearField(field.name)
    return front.SerializeToString(), back.SerializeToString()


def _field(message: Any, name: str, content: Sequence[Piece]) -> list[Piece]:
    """A field as it is serialized: its number and wire type, its size, and its content."""
    number = message.DESCRIPTOR.fields_by_name[name].number
    return [_varint(number << 3 | LENGTH_DELIMITED) + _varint(_size(content)), *content]


def _size(pieces: Sequence[Piece]) -> int:
    return sum(len(piece) if isinstance(piece, bytes) else piece.nbytes for piece in pieces)


def _varint(value: int) -> bytes:
    """A number as protobuf spells it: seven bits a byte, the lowest first."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
