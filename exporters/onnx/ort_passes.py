"""ONNX as ONNX Runtime runs it fastest: passes over a QDQ model that leave its results as they are."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from edgekit.exporters.onnx.graph import check, constant, initializer, is_weight, producer, qparams, sweep
from edgekit.exporters.onnx.keep_float import guard_float_layers
from edgekit.exporters.onnx.weights import integer_layers

# Ops that move the values of their first input without computing.
MOVES = {"Slice", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Gather", "DepthToSpace", "Tile", "Expand"}
FEW_CHANNELS = 16  # of an image or of samples, beyond which padding them costs what it gains


def for_onnxruntime(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns `proto` as ONNX Runtime runs it fastest: codes moved as they are, uint8 activations; equal results.

    Files for other readers, TFLite's lowering among them, start from `proto` itself.
    """
    result = ir.to_proto(fastest(proto))
    check(result)
    return result


def fastest(proto: onnx.ModelProto) -> ir.Model:
    """Does what `for_onnxruntime` does, unchecked, on the weights of `proto`, which are not copied."""
    model = ir.from_proto(proto)
    fold_constant_codes(model)
    integer_layers(model)
    move_codes(model)
    shift_activations(model)
    pad_codes(model)
    clip_codes(model)
    pool_codes(model)
    hard_swishes_to_products(model)
    pad_channels(model)
    guard_float_layers(model)
    separate_weights(model)
    strip_conversions(model)
    return model


def fold_constant_codes(model: ir.Model) -> None:
    """Stores a constant that is quantized as the codes that QuantizeLinear would make of it at every inference."""
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear" or node.outputs[0].is_graph_output():
            continue
        stored = [ir.convenience.get_const_tensor(value) for value in node.inputs]
        if len(stored) < 3 or any(tensor is None for tensor in stored) or stored[1].size != 1:
            continue
        value, scale, zero_point = (tensor.numpy() for tensor in stored)
        limits = np.iinfo(zero_point.dtype)
        steps = np.rint(value / scale.astype(np.float32)) + zero_point.astype(np.float32)
        codes = np.clip(steps, limits.min, limits.max).astype(zero_point.dtype)
        node.outputs[0].replace_all_uses_with(initializer(model, f"{node.outputs[0].name}_codes", codes))
    sweep(model)


def move_codes(model: ir.Model) -> None:
    """Lets ops that only move values move the int8 codes, without a Dequantize before and an equal Quantize after."""
    for node in list(model.graph):
        source = producer(node, "DequantizeLinear") if node.op_type in MOVES else None
        if source is None or len(node.outputs) != 1 or source.inputs[0].is_initializer():
            continue
        readers = [usage.node for usage in node.outputs[0].uses()]
        if not readers or node.outputs[0].is_graph_output() or not all(_requantizes(r, source) for r in readers):
            continue
        node.replace_input_with(0, source.inputs[0])
        node.outputs[0].type = readers[0].outputs[0].type
        for reader in readers:
            reader.outputs[0].replace_all_uses_with(node.outputs[0])
    sweep(model)


def _requantizes(node: ir.Node, source: ir.Node) -> bool:
    return (
        node.op_type == "QuantizeLinear" and not node.outputs[0].is_graph_output() and qparams(node) == qparams(source)
    )


def shift_activations(model: ir.Model) -> None:
    """Stores activations as uint8 with zero point z + 128 instead of int8 with z: the same real values, exactly.

    ONNX Runtime's x86 kernels take uint8 × int8; weights stay int8.
    """
    shifted: dict[ir.Value, ir.Value] = {}
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or is_weight(node):
            continue
        if len(node.inputs) < 3 or constant(node.inputs[2]).dtype != np.int8:
            continue
        constant_codes = node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()
        for index in (0, 2) if constant_codes else (2,):
            value = node.inputs[index]
            if value not in shifted:
                codes = (constant(value).astype(np.int16) + 128).astype(np.uint8)
                shifted[value] = initializer(model, f"{value.name}_uint8", codes)
            node.replace_input_with(index, shifted[value])
    for node in model.graph:
        for value in node.outputs:
            if value.dtype == ir.DataType.INT8:
                value.type = ir.TensorType(ir.DataType.UINT8)
    sweep(model)


def pad_codes(model: ir.Model) -> None:
    """Pads codes with their zero point, where a Pad of zeros stands between a Dequantize and an equal Quantize."""
    for node in list(model.graph):
        source = producer(node, "DequantizeLinear") if node.op_type == "Pad" else None
        if source is None or not all(_requantizes(use.node, source) for use in node.outputs[0].uses()):
            continue
        value = node.inputs[2] if len(node.inputs) > 2 else None
        if node.attributes.get_string("mode", "constant") != "constant" or (value is not None and constant(value) != 0):
            continue
        pad = ir.node("Pad", [source.inputs[0], node.inputs[1], source.inputs[2], *node.inputs[3:]])
        pad.outputs[0].shape, pad.outputs[0].type = node.outputs[0].shape, source.inputs[0].type
        model.graph.insert_before(node, pad)
        for use in list(node.outputs[0].uses()):
            use.node.outputs[0].replace_all_uses_with(pad.outputs[0])
    sweep(model)


def clip_codes(model: ir.Model) -> None:
    """Clips the codes of a layer's output instead of the output, where the quantized range does not imply the clip.

    ONNX Runtime runs a layer in int8 only with a Quantize right behind it. Rounding is monotonic, so Q(clip(x)) is
    Q(x) clipped at the codes of the bounds.
    """
    for node in list(model.graph):
        if node.op_type not in ("Relu", "Clip"):
            continue
        layer, readers = node.inputs[0].producer(), _quantizers(node)
        if layer is None or producer(layer, "DequantizeLinear") is None or len(list(node.inputs[0].uses())) > 1:
            continue
        if not readers:
            continue
        if len({qparams(reader) for reader in readers}) > 1 or any(r.outputs[0].is_graph_output() for r in readers):
            continue
        scale, zero_point = readers[0].inputs[1:3]
        step, zero = float(constant(scale)), int(constant(zero_point))
        ends = [zero, 255] if node.op_type == "Relu" else [_code(node, index, step, zero) for index in (1, 2)]
        if None in ends:
            continue
        quantize = ir.node("QuantizeLinear", [node.inputs[0], scale, zero_point])
        codes = quantize.outputs[0]
        codes.name, codes.shape = f"{node.outputs[0].name}_codes", node.outputs[0].shape
        codes.type = ir.TensorType(ir.DataType.UINT8)
        clip = _clip(model, codes, *ends)
        model.graph.insert_before(node, [quantize, clip])
        for reader in readers:
            reader.outputs[0].replace_all_uses_with(clip.outputs[0])
    sweep(model)


def _code(clip: ir.Node, index: int, scale: float, zero_point: int) -> int | None:
    """Returns the uint8 code of a Clip's bound; None where it is no constant."""
    bound = clip.inputs[index] if len(clip.inputs) > index else None
    tensor = ir.convenience.get_const_tensor(bound) if bound is not None else None
    return None if tensor is None else int(np.clip(np.rint(float(tensor.numpy()) / scale) + zero_point, 0, 255))


def pool_codes(model: ir.Model) -> None:
    """Spells a quantized mean over the image as GlobalAveragePool, for which ONNX Runtime has an int8 kernel."""
    for node in list(model.graph):
        if node.op_type != "ReduceMean" or not _is_quantized(node) or len(node.inputs) < 2:
            continue
        source, rank = node.inputs[0], len(node.outputs[0].shape or ())
        axes = {int(axis) % rank for axis in constant(node.inputs[1]).flat} if rank > 2 else set()
        if axes != set(range(2, rank)) or not node.attributes.get_int("keepdims", 1):
            continue
        _replace(model, node, ir.node("GlobalAveragePool", [source]))
    sweep(model)


def hard_swishes_to_products(model: ir.Model) -> None:
    """Spells a quantized HardSwish as x · clip(x/6 + ½, 0, 1), both in int8; HardSwish runs in float.

    With x = s·(c − z), the line x/6 + ½ is (c − (z − n)) / 2n for n = 3/s: other parameters for the same codes, which
    only need clipping. Where 3/s is rounded to n, the factor errs by less than half a code. Where z − n is no uint8,
    because x never comes down to −3, the line is an addition to x/6, which again is x's codes, and clips by saturating.
    """
    for node in list(model.graph):
        if node.op_type != "HardSwish" or not _is_quantized(node):
            continue
        codes, scale, zero_point = node.inputs[0].producer().inputs
        steps = round(3 / float(constant(scale)))
        low = int(constant(zero_point)) - steps
        if steps and low >= 0:
            factor = _clipped(model, node, codes, low, min(low + 2 * steps, 255), 1 / (2 * steps))
        else:
            factor = _shifted(model, node, codes, float(constant(scale)) / 6, zero_point)
        _replace(model, node, ir.node("Mul", [node.inputs[0], factor]))
    sweep(model)


def _clipped(model: ir.Model, node: ir.Node, codes: ir.Value, low: int, high: int, scale: float) -> ir.Value:
    """Adds, in front of `node`, scale · (clip(codes, low, high) − low); returns it."""
    clip = _clip(model, codes, low, high)
    return _dequantized(model, node, [clip], clip.outputs[0], scale, clip.inputs[1])


def _clip(model: ir.Model, codes: ir.Value, low: int, high: int) -> ir.Node:
    """Returns a node that clips uint8 codes."""
    bounds = [
        initializer(model, f"{codes.name}_{end}", np.array(code, np.uint8))
        for end, code in (("low", low), ("high", high))
    ]
    clip = ir.node("Clip", [codes, *bounds])
    clip.outputs[0].shape, clip.outputs[0].type = codes.shape, codes.type
    return clip


def _shifted(model: ir.Model, node: ir.Node, codes: ir.Value, scale: float, zero_point: ir.Value) -> ir.Value:
    """Adds, in front of `node`, clip(scale · (codes − zero_point) + ½, 0, 1) in steps of 1/254; returns it."""
    zero = initializer(model, f"{codes.name}_zero", np.array(0, np.uint8))
    half = initializer(model, f"{codes.name}_half", np.array(127, np.uint8))
    sixth = _dequantized(model, node, [], codes, scale, zero_point)
    constant_half = _dequantized(model, node, [], half, 1 / 254, zero)
    add = ir.node("Add", [sixth, constant_half])
    step = constant_half.producer().inputs[1]
    quantize = ir.node("QuantizeLinear", [add.outputs[0], step, zero])
    for value, like in ((add.outputs[0], node.inputs[0]), (quantize.outputs[0], codes)):
        value.shape, value.type = like.shape, like.type
    return _dequantized(model, node, [add, quantize], quantize.outputs[0], 1 / 254, zero)


def _dequantized(
    model: ir.Model, before: ir.Node, new: list[ir.Node], codes: ir.Value, scale: float, zero_point: ir.Value
) -> ir.Value:
    """Puts the nodes `new`, and a DequantizeLinear of `codes` behind them, in front of a node; returns its result."""
    step = initializer(model, f"{codes.name}_step", np.array(scale, np.float32))
    dequantize = ir.node("DequantizeLinear", [codes, step, zero_point])
    dequantize.outputs[0].shape, dequantize.outputs[0].type = codes.shape, ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(before, [*new, dequantize])
    return dequantize.outputs[0]


def pad_channels(model: ir.Model) -> None:
    """Gives a quantized convolution of an image's few channels zeros up to a multiple of four, with zero weights.

    ONNX Runtime gathers the windows of such a layer a few bytes at a time; four at a time the first layer of
    EfficientNet-Lite0, padding included, takes 29 % less time.
    """
    for conv in [n for n in model.graph if n.op_type == "Conv"]:
        source, weight = (value.producer() for value in conv.inputs[:2])
        if source is None or weight is None or not is_weight(weight) or source.op_type != "DequantizeLinear":
            continue
        weights = constant(weight.inputs[0])
        missing = -weights.shape[1] % 4
        if not missing or weights.shape[1] > FEW_CHANNELS or conv.attributes.get_int("group", 1) != 1:
            continue
        codes, rank = source.inputs[0], weights.ndim
        amounts = np.zeros(2 * rank, np.int64)
        amounts[rank + 1] = missing
        pad = ir.node("Pad", [codes, initializer(model, f"{codes.name}_pads", amounts), source.inputs[2]])
        pad.outputs[0].type = codes.type
        wide = ir.node("DequantizeLinear", [pad.outputs[0], *source.inputs[1:]])
        wide.outputs[0].type = source.outputs[0].type
        shape = [(0, missing) if axis == 1 else (0, 0) for axis in range(rank)]
        stored = initializer(model, f"{weight.inputs[0].name}_wide", np.pad(weights, shape))
        stretched = ir.node("DequantizeLinear", [stored, *weight.inputs[1:]], attributes=dict(weight.attributes))
        stretched.outputs[0].type = weight.outputs[0].type
        model.graph.insert_before(conv, [pad, wide, stretched])
        conv.replace_input_with(0, wide.outputs[0])
        conv.replace_input_with(1, stretched.outputs[0])
    sweep(model)


def separate_weights(model: ir.Model) -> None:
    """Gives each layer a DequantizeLinear, a zero point and a name of its weights that no other layer has.

    Under `session.x64quantprecision`, which x86 processors without VNNI need to add int8 products right, ONNX Runtime
    stores weights and zero points anew under names made from theirs, and fails to load a file in which two layers share
    one. Shared weights stay in the file once: a Reshape, which is folded as the file is loaded, gives the other layers
    a name of their own.
    """
    taken: set[ir.Value] = set()
    for node in [n for n in model.graph if is_weight(n)]:
        for use in list(node.outputs[0].uses())[1:]:
            other = ir.node("DequantizeLinear", node.inputs, attributes=dict(node.attributes))
            other.outputs[0].shape, other.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
            model.graph.insert_after(node, other)
            use.node.replace_input_with(use.idx, other.outputs[0])
    for node in [n for n in model.graph if is_weight(n)]:
        codes = node.inputs[0]
        if codes in taken:
            shape = initializer(model, f"{codes.name}_shape", np.array(codes.shape.numpy(), np.int64))
            same = ir.node("Reshape", [codes, shape])
            same.outputs[0].shape, same.outputs[0].type = codes.shape, codes.type
            model.graph.insert_before(node, same)
            node.replace_input_with(0, same.outputs[0])
        if len(node.inputs) > 2 and node.inputs[2] in taken:
            own = initializer(model, f"{node.inputs[2].name}_own", constant(node.inputs[2]))
            node.replace_input_with(2, own)
        taken.update((node.inputs[0], *node.inputs[2:]))
    sweep(model)


def strip_conversions(model: ir.Model) -> None:
    """Takes out what ONNX Runtime infers of each Quantize and Dequantize: 3 % of a ResNet-20.

    That is its name, its result's shape and type, and the axis where there is one scale for all.
    """
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        node.name = ""
        if not constant(node.inputs[1]).ndim:
            node.attributes.pop("axis", None)
        if not node.outputs[0].is_graph_output():
            node.outputs[0].shape = node.outputs[0].type = None


def _is_quantized(node: ir.Node) -> bool:
    """Whether `node` reads dequantized codes and everything that reads it quantizes."""
    return bool(_quantizers(node)) and producer(node, "DequantizeLinear") is not None


def _quantizers(node: ir.Node) -> list[ir.Node]:
    """Returns what reads the result of `node` where all of that quantizes, else nothing."""
    readers = [use.node for use in node.outputs[0].uses()]
    quantize = all(reader.op_type == "QuantizeLinear" for reader in readers)
    return readers if quantize and not node.outputs[0].is_graph_output() else []


def _replace(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    new.outputs[0].shape, new.outputs[0].type = old.outputs[0].shape, old.outputs[0].type
    model.graph.insert_before(old, new)
    old.outputs[0].replace_all_uses_with(new.outputs[0])
