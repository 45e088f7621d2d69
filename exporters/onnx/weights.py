"""ONNX: layers with int8 weights and float or dynamically quantized inputs.

The shared model holds each weight as DequantizeLinear(int8 codes, scale per channel, 0) in front of its MatMul, Gemm,
Conv, ConvTranspose, Gather, LSTM, GRU or RNN, and each dynamic input as DynamicQuantizeLinear → DequantizeLinear, one
for all layers that read it. `integer_layers` then spells both as ONNX Runtime runs them fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.ao.quantization.fx._decomposed  # registers the ops of `q`
from onnxscript import opset18 as op

from edgekit.errors import EdgeKitError
from edgekit.exporters.onnx.graph import constant, initializer, producer, sweep
from edgekit.exporters.onnx.recurrent import is_factored

q = torch.ops.quantized_decomposed

RECURRENT = {"LSTM", "GRU", "RNN"}
WEIGHTS = {
    "MatMul": (1,),
    "Gemm": (1,),
    "Conv": (1,),
    "ConvTranspose": (1,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
}


def _choose_qparams(x: Any, quant_min: int, quant_max: int, eps: float, dtype: int) -> tuple[Any, Any]:
    _, scale, zero_point = op.DynamicQuantizeLinear(x)
    return scale, zero_point


def _quantize(x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: int) -> Any:
    return op.QuantizeLinear(x, scale, zero_point)


def _dequantize(
    x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: int, out_dtype: int = -1
) -> Any:
    return op.DequantizeLinear(x, scale, zero_point)


# What torch's exporter has no translation of its own for.
TRANSLATIONS: dict[Callable, Callable] = {
    q.choose_qparams.tensor: _choose_qparams,
    q.quantize_per_tensor.tensor: _quantize,
    q.dequantize_per_tensor.tensor: _dequantize,
}


def fold_zero_points(model: ir.Model) -> None:
    """Stores the zero points of large tables as int8, where torch's exporter leaves a Cast from int64."""
    for node in model.graph:
        cast = node.inputs[2].producer() if node.op_type == "DequantizeLinear" and len(node.inputs) > 2 else None
        if cast is not None and cast.op_type == "Cast" and cast.inputs[0].is_initializer():
            zero_points = constant(cast.inputs[0]).astype(np.int8)
            node.replace_input_with(2, initializer(model, f"{cast.inputs[0].name}_int8", zero_points))
    sweep(model)


def join_dynamic_quantization(model: ir.Model) -> None:
    """Takes the codes that DynamicQuantizeLinear gives, instead of quantizing once more by its scale and zero point."""
    for node in model.graph:
        dynamic = node.inputs[1].producer() if node.op_type == "QuantizeLinear" else None
        if dynamic is None or dynamic.op_type != "DynamicQuantizeLinear":
            continue
        codes, scale, zero_point = dynamic.outputs
        codes.shape, codes.type = node.outputs[0].shape, ir.TensorType(ir.DataType.UINT8)
        scale.shape, scale.type = ir.Shape(()), ir.TensorType(ir.DataType.FLOAT)
        zero_point.shape, zero_point.type = ir.Shape(()), ir.TensorType(ir.DataType.UINT8)
        for reader in [usage.node for usage in node.outputs[0].uses()]:
            reader.attributes.pop("axis", None)
        node.outputs[0].replace_all_uses_with(codes)
    sweep(model)


def join_recurrent_weights(model: ir.Model) -> None:
    """Stores each quantized weight of an LSTM, GRU or RNN as codes in the gate order of ONNX.

    torch's exporter reorders the gates behind the DequantizeLinear, by slices and joins. What comes out is one
    DequantizeLinear(codes (directions, gates, n), scales (gates,), axis=1).
    """
    for node in [n for n in model.graph if n.op_type in RECURRENT]:
        for value in node.inputs[1:3]:
            made = value.producer() if value is not None else None
            # What a projected layer's first step reads too lies before the axis of directions.
            source = made.inputs[0] if made is not None and made.op_type == "Unsqueeze" else value
            product = source.producer() if source is not None else None
            if product is not None and is_factored(product):
                for factor in product.inputs:
                    _store_moved(model, factor)
            elif source is not None and source is not value and len(source.uses()) > 1:
                _store_moved(model, source)
            else:
                _store_moved(model, value)
    sweep(model)


def _store_moved(model: ir.Model, value: ir.Value | None) -> None:
    """Stores a constant that is dequantized, and then moved, as it is in the end; others are left as they are."""
    moved = _moved(value)
    if value is None or moved is None or value.producer().op_type == "DequantizeLinear":
        return
    axis = moved[0].ndim - 2
    of_one_row = moved[1][:1] if axis else moved[1][..., :1]
    if not (moved[1] == (of_one_row[..., :1] if axis else of_one_row)).all():
        return
    codes, scales = moved[0].astype(np.int8), of_one_row[0, :, 0] if axis else of_one_row[:, 0]
    stored = initializer(model, f"{value.name}_codes", codes)
    scale = initializer(model, f"{value.name}_scale", scales.astype(np.float32))
    zero_point = initializer(model, f"{value.name}_zero_point", np.zeros(scales.shape, np.int8))
    dequantize = ir.node("DequantizeLinear", [stored, scale, zero_point], attributes={"axis": axis})
    _describe(dequantize.outputs[0], codes.shape)
    model.graph.insert_after(value.producer(), dequantize)
    value.replace_all_uses_with(dequantize.outputs[0])


def _moved(value: ir.Value | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the codes and, in the same shape, the scales of a constant that is dequantized and then only moved."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":
        if not is_dequantized_constant(node):
            return None
        codes, scale = constant(node.inputs[0]), _broadcastable_scale(node)
        return codes, np.broadcast_to(scale, codes.shape)
    if node.op_type == "Concat":
        parts = [part for value in node.inputs if (part := _moved(value)) is not None]
        if len(parts) < len(node.inputs):
            return None
        axis = node.attributes.get_int("axis")
        return np.concatenate([codes for codes, _ in parts], axis), np.concatenate([scale for _, scale in parts], axis)
    if node.op_type not in ("Slice", "Unsqueeze"):
        return None
    source = _moved(node.inputs[0])
    if source is None:
        return None
    codes, scale = source
    given = [constant(i) for i in node.inputs[1:]]
    if node.op_type == "Unsqueeze":
        axes = tuple(int(axis) for axis in given[0])
        return np.expand_dims(codes, axes), np.expand_dims(scale, axes)
    steps = given[3] if len(given) > 3 else np.ones_like(given[0])
    window = [slice(None)] * codes.ndim
    for start, end, axis, step in zip(*given[:3], steps, strict=True):
        window[axis] = slice(start, end, step)
    return codes[tuple(window)], scale[tuple(window)]


def integer_layers(model: ir.Model) -> None:
    """Spells layers with int8 weights as ONNX Runtime runs them fastest; in place, with equal results.

    Weights stay int8, beside uint8 inputs: with uint8 weights ONNX Runtime's kernels take three times as long where the
    processor has VNNI. x86 processors without it make them uint8 as they load the file, in ONNX Runtime's exact mode.

    - A dynamic MatMul or Gemm becomes MatMulInteger and a scaling, which the runtime fuses to one kernel.
    - A Gather takes codes and scales of the rows that it reads.
    - Any other weight is dequantized by Cast and Mul, which the runtime computes once, when it loads the file: it
      would run a DequantizeLinear at every inference.
    """
    for node in list(model.graph):
        if node.op_type in ("MatMul", "Gemm") and _is_dynamic(node.inputs[0]):
            _to_matmul_integer(model, node)
        elif node.op_type == "Gather" and _constant_dequantize(node.inputs[0]) is not None:
            _gather_codes(model, node)
        elif node.op_type in WEIGHTS and producer(node, "DequantizeLinear") is None:
            for index in WEIGHTS[node.op_type]:
                _dequantize_once(model, node.inputs[index])
    sweep(model)


def _is_dynamic(value: ir.Value) -> bool:
    dequantize = value.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return False
    source = dequantize.inputs[0].producer()
    return source is not None and source.op_type == "DynamicQuantizeLinear"


def _to_matmul_integer(model: ir.Model, node: ir.Node) -> None:
    codes, scale, zero_point = node.inputs[0].producer().inputs
    gemm = node.op_type == "Gemm"
    read = node.attributes
    plain = not read.get_int("transA", 0) and read.get_float("alpha", 1.0) == read.get_float("beta", 1.0) == 1
    found = _columns(node.inputs[1], transposed=gemm and bool(read.get_int("transB", 0)))
    if found is None or (gemm and not plain):
        raise EdgeKitError(
            f"ONNX node '{node.name}' quantizes its input as it runs and is no plain linear layer",
            "leave ONNX and TFLite out with --format executorch, or export with --precision fp32 or int8",
        )
    weight, scales = found
    name = node.inputs[1].name
    product = ir.node("MatMulInteger", [codes, initializer(model, f"{name}_codes", weight), zero_point])
    _describe(product.outputs[0], node.outputs[0].shape, ir.DataType.INT32)
    cast = ir.node("Cast", [product.outputs[0]], attributes={"to": ir.DataType.FLOAT.value})
    factor = ir.node("Mul", [scale, initializer(model, f"{name}_scale", scales)])
    result = ir.node("Mul", [cast.outputs[0], factor.outputs[0]])
    nodes = [product, cast, factor, result]
    if gemm and len(node.inputs) > 2 and node.inputs[2] is not None:
        nodes.append(ir.node("Add", [result.outputs[0], node.inputs[2]]))
    _describe(factor.outputs[0], scales.shape)
    for made in (cast, result, nodes[-1]):
        _describe(made.outputs[0], node.outputs[0].shape)
    model.graph.insert_before(node, nodes)
    _take_over(model, node, nodes[-1].outputs[0])


def _columns(value: ir.Value, transposed: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns a dequantized constant matrix as codes (k, n) and scales (n,), or None for anything else."""
    node = value.producer()
    if node is not None and node.op_type == "Transpose":
        transposed, node = not transposed, node.inputs[0].producer()
    if node is None or not is_dequantized_constant(node):
        return None
    codes, scales = constant(node.inputs[0]), constant(node.inputs[1])
    if codes.ndim != 2 or (scales.ndim and node.attributes.get_int("axis", 1) != (0 if transposed else 1)):
        return None
    codes = np.ascontiguousarray(codes.T) if transposed else codes
    return codes, np.broadcast_to(scales, codes.shape[1:]).copy()


def _gather_codes(model: ir.Model, node: ir.Node) -> None:
    dequantize = node.inputs[0].producer()
    scale = constant(dequantize.inputs[1])
    axis, per_row = node.attributes.get_int("axis", 0), dequantize.attributes.get_int("axis", 1) == 0
    if axis != 0 or (scale.ndim and not per_row):
        return
    name, shape = node.outputs[0].name, node.outputs[0].shape
    codes = ir.node("Gather", [dequantize.inputs[0], node.inputs[1]], attributes={"axis": 0})
    cast = ir.node("Cast", [codes.outputs[0]], attributes={"to": ir.DataType.FLOAT.value})
    _describe(cast.outputs[0], shape)
    nodes = [codes, cast]
    if scale.ndim:
        rank = constant(dequantize.inputs[0]).ndim
        table = initializer(model, f"{name}_scale", scale.reshape(-1, *[1] * (rank - 1)))
        nodes.append(ir.node("Gather", [table, node.inputs[1]], attributes={"axis": 0}))
        _describe(nodes[-1].outputs[0], [*shape[: len(shape) - rank + 1], *[1] * (rank - 1)])
        factor = nodes[-1].outputs[0]
    else:
        factor = dequantize.inputs[1]
    nodes.append(ir.node("Mul", [cast.outputs[0], factor]))
    _describe(nodes[-1].outputs[0], shape)
    model.graph.insert_before(node, nodes)
    _take_over(model, node, nodes[-1].outputs[0])


def _dequantize_once(model: ir.Model, value: ir.Value | None) -> None:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Transpose":
        node = node.inputs[0].producer()
    if node is None or not is_dequantized_constant(node):
        return
    name, shape = node.inputs[0].name, node.outputs[0].shape
    cast = ir.node("Cast", [node.inputs[0]], attributes={"to": ir.DataType.FLOAT.value})
    result = ir.node("Mul", [cast.outputs[0], initializer(model, f"{name}_scale", _broadcastable_scale(node))])
    for made in (cast, result):
        _describe(made.outputs[0], shape)
    model.graph.insert_before(node, [cast, result])
    _take_over(model, node, result.outputs[0])


def _constant_dequantize(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and is_dequantized_constant(node) else None


def is_dequantized_constant(node: ir.Node) -> bool:
    """Whether `node` dequantizes int8 constants with zero points of 0."""
    if node.op_type != "DequantizeLinear" or not node.inputs[0].is_initializer():
        return False
    zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1)
    return node.inputs[0].dtype == ir.DataType.INT8 and not zero_point.any()


def _broadcastable_scale(node: ir.Node) -> np.ndarray:
    """Returns the scale of a DequantizeLinear in a shape that broadcasts against what it dequantizes."""
    scale, rank = constant(node.inputs[1]), len(node.inputs[0].shape)
    if scale.ndim == 0:
        return scale
    axis = node.attributes.get_int("axis", 1) % rank
    return scale.reshape([-1 if index == axis else 1 for index in range(rank)])


def _take_over(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    """Puts `value` in the place of the only output of `node`, under its name where it is an output of the model."""
    old = node.outputs[0]
    name = old.name
    if old.is_graph_output():
        outputs = model.graph.outputs
        outputs[list(outputs).index(old)] = value
        old.name = f"{name}_before"
        value.name = name
    old.replace_all_uses_with(value)
    model.graph.remove(node, safe=True)


def _describe(value: ir.Value, shape: Any, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
    value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)
