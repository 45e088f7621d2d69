"""ONNX: torch's dynamo exporter at one pinned opset, then passes that leave what ONNX Runtime can fuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript.optimizer import _constant_folding
from onnxscript.rewriter._pattern_ir import Constant as PatternConstant
from onnxscript.rewriter.rules.common import _no_op
from torch.export import ExportedProgram

from edgekit.errors import EdgeKitError
from edgekit.exporters.onnx import recurrent
from edgekit.exporters.onnx.graph import WEIGHTED, check, constant, initializer, producer, qparams, sweep
from edgekit.exporters.onnx.halves import halve_weights
from edgekit.exporters.onnx.weights import (
    TRANSLATIONS,
    fold_zero_points,
    join_dynamic_quantization,
    join_recurrent_weights,
)
from edgekit.util.export_speedups import copied, needed_decompositions, replaced, unread_notes

TOLERANCES = ("_rel_tol", "_abs_tol")  # of a constant in a pattern of onnxscript's
OPSET = 18  # the dynamo exporter's own: no version conversion, and every ONNX Runtime since 1.14 reads it


def to_onnx(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], *, half_weights: bool = False
) -> onnx.ModelProto:
    """Exports a captured `program` to a checked ONNX model with static shapes.

    `inputs` and `outputs` become the names of the model's inputs and outputs. Quantized programs become QDQ
    graphs with int8 tensors and int32 biases at s_in·s_w. With `half_weights`, floating-point weights are stored
    as float16 behind a Cast. Raises EdgeKitError for an operator that ONNX cannot express.
    """
    try:
        unfolded = recurrent.keeps_factors(_constant_folding._is_non_deterministic_op)
        keeping = replaced(_constant_folding, "_is_non_deterministic_op", unfolded)
        with unread_notes(), needed_decompositions(), exact_constants(), keeping:
            exported = torch.onnx.export(
                copied(program),
                (),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table={**TRANSLATIONS, **recurrent.TRANSLATIONS},
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise EdgeKitError(
            f"ONNX cannot express this model: {_reason(error)}", "leave ONNX and TFLite out with --format executorch"
        ) from error
    model = exported.model
    rename(model, inputs, outputs)
    fold_zero_points(model)
    join_dynamic_quantization(model)
    join_recurrent_weights(model)
    fold_quantized_pads(model)
    quantize_biases(model)
    strip_metadata(model)
    if half_weights:
        halve_weights(model)
    proto = ir.to_proto(model)
    proto.producer_name, proto.producer_version = "edgekit", ""
    check(proto)
    return proto


@contextmanager
def exact_constants() -> Iterator[None]:
    """Keeps onnxscript's rewrite rules from taking 1e-8 for 0 and 1.000001 for 1.

    They match constants by a tolerance: x / (norm + 1e-8) would become x / norm, which is NaN at 0.
    """
    with ExitStack() as stack:
        for rule in _no_op.rules:
            for node in rule._target_pattern:
                for value in node.inputs:
                    if isinstance(value, PatternConstant):
                        for tolerance in TOLERANCES:
                            getattr(value, tolerance)  # fails where a later version names it otherwise
                            stack.enter_context(replaced(value, tolerance, 0.0))
        yield


def rename(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Gives the graph's inputs and outputs the names of the original model's."""
    graph = model.graph
    wanted = {*inputs, *outputs}
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    taken = wanted | {value.name for value in values}
    for value in values:
        if value.name in wanted:
            name = f"{value.name}_inner"
            while name in taken:
                name += "_"
            taken.add(name)
            value.name = name
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    for index, name in enumerate(outputs):
        value = graph.outputs[index]
        if value.is_graph_input() or value.is_initializer() or value in graph.outputs[:index]:
            copy = ir.node("Identity", [value])
            graph.append(copy)
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            graph.outputs[index] = value = copy.outputs[0]
        value.name = name


def strip_metadata(model: ir.Model) -> None:
    """Removes the exporter's notes (stack traces, module paths): a third of a small int8 file."""
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def fold_quantized_pads(model: ir.Model) -> None:
    """Folds zero Pad → Quantize → Dequantize → Conv into the Conv's pads, where quantizing changes nothing."""
    for conv in [n for n in model.graph if n.op_type == "Conv"]:
        dequantize = conv.inputs[0].producer()
        quantize = producer(dequantize, "QuantizeLinear") if dequantize else None
        pad = producer(quantize, "Pad") if quantize else None
        source = producer(pad, "DequantizeLinear") if pad else None
        if (
            pad is None
            or source is None
            or dequantize.op_type != "DequantizeLinear"
            or qparams(source) != qparams(dequantize)
        ):
            continue
        amounts = constant(pad.inputs[1])
        value = constant(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] else np.float32(0)
        mode = pad.attributes.get_string("mode", "constant")
        rank = len(amounts) // 2
        if (len(pad.inputs) > 3 and pad.inputs[3]) or mode != "constant" or value != 0 or min(amounts) < 0:
            continue
        if (
            any(amounts[:2])
            or any(amounts[rank : rank + 2])
            or conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
        ):
            continue
        old = conv.attributes.get_ints("pads", [0] * (2 * rank - 4))
        new = [int(a) + int(b) for a, b in zip(old, [*amounts[2:rank], *amounts[rank + 2 :]], strict=True)]
        conv.attributes["pads"] = ir.AttrInt64s("pads", new)
        conv.replace_input_with(0, source.outputs[0])
    sweep(model)


def quantize_biases(model: ir.Model) -> None:
    """Stores the bias of each quantized convolution and linear as int32 at scale s_in·s_w, as runtimes compute it.

    ONNX Runtime fuses a quantized convolution only where its bias comes from an int32 DequantizeLinear.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type not in WEIGHTED or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        bias = node.inputs[2]
        sources = [node.inputs[0].producer(), node.inputs[1].producer()]
        if bias.const_value is None or any(s is None or s.op_type != "DequantizeLinear" for s in sources):
            continue
        if sources[0].inputs[1].const_value is None:
            continue  # a range of its own at every inference
        scale = (constant(sources[0].inputs[1]).astype(np.float64) * constant(sources[1].inputs[1])).astype(np.float32)
        codes = np.rint(constant(bias).astype(np.float64) / scale)
        if np.abs(codes).max() > np.iinfo(np.int32).max:
            continue  # right in float, wrong in int32
        codes = codes.astype(np.int32)
        stored = initializer(model, f"{bias.name}_int32", codes)
        scales = initializer(
            model, f"{bias.name}_scale", np.broadcast_to(scale, codes.shape).copy() if scale.ndim else scale
        )
        dequantize = ir.node("DequantizeLinear", [stored, scales], attributes={"axis": 0})
        dequantize.outputs[0].shape, dequantize.outputs[0].type = bias.shape, bias.type
        graph.insert_before(node, dequantize)
        node.replace_input_with(2, dequantize.outputs[0])
    sweep(model)


def _reason(error: BaseException) -> str:
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return str(causes[-1]).strip().splitlines()[0]
