"""Graph passes around quantization: on functional aten graphs, in place, each leaving what is computed equal.

Before (`canonicalize`): bring the many spellings of one operation to the one that quantizer and runtimes know.
After (`drop_implied_clips`): take out what the quantized ranges already imply.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the ops of `q`
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import GraphModule, Node

from edgekit.quant.graph.capture_errors import told
from edgekit.quant.graph.constants import fold_constants
from edgekit.quant.graph.decompose import rare_ops_to_plain
from edgekit.quant.graph.fx import add_attribute, argument, attribute, calls, insert, is_attribute
from edgekit.quant.graph.recurrent_cells import cells_to_layers
from edgekit.quant.graph.residual_branches import drop_zero_branches
from edgekit.util.export_speedups import all_nodes, unread_notes

aten = torch.ops.aten
q = torch.ops.quantized_decomposed

CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}  # target → spatial rank
NAMED_PADDINGS = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
TRANSPOSED = {  # target → spatial rank
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}
CHANNEL_LAYERS = {3: aten.conv1d.default, 4: aten.conv2d.default}  # rank of what is normed → convolution
MEMORY_FORMATS = (torch.channels_last, torch.channels_last_3d)
HIDDEN = -1e9  # a score that no softmax sees, and that is finite
TRANSPOSED_DEFAULTS = (None, 1, 0, 0, 1, 1)  # bias, stride, padding, output padding, groups, dilation
CONV_DEFAULTS = (None, 1, 0, 1, 1)  # bias, stride, padding, dilation, groups


def capture(module: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> GraphModule:
    """Returns `module` as a functional, canonical aten graph with its parameters as attributes.

    Decomposing with an empty table makes in-place ops functional and unifies aliases (relu6 → hardtanh, flatten →
    view) without taking composite ops apart. Raises EdgeKitError, with the user's file and line, for what torch cannot
    capture.
    """
    with told(), unread_notes():
        program = torch.export.export(module, in_torch_order(example), strict=False)
        forget_memory_formats(program)
        program = program.run_decompositions({})
    forget_input_mutations(program)
    return canonicalize(program.module(check_guards=False))


def export(graph: GraphModule, example: tuple[torch.Tensor, ...]) -> ExportedProgram:
    """Returns a captured `graph` as a program, as it is."""
    with told(), unread_notes():
        return torch.export.export(graph, in_torch_order(example), strict=False)


def in_torch_order(example: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Returns the tensors as they lie in memory when they are made: ExecuTorch writes their strides into the file.

    `contiguous` would leave strides of dimensions of size 1 as they are, from which ExecuTorch reads another order.
    """
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t.detach()) for t in example)


def forget_memory_formats(program: ExportedProgram) -> None:
    """Leaves torch's order to every value: each runtime chooses its own, and ExecuTorch mixes a given one with it.

    A view of a value that had another order may have been possible in that order alone: it becomes a reshape.
    """
    nodes = [node for node in all_nodes(program.graph_module) if node.op == "call_function"]
    given = [node for node in nodes if any(value in MEMORY_FORMATS for value in (*node.args, *node.kwargs.values()))]
    for node in given:
        node.args = tuple(None if value in MEMORY_FORMATS else value for value in node.args)
        node.kwargs = {name: value for name, value in node.kwargs.items() if value not in MEMORY_FORMATS}
    for node in nodes if given else ():
        if node.target == aten.view.default:
            node.target = aten.reshape.default


def forget_input_mutations(program: ExportedProgram) -> None:
    """Removes what would write results back into the caller's tensors: calibration must not change its data."""
    specs = program.graph_signature.output_specs
    kept = [index for index, spec in enumerate(specs) if spec.kind is not OutputKind.USER_INPUT_MUTATION]
    output = program.graph.output_node()
    output.args = (tuple(output.args[0][index] for index in kept),)
    specs[:] = [specs[index] for index in kept]


def canonicalize(model: GraphModule) -> GraphModule:
    """Runs the passes that precede quantization and export; works in place and returns `model`."""
    for run in PASSES:
        run(model)
        model.graph.eliminate_dead_code()
        model.graph.lint()
    model.recompile()
    return model


def drop_no_ops(model: GraphModule) -> None:
    """Removes copies (what eval-mode dropout became) and pads of nothing."""
    for node in calls(model):
        copies = node.target in (aten.clone.default, aten.alias.default) and not node.kwargs
        if copies or (node.target in PAD_VALUE_INDEX and not any(node.args[1])):
            if isinstance(node.args[0], Node) and node.args[0].op == "placeholder" and _is_output(node):
                continue
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)


def splits_to_slices(model: GraphModule) -> None:
    """Spells a split as one slice per part, which delegates take."""
    for node in calls(model):
        if node.target not in (aten.split.Tensor, aten.split_with_sizes.default):
            continue
        source, dim = node.args[0], argument(node, 2, "dim", 0)
        dim %= source.meta["val"].ndim
        ends = list(itertools.accumulate(part.shape[dim] for part in node.meta["val"]))
        for part in list(node.users):
            index = part.args[1]
            _respell(
                part, aten.slice.Tensor, source, dim, ends[index] - node.meta["val"][index].shape[dim], ends[index]
            )


def clamps_to_activations(model: GraphModule) -> None:
    """Spells clamp(low, high) as hardtanh and clamp(0) as relu: the names under which delegates fuse them."""
    for node in calls(model):
        if node.target == aten.clamp.default:
            low, high = argument(node, 1, "min"), argument(node, 2, "max")
        elif node.target == aten.clamp_min.default:
            low, high = argument(node, 1, "min"), None
        else:
            continue
        if not node.args[0].meta["val"].is_floating_point():  # of integers, clamp makes floats where its bounds are
            continue
        if low == 0 and high in (None, math.inf):
            _respell(node, aten.relu.default, node.args[0])
        elif low is not None and high is not None and low <= high:
            _respell(node, aten.hardtanh.default, node.args[0], float(low), float(high))


def named_paddings_to_amounts(model: GraphModule) -> None:
    """Spells a convolution's padding "same" or "valid" as amounts, with a pad of one where "same" is asymmetric."""
    for conv in calls(model):
        if conv.target not in NAMED_PADDINGS:
            continue
        same = argument(conv, 4, "padding") == "same"
        args = [*conv.args, *CONV_DEFAULTS[len(conv.args) - 2 :]]
        args[4] = 0
        _respell(conv, NAMED_PADDINGS[conv.target], *args)
        args = convolution_arguments(conv)
        if same:
            kernel = args[1].meta["val"].shape[2:]
            totals = [d * (k - 1) for d, k in zip(args[5], kernel, strict=True)]
            args[4] = [total // 2 for total in totals]
            odd = [total % 2 for total in totals]
            if any(odd):
                amounts = [amount for extra in reversed(odd) for amount in (0, extra)]
                with model.graph.inserting_before(conv):
                    pad = model.graph.call_function(aten.pad.default, (args[0], amounts))
                pad.meta["val"] = aten.pad.default(args[0].meta["val"], amounts)
                args[0] = pad
        conv.args = tuple(args)


def norms_to_layers(model: GraphModule) -> None:
    """Spells each BatchNorm that no layer before it took up as part of a layer behind it, or as one: int8 knows those.

    Between rows it goes into the linear layers that read it, if nothing else does. Of sequences and images it becomes a
    convolution of each channel alone, one wide. At the input it stays as it is: inputs of very different size do not
    fit one scale before they are normed.
    """
    for node in calls(model):
        if node.target != aten._native_batch_norm_legit_no_training.default:
            continue
        source, gamma, beta, mean, variance, _, eps = node.args
        constants = [c for c in (gamma, beta, mean, variance) if c is not None]
        readers, value = list(node.users), source.meta["val"]
        if source.op == "placeholder" or len(readers) != 1 or not all(map(is_attribute, constants)):
            continue
        factor = (attribute(model, variance).double() + eps).rsqrt()
        factor = factor if gamma is None else factor * attribute(model, gamma).double()
        shift = -attribute(model, mean).double() * factor
        shift = shift if beta is None else shift + attribute(model, beta).double()
        if value.ndim == 2:
            layers = list(readers[0].users)
            if not all(is_layer(layer) and layer.args[0] is readers[0] for layer in layers):
                continue
            for layer in layers:
                _scale_inputs(model, layer, factor, shift)
            readers[0].replace_all_uses_with(source)
        elif value.ndim in CHANNEL_LAYERS:
            channels, rank = value.shape[1], value.ndim - 2
            steps = [1] * rank, [0] * rank, [1] * rank  # stride, padding, dilation
            with model.graph.inserting_before(node):
                weight = factor.reshape(-1, *[1] * (value.ndim - 1)).to(value.dtype)
                weights = add_attribute(model, f"{node.name}_weight", weight)
                biases = add_attribute(model, f"{node.name}_bias", shift.to(value.dtype))
            _respell(readers[0], CHANNEL_LAYERS[value.ndim], source, weights, biases, *steps, channels)
        else:
            continue
        if not node.users:
            model.graph.erase_node(node)


def _scale_inputs(model: GraphModule, linear: Node, factor: torch.Tensor, shift: torch.Tensor) -> None:
    """Lets a linear layer read x where it read x · factor + shift."""
    weight, bias = linear.args[1], linear.args[2] if len(linear.args) > 2 else None
    old = attribute(model, weight).double()
    moved = old @ shift if bias is None else attribute(model, bias).double() + old @ shift
    with model.graph.inserting_before(linear):
        dtype = linear.meta["val"].dtype
        new_weight = add_attribute(model, f"{linear.name}_normed_weight", (old * factor).to(dtype))
        new_bias = add_attribute(model, f"{linear.name}_normed_bias", moved.to(dtype))
    linear.args = (linear.args[0], new_weight, new_bias)


def transposed_sequences_to_images(model: GraphModule) -> None:
    """Spells a transposed convolution of sequences as one of images that are one pixel high.

    Delegates take no other, and in int8 no runtime does. An activation behind it stays behind it.
    """
    for node in calls(model):
        if node.target != aten.conv_transpose1d.default:
            continue
        args = [*node.args, *TRANSPOSED_DEFAULTS[len(node.args) - 2 :]]
        with model.graph.inserting_before(node):
            image = insert(model, aten.unsqueeze.default, args[0], -2)
            if is_attribute(args[1]):
                wide = add_attribute(model, f"{node.name}_weight", attribute(model, args[1]).unsqueeze(2))
            else:
                wide = insert(model, aten.unsqueeze.default, args[1], 2)
            steps = [[first, *spread(args[index], 1)] for index, first in ((3, 1), (4, 0), (5, 0), (7, 1))]
            stride, padding, extra, dilation = steps
            arguments = (image, wide, args[2], stride, padding, extra, args[6], dilation)
            result = insert(model, aten.conv_transpose2d.input, *arguments)
        last, result = _with_activation(model, node, result)
        _respell(last, aten.squeeze.dim, result, -2)


def _with_activation(model: GraphModule, node: Node, result: Node) -> tuple[Node, Node]:
    """Returns `node` and what stands for it, or its activation and that of what stands for it, where it has one."""
    users = list(node.users)
    if len(users) != 1 or users[0].target not in (aten.relu.default, aten.hardtanh.default):
        return node, result
    with model.graph.inserting_before(users[0]):
        return users[0], insert(model, users[0].target, result, *users[0].args[1:])


def global_pools_to_mean(model: GraphModule) -> None:
    """Spells an average over the whole image as mean(dim=(2, 3), keepdim=True), which every delegate takes."""
    for node in calls(model):
        if node.target not in (aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default):
            continue
        source, result = node.args[0].meta["val"], node.meta["val"]
        if source.ndim != 4 or tuple(result.shape[2:]) != (1, 1):
            continue
        if node.target == aten.avg_pool2d.default:
            kernel = spread(node.args[1], 2)
            padding = spread(argument(node, 3, "padding") or 0, 2)
            divisor = argument(node, 6, "divisor_override")
            if kernel != tuple(source.shape[2:]) or any(padding) or divisor not in (None, math.prod(kernel)):
                continue
        _respell(node, aten.mean.dim, node.args[0], [2, 3], True)


def means_keep_dimensions(model: GraphModule) -> None:
    """Spells an average over the whole image without keepdim as one with it and a view, which delegates take."""
    for node in calls(model):
        if node.target != aten.mean.dim or node.kwargs or argument(node, 2, "keepdim", False):
            continue
        source = node.args[0]
        if source.meta["val"].ndim != 4 or sorted(dim % 4 for dim in node.args[1] or ()) != [2, 3]:
            continue
        with model.graph.inserting_before(node):
            kept = insert(model, aten.mean.dim, source, [2, 3], True)
        _respell(node, aten.view.default, kept, list(node.meta["val"].shape))


def attention_to_products(model: GraphModule) -> None:
    """Spells scaled_dot_product_attention as two matrix products around a softmax.

    A row that its mask hides whole gives zeros, as torch has it. Exporters guard against that by ten small ops that no
    delegate takes, or not at all; here it takes none where the mask is a constant, or causal, and three elsewhere.
    """
    for node in calls(model):
        if node.target != aten.scaled_dot_product_attention.default or argument(node, 4, "dropout_p", 0.0):
            continue
        query, key, value = node.args[:3]
        scale = node.kwargs.get("scale") or 1 / math.sqrt(query.meta["val"].shape[-1])
        with model.graph.inserting_before(node):
            if node.kwargs.get("enable_gqa", False):
                heads = query.meta["val"].shape[-3]
                key, value = (_spread_heads(model, tensor, heads) for tensor in (key, value))
            scaled = insert(model, aten.mul.Tensor, query, scale)
            scores = insert(model, aten.matmul.default, scaled, insert(model, aten.transpose.int, key, -2, -1))
            bias, seen = _mask(model, node, scores)
            scores = scores if bias is None else insert(model, aten.add.Tensor, scores, bias)
            weights = insert(model, aten.softmax.int, scores, -1)
            if seen is not None:
                result = insert(model, aten.matmul.default, weights, value)
                nothing = add_attribute(model, f"{node.name}_nothing", torch.zeros((), dtype=result.meta["val"].dtype))
        if seen is None:
            _respell(node, aten.matmul.default, weights, value)
        else:
            _respell(node, aten.where.self, seen, result, nothing)
        _views_to_reshapes(node)


def _spread_heads(model: GraphModule, tensor: Node, heads: int) -> Node:
    """Repeats each head of keys or values for the queries that share it."""
    *batch, own, length, width = tensor.meta["val"].shape
    if own == heads:
        return tensor
    apart = insert(model, aten.unsqueeze.default, tensor, -3)
    spread_out = insert(model, aten.expand.default, apart, [*batch, own, heads // own, length, width])
    return insert(model, aten.reshape.default, spread_out, [*batch, heads, length, width])


def _mask(model: GraphModule, node: Node, scores: Node) -> tuple[Node | None, Node | None]:
    """Returns what is added to the scores of an attention, and which rows are seen; None where all are, or unmasked."""
    dtype, mask = scores.meta["val"].dtype, argument(node, 3, "attn_mask")
    if argument(node, 5, "is_causal", False):
        hidden = torch.full(scores.meta["val"].shape[-2:], -math.inf).triu(1).to(dtype)
        return add_attribute(model, f"{node.name}_mask", hidden), None
    if mask is None:
        return None, None
    if is_attribute(mask):
        values = attribute(model, mask)
        if values.dtype == torch.bool:
            values = torch.zeros(values.shape, dtype=dtype).masked_fill(~values, -math.inf)
        seen = (values > -math.inf).any(-1, keepdim=True)
        bias = add_attribute(model, f"{node.name}_mask", torch.where(seen, values, 0.0))
        return bias, None if seen.all() else add_attribute(model, f"{node.name}_seen", seen)
    if mask.meta["val"].dtype == torch.bool:
        shown, hidden = (
            add_attribute(model, f"{node.name}_{name}", torch.tensor(value, dtype=dtype))
            for name, value in (("shown", 0.0), ("hidden", HIDDEN))
        )
        bias = insert(model, aten.where.self, mask, shown, hidden)
        seen = insert(model, aten.ge.Scalar, insert(model, aten.amax.default, bias, [-1], True), HIDDEN / 2)
        return bias, seen
    seen = insert(model, aten.gt.Scalar, insert(model, aten.amax.default, mask, [-1], True), -math.inf)
    return insert(model, aten.clamp.default, mask, HIDDEN), seen


def _views_to_reshapes(node: Node) -> None:
    """Lets what reads `node` read a tensor of other strides."""
    for user in list(node.users):
        if user.target == aten.view.default:
            _respell(user, aten.reshape.default, *user.args)
        elif user.target in (aten.transpose.int, aten.permute.default):
            _views_to_reshapes(user)


def fold_batch_norms(model: GraphModule) -> None:
    """Folds each inference BatchNorm into the convolution, transposed one or linear whose only reader it is.

    w' = w·γ/√(σ²+ε), b' = (b−μ)·γ/√(σ²+ε) + β, computed in float64.
    """
    for node in calls(model):
        if node.target != aten._native_batch_norm_legit_no_training.default:
            continue
        source, gamma, beta, mean, variance, _, eps = node.args
        readers = list(node.users)
        rank = {**CONVOLUTIONS, **TRANSPOSED, aten.linear.default: 0}.get(source.target)
        if rank is None or source.meta["val"].ndim != rank + 2:  # else the norm's channels are not the layer's
            continue
        bias = source.args[2] if len(source.args) > 2 else None
        constants = [source.args[1], *(c for c in (bias, gamma, beta, mean, variance) if c is not None)]
        if len(source.users) != 1 or len(readers) != 1 or not all(map(is_attribute, constants)):
            continue
        dtype = source.meta["val"].dtype
        weight = attribute(model, source.args[1]).double()
        factor = (attribute(model, variance).double() + eps).rsqrt()
        if gamma is not None:
            factor = factor * attribute(model, gamma).double()
        shift = -attribute(model, mean).double()
        if bias is not None:
            shift = shift + attribute(model, bias).double()
        shift = shift * factor
        if beta is not None:
            shift = shift + attribute(model, beta).double()
        if source.target in TRANSPOSED:  # (inputs, outputs of a group, …)
            groups = argument(source, 6, "groups", 1)
            factors = factor.reshape(groups, 1, -1).expand(-1, len(weight) // groups, -1).flatten(0, 1)
            folded = weight * factors.reshape(*weight.shape[:2], *[1] * rank)
        else:
            folded = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        with model.graph.inserting_before(source):
            new_weight = add_attribute(model, f"{source.name}_weight", folded.to(dtype))
            new_bias = add_attribute(model, f"{source.name}_bias", shift.to(dtype))
        source.args = (source.args[0], new_weight, new_bias, *source.args[3:])
        readers[0].replace_all_uses_with(source)
        model.graph.erase_node(readers[0])
        model.graph.erase_node(node)


def hard_sigmoids_to_clips(model: GraphModule) -> None:
    """Spells hardsigmoid(x) as clip(x/6 + 1/2, 0, 1), with the line folded into the layer before where there is one.

    Quantized to 0..1, such a clip costs nothing, and no runtime has to compute a hard-sigmoid in float.
    """
    for node in calls(model):
        if node.target != aten.hardsigmoid.default:
            continue
        layer = node.args[0]
        if is_layer(layer) and len(layer.users) == 1:
            weight, bias = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
            old = torch.zeros(attribute(model, weight).shape[0]) if bias is None else attribute(model, bias)
            with model.graph.inserting_before(layer):
                new_weight = add_attribute(model, f"{layer.name}_weight_sixth", attribute(model, weight) / 6)
                new_bias = add_attribute(model, f"{layer.name}_bias_sixth", old / 6 + 0.5)
            layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])
            _respell(node, aten.hardtanh.default, layer, 0.0, 1.0)


def is_layer(node: object) -> bool:
    """Whether `node` is a convolution or linear with a weight of its own."""
    targets = (*CONVOLUTIONS, aten.linear.default)
    return isinstance(node, Node) and node.target in targets and is_attribute(node.args[1])


def fold_pads(model: GraphModule) -> None:
    """Folds a symmetric zero pad into the padding of the convolutions that are its only readers."""
    for pad in calls(model):
        if not is_zero_pad(pad) or not all(u.target in CONVOLUTIONS and u.args[0] is pad for u in pad.users):
            continue
        amounts = list(pad.args[1])
        before, after = amounts[::2][::-1], amounts[1::2][::-1]  # torch lists the last dimension first
        for conv in list(pad.users):
            rank = CONVOLUTIONS[conv.target]
            if before != after or len(before) != rank or min(amounts) < 0:
                continue
            args = convolution_arguments(conv)
            args[0] = pad.args[0]
            args[4] = [p + extra for p, extra in zip(args[4], before, strict=True)]
            conv.args = tuple(args)


def strided_slices_to_convolutions(model: GraphModule) -> None:
    """Spells x[:, :, ::a, ::b] as a depthwise 1×1 convolution by 1 with stride (a, b).

    The values are the same, and delegates take convolutions where they take no strided slice.
    """
    for node in calls(model):
        stride = _image_stride(node)
        if stride is None or (node.users and all(_image_stride(user) for user in node.users)):
            continue  # the last slice of a chain stands for all of them
        source, steps = node.args[0], list(stride)
        while (before := _image_stride(source)) is not None and len(source.users) == 1:
            steps = [a * b for a, b in zip(steps, before, strict=True)]
            source = source.args[0]
        channels = node.meta["val"].shape[1]
        with model.graph.inserting_before(node):
            ones = add_attribute(model, f"{node.name}_ones", torch.ones(channels, 1, 1, 1))
        _respell(node, aten.conv2d.default, source, ones, None, steps, [0, 0], [1, 1], channels)


def _image_stride(node: object) -> tuple[int, int] | None:
    """Returns the (vertical, horizontal) step of a slice of a whole float image dimension, None for other nodes."""
    if not isinstance(node, Node) or node.target != aten.slice.Tensor or node.meta["val"].ndim != 4:
        return None
    source = node.args[0].meta["val"]
    dim, start, end, step = (
        argument(node, index, name, default)
        for index, (name, default) in enumerate((("dim", 0), ("start", None), ("end", None), ("step", 1)), start=1)
    )
    whole = start in (None, 0) and (end is None or end >= source.shape[dim])
    if dim not in (2, 3) or step == 1 or not whole or source.dtype != torch.float32:
        return None
    return (step, 1) if dim == 2 else (1, step)


def lone_images_to_batches(model: GraphModule) -> None:
    """Spells a convolution of an image without a batch as one of a batch of one: delegates take no other.

    An activation behind it stays behind it.
    """
    for node in calls(model):
        rank = {**CONVOLUTIONS, **TRANSPOSED}.get(node.target)
        if rank is None or node.meta["val"].ndim == rank + 2:
            continue
        source = node.args[0]
        with model.graph.inserting_before(node):
            is_batch = source.target == aten.squeeze.dim and source.args[1] == 0
            batch = source.args[0] if is_batch else insert(model, aten.unsqueeze.default, source, 0)
            result = insert(model, node.target, batch, *node.args[1:], **node.kwargs)
        last, result = _with_activation(model, node, result)
        _respell(last, aten.squeeze.dim, result, 0)


def drop_implied_clips(model: GraphModule) -> GraphModule:
    """Removes each relu/hardtanh whose every reader quantizes to a range inside its bounds.

    Exact by monotonicity: Q(clip(x)) = Q(x) for all x where Q(low) is the lowest code and Q(high) the highest.
    """
    for node in calls(model):
        if node.target == aten.relu.default:
            low, high = 0.0, math.inf
        elif node.target == aten.hardtanh.default:
            low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
        else:
            continue
        if node.users and all(_saturates(user, low, high) for user in node.users):
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
    model.recompile()
    return model


def _saturates(quantize: Node, low: float, high: float) -> bool:
    if quantize.target != q.quantize_per_tensor.default:
        return False
    _, scale, zero_point, qmin, qmax, _ = quantize.args
    # Half a step is what rounding takes in, less what float32 kernels err by.
    return low / scale + zero_point < qmin + 0.499 and high / scale + zero_point > qmax - 0.499


PAD_VALUE_INDEX = {aten.constant_pad_nd.default: 2, aten.pad.default: 3}  # target → index of the value argument


def is_zero_pad(node: Node) -> bool:
    """Whether `node` pads with the constant 0."""
    if node.target not in PAD_VALUE_INDEX:
        return False
    constant = node.target == aten.constant_pad_nd.default or argument(node, 2, "mode", "constant") == "constant"
    return constant and not argument(node, PAD_VALUE_INDEX[node.target], "value", 0)


def spread(value: Any, rank: int) -> tuple[int, ...]:
    """Returns an int, or a list of one or `rank` ints, as a tuple of `rank` ints."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(values * rank if len(values) == 1 else values)


def convolution_arguments(conv: Node) -> list:
    """Returns all seven arguments of a node of CONVOLUTIONS, its defaults filled in and one int per dimension."""
    args = [*conv.args, *CONV_DEFAULTS[len(conv.args) - 2 :]]
    for index in (3, 4, 5):
        args[index] = list(spread(args[index], CONVOLUTIONS[conv.target]))
    return args


def _is_output(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _respell(node: Node, target: object, *args: object) -> None:
    node.target, node.args, node.kwargs = target, args, {}


PASSES = (
    drop_no_ops,
    drop_zero_branches,
    fold_constants,
    cells_to_layers,
    rare_ops_to_plain,
    splits_to_slices,
    clamps_to_activations,
    named_paddings_to_amounts,
    global_pools_to_mean,
    means_keep_dimensions,
    attention_to_products,
    fold_batch_norms,
    norms_to_layers,
    transposed_sequences_to_images,
    hard_sigmoids_to_clips,
    fold_pads,
    strided_slices_to_convolutions,
    lone_images_to_batches,
)
