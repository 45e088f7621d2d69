"""UNIDIRECTIONAL_SEQUENCE_LSTM as a function of its input alone.

The op keeps its state in variables from one call to the next, and no op of the graph may write them. So the sequence
begins with steps that make the op forget: one more feature, 1 in these steps and 0 in all others, closes the gates,
σ(−10⁴) = 0, which leaves c = 0 · c + 0 · g = 0 and h = 0 · tanh(c) = 0. Only a state that is not finite would stay, as
0 · NaN is NaN, and only an input that is not finite can make one: such values are read as 0, and the output of that
sample is made NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgekit.exporters.tflite.builder import FLOAT, Builder
from edgekit.exporters.tflite.ir import Tensor
from edgekit.exporters.tflite.ops_activation import add
from edgekit.exporters.tflite.ops_reduce import reduced

if TYPE_CHECKING:
    from edgekit.exporters.tflite.ops_rnn import Cell, Matrix

LONG = 16  # time steps: shorter sequences run faster unrolled
FORGET = 2  # steps: σ of some runtimes is 10⁻⁸ where it should be 0, and 0 after the second step
CLOSED = -1e4  # what the gates get: more than any sum of weights times values in −1..1, and a float16 as well
HUGE = 1e30  # inputs from here on count as infinite, since products of them may be
# Gates as ONNX orders them, i o f c, and as TFLite does, i f c o; the peepholes of ONNX are i o f, TFLite's i f o.
ORDER = (0, 2, 3, 1)
PEEPHOLES = (0, 2, 1)
CANDIDATE = 3


def closes(cell: Cell, time: int) -> bool:
    """Whether the gates close whatever the state was: h is in −1..1, and c grows by 1 a step at most."""
    largest = np.abs(cell.r.real()).sum(axis=1).max() + np.abs(cell.wb + cell.rb).max()
    if cell.peephole is not None:
        largest += np.abs(cell.peephole).max() * (time + FORGET)
    return bool(largest < -CLOSED / 2)


def sequence_lstm(b: Builder, cell: Cell, x: Tensor, backward: bool) -> Tensor:
    """The outputs [time, batch, hidden] of an LSTM that starts from zeros, for x [time, batch, features]."""
    time, batch, features = x.shape
    hidden = len(cell.r) // 4
    finite, loud = _finite(b, x)
    if backward:
        finite = b.op("REVERSE_V2", [finite, np.zeros(1, np.int32)], finite.shape)
    amounts = np.array([[0, 0], [0, 0], [0, 1]], np.int32)
    marked = b.op("PAD", [finite, amounts], (time, batch, features + 1))
    forget = np.zeros((FORGET, batch, features + 1), np.float32)
    forget[:, :, -1] = 1
    shape = (FORGET + time, batch, features + 1)
    sequence = b.op("CONCATENATION", [forget, marked], shape, axis=0, fusedActivationFunction="NONE")
    bias = np.split(cell.wb + cell.rb, 4)
    peepholes: list[Tensor | None] = [None] * 3
    if cell.peephole is not None:
        split = np.split(cell.peephole, 3)
        peepholes = [b.const(split[gate]) for gate in PEEPHOLES]
    states = [Tensor("", (batch, hidden), FLOAT, variable=True) for _ in range(2)]
    y = b.op(
        "UNIDIRECTIONAL_SEQUENCE_LSTM",
        [
            sequence,
            *(_closing(b, _gate(cell.w, gate, hidden), 0.0 if gate == CANDIDATE else CLOSED) for gate in ORDER),
            *(b.as_float(_gate(cell.r, gate, hidden).tensor(b)) for gate in ORDER),
            *peepholes,
            *(b.const(bias[gate]) for gate in ORDER),
            None,  # no projection
            None,
            *states,
        ],
        (FORGET + time, batch, hidden),
        fusedActivationFunction="TANH",
        timeMajor=True,
    )
    begin, size = np.array([FORGET, 0, 0], np.int32), (time, batch, hidden)
    y = b.op("SLICE", [y, begin, np.array(size, np.int32)], size)
    if backward:
        y = b.op("REVERSE_V2", [y, np.zeros(1, np.int32)], size)
    return add(b, y, loud)


def _gate(weights: Matrix, gate: int, hidden: int) -> Matrix:
    return weights.rows(slice(gate * hidden, (gate + 1) * hidden))


def _closing(b: Builder, weights: Matrix, value: float) -> Tensor:
    """A gate's weights for the features, and for the one that closes it."""
    column = np.full((len(weights), 1), value, np.float32)
    tensor = b.as_float(weights.tensor(b))
    shape = (tensor.shape[0], tensor.shape[1] + 1)
    if tensor.data is not None:
        return b.const(np.concatenate([tensor.data, column], axis=1), name="weights")
    return b.op("CONCATENATION", [tensor, column], shape, axis=1, fusedActivationFunction="NONE")


def _finite(b: Builder, x: Tensor) -> tuple[Tensor, Tensor]:
    """x with 0 where it is not finite, and for each sample 0, or NaN where something was not finite."""
    good = b.op("LESS", [b.op("ABS", [x], x.shape), np.array(HUGE, np.float32)], x.shape, np.bool_)
    zero, missing = np.zeros((), np.float32), np.array(np.nan, np.float32)
    finite = b.op("SELECT_V2", [good, x, zero], x.shape, FLOAT)
    return finite, reduced(b, "SUM", b.op("SELECT_V2", [good, zero, missing], x.shape, FLOAT), [0, 2])
