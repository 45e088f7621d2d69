"""Chains of reshapes and transposes cost one TRANSPOSE, wherever layers put the channels."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from test_tflite_int8 import Qdq
from tflite_tools import model, node, op_names, run_onnx, run_tflite

from edgekit.exporters.tflite import convert

Moves = list[tuple[int, ...] | list[int]]  # a tuple is a shape, a list a permutation


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def chain(source: str, moves: Moves) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Nodes that move `source` to `m<number of moves>`, and the shapes that they read."""
    nodes, constants = [], {}
    for number, move in enumerate(moves, 1):
        if isinstance(move, tuple):
            constants[f"s{number}"] = np.array(move)
            nodes.append(node("Reshape", [source, f"s{number}"], f"m{number}"))
        else:
            nodes.append(node("Transpose", [source], f"m{number}", perm=move))
        source = f"m{number}"
    return nodes, constants


# Shape of the input, moves, and how many TRANSPOSE ops are left.
CHAINS: dict[str, tuple[tuple[int, ...], Moves, int]] = {
    "windows": ((1, 8, 8, 6), [(1, 2, 4, 2, 4, 6), [0, 1, 3, 2, 4, 5], (4, 16, 6)], 1),
    "windows and back": (
        (2, 8, 8, 3),
        [(2, 2, 4, 2, 4, 3), [0, 1, 3, 2, 4, 5], (8, 16, 3), (2, 2, 2, 4, 4, 3), [0, 1, 3, 2, 4, 5], (2, 8, 8, 3)],
        0,
    ),
    "patches of channels": ((1, 6, 8, 8), [(24, 2, 4, 2), [0, 2, 1, 3], (1, 6, 16, 4), [0, 3, 2, 1], (4, 16, 6)], 1),
    "two that cancel out": ((2, 3, 4), [[0, 2, 1], (2, 4, 3), [0, 2, 1]], 0),
    "sizes that do not divide": ((2, 3, 4), [[1, 0, 2], (8, 3), [1, 0], (4, 6)], 2),
    "ones in between": ((2, 3, 4), [(2, 1, 3, 4), [1, 3, 0, 2], (4, 1, 2, 3), [2, 0, 1, 3], (2, 4, 3)], 1),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chain_is_one_transpose(name: str) -> None:
    shape, moves, transposes = CHAINS[name]
    feeds = {"x": random(*shape)}
    nodes, constants = chain("x", moves)
    made = model([*nodes, node("Neg", [f"m{len(moves)}"], "y")], feeds, constants)
    data = convert(made)
    assert op_names(data).count("TRANSPOSE") == transposes
    np.testing.assert_array_equal(run_tflite(data, feeds)["y"], run_onnx(made, feeds)["y"])


def test_patches_of_a_convolution_cost_one_transpose() -> None:
    """MobileViT's: the merged axes hold channels, which lie last; the chain as written would move them twice more."""
    feeds = {"x": random(1, 3, 8, 8)}
    nodes, constants = chain("a", CHAINS["patches of channels"][1])
    constants |= {"w": random(6, 3, 1, 1), "v": random(6, 5)}
    made = model([node("Conv", ["x", "w"], "a"), *nodes, node("MatMul", ["m5", "v"], "y")], feeds, constants)
    data = convert(made, layout="nhwc")
    assert op_names(data).count("TRANSPOSE") == 1
    actual = run_tflite(data, {"x": np.ascontiguousarray(feeds["x"].transpose(0, 2, 3, 1))})["y"]
    np.testing.assert_allclose(actual, run_onnx(made, feeds)["y"], rtol=1e-5, atol=1e-5)


def test_value_from_within_a_chain_is_kept() -> None:
    shape, moves, _ = CHAINS["windows"]
    feeds = {"x": random(*shape)}
    nodes, constants = chain("x", moves)
    nodes += [node("Neg", ["m3"], "y"), node("Abs", ["m2"], "z")]
    made = model(nodes, feeds, constants, ("y", "z", "m1"))
    actual = run_tflite(convert(made), feeds)
    for name, array in run_onnx(made, feeds).items():
        np.testing.assert_array_equal(actual[name], array)


def test_int8_chain_stays_int8() -> None:
    shape, moves, _ = CHAINS["windows"]
    graph = Qdq({"x": random(*shape)})
    nodes, constants = chain(graph.quantize("x"), moves)
    graph.nodes += nodes
    graph.constants |= constants
    made = graph.model(graph.quantize("m3", graph.params["x"]))
    data = convert(made)
    assert op_names(data) == ["QUANTIZE", "RESHAPE", "TRANSPOSE", "RESHAPE", "DEQUANTIZE"]
    ((name, expected),) = run_onnx(made, graph.inputs, optimized=False).items()
    np.testing.assert_array_equal(run_tflite(data, graph.inputs)[name], expected)


@pytest.mark.parametrize("seed", range(40))
def test_any_chain_is_computed_as_written(seed: int) -> None:
    """Between convolutions, so that the chain begins with channels last."""
    rng = np.random.default_rng(seed)
    shape: tuple[int, ...] = tuple(
        int(size) for size in (1, rng.choice([4, 6]), rng.choice([2, 4]), rng.choice([2, 6]))
    )
    feeds = {"x": random(*shape)}
    weights = random(shape[1], shape[1], 1, 1)
    moves: Moves = []
    for _ in range(rng.integers(2, 7)):
        if rng.random() < 0.5:
            perm = [int(axis) for axis in rng.permutation(len(shape))]
            moves.append(perm)
            shape = tuple(shape[axis] for axis in perm)
        else:
            shape = _other_shape(rng, math.prod(shape))
            moves.append(shape)
    nodes, constants = chain("a", moves)
    made = model(
        [node("Conv", ["x", "w"], "a"), *nodes, node("Relu", [f"m{len(moves)}"], "y")],
        feeds,
        constants | {"w": weights},
    )
    data = convert(made)
    np.testing.assert_allclose(run_tflite(data, feeds)["y"], run_onnx(made, feeds)["y"], rtol=1e-5, atol=1e-5)


def _other_shape(rng: np.random.Generator, size: int) -> tuple[int, ...]:
    shape: list[int] = []
    while size > 1 and len(shape) < 4:
        divisors = [number for number in range(1, size + 1) if size % number == 0]
        shape.append(int(rng.choice(divisors)))
        size //= shape[-1]
    return (*shape, size)
