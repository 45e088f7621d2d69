"""Keep an open batch size: a file whose inputs may be resized along it.

What depends on the batch is found by lowering the model for two sizes and comparing the graphs, which must differ in
nothing but sizes that are a multiple of the batch. The file is then run with other sizes before it is handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import onnx

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite.ir import Op, Tensor
from edgekit.exporters.tflite.read.opset_upgrade import dims, inputs, is_open, random_feeds, run, with_shapes
from edgekit.types import Layout, axis_order

SIZES = 11, 13  # primes that hardly another size of a model is a multiple of
TRIED = 1, 3
TOLERANCE = 1e-3  # of the largest value, as for any float file
_HELP = "fix the batch: give `shapes`, or export the model with fixed input shapes"


def has_open_batch(model: onnx.ModelProto) -> bool:
    """Whether the one size that a model leaves open is the first of an input, perhaps by name in other places too."""
    names, first = set(), False
    for value in inputs(model):
        for axis, dim in enumerate(dims(value)):
            if is_open(dim):
                names.add(dim.dim_param if dim.dim_param not in ("", "?") else None)
                first = first or axis == 0
                if axis and None in names:
                    return False
    return first and len(names) == 1 and all(value.type.tensor_type.HasField("shape") for value in inputs(model))


def sized(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """The model for one batch size."""
    shapes = {
        value.name: [batch if is_open(dim) else dim.dim_value for dim in dims(value)]
        for value in inputs(model)
        if any(map(is_open, dims(value)))
    }
    return with_shapes(model, shapes)


@dataclass(frozen=True)
class Lowered:
    """Operators in order, and the tensors that a caller gives and gets."""

    ops: list[Op]
    inputs: list[Tensor]
    outputs: list[Tensor]


def with_open_batch(small: Lowered, large: Lowered) -> Lowered:
    """What was lowered for SIZES as one graph for any size; raises EdgeKitError where more differs than sizes."""
    if [op.kind for op in small.ops] != [op.kind for op in large.ops]:
        raise refused("other operators are needed for other sizes")
    opened: dict[Tensor, Tensor] = {}
    partners: dict[Tensor, Tensor] = {}

    def open_all(
        op: Op | None, tensors: Sequence[Tensor | None], others: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        pairs = list(zip_longest(tensors, others))
        for place, (tensor, other) in enumerate(pairs):
            if tensor is None or other is None or partners.setdefault(tensor, other) is not other:
                if tensor is not other:
                    raise refused(f"{_what(op)} depends on it")
            elif tensor not in opened:
                opened[tensor] = _opened(op, place, tensor, other)
        return [None if tensor is None else opened[tensor] for tensor in tensors]

    ops = []
    for op, other in zip(small.ops, large.ops, strict=True):
        ins, outs = open_all(op, op.inputs, other.inputs), open_all(None, op.outputs, other.outputs)
        options = dict(op.options)
        if op.kind == "RESHAPE" and ins[1] is not None and ins[1].data is not None:
            options["newShape"] = ins[1].data.tolist()
        elif options != dict(other.options):
            raise refused(f"{_what(op)} depends on it")
        ops.append(Op(op.kind, ins, [tensor for tensor in outs if tensor is not None], options, op.source))
    edges = (open_all(None, a, b) for a, b in ((small.inputs, large.inputs), (small.outputs, large.outputs)))
    return Lowered(ops, *([tensor for tensor in edge if tensor is not None] for edge in edges))


def _what(op: Op | None) -> str:
    return "an input or output" if op is None else f"{op.kind} for ONNX node '{op.source}'"


def _opened(op: Op | None, place: int, tensor: Tensor, partner: Tensor) -> Tensor:
    same = (tensor.dtype, tensor.q, len(tensor.shape)) == (partner.dtype, partner.q, len(partner.shape))
    if not same or (tensor.data is None) != (partner.data is None):
        raise refused(f"'{tensor.name}' depends on it")
    if tensor.data is not None and partner.data is not None:
        if np.array_equal(tensor.data, partner.data, equal_nan=tensor.dtype.kind == "f"):
            return tensor
        sizes = None if op is None else _open_sizes(op, place, tensor.data, partner.data)
        if sizes is None:
            raise refused(f"a constant of {_what(op)} depends on it")
        return replace(tensor, data=sizes)
    pairs = list(zip(tensor.shape, partner.shape, strict=True))
    if any(a != b and (a % SIZES[0] or a // SIZES[0] * SIZES[1] != b) for a, b in pairs):
        raise refused(f"'{tensor.name}' has the sizes {list(tensor.shape)} and {list(partner.shape)}")
    shape = tuple(a if a == b else a // SIZES[0] for a, b in pairs)
    return replace(tensor, shape=shape, signature=tuple(a if a == b else -1 for a, b in pairs))


def _open_sizes(op: Op, place: int, small: np.ndarray, large: np.ndarray) -> np.ndarray | None:
    """The sizes that RESHAPE or SLICE takes, with −1 for what is left; None where that does not say it."""
    if small.shape != large.shape:
        return None
    open_places = np.flatnonzero(small != large)
    if op.kind == "RESHAPE" and place == 1 and len(open_places) == 1:
        return np.where(small != large, -1, small).astype(small.dtype)
    if op.kind == "SLICE" and place == 2:
        begin, whole = op.inputs[1], op.inputs[0]
        assert begin is not None and begin.data is not None and whole is not None
        if all(begin.data[axis] == 0 and small[axis] == whole.shape[axis] for axis in open_places):
            return np.where(small != large, -1, small).astype(small.dtype)
    return None


def check(
    data: bytes, model: onnx.ModelProto, layout: Layout, static: Callable[[onnx.ModelProto], bytes] | None
) -> None:
    """Run the file with TRIED sizes; raises EdgeKitError where it does not agree with ONNX Runtime.

    An int8 file is compared with those that `static` makes for one size, and that compute the same numbers.
    """
    for batch in TRIED:
        fixed = sized(model, batch)
        feeds = random_feeds(fixed)
        try:
            actual = _run_file(data, feeds, layout)
            if static is not None:
                wanted = _run_file(static(fixed), feeds, layout)
            else:
                wanted = dict(zip([value.name for value in model.graph.output], run(fixed, feeds), strict=True))
        except (RuntimeError, ValueError) as error:
            raise refused(f"the file does not run with {batch}: {str(error).splitlines()[0]}") from error
        for name, expected in wanted.items():
            size = float(np.abs(expected).max()) if expected.size and expected.dtype.kind == "f" else 0.0
            same = actual[name].shape == expected.shape
            if not same or not np.allclose(actual[name], expected, atol=TOLERANCE * size, equal_nan=True):
                raise refused(f"the file computes something else with {batch}")


def _run_file(data: bytes, feeds: Mapping[str, np.ndarray], layout: Layout) -> dict[str, np.ndarray]:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_content=data, num_threads=1).get_signature_runner("serving_default")
    turned = {name: np.ascontiguousarray(a.transpose(axis_order(a.ndim, layout))) for name, a in feeds.items()}
    outputs = runner(**turned)  # resizes the inputs
    return {name: np.array(a.transpose(np.argsort(axis_order(a.ndim, layout)))) for name, a in outputs.items()}


def refused(why: str) -> EdgeKitError:
    """The error for a model whose batch cannot be left open."""
    return EdgeKitError(f"the ONNX model leaves its batch size open, and TFLite needs it fixed: {why}", _HELP)
