"""Ops of static shapes as the plain ops that every runtime has: pools of any rank and size, folds, crops, resizes.

torch's exporters and ExecuTorch have no kernel for some of them, or compute them otherwise; quantizer and delegates
know the plain ones.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from edgekit.quant.graph.fx import add_attribute, attribute, calls, filled_arguments, insert, is_attribute

aten = torch.ops.aten

VIEWS = (aten.view.default, aten.as_strided.default)
PASSING = (
    operator.getitem,
    aten.transpose.int,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
)

Emit = Callable[..., Node]
MAX, AVERAGE = aten.max_pool2d.default, aten.avg_pool2d.default
CROPPED_MODES = ("constant", "reflect", "replicate", "circular")


def rare_ops_to_plain(model: GraphModule) -> None:
    """Puts plain ops in the place of those in RULES."""
    emit, constant = partial(insert, model), partial(add_attribute, model)
    for node in [n for n in calls(model) if n.target in RULES]:
        with model.graph.inserting_before(node):
            result = RULES[node.target](emit, constant, node, *filled_arguments(node))
            if result is None:
                continue
            if _is_viewed(node):
                result = _laid_out(emit, result, _first_value(node))
        values = [user for user in node.users if user.target is operator.getitem] or [node]
        for value in values:
            value.replace_all_uses_with(result)
            if value is not node:
                model.graph.erase_node(value)
        model.graph.erase_node(node)


def _shape(node: Node) -> list[int]:
    return list(node.meta["val"].shape)


def _reads_values_alone(node: Node) -> bool:
    """Whether of a pair (values, indices) only the values are read."""
    return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


def _wide(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _is_viewed(node: Node) -> bool:
    """Whether a view relies on the strides of `node`, or of a part of it or an order of its dimensions."""
    return any(user.target in VIEWS or (user.target in PASSING and _is_viewed(user)) for user in node.users)


def _laid_out(emit: Emit, x: Node, original: torch.Tensor) -> Node:
    """Gives `x` the strides of what it stands for: views that read it rely on them."""
    if x.meta["val"].stride() == original.stride():
        return x
    order = sorted(range(original.ndim), key=lambda dim: -original.stride(dim))
    if order == sorted(order):
        return _contiguous(emit, x)
    moved = _contiguous(emit, emit(aten.permute.default, x, order))
    return emit(aten.permute.default, moved, [order.index(dim) for dim in range(len(order))])


def _contiguous(emit: Emit, x: Node) -> Node:
    if x.meta["val"].is_contiguous():
        return x
    return emit(aten.clone.default, x, memory_format=torch.contiguous_format)


def _reshaped(emit: Emit, x: Node, shape: list[int]) -> Node:
    return x if _shape(x) == shape else emit(aten.view.default, _contiguous(emit, x), shape)


def _as_image(emit: Emit, x: Node, rank: int) -> Node:
    """Views the input of a pool over `rank` dimensions as (N, C, H, W), the third from the end among the channels."""
    shape = _shape(x)
    lead, space = shape[: len(shape) - rank], shape[len(shape) - rank :]
    batch, channels = lead if len(lead) == 2 else (1, *lead)
    image = {1: [batch, channels, 1, *space], 2: [batch, channels, *space], 3: [batch, channels * space[0], *space[1:]]}
    return _reshaped(emit, x, image[rank])


def _each_axis(emit: Emit, x: Node, rank: int, result: Node, pool: Callable[[Node, int, int], Node]) -> Node:
    """Pools over each dimension: `pool` takes an image, which of its axes, and which dimension that stands for."""
    shape = _shape(x)
    y = _as_image(emit, x, rank)
    for axis, dim in {1: [(3, 0)], 2: [(2, 0), (3, 1)], 3: [(2, 1), (3, 2)]}[rank]:
        y = pool(y, axis, dim)
    if rank == 3:
        batch, _, height, width = _shape(y)
        y = pool(_reshaped(emit, y, [batch, -1, shape[-3], height * width]), 2, 0)
    return _reshaped(emit, y, list(_first_value(result).shape))


def _first_value(node: Node) -> torch.Tensor:
    value = node.meta["val"]
    return value[0] if isinstance(value, (tuple, list)) else value


def _along(axis: int, length: int, other: int = 1) -> list[int]:
    return [length, other] if axis == 2 else [other, length]


def adaptive_pool(rank: int, kind: Any) -> Callable[..., Node | None]:
    """Spells an adaptive pool as one with windows, or where they are uneven as one per window.

    Window i of n over a dimension of size s is floor(i·s/n) to ceil((i+1)·s/n).
    """

    def pool(emit: Emit, y: Node, axis: int, count: int) -> Node:
        size = _shape(y)[axis]
        windows = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
        lengths = {end - start for start, end in windows}
        steps = {b[0] - a[0] for a, b in itertools.pairwise(windows)} or lengths
        if lengths == steps == {1}:
            return y
        if len(lengths) == len(steps) == 1 and 0 not in steps:
            return emit(kind, y, _along(axis, *lengths), _along(axis, *steps))
        parts = []
        for start, end in windows:
            part = emit(aten.slice.Tensor, y, axis, start, end)
            length = _along(axis, end - start)
            parts.append(part if end - start == 1 else emit(kind, part, length, length))
        return emit(aten.cat.default, parts, axis)

    def rule(emit: Emit, constant: Any, node: Node, x: Node, size: Sequence[int]) -> Node | None:
        if kind is MAX and not _reads_values_alone(node):
            return None
        before, after = _shape(x)[-rank:], list(_first_value(node).shape)[-rank:]
        if kind is AVERAGE and set(after) == {1}:
            if rank == 2 and x.meta["val"].ndim == 4:
                return None  # see `global_pools_to_mean`
            lead = _shape(x)[:-rank]
            image = _reshaped(emit, x, [*([1] if len(lead) == 1 else []), *lead, 1, math.prod(before)])
            return _reshaped(emit, emit(aten.mean.dim, image, [2, 3], True), _shape(node))
        if rank == 2 and not any(b % a for b, a in zip(before, after, strict=True)):
            window = [b // a for b, a in zip(before, after, strict=True)]
            pooled = emit(kind, _as_image(emit, x, 2), window, window)
            return _reshaped(emit, pooled, list(_first_value(node).shape))
        return _each_axis(emit, x, rank, node, lambda y, axis, dim: pool(emit, y, axis, after[dim]))

    return rule


def max_pool(rank: int) -> Callable[..., Node | None]:
    """Spells a pool of one or three dimensions, or of an image without a batch, as pools of images."""

    def rule(
        emit: Emit,
        constant: Any,
        node: Node,
        x: Node,
        kernel: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        ceil_mode: bool,
    ) -> Node | None:
        kernel, stride = _wide(kernel, rank), _wide(stride or kernel, rank)
        padding, dilation = _wide(padding, rank), _wide(dilation, rank)
        if rank == 2:
            if x.meta["val"].ndim == 4:
                return None
            pooled = emit(MAX, _as_image(emit, x, 2), kernel, stride, padding, dilation, ceil_mode)
            return _reshaped(emit, pooled, _shape(node))

        def pool(y: Node, axis: int, dim: int) -> Node:
            if (kernel[dim], stride[dim], padding[dim]) == (1, 1, 0):
                return y
            edges = _along(axis, padding[dim], 0), _along(axis, dilation[dim])
            return emit(MAX, y, _along(axis, kernel[dim]), _along(axis, stride[dim]), *edges, ceil_mode)

        return _each_axis(emit, x, rank, node, pool)

    return rule


def avg_pool(rank: int) -> Callable[..., Node | None]:
    """Spells a pool of one or three dimensions, or with a divisor of its own, as pools of images."""

    def rule(
        emit: Emit,
        constant: Any,
        node: Node,
        x: Node,
        kernel: Any,
        stride: Any,
        padding: Any,
        ceil_mode: bool,
        include_pad: bool,
        divisor: int | None = None,
    ) -> Node | None:
        kernel, stride = _wide(kernel, rank), _wide(stride or kernel, rank)
        padding = _wide(padding, rank)
        if rank == 2 and divisor is None:
            if x.meta["val"].ndim == 4:
                return None
            mean = emit(AVERAGE, _as_image(emit, x, 2), kernel, stride, padding, ceil_mode, include_pad)
            return _reshaped(emit, mean, _shape(node))
        if divisor is not None:
            # The sum of a window: zeros around the image let each have as many terms as the kernel.
            size, after = _shape(x)[-rank:], _shape(node)[-rank:]
            amounts = []
            for dim in reversed(range(rank)):
                reach = (after[dim] - 1) * stride[dim] + kernel[dim]
                amounts += [padding[dim], max(reach - size[dim] - padding[dim], 0)]
            if any(amounts):
                x = emit(aten.pad.default, x, amounts)
            padding, ceil_mode, include_pad = [0] * rank, False, True

        def pool(y: Node, axis: int, dim: int) -> Node:
            if (kernel[dim], stride[dim], padding[dim]) == (1, 1, 0):
                return y
            window = _along(axis, kernel[dim]), _along(axis, stride[dim]), _along(axis, padding[dim], 0)
            return emit(AVERAGE, y, *window, ceil_mode, include_pad)

        if rank == 2:
            image = _as_image(emit, x, 2)
            mean = emit(AVERAGE, image, kernel, stride)
            mean = _reshaped(emit, mean, _shape(node))
        else:
            mean = _each_axis(emit, x, rank, node, pool)
        factor = 1.0 if divisor is None else math.prod(kernel) / divisor
        return mean if factor == 1 else emit(aten.mul.Tensor, mean, factor)

    return rule


def extreme(target: Any) -> Callable[..., Node | None]:
    """Spells max(x, dim) as amax where only the values are read; so too with min."""

    def rule(emit: Emit, constant: Any, node: Node, x: Node, dim: int, keepdim: bool) -> Node | None:
        if not _reads_values_alone(node) or not node.users or x.meta["val"].ndim == 0:
            return None
        if target == aten.amax.default and (pooled := amax(emit, constant, node, x, [dim], keepdim)) is not None:
            return pooled
        return emit(target, x, [dim], keepdim)

    return rule


def amax(emit: Emit, constant: Any, node: Node, x: Node, dims: Sequence[int], keepdim: bool) -> Node | None:
    """Spells the largest value over rows, columns or pixels of a float image as a max pool, which stays in int8."""
    value = x.meta["val"]
    if value.ndim != 4 or value.dtype != torch.float32:
        return None
    over = {dim % 4 for dim in dims}
    if not over or not over <= {2, 3}:
        return None
    window = [value.shape[dim] if dim in over else 1 for dim in (2, 3)]
    if window == [1, 1]:
        return None
    pooled = emit(MAX, x, window, window)
    return _reshaped(emit, pooled, list(_first_value(node).shape))


def fold(
    emit: Emit,
    constant: Any,
    node: Node,
    x: Node,
    size: Sequence[int],
    kernel: Any,
    dilation: Any,
    padding: Any,
    stride: Any,
) -> Node | None:
    """Spells a sum of overlapping blocks as a transposed convolution by ones, and blocks side by side as a move."""
    kernel, dilation, padding, stride = (_wide(value, 2) for value in (kernel, dilation, padding, stride))
    shape, area = _shape(x), math.prod(kernel)
    batch = shape[0] if len(shape) == 3 else 1
    channels = shape[-2] // area
    spans = [s + 2 * p - d * (k - 1) - 1 for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    blocks = [span // step + 1 for span, step in zip(spans, stride, strict=True)]
    covered = [b * k for b, k in zip(blocks, kernel, strict=True)]
    if kernel == stride and dilation == [1, 1] and not any(padding) and covered == list(size):
        y = _reshaped(emit, x, [batch * channels, *kernel, *blocks])
        y = emit(aten.permute.default, y, [0, 3, 1, 4, 2])
    else:
        one_hot = torch.eye(area).reshape(area, 1, *kernel).repeat(channels, 1, 1, 1)
        weight = constant(f"{node.name}_ones", one_hot.to(x.meta["val"].dtype))
        y = _reshaped(emit, x, [batch, channels * area, *blocks])
        extra = [span % step for span, step in zip(spans, stride, strict=True)]
        y = emit(aten.conv_transpose2d.input, y, weight, None, stride, padding, extra, channels, dilation)
    return _reshaped(emit, y, _shape(node))


def crop(
    emit: Emit, constant: Any, node: Node, x: Node, amounts: Sequence[int], mode: str, value: float | None
) -> Node | None:
    """Spells negative amounts of a pad as slices."""
    if not amounts or min(amounts) >= 0 or mode not in CROPPED_MODES:
        return None
    shape, positive = _shape(x), [max(amount, 0) for amount in amounts]
    grown = [0] * len(amounts)
    if any(positive) and mode != "constant":  # they continue what is there, also what is cropped
        x, grown = emit(aten.pad.default, x, positive, mode, value), positive
    for index in range(0, len(amounts), 2):
        dim = len(shape) - 1 - index // 2  # torch lists the last dimension first
        before, after = (max(-amount, 0) for amount in amounts[index : index + 2])
        if before or after:
            x = emit(aten.slice.Tensor, x, dim, before, shape[dim] + sum(grown[index : index + 2]) - after)
    return emit(aten.pad.default, x, positive, mode, value) if any(positive) and mode == "constant" else x


def late_outputs(rank: int) -> Callable[..., Node | None]:
    """Spells output padding that reaches the stride, which delegates refuse, as zeros behind the input."""

    def rule(
        emit: Emit,
        constant: Any,
        node: Node,
        x: Node,
        weight: Node,
        bias: Node | None,
        stride: Any,
        padding: Any,
        extra: Any,
        groups: int,
        dilation: Any,
    ) -> Node | None:
        stride, extra = _wide(stride, rank), _wide(extra, rank)
        whole, rest = zip(*(divmod(e, s) for e, s in zip(extra, stride, strict=True)), strict=True)
        if not any(whole):
            return None
        padded = emit(aten.pad.default, x, [amount for steps in reversed(whole) for amount in (0, steps)])
        return emit(node.target, padded, weight, bias, stride, padding, [*rest], groups, dilation)

    return rule


def antialiased(target: Any) -> Callable[..., Node | None]:
    """Spells a resize that averages what it leaves out as a product for each axis: by what it makes of unit vectors."""

    def matrix(size: int, wanted: int, align: bool, scale: float | None) -> torch.Tensor:
        units = torch.eye(size)[None, None]
        return target(units, *((None, align, [scale, 1.0]) if scale else ([wanted, size], align, None)))[0, 0]

    def rule(
        emit: Emit, constant: Any, node: Node, x: Node, size: Any, align: bool, scales: Sequence[float] | None
    ) -> Node | None:
        (height, width), (new_height, new_width) = _shape(x)[-2:], _shape(node)[-2:]
        tall, wide = scales if scales is not None else (None, None)
        dtype = x.meta["val"].dtype
        across = constant(f"{node.name}_columns", matrix(width, new_width, align, wide).T.contiguous().to(dtype))
        down = constant(f"{node.name}_rows", matrix(height, new_height, align, tall).T.contiguous().to(dtype))
        y = emit(aten.matmul.default, x, across)
        y = emit(aten.matmul.default, _contiguous(emit, emit(aten.transpose.int, y, 2, 3)), down)
        return emit(aten.transpose.int, y, 2, 3)

    return rule


def rrelu(
    emit: Emit, constant: Any, node: Node, x: Node, lower: float, upper: float, training: bool, *_: Any
) -> Node | None:
    """Spells a randomized leaky ReLU, whose slope is the mean of its bounds once trained, as a leaky ReLU."""
    return None if training else emit(aten.leaky_relu.default, x, (lower + upper) / 2)


def rrelu_with_noise(emit: Emit, constant: Any, node: Node, x: Node, noise: Node, *rest: Any) -> Node | None:
    """Spells a randomized leaky ReLU that gives its noise too."""
    return rrelu(emit, constant, node, x, *rest) if _reads_values_alone(node) else None


def bilinear(emit: Emit, constant: Any, node: Node, x: Node, y: Node, weight: Node, bias: Node | None) -> Node | None:
    """Spells xᵀWy, for each matrix W of a stack, as a linear layer of x whose outputs are multiplied by y."""
    (outputs, left, right), shape = _shape(weight), _shape(node)
    if is_attribute(weight):
        values = attribute(node.graph.owning_module, weight).transpose(1, 2).reshape(-1, left)
        matrix = constant(f"{node.name}_weight", values)
    else:
        matrix = _reshaped(emit, emit(aten.transpose.int, weight, 1, 2), [outputs * right, left])
    batch = math.prod(shape[:-1])
    rows = emit(aten.linear.default, _reshaped(emit, x, [batch, left]), matrix)
    rows = _reshaped(emit, rows, [batch, outputs, right])
    result = _reshaped(emit, emit(aten.bmm.default, rows, _reshaped(emit, y, [batch, right, 1])), shape)
    return result if bias is None else emit(aten.add.Tensor, result, bias)


def distances(emit: Emit, constant: Any, node: Node, x: Node, y: Node, p: float = 2.0, *_: Any) -> Node | None:
    """Spells the distances of all pairs of rows as those of all differences."""
    if p not in (1.0, 2.0, math.inf):
        return None
    apart = emit(aten.sub.Tensor, emit(aten.unsqueeze.default, x, -2), emit(aten.unsqueeze.default, y, -3))
    if p == 2.0:
        return emit(aten.sqrt.default, emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, apart, apart), [-1]))
    apart = emit(aten.abs.default, apart)
    return emit(aten.sum.dim_IntList, apart, [-1]) if p == 1.0 else emit(aten.amax.default, apart, [-1])


def median(
    emit: Emit, constant: Any, node: Node, x: Node, dim: int | None = None, keepdim: bool = False
) -> Node | None:
    """Spells the lower median, where its place is not read, as the value in the middle of all, sorted."""
    if dim is None:
        x, dim = _reshaped(emit, x, [math.prod(_shape(x))]), 0
    if not _shape(x) or (node.target is aten.median.dim and not _reads_values_alone(node)):
        return None
    ordered = emit(operator.getitem, emit(aten.sort.default, x, dim), 0)
    middle = emit(aten.select.int, ordered, dim, (_shape(x)[dim] - 1) // 2)
    return emit(aten.unsqueeze.default, middle, dim) if keepdim else middle


RULES: dict[Any, Callable[..., Node | None]] = {
    aten.median.default: median,
    aten.median.dim: median,
    aten.cdist.default: distances,
    aten.adaptive_max_pool1d.default: adaptive_pool(1, MAX),
    aten.adaptive_max_pool2d.default: adaptive_pool(2, MAX),
    aten.adaptive_max_pool3d.default: adaptive_pool(3, MAX),
    aten.adaptive_avg_pool1d.default: adaptive_pool(1, AVERAGE),
    aten.adaptive_avg_pool2d.default: adaptive_pool(2, AVERAGE),
    aten.adaptive_avg_pool3d.default: adaptive_pool(3, AVERAGE),
    aten.max_pool1d.default: max_pool(1),
    aten.max_pool2d.default: max_pool(2),
    aten.max_pool3d.default: max_pool(3),
    aten.avg_pool1d.default: avg_pool(1),
    aten.avg_pool2d.default: avg_pool(2),
    aten.avg_pool3d.default: avg_pool(3),
    aten.max.dim: extreme(aten.amax.default),
    aten.min.dim: extreme(aten.amin.default),
    aten.amax.default: amax,
    aten.col2im.default: fold,
    aten.pad.default: crop,
    aten.conv_transpose1d.default: late_outputs(1),
    aten.conv_transpose2d.input: late_outputs(2),
    aten.conv_transpose3d.input: late_outputs(3),
    aten.bilinear.default: bilinear,
    aten.rrelu.default: rrelu,
    aten.rrelu_with_noise_functional.default: rrelu_with_noise,
    aten._upsample_bilinear2d_aa.vec: antialiased(aten._upsample_bilinear2d_aa.vec),
    aten._upsample_bicubic2d_aa.vec: antialiased(aten._upsample_bicubic2d_aa.vec),
}
