"""Random graphs of ops that move, merge and split axes, in float and int8: no layout may ever be guessed."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import onnx
import pytest
from tflite_tools import model, node, run_onnx, run_tflite

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite import convert

GRAPHS = 40
STEPS = 9
LARGEST = 4096


class Grower:
    """Grows a graph by ops whose shapes are read from running it; sizes repeat, so that axes are easily confused."""

    def __init__(self, seed: int, quantized: bool) -> None:
        self.random = np.random.default_rng(seed)
        self.quantized = quantized
        shape = tuple(self.random.choice([1, 2, 3, 4, 4], 4).tolist())
        self.inputs = {"x": self.random.standard_normal(shape).astype(np.float32)}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.values = dict(self.inputs)
        self.kinds: Counter[str] = Counter()
        if quantized:
            self.add("QuantizeLinear", "x", *self.steps("x"))
            self.add("DequantizeLinear", self.last, *self.steps("x"))

    @property
    def last(self) -> str:
        return list(self.values)[-1]

    def steps(self, name: str) -> list[str]:
        if "s" not in self.constants:
            self.constants |= {"s": np.float32(0.05), "z": np.int8(7)}
        return ["s", "z"]

    def constant(self, array: object) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array)
        return name

    def add(self, op: str, *inputs: str, count: int = 1, **attributes: object) -> None:
        outputs = [f"t{len(self.values) + index}" for index in range(count)]
        made = node(op, inputs, outputs, **attributes)
        results = run_onnx(model([*self.nodes, made], self.inputs, self.constants, outputs), self.inputs)
        if any(array.size > LARGEST or 0 in array.shape for array in results.values()):
            return
        self.nodes.append(made)
        self.values |= results
        self.kinds[op] += 1

    def grow(self) -> None:
        floats = [name for name, array in self.values.items() if array.dtype == np.float32 and array.ndim]
        x = floats[-1] if self.random.random() < 0.7 else str(self.random.choice(floats))
        array = self.values[x]
        rank, axis = array.ndim, int(self.random.integers(array.ndim))
        choice = int(self.random.integers(13))
        if choice == 0:
            self.add("Transpose", x, perm=self.random.permutation(rank).tolist())
        elif choice == 1:
            self.add("Reshape", x, self.constant(np.array(self.factors(array.size))))
        elif choice == 2 and rank == 4:
            weights = self.random.standard_normal((int(self.random.choice([2, 3, 4])), array.shape[1], 1, 1))
            self.add("Conv", x, self.constant(weights.astype(np.float32)))
        elif choice == 3 and rank < 5:
            other = str(self.random.choice([name for name in floats if self.broadcasts(name, x)]))
            self.add(str(self.random.choice(["Add", "Mul", "Sub"])), x, other)
        elif choice == 4:
            same = [name for name in floats if self.values[name].shape == array.shape]
            self.add("Concat", x, str(self.random.choice(same)), axis=axis)
        elif choice == 5:
            start, step = int(self.random.integers(array.shape[axis])), int(self.random.choice([1, 1, 2, -1]))
            end = -100 if step < 0 else 100
            self.add("Slice", x, *(self.constant([number]) for number in (start, end, axis, step)))
        elif choice == 6 and rank > 1:
            op = str(self.random.choice(["ReduceMean", "ReduceMax", "ReduceSum"]))
            self.add(op, x, self.constant([axis]), keepdims=int(self.random.integers(2)))
        elif choice == 7:
            self.add("Softmax", x, axis=axis)
        elif choice == 8:
            self.add("Unsqueeze", x, self.constant([axis]))
        elif choice == 9 and array.shape[-1] > 1:
            weights = self.random.standard_normal((array.shape[-1], 4)).astype(np.float32)
            self.add("MatMul", x, self.constant(weights))
        elif choice == 10 and rank == 4 and min(array.shape[2:]) > 1:
            self.add("MaxPool", x, kernel_shape=[2, 2], strides=[1, 2])
        elif choice == 11 and array.shape[axis] % 2 == 0:
            self.add("Split", x, count=2, axis=axis, num_outputs=2)
        elif choice == 12:
            self.add("Flatten", x, axis=axis)
        if self.quantized and self.random.random() < 0.4:
            self.add("QuantizeLinear", self.last, *self.steps(self.last))
            self.add("DequantizeLinear", self.last, *self.steps(self.last))

    def factors(self, size: int) -> list[int]:
        shape = []
        while len(shape) < 3 and size > 1:
            divisor = int(self.random.choice([number for number in range(1, size + 1) if size % number == 0]))
            shape.append(divisor)
            size //= divisor
        return [*shape, size]

    def broadcasts(self, name: str, onto: str) -> bool:
        try:
            return len(np.broadcast_shapes(self.values[name].shape, self.values[onto].shape)) <= 5
        except ValueError:
            return False

    def finish(self) -> onnx.ModelProto:
        outputs = [name for name, array in self.values.items() if array.dtype == np.float32 and name != "x"]
        return model(self.nodes, self.inputs, self.constants, outputs[-3:])


def check(seed: int, quantized: bool) -> Counter[str]:
    grower = Grower(seed, quantized)
    for _ in range(STEPS):
        grower.grow()
    made = grower.finish()
    expected = run_onnx(made, grower.inputs, optimized=False)
    try:
        data = convert(made)
    except EdgeKitError as error:
        assert "axes" in error.what, f"seed {seed}: {error}"
        return Counter()
    for xnnpack in (True, False):
        actual = run_tflite(data, grower.inputs, xnnpack)
        for name, array in expected.items():
            assert actual[name].shape == array.shape, f"seed {seed}"
            if quantized:
                # One step of rounding may grow through what follows it: a confused axis moves most of the values.
                assert np.mean(np.abs(actual[name] - array) > 0.12 + 0.05 * np.abs(array).max()) < 0.05, f"seed {seed}"
            else:
                limit = 1e-4 * max(1e-3, np.abs(array).max())
                np.testing.assert_allclose(actual[name], array, rtol=1e-4, atol=limit, err_msg=f"seed {seed}")
    return grower.kinds


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
def test_random_graphs_match_onnxruntime(quantized: bool) -> None:
    kinds = sum((check(seed, quantized) for seed in range(GRAPHS)), Counter())
    assert len(kinds) >= 14, f"the graphs hold only {kinds}"


if __name__ == "__main__":
    for first in range(int(sys.argv[1]), int(sys.argv[2])):
        for with_int8 in (False, True):
            try:
                check(first, with_int8)
            except Exception as error:
                print(first, with_int8, type(error).__name__, str(error)[:300].replace("\n", " "))
