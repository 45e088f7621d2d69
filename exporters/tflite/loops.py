"""Loops over time: WHILE operators, whose body holds a step once and not once for every time step.

WHILE copies all that a loop carries at every turn, sequences and results too. So a sequence is cut into chunks, each
with a WHILE of its own over the same body: of 500 steps of 128 numbers a single loop takes 8.6 ms, chunks take 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from edgekit.exporters.tflite.builder import INT32, Builder
from edgekit.exporters.tflite.ir import Subgraph, Tensor
from edgekit.exporters.tflite.write.buffer_aliasing import protect

SHORTEST = 8  # steps of a chunk
CHUNKS = 64  # more of them make longer chunks
CARRIED = 2**15  # bytes of sequences that a chunk may have in any case: so many are copied in no time
MOST = 8  # steps in a turn of the inner loop
# Bytes of weights that are in memory once for each step of a turn: runtimes pack them for every operator.
COPIES = 2**18

# (slices of the sequences, states) → (states, results), both [1, …]
Step = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]


def loop(
    b: Builder,
    sequences: Sequence[Tensor],
    states: Sequence[Tensor],
    make_step: Callable[[], Step],
    *,
    weights: int,
    backward: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run a step over `sequences` [time, …]; returns the last states, and the results of all steps [time, …].

    `make_step` is called where the step's operators go, so that constants that it prepares are prepared there;
    `weights` is how many bytes of them there are.
    """
    time = sequences[0].shape[0]
    turn = max(steps for steps in range(1, MOST + 1) if time % steps == 0 and (steps == 1 or steps * weights <= COPIES))
    bytes_a_step = 4 * sum(math.prod(x.shape[1:]) for x in sequences)
    chunk = math.ceil(min(time, max(SHORTEST, time / CHUNKS, CARRIED / bytes_a_step)) / turn) * turn
    count = math.ceil(time / chunk)
    sequences = [_padded(b, _reversed(b, x) if backward else x, chunk * count) for x in sequences]
    body, shapes = _body(b, sequences, states, make_step, chunk, turn)
    condition = _below_limit(b, body)
    now, results = list(states), []
    start, empty = b.const(np.zeros(1, np.int32)), [_zeros(b, (chunk, *shape)) for shape in shapes]
    full = b.const(np.array([chunk], np.int32))
    for number in range(count):
        parts = [_part(b, x, number * chunk, chunk) for x in sequences]
        left = time - number * chunk
        limit = full if left >= chunk else b.const(np.array([left], np.int32))
        made = [Tensor("", tensor.shape, tensor.dtype) for tensor in body.outputs]
        b.ops_out(
            "WHILE",
            [start, limit, *now, *parts, *empty],
            made,
            condSubgraphIndex=condition,
            bodySubgraphIndex=body,
        )
        now = made[2 : 2 + len(states)]
        results.append(made[len(made) - len(shapes) :])
    ys = [_part(b, _stacked(b, list(each)), 0, time) for each in zip(*results, strict=True)]
    return now, [_reversed(b, y) if backward else y for y in ys]


def _body(
    b: Builder,
    sequences: Sequence[Tensor],
    states: Sequence[Tensor],
    make_step: Callable[[], Step],
    chunk: int,
    turn: int,
) -> tuple[Subgraph, list[tuple[int, ...]]]:
    """The body, of `turn` steps: (index, limit, states, chunks, results) → the same; and the shapes of the results."""
    index, limit = _integer(), _integer()
    parts = [Tensor("", (chunk, *x.shape[1:]), x.dtype) for x in sequences]
    given = [Tensor("", state.shape, state.dtype) for state in states]
    with b.subgraph() as ops:
        slices = [_rows(b, part, index, turn) for part in parts]
        step, now, each = make_step(), list(given), []
        for number in range(turn):
            now, results = step([_part(b, x, number, 1) for x in slices], now)
            each.append(results)
        made = [_stacked(b, list(steps)) for steps in zip(*each, strict=True)]
        shapes = [y.shape[1:] for y in made]
        before = [Tensor("", (chunk, *shape), y.dtype) for y, shape in zip(made, shapes, strict=True)]
        after = [_updated(b, old, y, index) for old, y in zip(before, made, strict=True)]
        following = b.op("ADD", [index, np.array([turn], np.int32)], (1,), INT32, fusedActivationFunction="NONE")
    inputs, outputs = [index, limit, *given, *parts, *before], [following, limit, *now, *parts, *after]
    return Subgraph("step", protect(ops, outputs), inputs, outputs), shapes


def _below_limit(b: Builder, body: Subgraph) -> Subgraph:
    """The condition of a loop with this body."""
    inputs = [Tensor("", tensor.shape, tensor.dtype) for tensor in body.inputs]
    with b.subgraph() as ops:
        goes_on = b.op("LESS", [*inputs[:2]], (1,), np.bool_)
    return Subgraph("goes_on", ops, inputs, [goes_on])


def _integer() -> Tensor:
    return Tensor("", (1,), INT32)


def _rows(b: Builder, x: Tensor, index: Tensor, count: int) -> Tensor:
    """Rows index … index + count − 1. SLICE would do it too, but with shapes that are known only as it runs."""
    rows = index
    if count > 1:
        offsets = np.arange(count, dtype=np.int32)
        rows = b.op("ADD", [index, offsets], (count,), INT32, fusedActivationFunction="NONE")
    return b.op("GATHER", [x, rows], (count, *x.shape[1:]), axis=0, batchDims=0)


def _part(b: Builder, x: Tensor, start: int, count: int) -> Tensor:
    if x.shape[0] == count:
        return x
    size = (count, *x.shape[1:])
    begin = np.array([start, *[0] * len(x.shape[1:])], np.int32)
    return b.op("SLICE", [x, begin, np.array(size, np.int32)], size)


def _stacked(b: Builder, parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return b.op("CONCATENATION", [*parts], shape, axis=0, fusedActivationFunction="NONE")


def _updated(b: Builder, whole: Tensor, part: Tensor, index: Tensor) -> Tensor:
    amounts = np.array([[0, len(whole.shape) - 1]], np.int32)
    begin = b.op("PAD", [index, amounts], (len(whole.shape),), INT32) if len(whole.shape) > 1 else index
    return b.op("DYNAMIC_UPDATE_SLICE", [whole, part, begin], whole.shape)


def _zeros(b: Builder, shape: tuple[int, ...]) -> Tensor:
    return b.op("FILL", [np.array(shape, np.int32), np.zeros((), np.float32)], shape, np.float32)


def _padded(b: Builder, x: Tensor, time: int) -> Tensor:
    if x.shape[0] == time:
        return x
    amounts = np.zeros((len(x.shape), 2), np.int32)
    amounts[0, 1] = time - x.shape[0]
    return b.op("PAD", [x, amounts], (time, *x.shape[1:]))


def _reversed(b: Builder, x: Tensor) -> Tensor:
    return b.op("REVERSE_V2", [x, np.zeros(1, np.int32)], x.shape)
