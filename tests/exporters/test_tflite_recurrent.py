"""Recurrent layers: short ones unrolled, long ones in loops over one step."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from tflite_tools import interpreter, model, node, op_names, run_onnx, run_tflite

from edgekit.exporters.tflite import convert
from edgekit.exporters.tflite.ops.recurrent import LONG

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FEATURES, HIDDEN = 5, 8


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def layer(
    op: str,
    time: int,
    batch: int = 2,
    hidden: int = HIDDEN,
    states: bool = False,
    peephole: bool = False,
    **options: Any,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A layer with all its outputs, and what to feed it with."""
    gates = GATES[op]
    directions = 2 if options.get("direction") == "bidirectional" else 1
    feeds = {"x": random(*((batch, time) if options.get("layout") else (time, batch)), FEATURES)}
    constants = {
        "w": random(directions, gates * hidden, FEATURES, seed=1) / np.float32(FEATURES**0.5),
        "r": random(directions, gates * hidden, hidden, seed=2) / np.float32(hidden**0.5),
        "b": random(directions, 2 * gates * hidden, seed=3),
    }
    if states:
        shape = (batch, directions, hidden) if options.get("layout") else (directions, batch, hidden)
        feeds |= {name: random(*shape, seed=4) for name in ("h0", "c0")[: 1 + (op == "LSTM")]}
    if peephole:
        constants["p"] = random(directions, 3 * hidden, seed=5)
    known = {*feeds, *constants}
    inputs = [name if name in known else "" for name in ("x", "w", "r", "b", "lengths", "h0", "c0", "p")]
    while not inputs[-1]:
        inputs.pop()
    outputs = ("y", "h", "c")[: 2 + (op == "LSTM")]
    return model([node(op, inputs, outputs, hidden_size=hidden, **options)], feeds, constants, outputs), feeds


def assert_right(made: onnx.ModelProto, feeds: dict[str, np.ndarray], data: bytes) -> None:
    for xnnpack in (True, False):
        actual = run_tflite(data, feeds, xnnpack)
        for name, array in run_onnx(made, feeds).items():
            np.testing.assert_allclose(actual[name], array, rtol=1e-4, atol=1e-5)


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"peephole": True}),
    ("GRU", {"linear_before_reset": 0}),
    ("GRU", {"linear_before_reset": 1}),
    ("RNN", {}),
    ("RNN", {"activations": ["Relu"]}),
]


@pytest.mark.parametrize(("op", "options"), OPTIONS)
@pytest.mark.parametrize("time", [1, 2, LONG, 37, 160])  # a prime number of steps leaves a chunk that is not full
def test_layers(op: str, options: dict[str, Any], time: int) -> None:
    for direction, batch, states in product(("forward", "reverse", "bidirectional"), (1, 2), (False, True)):
        directions = 2 if direction == "bidirectional" else 1
        each = options | ({"activations": options["activations"] * directions} if "activations" in options else {})
        made, feeds = layer(op, time, batch, states=states, direction=direction, **each)
        data = convert(made)
        assert ("WHILE" in op_names(data)) == (time >= LONG)
        assert_right(made, feeds, data)


@pytest.mark.parametrize("op", GATES)
def test_call_leaves_no_trace(op: str) -> None:
    """To the last bit, after calls with large, infinite and missing numbers, and no sample suffers from another."""
    made, feeds = layer(op, 20)
    for xnnpack in (True, False):
        runner = interpreter(convert(made), xnnpack).get_signature_runner("serving_default")
        first = {name: array.copy() for name, array in runner(**feeds).items()}
        for value in (1e3, np.inf, np.nan):
            spoiled = {"x": feeds["x"].copy()}
            spoiled["x"][7, 0, 1] = value
            np.testing.assert_array_equal(runner(**spoiled)["y"][:, :, 1], first["y"][:, :, 1])
            for name, array in runner(**feeds).items():
                np.testing.assert_array_equal(array, first[name])


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("time", [40, 150, 2000])
def test_file_is_hardly_larger_than_its_weights(op: str, time: int) -> None:
    made, _ = layer(op, time, batch=1, hidden=128)
    weights = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in made.graph.initializer)
    assert len(convert(made)) < 1.3 * weights + 2**14


def test_heavy_layer_is_no_copy_a_step() -> None:
    """Few steps, but each would hold 4 MB of weights."""
    made, feeds = layer("GRU", 3, batch=1, hidden=600)
    data = convert(made)
    assert "WHILE" in op_names(data)
    assert_right(made, feeds, data)
