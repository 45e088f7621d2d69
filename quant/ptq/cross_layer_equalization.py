"""Cross-layer equalization: channels of very different range traded against the weights that read them.

Between the layers that write a tensor and the layers that read it, channel c may be divided by any s_c > 0 if the
writers' rows are divided and the readers' columns multiplied by it: in float the network stays equal where only
positively homogeneous ops lie between (Nagel et al., "Data-Free Quantization", 2019, section 4.1). Tensors joined by
additions share one s. One int8 scale per tensor then fits all channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from edgekit.quant.graph.activations import watch
from edgekit.quant.graph.fx import drop_unread
from edgekit.quant.graph.passes import add_attribute, argument, aten, attribute, is_layer, is_zero_pad

BATCHES = 32  # calibration batches that are looked at
ALPHAS = (0.25, 0.5, 0.75, 1.0)
WORTH = 0.5  # of the error expected without: above, channels stay as they are
SMALLEST = 1e-4  # of a tensor's largest value, below which a channel counts as this

# One tensor in, one out, channel by channel, f(a·x) = a·f(x) for a > 0.
HOMOGENEOUS = {aten.relu.default, aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default}


@dataclass
class Group:
    """Tensors that must share one factor per channel: who writes them, who reads them; `fixed` where that cannot be."""

    writers: list[Node] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)
    tensors: list[Node] = field(default_factory=list)
    fixed: bool = False


@dataclass
class Seen:
    """Of each channel (axis 1) of a tensor, the largest magnitude and the largest mean square of a batch."""

    largest: torch.Tensor
    square: torch.Tensor


def equalize(
    model: GraphModule, batches: Iterable[tuple[torch.Tensor, ...]], keep_float: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """Equalizes, in place, the tensors of which int8 would lose too much; returns a note where there are any.

    Expected errors follow from the channels' ranges on `batches` and from the weights. Layers named in `keep_float`
    do not count.
    """
    groups = [g for g in find_groups(model) if g.writers and g.readers and not g.fixed]
    groups = [g for g in groups if keep_float.isdisjoint(node.name for node in (*g.writers, *g.readers))]
    if not groups:
        return ()
    seen: dict[Node, Seen] = {}

    def see(node: Node, result: torch.Tensor) -> None:
        x = result.transpose(0, 1).flatten(1)
        now = Seen(x.abs().amax(dim=1), x.square().mean(dim=1))
        before = seen.setdefault(node, now)
        before.largest = torch.maximum(before.largest, now.largest)
        before.square = torch.maximum(before.square, now.square)

    watch(model, {node for group in groups for node in group.tensors}, batches, BATCHES, see)
    chosen = [(group, s) for group in groups if (s := best_factors(model, group, seen)) is not None]
    for group, s in chosen:
        apply(model, group, s)
    model.graph.eliminate_dead_code()
    drop_unread(model)
    model.recompile()
    if not chosen:
        return ()
    names = ", ".join(group.writers[0].name for group, _ in chosen[:3]) + (", …" if len(chosen) > 3 else "")
    return (f"int8: cross-layer equalization evens out the channels behind {len(chosen)} layers ({names})",)


def find_groups(model: GraphModule) -> list[Group]:
    """Returns the groups of tensors that additions and homogeneous ops tie together."""
    groups: dict[Node, Group] = {}
    for node in model.graph.nodes:
        if node.op in ("get_attr", "placeholder"):
            groups[node] = Group(fixed=True)
            continue
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if is_layer(node):
            groups[node.args[0]].readers.append(node)
            groups[node.args[0]].fixed |= not _reads_channels(node)
            groups[node] = Group(writers=[node], tensors=[node], fixed=not _writes_channels(node))
        elif _passes_channels(node):
            _join(groups, sources, node)
        else:
            for source in sources:
                groups[source].fixed = True
            groups[node] = Group(fixed=True)
    return list({id(group): group for group in groups.values()}.values())


def _join(groups: dict[Node, Group], sources: list[Node], node: Node) -> None:
    merged = groups[sources[0]]
    for source in sources[1:]:
        other = groups[source]
        if other is merged:
            continue
        merged.writers += other.writers
        merged.readers += other.readers
        merged.tensors += other.tensors
        merged.fixed |= other.fixed
        for key, group in groups.items():
            if group is other:
                groups[key] = merged
    merged.tensors.append(node)
    groups[node] = merged


def _is_depthwise(layer: Node) -> bool:
    groups = 1 if layer.target == aten.linear.default else argument(layer, 6, "groups", 1)
    return groups > 1 and groups == layer.args[0].meta["val"].shape[1]


def _reads_channels(layer: Node) -> bool:
    """Whether each channel (axis 1) of a layer's input has weights of its own: no groups, or one group a channel."""
    if layer.target == aten.linear.default:
        return layer.args[0].meta["val"].ndim == 2
    return argument(layer, 6, "groups", 1) == 1 or _is_depthwise(layer)


def _writes_channels(layer: Node) -> bool:
    """Whether axis 1 of a layer's result are the rows of its weight: not of a linear layer on sequences."""
    return layer.target != aten.linear.default or layer.meta["val"].ndim == 2


def _passes_channels(node: Node) -> bool:
    """Whether axis 1 of the result is axis 1 of the input, or of both inputs, each channel by itself."""
    result = node.meta.get("val")
    if node.op != "call_function" or not isinstance(result, torch.Tensor) or not isinstance(node.args[0], Node):
        return False
    if node.target == aten.add.Tensor:
        terms = node.args[:2]
        return not node.kwargs and all(
            isinstance(t, Node) and t.op != "get_attr" and t.meta["val"].shape == result.shape for t in terms
        )
    source = node.args[0].meta["val"]
    if not isinstance(source, torch.Tensor) or source.ndim != 4:
        return False
    if node.target == aten.mean.dim:
        return sorted(axis % 4 for axis in node.args[1]) == [2, 3]
    if node.target == aten.view.default:
        return tuple(source.shape) == (*result.shape, 1, 1)
    if is_zero_pad(node):
        return len(node.args[1]) <= 4
    return node.target in HOMOGENEOUS


def best_factors(model: GraphModule, group: Group, seen: dict[Node, Seen]) -> torch.Tensor | None:
    """Returns s of the strength α that promises the least error, or None where none is WORTH it.

    s_c = max|x_c|^α / max|w_c|^(1−α), of geometric mean 1 (Xiao et al., "SmoothQuant", 2022, equation 4; α = ½ is
    Nagel et al.'s).
    """
    quantized = [node for node in group.tensors if node in seen and not _is_clipped(node)]
    if not quantized:
        return None
    largest = torch.stack([seen[node].largest for node in quantized]).amax(dim=0).double()
    x = largest.clamp(min=float(largest.max()) * SMALLEST or 1.0)
    columns = torch.stack([_columns(model, layer).abs().amax(dim=(0, 2)) for layer in group.readers]).amax(dim=0)
    w = columns.clamp(min=float(columns.max()) * SMALLEST or 1.0)

    def factors(alpha: float) -> torch.Tensor:
        logarithm = alpha * x.log() - (1 - alpha) * w.log()
        return (logarithm - logarithm.mean()).exp()

    def expected(s: torch.Tensor) -> float:
        return sum(_expected_error(model, layer, largest, seen, s) for layer in group.readers)

    candidates = [factors(alpha) for alpha in ALPHAS]
    errors = [expected(s) for s in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    return candidates[best].float() if errors[best] < WORTH * expected(torch.ones_like(x)) else None


def _is_clipped(node: Node) -> bool:
    """Whether only the activation that follows is quantized."""
    return len(node.users) == 1 and next(iter(node.users)).target == aten.relu.default


def _columns(model: GraphModule, layer: Node) -> torch.Tensor:
    """Returns a layer's weight as (outputs per channel, channels, weights per pair), in float64."""
    weight = attribute(model, layer.args[1]).double()
    if _is_depthwise(layer):
        channels = layer.args[0].meta["val"].shape[1]
        return weight.reshape(channels, -1, weight[0].numel()).transpose(0, 1)
    return weight.reshape(*weight.shape[:2], -1)


def _expected_error(
    model: GraphModule, layer: Node, largest: torch.Tensor, seen: dict[Node, Seen], s: torch.Tensor
) -> float:
    """Returns what rounding inputs x/s and weights w·s to int8 adds to the square of a layer's outputs.

    A step Δ makes errors of mean square Δ²/12; Δ is the range over 255 for inputs, each output's over 127 for weights.
    """
    wide = _columns(model, layer) * s.reshape(1, -1, 1)
    input_step = 2 * float((largest / s).max()) / 255
    weight_step = wide.abs().amax(dim=2 if _is_depthwise(layer) else (1, 2), keepdim=True) / 127
    square = seen[layer.args[0]].square.double() / s.square()
    from_weights = (weight_step.square().expand_as(wide) * square.reshape(1, -1, 1)).sum()
    return float((input_step**2 * wide.square().sum() + from_weights) / 12)


def apply(model: GraphModule, group: Group, s: torch.Tensor) -> None:
    """Divides the rows of the group's writers by `s` and multiplies the columns of its readers by it."""
    for writer in group.writers:
        weight = attribute(model, writer.args[1])
        _replace(model, writer, 1, weight / s.reshape(-1, *[1] * (weight.ndim - 1)))
        if len(writer.args) > 2 and writer.args[2] is not None:
            _replace(model, writer, 2, attribute(model, writer.args[2]) / s)
    for reader in group.readers:
        weight = attribute(model, reader.args[1])
        if _is_depthwise(reader):
            columns = s.repeat_interleave(len(weight) // len(s)).reshape(-1, *[1] * (weight.ndim - 1))
        else:
            columns = s.reshape(1, -1, *[1] * (weight.ndim - 2))
        _replace(model, reader, 1, weight * columns)


def _replace(model: GraphModule, node: Node, index: int, value: torch.Tensor) -> None:
    """Gives `node` a constant of its own as argument `index`: a shared one stays as it is for the others."""
    with model.graph.inserting_before(node):
        constant = add_attribute(model, f"{node.name}_{('weight', 'bias')[index - 1]}_even", value)
    node.args = (*node.args[:index], constant, *node.args[index + 1 :])
