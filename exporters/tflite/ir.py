"""The two graphs of the converter: ONNX nodes as read and simplified, and TFLite tensors and ops as written."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import numpy as np

EXACT = 1e-6  # relative
Perm = tuple[int, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class QParams:
    """Affine quantization, real = scale · (stored − zero_point); `axis` is None for per-tensor parameters."""

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int | None = None

    @classmethod
    def of(cls, scale: Any, zero_point: Any, axis: int | None = None) -> QParams:
        """Build from arrays or scalars; scales keep their float32 value exactly, one zero point serves all scales."""
        scales = np.asarray(scale, np.float32).reshape(-1)
        zeros = np.broadcast_to(np.asarray(zero_point, np.int64).reshape(-1), scales.shape)
        return cls(tuple(map(float, scales)), tuple(map(int, zeros)), axis)

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 0."""
        return not any(self.zero_point)

    @property
    def per_tensor(self) -> bool:
        """Whether one scale and zero point hold for the whole tensor."""
        return self.axis is None

    def moved(self, axis: int | None) -> QParams:
        """The same parameters along another axis."""
        return QParams(self.scale, self.zero_point, axis)

    def unsigned(self) -> QParams:
        """The parameters with which uint8 holds the same real numbers."""
        return QParams(self.scale, tuple(zero + 128 for zero in self.zero_point), self.axis)

    def along(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point shaped to broadcast against a tensor of the given rank."""
        shape = [1] * rank
        if self.axis is not None:
            shape[self.axis] = -1
        elif rank == 0:
            shape = []
        return np.array(self.scale, np.float32).reshape(shape), np.array(self.zero_point, np.int64).reshape(shape)

    def quantize(self, array: np.ndarray, dtype: Any = np.int8) -> np.ndarray:
        """ONNX QuantizeLinear: round half to even, saturate."""
        scale, zero = self.along(array.ndim)
        info = np.iinfo(dtype)
        stored = np.rint(array.astype(np.float32) / scale).astype(np.float64) + zero
        return np.asarray(np.clip(stored, info.min, info.max)).astype(dtype)

    def dequantize(self, stored: np.ndarray) -> np.ndarray:
        """ONNX DequantizeLinear: float32."""
        scale, zero = self.along(stored.ndim)
        return np.asarray(np.asarray(stored.astype(np.int64) - zero).astype(np.float32) * scale, np.float32)

    def holds(self, array: np.ndarray) -> bool:
        """Whether int8 with these per-tensor parameters is these real numbers, but for rounding in float32."""
        return np.allclose(self.dequantize(self.quantize(array)), array, rtol=EXACT, atol=0)

    def bounds(self) -> tuple[float, float]:
        """Smallest and largest real number that an int8 tensor with these per-tensor parameters holds."""
        return self.scale[0] * (-128 - self.zero_point[0]), self.scale[0] * (127 - self.zero_point[0])


@dataclass
class Node:
    """One ONNX node: "" stands for an absent optional input or output; `activation` is a fused TFLite activation.

    `dynamic` marks a layer whose input is quantized at run time, with a scale of its own each time.
    """

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any] = field(default_factory=dict)
    activation: str = "NONE"
    qparams: QParams | None = None
    dynamic: bool = False

    def __str__(self) -> str:
        return f"'{self.op}' (node '{self.name}')"


@dataclass(frozen=True)
class Info:
    """Static shape and numpy dtype of an ONNX value."""

    shape: Shape
    dtype: np.dtype


@dataclass
class Graph:
    """A simplified ONNX graph in topological order.

    `constants` holds arrays as stored: a float32 value may be stored as int8 or int32 (with an entry in `held`) or as
    float16. `held` maps a float value to the parameters with which it is held as int8, and `stored` the name of an int8
    tensor of the model to the float value that it is. `wide` holds the inputs and outputs that are float64 in the
    model, and `narrowed` says that some value is: all of them are float32 here. `factors` names the two matrices that a
    constant is the product of, where that takes more room than they do.
    """

    nodes: list[Node]
    constants: dict[str, np.ndarray]
    info: dict[str, Info]
    inputs: list[str]
    outputs: list[str]
    held: dict[str, QParams] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    wide: set[str] = field(default_factory=set)
    narrowed: bool = False
    factors: dict[str, tuple[str, str]] = field(default_factory=dict)

    def readers(self) -> dict[str, list[Node]]:
        """Nodes by the value that they read; a node that reads a value twice is listed twice."""
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in filter(None, node.inputs):
                readers.setdefault(name, []).append(node)
        return readers

    def producers(self) -> dict[str, Node]:
        """The node that makes each value."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    def array(self, name: str) -> np.ndarray | None:
        """A constant's real values (dequantized, float16 widened), or None if the value is not constant."""
        stored = self.constants.get(name)
        if stored is None:
            return None
        if name in self.held:
            return self.held[name].dequantize(stored)
        return stored.astype(self.info[name].dtype, copy=False)


@dataclass(eq=False)
class Tensor:
    """A TFLite tensor: physical shape, stored dtype, constant data or None.

    `signature` is the shape with −1 for a size that may be changed, where there is one.
    """

    name: str
    shape: Shape
    dtype: np.dtype
    data: np.ndarray | None = None
    q: QParams | None = None
    signature: Shape | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Value:
    """An ONNX value on its way through TFLite: physical axis i of `tensor` holds logical axis `perm[i]`.

    `pending` is the shape of a reshape that still has to be applied to the logical axes: it is left open where the
    physical order of the axes forbids it, so that a fully connected layer can reorder its weights instead.
    """

    tensor: Tensor
    perm: Perm
    pending: Shape | None = None

    @property
    def shape(self) -> Shape:
        """Logical shape, a pending reshape included."""
        if self.pending is not None:
            return self.pending
        return self.base_shape

    @property
    def base_shape(self) -> Shape:
        """Logical shape before a pending reshape."""
        shape = [0] * len(self.perm)
        for physical, logical in enumerate(self.perm):
            shape[logical] = self.tensor.shape[physical]
        return tuple(shape)

    def axis(self, logical: int) -> int:
        """Physical position of a logical axis (negative counts from the end)."""
        return self.perm.index(logical % len(self.perm))


@dataclass(eq=False)
class Op:
    """One TFLite operator; `source` is the ONNX node that it came from. A loop's options hold its subgraphs."""

    kind: str
    inputs: list[Tensor | None]
    outputs: list[Tensor]
    options: Mapping[str, Any]
    source: str


@dataclass(eq=False)
class Subgraph:
    """The condition or the body of a loop: operators in order, and the tensors that it is given and gives."""

    name: str
    ops: list[Op]
    inputs: list[Tensor]
    outputs: list[Tensor]


def subgraphs(ops: Iterable[Op]) -> list[Subgraph]:
    """The subgraphs of loops, each once."""
    return list(dict.fromkeys(value for op in ops for value in op.options.values() if isinstance(value, Subgraph)))


def all_ops(ops: Sequence[Op]) -> list[Op]:
    """Operators, and those inside loops."""
    return [*ops, *(op for subgraph in subgraphs(ops) for op in subgraph.ops)]


def identity(rank: int) -> Perm:
    """The permutation of a value that lies as ONNX has it."""
    return tuple(range(rank))


def channels_last(rank: int) -> Perm:
    """The permutation that moves axis 1 to the end: NCHW stored as NHWC."""
    return (0, *range(2, rank), 1)


def unused(name: str, taken: Container[str]) -> str:
    """Returns `name`, or one like it that is not `taken`."""
    return next(each for each in chain([name], (f"{name}_{i}" for i in count(1))) if each not in taken)
