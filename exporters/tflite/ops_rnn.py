"""Recurrent layers, unrolled over time; a long LSTM that starts from zeros is the runtime's own op.

In a WHILE loop instead, each step would copy all outputs: 500 steps of 128 numbers take 16 ms in place of 1.4 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.exporters.tflite.builder import Builder
from edgekit.exporters.tflite.ir import Node, QParams, Tensor, identity
from edgekit.exporters.tflite.ops_activation import add, mul, scaled
from edgekit.exporters.tflite.registry import lowers, unsupported
from edgekit.exporters.tflite.sequence_lstm import LONG, closes, sequence_lstm

COPIES = 2**22  # bytes of weights that may be kept once per time step
ACTIVATIONS = {"Sigmoid": "LOGISTIC", "Tanh": "TANH", "Relu": "RELU"}


@dataclass(frozen=True)
class Matrix:
    """Weights [outputs, features] as stored: float32, float16, or int8 with one scale or one per output."""

    stored: np.ndarray
    q: QParams | None

    def __len__(self) -> int:
        return len(self.stored)

    def rows(self, part: slice) -> Matrix:
        """Some of the outputs."""
        q = self.q
        if q is not None and q.axis is not None:
            q = QParams(q.scale[part], q.zero_point[part], q.axis)
        return Matrix(np.ascontiguousarray(self.stored[part]), q)

    def real(self) -> np.ndarray:
        """As float32."""
        return self.q.dequantize(self.stored) if self.q is not None else self.stored.astype(np.float32, copy=False)

    def tensor(self, b: Builder) -> Tensor:
        """As a constant."""
        return b.const(self.stored, self.q, "weights")


@dataclass(frozen=True)
class Cell:
    """One direction's constants ([gates · hidden, features] and so on), its initial states and activations.

    `dynamic` asks for int8 products of the inputs as well, quantized at run time.
    """

    w: Matrix
    r: Matrix
    wb: np.ndarray
    rb: np.ndarray
    peephole: np.ndarray | None
    h: Tensor | None
    c: Tensor | None
    functions: tuple[str, ...]
    dynamic: bool


Steps = tuple[list[Tensor], Tensor | None]
Unroll = Callable[[Builder, Cell, Tensor, Sequence[int]], Steps]


def _input(node: Node, index: int) -> str:
    return node.inputs[index] if len(node.inputs) > index else ""


def _constant(b: Builder, node: Node, index: int, shape: tuple[int, ...]) -> np.ndarray:
    name = _input(node, index)
    array = b.array(name) if name else np.zeros(shape, np.float32)
    if array is None:
        raise unsupported(node, "its weights are not constant")
    return array


def _matrices(b: Builder, node: Node, index: int) -> list[Matrix]:
    """Constant weights [directions, outputs, features], one matrix per direction."""
    array = _constant(b, node, index, ())
    name = node.inputs[index]
    stored, q = b.graph.constants[name], b.graph.held.get(name)
    if q is not None and (not q.symmetric or q.axis not in (None, 1)):
        stored, q = array, None
    return [Matrix(each, q if q is None or q.axis is None else q.moved(0)) for each in stored]


def _recurrent(
    b: Builder,
    node: Node,
    unroll: Unroll,
    gates: int,
    functions: Sequence[str],
    names: Sequence[str] | None,
    direction: str,
    layout: int,
) -> None:
    """Run each direction over [time, batch, features] and bind Y, Y_h and Y_c."""
    batch_first = (1, 0, 2) if layout else (0, 1, 2)
    x = b.in_layout(b.value(node.inputs[0]), batch_first)
    time, batch, _ = x.shape
    directions = 2 if direction == "bidirectional" else 1
    names = list(names or [*functions] * directions)
    hidden = b.shape(node.inputs[2])[-1]
    lengths = _input(node, 4)
    if lengths:
        array = b.array(lengths)
        if array is None or (array != time).any():
            raise unsupported(node, "sequences shorter than the input")
    if any(name not in ACTIVATIONS for name in names):
        raise unsupported(node, f"activations {names}")
    w, r = _matrices(b, node, 1), _matrices(b, node, 2)
    bias = _constant(b, node, 3, (directions, 2 * gates * hidden))
    peephole = _constant(b, node, 7, ()) if _input(node, 7) else None
    wanted = (directions, gates * hidden)
    shapes = b.shape(node.inputs[1]), b.shape(node.inputs[2]), bias.shape
    if shapes != ((*wanted, x.shape[2]), (*wanted, hidden), (directions, 2 * gates * hidden)):
        raise unsupported(node, f"weights {shapes[0]}, {shapes[1]} and biases {shapes[2]}")
    x = b.as_float(x)
    outputs, last_h, last_c = [], [], []
    for index in range(directions):
        per = len(names) // directions
        cell = Cell(
            w[index],
            r[index],
            bias[index, : gates * hidden],
            bias[index, gates * hidden :],
            None if peephole is None else peephole[index],
            _state(b, node, 5, index, layout, (batch, hidden)),
            _state(b, node, 6, index, layout, (batch, hidden)),
            tuple(ACTIVATIONS[name] for name in names[index * per : (index + 1) * per]),
            node.dynamic,
        )
        backward = direction == "reverse" or index == 1
        if b.fixed_batch and _is_builtin(node, cell, time):
            outputs.append(sequence_lstm(b, cell, x, backward))
            last_h.append(_at(b, outputs[-1], 0 if backward else time - 1))
            continue
        order = range(time)[::-1] if backward else range(time)
        if index == 0:
            b.note(f"ONNX node '{node.name}' is unrolled over {time} time steps")
        steps, c = unroll(b, cell, x, order)
        last_h.append(steps[-1])
        if c is not None:
            last_c.append(c)
        outputs.append(_joined(b, steps[::-1] if backward else steps, 0))
    y = [b.raw_reshape(output, (time, 1, batch, hidden)) for output in outputs]
    # ONNX has [time, directions, batch, hidden], or [batch, time, directions, hidden] with layout 1.
    _bind(b, node, 0, _joined(b, y, 1), (1, 2, 0, 3) if layout else (0, 1, 2, 3))
    _bind(b, node, 1, _joined(b, last_h, 0), (1, 0, 2) if layout else (0, 1, 2))
    if last_c:
        _bind(b, node, 2, _joined(b, last_c, 0), (1, 0, 2) if layout else (0, 1, 2))


def _is_builtin(node: Node, cell: Cell, time: int) -> bool:
    """Whether an LSTM is one that the runtime's own op computes: long, from zeros, and its last c is not asked for."""
    plain = cell.functions == ("LOGISTIC", "TANH", "TANH") and cell.h is None and cell.c is None and not cell.dynamic
    if node.op != "LSTM" or time < LONG or not plain or (len(node.outputs) > 2 and node.outputs[2]):
        return False
    return closes(cell, time)


def _bind(b: Builder, node: Node, index: int, tensor: Tensor, perm: tuple[int, ...]) -> None:
    if len(node.outputs) > index and node.outputs[index]:
        b.bind(node.outputs[index], tensor, perm)


def _state(b: Builder, node: Node, index: int, direction: int, layout: int, sizes: tuple[int, int]) -> Tensor | None:
    """The initial state [1, batch, hidden] of one direction, or None for zeros."""
    name = _input(node, index)
    if not name:
        return None
    array = b.array(name)
    if array is not None and not array.any():
        return None
    state = b.take(name, (1, 0, 2) if layout else identity(3))
    if state.shape[1:] != sizes or state.shape[0] <= direction:
        raise unsupported(node, f"an initial state of shape {list(b.shape(name))}")
    if state.shape[0] == 1:
        return state
    begin, size = np.array([direction, 0, 0], np.int32), (1, *state.shape[1:])
    return b.op("SLICE", [state, begin, np.array(size, np.int32)], size)


def _joined(b: Builder, tensors: list[Tensor], axis: int) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    shape = list(tensors[0].shape)
    shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
    return b.op("CONCATENATION", [*tensors], tuple(shape), axis=axis, fusedActivationFunction="NONE")


def _dense(
    b: Builder, cell: Cell, weights: Matrix, bias: np.ndarray | None = None, steps: int = 1
) -> Callable[[Tensor], Tensor]:
    """x ↦ x · weightsᵀ + bias over the last axis of a rank-3 tensor, with the same constants at each of the steps."""
    offsets = np.zeros(len(weights), np.float32) if bias is None else bias
    hybrid = cell.dynamic and weights.q is not None
    matrix = weights.tensor(b) if hybrid else b.as_float(weights.tensor(b))
    if steps * matrix.size * 4 > COPIES and not hybrid:
        # XNNPACK keeps a packed copy of constant weights for every step, and leaves computed ones alone.
        matrix = b.op("BROADCAST_TO", [matrix, np.array(matrix.shape, np.int32)], matrix.shape)
    constants = matrix, b.const(np.ascontiguousarray(offsets))

    def apply(x: Tensor) -> Tensor:
        return b.op(
            "FULLY_CONNECTED",
            [x, *constants],
            (*x.shape[:2], len(weights)),
            keepNumDims=True,
            asymmetricQuantizeInputs=hybrid,
            fusedActivationFunction="NONE",
        )

    return apply


def _at(b: Builder, x: Tensor, time: int) -> Tensor:
    shape = (1, *x.shape[1:])
    if x.shape[0] == 1:
        return x
    return b.op("SLICE", [x, np.array([time, 0, 0], np.int32), np.array(shape, np.int32)], shape)


def _parts(b: Builder, x: Tensor, count: int) -> list[Tensor]:
    if count == 1:
        return [x]
    shape = (*x.shape[:2], x.shape[2] // count)
    parts = [Tensor("", shape, x.dtype) for _ in range(count)]
    b.ops_out("SPLIT", [np.array(2, np.int32), x], [*parts], numSplits=count)
    return parts


def _apply(b: Builder, kind: str, x: Tensor) -> Tensor:
    return b.op(kind, [x], x.shape)


@lowers("LSTM")
def lstm(
    b: Builder,
    node: Node,
    *,
    hidden_size: int | None = None,
    activations: Sequence[str] | None = None,
    direction: str = "forward",
    input_forget: int = 0,
    layout: int = 0,
) -> None:
    """LSTM with optional initial states and peepholes."""
    if input_forget:
        raise unsupported(node, "coupled input and forget gates")
    _recurrent(b, node, _unroll_lstm, 4, ("Sigmoid", "Tanh", "Tanh"), activations, direction, layout)


def _unroll_lstm(b: Builder, cell: Cell, x: Tensor, order: Sequence[int]) -> Steps:
    projected, recur = _dense(b, cell, cell.w, cell.wb + cell.rb)(x), _dense(b, cell, cell.r, steps=len(order))
    h, c, steps = cell.h, cell.c, []
    gate, candidate, squash = cell.functions
    for time in order:
        z = _at(b, projected, time)
        z = add(b, z, recur(h)) if h is not None else z
        i, o, f, g = _parts(b, z, 4)
        peep_i, peep_o, peep_f = (None,) * 3 if cell.peephole is None else np.split(cell.peephole, 3)
        g = _apply(b, candidate, g)
        inside = mul(b, _apply(b, gate, _peeped(b, i, c, peep_i)), g)
        if c is not None:
            kept = mul(b, _apply(b, gate, _peeped(b, f, c, peep_f)), c)
            inside = add(b, kept, inside)
        c = inside
        h = mul(b, _apply(b, gate, _peeped(b, o, c, peep_o)), _apply(b, squash, c))
        steps.append(h)
    return steps, c


def _peeped(b: Builder, z: Tensor, c: Tensor | None, weights: np.ndarray | None) -> Tensor:
    if c is None or weights is None:
        return z
    return add(b, z, b.op("MUL", [c, weights], c.shape, fusedActivationFunction="NONE"))


@lowers("GRU")
def gru(
    b: Builder,
    node: Node,
    *,
    hidden_size: int | None = None,
    activations: Sequence[str] | None = None,
    direction: str = "forward",
    layout: int = 0,
    linear_before_reset: int = 0,
) -> None:
    """GRU in both of its forms."""

    def unroll(b: Builder, cell: Cell, x: Tensor, order: Sequence[int]) -> Steps:
        return _unroll_gru(b, cell, x, order, bool(linear_before_reset))

    _recurrent(b, node, unroll, 3, ("Sigmoid", "Tanh"), activations, direction, layout)


def _unroll_gru(b: Builder, cell: Cell, x: Tensor, order: Sequence[int], linear: bool) -> Steps:
    hidden = len(cell.rb) // 3
    split = 2 * hidden
    outside = cell.rb.copy()
    outside[split:] = 0 if linear else outside[split:]
    projected = _dense(b, cell, cell.w, cell.wb + outside)(x)
    h, steps = cell.h, []
    gate, candidate = cell.functions
    gates = _dense(b, cell, cell.r.rows(slice(0, split)), steps=len(order))
    inner = _dense(b, cell, cell.r.rows(slice(split, None)), cell.rb[split:] if linear else None, len(order))
    for time in order:
        z_x, r_x, n_x = _parts(b, _at(b, projected, time), 3)
        if h is None:  # zeros
            h = _first_gru_step(b, cell, (z_x, r_x, n_x), linear)
            steps.append(h)
            continue
        z_h, r_h = _parts(b, gates(h), 2)
        z = _apply(b, gate, add(b, z_x, z_h))
        r = _apply(b, gate, add(b, r_x, r_h))
        n_h = mul(b, r, inner(h)) if linear else inner(mul(b, r, h))
        n = _apply(b, candidate, add(b, n_x, n_h))
        # (1 − z) · n + z · h
        h = add(b, mul(b, scaled(b, z, -1, 1.0), n), mul(b, z, h))
        steps.append(h)
    return steps, None


def _first_gru_step(b: Builder, cell: Cell, parts: tuple[Tensor, Tensor, Tensor], linear: bool) -> Tensor:
    """A step from h = 0: (1 − z) · n."""
    gate, candidate = cell.functions
    z, r = (_apply(b, gate, part) for part in parts[:2])
    n = parts[2]
    if linear:
        n = add(b, n, b.op("MUL", [r, np.split(cell.rb, 3)[2]], r.shape, fusedActivationFunction="NONE"))
    return mul(b, scaled(b, z, -1, 1.0), _apply(b, candidate, n))


@lowers("RNN")
def rnn(
    b: Builder,
    node: Node,
    *,
    hidden_size: int | None = None,
    activations: Sequence[str] | None = None,
    direction: str = "forward",
    layout: int = 0,
) -> None:
    """The plain recurrent layer."""
    _recurrent(b, node, _unroll_rnn, 1, ("Tanh",), activations, direction, layout)


def _unroll_rnn(b: Builder, cell: Cell, x: Tensor, order: Sequence[int]) -> Steps:
    projected, recur = _dense(b, cell, cell.w, cell.wb + cell.rb)(x), _dense(b, cell, cell.r, steps=len(order))
    h, steps = cell.h, []
    for time in order:
        z = _at(b, projected, time)
        z = add(b, z, recur(h)) if h is not None else z
        h = _apply(b, cell.functions[0], z)
        steps.append(h)
    return steps, None
