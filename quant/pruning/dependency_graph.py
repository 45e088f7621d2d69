"""Dependency graph: which channels of a network must go together, and taking them out of every layer that holds them.

Torch-Pruning's dependency graph (https://arxiv.org/abs/2301.12900) finds the layers that share channels: through
residual sums, concatenations, grouped and depthwise convolutions. What it finds is proved before it is used: a network
with channels taken out must compute exactly what it computes with these channels set to zero. Where that does not hold
(a forward pass with numbers built in, a reshape that was not followed) the channels stay, with the reason. Residual
branches, which can go as a whole, are proved alike.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import nn

from edgekit.errors import EdgeKitError, reason, user_line
from edgekit.quant.graph.copies import deep_copy
from edgekit.quant.graph.residual_branches import branches
from edgekit.quant.pruning.surgery import (
    BATCH_NORMS,
    COMPUTING,
    CONVOLUTIONS,
    RECURRENT,
    Cut,
    Group,
    Side,
    Tensors,
    depthwise,
    remove,
    width,
    zero,
)

Item = tuple[str, Side, dict[int, list[int]]]  # layer, side, and indices there by channel of the group's first layer
NORMALIZES_TOGETHER = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
SAME = 1e-3  # largest difference, relative to the largest output, that summing in another order explains


@dataclass(frozen=True)
class Structure:
    """What can go from a network, groups of channels and then whole branches, and what keeps its width: name → why."""

    groups: tuple[Group, ...]
    kept: Mapping[str, str]


class _Refused(Exception):
    """Why a group of channels cannot be taken apart."""


def structure(module: nn.Module, example: Tensors) -> Structure:
    """Finds the channels of `module`, called as `module(*example)` in eval mode, that can be taken out, and proves it.

    Raises EdgeKitError where the network cannot be traced by autograd, or holds nothing that could be pruned.
    """
    graph = _traced(module, example)
    names = {id(layer): name for name, layer in module.named_modules()}
    groups: list[Group] = []
    kept: dict[str, str] = {}
    done: set[str] = set()
    for name, layer in module.named_modules():
        if not isinstance(layer, COMPUTING) or name in done:
            continue
        if layer not in graph.module2node:
            kept[name] = "the example does not run it"
            continue
        found = _items(graph, layer, names)
        makers = [n for n, side, _ in found if side == "out" and n[0] != "<" and _computes(module, n)]
        done.update(makers or [name])
        try:
            groups.append(_group(module, name, found, _norms(graph, module, makers, names)))
        except _Refused as why:
            kept |= dict.fromkeys(makers or [name], str(why))
    proved, failed = _proved(module, example, groups)
    kept |= failed
    proved += [group for group in branches(module, example) if _objection(module, example, [group]) is None]
    if not proved:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(kept.items())[:3])
        raise EdgeKitError(
            f"no layer of this network can lose channels ({reasons or 'it has no convolution or linear layer'})",
            "export it at int8 instead, which needs no change of its structure",
        )
    return Structure(tuple(proved), {name: kept[name] for name, _ in module.named_modules() if name in kept})


def _traced(module: nn.Module, example: Tensors) -> Any:
    recurrent = {kind: _RecurrentWidth() for kind in RECURRENT}
    was = [parameter.requires_grad for parameter in module.parameters()]
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torch_pruning").setLevel(logging.ERROR)
            module.requires_grad_(True)
            graph = torch_pruning.DependencyGraph()
            return graph.build_dependency(module, example, verbose=False, customized_pruners=recurrent)
    except Exception as error:  # whatever autograd or the user's forward raises
        raise EdgeKitError(
            f"the structure of this network cannot be traced: {reason(error)}",
            "its forward must run with gradients: no torch.no_grad, no .data and no NumPy inside",
        ) from error
    finally:
        for parameter, flag in zip(module.parameters(), was, strict=True):
            parameter.requires_grad_(flag)


def _computes(module: nn.Module, name: str) -> bool:
    return isinstance(module.get_submodule(name), COMPUTING)


class _RecurrentWidth(torch_pruning.BasePruningFunc):
    """Tells the dependency graph how wide a recurrent layer is; it is never asked to prune one."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Marks the side of the outputs."""
        raise NotImplementedError

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Marks the side of the inputs."""
        raise NotImplementedError

    def get_out_channels(self, layer: Any) -> int:
        """Outputs of a step, of both directions."""
        return layer.hidden_size * (2 if layer.bidirectional else 1)

    def get_in_channels(self, layer: Any) -> int:
        """Inputs of a step."""
        return layer.input_size


def _items(graph: Any, layer: nn.Module, names: Mapping[int, str]) -> list[Item]:
    """The layers that share the out-channels of `layer`: name, side and indices by channel of `layer`.

    What is no layer has a name in angle brackets.
    """
    pruner = graph.get_pruner_of_module(layer)
    count = pruner.get_out_channels(layer)
    found: list[Item] = []
    for item in graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(count))):
        target = item.dep.target.module
        side: Side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        by_root: dict[int, list[int]] = {}
        for index, root in zip(item.idxs, item.root_idxs, strict=True):
            by_root.setdefault(root, []).append(index)
        if id(target) in names:
            found.append((names[id(target)], side, by_root))
        elif isinstance(target, nn.Parameter):
            found.append(("<parameter>", side, by_root))
        elif type(target).__name__ == "_OutputOp":
            found.append(("<output>", side, by_root))
    return found


def _norms(graph: Any, module: nn.Module, makers: Sequence[str], names: Mapping[int, str]) -> dict[str, str]:
    """The BatchNorm right behind each of `makers`."""
    behind = {name: [node.module for node in graph.module2node[module.get_submodule(name)].outputs] for name in makers}
    return {
        name: names[id(layers[0])]
        for name, layers in behind.items()
        if len(layers) == 1 and isinstance(layers[0], nn.modules.batchnorm._BatchNorm)
    }


def _group(module: nn.Module, name: str, found: Sequence[Item], norms: Mapping[str, str]) -> Group:
    layers = {n: module.get_submodule(n) for n, _, _ in found if n[0] != "<"}
    _check_kinds(layers, [n for n, _, _ in found])
    root = layers[name]
    blocks = _blocks(layers)
    count = width(root, "out")
    directions = 2 if isinstance(root, RECURRENT) and root.bidirectional else 1
    blocks = max(blocks, directions)
    if count % blocks:
        raise _Refused(f"its {count} channels do not divide into {blocks} blocks")
    size = count // blocks
    cuts = []
    for layer, side, by_root in found:
        if isinstance(layers[layer], nn.PReLU) and layers[layer].num_parameters == 1:
            continue
        if layers[layer] is root and isinstance(root, RECURRENT):
            cuts.append(Cut(layer, side, tuple((u,) for u in range(size))))
            continue
        if set(by_root) != set(range(count)) or len({len(indices) for indices in by_root.values()}) > 1:
            raise _Refused(f"its channels cannot be followed to {layer}")
        if max(i for indices in by_root.values() for i in indices) >= width(layers[layer], side):
            raise _Refused(f"its channels cannot be followed to {layer}")
        units = tuple(tuple(i for b in range(blocks) for i in by_root[u + b * size]) for u in range(size))
        cuts.append(Cut(layer, side, units, norms.get(layer) if side == "out" else None))
    if not any(cut.side == "in" for cut in cuts):
        raise _Refused("its width is that of the output")
    return Group(name, tuple(cuts), size, blocks)


def _check_kinds(layers: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    if "<output>" in names:
        raise _Refused("its width is that of the output")
    if "<parameter>" in names:
        raise _Refused("it shares its width with a parameter outside all layers")
    for name, layer in layers.items():
        if isinstance(layer, NORMALIZES_TOGETHER):
            raise _Refused(f"{name} ({type(layer).__name__}) normalizes its channels together")
        if isinstance(layer, RECURRENT) and layer.proj_size:
            raise _Refused(f"{name} projects its state")
        if not isinstance(layer, (*COMPUTING, *BATCH_NORMS, nn.Embedding, nn.PReLU)):
            raise _Refused(f"it shares its width with {name} ({type(layer).__name__})")
        if isinstance(layer, CONVOLUTIONS) and depthwise(layer) and layer.out_channels != layer.in_channels:
            raise _Refused(f"{name} makes several channels of each")
        if isinstance(layer, CONVOLUTIONS) and layer.transposed and layer.groups > 1:
            raise _Refused(f"{name} is a grouped transposed convolution")


def _blocks(layers: Mapping[str, nn.Module]) -> int:
    """Into how many equal blocks the grouped convolutions among `layers` divide the channels."""
    counts = {
        layer.groups
        for layer in layers.values()
        if isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and not depthwise(layer)
    }
    if len(counts) > 1:
        raise _Refused(f"its channels pass convolutions with different groups ({', '.join(map(str, sorted(counts)))})")
    return counts.pop() if counts else 1


def _proved(module: nn.Module, example: Tensors, groups: Sequence[Group]) -> tuple[list[Group], dict[str, str]]:
    """The groups that can be taken out without a change of what the rest computes, and why the others cannot."""
    if not groups or (why := _objection(module, example, groups)) is None:
        return list(groups), {}
    if len(groups) == 1:
        return [], {n: why for n in groups[0].makers if _computes(module, n)}
    middle = len(groups) // 2
    proved, failed = _proved(module, example, groups[:middle])
    more, also_failed = _proved(module, example, groups[middle:])
    failed |= also_failed
    if _objection(module, example, [*proved, *more]) is None:
        return [*proved, *more], failed
    for group in more:  # two groups may meet in a place that each alone passes
        why = _objection(module, example, [*proved, group])
        if why is None:
            proved.append(group)
        else:
            failed |= {n: why for n in group.makers if _computes(module, n)}
    return proved, failed


def _objection(module: nn.Module, example: Tensors, groups: Sequence[Group]) -> str | None:
    """Why the network without half the units of `groups` is not the one with these units zeroed; None if it is."""
    pruned, zeroed = deep_copy(module), deep_copy(module)
    generator = torch.Generator().manual_seed(0)
    orders = {group: torch.randperm(group.size, generator=generator).tolist() for group in groups}
    gone = {group: order[: 1 if group.branch else group.size // 2] for group, order in orders.items()}
    remove(pruned, gone)
    zero(zeroed, gone)
    try:
        with torch.no_grad():
            expected, got = _floats(zeroed(*example)), _floats(pruned(*example))
    except Exception as error:  # the user's forward
        line = user_line(error)
        return f"the forward pass has its width built in ({f'at {line}' if line else reason(error)})"
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape:
            return "the outputs change their shape"
        if not torch.allclose(a, b, rtol=0, atol=SAME * max(float(a.abs().max()), 1e-6)):
            return "its channels mix with others on the way: without them the network computes something else"
    return None


def _floats(outputs: Any) -> list[torch.Tensor]:
    values = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return [value.float() for value in values]
