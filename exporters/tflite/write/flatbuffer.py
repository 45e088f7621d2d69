"""Write TFLite ops and tensors as a flatbuffer."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite.ir import Op, Subgraph, Tensor, all_ops, subgraphs
from edgekit.exporters.tflite.versions import version

DTYPES = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.float16): schema.TensorType.FLOAT16,
    np.dtype(np.float64): schema.TensorType.FLOAT64,
    np.dtype(np.int8): schema.TensorType.INT8,
    np.dtype(np.uint8): schema.TensorType.UINT8,
    np.dtype(np.int16): schema.TensorType.INT16,
    np.dtype(np.uint16): schema.TensorType.UINT16,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.uint32): schema.TensorType.UINT32,
    np.dtype(np.int64): schema.TensorType.INT64,
    np.dtype(np.uint64): schema.TensorType.UINT64,
    np.dtype(np.bool_): schema.TensorType.BOOL,
}
# The options table of an operator, where its name is not the operator's in CamelCase.
OPTIONS = {
    "CONV_2D": "Conv2DOptions",
    "CONV_3D": "Conv3DOptions",
    "CONV_3D_TRANSPOSE": "Conv3DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "SUM": "ReducerOptions",
    "REDUCE_MAX": "ReducerOptions",
    "REDUCE_MIN": "ReducerOptions",
    "REDUCE_PROD": "ReducerOptions",
    "REDUCE_ANY": "ReducerOptions",
    "REDUCE_ALL": "ReducerOptions",
    "MAXIMUM": "MaximumMinimumOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "PADV2": "PadV2Options",
    "SELECT_V2": "SelectV2Options",
    "TOPK_V2": "TopKV2Options",
    "REVERSE_V2": "ReverseV2Options",
    "BATCH_MATMUL": "BatchMatMulOptions",
}
ENUMS = {
    "padding": schema.Padding,
    "fusedActivationFunction": schema.ActivationFunctionType,
    "mode": schema.MirrorPadMode,
}
ALIGNMENT = 16
LARGEST = 2**31 - 2**26  # bytes of weights: the rest is for the graph
_SMALLER = "export with --precision int8 or fp16, or with --format onnx"
NO_BUFFER = 0  # the empty buffer of every tensor that is not constant
DIGESTED = 1 << 20  # bytes of a view that are copied at once


class _Buffer(schema.BufferT):
    """A buffer whose data start on a 16-byte boundary, as the schema asks and the generated Pack forgets.

    The data may be a view of any order: they are put in order one buffer at a time.
    """

    data: np.ndarray | None

    def Pack(self, builder: flatbuffers.Builder) -> int:
        if self.data is None:
            schema.BufferStart(builder)
            return schema.BufferEnd(builder)
        raw, self.data = _bytes(self.data), None
        builder.StartVector(1, len(raw), ALIGNMENT)
        builder.head = builder.Head() - len(raw)
        builder.Bytes[builder.Head() : builder.Head() + len(raw)] = raw
        vector = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


class _Shared(flatbuffers.Builder):
    """A builder that writes equal vectors once: tables may point at one.

    Every int8 weight and bias has a zero point of eight bytes for each channel, which are all 0. Its memory is taken as
    it is written to, from the end, while constants are let go of.
    """

    def __init__(self, size: int) -> None:
        super().__init__(0)
        self.Bytes = mmap.mmap(-1, size)
        self.head = size
        self.vectors: dict[tuple[str, bytes], int] = {}

    def CreateNumpyVector(self, x: np.ndarray) -> int:
        key = (x.dtype.str, x.tobytes())
        if key not in self.vectors:
            self.vectors[key] = super().CreateNumpyVector(x)
        return self.vectors[key]


def write(
    ops: list[Op],
    inputs: list[Tensor],
    outputs: list[Tensor],
    names: tuple[list[str], list[str]],
    metadata: Mapping[str, bytes],
) -> memoryview:
    """Write a model of one subgraph and those of its loops.

    `names` are the input and output names of signature `serving_default`. `metadata` goes into
    buffers that the file lists by name. The tensors lose their data, so that memory holds each constant once.
    """
    tensors = {tensor for op in all_ops(ops) for tensor in op.inputs if tensor is not None}
    check_size(sum(tensor.data.nbytes for tensor in tensors if tensor.data is not None))
    return _Writer().model(ops, inputs, outputs, names, metadata)


def check_size(size: int) -> None:
    """Raises EdgeKitError for more bytes of weights than a file can hold."""
    if size > LARGEST:
        raise EdgeKitError(f"the weights take {size / 1e9:.1f} GB, and a TFLite file ends at 2 GB", _SMALLER)


class _Writer:
    def __init__(self) -> None:
        self.tensors: list[schema.TensorT] = []  # of the subgraph that is being written
        self.index: dict[Tensor, int] = {}
        self.numbers: dict[Subgraph, int] = {}
        self.held: dict[Tensor, int] = {}  # constant → buffer
        self.buffers: list[schema.BufferT] = [_Buffer()]
        self.shared: dict[bytes, int] = {}  # digest of the content → buffer
        self.codes: dict[tuple[str, int], int] = {}

    def model(
        self,
        ops: list[Op],
        inputs: list[Tensor],
        outputs: list[Tensor],
        names: tuple[list[str], list[str]],
        metadata: Mapping[str, bytes],
    ) -> memoryview:
        self.numbers = {subgraph: number for number, subgraph in enumerate(subgraphs(ops), start=1)}
        main = self.subgraph(Subgraph("main", ops, inputs, outputs))
        places = self.index
        signature = schema.SignatureDefT()
        signature.signatureKey = "serving_default"
        signature.subgraphIndex = 0
        signature.inputs = [_named(name, places[tensor]) for name, tensor in zip(names[0], inputs, strict=True)]
        signature.outputs = [_named(name, places[tensor]) for name, tensor in zip(names[1], outputs, strict=True)]
        model = schema.ModelT()
        model.version = 3
        model.description = "EdgeKit"
        model.subgraphs = [main, *map(self.subgraph, self.numbers)]
        model.metadata = [self.metadata(name, content) for name, content in metadata.items()]
        model.buffers = self.buffers
        model.operatorCodes = [_code(kind, version) for kind, version in self.codes]
        model.signatureDefs = [signature]
        size = sum(buffer.data.nbytes for buffer in self.buffers if buffer.data is not None)
        written = [tensor for subgraph in model.subgraphs for tensor in subgraph.tensors]
        scales = sum(len(tensor.quantization.scale) for tensor in written if tensor.quantization is not None)
        builder = _Shared(size + 65536 + 512 * (len(written) + len(all_ops(ops))) + 16 * scales)
        builder.Finish(model.Pack(builder), b"TFL3")
        return memoryview(builder.Bytes)[builder.Head() :]

    def subgraph(self, subgraph: Subgraph) -> schema.SubGraphT:
        self.tensors, self.index = [], {}
        written = schema.SubGraphT()
        written.name = subgraph.name
        written.inputs = [self.tensor(tensor) for tensor in subgraph.inputs]
        written.operators = [self.operator(op) for op in subgraph.ops]
        written.outputs = [self.tensor(tensor) for tensor in subgraph.outputs]
        written.tensors = self.tensors
        return written

    def operator(self, op: Op) -> schema.OperatorT:
        operator = schema.OperatorT()
        operator.inputs = [-1 if tensor is None else self.tensor(tensor) for tensor in op.inputs]
        operator.outputs = [self.tensor(tensor) for tensor in op.outputs]
        operator.intermediates = []
        operator.opcodeIndex = self.codes.setdefault((op.kind, version(op)), len(self.codes))
        name = OPTIONS.get(op.kind, "".join(part.capitalize() for part in op.kind.split("_")) + "Options")
        kind = getattr(schema.BuiltinOptions, name, None)
        if kind is None:
            if op.options:
                raise ValueError(f"{op.kind} has no options table")
            return operator
        operator.builtinOptionsType = kind
        operator.builtinOptions = getattr(schema, f"{name}T")()
        for key, value in op.options.items():
            if not hasattr(operator.builtinOptions, key):
                raise ValueError(f"{name} has no field {key}")
            if isinstance(value, Subgraph):
                value = self.numbers[value]
            setattr(operator.builtinOptions, key, getattr(ENUMS[key], value) if isinstance(value, str) else value)
        return operator

    def tensor(self, tensor: Tensor) -> int:
        if tensor in self.index:
            return self.index[tensor]
        if tensor.data is not None:
            self.held[tensor] = self.buffer(tensor.data)
            tensor.data = None
        written = schema.TensorT()
        written.name = tensor.name or f"tensor_{len(self.tensors)}"
        written.shape = np.array(tensor.shape, np.int32)
        written.hasRank = True
        written.type = DTYPES[tensor.dtype]
        written.buffer = self.held.get(tensor, NO_BUFFER)
        written.quantization = _quantization(tensor)
        if tensor.signature is not None and -1 in tensor.signature:
            written.shapeSignature = np.array(tensor.signature, np.int32)
        self.index[tensor] = len(self.tensors)
        self.tensors.append(written)
        return self.index[tensor]

    def metadata(self, name: str, content: bytes) -> schema.MetadataT:
        written = schema.MetadataT()
        written.name = name
        written.buffer = self.buffer(np.frombuffer(content, np.uint8))
        return written

    def buffer(self, data: np.ndarray) -> int:
        key = _digest(data)
        if key not in self.shared:
            buffer = _Buffer()
            buffer.data = data
            self.shared[key] = len(self.buffers)
            self.buffers.append(buffer)
        return self.shared[key]


def _digest(data: np.ndarray) -> bytes:
    """What tells constants apart, however they lie in memory; a view is copied in parts."""
    if data.flags.c_contiguous:
        return hashlib.sha256(_bytes(data)).digest()
    digest, rows = hashlib.sha256(), max(1, DIGESTED // data[:1].nbytes)
    for start in range(0, len(data), rows):
        digest.update(_bytes(data[start : start + rows]))
    return digest.digest()


def _bytes(data: np.ndarray) -> memoryview:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data


def _quantization(tensor: Tensor) -> schema.QuantizationParametersT | None:
    if tensor.q is None:
        return None
    written = schema.QuantizationParametersT()
    written.scale = np.array(tensor.q.scale, np.float32)
    written.zeroPoint = np.array(tensor.q.zero_point, np.int64)
    written.quantizedDimension = tensor.q.axis or 0
    return written


def _code(kind: str, version: int) -> schema.OperatorCodeT:
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, kind)
    # Readers from before 2020 look only at the one-byte field, which ends at 127.
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    code.version = version
    return code


def _named(name: str, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name = name
    entry.tensorIndex = index
    return entry
