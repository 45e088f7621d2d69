"""Saliency: how much each channel matters, so that the least salient ones are taken out.

`l1` and `l2` are norms of a channel's weights, with the scale of the BatchNorm behind it (https://arxiv.org/abs/1608.08710).
`fpgm` is torchao's distance to all other filters of the layer (https://arxiv.org/abs/1811.00250). `taylor` is the first
order of what the loss changes when the layers that read a channel get zeros instead (https://arxiv.org/abs/1906.10771).
`wanda` is the size of the weights that read a channel times the norm of its activations, by torchao's observer
(https://arxiv.org/abs/2306.11695).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgekit.quant.pruning.surgery import COMPUTING, CONVOLUTIONS, RECURRENT, Cut, Group, Tensors

Labeled = tuple[Tensors, torch.Tensor | None]  # inputs, and labels where there are any
METHODS = ("l1", "l2", "fpgm", "taylor", "wanda")
NEED_DATA = ("taylor", "wanda")


def saliency(
    module: nn.Module, groups: Sequence[Group], method: str, batches: Iterable[Labeled] = ()
) -> dict[Group, torch.Tensor]:
    """Returns one score a unit, float32 (size,) with mean 1, for each group; what matters more has a higher one.

    `taylor` and `wanda` read `batches`; `taylor` uses their labels, and without them the network's own answers.
    """
    if method == "taylor":
        found = _taylor(module, groups, batches)
    elif method == "wanda":
        found = _wanda(module, groups, batches)
    else:
        score = {"l1": _l1, "l2": _l2, "fpgm": _fpgm}[method]
        found = {group: _of_makers(module, group, score) for group in groups}
    return {group: scores / scores.mean().clamp_min(1e-12) for group, scores in found.items()}


def _l1(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows, ord=1, dim=1)


def _l2(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows, ord=2, dim=1)


def _fpgm(rows: torch.Tensor) -> torch.Tensor:
    from torchao.prototype.sparsity.pruner.FPGM_pruner import FPGMPruner

    return FPGMPruner(dist=2)._compute_distance(rows)


def _of_makers(module: nn.Module, group: Group, score: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Mean over the layers that make the channels; each counts alike, whatever the size of its weights."""
    total = torch.zeros(group.size)
    for cut in group.cuts:
        layer = module.get_submodule(cut.layer)
        if cut.side == "out" and isinstance(layer, COMPUTING):
            scores = score(_rows(module, cut, layer))
            units = torch.stack([scores[list(unit)].sum() for unit in cut.units])
            total += units / units.mean().clamp_min(1e-12)
    return total


def _rows(module: nn.Module, cut: Cut, layer: Any) -> torch.Tensor:
    """The weights that make each channel, (channels, weights of one); scaled by the BatchNorm behind."""
    if isinstance(layer, RECURRENT):
        names = [name for name in layer._flat_weights_names if name.startswith("weight")]
        hidden = layer.hidden_size
        weights = [getattr(layer, name).detach() for name in names]
        gates = [w.reshape(-1, hidden, w.shape[1]).transpose(0, 1).flatten(1) for w in weights]
        return torch.cat(gates, dim=1)
    weight = layer.weight.detach()
    weight = weight.transpose(0, 1) if getattr(layer, "transposed", False) else weight
    rows = weight.flatten(1)
    norm: Any = module.get_submodule(cut.norm) if cut.norm else None
    if norm is not None and norm.running_var is not None:
        scale = torch.rsqrt(norm.running_var + norm.eps) * (norm.weight.detach() if norm.weight is not None else 1.0)
        rows = rows * scale.abs()[:, None]
    return rows


def _readers(module: nn.Module, groups: Sequence[Group]) -> list[tuple[Group, Cut, Any]]:
    found = [(g, cut, module.get_submodule(cut.layer)) for g in groups for cut in g.cuts if cut.side == "in"]
    return [(group, cut, layer) for group, cut, layer in found if isinstance(layer, COMPUTING)]


def _columns(layer: Any, values: Callable[[torch.nn.Parameter], torch.Tensor]) -> torch.Tensor:
    """Sums `values` of a layer's weights for each of its input channels: (in channels,)."""
    if isinstance(layer, RECURRENT):
        names = [name for name in layer._flat_weights_names if name.startswith("weight_ih_l0")]
        return sum((values(getattr(layer, name)).sum(0) for name in names), torch.zeros(()))
    found = values(layer.weight)
    if not isinstance(layer, CONVOLUTIONS):
        return found.sum(0)
    if layer.transposed:
        return found.flatten(1).sum(1)
    blocks = found.reshape(layer.groups, -1, *found.shape[1:])  # of a grouped convolution: each reads its own channels
    return blocks.sum(dim=(1, *range(3, blocks.ndim))).flatten()


def _taylor(module: nn.Module, groups: Sequence[Group], batches: Iterable[Labeled]) -> dict[Group, torch.Tensor]:
    readers = _readers(module, groups)
    totals = {group: torch.zeros(group.size) for group in groups}
    was = [parameter.requires_grad for parameter in module.parameters()]
    module.requires_grad_(True)
    try:
        for inputs, labels in batches:
            module.zero_grad(set_to_none=True)
            with torch.enable_grad():
                _loss(module(*inputs), labels).backward()
            change = {group: torch.zeros(group.size) for group in groups}
            for group, cut, layer in readers:
                columns = _columns(layer, lambda w: w.detach() * w.grad if w.grad is not None else torch.zeros_like(w))
                change[group] += torch.stack([columns[list(unit)].sum() for unit in cut.units])
            for group in groups:
                totals[group] += change[group].square()
    finally:
        module.zero_grad(set_to_none=True)
        for parameter, flag in zip(module.parameters(), was, strict=True):
            parameter.requires_grad_(flag)
    return {group: total.sqrt() for group, total in totals.items()}


def _loss(outputs: Any, labels: torch.Tensor | None) -> torch.Tensor:
    first = (outputs if isinstance(outputs, (tuple, list)) else (outputs,))[0]
    if first.ndim == 2 and first.shape[1] > 1:
        return F.cross_entropy(first, first.argmax(1) if labels is None else labels)
    return first.float().square().mean()


def _wanda(module: nn.Module, groups: Sequence[Group], batches: Iterable[Labeled]) -> dict[Group, torch.Tensor]:
    from torchao.sparsity.utils import PerChannelNormObserver

    readers = _readers(module, groups)
    observers: Mapping[str, Any] = {cut.layer: PerChannelNormObserver() for _, cut, _ in readers}
    hooks = []
    for name, observer in observers.items():
        layer: Any = module.get_submodule(name)
        axis = 1 if isinstance(layer, CONVOLUTIONS) else -1
        hooks.append(layer.register_forward_pre_hook(lambda _, x, o=observer, a=axis: _observe(o, x[0], a)))
    try:
        with torch.no_grad():
            for inputs, _ in batches:
                module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    totals = {group: torch.zeros(group.size) for group in groups}
    for group, cut, layer in readers:
        columns = _columns(layer, lambda w: w.detach().abs()) * observers[cut.layer].norm.sqrt()
        totals[group] += torch.stack([columns[list(unit)].sum() for unit in cut.units])
    return totals


def _observe(observer: Any, value: torch.Tensor, axis: int) -> None:
    observer(value.detach().movedim(axis, -1).flatten(0, -2))
