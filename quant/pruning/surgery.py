"""Surgery: channels and whole branches taken out of every layer that holds them, or set to zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

ABSENT_WIDTH = "absent_width"
Side = Literal["out", "in"]
Tensors = tuple[torch.Tensor, ...]
CONVOLUTIONS = nn.modules.conv._ConvNd
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
COMPUTING = (CONVOLUTIONS, nn.Linear, *RECURRENT)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
REMOVABLE = (CONVOLUTIONS, nn.Linear, *BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # with their branch


@dataclass(frozen=True)
class Cut:
    """Where a layer holds a group's channels: `units[u]` are the indices of unit `u` on the layer's `side`.

    `norm` is the BatchNorm that the layer's outputs pass first, where there is one.
    """

    layer: str
    side: Side
    units: tuple[tuple[int, ...], ...]
    norm: str | None = None


@dataclass(frozen=True)
class Group:
    """Channels that only go together. A unit is what can be taken out alone; it holds `width` channels of `name`.

    `name` is the first layer that makes the channels; units are numbered from 0 to `size` - 1. Where `branch` names
    layers, the one unit is the whole branch that they make up, beside a shortcut that stays: there are no cuts then.
    """

    name: str
    cuts: tuple[Cut, ...]
    size: int
    width: int
    branch: tuple[str, ...] = ()

    @property
    def makers(self) -> tuple[str, ...]:
        """The layers that give the channels out."""
        return tuple(cut.layer for cut in self.cuts if cut.side == "out")


class Absent(nn.Module):
    """Gives zeros of the shape that a layer gave: what stays of a layer whose branch was taken out.

    The user's own forward still runs; `branches.drop_zero_branches` takes the zeros out of what is exported. The width
    is a buffer too, so that a file of weights tells it: nothing else in one does.
    """

    def __init__(self, layer: Any) -> None:
        """Takes the place of `layer`, one of REMOVABLE."""
        super().__init__()
        self.width = width(layer, "out") if isinstance(layer, (CONVOLUTIONS, nn.Linear)) else None
        if self.width is not None:
            self.register_buffer(ABSENT_WIDTH, torch.tensor(self.width))
        self.windows: list[tuple[bool, int, int]] | None = None
        if isinstance(layer, CONVOLUTIONS):
            self.windows = [_window(layer, dim) for dim in range(len(layer.kernel_size))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the zeros."""
        if self.width is None:
            return torch.zeros_like(x)
        if self.windows is None:
            return x.new_zeros((*x.shape[:-1], self.width))
        rank = len(self.windows)
        sizes = [
            (size - 1) * stride + reach if transposed else (size + reach) // stride + 1
            for size, (transposed, reach, stride) in zip(x.shape[-rank:], self.windows, strict=True)
        ]
        return x.new_zeros((*x.shape[: -rank - 1], self.width, *sizes))


def _window(layer: Any, dim: int) -> tuple[bool, int, int]:
    """Whether a convolution is transposed, what its kernel and padding add to the size along `dim`, and the stride."""
    span, stride = layer.dilation[dim] * (layer.kernel_size[dim] - 1), layer.stride[dim]
    if isinstance(layer.padding, str):
        return False, -1 if layer.padding == "same" else -span - 1, stride
    added = 2 * layer.padding[dim] - span
    return (True, layer.output_padding[dim] + 1 - added, stride) if layer.transposed else (False, added - 1, stride)


def absent(module: nn.Module, paths: Iterable[str]) -> None:
    """Puts an Absent in the place of each of these layers of `module`."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, Absent(module.get_submodule(path)))


def remove(module: nn.Module, gone: Mapping[Group, Iterable[int]]) -> None:
    """Takes units of groups out of every layer of `module`, all at once: positions are those of the whole tensors."""
    gone = {group: tuple(units) for group, units in gone.items()}
    for path, tensors in _positions(module, gone).items():
        layer: Any = module.get_submodule(path)
        for name, dims in tensors.items():
            tensor = getattr(layer, name)
            new = tensor.detach()
            for dim, positions in dims.items():
                stay = torch.tensor(sorted(set(range(tensor.shape[dim])) - positions), dtype=torch.int64)
                new = new.index_select(dim, stay.to(new.device))
            setattr(layer, name, nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new)
        resize(layer)
    absent(module, {path: None for group, units in gone.items() if units for path in group.branch})


def zero(module: nn.Module, gone: Mapping[Group, Iterable[int]]) -> None:
    """Sets units of groups to zero in every layer of `module`, which then computes as if they were taken out."""
    gone = {group: tuple(units) for group, units in gone.items()}
    with torch.no_grad():
        for path in {path for group, units in gone.items() if units for path in group.branch}:
            for parameter in module.get_submodule(path).parameters():
                parameter.zero_()
        for path, tensors in _positions(module, gone).items():
            for name, dims in tensors.items():
                tensor = getattr(module.get_submodule(path), name)
                for dim, positions in dims.items() if not name.startswith("running") else ():
                    tensor.index_fill_(dim, torch.tensor(sorted(positions), device=tensor.device), 0.0)


def kept_outputs(module: nn.Module, gone: Mapping[Group, Iterable[int]]) -> dict[str, list[int]]:
    """Returns the out channels that convolutions and linear layers keep; those that keep all are left out."""
    found: dict[str, list[int]] = {}
    for path, tensors in _positions(module, gone).items():
        layer: Any = module.get_submodule(path)
        if isinstance(layer, (CONVOLUTIONS, nn.Linear)):
            lost = tensors.get("weight", {}).get(1 if getattr(layer, "transposed", False) else 0)
            if lost:
                found[path] = sorted(set(range(width(layer, "out"))) - lost)
    return found


def narrow(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Gives the layers of `module` the shapes of `weights`, by name, where these have fewer channels.

    Layers of which `weights` hold nothing were taken out.
    """
    widths = {name.rpartition(".")[0]: weights[name] for name in weights if name.endswith(f".{ABSENT_WIDTH}")}
    held = {name.rpartition(".")[0] for name in weights} - widths.keys()
    gone = [path for path, layer in module.named_modules() if isinstance(layer, REMOVABLE) and layer.state_dict()]
    absent(module, [path for path in gone if path not in held])
    for path, layer in module.named_modules():
        if isinstance(layer, Absent) and path in widths and widths[path].numel() == 1:
            layer.width = int(widths[path])
    for path, layer in module.named_modules():
        if not isinstance(layer, (*COMPUTING, *BATCH_NORMS, nn.Embedding, nn.PReLU)):
            continue
        for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            given = weights.get(f"{path}.{name}" if path else name)
            if given is None or given.ndim != tensor.ndim or given.shape == tensor.shape:
                continue
            if all(new <= old for new, old in zip(given.shape, tensor.shape, strict=True)):
                new = tensor.new_zeros(given.shape)
                setattr(layer, name, nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new)
        resize(layer)


def _positions(module: nn.Module, gone: Mapping[Group, Iterable[int]]) -> dict[str, dict[str, dict[int, set[int]]]]:
    """Layer → tensor → dimension → the positions that units take up."""
    found: dict[str, dict[str, dict[int, set[int]]]] = {}
    for group, units in gone.items():
        chosen = sorted(set(units))
        for cut in group.cuts if chosen else ():
            layer = module.get_submodule(cut.layer)
            for name, places in _places(layer, cut.side, (i for u in chosen for i in cut.units[u])).items():
                if getattr(layer, name, None) is None:
                    continue
                dims = found.setdefault(cut.layer, {}).setdefault(name, {})
                for dim, positions in places:
                    dims.setdefault(dim, set()).update(positions)
    return found


def _places(layer: Any, side: Side, indices: Iterable[int]) -> dict[str, list[tuple[int, list[int]]]]:
    """Where the tensors of `layer` hold the channels `indices`: tensor → (dimension, positions) pairs."""
    at = sorted(set(indices))
    if isinstance(layer, CONVOLUTIONS):
        out_dim, in_dim = (1, 0) if layer.transposed else (0, 1)
        if side == "out" or depthwise(layer):
            return {"weight": [(out_dim, at)], "bias": [(0, at)]}
        block = layer.in_channels // layer.groups
        return {"weight": [(in_dim, sorted({i % block for i in at}))]}
    if isinstance(layer, nn.Linear):
        return {"weight": [(0, at)], "bias": [(0, at)]} if side == "out" else {"weight": [(1, at)]}
    if isinstance(layer, RECURRENT):
        return _recurrent_places(layer, side, at)
    if isinstance(layer, nn.Embedding):
        return {"weight": [(1, at)]}
    if isinstance(layer, nn.PReLU):
        return {"weight": [(0, at)]} if layer.num_parameters > 1 else {}
    return {key: [(0, at)] for key in ("weight", "bias", "running_mean", "running_var")}


def _recurrent_places(layer: Any, side: Side, at: list[int]) -> dict[str, list[tuple[int, list[int]]]]:
    if side == "in":
        return {name: [(1, at)] for name in layer._flat_weights_names if name.startswith("weight_ih_l0")}
    hidden = layer.hidden_size
    directions = 2 if layer.bidirectional else 1
    gates = layer.weight_ih_l0.shape[0] // hidden
    rows = [gate * hidden + i for gate in range(gates) for i in at]
    places = {}
    for name in layer._flat_weights_names:
        places[name] = [(0, rows)]
        if name.startswith("weight_hh"):
            places[name].append((1, at))
        elif name.startswith("weight_ih") and "_l0" not in name:
            places[name].append((1, [d * hidden + i for d in range(directions) for i in at]))
    return places


def width(layer: Any, side: Side) -> int:
    """How many channels `layer` has on a side."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels if side == "out" else layer.in_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features if side == "out" else layer.in_features
    if isinstance(layer, RECURRENT):
        return layer.hidden_size * (2 if layer.bidirectional else 1) if side == "out" else layer.input_size
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim
    return layer.num_parameters if isinstance(layer, nn.PReLU) else layer.num_features


def depthwise(layer: Any) -> bool:
    """Whether a convolution gives each channel a filter of its own."""
    return layer.groups == layer.in_channels and layer.groups > 1


def resize(layer: Any) -> None:
    """Makes the numbers that `layer` keeps of its own shape those of its tensors."""
    if isinstance(layer, CONVOLUTIONS):
        each_its_own = depthwise(layer)
        out_dim, in_dim = (1, 0) if layer.transposed else (0, 1)
        layer.out_channels = layer.weight.shape[out_dim] * (layer.groups if layer.transposed else 1)
        if each_its_own:
            layer.groups = layer.in_channels = layer.out_channels
        else:
            layer.in_channels = layer.weight.shape[in_dim] * (1 if layer.transposed else layer.groups)
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, RECURRENT):
        layer.hidden_size, layer.input_size = layer.weight_hh_l0.shape[1], layer.weight_ih_l0.shape[1]
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = layer.weight.shape[1]
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = layer.weight.numel()
    elif isinstance(layer, BATCH_NORMS):
        tensors = [t for t in (layer.weight, layer.running_mean) if t is not None]
        layer.num_features = len(tensors[0]) if tensors else layer.num_features
