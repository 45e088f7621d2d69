"""Weight rounding that keeps each layer's output, not each weight: GPTQ, then bias correction.

Nearest rounding minimizes ‖W − Ŵ‖²; what the network feels is E‖(W − Ŵ)x‖² over the inputs x that a layer really
sees. GPTQ (Frantar et al., 2022, algorithm 1) rounds a layer's columns one after the other and spreads each one's
error over the columns to come, by the inverse of the covariance of x. The mean error, E[(W − Ŵ)x], goes into the
bias (Nagel et al., "Data-Free Quantization", 2019, §4.2, with measured instead of assumed means).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Interpreter, Node

from edgekit.errors import EdgeKitError
from edgekit.quant.graph.fx import add_attribute, attribute, drop_unread, is_attribute
from edgekit.quant.graph.passes import CONV_DEFAULTS, CONVOLUTIONS, aten, spread
from edgekit.quant.ptq.batches import Batches, processes_help
from edgekit.util.forking import share

BATCHES = 64  # calibration batches that are looked at
POSITIONS = 32  # image positions taken of each, at least; wide layers get a quarter of their columns
MOST_COLUMNS = 4608  # a 3×3 convolution of 512 channels; the cost grows with the cube
MOST_BYTES = 320 << 20  # of the moments that are gathered in one run through the data
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


class Collector(Interpreter):
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
        """Takes in what enters the layers, and runs the node."""
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


def roundable(node: Node) -> bool:
    """Whether `node` is a linear, conv1d or conv2d layer with a weight of its own and not too many columns."""
    bias = node.args[2] if len(node.args) > 2 else None
    if node.target not in ROUNDABLE or not is_attribute(node.args[1]) or not (bias is None or is_attribute(bias)):
        return False
    return _columns(node) <= MOST_COLUMNS


def gptq(weight: torch.Tensor, scale: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Returns the codes (int8, ±127) of which `scale` (groups, rows, 1) makes `weight` (groups, rows, n); see above.

    `second` is H, (groups, n, n), unscaled. Columns whose input is always 0 are rounded to the nearest. Errors reach
    the columns of the same block at once and those beyond it block by block, which is the same in fewer passes. What is
    zero stays zero, whatever error would reach it: a pruned weight is not to come back.
    """
    work = weight.float().clone()
    pruned = weight == 0
    upper = _inverse_factor(second)
    codes = torch.empty_like(work, dtype=torch.int8)
    count = work.shape[2]
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        errors = torch.empty_like(work[:, :, start:stop])
        for column in range(start, stop):
            values = work[:, :, column : column + 1]
            steps = torch.clamp(torch.round(values / scale), -127, 127)
            steps.masked_fill_(pruned[:, :, column : column + 1], 0.0)
            codes[:, :, column : column + 1] = steps
            error = (values - steps * scale) / upper[:, column : column + 1, column : column + 1]
            work[:, :, column:stop] -= error @ upper[:, column : column + 1, column:stop]
            errors[:, :, column - start : column - start + 1] = error
        work[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return codes


def _inverse_factor(second: torch.Tensor) -> torch.Tensor:
    """Returns the upper Cholesky factor of the inverse of the damped H, (groups, n, n)."""
    damping = DAMPING
    while True:
        h, failed = torch.linalg.cholesky_ex(_damped(second, damping))  # matrices of wide layers are large: one lives
        h = torch.cholesky_inverse(h)
        upper, failed_too = torch.linalg.cholesky_ex(h, upper=True)
        if not (failed.any() or failed_too.any() or upper.isnan().any()):
            return upper
        damping *= 10  # float32 could not factor it: a rounder H still beats rounding to the nearest


def _damped(second: torch.Tensor, damping: float) -> torch.Tensor:
    h = second.float().clone()
    diagonal = torch.diagonal(h, dim1=1, dim2=2)
    diagonal[diagonal <= 0] = 1.0  # an input that never changes: rounding may leave less than nothing of it
    diagonal += damping * diagonal.mean(dim=1, keepdim=True)
    return h


def round_layer(
    weight: torch.Tensor, scale: torch.Tensor, groups: int, moments: Moments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weight's codes (int8, same shape) and the correction to add to the bias (output channels).

    `moments` are used up.
    """
    shaped, steps = weight.reshape(groups, weight.shape[0] // groups, -1), scale.reshape(groups, -1, 1)
    mean = (moments.first / moments.count).unsqueeze(2)
    covariance = moments.second.div_(moments.count).sub_(mean @ mean.transpose(1, 2))
    codes = gptq(shaped, steps, covariance)
    correction = ((shaped - codes * steps) @ mean).reshape(-1)
    return codes.reshape(weight.shape), correction


def round_weights(
    model: GraphModule, batches: Iterable[tuple[torch.Tensor, ...]], keep_float: frozenset[str] = frozenset()
) -> dict[str, torch.Tensor]:
    """Replaces, in place, the weight of each roundable layer by multiples of its scale, and corrects its bias.

    Looks at up to BATCHES batches. Layers whose nodes are named in `keep_float` stay as they are. Returns each layer's
    scales (one per output channel) by node name: the quantizer must use these very ones. Raises EdgeKitError for
    inputs of a layer that are not finite.
    """
    layers = [node for node in model.graph.nodes if roundable(node) and node.name not in keep_float]
    scales = {node.name: channel_scales(attribute(model, node.args[1])) for node in layers}
    rounded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for part in _parts(layers):
        rounded |= _rounded(model, layers, part, scales, Batches(batches, BATCHES))
    for node in layers:
        if node.name not in rounded:  # no batch came
            del scales[node.name]
            continue
        codes, correction = rounded.pop(node.name)
        weight = attribute(model, node.args[1])
        steps = scales[node.name].reshape(-1, *[1] * (weight.ndim - 1))
        bias = node.args[2] if len(node.args) > 2 else None
        with model.graph.inserting_before(node):
            new_weight = add_attribute(model, f"{node.name}_rounded_weight", (codes * steps).to(weight.dtype))
            old = 0 if bias is None else attribute(model, bias)
            new_bias = add_attribute(model, f"{node.name}_corrected_bias", correction + old)
        node.args = (node.args[0], new_weight, new_bias, *node.args[3:])
    model.graph.eliminate_dead_code()
    drop_unread(model)
    model.recompile()
    return scales


def _parts(layers: Sequence[Node]) -> list[list[Node]]:
    """Cuts layers, the widest last, into parts whose moments take at most MOST_BYTES together, or one layer."""
    parts: list[list[Node]] = []
    size = MOST_BYTES
    for node in sorted(layers, key=_columns):
        more = 4 * _groups(node) * _columns(node) ** 2
        if size + more > MOST_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(node)
        size += more
    return parts


def _columns(node: Node) -> int:
    return node.args[1].meta["val"][0].numel()


def _rounded(
    model: GraphModule,
    layers: Sequence[Node],
    part: Sequence[Node],
    scales: Mapping[str, torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, ...]],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns the weight's codes and the bias correction of each layer of `part`, by node name.

    Half of them are a copy's of this process, where their moments, of wide layers larger than all weights, stay.
    """

    def finish(seen: Collector) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {node.name: _round(model, node, scales, seen) for node in part if node.name in seen.moments}

    sides = 2 if processes_help() else 1
    here, there = (Collector(model, layers, part[side::sides]) for side in (0, 1))
    with torch.inference_mode():
        if sides == 1:
            for batch in batches:
                here.see(batch)
            return finish(here)
        own: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        return share(batches, here.see, there.see, lambda: finish(there), lambda: own.update(finish(here))) | own


def _round(
    model: GraphModule, node: Node, scales: Mapping[str, torch.Tensor], seen: Collector
) -> tuple[torch.Tensor, torch.Tensor]:
    moments = seen.moments.pop(node.name)
    if not torch.isfinite(moments.second).all():
        raise EdgeKitError(
            f"the inputs of layer '{node.name}' are not finite on the calibration data",
            "look for NaN or infinite values in --data",
        )
    return round_layer(attribute(model, node.args[1]), scales[node.name], _groups(node), moments)


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
