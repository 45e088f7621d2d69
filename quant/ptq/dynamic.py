"""Quantizing weights alone, or weights and, as the file runs, the inputs of linear layers: no calibration data.

Weights are int8, symmetric, one scale per output channel, rounded to the nearest. A linear layer's input may get a
range of its own at every inference; convolutions never do: their inputs differ too much from one image position to
another, and networks quantized so collapse.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer

from edgekit.quant.graph.passes import argument, aten, attribute, capture, is_attribute
from edgekit.quant.ptq.gptq_rounding import channel_scales
from edgekit.quant.ptq.quantizer import (
    EMBEDDING,
    MOVES,
    WEIGHTED,
    EdgeQuantizer,
    dynamic_spec,
    target_groups,
    weight_spec,
)

LEAST_SHARE = 0.1  # of the weights, below which quantizing linear layers alone is not worth a file
# Their weights are the matrices of argument 2.
RECURRENT = {
    aten.lstm.input: "LSTM",
    aten.gru.input: "GRU",
    aten.rnn_tanh.input: "RNN",
    aten.rnn_relu.input: "RNN",
}
LAYER_NAMES = {
    aten.linear.default: "linear",
    aten.conv1d.default: "convolution",
    aten.conv2d.default: "convolution",
    aten.conv_transpose2d.input: "transposed convolution",
    EMBEDDING: "embedding",
    **RECURRENT,
}


class WeightQuantizer(Quantizer):
    """Annotates the weights of a canonical graph, and with `dynamic` the inputs of linear layers.

    With `dynamic`, convolutions stay in float, unless the other layers hold less than LEAST_SHARE of the weights: then
    their weights are quantized too, and `convolutions` is set. `keep_float` names nodes that stay in float in any case.
    After annotating, `quantized` and `left_float` count the layers by name, `share` is how much of the float weights is
    quantized, and `other_share` how much of them is so in layers that are no convolutions.
    """

    def __init__(self, *, dynamic: bool, keep_float: frozenset[str] = frozenset()) -> None:
        self.dynamic, self.keep_float = dynamic, keep_float
        self.convolutions = not dynamic
        self.quantized: Counter[str] = Counter()
        self.left_float: Counter[str] = Counter()
        self.share = self.other_share = 0.0

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotates every layer that has weights of its own."""
        self._annotate(model)
        self.other_share = self.share
        if not self.convolutions and self.share < LEAST_SHARE:
            self.convolutions = True
            self.quantized.clear()
            self.left_float.clear()
            self._annotate(model)
        return model

    def _annotate(self, model: GraphModule) -> None:
        quantized: set[str] = set()
        for node in model.graph.nodes:
            if node.target not in LAYER_NAMES or node.name in self.keep_float:
                continue
            inputs = {w: weight_spec(axis, scale) for w, (axis, scale) in weight_scales(model, node).items()}
            if not inputs or (not self.convolutions and "convolution" in LAYER_NAMES[node.target]):
                self.left_float[LAYER_NAMES[node.target]] += 1
                continue
            if self.dynamic and node.target == aten.linear.default:
                inputs[node.args[0]] = dynamic_spec()
            node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)
            self.quantized[LAYER_NAMES[node.target]] += 1
            quantized |= {weight.target for weight in inputs if is_attribute(weight)}
        sizes = {n.target: n.meta["val"].numel() for n in model.graph.nodes if is_attribute(n) and _is_float(n)}
        self.share = sum(sizes[target] for target in quantized) / max(sum(sizes.values()), 1)

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: the table holds only layers that some runtime executes."""


class StaticQuantizer(EdgeQuantizer):
    """Annotates a canonical graph for static int8, and of recurrent layers the weights alone.

    No runtime has int8 kernels for them that keep to one scheme, and an error in a state stays for all later steps.
    After annotating, `recurrent` counts these layers by name.
    """

    recurrent: Counter[str]

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotates every node once."""
        self.keep_float |= _moves_around_layers(model)
        super().annotate(model)
        self.recurrent = Counter()
        for node in model.graph.nodes:
            if node.target not in RECURRENT or node.name in self.keep_float:
                continue
            weights = weight_scales(model, node)
            if weights:
                inputs = {weight: weight_spec(axis, scale) for weight, (axis, scale) in weights.items()}
                node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)
                self.recurrent[RECURRENT[node.target]] += 1
        return model


def reachable_share(module: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> float:
    """Returns the share of the float weights of `module` that int8-dynamic would quantize, 0 to 1."""
    graph = capture(module, example)
    quantizer = WeightQuantizer(dynamic=True)
    quantizer.annotate(graph)
    return quantizer.share


def _moves_around_layers(model: GraphModule) -> frozenset[str]:
    """The moves of what recurrent layers read and give: a state that is rounded at every step drifts."""
    found: set[Node] = set()
    layers = [node for node in model.graph.nodes if node.target in RECURRENT]
    pending = [source for layer in layers for source in layer.all_input_nodes]
    while pending:
        node = pending.pop()
        if node.target in MOVES and node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    pending = [part for layer in layers for user in layer.users for part in user.users]
    while pending:
        node = pending.pop()
        if node.target in MOVES and node not in found:
            found.add(node)
            pending.extend(node.users)
    return frozenset(node.name for node in found)


def weight_scales(model: GraphModule, node: Node) -> dict[Node, tuple[int | None, torch.Tensor]]:
    """Returns the axis of the channels, and their scales, of each weight that a node of LAYER_NAMES has of its own.

    The two directions of a recurrent layer share scales: ONNX stores them as one tensor.
    """
    found: list[tuple[Node, int | None]]
    if node.target in RECURRENT:
        found = [(parameter, 0) for parameter in node.args[2] if parameter.meta["val"].ndim == 2]
    elif node.target == EMBEDDING:
        found = [(node.args[0], 0)]
    else:
        axis = WEIGHTED[node.target]
        # A grouped transposed convolution has its output channels spread over axis 1 and the groups.
        found = [(argument(node, 1, "weight"), None if axis == 1 and target_groups(node) > 1 else axis)]
    if not all(is_attribute(weight) and _is_float(weight) for weight, _ in found):
        return {}
    scales = {weight: (axis, channel_scales(attribute(model, weight), axis)) for weight, axis in found}
    if node.target in RECURRENT and argument(node, 7, "bidirectional"):
        matrices = [weight for weight, _ in found]
        per_layer = len(matrices) // argument(node, 4, "num_layers") // 2  # of one direction: 2, or 3 with projections
        for index, weight in enumerate(matrices):
            if index // per_layer % 2 == 0:
                other = matrices[index + per_layer]
                largest = torch.maximum(scales[weight][1], scales[other][1])
                scales[weight] = scales[other] = (0, largest)
    return scales


def counted(layers: Counter[str]) -> str:
    """Spells {"convolution": 2, "LSTM": 1} as "2 convolution layers and 1 LSTM layer"."""
    return " and ".join(f"{count} {name} layer{'s' if count > 1 else ''}" for name, count in layers.items())


def _is_float(node: Node) -> bool:
    return node.meta["val"].dtype == torch.float32
