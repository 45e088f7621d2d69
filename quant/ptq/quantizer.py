"""The deployment-aware quantizer: torchao's PT2E `Quantizer`, annotating what the edge runtimes really fuse.

One scheme for all formats, the TFLite/XNNPACK one: int8 asymmetric per-tensor activations, int8 symmetric
per-channel weights, int32 bias at s_in·s_w (derived by the exporters). A new op is a row in one of the tables.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import PlaceholderObserver
from torchao.quantization.pt2e.quantizer import (
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)

from edgekit.quant.graph.passes import argument, attribute, is_attribute, is_zero_pad
from edgekit.quant.ptq.gptq_rounding import channel_scales
from edgekit.quant.ptq.observers import KnownScale, MSEObserver

aten = torch.ops.aten

# Weighted ops: target → axis of the weight that holds the output channels (weight is argument 1, bias argument 2).
WEIGHTED = {
    aten.conv1d.default: 0,
    aten.conv2d.default: 0,
    aten.conv_transpose2d.input: 1,
    aten.linear.default: 0,
}

EMBEDDING = aten.embedding.default  # weight is argument 0, one channel per row: weights alone are quantized

# Activations that every runtime fuses into the op before them: only their output is quantized.
FUSED_ACTIVATIONS = {aten.relu.default, aten.hardtanh.default}

# Two tensors in, one out, each with qparams of its own.
ELEMENTWISE = {aten.add.Tensor, aten.mul.Tensor}

# One tensor in, one out, each with qparams of its own.
UNARY = {aten.mean.dim, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.prelu.default}

# Ops that move values without changing them: the output has the qparams of the input.
MOVES = {
    aten.max_pool2d.default,
    aten.max_pool1d.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
    aten.contiguous.default,
    aten.clone.default,
    aten.upsample_nearest2d.vec,
    aten.pixel_shuffle.default,
    aten.channel_shuffle.default,
}

MAX_POOLS = {aten.max_pool1d.default, aten.max_pool2d.default}

# Outputs whose qparams the runtimes prescribe (TFLite's int8 specification).
FIXED_OUTPUT = {
    aten.sigmoid.default: (1 / 256, -128),
    aten.softmax.int: (1 / 256, -128),
}


def activation_spec() -> QuantizationSpec:
    """Int8 asymmetric per-tensor, -128..127; the range always holds 0, so that padding is exact."""
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=MSEObserver.with_args(eps=2**-16),
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
    )


def dynamic_spec() -> QuantizationSpec:
    """Int8 asymmetric, with a range that is found anew at every inference."""
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=PlaceholderObserver.with_args(eps=2**-12),
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
        is_dynamic=True,
    )


def weight_spec(axis: int | None, scale: torch.Tensor) -> QuantizationSpec:
    """Int8 symmetric, -127..127, with known `scale`, one per channel of `axis` (None: per tensor)."""
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=KnownScale.with_args(scale=scale, ch_axis=axis or 0),
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_tensor_symmetric if axis is None else torch.per_channel_symmetric,
        ch_axis=axis,
    )


class EdgeQuantizer(Quantizer):
    """Annotates a canonical graph (see `passes.canonicalize`) for static int8.

    `weight_scales` holds the scales of layers whose weights are rounded already, by node name; `keep_float` names
    nodes that stay in float.
    """

    def __init__(
        self, weight_scales: Mapping[str, torch.Tensor] | None = None, keep_float: frozenset[str] = frozenset()
    ) -> None:
        self.weight_scales = weight_scales or {}
        self.keep_float = keep_float
        self.activation = activation_spec()

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotates every node once, in the graph's order, so that producers come before consumers."""
        for node in model.graph.nodes:
            left = node.op != "call_function" or node.name in self.keep_float
            if not left and "quantization_annotation" not in node.meta:
                self._annotate_node(model, node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: the tables hold only ops that some runtime executes in int8."""

    def _annotate_node(self, model: GraphModule, node: Node) -> None:
        target = node.target
        if target in WEIGHTED:
            if is_attribute(node.args[1]) and _is_float(node):
                self._annotate_weighted(model, node, WEIGHTED[target])
        elif target in ELEMENTWISE:
            if all(_is_float(a) for a in node.args[:2]) and not _is_scores(node) and not is_residual(node):
                self._annotate_compute(node, dict.fromkeys(node.args[:2], self.activation))
        elif target in UNARY:
            if _is_float(node):
                self._annotate_compute(node, {node.args[0]: self.activation})
        elif target in FIXED_OUTPUT and (target != aten.softmax.int or _is_quantized_output(node.args[0])):
            scale, zero_point = FIXED_OUTPUT[target]
            fixed = FixedQParamsQuantizationSpec(
                dtype=torch.int8,
                scale=scale,
                zero_point=zero_point,
                quant_min=-128,
                quant_max=127,
                qscheme=torch.per_tensor_affine,
            )
            _annotate(node, {node.args[0]: self.activation}, fixed)
        elif target == EMBEDDING:
            if is_attribute(node.args[0]) and _is_float(node):
                _annotate(node, {node.args[0]: weight_spec(0, channel_scales(attribute(model, node.args[0])))}, None)
        elif target == aten.cat.default:
            self._annotate_cat(node)
        elif target in MOVES or is_zero_pad(node):
            self._annotate_move(node)

    def _annotate_weighted(self, model: GraphModule, node: Node, axis: int) -> None:
        weight = node.args[1]
        # A grouped transposed convolution has its output channels spread over axis 1 and the groups.
        channels = None if target_groups(node) > 1 and axis == 1 else axis
        scale = self.weight_scales.get(node.name)
        if scale is None:
            scale = channel_scales(attribute(model, weight), channels)
        if feeds_residual(node):
            _annotate(node, {node.args[0]: dynamic_spec(), weight: weight_spec(channels, scale)}, None)
        else:
            self._annotate_compute(node, {node.args[0]: self.activation, weight: weight_spec(channels, scale)})

    def _annotate_compute(self, node: Node, inputs: dict[Node, QuantizationSpecBase]) -> None:
        activation = fused_activation(node)
        if activation is None:
            _annotate(node, inputs, self.activation)
        else:
            _annotate(node, inputs, None)
            _annotate(activation, {}, self.activation)

    def _annotate_cat(self, node: Node) -> None:
        """One set of qparams for all parts and the result: no runtime then has to requantize."""
        parts = list(node.args[0])
        if not all(_is_float(p) for p in parts):
            return
        shared = SharedQuantizationSpec((parts[0], node))
        _annotate(node, {parts[0]: self.activation, **{p: shared for p in parts[1:] if p is not parts[0]}}, shared)

    def _annotate_move(self, node: Node) -> None:
        source = node.args[0]
        if not isinstance(source, Node) or (source.op == "placeholder" and self._stays_float(node)):
            return
        if _is_float(node) and (_is_quantized_output(source) or _pools_for_int8(node)):
            _annotate(node, {source: self.activation}, SharedQuantizationSpec((source, node)))

    def _stays_float(self, move: Node) -> bool:
        """Whether every reader of a moved input is named in `keep_float`: nothing then needs its codes."""
        return bool(self.keep_float) and all(
            user.name in self.keep_float or (user.target in MOVES and self._stays_float(user)) for user in move.users
        )


def fused_activation(node: Node) -> Node | None:
    """Returns the activation that runtimes fuse into `node`: its only user, in FUSED_ACTIVATIONS; else None."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in FUSED_ACTIVATIONS else None


def is_residual(node: Node) -> bool:
    """Whether `node` is a sum that a LayerNorm reads: the residual stream of a transformer, which stays in float.

    A few of its channels are up to a hundred times larger than the others, which one int8 scale for all would lose.
    """
    return node.target == aten.add.Tensor and any(user.target == aten.layer_norm.default for user in node.users)


def feeds_residual(node: Node) -> bool:
    """Whether `node` is a linear layer whose output goes into residual sums alone.

    Its output is no better off in int8 than the sum, and layers with int8 inputs and float outputs are those that
    every runtime has for inputs quantized as it runs.
    """
    return node.target == aten.linear.default and bool(node.users) and all(is_residual(user) for user in node.users)


def target_groups(node: Node) -> int:
    """Returns the number of groups of a weighted op (1 for linear)."""
    return 1 if node.target == aten.linear.default else argument(node, 6, "groups", 1)


def _annotate(node: Node, inputs: dict[Node, QuantizationSpecBase], output: QuantizationSpecBase | None) -> None:
    node.meta["quantization_annotation"] = QuantizationAnnotation(
        input_qspec_map=inputs, output_qspec=output, _annotated=True
    )


def _is_float(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _is_scores(node: Node) -> bool:
    """Whether `node` ends in softmax alone: attention scores, which a mask of huge values may be part of."""
    steps = MOVES | ELEMENTWISE
    return bool(node.users) and all(
        user.target == aten.softmax.int or (user.target in steps and _is_scores(user)) for user in node.users
    )


def _pools_for_int8(node: Node) -> bool:
    """Whether `node` takes the largest of values that only quantized ops read: rounding them before is the same."""
    readers = WEIGHTED.keys() | ELEMENTWISE | UNARY
    return node.target in MAX_POOLS and bool(node.users) and all(user.target in readers for user in node.users)


def _is_quantized_output(node: Node) -> bool:
    annotation = node.meta.get("quantization_annotation")
    return (annotation is not None and annotation.output_qspec is not None) or node.op == "placeholder"
