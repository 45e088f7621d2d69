"""Weight rounding that keeps each layer's output, not each weight: GPTQ, then bias correction.

Nearest rounding minimizes ‖W − Ŵ‖²; what the network feels is E‖(W − Ŵ)x‖² over the inputs x that a layer really
sees. GPTQ (Frantar et al., 2022, algorithm 1) rounds a layer's columns one after the other and spreads each one's
error over the columns to come, by the inverse of the covariance of x. The mean error, E[(W − Ŵ)x], goes into the
bias (Nagel et al., "Data-Free Quantization", 2019, §4.2, with measured instead of assumed means).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Interpreter, Node

from edgekit.beside import beside, share
from edgekit.errors import EdgeKitError
from edgekit.quant.batches import Batches, processes_help
from edgekit.quant.passes import CONV_DEFAULTS, CONVOLUTIONS, add_attribute, aten, attribute, is_attribute, spread

BATCHES = 64  # calibration batches that are looked at
POSITIONS = 32  # image positions taken of each, at least; wide layers get a quarter of their columns
MOST_COLUMNS = 4608  # a 3×3 convolution of 512 channels; the cost grows with the cube
DAMPING = 0.01
BLOCK = 64
SMALLEST = 2**-10  # of a layer's largest scale: what weights below it add is invisible behind int8 activations
ROUNDABLE = {aten.linear.default, aten.conv1d.default, aten.conv2d.default}


@dataclass
class Moments:
    """Streaming moments of a layer's input columns: Σ xxᵀ (groups, n, n) and Σ x (groups, n), over `count` samples."""

    second: torch.Tensor
    first: torch.Tensor
    count: int = 0

    def add(self, columns: torch.Tensor) -> None:
        """Adds columns of shape (groups, samples, n)."""
        self.second.baddbmm_(columns.transpose(1, 2), columns)
        self.first += columns.sum(dim=1)
        self.count += columns.shape[1]


class _Collector(Interpreter):
    """Runs the float graph and gathers the moments of what enters each layer of `own`, some of `layers`."""

    def __init__(self, model: GraphModule, layers: Sequence[Node], own: Collection[Node]) -> None:
        super().__init__(model)
        self.layers, self.own = layers, own
        self.picked: dict[Node, torch.Tensor] = {}
        self.moments: dict[str, Moments] = {}
        self.generator = torch.Generator().manual_seed(0)

    def see(self, batch: tuple[torch.Tensor, ...]) -> None:
        """Adds what `batch` brings into each layer, at the same positions whichever layers are its own."""
        picked = {node: self._some(*_extent(node)) for node in self.layers}
        self.picked = {node: picked[node] for node in self.own}
        self.run(*batch)

    def run_node(self, n: Node) -> object:
        if n in self.picked:
            columns = self._columns(n, self.env[n.args[0]])
            if n.name not in self.moments:
                groups, _, width = columns.shape
                self.moments[n.name] = Moments(torch.zeros(groups, width, width), torch.zeros(groups, width))
            self.moments[n.name].add(columns)
        return super().run_node(n)

    def _some(self, count: int, most: int) -> torch.Tensor:
        return torch.randperm(count, generator=self.generator)[:most] if count > most else torch.arange(count)

    def _columns(self, node: Node, x: torch.Tensor) -> torch.Tensor:
        """Returns the layer's input as columns that its weight, flattened, multiplies: (groups, samples, n)."""
        picked = self.picked[node]
        if node.target == aten.linear.default:
            return x.reshape(-1, x.shape[-1])[picked].unsqueeze(0)
        if node.target == aten.conv1d.default:
            x = x.unsqueeze(2)
        kernel, stride, padding, dilation, groups = geometry(node)
        width = node.meta["val"].shape[-1]
        if any(padding):  # else it would copy
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        rows = (picked // width * stride[0])[:, None, None] + (torch.arange(kernel[0]) * dilation[0])[:, None]
        columns = (picked % width * stride[1])[:, None, None] + torch.arange(kernel[1]) * dilation[1]
        seen = (rows * x.shape[3] + columns).flatten()  # positions × kh × kw
        patches = x.flatten(2).index_select(2, seen)
        batch, channels = x.shape[:2]
        patches = patches.reshape(batch, groups, channels // groups, len(picked), -1)
        return patches.permute(1, 0, 3, 2, 4).reshape(groups, batch * len(picked), -1)


def _extent(node: Node) -> tuple[int, int]:
    """Returns how many positions a layer's input has, and how many of them tell enough."""
    given = node.args[0].meta["val"]
    if node.target == aten.linear.default:
        return given.numel() // given.shape[-1], len(given) * positions(given.shape[-1])
    kernel, *_, groups = geometry(node)
    channels = given.shape[-CONVOLUTIONS[node.target] - 1]
    size = math.prod(node.meta["val"].shape[-CONVOLUTIONS[node.target] :])
    return size, positions(kernel[0] * kernel[1] * channels // groups)


def positions(columns: int) -> int:
    """Returns how many positions of each image tell enough about H of a layer with so many columns."""
    return max(POSITIONS, columns // 4)


def geometry(conv: Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Returns kernel, stride, padding, dilation (each of two) and groups of a conv1d (as 1×k) or conv2d node."""
    args = [*conv.args, *CONV_DEFAULTS[len(conv.args) - 2 :]]
    rank = CONVOLUTIONS[conv.target]
    kernel = tuple(conv.args[1].meta["val"].shape[2:])
    stride, padding, dilation = (spread(args[index], rank) for index in (3, 4, 5))
    if rank == 1:
        kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
    return kernel, stride, padding, dilation, args[6]


def collect(
    model: GraphModule, batches: Iterable[tuple[torch.Tensor, ...]], keep_float: frozenset[str] = frozenset()
) -> dict[Node, Moments]:
    """Runs up to BATCHES calibration batches through the float graph; returns the moments of each roundable layer.

    Layers whose nodes are named in `keep_float` are left out.
    """
    layers = [node for node in model.graph.nodes if roundable(node) and node.name not in keep_float]
    sides = 2 if processes_help() else 1
    here, there = (_Collector(model, layers, layers[side::sides]) for side in (0, 1))
    with torch.inference_mode():
        if sides == 1:
            for batch in Batches(batches, BATCHES):
                here.see(batch)
        else:
            here.moments |= share(Batches(batches, BATCHES), here.see, there.see, lambda: there.moments)
    return {node: here.moments[node.name] for node in layers if node.name in here.moments}


def roundable(node: Node) -> bool:
    """Whether `node` is a linear, conv1d or conv2d layer with a weight of its own and not too many columns."""
    bias = node.args[2] if len(node.args) > 2 else None
    if node.target not in ROUNDABLE or not is_attribute(node.args[1]) or not (bias is None or is_attribute(bias)):
        return False
    if node.target in CONVOLUTIONS and node.meta["val"].ndim != CONVOLUTIONS[node.target] + 2:  # an image of its own
        return False
    return node.args[1].meta["val"][0].numel() <= MOST_COLUMNS


def gptq(weight: torch.Tensor, scale: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Rounds `weight` (groups, rows, n) to multiples of `scale` (groups, rows, 1) within ±127 steps; see the module.

    `second` is H, (groups, n, n), unscaled. Columns whose input is always 0 are rounded to the nearest. Errors reach
    the columns of the same block at once and those beyond it block by block, which is the same in fewer passes. What is
    zero stays zero, whatever error would reach it: a pruned weight is not to come back.
    """
    work = weight.float().clone()
    pruned = weight == 0
    upper = _inverse_factor(second)
    rounded = torch.empty_like(work)
    count = work.shape[2]
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        errors = torch.empty_like(work[:, :, start:stop])
        for column in range(start, stop):
            values = work[:, :, column : column + 1]
            codes = torch.clamp(torch.round(values / scale), -127, 127) * scale
            codes.masked_fill_(pruned[:, :, column : column + 1], 0.0)
            rounded[:, :, column : column + 1] = codes
            error = (values - codes) / upper[:, column : column + 1, column : column + 1]
            work[:, :, column:stop] -= error @ upper[:, column : column + 1, column:stop]
            errors[:, :, column - start : column - start + 1] = error
        work[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return rounded.to(weight.dtype)


def _inverse_factor(second: torch.Tensor) -> torch.Tensor:
    """Returns the upper Cholesky factor of the inverse of the damped H, (groups, n, n)."""
    damping = DAMPING
    while True:
        h = second.float().clone()
        diagonal = torch.diagonal(h, dim1=1, dim2=2)
        diagonal[diagonal <= 0] = 1.0  # an input that never changes: rounding may leave less than nothing of it
        diagonal += damping * diagonal.mean(dim=1, keepdim=True)
        lower, failed = torch.linalg.cholesky_ex(h)
        upper, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not (failed.any() or failed_too.any() or upper.isnan().any()):
            return upper
        damping *= 10  # float32 could not factor it: a rounder H still beats rounding to the nearest


def round_layer(
    weight: torch.Tensor, scale: torch.Tensor, groups: int, moments: Moments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rounded weight (same shape) and the correction to add to the bias (output channels)."""
    shaped = weight.reshape(groups, weight.shape[0] // groups, -1)
    mean = (moments.first / moments.count).unsqueeze(2)
    covariance = moments.second / moments.count - mean @ mean.transpose(1, 2)
    rounded = gptq(shaped, scale.reshape(groups, -1, 1), covariance)
    correction = ((shaped - rounded) @ mean).reshape(-1)
    return rounded.reshape(weight.shape), correction


def round_weights(
    model: GraphModule, batches: Iterable[tuple[torch.Tensor, ...]], keep_float: frozenset[str] = frozenset()
) -> dict[str, torch.Tensor]:
    """Replaces, in place, the weight of each roundable layer by multiples of its scale, and corrects its bias.

    Layers whose nodes are named in `keep_float` stay as they are. Returns each layer's scales (one per output
    channel) by node name: the quantizer must use these very ones.
    """
    found = collect(model, batches, keep_float)
    for node, moments in found.items():
        if not torch.isfinite(moments.second).all():
            raise EdgeKitError(
                f"the inputs of layer '{node.name}' are not finite on the calibration data",
                "look for NaN or infinite values in --data",
            )
    scales = {node.name: channel_scales(attribute(model, node.args[1])) for node in found}
    for node, (rounded, correction) in zip(found, _round_layers(model, found, scales), strict=True):
        bias = node.args[2] if len(node.args) > 2 else None
        with model.graph.inserting_before(node):
            new_weight = add_attribute(model, f"{node.name}_rounded_weight", rounded)
            old = 0 if bias is None else attribute(model, bias)
            new_bias = add_attribute(model, f"{node.name}_corrected_bias", correction + old)
        node.args = (node.args[0], new_weight, new_bias, *node.args[3:])
    model.graph.eliminate_dead_code()
    model.recompile()
    return scales


def _round_layers(
    model: GraphModule, found: dict[Node, Moments], scales: dict[str, torch.Tensor]
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Returns rounded weight and bias correction of each layer; half of them is computed beside this process."""

    def rounded(first: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            round_layer(attribute(model, node.args[1]), scales[node.name], _groups(node), moments)
            for node, moments in islice(found.items(), first, None, 2)
        ]

    with beside(lambda: rounded(1), processes_help()) as others:
        halves = rounded(0), others()
    return [halves[index % 2][index // 2] for index in range(len(found))]


def _groups(node: Node) -> int:
    return 1 if node.target == aten.linear.default else geometry(node)[4]


def channel_scales(weight: torch.Tensor, axis: int | None = 0) -> torch.Tensor:
    """Returns the symmetric int8 scale of each output channel, those of `axis` (None: one for all): max |w| / 127.

    None is below SMALLEST of the largest: in a channel of tiny weights (a pruned one has zeros) a bias of ordinary
    size would overflow int32 at s_in·s_w, and be lost.
    """
    rows = weight.reshape(1, -1) if axis is None else weight.transpose(0, axis).flatten(1)
    scales = rows.abs().amax(dim=1) / 127
    return scales.clamp(min=float(scales.max()) * SMALLEST or 1 / 127)
