"""Allocation: how many channels each layer keeps, so that a share of the multiply-adds goes, and which ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgekit.errors import EdgeKitError, UsageError
from edgekit.quant.graph.copies import deep_copy
from edgekit.quant.pruning.dependency_graph import Structure
from edgekit.quant.pruning.surgery import COMPUTING, CONVOLUTIONS, RECURRENT, Absent, Group, Tensors, remove, zero

ALLOCATIONS = ("uniform", "global", "sensitivity")
ROUND_TO = 8  # channels: what the kernels of all three runtimes work in
FEWEST = 0.1  # of a group's units stay whatever is asked
DEPTH = 0.5  # of what has to go: whole branches go until so much is gone, where samples tell which
TRIED_LEVELS = 6  # widths of each group that the sensitivity is measured at


@dataclass(frozen=True)
class LayerChange:
    """One layer before and after: shapes of its weight, and its multiply-adds for one sample."""

    name: str
    kind: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    macs_before: int
    macs_after: int
    kept: str | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {**self.__dict__, "before": list(self.before), "after": list(self.after)}


def macs(module: nn.Module, example: Tensors) -> dict[str, int]:
    """Returns the multiply-adds of each convolution, linear and recurrent layer of `module` on `example`, by name.

    Products of activations with each other, as in attention, are not counted: no channel count changes them alone.
    """
    found: dict[str, int] = {}
    hooks = []
    for name, layer in module.named_modules():
        if isinstance(layer, COMPUTING):
            found[name] = 0

            def count(layer: Any, inputs: Any, outputs: Any, name: str = name) -> None:
                found[name] += _uses(layer, inputs[0], outputs) * _weights(layer, 0, 0)

            hooks.append(layer.register_forward_hook(count))
    try:
        with torch.no_grad():
            module(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _uses(layer: Any, given: torch.Tensor, outputs: Any) -> int:
    """How often each weight is multiplied."""
    if isinstance(layer, CONVOLUTIONS):
        places = given if layer.transposed else outputs
        return places.numel() // (layer.in_channels if layer.transposed else layer.out_channels)
    return given.numel() // given.shape[-1]


def _weights(layer: Any, out_gone: int, in_gone: int) -> int:
    """How many weights `layer` has without some of its channels."""
    if isinstance(layer, RECURRENT):
        directions = 2 if layer.bidirectional else 1
        gates = layer.weight_ih_l0.shape[0] // layer.hidden_size
        hidden, inputs = layer.hidden_size - out_gone, layer.input_size - in_gone
        inner = (layer.num_layers - 1) * hidden * (hidden * directions + hidden)
        return gates * directions * (hidden * (inputs + hidden) + inner)
    if isinstance(layer, nn.Linear):
        return (layer.out_features - out_gone) * (layer.in_features - in_gone)
    outs, kernel = layer.out_channels - out_gone, math.prod(layer.kernel_size)
    if layer.groups == layer.in_channels and layer.groups > 1:
        return outs * kernel
    return outs * (layer.in_channels - in_gone) // layer.groups * kernel


class Costs:
    """What a network costs with fewer channels, without building it."""

    def __init__(self, module: nn.Module, structure: Structure, example: Tensors) -> None:
        """Measures `module` on `example`."""
        self.before = macs(module, example)
        self.total = sum(self.before.values())
        self._layers = {name: module.get_submodule(name) for name in self.before}
        self._whole = {name: _weights(layer, 0, 0) for name, layer in self._layers.items()}
        self._touched: dict[Group, list[str]] = {}
        self._cuts: dict[str, list[tuple[Group, int, int]]] = {}
        self._branches: dict[str, list[Group]] = {}
        for group in structure.groups:
            self._touched[group] = [path for path in group.branch if path in self.before]
            for path in group.branch:
                self._branches.setdefault(path, []).append(group)
            for cut in group.cuts:
                if cut.layer in self.before:
                    side = 0 if cut.side == "out" else 1
                    self._cuts.setdefault(cut.layer, []).append((group, side, len(cut.units[0])))
                    self._touched[group].append(cut.layer)

    def macs(self, kept: Mapping[Group, int]) -> int:
        """Returns the multiply-adds of the network that keeps so many units of each group."""
        return sum(self._of(name, kept) for name in self.before)

    def freed(self, kept: Mapping[Group, int], group: Group, level: int) -> int:
        """Returns the multiply-adds that go when `group` keeps `level` units; below zero where it gets wider."""
        then = {**kept, group: level}
        return sum(self._of(name, kept) - self._of(name, then) for name in set(self._touched[group]))

    def _of(self, name: str, kept: Mapping[Group, int]) -> int:
        if any(kept[group] == 0 for group in self._branches.get(name, ())):
            return 0
        gone = [0, 0]
        for group, side, each in self._cuts.get(name, ()):
            gone[side] += each * (group.size - kept[group])
        return self.before[name] * _weights(self._layers[name], *gone) // self._whole[name]


def levels(group: Group, round_to: int = ROUND_TO) -> tuple[int, ...]:
    """Returns how many units a group may keep, ascending: multiples of `round_to` channels where it has two of them.

    A branch stays or goes.
    """
    if group.branch:
        return 0, 1
    fewest = max(1, math.ceil(FEWEST * group.size))
    step = round_to // math.gcd(round_to, group.width)
    if group.size < 2 * step:
        return tuple(range(fewest, group.size + 1))
    return (*(k for k in range(step, group.size, step) if k >= fewest), group.size)


def allocate(
    costs: Costs,
    scores: Mapping[Group, torch.Tensor],
    ratio: float,
    how: str,
    round_to: int = ROUND_TO,
    losses: Mapping[Group, Mapping[int, float]] | None = None,
    depth: float = DEPTH,
) -> dict[Group, int]:
    """Returns how many units each group keeps, so that at least `ratio` of the multiply-adds goes, and little more.

    `uniform` takes the same share of every group, `global` the least salient units of the whole network, and
    `sensitivity` the cheapest steps by `losses` (see `sensitivity`). With losses, whole branches go first, up to
    `depth` of what has to go. Raises EdgeKitError where `ratio` cannot be reached.
    """
    target = int((1 - ratio) * costs.total)
    whole = _branches_left(costs, scores, losses or {}, target, depth if how == "sensitivity" else 0.0)
    steps = {group: (whole[group],) if group.branch else levels(group, round_to) for group in scores}
    least = {group: step[0] for group, step in steps.items()}
    if costs.macs(least) > target:
        most = 100 * (1 - costs.macs(least) / costs.total)
        channels = min((count for group, count in least.items() if not group.branch), default=0)
        raise EdgeKitError(
            f"{100 * ratio:g} % of the multiply-adds cannot be removed: {most:.0f} % go where every layer that can "
            f"be pruned keeps its last {channels} or more channels",
            f"give --ratio {max(most / 100 - 0.05, 0.01):.2f} or less",
        )
    if how == "sensitivity":
        assert losses is not None
        kept = _by_losses(costs, steps, losses, target)
    else:
        kept = _by_threshold(costs, steps, scores, target, how)
    return _given_back(costs, steps, scores, kept, target)


def _branches_left(
    costs: Costs,
    groups: Iterable[Group],
    losses: Mapping[Group, Mapping[int, float]],
    target: int,
    depth: float,
) -> dict[Group, int]:
    """Which branches stay (1) and which go (0): those that lose the least for what they free, never too many."""
    kept = {group: group.size for group in groups}
    spent = costs.macs(kept)
    enough = costs.total - depth * (costs.total - target)
    while spent > enough:
        freed = {group: costs.freed(kept, group, 0) for group in kept if group.branch and kept[group]}
        fitting = [group for group, count in freed.items() if 0 < count <= spent - target]
        if not fitting:
            break
        chosen = min(fitting, key=lambda group: losses[group][0] / freed[group])
        kept[chosen], spent = 0, spent - freed[chosen]
    return {group: count for group, count in kept.items() if group.branch}


def _nearest(step: Sequence[int], count: float) -> int:
    return min(step, key=lambda level: (abs(level - count), -level))


def _by_threshold(
    costs: Costs, steps: Mapping[Group, tuple[int, ...]], scores: Mapping[Group, torch.Tensor], target: int, how: str
) -> dict[Group, int]:
    def at(part: float) -> dict[Group, int]:
        if how == "uniform":
            return {group: _nearest(step, (1 - part) * group.size) for group, step in steps.items()}
        bar = float(torch.quantile(torch.cat([score for group, score in scores.items() if not group.branch]), part))
        return {group: _nearest(step, int((scores[group] >= bar).sum())) for group, step in steps.items()}

    low, high = 0.0, 1.0  # at 1 each group keeps its fewest, or of one score all that share it
    if costs.macs(at(high)) > target:
        return {group: step[0] for group, step in steps.items()}
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if costs.macs(at(middle)) <= target else (middle, high)
    return at(high)


def _by_losses(
    costs: Costs, steps: Mapping[Group, tuple[int, ...]], losses: Mapping[Group, Mapping[int, float]], target: int
) -> dict[Group, int]:
    """Narrows the group that loses the least for the multiply-adds it frees, until enough are free."""
    kept = {group: step[-1] for group, step in steps.items()}
    spent = costs.macs(kept)
    while spent > target:
        best: tuple[float, Group, int, int] | None = None
        for group, step in steps.items():
            for level in step[: step.index(kept[group])]:
                freed = costs.freed(kept, group, level)
                needed = max(min(freed, spent - target), 1)
                price = (_at(losses[group], level) - _at(losses[group], kept[group])) / needed
                if freed > 0 and (best is None or price < best[0]):
                    best = (price, group, level, spent - freed)
        assert best is not None  # `allocate` has seen that the least suffices
        _, group, kept[group], spent = best
    return kept


def _at(curve: Mapping[int, float], level: int) -> float:
    """The loss at `level` on a curve that was measured at some, linear between them and growing to the left."""
    known = sorted(curve)
    if level <= known[0]:
        return curve[known[0]] * (1 + (known[0] - level) / max(known[0], 1))
    above = next(k for k in known if k >= level)
    below = known[known.index(above) - 1]
    part = (above - level) / (above - below) if above != below else 0.0
    return curve[above] + part * (curve[below] - curve[above])


def _given_back(
    costs: Costs,
    steps: Mapping[Group, tuple[int, ...]],
    scores: Mapping[Group, torch.Tensor],
    kept: dict[Group, int],
    target: int,
) -> dict[Group, int]:
    """Widens groups again as far as rounding took more than was asked, those with the most salient units first."""

    def next_score(group: Group) -> float:
        return float(scores[group].sort(descending=True).values[min(kept[group], group.size - 1)])

    room = target - costs.macs(kept)
    for group in sorted(kept, key=next_score, reverse=True):
        for level in steps[group][steps[group].index(kept[group]) + 1 :]:
            taken = -costs.freed(kept, group, level)
            if taken > room:
                break
            kept[group], room = level, room - taken
    return kept


def divergence(outputs: Any, reference: Any) -> torch.Tensor:
    """Returns how far outputs are from reference ones: KL divergence of classes, relative squared error of others."""
    got = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    wanted = reference if isinstance(reference, (tuple, list)) else (reference,)
    parts = []
    for a, b in zip(got, wanted, strict=True):
        if not b.is_floating_point():
            continue
        if b.ndim == 2 and b.shape[1] > 1:
            parts.append(F.kl_div(F.log_softmax(a, 1), F.log_softmax(b, 1), reduction="batchmean", log_target=True))
        else:
            parts.append((a - b).square().mean() / b.square().mean().clamp_min(1e-12))
    return torch.stack(parts).sum()


def sensitivity(
    module: nn.Module,
    scores: Mapping[Group, torch.Tensor],
    batches: Sequence[Tensors],
    round_to: int = ROUND_TO,
    advance: Callable[[], None] = lambda: None,
) -> dict[Group, dict[int, float]]:
    """Measures how far the outputs move when one group alone keeps only so many units: group → units kept → divergence.

    Runs `batches` for up to TRIED_LEVELS widths a group, and calls `advance` after each group.
    """
    work = deep_copy(module)
    found: dict[Group, dict[int, float]] = {}
    with torch.no_grad():
        reference = [module(*batch) for batch in batches]
        for group, score in scores.items():
            step = levels(group, round_to)
            chosen = {step[round(i * (len(step) - 1) / TRIED_LEVELS)] for i in range(TRIED_LEVELS)} - {group.size}
            found[group] = {group.size: 0.0}
            for level in sorted(chosen, reverse=True):
                zero(work, {group: least_salient(score, group.size - level)})
                moved = [float(divergence(work(*batch), r)) for batch, r in zip(batches, reference, strict=True)]
                worse = max(found[group].values())  # a curve that rises only: noise is no gain
                found[group][level] = max(sum(moved) / len(moved), worse) if math.isfinite(sum(moved)) else math.inf
                work.load_state_dict(module.state_dict())
            advance()
    return found


def least_salient(score: torch.Tensor, count: int) -> list[int]:
    """Returns the `count` units of the lowest scores."""
    return torch.argsort(score, stable=True)[:count].tolist()


def prune(module: nn.Module, gone: Mapping[Group, Iterable[int]]) -> nn.Module:
    """Returns a copy of `module` without the units `gone` of each group."""
    pruned = deep_copy(module)
    remove(pruned, gone)
    return pruned


def changes(before: nn.Module, after: nn.Module, example: Tensors, kept: Mapping[str, str]) -> tuple[LayerChange, ...]:
    """Compares the computing layers of two networks of one structure; `kept` says why a layer kept its width.

    `example` is of any batch; multiply-adds are those of one sample. A layer that went with its branch has no shape.
    """
    batch = example[0].shape[0] if example[0].ndim else 1
    old, new = macs(before, example), macs(after, example)
    return tuple(
        LayerChange(
            name,
            type(before.get_submodule(name)).__name__,
            _shape(before.get_submodule(name)),
            _shape(after.get_submodule(name)),
            old[name] // batch,
            new.get(name, 0) // batch,
            kept.get(name) if name in new else None,
        )
        for name in old
    )


def _shape(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, Absent):
        return ()
    weight = layer.weight_ih_l0 if isinstance(layer, RECURRENT) else layer.weight
    return tuple(weight.shape)


def parameters(module: nn.Module) -> int:
    """Returns how many numbers the parameters of `module` hold."""
    return sum(parameter.numel() for parameter in module.parameters())


def check(ratio: float, method: str, allocation: str, methods: Iterable[str]) -> None:
    """Raises EdgeKitError for a ratio outside (0, 1), or an unknown method or allocation."""
    if not 0 < ratio < 1:
        raise EdgeKitError(
            f"a ratio of {ratio:g} would leave {'nothing' if ratio >= 1 else 'everything'}",
            "give the share of multiply-adds to remove, between 0 and 1: --ratio 0.5",
        )
    for word, known, what in ((method, tuple(methods), "method"), (allocation, ALLOCATIONS, "allocation")):
        if word not in known:
            raise UsageError(f"unknown pruning {what} '{word}'", f"choose one of {', '.join(known)}")
