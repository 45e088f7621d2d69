"""Masks: single weights set to zero by torchao's sparsifier, and kept at zero while a network is trained.

A weight counts by its size; with samples by its size times the norm of what it is multiplied with
(https://arxiv.org/abs/2306.11695). Each output channel compares with its own weights: a BatchNorm behind it undoes any
scale of its own. Shapes stay as they are, so a masked file is smaller only once it is compressed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchao.prototype.sparsity.sparsifier.weight_norm_sparsifier import WeightNormSparsifier
from torchao.sparsity.utils import PerChannelNormObserver

from edgekit.errors import EdgeKitError
from edgekit.quant.pruning.surgery import COMPUTING, CONVOLUTIONS, RECURRENT, Tensors, depthwise

SMALL = 0.1  # of the weights of an average layer: smaller ones stay dense, as there is nothing to gain
METHODS = ("l1", "wanda")
HELP = "give a share of zeros or N of M that stay: --sparsity 0.8, --sparsity 2:4"


@dataclass(frozen=True)
class Pattern:
    """Which weights go: a share of all `block`s (outputs × inputs), or all but `stay` of each `block` of a row."""

    level: float
    block: tuple[int, int] = (1, 1)
    stay: int | None = None

    def __str__(self) -> str:
        if self.stay is not None:
            return f"{self.stay}:{self.block[1]}"
        return (
            f"{self.level:g}" if self.block == (1, 1) else f"{self.level:g} in {self.block[0]}x{self.block[1]} blocks"
        )

    def at(self, part: float) -> Pattern:
        """The pattern on the way to this one: with `part` of its share of zeros. N of M has no such steps."""
        return self if self.stay is not None else Pattern(self.level * part, self.block)


@dataclass(frozen=True)
class MaskedLayer:
    """One layer: the shape of its first weight, how many weights it has, how many are masked, and why none are."""

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    kept: str | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {**self.__dict__, "shape": list(self.shape)}


def parse(text: str | float, block: str | None = None) -> Pattern:
    """Reads `0.8` or `2:4`, and a block such as `4x1` (outputs × inputs); raises EdgeKitError for anything else."""
    found = re.fullmatch(r"(\d+):(\d+)", str(text).strip())
    if found:
        stay, of = int(found[1]), int(found[2])
        if not 0 < stay < of <= 64:
            raise EdgeKitError(f"a sparsity of {text} leaves {'all' if stay >= of else 'nothing'} of a block", HELP)
        if block is not None:
            raise EdgeKitError(f"{text} is a pattern with a block of its own", "leave out --block")
        return Pattern(1 - stay / of, (1, of), stay)
    try:
        level = float(text)
    except ValueError:
        raise EdgeKitError(f"cannot read the sparsity '{text}'", HELP) from None
    if not 0 < level < 1:
        raise EdgeKitError(f"a sparsity of {level:g} would leave {'nothing' if level >= 1 else 'everything'}", HELP)
    size = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", block.strip()) if block is not None else None
    if block is not None and size is None:
        raise EdgeKitError(f"cannot read the block '{block}'", "give outputs x inputs: --block 4x1")
    return Pattern(level, (int(size[1]), int(size[2]))) if size else Pattern(level)


def find(
    module: nn.Module, pattern: Pattern, method: str, batches: Iterable[Tensors] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns a mask for each weight by its name (boolean, False goes), and why layers stay dense, by layer.

    `wanda` reads `batches`. Depthwise convolutions, layers of few weights, and layers whose inputs `pattern` does not
    divide stay dense. Raises EdgeKitError where no layer is left.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, COMPUTING)}
    kept = {name: reason for name, reason in _dense(layers, pattern) if reason}
    chosen = {name: layer for name, layer in layers.items() if name not in kept}
    if not chosen:
        reasons = "; ".join(sorted(set(kept.values()))) or "it has no convolution, linear or recurrent layer"
        raise EdgeKitError(
            f"no layer of this network can be masked {pattern}: {reasons}",
            "give another --sparsity, or remove whole channels with --ratio",
        )
    norms = _norms(module, chosen, batches) if method == "wanda" else {}
    masks = {}
    for name, layer in chosen.items():
        for key in _weights(layer):
            weight = getattr(layer, key).detach()
            rows = _rows(layer, weight).abs()
            if name in norms and not key.startswith("weight_hh") and not re.fullmatch(r"weight_ih_l[1-9].*", key):
                rows = rows * norms[name].repeat(rows.shape[1] // len(norms[name]))
            rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-30)
            masks[_path(name, key)] = _as_weight(layer, _mask(rows, pattern), weight)
    return masks, kept


def _dense(layers: Mapping[str, Any], pattern: Pattern) -> Iterator[tuple[str, str | None]]:
    counts = {name: sum(getattr(layer, key).numel() for key in _weights(layer)) for name, layer in layers.items()}
    mean = sum(counts.values()) / max(len(counts), 1)
    for name, layer in layers.items():
        wide = _width(layer)
        if isinstance(layer, CONVOLUTIONS) and depthwise(layer):
            yield name, "a depthwise convolution has few weights, and needs each"
        elif isinstance(layer, CONVOLUTIONS) and layer.transposed and layer.groups > 1:
            yield name, "a transposed convolution in groups mixes inputs and outputs"
        elif pattern.stay is not None and any(size % pattern.block[1] for size in wide):
            yield name, f"its {min(wide)} inputs are no multiple of {pattern.block[1]}"
        elif counts[name] < SMALL * mean:
            yield name, "it has few weights: there is nothing to gain"
        else:
            yield name, None


def _path(layer: str, key: str) -> str:
    return f"{layer}.{key}" if layer else key


def _width(layer: Any) -> tuple[int, ...]:
    """Inputs that a block runs along."""
    if isinstance(layer, RECURRENT):
        return (layer.input_size, layer.hidden_size)
    return (layer.in_channels // layer.groups if isinstance(layer, CONVOLUTIONS) else layer.in_features,)


def _weights(layer: Any) -> list[str]:
    if isinstance(layer, RECURRENT):
        return [name for name in layer._flat_weights_names if name.startswith("weight")]
    return ["weight"]


def _rows(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """The weight as (outputs, inputs): of convolutions the input channels run last, as edge runtimes store them."""
    if not isinstance(layer, CONVOLUTIONS):
        return weight
    ours = weight.transpose(0, 1) if layer.transposed else weight
    return ours.movedim(1, -1).flatten(1)


def _as_weight(layer: Any, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What `_rows` did, undone on a mask."""
    if not isinstance(layer, CONVOLUTIONS):
        return mask
    ours = weight.transpose(0, 1) if layer.transposed else weight
    shaped = mask.reshape(ours.shape[0], *ours.shape[2:], ours.shape[1]).movedim(-1, 1)
    return (shaped.transpose(0, 1) if layer.transposed else shaped).contiguous()


def _mask(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Lets torchao choose on a matrix of scores (outputs, inputs): True stays."""
    holder = nn.Module()
    holder.register_parameter("weight", nn.Parameter(scores, requires_grad=False))
    gone = pattern.block[1] - pattern.stay if pattern.stay is not None else None
    level = 1.0 if pattern.stay is not None else pattern.level
    sparsifier = WeightNormSparsifier(level, pattern.block, gone, norm=1)
    sparsifier.prepare(holder, [{"tensor_fqn": "weight"}])
    sparsifier.step()
    chosen: Any = holder.parametrizations
    return chosen.weight[0].mask.bool()


def _norms(module: nn.Module, layers: Mapping[str, Any], batches: Iterable[Tensors]) -> dict[str, torch.Tensor]:
    """The norm of each input channel of each layer over all batches; the layers that are not run are left out."""
    observers = {name: PerChannelNormObserver() for name in layers}
    hooks = []
    for name, layer in layers.items():
        axis = 1 if isinstance(layer, CONVOLUTIONS) else -1
        hooks.append(
            layer.register_forward_pre_hook(
                lambda _, given, observer=observers[name], axis=axis: _observe(observer, given[0], axis)
            )
        )
    try:
        with torch.no_grad():
            for inputs in batches:
                module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, observer in observers.items():
        if observer.norm.numel():
            width = observer.norm.numel() // getattr(layers[name], "groups", 1)
            found[name] = observer.norm.sqrt().reshape(-1, width).mean(0)  # of groups: each reads its own channels
    return found


def _observe(observer: Any, value: torch.Tensor, axis: int) -> None:
    observer(value.detach().movedim(axis, -1).flatten(0, -2))


def apply(module: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Sets the masked weights to zero, in place."""
    with torch.no_grad():
        for name, mask in masks.items():
            weight = module.get_parameter(name)
            weight.masked_fill_(~mask.to(weight.device), 0.0)


class _Hold:
    """Sets a layer's masked weights to zero before it runs, whatever an optimizer made of them."""

    def __init__(self, masks: Mapping[str, torch.Tensor]) -> None:
        self.masks = dict(masks)

    def __call__(self, layer: nn.Module, given: object) -> None:
        apply(layer, self.masks)


def hold(module: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Keeps the masked weights of `module`, and of copies of it, at zero whenever it runs, until `release`."""
    apply(module, masks)
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for name, mask in masks.items():
        layer, _, key = name.rpartition(".")
        by_layer.setdefault(layer, {})[key] = mask
    for layer, own in by_layer.items():
        module.get_submodule(layer).register_forward_pre_hook(_Hold(own))


def release(module: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Ends what `hold` began; the masked weights are zero."""
    for layer in module.modules():
        for key, hook in list(layer._forward_pre_hooks.items()):
            if isinstance(hook, _Hold):
                del layer._forward_pre_hooks[key]
    apply(module, masks)


def describe(module: nn.Module, masks: Mapping[str, torch.Tensor], kept: Mapping[str, str]) -> tuple[MaskedLayer, ...]:
    """Returns what became of each convolution, linear and recurrent layer."""
    found = []
    for name, layer in module.named_modules():
        if isinstance(layer, COMPUTING):
            keys = _weights(layer)
            own = [masks[_path(name, key)] for key in keys if _path(name, key) in masks]
            found.append(
                MaskedLayer(
                    name,
                    type(layer).__name__,
                    tuple(getattr(layer, keys[0]).shape),
                    sum(getattr(layer, key).numel() for key in keys),
                    sum(int((~mask).sum()) for mask in own),
                    kept.get(name),
                )
            )
    return tuple(found)


def shares(steps: int) -> Sequence[float]:
    """Returns the part of the final sparsity after each step: 1 − (1 − i/n)³, which is fast first and slow at the end.

    Source: Zhu and Gupta, "To prune, or not to prune", 2017, equation 1 (https://arxiv.org/abs/1710.01878).
    """
    return [1 - (1 - i / steps) ** 3 for i in range(1, steps + 1)]
