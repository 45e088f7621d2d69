"""Check an int8 file op by op against ONNX Runtime, each op on the very inputs that the file's own op had.

Numbers of whole int8 networks say little: one step of rounding in an early layer grows on its way, and ONNX Runtime
differs as much from itself with other settings. Each op alone is exact to a step or two, or wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite.builder import Builder
from edgekit.exporters.tflite.ir import Op, Perm, QParams
from edgekit.types import Layout, axis_order

NOTED = 2  # steps: kernels round the products of scales, and compose what TFLite has no op for
REFUSED = 16  # steps of 256: no rounding


@dataclass(frozen=True)
class Place:
    """Where a file holds an int8 tensor of the ONNX model: the TFLite tensor, its order of axes, and what makes it."""

    tensor: str
    perm: Perm
    q: QParams
    op: str
    source: str


@dataclass(frozen=True)
class Step:
    """How far an int8 tensor lies from ONNX Runtime's, in steps of its scale: at most, and in how many places."""

    place: Place
    most: int
    share: float

    def __str__(self) -> str:
        return (
            f"{self.place.op} for ONNX node '{self.place.source}' is up to {self.most} of 256 steps off, in "
            f"{100 * self.share:.2g} % of its values"
        )


def places(builder: Builder, ops: Sequence[Op]) -> dict[str, Place]:
    """Where the builder left the int8 tensors of the ONNX model; those that it does not hold as int8 are left out."""
    makers = {tensor.name: op for op in ops for tensor in op.outputs}
    found = {}
    for name, held in builder.graph.stored.items():
        value = builder.bound(held)
        if value is None or value.pending is not None or value.tensor.data is not None or value.tensor.q is None:
            continue
        maker = makers.get(value.tensor.name)
        if maker is not None and value.tensor.q == builder.graph.held.get(held):
            found[name] = Place(value.tensor.name, value.perm, value.tensor.q, maker.kind, maker.source)
    return found


def steps(
    model: onnx.ModelProto, data: bytes, where: Mapping[str, Place], feeds: Mapping[str, np.ndarray], layout: Layout
) -> list[Step]:
    """Run the file and, on its own int8 tensors, the ONNX model; `feeds` are shaped as in the ONNX model."""
    made = {name for node in model.graph.node for name in node.output}  # not what functions hold inside
    codes = _int8_tensors(data, {name: place for name, place in where.items() if name in made}, feeds, layout)
    if not codes:
        return []
    forced, fed = _forced(model, codes)
    real = {name: where[code].q.dequantize(codes[code]) for name, code in fed.items()}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(forced.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [*codes]
    found = []
    for name, expected in zip(names, session.run(names, {**feeds, **real}), strict=True):
        shift = 128 if expected.dtype == np.uint8 else 0
        off = np.abs(expected.astype(np.int32) - shift - codes[name])
        found.append(Step(where[name], int(off.max(initial=0)), float((off > 0).mean()) if off.size else 0.0))
    return found


def judged(found: Sequence[Step]) -> tuple[str, ...]:
    """A note for each op that is more than NOTED steps off; raises EdgeKitError beyond REFUSED."""
    worst = max(found, key=lambda step: step.most, default=None)
    if worst is not None and worst.most > REFUSED:
        raise EdgeKitError(
            f"the int8 file is not faithful to the ONNX model: {worst}",
            "nothing was written; leave tflite out with --format, or give --precision fp32: the exporter is at fault",
        )
    return tuple(str(step) for step in found if step.most > NOTED)


def _int8_tensors(
    data: bytes, where: Mapping[str, Place], feeds: Mapping[str, np.ndarray], layout: Layout
) -> dict[str, np.ndarray]:
    """The int8 tensors of one run, by their ONNX names and in ONNX's order of axes."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_content=data,
        num_threads=1,
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    for detail in interpreter.get_input_details():
        feed = feeds[detail["name"]]
        interpreter.set_tensor(detail["index"], np.ascontiguousarray(feed.transpose(axis_order(feed.ndim, layout))))
    interpreter.invoke()
    indices = {detail["name"]: detail["index"] for detail in interpreter.get_tensor_details()}
    return {
        name: interpreter.get_tensor(indices[place.tensor]).transpose(np.argsort(place.perm))
        for name, place in where.items()
    }


def _forced(model: onnx.ModelProto, codes: Mapping[str, np.ndarray]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The model with every dequantized tensor as an input, by name → its int8 tensor, and every int8 one as output."""
    forced = onnx.ModelProto()
    forced.CopyFrom(model)
    graph = forced.graph
    fed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in codes
    }
    copies = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.output[0] not in fed:
            copies.append(onnx.NodeProto())
            copies[-1].CopyFrom(node)
    del graph.node[:], graph.output[:], graph.value_info[:]
    graph.node.extend(copies)
    graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in fed)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in codes)
    return forced, fed
