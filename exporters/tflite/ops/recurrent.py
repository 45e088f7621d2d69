"""Recurrent layers: short sequences unrolled over time, long ones in loops.

The products of the inputs are computed for all steps at once; what is unrolled or in the loop is the rest of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from edgekit.exporters.tflite.builder import Builder
from edgekit.exporters.tflite.ir import Node, QParams, Tensor, identity
from edgekit.exporters.tflite.loops import Step, loop
from edgekit.exporters.tflite.ops.activation import add, mul, scaled
from edgekit.exporters.tflite.registry import lowers, unsupported

LONG = 16  # time steps from which sequences are computed in a loop
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

    def tensor(self, b: Builder) -> Tensor:
        """As a constant."""
        return b.const(self.stored, self.q, "weights")


@dataclass(frozen=True)
class Cell:
    """One direction's constants ([gates · hidden, features] and so on), its initial states and activations.

    With a `projection` the recurrent weights are r · projection. `dynamic` asks for int8 products of the inputs as
    well, quantized at run time.
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
    projection: Matrix | None = None

    @property
    def recurrent_bytes(self) -> int:
        """How much the weights take that every step reads."""
        return self.r.stored.nbytes + (self.projection.stored.nbytes if self.projection else 0)


States = list[Tensor]
# (one time step of the inputs' products, the states or None for zeros) → the states, the layer's output first
StepOf = Callable[[Sequence[Tensor], States | None], States]


@dataclass(frozen=True)
class Kind:
    """A kind of recurrent layer: its gates, of which the first `joint` go through a step as one, its states, and the
    bias of its inputs' products.

    `make_step` prepares the constants of a step that is to be computed so many times, and returns the step.
    """

    gates: int
    joint: int
    states: int
    functions: tuple[str, ...]
    bias: Callable[[Cell], np.ndarray]
    make_step: Callable[[Builder, Cell, int], StepOf]


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


def _matrix(b: Builder, name: str) -> Matrix:
    """A constant [outputs, features] as it is stored, with float scales where they are those of its features."""
    stored, q = b.graph.constants[name], b.graph.held.get(name)
    if q is not None and (not q.symmetric or q.axis not in (None, 0)):
        array = b.array(name)
        assert array is not None
        return Matrix(array, None)
    return Matrix(stored, q)


def _recurrent(
    b: Builder,
    node: Node,
    kind: Kind,
    names: Sequence[str] | None,
    direction: str,
    layout: int,
) -> None:
    """Run each direction over [time, batch, features] and bind Y, Y_h and Y_c."""
    batch_first = (1, 0, 2) if layout else (0, 1, 2)
    x = b.in_layout(b.value(node.inputs[0]), batch_first)
    time, batch, _ = x.shape
    directions = 2 if direction == "bidirectional" else 1
    names, gates = list(names or [*kind.functions] * directions), kind.gates
    hidden = b.shape(node.inputs[2])[-1]
    lengths = _input(node, 4)
    if lengths:
        array = b.array(lengths)
        if array is None or (array != time).any():
            raise unsupported(node, "sequences shorter than the input")
    if any(name not in ACTIVATIONS for name in names):
        raise unsupported(node, f"activations {names}")
    w, r, projection = _matrices(b, node, 1), _matrices(b, node, 2), None
    if kind is LSTM and node.inputs[2] in b.graph.factors:
        first, projection = (_matrix(b, name) for name in b.graph.factors[node.inputs[2]])
        r = [first]
    bias = _constant(b, node, 3, (directions, 2 * gates * hidden))
    peephole = _constant(b, node, 7, ()) if _input(node, 7) else None
    wanted = (directions, gates * hidden)
    shapes = b.shape(node.inputs[1]), b.shape(node.inputs[2]), bias.shape
    if shapes != ((*wanted, x.shape[2]), (*wanted, hidden), (directions, 2 * gates * hidden)):
        raise unsupported(node, f"weights {shapes[0]}, {shapes[1]} and biases {shapes[2]}")
    x = b.as_float(x)
    outputs, lasts = [], []
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
            projection,
        )
        backward = direction == "reverse" or index == 1
        y, states = _direction(b, kind, cell, x, backward)
        outputs.append(b.raw_reshape(y, (time, 1, batch, hidden)))
        lasts.append(states)
    # ONNX has [time, directions, batch, hidden], or [batch, time, directions, hidden] with layout 1.
    _bind(b, node, 0, _joined(b, outputs, 1), (1, 2, 0, 3) if layout else (0, 1, 2, 3))
    for place, each in enumerate(zip(*lasts, strict=True), start=1):
        _bind(b, node, place, _joined(b, list(each), 0), (1, 0, 2) if layout else (0, 1, 2))


def _direction(b: Builder, kind: Kind, cell: Cell, x: Tensor, backward: bool) -> tuple[Tensor, States]:
    """All outputs [time, batch, hidden] of one direction, and its last states [1, batch, hidden]."""
    time, batch, _ = x.shape
    hidden = len(cell.rb) // kind.gates
    bias = kind.bias(cell)
    parts = [slice(0, kind.joint * hidden), slice(kind.joint * hidden, None)]
    projected = [_dense(b, cell, cell.w.rows(part), bias[part])(x) for part in parts if bias[part].size]
    states: States | None = None
    if cell.h is not None or cell.c is not None:
        states = [each or _zeros(b, batch, hidden) for each in (cell.h, cell.c)[: kind.states]]
    if b.fixed_batch and (time >= LONG or time * cell.recurrent_bytes > COPIES):

        def make_step() -> Step:
            step = kind.make_step(b, cell, 1)

            def results(parts: Sequence[Tensor], now: Sequence[Tensor]) -> tuple[States, States]:
                after = step(parts, list(now))
                return after, after[:1]

            return results

        first = states or [_zeros(b, batch, hidden)] * kind.states
        lasts, ys = loop(b, projected, first, make_step, weights=cell.recurrent_bytes, backward=backward)
        return ys[0], lasts
    step, steps = kind.make_step(b, cell, time), []
    for number in range(time)[::-1] if backward else range(time):
        states = step([_at(b, x, number) for x in projected], states)
        steps.append(states[0])
    assert states is not None
    return _joined(b, steps[::-1] if backward else steps, 0), states


def _zeros(b: Builder, batch: int, hidden: int) -> Tensor:
    return b.const(np.zeros((1, batch, hidden), np.float32), name="zeros")


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


def _less(b: Builder, x: Tensor, y: Tensor) -> Tensor:
    return b.op("SUB", [x, y], x.shape, fusedActivationFunction="NONE")


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
    _recurrent(b, node, LSTM, activations, direction, layout)


def _lstm_step(b: Builder, cell: Cell, steps: int) -> StepOf:
    recur, project = _dense(b, cell, cell.r, steps=steps), None
    if cell.projection is not None:
        project = _dense(b, cell, cell.projection, steps=steps)
    gate, candidate, squash = cell.functions
    peep_i, peep_o, peep_f = (None,) * 3 if cell.peephole is None else np.split(cell.peephole, 3)

    def step(parts: Sequence[Tensor], states: States | None) -> States:
        (z,) = parts
        h, c = states or (None, None)
        h = project(h) if project is not None and h is not None else h
        i, o, f, g = _parts(b, add(b, z, recur(h)) if h is not None else z, 4)
        inside = mul(b, _apply(b, gate, _peeped(b, i, c, peep_i)), _apply(b, candidate, g))
        if c is not None:
            inside = add(b, mul(b, _apply(b, gate, _peeped(b, f, c, peep_f)), c), inside)
        return [mul(b, _apply(b, gate, _peeped(b, o, inside, peep_o)), _apply(b, squash, inside)), inside]

    return step


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
    _recurrent(b, node, LINEAR_GRU if linear_before_reset else GRU, activations, direction, layout)


def _gru_step(b: Builder, cell: Cell, steps: int, linear: bool) -> StepOf:
    split = 2 * len(cell.rb) // 3
    gate, candidate = cell.functions
    gates = _dense(b, cell, cell.r.rows(slice(0, split)), steps=steps)
    inner = _dense(b, cell, cell.r.rows(slice(split, None)), cell.rb[split:] if linear else None, steps)

    def step(parts: Sequence[Tensor], states: States | None) -> States:
        zr, n = parts
        if states is None:  # z · 0 is left out
            z, r = _parts(b, _apply(b, gate, zr), 2)
            if linear:
                n = add(b, n, b.op("MUL", [r, cell.rb[split:]], r.shape, fusedActivationFunction="NONE"))
            return [mul(b, scaled(b, z, -1, 1.0), _apply(b, candidate, n))]
        (h,) = states
        z, r = _parts(b, _apply(b, gate, add(b, zr, gates(h))), 2)
        n = _apply(b, candidate, add(b, n, mul(b, r, inner(h)) if linear else inner(mul(b, r, h))))
        return [add(b, n, mul(b, z, _less(b, h, n)))]  # (1 − z) · n + z · h

    return step


def _gru_bias(cell: Cell, linear: bool) -> np.ndarray:
    """Of the candidate, only the linear form adds the state's bias inside the step."""
    outside = cell.rb.copy()
    split = 2 * len(outside) // 3
    outside[split:] = 0 if linear else outside[split:]
    return cell.wb + outside


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
    _recurrent(b, node, RNN, activations, direction, layout)


def _rnn_step(b: Builder, cell: Cell, steps: int) -> StepOf:
    recur = _dense(b, cell, cell.r, steps=steps)

    def step(parts: Sequence[Tensor], states: States | None) -> States:
        (z,) = parts
        return [_apply(b, cell.functions[0], add(b, z, recur(states[0])) if states is not None else z)]

    return step


def _whole_bias(cell: Cell) -> np.ndarray:
    return cell.wb + cell.rb


LSTM = Kind(4, 4, 2, ("Sigmoid", "Tanh", "Tanh"), _whole_bias, _lstm_step)
GRU = Kind(3, 2, 1, ("Sigmoid", "Tanh"), partial(_gru_bias, linear=False), partial(_gru_step, linear=False))
LINEAR_GRU = Kind(3, 2, 1, ("Sigmoid", "Tanh"), partial(_gru_bias, linear=True), partial(_gru_step, linear=True))
RNN = Kind(1, 1, 1, ("Tanh",), _whole_bias, _rnn_step)
