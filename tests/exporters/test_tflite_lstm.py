"""The runtime's LSTM op, which keeps its state between calls, made a function of its input alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from tflite_tools import interpreter, model, node, op_names, run_onnx, run_tflite

from edgekit.exporters.tflite import convert
from edgekit.exporters.tflite.sequence_lstm import LONG

BUILTIN = "UNIDIRECTIONAL_SEQUENCE_LSTM"
TIME, BATCH, FEATURES, HIDDEN = 20, 2, 5, 8


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def layer(
    inputs: dict[str, np.ndarray] | None = None,
    outputs: tuple[str, ...] = ("y", "h"),
    time: int = TIME,
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """An LSTM with the given optional inputs, and what to feed it with."""
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    feeds = {"x": random(time, BATCH, FEATURES)}
    constants = {
        "w": random(directions, 4 * HIDDEN, FEATURES, seed=1),
        "r": random(directions, 4 * HIDDEN, HIDDEN, seed=2) / 2,
        "b": random(directions, 8 * HIDDEN, seed=3),
        **(inputs or {}),
    }
    names = ["x", *(name if name in constants else "" for name in ("w", "r", "b", "lengths", "h0", "c0", "p"))]
    return model([node("LSTM", names, outputs, hidden_size=HIDDEN, **attributes)], feeds, constants, outputs), feeds


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("peephole", [False, True])
def test_long_lstm_is_one_op_a_direction(direction: str, peephole: bool) -> None:
    directions = 2 if direction == "bidirectional" else 1
    made, feeds = layer({"p": random(directions, 3 * HIDDEN, seed=4)} if peephole else None, direction=direction)
    data = convert(made)
    assert op_names(data).count(BUILTIN) == directions and len(op_names(data)) < 40
    for xnnpack in (True, False):
        actual = run_tflite(data, feeds, xnnpack)
        for name, array in run_onnx(made, feeds).items():
            np.testing.assert_allclose(actual[name], array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_call_leaves_no_trace(direction: str) -> None:
    """To the last bit, after calls with large, infinite and missing numbers."""
    made, feeds = layer(direction=direction)
    for xnnpack in (True, False):
        runner = interpreter(convert(made), xnnpack).get_signature_runner("serving_default")
        first = {name: array.copy() for name, array in runner(**feeds).items()}
        for value in (1e3, -1e29, np.inf, np.nan, 3e38):
            spoiled = {"x": feeds["x"].copy()}
            spoiled["x"][7, 0, 1] = value
            assert np.isnan(runner(**spoiled)["y"]).any() == (not abs(value) < 1e30)
            for name, array in runner(**feeds).items():
                np.testing.assert_array_equal(array, first[name])


def test_other_samples_do_not_suffer_from_one_that_is_not_finite() -> None:
    made, feeds = layer()
    runner = interpreter(convert(made)).get_signature_runner("serving_default")
    expected = runner(**feeds)["y"].copy()
    feeds["x"][3, 1, 2] = np.nan
    actual = runner(**feeds)["y"]
    np.testing.assert_array_equal(actual[:, :, 0], expected[:, :, 0])
    assert np.isnan(actual[:, :, 1]).all()


UNROLLED = [
    ("short", {}, {"time": LONG - 1}),
    ("initial state", {"h0": random(1, BATCH, HIDDEN, seed=5), "c0": random(1, BATCH, HIDDEN, seed=6)}, {}),
    ("last c", {}, {"outputs": ("y", "h", "c")}),
    ("other activations", {}, {"activations": ["Sigmoid", "Relu", "Tanh"]}),
    ("gates that do not close", {"r": np.full((1, 4 * HIDDEN, HIDDEN), 1e3, np.float32)}, {}),
]


@pytest.mark.parametrize(("inputs", "options"), [case[1:] for case in UNROLLED], ids=[case[0] for case in UNROLLED])
def test_what_the_op_does_not_do_is_unrolled(inputs: dict[str, np.ndarray], options: dict[str, Any]) -> None:
    made, feeds = layer(inputs, **options)
    data = convert(made)
    assert BUILTIN not in op_names(data)
    for name, array in run_onnx(made, feeds).items():
        np.testing.assert_allclose(run_tflite(data, feeds)[name], array, rtol=1e-4, atol=1e-5)
