"""SmoothQuant: activations with a few huge channels trade range with the weights that read them.

Behind the LayerNorms of a transformer a few channels are up to a hundred times larger than the rest, and under one
int8 scale nothing is left of the others. Dividing each channel of a layer's input by s and multiplying the weight's
column by s changes nothing in float; s = max|x|^α / max|w|^(1−α) spreads the difficulty between the two (Xiao et al.,
2022, equation 4). The division is folded into the weight and bias of the LayerNorm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from edgekit.quant.graph.activations import watch
from edgekit.quant.graph.fx import drop_unread
from edgekit.quant.graph.passes import add_attribute, argument, aten, attribute, is_attribute
from edgekit.quant.ptq.gptq_rounding import channel_scales
from edgekit.quant.ptq.observers import MSEObserver

ALPHAS = tuple(n / 10 for n in range(1, 10))
WORTH = 0.9  # of the error without smoothing: above, a layer stays as it is
BATCHES = 64  # calibration batches that are looked at
ROWS = 16  # of each, and of each group, that errors are measured on
SMALLEST = 1e-5  # of a channel's largest value, below which it counts as this


@dataclass
class Group:
    """A LayerNorm, the linear layers that read it, and the inputs that they were seen to get."""

    norm: Node
    layers: tuple[Node, ...]
    largest: torch.Tensor
    rows: list[torch.Tensor]


def smooth(
    model: GraphModule, batches: Iterable[tuple[torch.Tensor, ...]], keep_float: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """Smooths, in place, each LayerNorm whose linear layers then err less at int8; returns a note where any does.

    The strength α is chosen group by group, by the squared error that int8 inputs and weights make in the layers'
    outputs on the calibration data. A LayerNorm that has other readers as well is computed twice.
    """
    groups = find_groups(model, keep_float)
    if not groups:
        return ()
    by_norm = {group.norm: group for group in groups}
    generator = torch.Generator().manual_seed(0)

    def see(norm: Node, result: torch.Tensor) -> None:
        group, x = by_norm[norm], result.reshape(-1, result.shape[-1])
        group.largest = torch.maximum(group.largest, x.abs().amax(dim=0))
        group.rows.append(x[torch.randperm(len(x), generator=generator)[:ROWS]].clone())

    watch(model, by_norm, batches, BATCHES, see)
    with torch.inference_mode():
        seen = [group for group in groups if group.rows]
        chosen = [(group, best) for group in seen if (best := strongest(model, group)) is not None]
    for group, factor in chosen:
        apply(model, group, factor)
    model.graph.eliminate_dead_code()
    drop_unread(model)
    model.recompile()
    if not chosen:
        return ()
    count = len(chosen)
    return (f"int8: SmoothQuant evens out the inputs of linear layers behind {count} of {len(groups)} LayerNorms",)


def find_groups(model: GraphModule, keep_float: frozenset[str]) -> list[Group]:
    """Returns each LayerNorm over the last axis that linear layers to be quantized read, with these layers."""
    groups = []
    for norm in model.graph.nodes:
        if norm.target != aten.layer_norm.default or len(norm.args[1]) != 1:
            continue
        if not all(is_attribute(constant) for index in (2, 3) if (constant := argument(norm, index, "")) is not None):
            continue
        layers = tuple(
            user
            for user in norm.users
            if user.target == aten.linear.default
            and user.args[0] is norm
            and is_attribute(user.args[1])
            and user.name not in keep_float
        )
        if layers:
            groups.append(Group(norm, layers, torch.zeros(norm.args[1][0]), []))
    return groups


def strongest(model: GraphModule, group: Group) -> torch.Tensor | None:
    """Returns the factors of the α that brings the least error, or None where none is WORTH it."""
    weights = [attribute(model, layer.args[1]) for layer in group.layers]
    x = torch.cat(group.rows)
    columns = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    candidates = [factors(group.largest, columns, alpha) for alpha in ALPHAS]
    errors = [error(x, weights, factor) for factor in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    return candidates[best] if errors[best] < WORTH * error(x, weights, torch.ones_like(columns)) else None


def factors(largest: torch.Tensor, columns: torch.Tensor, alpha: float) -> torch.Tensor:
    """Returns s = max|x|^α / max|w|^(1−α) of each channel, scaled to a geometric mean of 1."""
    x = largest.clamp(min=float(largest.max()) * SMALLEST or 1.0)
    w = columns.clamp(min=float(columns.max()) * SMALLEST or 1.0)
    logarithm = alpha * x.log() - (1 - alpha) * w.log()
    return (logarithm - logarithm.mean()).exp()


def error(x: torch.Tensor, weights: list[torch.Tensor], factor: torch.Tensor) -> float:
    """Returns the squared error in the outputs of linear layers with int8 inputs x/s and int8 weights w·s."""
    observer = MSEObserver()
    scaled = x / factor
    observer(scaled)
    scale, zero_point = (float(v) for v in observer.calculate_qparams())
    rounded = (torch.clamp(torch.round(scaled / scale) + zero_point, -128, 127) - zero_point) * scale
    total = 0.0
    for weight in weights:
        wide = weight * factor
        steps = channel_scales(wide).unsqueeze(1)
        codes = torch.clamp(torch.round(wide / steps), -127, 127) * steps
        total += float((F.linear(rounded, codes) - F.linear(x, weight)).square().sum())
    return total


def apply(model: GraphModule, group: Group, factor: torch.Tensor) -> None:
    """Divides the group's inputs by `factor` in its LayerNorm and multiplies its weights by it."""
    norm = group.norm
    others = [user for user in norm.users if user not in group.layers]
    _, shape, weight, bias, eps = (
        argument(norm, index, name, default)
        for index, (name, default) in enumerate(
            (("input", None), ("shape", None), ("weight", None), ("bias", None), ("eps", 1e-5))
        )
    )
    old = torch.ones_like(factor) if weight is None else attribute(model, weight)
    with model.graph.inserting_before(norm):
        new_weight = add_attribute(model, f"{norm.name}_smooth_weight", old / factor)
        new_bias = bias
        if bias is not None:
            new_bias = add_attribute(model, f"{norm.name}_smooth_bias", attribute(model, bias) / factor)
    if others:
        with model.graph.inserting_after(norm):
            target = model.graph.call_function(norm.target)
        target.meta["val"] = norm.meta["val"]
    else:
        target = norm
    target.args, target.kwargs = (norm.args[0], shape, new_weight, new_bias, eps), {}
    for layer in group.layers:
        with model.graph.inserting_before(layer):
            wide = attribute(model, layer.args[1]) * factor
            new = add_attribute(model, f"{layer.name}_smooth_weight", wide)
        layer.args = (target, new, *layer.args[2:])
