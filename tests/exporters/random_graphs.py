"""Random ONNX graphs of every op that TFLite export lowers, with all ranks, attributes, types and opsets.

`graph(seed)` makes a model and one run's inputs. The shapes and values of each node are read from ONNX Runtime, so that
what it refuses is left out. Values are read by several nodes, twice by one, and as outputs too; any operand may be a
constant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from tflite_tools import run_onnx

OPSETS = (7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
STEPS = 8
LARGEST = 3000  # elements
HIGHEST = 1e4  # of the size of a float: beyond it, sums and differences lose what they are compared by
FLOAT, INT32, INT64 = np.float32, np.int32, np.int64
Maker = Callable[["Grower"], None]
MAKERS: dict[str, Maker] = {}


@dataclass(frozen=True)
class Made:
    """A model, one run's inputs, and the names of the ops in it."""

    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    ops: tuple[str, ...]


class Refused(Exception):
    """ONNX Runtime does not run a node, or its result is of no use here."""


class Grower:
    """Grows a graph node by node. `pick` finds operands, `add` runs a node and keeps it if it runs."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.opset = int(self.random.choice(OPSETS)) if self.random.random() < 0.5 else 20
        self.inputs: dict[str, np.ndarray] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.values: dict[str, np.ndarray] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.made = 0
        for _ in range(int(self.random.choice([1, 1, 2, 3]))):
            self.input()

    # ---- choices ----------------------------------------------------------------------------------------------

    def one(self, choices: Sequence[Any]) -> Any:
        """One of some choices."""
        return choices[int(self.random.integers(len(choices)))]

    def chance(self, share: float) -> bool:
        """Whether something happens."""
        return bool(self.random.random() < share)

    def shape(self, rank: int | None = None) -> tuple[int, ...]:
        """A small shape whose sizes repeat, so that axes are easily confused."""
        rank = int(self.one([0, 1, 2, 2, 3, 3, 4, 4, 4, 5])) if rank is None else rank
        sizes = [0, 1, 2, 3] if self.chance(0.01) else [1, 2, 3, 4, 4, 5, 6] if rank < 5 else [1, 2, 3, 3]
        return tuple(int(self.one(sizes)) for _ in range(rank))

    def array(self, dtype: Any, shape: Sequence[int]) -> np.ndarray:
        """Random numbers of a type."""
        dtype = np.dtype(dtype)
        if dtype == np.bool_:
            return np.asarray(self.random.random(shape) < 0.5)
        if dtype.kind in "iu":
            low = 0 if dtype.kind == "u" else -6
            return np.asarray(self.random.integers(low, 7, shape)).astype(dtype)
        return np.asarray(self.random.standard_normal(shape) * self.one([0.5, 1, 3])).astype(dtype)

    def input(self) -> str:
        name = f"in{len(self.inputs)}"
        dtype = self.one([FLOAT] * 10 + [INT32, INT64, np.bool_, np.int8, np.uint8, np.int16])
        self.inputs[name] = self.values[name] = self.array(dtype, self.shape())
        return name

    def name(self) -> str:
        """A new name for what a node makes."""
        self.made += 1
        return f"t{self.made}"

    def constant(self, array: object, dtype: Any = None) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = self.values[name] = np.asarray(array).astype(dtype or np.asarray(array).dtype)
        return name

    def ints(self, numbers: object) -> str:
        """A constant of int64."""
        return self.constant(numbers, INT64)

    def pick(
        self, dtypes: Any = FLOAT, where: Callable[[np.ndarray], bool] = lambda array: True, constant: float = 0.08
    ) -> str:
        """The name of a value of a type, a new one sooner than an old one; rarely a constant."""
        dtypes = [np.dtype(each) for each in (dtypes if isinstance(dtypes, (list, tuple)) else [dtypes])]
        names = [name for name, array in self.values.items() if array.dtype in dtypes and where(array)]
        names = [name for name in names if (name in self.constants) == self.chance(constant)] or names
        if not names:
            raise Refused
        return names[-1] if self.chance(0.5) else str(self.one(names))

    def any(self, where: Callable[[np.ndarray], bool] = lambda array: True) -> str:
        """The name of a value of any type, most often float."""
        dtype = self.one([FLOAT] * 8 + [INT32, INT64, np.bool_, np.int8, np.uint8, np.int16])
        try:
            return self.pick(dtype, where)
        except Refused:
            return self.pick(FLOAT, where)

    def beside(self, name: str, share: float = 0.4) -> str:
        """An operand that broadcasts with a value: another value, or a constant of fewer axes or of sizes 1."""
        array = self.values[name]
        fits = [
            other for other, value in self.values.items() if value.dtype == array.dtype and broadcasts(value, array)
        ]
        if fits and not self.chance(share):
            return str(self.one(fits))
        shape = [1 if self.chance(0.3) else size for size in array.shape][int(self.random.integers(array.ndim + 1)) :]
        if self.chance(0.05) and len(shape) < 5:
            shape = [int(self.one([1, 2])), *[1] * (array.ndim - len(shape)), *shape]
        return self.constant(self.array(array.dtype, shape))

    def axis(self, array: np.ndarray) -> int:
        """An axis, counted from either end."""
        if not array.ndim:
            raise Refused
        return int(self.random.integers(-array.ndim if self.opset >= 11 else 0, array.ndim))

    def some(self, rank: int) -> list[int]:
        """Some axes in order, counted from either end."""
        axes = [axis for axis in range(rank) if self.chance(0.4)] or ([int(self.random.integers(rank))] if rank else [])
        return [axis - rank if self.opset >= 11 and self.chance(0.3) else axis for axis in axes]

    def maybe(self, **attributes: Any) -> dict[str, Any]:
        """Some of these attributes: the others keep ONNX's defaults."""
        return {name: value for name, value in attributes.items() if self.chance(0.6)}

    def factors(self, size: int, most: int = 4) -> list[int]:
        """Sizes of a shape with as many elements."""
        shape = []
        while len(shape) < most - 1 and size > 1:
            divisor = int(self.one([number for number in range(1, size + 1) if size % number == 0]))
            shape.append(divisor)
            size //= divisor
        return [*shape, size]

    # ---- nodes ------------------------------------------------------------------------------------------------

    def add(self, op: str, *inputs: str, count: int = 1, keep: Sequence[int] = (0,), **attributes: Any) -> str:
        """Append a node if ONNX Runtime runs it; outputs that are not in `keep` get no name."""
        outputs = [self.name() if index in keep else "" for index in range(count)]
        while outputs and not outputs[-1]:
            outputs.pop()
        domain = "com.microsoft" if op in CONTRIB else ""
        if not domain and not current(op, self.opset):
            raise Refused
        node = helper.make_node(op, list(inputs), outputs, domain=domain, **attributes)
        feeds = {name: self.values[name] for name in inputs if name}
        names = [name for name in outputs if name]
        try:
            results = run_onnx(finished([node], feeds, {}, names, self.opset), feeds, optimized=False)
        except Exception as error:
            raise Refused(str(error)) from error
        for array in results.values():
            if array.size > LARGEST or array.ndim > 6 or array.dtype in (np.float64, np.float16):
                raise Refused
            if array.dtype == FLOAT and not (np.abs(array) < HIGHEST).all():
                raise Refused
        self.nodes.append(node)
        self.values |= results
        return names[0]

    def grow(self) -> None:
        """Append one node of a random op, if it can be."""
        with contextlib.suppress(Refused):
            MAKERS[self.one(list(MAKERS))](self)

    def finish(self) -> Made:
        made = [name for node in self.nodes for name in node.output if name in self.values]
        read = {name for node in self.nodes for name in reads(node)}
        leaves = [name for name in made if name not in read]
        outputs = [name for name in made if name in leaves or self.chance(0.12)]
        self.random.shuffle(outputs)
        nodes, constants = [], {}
        for name in dict.fromkeys(each for node in self.nodes for each in reads(node) if each in self.constants):
            if self.chance(0.2):
                tensor = numpy_helper.from_array(self.constants[name])
                nodes.append(helper.make_node("Constant", [], [name], value=tensor))
            else:
                constants[name] = self.constants[name]
        inputs = {name: array for name, array in self.inputs.items() if name in read} or self.inputs
        model = finished([*nodes, *self.nodes], inputs, constants, outputs[:5], self.opset)
        for value in model.graph.output:  # contributed ops have no shape inference
            array = self.values[value.name]
            elem = helper.np_dtype_to_tensor_dtype(array.dtype)
            value.CopyFrom(helper.make_tensor_value_info(value.name, elem, array.shape))
        return Made(model, inputs, tuple(node.op_type for node in self.nodes))


def current(op: str, opset: int) -> bool:
    """Whether an opset has an op: ONNX Runtime takes some in models that are too old or too new for them."""
    try:
        return not onnx.defs.get_schema(op, opset, "").deprecated
    except onnx.defs.SchemaError:
        return False


def reads(node: onnx.NodeProto) -> list[str]:
    """The values that a node reads, those of its branches too."""
    inner = [name for attribute in node.attribute for each in attribute.g.node for name in each.input]
    return [name for name in (*node.input, *inner) if name]


def broadcasts(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays broadcast to no more than five axes."""
    try:
        return len(np.broadcast_shapes(first.shape, second.shape)) <= 5
    except ValueError:
        return False


def finished(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, np.ndarray],
    constants: dict[str, np.ndarray],
    outputs: Sequence[str],
    opset: int,
) -> onnx.ModelProto:
    """A model of nodes in topological order."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in inputs.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    used = {node.domain for node in nodes}
    made = helper.make_model(
        graph, opset_imports=[each for each in opsets if each.domain in used | {""}], ir_version=10
    )
    inferred = onnx.shape_inference.infer_shapes(made)
    del inferred.graph.value_info[:]
    return inferred


def graph(seed: int) -> Made:
    """Returns the graph of a seed."""
    grower = Grower(seed)
    steps = int(grower.random.integers(1, STEPS + 1))
    for _ in range(40):
        if len(grower.nodes) < steps:
            grower.grow()
    if not grower.nodes:
        grower.values["in0"] = grower.inputs["in0"]
        grower.add("Identity", "in0")
    return grower.finish()


# ---- ops ----------------------------------------------------------------------------------------------------------

CONTRIB = {"Gelu_", "FastGelu", "QuickGelu", "BiasGelu", "FusedMatMul"}


def maker(*ops: str) -> Callable[[Callable[[Grower, str], None]], Callable[[Grower, str], None]]:
    """Register how nodes of some ops are made."""

    def register(function: Callable[[Grower, str], None]) -> Callable[[Grower, str], None]:
        for op in ops:
            MAKERS[op] = lambda g, op=op: function(g, op)  # type: ignore[misc]
        return function

    return register


def within(low: float, high: float) -> Callable[[np.ndarray], bool]:
    """Whether all numbers lie between bounds."""
    return lambda array: array.size == 0 or bool((array > low).all() and (array < high).all())


def limited(g: Grower, low: float, high: float, axes: Callable[[np.ndarray], bool] = lambda array: True) -> str:
    """A value between bounds: one that is, or one that is made so by a sigmoid."""
    try:
        return g.pick(FLOAT, lambda array: within(low, high)(array) and axes(array))
    except Refused:
        squashed = g.add("Sigmoid", g.pick(FLOAT, axes))
        scaled = g.add("Mul", squashed, g.constant((high - low) * 0.9, FLOAT))
        return g.add("Add", scaled, g.constant(low + (high - low) * 0.05, FLOAT))


def far_from_zero(g: Grower) -> str:
    return g.pick(FLOAT, lambda array: bool((np.abs(array) > 0.05).all()))


UNARY = [
    "Abs", "Ceil", "Cos", "Exp", "Floor", "Neg", "Round", "Sign", "Sin", "Relu", "HardSwish", "Mish", "Gelu", "Erf",
    "Softplus", "Softsign", "Sigmoid", "Tanh", "Tan", "Sinh", "Cosh", "Asinh", "Atan", "Identity", "Selu", "Elu",
    "LeakyRelu", "Celu", "HardSigmoid", "ThresholdedRelu",
]  # fmt: skip
SLOPED: dict[str, tuple[str, ...]] = {
    "Selu": ("alpha", "gamma"), "Elu": ("alpha",), "LeakyRelu": ("alpha",), "Celu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"), "ThresholdedRelu": ("alpha",),
}  # fmt: skip


@maker(*UNARY)
def unary(g: Grower, op: str) -> None:
    attributes = g.maybe(**{name: float(g.one([0.1, 0.3, 0.5, 1.0, 1.5])) for name in SLOPED.get(op, ())})
    if op == "Gelu":
        attributes |= g.maybe(approximate=g.one(["tanh", "none"]))
    bound = 9 if op in ("Exp", "Sinh", "Cosh") else 1.2 if op == "Tan" else np.inf
    integers = [INT32, INT64, np.int8] if op in ("Abs", "Neg", "Sign", "Identity") and g.chance(0.2) else [FLOAT]
    x = g.pick(integers) if integers[0] != FLOAT else g.pick(FLOAT, within(-bound, bound))
    g.add(op, x, **attributes)


@maker("Acos", "Asin", "Atanh", "Acosh", "Log", "Sqrt")
def bounded(g: Grower, op: str) -> None:
    low, high = {"Acosh": (1.01, 9), "Log": (0.01, 1e4), "Sqrt": (0.0, 1e4)}.get(op, (-0.98, 0.98))
    g.add(op, limited(g, low, high))


@maker("Reciprocal")
def reciprocal(g: Grower, op: str) -> None:
    g.add(op, far_from_zero(g))


@maker("PRelu")
def prelu(g: Grower, op: str) -> None:
    x = g.pick()
    array = g.values[x]
    if array.ndim > 2 and g.chance(0.5):
        slope = g.constant(g.array(FLOAT, (array.shape[1], *[1] * (array.ndim - 2))))
    else:
        slope = g.beside(x, 0.8)
    if np.broadcast_shapes(g.values[slope].shape, array.shape) != array.shape:
        raise Refused
    g.add(op, x, slope)


@maker("Clip")
def clip(g: Grower, op: str) -> None:
    if g.opset < 11:
        g.add(op, g.pick(), **g.maybe(min=float(g.one([-1, 0, 0.3])), max=float(g.one([1, 6, 2.5]))))
        return
    x = g.any() if g.opset >= 12 else g.pick()
    dtype = g.values[x].dtype
    low, high = g.one([(-1, 1), (0, 6), (0, 2), (-2, 0), (3, -1), (1, 4)])
    bounds = [g.constant(low, dtype) if g.chance(0.7) else "", g.constant(high, dtype) if g.chance(0.7) else ""]
    if g.chance(0.2):
        bounds[int(g.one([0, 1]))] = g.pick(dtype, lambda array: array.ndim == 0)
    while bounds and not bounds[-1]:
        bounds.pop()
    g.add(op, x, *bounds)


@maker("Softmax", "LogSoftmax", "Hardmax")
def softmax(g: Grower, op: str) -> None:
    x = g.pick(FLOAT, lambda array: array.ndim > 0)
    g.add(op, x, **g.maybe(axis=g.axis(g.values[x])))


@maker("Dropout")
def dropout(g: Grower, op: str) -> None:
    masked = g.chance(0.3) and g.opset >= 10
    g.add(op, g.pick(), count=2 if masked else 1, keep=(0, 1) if masked else (0,))


@maker("Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean")
def arithmetic(g: Grower, op: str) -> None:
    integers = op in ("Add", "Sub", "Mul") or (op in ("Max", "Min") and g.opset >= 12)
    x = g.any(lambda array: array.dtype != np.bool_) if integers and g.chance(0.3) else g.pick()
    count = int(g.one([1, 2, 2, 3, 4])) if op in ("Max", "Min", "Sum", "Mean") else 2
    names = [x]
    while len(names) < count:
        names.append(x if g.chance(0.1) else g.beside(x))
    g.random.shuffle(names)
    g.add(op, *names)


@maker("Div")
def divide(g: Grower, op: str) -> None:
    if g.chance(0.2) and g.opset >= 14:
        dtype = g.one([INT32, INT64, np.int8, np.uint8, np.int16])
        x = g.pick(dtype)
        divisor = g.constant(g.random.integers(1, 5, g.values[x].shape[-1:]), dtype)
        g.add(op, x, divisor)
        return
    y = far_from_zero(g)
    g.add(op, g.beside(y), y)


@maker("Pow")
def power(g: Grower, op: str) -> None:
    if g.chance(0.6):
        exponent = g.one([2.0, 3.0, 1.0, 0.5, -0.5, 4.0, -1.0])
        x = g.pick() if exponent in (2, 3, 1, 4) else limited(g, 0.05, 100)
        shape: tuple[int, ...] = g.one([(), (1,), (1, 1)])
        dtype = FLOAT if g.opset < 12 else g.one([FLOAT, FLOAT, INT32, INT64])
        g.add(op, x, g.constant(np.full(shape, int(exponent) if dtype != FLOAT else exponent), dtype))
    else:
        x = limited(g, 0.05, 8)
        g.add(op, x, g.beside(x))


@maker("Mod")
def modulo(g: Grower, op: str) -> None:
    if g.chance(0.5):
        dtype = g.one([INT32, INT64, np.int8, np.int16])
        x = g.pick(dtype)
        g.add(op, x, g.constant(g.random.integers(1, 5, g.values[x].shape[-1:]), dtype), **g.maybe(fmod=1))
    else:
        y = far_from_zero(g)
        g.add(op, g.beside(y), y, fmod=1)


@maker("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
def comparison(g: Grower, op: str) -> None:
    floats = g.opset >= 11 or op not in ("Equal",)
    integers = g.opset >= 9 or op == "Equal"
    x = g.any(lambda array: array.dtype != np.bool_ or op == "Equal") if integers else g.pick()
    if not floats and g.values[x].dtype == FLOAT:
        raise Refused
    g.add(op, *g.random.permutation([x, g.beside(x)]).tolist())


@maker("And", "Or", "Xor")
def logic(g: Grower, op: str) -> None:
    x = g.pick(np.bool_)
    g.add(op, x, g.beside(x))


@maker("Not")
def negation(g: Grower, op: str) -> None:
    g.add(op, g.pick(np.bool_))


@maker("IsNaN", "IsInf")
def special(g: Grower, op: str) -> None:
    g.add(op, g.pick(), **(g.maybe(detect_negative=0, detect_positive=1) if op == "IsInf" else {}))


@maker("Where")
def where(g: Grower, op: str) -> None:
    condition = g.pick(np.bool_) if g.chance(0.7) else g.constant(g.array(np.bool_, g.shape()))
    names = [
        name for name, array in g.values.items() if array.dtype == FLOAT and broadcasts(array, g.values[condition])
    ]
    if not names or g.chance(0.3):
        names = [g.constant(g.array(FLOAT, g.values[condition].shape)), g.constant(0.5, FLOAT)]
    x = str(g.one(names))
    g.add(op, condition, x, g.beside(x))


@maker("BitShift")
def shift(g: Grower, op: str) -> None:
    dtype = g.one([np.uint8, np.uint32])
    x = g.pick(dtype)
    g.add(op, x, g.constant(g.random.integers(0, 4, g.values[x].shape[-1:]), dtype), direction=g.one(["LEFT", "RIGHT"]))


@maker("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot")
def bits(g: Grower, op: str) -> None:
    x = g.pick([INT32, INT64, np.int8, np.uint8])
    g.add(op, *([x] if op == "BitwiseNot" else [x, g.beside(x)]))


REDUCTIONS = [
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceSumSquare",
]  # fmt: skip


@maker(*REDUCTIONS)
def reduction(g: Grower, op: str) -> None:
    x = limited(g, 0.05, 100) if op == "ReduceLogSum" else g.pick()
    if op in ("ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd") and g.chance(0.15):
        x = g.pick([INT32, INT64])
    if op in ("ReduceMax", "ReduceMin") and g.chance(0.15) and g.opset >= 12:
        x = g.pick([np.int8, np.uint8])
    axes = g.some(g.values[x].ndim)
    attributes = g.maybe(keepdims=int(g.one([0, 1])))
    names = [x]
    if axes and g.chance(0.75):
        if g.opset >= (13 if op == "ReduceSum" else 18):
            names.append(g.ints(axes))
        else:
            attributes["axes"] = axes
    elif g.opset >= (13 if op == "ReduceSum" else 18):
        names += ["", g.ints([])][: int(g.one([0, 1]))]
        attributes |= g.maybe(noop_with_empty_axes=int(g.one([0, 1])))
    while names and not names[-1]:
        names.pop()
    g.add(op, *names, **attributes)


@maker("ArgMax", "ArgMin")
def arguments(g: Grower, op: str) -> None:
    x = g.pick([FLOAT, INT32] if g.chance(0.2) else FLOAT, lambda array: array.ndim > 0)
    last = g.maybe(select_last_index=int(g.one([0, 1]))) if g.opset >= 12 else {}
    g.add(op, x, **g.maybe(axis=g.axis(g.values[x]), keepdims=int(g.one([0, 1]))), **last)


@maker("TopK")
def top(g: Grower, op: str) -> None:
    x = g.pick(FLOAT, lambda array: array.ndim > 0)
    axis = g.axis(g.values[x])
    size = g.values[x].shape[axis]
    if not size:
        raise Refused
    k = int(g.random.integers(1, size + 1))
    keep = g.one([(0,), (1,), (0, 1)])
    attributes = g.maybe(largest=int(g.one([0, 1]))) if g.opset >= 11 else {}
    inputs = [x, g.ints([k])] if g.opset >= 10 else [x]
    attributes |= {} if g.opset >= 10 else {"k": k}
    g.add(op, *inputs, count=2, keep=keep, axis=axis, **attributes)


@maker("CumSum")
def cumulative(g: Grower, op: str) -> None:
    x = g.pick([FLOAT, FLOAT, INT32, INT64], lambda array: array.ndim > 0)
    g.add(op, x, g.ints(g.axis(g.values[x])), **g.maybe(exclusive=int(g.one([0, 1])), reverse=int(g.one([0, 1]))))


@maker("OneHot")
def one_hot(g: Grower, op: str) -> None:
    depth = int(g.random.integers(2, 6))
    x = (
        g.pick([INT32, INT64], lambda array: within(-depth - 1, depth)(array))
        if g.chance(0.7)
        else g.constant(g.random.integers(-depth, depth, g.shape(2)), INT64)
    )
    pair = g.constant([0.5, 2.0], FLOAT) if g.chance(0.7) else g.constant([0, 1], g.one([INT32, INT64]))
    rank = g.values[x].ndim
    axis = int(g.random.integers(-rank - 1, rank + 1))
    g.add(op, x, g.constant(depth, g.one([INT32, INT64])), pair, **g.maybe(axis=axis))


@maker("Trilu")
def triangle(g: Grower, op: str) -> None:
    x = g.pick([FLOAT, FLOAT, INT64], lambda array: array.ndim > 1)
    offset = [g.ints(int(g.random.integers(-2, 3)))] if g.chance(0.6) else []
    g.add(op, x, *offset, **g.maybe(upper=int(g.one([0, 1]))))


@maker("ReverseSequence")
def reverse(g: Grower, op: str) -> None:
    x = g.pick(FLOAT, lambda array: array.ndim > 1 and array.size > 0)
    time = int(g.one([0, 1]))
    shape = g.values[x].shape
    lengths = g.ints(g.random.integers(1, shape[time] + 1, shape[1 - time]))
    g.add(op, x, lengths, batch_axis=1 - time, time_axis=time)


def indices(g: Grower, shape: Sequence[int], size: int, dtype: Any = INT64) -> str:
    """Indices below a size, negative ones too: a constant, or a value that holds such."""
    if not size:
        raise Refused
    low = -size if g.opset >= 11 else 0
    if g.chance(0.3):
        name = f"in{len(g.inputs)}"
        g.inputs[name] = g.values[name] = np.asarray(g.random.integers(low, size, shape)).astype(dtype)
        return name
    return g.constant(np.asarray(g.random.integers(low, size, shape)), dtype)


@maker("Gather")
def gather(g: Grower, op: str) -> None:
    x = g.any(lambda array: array.ndim > 0)
    axis = g.axis(g.values[x])
    shape = g.one([(), (1,), (3,), (2, 2), (1, 1)])
    g.add(op, x, indices(g, shape, g.values[x].shape[axis], g.one([INT64, INT32])), **({"axis": axis} if axis else {}))


@maker("GatherElements")
def gather_elements(g: Grower, op: str) -> None:
    x = g.any(lambda array: array.ndim > 0)
    array, axis = g.values[x], g.axis(g.values[x])
    shape = list(array.shape)
    shape[axis] = int(g.one([1, 2, 5]))
    g.add(op, x, indices(g, shape, array.shape[axis]), axis=axis)


def rows(g: Grower, array: np.ndarray, depth: int, count: Sequence[int], batch: int = 0) -> np.ndarray:
    """Rows of indices that differ from one another."""
    sizes = array.shape[batch : batch + depth]
    total = int(np.prod(sizes))
    if not total or int(np.prod(count)) > total:
        raise Refused
    flat = g.random.permutation(total)[: int(np.prod(count))]
    found = np.stack(np.unravel_index(flat, sizes), -1).reshape(*count, depth)
    negative = g.random.random(found.shape) < 0.3
    return np.where(negative, found - np.array(sizes), found) if g.opset >= 11 else found


@maker("GatherND")
def gather_nd(g: Grower, op: str) -> None:
    x = g.any(lambda array: array.ndim > 0)
    array = g.values[x]
    depth = int(g.random.integers(1, array.ndim + 1))
    if g.opset >= 12 and array.ndim > 1 and g.chance(0.3):
        depth = int(g.random.integers(1, array.ndim))
        found = np.stack([rows(g, array, depth, (2,), 1) for _ in range(array.shape[0])])
        g.add(op, x, g.ints(found), batch_dims=1)
        return
    g.add(op, x, g.ints(rows(g, array, depth, g.one([(1,), (2,), (1, 2)]))))


def reduction_of(g: Grower) -> dict[str, str]:
    """A scatter's reduction, as the opset has it."""
    if g.opset < 16:
        return {}
    return g.maybe(reduction=g.one(["none", "add", "mul"] + (["max", "min"] if g.opset >= 18 else [])))


@maker("ScatterND")
def scatter_nd(g: Grower, op: str) -> None:
    x = g.pick([FLOAT, FLOAT, FLOAT, INT32, INT64], lambda array: array.ndim > 0)
    array = g.values[x]
    depth = int(g.random.integers(1, array.ndim + 1))
    count = g.one([(1,), (2,), (1, 2)])
    found, attributes = rows(g, array, depth, count), reduction_of(g)
    if attributes.get("reduction", "none") != "none" and g.chance(0.5):
        found = np.concatenate([found, found], 0)
    updates = g.constant(g.array(array.dtype, (*found.shape[:-1], *array.shape[depth:])))
    g.add(op, x, g.ints(found), updates, **attributes)


@maker("ScatterElements")
def scatter_elements(g: Grower, op: str) -> None:
    x = g.pick([FLOAT, FLOAT, FLOAT, INT32, INT64], lambda array: array.ndim > 0 and array.size > 0)
    array, axis = g.values[x], g.axis(g.values[x])
    count = int(g.random.integers(1, array.shape[axis] + 1))
    attributes = reduction_of(g)
    if attributes.get("reduction", "none") == "none":
        order = np.argsort(g.random.random(array.shape), axis)
        found = np.take(order, np.arange(count), axis)
    else:
        shape = list(array.shape)
        shape[axis] = count
        found = g.random.integers(-array.shape[axis], array.shape[axis], shape)
    g.add(op, x, g.ints(found), g.constant(g.array(array.dtype, found.shape)), axis=axis, **attributes)


@maker("Reshape")
def reshape(g: Grower, op: str) -> None:
    x = g.any()
    shape = g.factors(g.values[x].size, 5) if g.values[x].size else list(g.values[x].shape)
    if shape and g.chance(0.3):
        shape[int(g.random.integers(len(shape)))] = -1
    if g.values[x].size == 1 and g.chance(0.3):
        shape = []
    g.add(op, x, g.ints(shape))


@maker("Flatten")
def flatten(g: Grower, op: str) -> None:
    x = g.pick()
    g.add(op, x, **g.maybe(axis=int(g.random.integers(0, g.values[x].ndim + 1))))


@maker("Squeeze", "Unsqueeze")
def squeeze(g: Grower, op: str) -> None:
    x = g.any()
    array = g.values[x]
    if op == "Squeeze":
        ones = [axis for axis, size in enumerate(array.shape) if size == 1 and g.chance(0.7)]
        axes = [axis - array.ndim if g.opset >= 11 and g.chance(0.3) else axis for axis in ones]
        if not axes:
            g.add(op, x)
            return
    else:
        count = int(g.one([1, 1, 2]))
        rank = array.ndim + count
        if rank > 5:
            raise Refused
        axes = sorted(g.random.permutation(rank)[:count].tolist())
        axes = [axis - rank if g.opset >= 11 and g.chance(0.3) else axis for axis in axes]
    g.add(op, x, *([g.ints(axes)] if g.opset >= 13 else []), **({} if g.opset >= 13 else {"axes": axes}))


@maker("Transpose")
def transpose(g: Grower, op: str) -> None:
    x = g.any()
    g.add(op, x, **g.maybe(**({"perm": g.random.permutation(g.values[x].ndim).tolist()} if g.values[x].ndim else {})))


@maker("Concat")
def concat(g: Grower, op: str) -> None:
    x = g.any(lambda array: array.ndim > 0)
    array, axis = g.values[x], g.axis(g.values[x])
    names = [x]
    for _ in range(int(g.one([0, 1, 1, 2, 3]))):
        shape = list(array.shape)
        shape[axis] = int(g.one([1, 2, 3, shape[axis]]))
        same = [name for name, other in g.values.items() if other.shape == tuple(shape) and other.dtype == array.dtype]
        names.append(str(g.one(same)) if same and g.chance(0.7) else g.constant(g.array(array.dtype, shape)))
    g.random.shuffle(names)
    g.add(op, *names, axis=axis)


@maker("Split")
def split(g: Grower, op: str) -> None:
    x = g.any(lambda array: array.ndim > 0)
    axis = g.axis(g.values[x])
    size = g.values[x].shape[axis]
    count = int(g.random.integers(1, min(size, 5) + 1)) if size else 1
    if g.opset >= 18 and g.chance(0.5):
        g.add(op, x, count=count, keep=range(count), axis=axis, num_outputs=count)
        return
    cuts = sorted(g.random.integers(0, size + 1, count - 1).tolist())
    sizes = np.diff([0, *cuts, size]).tolist()
    if g.opset < 13:
        g.add(op, x, count=count, keep=range(count), axis=axis, split=sizes)
    else:
        g.add(op, x, g.ints(sizes), count=count, keep=range(count), axis=axis)


@maker("Slice")
def cut(g: Grower, op: str) -> None:
    x = g.any(lambda array: array.ndim > 0)
    array = g.values[x]
    axes = g.some(array.ndim) if g.opset >= 10 else sorted(axis % array.ndim for axis in g.some(array.ndim))
    steps = [int(g.one([1, 1, 1, 2, 3, -1, -2])) if g.opset >= 10 else 1 for _ in axes]
    starts = [int(g.random.integers(-7, 7)) for _ in axes]
    ends = [int(g.one([-1, -2, 0, 2, 4, 100, -100])) for _ in axes]
    if g.opset < 10:
        g.add(op, x, starts=starts, ends=ends, axes=axes)
        return
    names = [g.constant(each, g.one([INT32, INT64])) for each in (starts, ends)]
    dtype = g.values[names[0]].dtype
    names = [g.constant(each, dtype) for each in (starts, ends)]
    rest = [g.constant(axes, dtype), g.constant(steps, dtype)]
    if axes == list(range(len(axes))) and g.chance(0.3):
        rest[0] = ""
    if set(steps) == {1} and g.chance(0.5):
        rest.pop()
    g.add(op, x, *names, *rest)
    if 0 in g.values[g.nodes[-1].output[0]].shape and g.chance(0.9):
        del g.values[g.nodes.pop().output[0]]  # few graphs of nothing but empty tensors


@maker("Pad")
def pad(g: Grower, op: str) -> None:
    x = g.any(lambda array: array.ndim > 0) if g.opset >= 13 else g.pick(FLOAT, lambda array: array.ndim > 0)
    array = g.values[x]
    mode = g.one(["constant", "constant", "reflect", "edge"] + (["wrap"] if g.opset >= 19 else []))
    low = -1 if mode == "constant" and g.chance(0.2) else 0
    some = g.opset >= 18 and g.chance(0.3)
    axes = g.some(array.ndim) if some else list(range(array.ndim))
    amounts = g.random.integers(low, 3, 2 * len(axes))
    amounts[g.random.random(len(amounts)) < 0.5] = 0
    if g.opset < 11:
        g.add(op, x, mode=mode, pads=np.maximum(amounts, 0).tolist(), **g.maybe(value=float(g.one([0, 1.5]))))
        return
    names = [x, g.ints(amounts)]
    value = g.constant(g.one([0, 2]), array.dtype) if g.chance(0.5) and array.dtype != np.bool_ else ""
    names += [value, g.ints(axes)] if some else [value] if value else []
    g.add(op, *names, **({} if mode == "constant" and g.chance(0.5) else {"mode": mode}))


@maker("Expand")
def expand(g: Grower, op: str) -> None:
    x = g.any(lambda array: array.ndim < 5)
    shape = [int(g.one([1, 2, 3])) if size == 1 else int(g.one([1, size])) for size in g.values[x].shape]
    g.add(op, x, g.ints([int(g.one([1, 2])), *shape] if g.chance(0.3) else shape))


@maker("Tile")
def tile(g: Grower, op: str) -> None:
    x = g.any()
    g.add(op, x, g.ints([int(g.one([1, 1, 2, 3])) for _ in g.values[x].shape]))


@maker("DepthToSpace", "SpaceToDepth")
def blocks(g: Grower, op: str) -> None:
    x = g.pick(FLOAT, lambda array: array.ndim == 4)
    mode = g.maybe(mode=g.one(["DCR", "CRD"])) if op == "DepthToSpace" and g.opset >= 11 else {}
    g.add(op, x, blocksize=int(g.one([1, 2, 2, 3])), **mode)


@maker("Cast")
def cast(g: Grower, op: str) -> None:
    x = g.any()
    wanted = g.one([FLOAT, FLOAT, INT32, INT64, np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.uint32])
    if np.dtype(wanted).kind == "u" and g.values[x].dtype.kind in "if" and not (g.values[x] >= 0).all():
        raise Refused  # undefined in C
    exact = np.array_equal(g.values[x].astype(wanted).astype(np.float64), np.trunc(g.values[x]))
    if not exact and wanted not in (FLOAT, np.bool_):
        raise Refused
    g.add(op, x, to=helper.np_dtype_to_tensor_dtype(np.dtype(wanted)))


@maker("Cast64")
def cast_double(g: Grower, op: str) -> None:
    """A detour over float64, as exporters write it."""
    x = g.pick([FLOAT, INT32])
    double = g.name()
    nodes = [
        helper.make_node("Cast", [x], [double], to=onnx.TensorProto.DOUBLE),
        helper.make_node("Cast", [double], [double + "f"], to=onnx.TensorProto.FLOAT),
    ]
    g.nodes += nodes
    g.values[double + "f"] = g.values[x].astype(FLOAT)


@maker("Shape", "Size", "EyeLike", "ConstantOfShape", "Range")
def shapes(g: Grower, op: str) -> None:
    if op == "EyeLike":
        g.add(op, g.pick(FLOAT, lambda array: array.ndim == 2), **g.maybe(k=int(g.one([-1, 0, 1]))))
    elif op == "ConstantOfShape":
        g.add(op, g.ints(g.shape()), **g.maybe(value=numpy_helper.from_array(np.array([1.5], FLOAT))))
    elif op == "Range":
        g.add(op, *(g.constant(number, FLOAT) for number in (0.5, 4.0, 1.0)))
    else:
        g.add(op, g.any())


def window(g: Grower, sizes: Sequence[int], dilated: bool = True) -> dict[str, Any]:
    """Attributes of a window over spatial axes."""
    rank = len(sizes)
    attributes = g.maybe(strides=[int(g.one([1, 1, 2, 3])) for _ in sizes])
    if dilated and g.chance(0.3):
        attributes["dilations"] = [int(g.one([1, 2])) for _ in sizes]
    choice = int(g.one([0, 1, 2]))
    if choice == 1:
        attributes["pads"] = [int(g.one([0, 0, 1, 1, 2])) for _ in range(2 * rank)]
    elif choice == 2:
        attributes["auto_pad"] = g.one(["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
    return attributes


def image(g: Grower) -> str:
    return g.pick(FLOAT, lambda array: 3 <= array.ndim <= 5 and array.size > 0)


def kernel(g: Grower, sizes: Sequence[int]) -> list[int]:
    return [min(int(g.one([1, 2, 3, 3, size])), size + 1, 5) for size in sizes]


@maker("Conv", "ConvTranspose")
def convolution(g: Grower, op: str) -> None:
    x = image(g)
    array = g.values[x]
    channels, sizes = array.shape[1], array.shape[2:]
    group = int(g.one([number for number in range(1, channels + 1) if channels % number == 0]))
    width = int(g.one([1, 2, 3]))
    shape = [group * width, channels // group] if op == "Conv" else [channels, width]
    weights = g.array(FLOAT, [*shape, *kernel(g, sizes)]) * np.float32(0.5)
    attributes = window(g, sizes)
    attributes |= {"group": group} if group > 1 or g.chance(0.3) else {}
    attributes |= g.maybe(kernel_shape=list(weights.shape[2:]))
    if op == "ConvTranspose" and g.chance(0.3):
        attributes["output_padding"] = [
            int(g.random.integers(0, each)) for each in attributes.get("strides", [1] * len(sizes))
        ]
    dynamic = [
        name
        for name, value in g.values.items()
        if value.dtype == FLOAT and value.shape == weights.shape and g.chance(0.5)
    ]
    w = str(g.one(dynamic)) if dynamic else g.constant(weights)
    count = weights.shape[0] if op == "Conv" else weights.shape[1] * group
    g.add(op, x, w, *([g.constant(g.array(FLOAT, (count,)))] if g.chance(0.5) else []), **attributes)


@maker("MaxPool", "AveragePool", "LpPool")
def pool(g: Grower, op: str) -> None:
    x = image(g)
    sizes = g.values[x].shape[2:]
    attributes = window(g, sizes, dilated=g.opset >= {"MaxPool": 10, "AveragePool": 19, "LpPool": 18}[op])
    if g.opset >= {"MaxPool": 10, "AveragePool": 10, "LpPool": 18}[op]:
        attributes |= g.maybe(ceil_mode=int(g.one([0, 1])))
    if op == "AveragePool":
        attributes |= g.maybe(count_include_pad=int(g.one([0, 1])))
    if op == "LpPool":
        attributes |= g.maybe(p=int(g.one([1, 2])))
    indexed = op == "MaxPool" and g.opset >= 8 and g.chance(0.1)
    g.add(
        op, x, kernel_shape=kernel(g, sizes), count=2 if indexed else 1, keep=(0, 1) if indexed else (0,), **attributes
    )


@maker("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(g: Grower, op: str) -> None:
    g.add(op, image(g))


@maker("BatchNormalization")
def batch_normalization(g: Grower, op: str) -> None:
    x = g.pick(FLOAT, lambda array: array.ndim > 1 and array.size > 0)
    channels = g.values[x].shape[1]
    parameters = [g.constant(g.array(FLOAT, (channels,))) for _ in range(3)]
    variance = g.constant(g.random.random(channels) + 0.1, FLOAT)
    g.add(op, x, *parameters, variance, **g.maybe(epsilon=1e-3))


@maker("InstanceNormalization", "GroupNormalization")
def instance_normalization(g: Grower, op: str) -> None:
    x = image(g)
    channels = g.values[x].shape[1]
    groups = int(g.one([number for number in range(1, channels + 1) if channels % number == 0]))
    count = groups if op == "GroupNormalization" and g.opset < 21 else channels
    parameters = [g.constant(g.array(FLOAT, (count,))) for _ in range(2)]
    g.add(op, x, *parameters, epsilon=1e-2, **({"num_groups": groups} if op == "GroupNormalization" else {}))


@maker("LayerNormalization", "RMSNormalization")
def layer_normalization(g: Grower, op: str) -> None:
    x = g.pick(FLOAT, lambda array: array.ndim > 0 and array.size > 0)
    array, axis = g.values[x], g.axis(g.values[x])
    shape = array.shape[axis % array.ndim :]
    parameters = [g.constant(g.array(FLOAT, shape)) for _ in range(int(g.one([1, 2])) if op[0] == "L" else 1)]
    several = op[0] == "L" and g.chance(0.15)
    g.add(op, x, *parameters, count=3 if several else 1, keep=(0, 1, 2) if several else (0,), axis=axis, epsilon=1e-2)


@maker("LpNormalization")
def lp_normalization(g: Grower, op: str) -> None:
    x = g.pick(FLOAT, lambda array: array.ndim > 0)
    g.add(op, x, **g.maybe(axis=g.axis(g.values[x]), p=int(g.one([1, 2]))))


@maker("MeanVarianceNormalization")
def mean_variance(g: Grower, op: str) -> None:
    x = g.pick(FLOAT, lambda array: array.ndim == 4 and array.shape[0] * array.shape[2] * array.shape[3] > 4)
    g.add(op, x, **g.maybe(axes=[0, 2, 3]))


@maker("LRN")
def response(g: Grower, op: str) -> None:
    x = g.pick(FLOAT, lambda array: array.ndim == 4)
    g.add(op, x, size=int(g.one([1, 2, 3, 5])), **g.maybe(alpha=0.1, beta=0.6, bias=1.5))


@maker("Resize", "Upsample")
def resize(g: Grower, op: str) -> None:
    x = image(g) if g.chance(0.8) else g.pick(FLOAT, lambda array: array.ndim > 0 and array.size > 0)
    array = g.values[x]
    scales = np.ones(array.ndim, FLOAT)
    for axis in range(2 if array.ndim > 2 else 0, array.ndim):
        scales[axis] = g.one([1, 2, 1.5, 0.5, 2])
    mode = g.one(["nearest", "linear"] + (["cubic"] if array.ndim == 4 else []))
    if op == "Upsample":
        if g.opset < 9:
            g.add(op, x, scales=np.maximum(scales, 1).tolist(), mode=g.one(["nearest", "linear"]))
        else:
            g.add(op, x, g.constant(np.maximum(scales, 1)), mode=g.one(["nearest", "linear"]))
        return
    if g.opset < 11:
        g.add(op, x, g.constant(scales), mode=g.one(["nearest", "linear"]))
        return
    coordinates = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]
    attributes = {"mode": mode} | g.maybe(coordinate_transformation_mode=g.one(coordinates))
    if mode == "nearest":
        attributes |= g.maybe(nearest_mode=g.one(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]))
    if g.opset >= 18 and mode != "nearest" and g.chance(0.2):
        attributes["antialias"] = 1
    empty = "" if g.opset >= 13 else g.constant([], FLOAT)
    if g.chance(0.5):
        g.add(op, x, empty, g.constant(scales), **attributes)
    else:
        sizes = np.maximum(np.floor(np.array(array.shape) * scales), 1).astype(INT64)
        g.add(op, x, empty, "" if g.opset >= 13 else g.constant([], FLOAT), g.ints(sizes), **attributes)


@maker("Stored")
def stored(g: Grower, op: str) -> None:
    """A constant that the file keeps as int8 or float16, which many nodes may read, or which is an output."""
    shape = g.shape()
    if g.chance(0.4) or g.opset < 13:
        g.add("Cast", g.constant(g.array(FLOAT, shape), np.float16), to=onnx.TensorProto.FLOAT)
        return
    codes = g.constant(g.random.integers(-128, 128, shape), np.int8)
    axis = int(g.random.integers(len(shape))) if shape and g.chance(0.4) else None
    count = () if axis is None else (shape[axis],)
    scale = g.constant(g.random.random(count) * 0.1 + 0.01, FLOAT)
    zero = [g.constant(g.random.integers(-9, 9, count), np.int8)] if g.chance(0.7) else []
    g.add("DequantizeLinear", codes, scale, *zero, **({} if axis is None else {"axis": axis}))


@maker("GridSample")
def grid_sample(g: Grower, op: str) -> None:
    x = g.pick(FLOAT, lambda array: array.ndim in ((4, 5) if g.opset >= 20 else (4,)) and array.size > 0)
    rank = g.values[x].ndim - 2
    shape = (g.values[x].shape[0], *g.shape(rank), rank)
    grid = np.asarray(g.random.uniform(-1.3, 1.3, shape)).astype(FLOAT)
    if g.chance(0.5):
        y = g.constant(grid)
    else:
        y = f"in{len(g.inputs)}"
        g.inputs[y] = g.values[y] = grid
    new = g.opset >= 20
    modes = ["linear" if new else "bilinear", "nearest"] + (["cubic" if new else "bicubic"] if rank == 2 else [])
    padding = g.one(["zeros", "border", "reflection"])
    g.add(op, x, y, **g.maybe(mode=g.one(modes), padding_mode=padding, align_corners=int(g.one([0, 1]))))


@maker("Col2Im")
def col2im(g: Grower, op: str) -> None:
    block, size = [int(g.one([1, 2, 3])) for _ in "hw"], [int(g.one([4, 5, 6])) for _ in "hw"]
    strides, dilations, pads = [int(g.one([1, 2])) for _ in "hw"], [1, 1], [int(g.one([0, 1])) for _ in range(4)]
    counts = [(size[a] + pads[a] + pads[a + 2] - dilations[a] * (block[a] - 1) - 1) // strides[a] + 1 for a in range(2)]
    name = f"in{len(g.inputs)}"
    g.inputs[name] = g.values[name] = g.array(FLOAT, (2, 3 * block[0] * block[1], counts[0] * counts[1]))
    g.add(op, name, g.ints(size), g.ints(block), strides=strides, pads=pads, dilations=dilations)


@maker("STFT", "DFT")
def fourier(g: Grower, op: str) -> None:
    name = f"in{len(g.inputs)}"
    length = int(g.one([4, 5, 8]))
    if op == "DFT":
        axis = int(g.one([1, 2]))
        real = g.chance(0.6)
        inverse = g.chance(0.3)
        g.inputs[name] = g.values[name] = g.array(FLOAT, (2, 6, 5, 1 if real and not inverse else 2))
        onesided = int(real and not inverse and g.chance(0.5))
        if g.opset >= 20:
            g.add(op, name, "", g.ints(axis), onesided=onesided, inverse=int(inverse))
        else:
            g.add(op, name, axis=axis, onesided=onesided, inverse=int(inverse))
        return
    shape = (2, 20) if g.chance(0.3) else (2, 20, 1)
    g.inputs[name] = g.values[name] = g.array(FLOAT, shape)
    window = [g.constant(g.array(FLOAT, (length,)))] if g.chance(0.6) else ["", g.ints(length)]
    g.add(op, name, g.ints(int(g.one([2, 3, 4]))), *window, **g.maybe(onesided=int(g.one([0, 1]))))


@maker("Gemm")
def gemm(g: Grower, op: str) -> None:
    a = g.pick(FLOAT, lambda array: array.ndim == 2)
    transposed = int(g.one([0, 1])), int(g.one([0, 1]))
    rows_, inner = g.values[a].shape[:: -1 if transposed[0] else 1]
    columns = int(g.one([1, 2, 3, 5]))
    shape = (columns, inner) if transposed[1] else (inner, columns)
    same = [name for name, value in g.values.items() if value.shape == shape and value.dtype == FLOAT]
    b = str(g.one(same)) if same and g.chance(0.5) else g.constant(g.array(FLOAT, shape))
    c = g.constant(g.array(FLOAT, g.one([(), (1,), (columns,), (1, columns), (rows_, 1), (rows_, columns)])))
    attributes = g.maybe(alpha=0.5, beta=2.0, transA=transposed[0], transB=transposed[1])
    attributes |= {"transA": transposed[0], "transB": transposed[1]}
    g.add(op, a, b, *([c] if g.opset < 11 or g.chance(0.7) else []), **attributes)


@maker("MatMul")
def matmul(g: Grower, op: str) -> None:
    a = g.pick(FLOAT, lambda array: array.ndim > 0)
    inner = g.values[a].shape[-1]
    fits = [
        name
        for name, value in g.values.items()
        if value.dtype == FLOAT and value.ndim and value.shape[-2 if value.ndim > 1 else -1] == inner
    ]
    if fits and g.chance(0.6):
        b = str(g.one(fits))
    else:
        batch = g.values[a].shape[:-2] if g.chance(0.3) else ()
        b = g.constant(g.array(FLOAT, g.one([(inner,), (*batch, inner, 1), (*batch, inner, 4)])))
    g.add(op, a, b)


@maker("Einsum")
def einsum(g: Grower, op: str) -> None:
    equation = g.one(["ij->ji", "ij->i", "ijk->kj", "bij,bjk->bik", "ij,jk->ik", "bi,bi->b", "i,j->ij", "...ij->...ji",
                      "bhid,bhjd->bhij", "ij,ij->", "ii->i"])  # fmt: skip
    terms = equation.split("->")[0].split(",")
    sizes = {letter: int(g.one([1, 2, 3])) for letter in "ijkbhd"}
    names = []
    for term in terms:
        shape = tuple(([2] if "..." in term else []) + [sizes[letter] for letter in term if letter.isalpha()])
        same = [name for name, value in g.values.items() if value.shape == shape and value.dtype == FLOAT]
        names.append(str(g.one(same)) if same else g.constant(g.array(FLOAT, shape)))
    if all(name in g.constants for name in names):
        name = f"in{len(g.inputs)}"
        g.inputs[name] = g.values[name] = g.values[names[0]]
        names[0] = name
    g.add(op, *names, equation=equation)


@maker("LSTM", "GRU", "RNN")
def recurrent(g: Grower, op: str) -> None:
    x = g.pick(FLOAT, lambda array: array.ndim == 3 and array.size > 0)
    _, batch, features = g.values[x].shape
    gates, hidden = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], int(g.one([1, 2, 3]))
    direction = g.one(["forward", "reverse", "bidirectional"])
    count = 2 if direction == "bidirectional" else 1
    half = np.float32(0.5)
    w = g.constant(g.array(FLOAT, (count, gates * hidden, features)) * half)
    r = g.constant(g.array(FLOAT, (count, gates * hidden, hidden)) * half)
    names = [x, w, r]
    if g.chance(0.7):
        names.append(g.constant(g.array(FLOAT, (count, 2 * gates * hidden))))
    if g.chance(0.3):
        names += [""] * (5 - len(names)) + [g.constant(g.array(FLOAT, (count, batch, hidden)))]
    attributes = {"direction": direction} if direction != "forward" or g.chance(0.5) else {}
    attributes |= {"linear_before_reset": int(g.one([0, 1]))} if op == "GRU" else {}
    outputs = 3 if op == "LSTM" else 2
    keep = [each for each in range(outputs) if g.chance(0.6)] or [0]
    g.add(op, *names, hidden_size=hidden, count=outputs, keep=keep, **attributes)


@maker("If")
def branch(g: Grower, op: str) -> None:
    """A branch that is chosen by a constant, by a comparison of shapes, or by what the graph computes."""
    x = g.pick(FLOAT, lambda array: array.ndim > 0)
    first, second = (g.one(["Relu", "Neg", "Abs", "Exp"]) for _ in range(2))
    branches = [
        helper.make_graph(
            [helper.make_node(each, [x], [f"{each}_{place}"])],
            f"branch{place}",
            [],
            [helper.make_tensor_value_info(f"{each}_{place}", onnx.TensorProto.FLOAT, g.values[x].shape)],
        )
        for place, each in enumerate((first, second))
    ]
    chosen = int(g.one([0, 1]))
    if g.opset >= 13 and g.chance(0.4):
        top = g.add("ReduceMax", x, keepdims=int(g.one([0, 0, 1])) if g.values[x].ndim == 1 else 0)
        condition = g.add("Greater", top, g.constant(g.one([0.2, 1.0]), FLOAT))
        chosen = int(not g.values[condition].reshape(()))
    elif g.opset >= 11 and g.chance(0.5):
        size = g.name()
        g.nodes.append(helper.make_node("Shape", [x], [size]))
        g.values[size] = np.array(g.values[x].shape, INT64)
        rank = g.add("Size", size)
        condition = g.add("Equal", rank, g.ints(g.values[x].ndim + chosen))
    else:
        condition = g.constant(not chosen, np.bool_)
    made = g.name()
    g.nodes.append(helper.make_node("If", [condition], [made], then_branch=branches[0], else_branch=branches[1]))
    done = g.nodes.pop()
    taken = second if chosen else first
    feeds = {x: g.values[x]}
    probe = helper.make_node(taken, [x], [made])
    try:
        result = run_onnx(finished([probe], feeds, {}, [made], g.opset), feeds, optimized=False)
    except Exception as error:
        raise Refused from error
    if not all((np.abs(array) < HIGHEST).all() for array in result.values()):
        raise Refused
    g.nodes.append(done)
    g.values |= result
