"""The builder that lowerings use: values with a layout and a representation, and TFLite ops in order of emission."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite.ir import (
    Graph,
    Info,
    Node,
    Op,
    Perm,
    QParams,
    Shape,
    Tensor,
    Value,
    identity,
)
from edgekit.exporters.tflite.kernel_support import MAX_RANK, data_input, takes
from edgekit.exporters.tflite.layout import CHANNELS_LAST, merge_groups, reshaped_channels, reshaped_order, welcome
from edgekit.exporters.tflite.write.buffer_aliasing import protect
from edgekit.types import axis_order

Operand = Tensor | np.ndarray | None
FLOAT = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
INT32 = np.dtype(np.int32)
INT8 = np.dtype(np.int8)
UINT8 = np.dtype(np.uint8)
LARGEST = 2**31 - 1
# Below this many elements a stored constant is written as float32: a DEQUANTIZE costs more than it saves.
SMALL = 64


def number(value: float, like: Tensor, dtype: Any = np.float32) -> np.ndarray:
    """A number as an operand beside `like`, without more axes: kernels give a scalar the axes of the other operand."""
    return np.full((1,) * min(1, len(like.shape)), value, dtype)


class Builder:
    """Collects TFLite ops while the lowerings run; converts layout and representation lazily, and each once."""

    def __init__(self, graph: Graph, layout: Literal["nchw", "nhwc"], fixed_batch: bool = True) -> None:
        self.graph = graph
        self.fixed_batch = fixed_batch
        self.image_layout = layout
        self.ops: list[Op] = []
        self.notes: list[str] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.source = ""
        self._values: dict[str, Value] = {}
        self._converted: dict[tuple[Any, ...], Any] = {}
        self._names: set[str] = set()
        for name in graph.inputs:
            self._input(name)

    # ---- values -----------------------------------------------------------------------------------------------

    def value(self, name: str) -> Value:
        """The value of an ONNX name; a constant becomes a tensor on first use."""
        if name not in self._values:
            stored, held = self.graph.constants[name], self.graph.held.get(name)
            self._values[name] = Value(
                Tensor(self._unique(name), stored.shape, stored.dtype, stored, held), identity(stored.ndim)
            )
        return self._values[name]

    def bound(self, name: str) -> Value | None:
        """What an ONNX name became, if a node made it."""
        return self._values.get(name)

    def shape(self, name: str) -> Shape:
        """The logical (ONNX) shape of a value."""
        return self.graph.info[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The logical (ONNX) dtype of a value."""
        return self.graph.info[name].dtype

    def array(self, name: str) -> np.ndarray | None:
        """The real values of a constant, or None."""
        return self.graph.array(name)

    def target(self, node: Node, output: int = 0) -> QParams | None:
        """The parameters with which an output of the node is to be held as int8, or None for float."""
        return self.graph.held.get(node.outputs[output])

    def derive(self, name: str, array: np.ndarray) -> str:
        """Add a constant computed from another to the graph; returns its name."""
        derived = f"{name}_derived"
        while derived in self.graph.info:
            derived += "_"
        self.graph.constants[derived] = array
        self.graph.info[derived] = Info(array.shape, array.dtype)
        return derived

    def bind(self, name: str, tensor: Tensor | Value, perm: Perm | None = None) -> None:
        """Give an ONNX name its value, requantized to the parameters that the name is to be held with."""
        value = tensor if isinstance(tensor, Value) else Value(tensor, perm or identity(len(tensor.shape)))
        held = self.graph.held.get(name)
        if held is not None and value.tensor.q != held:
            value = Value(self.as_q(value.tensor, held), value.perm, value.pending)
        if value.shape != self.graph.info[name].shape:
            raise EdgeKitError(
                f"ONNX node '{self.source}' makes '{name}' with shape {list(value.shape)}, and ONNX's own rules say "
                f"{list(self.graph.info[name].shape)}",
                _ANEW,
            )
        if value.tensor.data is None and not value.tensor.name:
            value.tensor.name = self._unique(name)
        self._values[name] = value

    def settle(self, value: Value) -> Value:
        """Apply a pending reshape with a transpose: channels stay last where they come out so, else ONNX's order."""
        if value.pending is None:
            return value
        groups = merge_groups(value.base_shape, value.pending)
        assert groups is not None or value.perm != identity(len(value.perm))
        perm = identity(len(value.perm))
        if groups is not None:
            ordered = sorted(groups, key=lambda group: max((value.axis(a) for a in group[0]), default=-1))
            joined = [axis for group in ordered for axis in group[0]]
            joined = [*(axis for axis in perm if axis not in joined), *joined]
            shape = tuple(value.base_shape[axis] for axis in joined)
            lying = Value(Tensor("", shape, value.tensor.dtype), tuple(joined))
            physical = reshaped_order(lying, value.pending, groups)
            if physical is not None and welcome(physical[0]) == CHANNELS_LAST:
                perm = lying.perm
        settled = self.reshape(Value(self.in_layout(Value(value.tensor, value.perm), perm), perm), value.pending)
        assert settled.pending is None
        return settled

    def in_layout(self, value: Value, perm: Perm) -> Tensor:
        """The tensor of a value in the given physical order, as stored: a transpose, a reshape, or nothing."""
        value = self.settle(value)
        if value.perm == perm:
            return value.tensor
        order = [value.perm.index(axis) for axis in perm]
        tensor = value.tensor
        key = (tensor, "order", *order)
        if key not in self._converted:
            shape = tuple(tensor.shape[axis] for axis in order)
            axis = tensor.q.axis if tensor.q else None
            q = tensor.q.moved(order.index(axis)) if tensor.q and axis is not None else tensor.q
            if tensor.data is not None:
                data = tensor.data.transpose(order)  # a view: the file's writer puts it in order
                result = Tensor(self._unique(tensor.name), shape, tensor.dtype, data, q)
            elif [axis for axis in order if tensor.shape[axis] != 1] == [
                axis for axis in range(len(order)) if tensor.shape[axis] != 1
            ]:
                result = self.raw_reshape(tensor, shape)
            else:
                result = self._transpose(tensor, order)
                result.name = self._unique(f"{tensor.name}_transposed")
                sizes = f" {list(tensor.shape)}" if self.fixed_batch else ""  # an open batch has none
                self.note(f"transpose of '{tensor.name}'{sizes} for ONNX node '{self.source}'")
            self._converted[key] = result
        return self._converted[key]

    def _transpose(self, tensor: Tensor, order: list[int]) -> Tensor:
        """TRANSPOSE; where there are too many axes for it, of the tensor with axes merged that stay neighbors."""
        shape = tuple(tensor.shape[axis] for axis in order)
        shuffle = self._shuffle(tensor, order)
        if shuffle is not None:
            return self.raw_reshape(shuffle, shape)
        if len(order) <= MAX_RANK[""]:
            return self.op("TRANSPOSE", [tensor, np.array(order, np.int32)], shape, tensor.dtype, tensor.q)
        merged, small = self._merged(tensor, order)
        moved_shape = tuple(merged[axis] for axis in small)
        moved = self.op(
            "TRANSPOSE",
            [self.raw_reshape(tensor, merged), np.array(small, np.int32)],
            moved_shape,
            tensor.dtype,
            tensor.q,
        )
        return self.raw_reshape(moved, shape)

    def _shuffle(self, tensor: Tensor, order: list[int]) -> Tensor | None:
        """A channel shuffle of single bytes as two transposes of large planes; None for every other transpose.

        XNNPACK swaps the last two axes one small plane after the other: 2 groups of 58 channels at 28×28 take 50 µs,
        in two steps 8.
        """
        (merged, small) = self._merged(tensor, order)
        if np.dtype(tensor.dtype).itemsize != 1 or small != [0, 2, 1] or min(merged[1:]) > 4 or merged[0] < 8:
            return None
        steps = ([2, 0, 1], [1, 0, 2]) if merged[1] < merged[2] else ([1, 0, 2], [1, 2, 0])
        result = self.raw_reshape(tensor, merged)
        for step in steps:
            moved_shape = tuple(result.shape[axis] for axis in step)
            result = self.op("TRANSPOSE", [result, np.array(step, np.int32)], moved_shape, tensor.dtype, tensor.q)
        return result

    @staticmethod
    def _merged(tensor: Tensor, order: list[int]) -> tuple[Shape, list[int]]:
        """Returns the shape of `tensor` with axes merged that stay neighbors, and the order of what is left."""
        runs: list[list[int]] = []
        for axis in (axis for axis in order if tensor.shape[axis] != 1):
            between = range(runs[-1][-1] + 1, axis) if runs else ()
            if runs and axis > runs[-1][-1] and all(tensor.shape[skipped] == 1 for skipped in between):
                runs[-1].append(axis)
            else:
                runs.append([axis])
        before = sorted(runs)
        return tuple(math.prod(tensor.shape[axis] for axis in run) for run in before), [before.index(r) for r in runs]

    def reshape(self, value: Value, shape: Shape) -> Value:
        """Reshape a value logically; left pending where the physical order does not allow it without a transpose."""
        base = Value(value.tensor, value.perm)
        if shape == base.base_shape:
            return base
        if math.prod(shape) != value.tensor.size:
            raise EdgeKitError(f"ONNX node '{self.source}' reshapes {list(base.base_shape)} to {list(shape)}", _ANEW)
        groups = merge_groups(base.base_shape, shape)
        physical = reshaped_order(base, shape, groups)
        if physical is None:
            return Value(value.tensor, value.perm, shape)
        perm, physical_shape = physical
        return Value(self.raw_reshape(value.tensor, physical_shape), perm)

    def raw_reshape(self, tensor: Tensor, shape: Shape) -> Tensor:
        """Reshape a tensor physically."""
        if tensor.shape == shape:
            return tensor
        key = (tensor, "shape", *shape)
        if key not in self._converted:
            if tensor.data is not None:
                axis = tensor.q.axis if tensor.q is not None else None
                if axis is None:
                    q, data = tensor.q, tensor.data
                else:
                    q, data = reshaped_channels(tensor, shape, axis)
                result = Tensor(self._unique(tensor.name), shape, data.dtype, data.reshape(shape), q)
            else:
                result = self.op(
                    "RESHAPE", [tensor, np.array(shape, np.int32)], shape, tensor.dtype, tensor.q, newShape=list(shape)
                )
                result.name = self._unique(f"{tensor.name}_reshaped")
            self._converted[key] = result
        return self._converted[key]

    def as_float(self, tensor: Tensor) -> Tensor:
        """The tensor as real numbers: DEQUANTIZE for int8 and float16 storage."""
        if tensor.q is None and tensor.dtype != np.float16:
            return tensor
        key = (tensor, "float")
        if key not in self._converted:
            if tensor.data is not None and (tensor.size < SMALL or tensor.dtype == INT32):
                result = self.real_constant(tensor)
            else:
                result = self.op("DEQUANTIZE", [tensor], tensor.shape, FLOAT)
                result.name = self._unique(f"{tensor.name}_float")
            self._converted[key] = result
        return self._converted[key]

    def real_constant(self, tensor: Tensor) -> Tensor:
        """A constant as real numbers in the file: what XNNPACK dequantizes of constants never reaches an output."""
        if tensor.q is None and tensor.dtype != np.float16:
            return tensor
        assert tensor.data is not None
        data = tensor.q.dequantize(tensor.data) if tensor.q else tensor.data.astype(np.float32)
        return Tensor(self._unique(tensor.name), tensor.shape, FLOAT, data)

    def maker(self, tensor: Tensor) -> Op | None:
        """The op that makes a tensor."""
        return next((op for op in reversed(self.ops) if tensor in op.outputs), None)

    def stored_constant(self, tensor: Tensor) -> Tensor | None:
        """What a DEQUANTIZE of a constant reads, or None for every other tensor."""
        maker = self.maker(tensor)
        source = maker.inputs[0] if maker is not None and maker.kind == "DEQUANTIZE" else None
        return source if source is not None and source.data is not None else None

    def as_q(self, tensor: Tensor, q: QParams) -> Tensor:
        """The tensor as int8 with the given per-tensor parameters: QUANTIZE from float, or from other parameters."""
        if tensor.q == q:
            return tensor
        key = (tensor, q)
        if key not in self._converted:
            if tensor.data is not None:
                real = tensor.q.dequantize(tensor.data) if tensor.q else tensor.data.astype(np.float32)
                result = Tensor(self._unique(tensor.name), tensor.shape, INT8, q.quantize(real), q)
            else:
                result = self.op("QUANTIZE", [tensor], tensor.shape, INT8, q)
                result.name = self._unique(f"{tensor.name}_int8")
            self._converted[key] = result
        return self._converted[key]

    def held_as(self, tensor: Tensor, q: QParams | None) -> Tensor:
        """The tensor as int8 with these parameters, or as real numbers for None."""
        return self.as_float(tensor) if q is None else self.as_q(tensor, q)

    # ---- what lowerings ask for --------------------------------------------------------------------------------

    def take(self, name: str, perm: Perm | None = None, q: QParams | Literal["as is"] | None = None) -> Tensor:
        """A value's tensor: in a physical order (default: as ONNX has it), as float, as int8 with q, or as stored."""
        value = self.value(name)
        tensor = self.in_layout(value, identity(len(value.shape)) if perm is None else perm)
        return tensor if q == "as is" else self.held_as(tensor, q)

    def int8(self, name: str) -> QParams | None:
        """The per-tensor parameters of a value held as int8; a one-element float constant gets exact ones."""
        value = self.value(name)
        tensor = value.tensor
        if tensor.q is not None:
            return tensor.q if tensor.q.per_tensor and tensor.dtype == INT8 else None
        real = self.array(name)
        if real is None or real.dtype != FLOAT or real.size != 1 or not np.isfinite(real).all():
            return None
        size = abs(float(real.reshape(())))
        return QParams.of(size / 127 if size else 1.0, 0)

    def common_q(self, node: Node, names: list[str], *numbers: float) -> QParams | None:
        """Parameters for an op that only moves values: what the output asks for, else what all the inputs have.

        The latter must hold the constants among the inputs too, and `numbers`, which the op writes itself: rounded or
        cut to the range of the others they would be other values.
        """
        target = self.target(node)
        if target is not None:
            return target
        held = {self.value(name).tensor.q for name in names if name not in self.graph.constants}
        q = held.pop() if len(held) == 1 else None
        if q is None or not q.per_tensor:
            return None
        constants = [array for name in names if (array := self.array(name)) is not None]
        return q if all(q.holds(array) for array in (*constants, np.array(numbers))) else None

    def layout_of(self, names: list[str], rank: int) -> Perm:
        """The physical order for an op that takes any: that of its largest input of full rank, or what layers want."""
        candidates = [self.settle(self.value(name)) for name in names if name not in self.graph.constants]
        full = [value for value in candidates if len(value.perm) == rank]
        if not full:
            return identity(rank)
        return max(full, key=lambda value: (value.tensor.size, welcome(value.perm))).perm

    def broadcastable(self, name: str, perm: Perm, q: QParams | None) -> Tensor:
        """A value as operand of an op with broadcasting whose result lies in the physical order `perm`."""
        value = self.settle(self.value(name))
        rank = len(perm)
        if len(value.perm) < rank and value.tensor.size > 1 and perm != identity(rank):
            value = self.settle(self.reshape(value, (1,) * (rank - len(value.perm)) + value.shape))
        if len(value.perm) == rank:
            return self.held_as(self.in_layout(value, perm), q)
        return self.held_as(self.in_layout(value, identity(len(value.perm))), q)

    def const(self, array: Any, q: QParams | None = None, name: str = "const") -> Tensor:
        """A constant tensor."""
        array = np.asarray(array)
        return Tensor(self._unique(name), array.shape, array.dtype, array, q)

    def op(
        self,
        kind: str,
        inputs: list[Operand],
        shape: Shape,
        dtype: Any = None,
        q: QParams | None = None,
        **options: Any,
    ) -> Tensor:
        """Emit an op with one output; dtype defaults to int8 where q is given, else to the first input's."""
        if dtype is None:
            first = inputs[0]
            dtype = INT8 if q is not None else first.dtype if first is not None else FLOAT
        output = Tensor("", tuple(int(size) for size in shape), np.dtype(dtype), None, q)
        self.ops_out(kind, inputs, [output], **options)
        return output

    def ops_out(self, kind: str, inputs: list[Operand], outputs: list[Tensor], **options: Any) -> None:
        """Emit an op with the given output tensors."""
        operands = [self.const(item) if isinstance(item, np.ndarray) else item for item in inputs]
        rank = max((len(tensor.shape) for tensor in (*operands, *outputs) if tensor is not None), default=0)
        if rank > MAX_RANK.get(kind, MAX_RANK[""]) and kind != "RESHAPE":
            raise EdgeKitError(
                f"TFLite's {kind} does not take the {rank} axes that ONNX node '{self.source}' needs",
                "merge axes there, or export with --format onnx or executorch",
            )
        if any(tensor.size > LARGEST for tensor in outputs):
            raise EdgeKitError(f"ONNX node '{self.source}' needs a tensor larger than TFLite's limit of 2 GB", _ANEW)
        data = data_input(kind, operands)
        if data is not None and data.q is None and not takes(kind, data.dtype):
            raise EdgeKitError(
                f"TFLite has no {kind} for {data.dtype}, which ONNX node '{self.source}' needs",
                "compute in float32 or int32 there, or export with --format onnx or executorch",
            )
        self.ops.append(Op(kind, operands, outputs, options, self.source))

    def activate(self, tensor: Tensor, activation: str) -> Tensor:
        """Apply a fused activation as an op of its own."""
        return tensor if activation == "NONE" else self.op(activation, [tensor], tensor.shape, q=tensor.q)

    def note(self, text: str) -> None:
        """Record something worth saying to the user."""
        self.notes.append(text)

    @contextmanager
    def subgraph(self) -> Iterator[list[Op]]:
        """Collect the ops of a loop's condition or body: what was converted outside is not read there."""
        outside = self.ops, self._converted
        self.ops, self._converted = [], {}
        try:
            yield self.ops
        finally:
            self.ops, self._converted = outside

    # ---- edges ------------------------------------------------------------------------------------------------

    def _input(self, name: str) -> None:
        info = self.graph.info[name]
        dtype = info.dtype
        if dtype == np.float16 or dtype.kind not in "fiub":
            raise EdgeKitError(
                f"the ONNX model's input '{name}' is {dtype}, which TFLite export does not handle",
                "export the model with float32 inputs",
            )
        held = self.graph.held.get(name)
        perm = axis_order(len(info.shape), self.image_layout)
        shape = tuple(info.shape[axis] for axis in perm)
        stored = held.unsigned() if held and dtype == UINT8 else held
        dtype = FLOAT64 if name in self.graph.wide else dtype
        tensor = Tensor(self._unique(name), shape, dtype, None, stored)
        self.inputs.append(tensor)
        if held != stored:
            tensor = self.op("QUANTIZE", [tensor], shape, INT8, held)
            tensor.name = self._unique(f"{name}_int8")
        if name in self.graph.wide:
            tensor = self.op("CAST", [tensor], shape, FLOAT)
            tensor.name = self._unique(f"{name}_float32")
        self._values[name] = Value(tensor, perm)

    def finish(self) -> None:
        """Bring the graph outputs to their layout and to real numbers, under their ONNX names; drop unread ops."""
        if self.graph.narrowed:
            self.note("the ONNX model's float64 values are computed in float32")
        taken = set(self.inputs)
        named = {tensor.name: tensor for op in self.ops for tensor in op.outputs}
        for name in self.graph.outputs:
            self.source = name
            value = self.settle(self.value(name))
            if 0 in value.shape:
                raise EdgeKitError(f"the output '{name}' of the ONNX model is empty, with shape {list(value.shape)}")
            tensor = self.in_layout(value, axis_order(len(value.shape), self.image_layout))
            dtype = self.graph.info[name].dtype
            if dtype == UINT8 and tensor.q is not None:
                tensor = self.op("QUANTIZE", [tensor], tensor.shape, UINT8, tensor.q.unsigned())
            elif dtype != INT8:
                tensor = self.real_constant(tensor) if tensor.data is not None else self.as_float(tensor)
                stored = self.stored_constant(tensor)
                tensor = tensor if stored is None else self.real_constant(stored)
            if name in self.graph.wide:
                tensor = self.op("CAST", [tensor], tensor.shape, FLOAT64)
            if tensor in taken or tensor.data is not None:
                # A graph output needs a tensor of its own: a copy is the cheapest op that makes one.
                tensor = self.op(
                    "RESHAPE",
                    [tensor, np.array(tensor.shape, np.int32)],
                    tensor.shape,
                    tensor.dtype,
                    tensor.q,
                    newShape=list(tensor.shape),
                )
            taken.add(tensor)
            if named.get(name, tensor) is not tensor:
                named[name].name = self._unique(f"{name}_int8")  # tools find tensors by their names
            tensor.name = name
            self.outputs.append(tensor)
        read: set[Tensor] = set(self.outputs)
        kept: list[Op] = []
        for op in reversed(self.ops):
            if any(tensor in read for tensor in op.outputs):
                kept.append(op)
                read.update(tensor for tensor in op.inputs if tensor is not None)
        self.ops = protect(kept[::-1], self.outputs)

    def release(self) -> None:
        """Forget all values, so that only the operators hold the constants that they read."""
        self._values.clear()
        self._converted.clear()
        self.graph.constants.clear()

    def _unique(self, name: str) -> str:
        unique, number = name, 1
        while unique in self._names:
            number += 1
            unique = f"{name}_{number}"
        self._names.add(unique)
        return unique


_ANEW = "the model contradicts itself: export it anew"
