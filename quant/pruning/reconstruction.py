"""Reconstruction: the layers that read pruned channels learn by least squares to do without them.

Each reader gets the weights with which it comes nearest, on calibration samples, to what it gave in the original
network, from what it is given in the pruned one (https://arxiv.org/abs/1707.06168). Layers are done in the order they
run in, so that each makes up for the ones before it. Nothing is trained, and no labels are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgekit.quant.pruning.surgery import Group, Tensors, kept_outputs

ROWS = 16_384  # equations a layer: places of its output, spread over all samples
RIDGE = 1e-3  # of the mean diagonal: how much a weight is held to what it was


class _Enough(Exception):
    """Ends a forward pass at the layer that was asked for."""


def reconstruct(
    pruned: nn.Module,
    original: nn.Module,
    gone: Mapping[Group, Iterable[int]],
    batches: Sequence[Tensors],
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Changes the weights of `pruned`, which is `original` without the units `gone`, in place.

    Reaches linear layers and ungrouped 2-D convolutions that lost input channels; calls `advance` after each.
    """
    names = readers(pruned, original)
    with torch.no_grad():
        wanted = _answers(original, names, batches)  # in the order they run in
        rows = kept_outputs(original, gone)
        for name, parts in wanted.items():
            layer: Any = pruned.get_submodule(name)
            stay = rows.get(name)
            targets = torch.cat([part if stay is None else part[:, stay] for part in parts])
            _solve(layer, torch.cat(_inputs(pruned, name, batches)), targets)
            advance()


def readers(pruned: nn.Module, original: nn.Module) -> list[str]:
    """Returns the layers that `reconstruct` changes."""
    found = []
    for name, layer in pruned.named_modules():
        plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
        if plain or isinstance(layer, nn.Linear):
            before: Any = original.get_submodule(name)
            if layer.weight.shape[1] < before.weight.shape[1]:
                found.append(name)
    return found


def _answers(original: nn.Module, names: Sequence[str], batches: Sequence[Tensors]) -> dict[str, list[torch.Tensor]]:
    """What each layer gives at the chosen places, (places, channels) a batch; by layer, in the order they run in."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = [
        original.get_submodule(name).register_forward_hook(
            lambda layer, inputs, output, name=name: found.setdefault(name, []).append(
                _at_places(output if isinstance(layer, nn.Linear) else output.flatten(2).mT, len(batches))
            )
        )
        for name in names
    ]
    try:
        for batch in batches:
            original(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: parts for name, parts in found.items() if len(parts) == len(batches)}  # layers run once a pass


def _inputs(pruned: nn.Module, name: str, batches: Sequence[Tensors]) -> list[torch.Tensor]:
    """What the layer reads for each of the chosen places, (places, weights of one output channel) a batch."""
    found: list[torch.Tensor] = []

    def take(layer: Any, inputs: Any) -> None:
        value = inputs[0]
        if isinstance(layer, nn.Conv2d):
            padding = layer._reversed_padding_repeated_twice if isinstance(layer.padding, str) else None
            value = value if padding is None else F.pad(value, padding)
            edge = 0 if padding is not None else layer.padding
            value = F.unfold(value, layer.kernel_size, layer.dilation, edge, layer.stride).mT
        found.append(_at_places(value, len(batches)))
        raise _Enough

    hook = pruned.get_submodule(name).register_forward_pre_hook(take)
    try:
        for batch in batches:
            try:
                pruned(*batch)
            except _Enough:
                continue
    finally:
        hook.remove()
    return found


def _at_places(value: torch.Tensor, parts: int) -> torch.Tensor:
    """Some of the rows of (…, features), the same ones for values of the same number of rows."""
    rows = value.reshape(-1, value.shape[-1])
    most = max(ROWS // parts, 1)
    if len(rows) <= most:
        return rows.clone()
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]]


def _solve(layer: Any, given: torch.Tensor, wanted: torch.Tensor) -> None:
    """Ridge regression of `wanted` on `given`, towards the weights that `layer` has."""
    if layer.bias is not None:
        given = torch.cat([given, torch.ones(len(given), 1)], 1)
    now = layer.weight.flatten(1)
    now = now if layer.bias is None else torch.cat([now, layer.bias[:, None]], 1)
    x, rest = given.double(), (wanted - given @ now.T).double()
    products = x.T @ x
    products.diagonal().add_(RIDGE * products.diagonal().mean().clamp_min(1e-12))
    change = torch.linalg.solve(products, x.T @ rest).T.float()
    if not torch.isfinite(change).all():
        return
    weights = layer.weight[0].numel()
    layer.weight += change[:, :weights].reshape(layer.weight.shape)
    if layer.bias is not None:
        layer.bias += change[:, weights]
