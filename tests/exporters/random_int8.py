"""Random int8 networks as ONNX QDQ graphs, in the ways that exporters and ONNX Runtime's quantize_static write them.

Activations are int8 or uint8 per tensor, calibrated on the run's own input; weights int8 or uint8 per tensor or per
channel, as integers or as float constants behind a QuantizeLinear, biases int32 or float. A tensor is dequantized once
for all readers or once for each; some stay float, some are quantized twice, and integers are outputs of the graph too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from random_graphs import Made, Refused, finished
from tflite_tools import run_onnx

LAYERS = 7
LARGEST = 6000
OPSET = 20
MAKERS: dict[str, Callable[[Network], str]] = {}


class Network:
    """Grows a network: `float_value` names a real operand, `quantized` quantizes what a layer made."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.values: dict[str, np.ndarray] = {}
        self.params: dict[str, tuple[str, str]] = {}  # float value → the scale and zero point that it was read with
        self.codes: dict[str, str] = {}  # float value → the integers that it was read from
        self.unsigned = self.chance(0.3)
        self.separate = self.chance(0.4)  # a DequantizeLinear for each reader
        self.made = 0
        shape = self.one([(2, 3, 8, 8), (1, 4, 6, 5), (1, 4, 7, 7), (2, 6), (1, 5, 8), (3, 4), (1, 8, 4, 4)])
        self.inputs = {"x": (self.random.standard_normal(shape) * 2).astype(np.float32)}
        self.values["x"] = self.inputs["x"]
        if self.chance(0.25):  # the caller quantizes
            scale, zero = self.parameters(self.inputs["x"])
            code = self.add("QuantizeLinear", "x", scale, zero)
            self.inputs["x"] = self.values["x"] = self.values.pop(code)
            self.nodes.clear()
            self.last = self.add("DequantizeLinear", "x", scale, zero)
            self.params[self.last] = scale, zero
        else:
            self.last = self.quantized("x")

    def one(self, choices: Sequence[Any]) -> Any:
        """One of some choices."""
        return choices[int(self.random.integers(len(choices)))]

    def chance(self, share: float) -> bool:
        """Whether something happens."""
        return bool(self.random.random() < share)

    def constant(self, array: object, dtype: Any = None) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = self.values[name] = np.asarray(array).astype(dtype or np.asarray(array).dtype)
        return name

    def add(self, op: str, *inputs: str, count: int = 1, **attributes: Any) -> str:
        """Append a node; returns its first output."""
        self.made += 1
        outputs = [f"t{self.made}" if count == 1 else f"t{self.made}_{index}" for index in range(count)]
        node = helper.make_node(op, list(inputs), outputs, **attributes)
        feeds = {name: self.values[name] for name in inputs if name}
        try:
            results = run_onnx(finished([node], feeds, {}, outputs, OPSET), feeds, optimized=False)
        except Exception as error:
            raise Refused(str(error)) from error
        for array in results.values():
            if array.size > LARGEST or 0 in array.shape or not (np.abs(array.astype(float)) < 1e4).all():
                raise Refused
        self.nodes.append(node)
        self.values |= results
        return outputs[0]

    # ---- quantization -----------------------------------------------------------------------------------------

    def parameters(self, array: np.ndarray) -> tuple[str, str]:
        """Scale and zero point that hold an array: by its range, or symmetric, or cutting some of it off."""
        low, high = min(0.0, float(array.min())), max(0.0, float(array.max()))
        if self.chance(0.15):
            low, high = low * 0.7, high * 0.7
        if self.chance(0.25):
            low, high = -max(-low, high), max(-low, high)
        scale = max(high - low, 1e-3) / 255
        least = 0 if self.unsigned else -128
        zero = np.clip(round(least - low / scale), least, least + 255)
        return self.constant(scale, np.float32), self.constant(zero, np.uint8 if self.unsigned else np.int8)

    def quantized(self, name: str, params: tuple[str, str] | None = None) -> str:
        """QuantizeLinear and DequantizeLinear of a float value; returns the float value behind them."""
        params = params or self.parameters(self.values[name])
        code = self.add("QuantizeLinear", name, *params)
        real = self.add("DequantizeLinear", code, *params)
        self.params[real], self.codes[real] = params, code
        return real

    def read(self, name: str) -> str:
        """A float value, or a DequantizeLinear of its own for a reader."""
        if self.separate and name in self.codes and self.chance(0.7):
            again = self.add("DequantizeLinear", self.codes[name], *self.params[name])
            self.params[again], self.codes[again] = self.params[name], self.codes[name]
            return again
        return name

    def weights(self, shape: Sequence[int], axis: int | None) -> str:
        """Constant weights: integers behind a DequantizeLinear, or floats behind both, per channel along an axis."""
        real = self.random.standard_normal(shape).astype(np.float32) / max(1, np.prod(shape[1:])) ** 0.5
        if self.chance(0.06):
            return self.constant(real)
        axis = axis if self.chance(0.6) else None
        others = tuple(each for each in range(len(shape)) if each != axis)
        size = np.abs(real).max(others) if axis is not None else np.abs(real).max()
        scale = np.asarray(np.maximum(size, 1e-3) / 127, np.float32)
        unsigned = self.unsigned and axis is None and self.chance(0.4)
        zero = np.full(scale.shape, 121 if unsigned else 0, np.uint8 if unsigned else np.int8)
        names = self.constant(scale), self.constant(zero)
        along = {} if axis is None else {"axis": axis}
        if self.chance(0.3):
            code = self.add("QuantizeLinear", self.constant(real), *names, **along)
        else:
            spread = [-1 if each == axis else 1 for each in range(len(shape))] if axis is not None else [1] * len(shape)
            stored = np.rint(real / scale.reshape(spread)) + int(zero.reshape(-1)[0])
            info = np.iinfo(zero.dtype)
            code = self.constant(np.clip(stored, info.min, info.max), zero.dtype)
        made = self.add("DequantizeLinear", code, *names, **along)
        self.params[made] = names
        return made

    def bias(self, x: str, w: str, count: int) -> list[str]:
        """No bias, a float one, or int32 at the product of the scales."""
        real = self.random.standard_normal(count).astype(np.float32) * 0.3
        if self.chance(0.3):
            return []
        if self.chance(0.4) or x not in self.params or w not in self.params:
            return [self.constant(real)]
        scale = np.asarray(self.constants[self.params[x][0]] * self.constants[self.params[w][0]])
        stored = np.rint(real / scale).astype(np.int32)
        zero = [self.constant(np.zeros(np.shape(scale), np.int32))] if self.chance(0.5) else []
        along = {"axis": 0} if np.ndim(scale) else {}
        return [self.add("DequantizeLinear", self.constant(stored), self.constant(scale), *zero, **along)]

    # ---- operands ---------------------------------------------------------------------------------------------

    def pick(self, where: Callable[[np.ndarray], bool] = lambda array: True) -> str:
        """A float value that is no scalar, the last one sooner than another."""
        names = [
            name
            for name, array in self.values.items()
            if array.dtype == np.float32 and name not in self.constants and name != "x" and array.ndim and where(array)
            and (name in self.params) != self.chance(0.1)
        ]  # fmt: skip
        if not names:
            raise Refused
        best = self.last if self.last in names and self.chance(0.6) else self.one(names)
        return self.read(str(best))

    def like(self, name: str) -> str:
        """An operand of the same shape or one that broadcasts: another value, or a constant that is quantized."""
        array = self.values[name]
        same = [
            other
            for other, value in self.values.items()
            if value.dtype == np.float32 and value.shape == array.shape and other not in self.constants
        ]
        if self.chance(0.65):
            return self.read(str(self.one(same)))
        shape = self.one([array.shape, array.shape[-1:], (1,), ()])
        made = self.constant((self.random.standard_normal(shape) * 0.5).astype(np.float32))
        return self.quantized(made) if self.chance(0.7) else made

    def grow(self) -> None:
        """Append one layer, and quantize what it made, most often."""
        mark = len(self.nodes)
        known = dict(self.values)
        op = str(self.one(list(MAKERS)))
        try:
            made = MAKERS[op](self)
            array = self.values[made]
            if array.dtype == np.float32:
                x = next((name for name in self.nodes[-1].input if name in self.params), None)
                keeps = op in MOVES and x is not None and self.chance(0.8)
                if self.chance(0.85):
                    made = self.quantized(made, self.params[x] if keeps and x is not None else None)
                if self.chance(0.05):
                    made = self.quantized(made)
                self.last = made
        except Refused:
            del self.nodes[mark:]
            self.values = known

    def finish(self) -> Made:
        read = {name for node in self.nodes for name in node.input}
        made = [name for node in self.nodes for name in node.output if name]
        weights = {name for node in self.nodes for name in node.output if _constant(self, name)}
        leaves = [name for name in made if name not in read]
        outputs = [name for name in made if name in leaves or (self.chance(0.05) and name not in weights)]
        self.random.shuffle(outputs)
        constants = {name: array for name, array in self.constants.items() if name in read}
        model = finished(self.nodes, self.inputs, constants, outputs[:4], OPSET)
        return Made(model, self.inputs, tuple(node.op_type for node in self.nodes))


def _constant(network: Network, name: str) -> bool:
    """Whether a value depends on no input."""
    node = next((node for node in network.nodes if name in node.output), None)
    return name in network.constants or (node is not None and all(_constant(network, each) for each in node.input))


def network(seed: int) -> Made:
    """Returns the network of a seed."""
    made = Network(seed)
    layers = int(made.random.integers(1, LAYERS + 1))
    for _ in range(layers):
        made.grow()
    return made.finish()


MOVES = {
    "Transpose", "Reshape", "Flatten", "Squeeze", "Slice", "Split", "MaxPool", "Relu", "Pad", "DepthToSpace", "Gather",
    "Concat", "Clip", "Expand", "Tile", "Resize", "GlobalMaxPool", "Max", "Where", "ReduceMax", "Unsqueeze",
}  # fmt: skip


def maker(*ops: str) -> Callable[[Callable[[Network, str], str]], Callable[[Network, str], str]]:
    """Register how layers of some ops are made."""

    def register(function: Callable[[Network, str], str]) -> Callable[[Network, str], str]:
        for op in ops:
            MAKERS[op] = lambda n, op=op: function(n, op)  # type: ignore[misc]
        return function

    return register


def image(array: np.ndarray) -> bool:
    return array.ndim == 4 and min(array.shape[2:]) > 1


@maker("Conv", "Conv2", "Conv3", "ConvTranspose")
def convolution(n: Network, op: str) -> str:
    transposed = op == "ConvTranspose"
    x = n.pick(lambda array: array.ndim in (3, 4) and min(array.shape[2:]) > 2)
    array = n.values[x]
    channels, rank = array.shape[1], array.ndim - 2
    group = int(n.one([1, 1, 1, channels, *[each for each in (2, 4) if channels % each == 0]]))
    width, size = int(n.one([1, 2, 3])), [int(n.one([1, 2, 3])) for _ in range(rank)]
    shape = [channels, width, *size] if transposed else [group * width, channels // group, *size]
    w = n.weights(shape, 1 if transposed else 0)
    if transposed and group > 1 and np.ndim(n.constants.get(n.params.get(w, ("",))[0], 0)):
        raise Refused
    count = width * group
    inputs = [x, w, *([] if transposed and group > 1 else n.bias(x, w, count))]
    pads = [int(n.one([0, 1])) for _ in range(2 * rank)] if n.chance(0.5) else [0] * 2 * rank
    strides = [int(n.one([1, 1, 2]))] * rank
    made = n.add(op if transposed else "Conv", *inputs, group=group, pads=pads, strides=strides)
    return n.add(n.one(["Relu", "HardSwish", "Sigmoid"]), made) if n.chance(0.4) else made


@maker("Gemm", "MatMul", "Linear")
def linear(n: Network, op: str) -> str:
    if op == "Gemm":
        x = n.pick(lambda array: array.ndim == 2)
        features, width = n.values[x].shape[1], int(n.one([2, 4, 6]))
        transposed = int(n.one([0, 1]))
        w = n.weights([width, features] if transposed else [features, width], 0 if transposed else 1)
        made = n.add("Gemm", x, w, *n.bias(x, w, width), transB=transposed)
    elif op == "Linear":
        x = n.pick(lambda array: array.ndim >= 2)
        features, width = n.values[x].shape[-1], int(n.one([2, 4, 6]))
        w = n.weights([features, width], 1)
        made = n.add("MatMul", x, w)
        made = n.add("Add", made, n.constant(n.random.standard_normal(width), np.float32)) if n.chance(0.5) else made
    else:
        x = n.pick(lambda array: array.ndim >= 2)
        y = n.pick(lambda array: array.ndim == n.values[x].ndim)
        order = [*range(n.values[y].ndim - 2), n.values[y].ndim - 1, n.values[y].ndim - 2]
        y = n.add("Transpose", y, perm=order) if n.chance(0.5) else y
        made = n.add("MatMul", x, y)
    return n.add("Relu", made) if n.chance(0.3) else made


@maker("Add", "Mul", "Sub", "Max", "Min")
def arithmetic(n: Network, op: str) -> str:
    x = n.pick()
    names = [x, x if n.chance(0.08) else n.like(x)]
    n.random.shuffle(names)
    made = n.add(op, *names)
    return n.add("Relu", made) if n.chance(0.2) and op == "Add" else made


@maker("Relu", "Clip", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "LeakyRelu", "Elu", "Abs", "Neg")
def activation(n: Network, op: str) -> str:
    x = n.pick()
    if op == "Clip":
        low, high = n.one([(0, 6), (-1, 1), (0, 1), (-0.5, 2)])
        return n.add(op, x, n.constant(low, np.float32), n.constant(high, np.float32))
    attributes = {"alpha": float(n.one([0.1, 0.3]))} if op == "LeakyRelu" else {}
    return n.add(op, x, **attributes)


@maker("Exp", "Erf", "Softplus", "Mish", "Gelu", "LayerNormalization", "Sin")
def island(n: Network, op: str) -> str:
    """Ops that stay float between int8 ones."""
    x = n.pick(lambda array: bool((array < 6).all()))
    if op == "LayerNormalization":
        count = n.values[x].shape[-1:]
        return n.add(op, x, n.constant(n.random.random(count) + 0.5, np.float32), epsilon=1e-2)
    return n.add(op, x)


@maker("PRelu")
def prelu(n: Network, op: str) -> str:
    x = n.pick(lambda array: array.ndim == 4)
    slope = (n.random.random((n.values[x].shape[1], 1, 1)) * 0.5).astype(np.float32)
    return n.add(op, x, n.quantized(n.constant(slope)) if n.chance(0.6) else n.constant(slope))


@maker("BatchNormalization")
def batch_normalization(n: Network, op: str) -> str:
    x = n.pick(lambda array: array.ndim > 2)
    count = n.values[x].shape[1]
    numbers = [n.constant(n.random.standard_normal(count), np.float32) for _ in range(3)]
    return n.add(op, x, *numbers, n.constant(n.random.random(count) + 0.3, np.float32))


@maker("Softmax")
def softmax(n: Network, op: str) -> str:
    x = n.pick()
    return n.add(op, x, axis=int(n.random.integers(n.values[x].ndim)))


@maker("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
def pool(n: Network, op: str) -> str:
    x = n.pick(image)
    if op.startswith("Global"):
        return n.add(op, x)
    attributes = {"count_include_pad": int(n.one([0, 1]))} if op == "AveragePool" else {}
    pads = [int(n.one([0, 1])) for _ in range(4)] if n.chance(0.5) else [0] * 4
    return n.add(op, x, kernel_shape=[2, 2], strides=[int(n.one([1, 2]))] * 2, pads=pads, **attributes)


@maker("ReduceMean", "ReduceMax", "ReduceSum")
def reduction(n: Network, op: str) -> str:
    x = n.pick(lambda array: array.ndim > 1)
    axes = n.random.permutation(n.values[x].ndim)[: int(n.one([1, 2]))]
    return n.add(op, x, n.constant(np.sort(axes), np.int64), keepdims=int(n.one([0, 1])))


@maker("Transpose")
def transpose(n: Network, op: str) -> str:
    x = n.pick()
    return n.add(op, x, perm=n.random.permutation(n.values[x].ndim).tolist())


@maker("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile")
def reshape(n: Network, op: str) -> str:
    x = n.pick()
    array = n.values[x]
    if op == "Flatten":
        return n.add(op, x)
    if op == "Squeeze":
        return n.add(op, x, n.constant([axis for axis, size in enumerate(array.shape) if size == 1], np.int64))
    if op == "Unsqueeze":
        if array.ndim > 3:
            raise Refused
        return n.add(op, x, n.constant([int(n.random.integers(array.ndim + 1))], np.int64))
    if op == "Expand":
        return n.add(op, x, n.constant([size if size > 1 else int(n.one([1, 2])) for size in array.shape], np.int64))
    if op == "Tile":
        return n.add(op, x, n.constant([int(n.one([1, 1, 2])) for _ in array.shape], np.int64))
    options = [[array.shape[0], -1], [-1], [*array.shape[:2], -1], [array.shape[0], -1, *array.shape[1:2]]]
    return n.add(op, x, n.constant(n.one(options), np.int64))


@maker("Concat")
def concat(n: Network, op: str) -> str:
    x = n.pick()
    axis = int(n.random.integers(n.values[x].ndim))
    names = [x]
    for _ in range(int(n.one([1, 1, 2]))):
        names.append(n.pick(lambda array: array.shape == n.values[x].shape))
    if n.chance(0.15):
        constant = n.constant(n.random.standard_normal(n.values[x].shape), np.float32)
        names.append(n.quantized(constant) if n.chance(0.6) else constant)
    return n.add(op, *names, axis=axis)


@maker("Split")
def split(n: Network, op: str) -> str:
    x = n.pick()
    axis = int(n.random.integers(n.values[x].ndim))
    return n.add(op, x, count=2, axis=axis, num_outputs=2)


@maker("Slice", "Gather", "Pad")
def cut(n: Network, op: str) -> str:
    x = n.pick()
    array = n.values[x]
    axis = int(n.random.integers(array.ndim))
    if op == "Gather":
        found = n.random.integers(-array.shape[axis], array.shape[axis], n.one([(), (1,), (3,)]))
        return n.add(op, x, n.constant(found, np.int64), axis=axis)
    if op == "Pad":
        amounts = np.zeros((2, array.ndim), np.int64)
        amounts[:, axis] = n.one([[1, 1], [0, 2], [1, 0]])
        mode = n.one(["constant", "constant", "reflect", "edge"])
        return n.add(op, x, n.constant(amounts.reshape(-1)), mode=mode)
    start, step = int(n.random.integers(array.shape[axis])), int(n.one([1, 1, 2, -1]))
    numbers = (start, -100 if step < 0 else 100, axis, step)
    return n.add(op, x, *(n.constant([number], np.int64) for number in numbers))


@maker("Resize")
def resize(n: Network, op: str) -> str:
    x = n.pick(image)
    scales = n.constant([1, 1, n.one([1, 2]), 2], np.float32)
    mode = {"mode": "linear"} if n.chance(0.4) else {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}
    return n.add(op, x, "", scales, **mode)


@maker("DepthToSpace")
def depth_to_space(n: Network, op: str) -> str:
    return n.add(op, n.pick(lambda array: array.ndim == 4 and array.shape[1] % 4 == 0), blocksize=2)


@maker("Where")
def where(n: Network, op: str) -> str:
    x = n.pick()
    y = n.pick(lambda array: array.shape == n.values[x].shape)
    condition = n.add("Greater", n.like(x), n.constant(0.1, np.float32))
    return n.add(op, condition, x, y)


def noisy(made: Made, seed: int) -> onnx.ModelProto:
    """The model with what is quantized moved by up to a step, which other kernels may round to."""
    random = np.random.default_rng(seed)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.model.graph.initializer}
    model = onnx.ModelProto()
    model.CopyFrom(made.model)
    shaped = onnx.shape_inference.infer_shapes(model)
    values = (*shaped.graph.value_info, *shaped.graph.output, *shaped.graph.input)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
    del model.graph.node[:]
    for node in made.model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            error = f"{node.output[0]}_error"
            scale = float(constants[node.input[1]].reshape(-1)[0])
            array = np.asarray(random.uniform(-1.0, 1.0, shapes[node.input[0]]) * scale, np.float32)
            model.graph.initializer.append(numpy_helper.from_array(array, error))
            model.graph.node.append(helper.make_node("Add", [node.input[0], error], [f"{node.output[0]}_moved"]))
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[0] = f"{node.output[0]}_moved"
            model.graph.node.append(copy)
        else:
            model.graph.node.append(node)
    return model


def allowed(made: Made, expected: dict[str, np.ndarray], runs: int = 3) -> dict[str, float]:
    """How far each output may be off: a few times what moving every quantized tensor by a step does to it."""
    found = {name: 1e-4 * float(np.abs(array.astype(float)).max(initial=0)) for name, array in expected.items()}
    scales = {node.output[0]: node.input[1] for node in made.model.graph.node if node.op_type.endswith("eLinear")}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.model.graph.initializer}
    for name in found:
        if expected[name].dtype.kind in "iu":
            found[name] = 2
        elif name in scales:
            found[name] += 2 * float(constants[scales[name]].max())
    with contextlib.suppress(Exception):
        for seed in range(runs):
            other = run_onnx(noisy(made, seed), made.feeds, optimized=False)
            for name, array in expected.items():
                off = np.abs(other[name].astype(float) - array.astype(float)).max(initial=0)
                found[name] = max(found[name], 3 * float(off))
    return found
