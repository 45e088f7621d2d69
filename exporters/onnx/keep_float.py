"""ONNX layers that are to stay in float in a quantized file: ONNX Runtime would quantize them as it loads the file."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.exporters.onnx.graph import WEIGHTED, constant, initializer, producer


def guard_float_layers(model: ir.Model) -> None:
    """Dequantizes what enters a layer with a float weight or bias by one scale per slice of an axis, all of them equal.

    Between a DequantizeLinear with a single scale and a QuantizeLinear, ONNX Runtime takes such a layer for one whose
    weights were forgotten, and quantizes them itself: per tensor, and biases to int32 whether they fit or not (its
    optimizer WeightBiasQuantization, since 1.21). Layers behind per-axis scales it leaves alone; the values are equal.
    """
    for node in list(model.graph):
        source = producer(node, "DequantizeLinear") if node.op_type in WEIGHTED else None
        if source is None or not any(_is_float(value) for value in node.inputs[1:3]):
            continue
        shape = [size if isinstance(size, int) else 1 for size in node.inputs[0].shape or ()]
        axis = next((axis for axis in range(1, len(shape)) if shape[axis] > 1), None)
        if axis is None or constant(source.inputs[1]).size != 1:
            continue
        codes, *parameters = source.inputs
        spread = [
            initializer(model, f"{value.name}_spread", np.repeat(constant(value).reshape(1), shape[axis]))
            for value in parameters
        ]
        guarded = ir.node("DequantizeLinear", [codes, *spread], attributes={"axis": axis})
        guarded.outputs[0].shape, guarded.outputs[0].type = node.inputs[0].shape, node.inputs[0].type
        model.graph.insert_before(node, guarded)
        node.replace_input_with(0, guarded.outputs[0])


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.dtype == ir.DataType.FLOAT
