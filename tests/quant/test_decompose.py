"""Rare ops in plain ones: the canonical graph computes what eager torch does, without the op."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from edgekit.quant.graph.passes import capture

IMAGE, LINE, VOLUME = (2, 3, 8, 6), (2, 3, 10), (2, 3, 8, 6, 5)
WEIGHT = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(1))
KERNELS = {rank: WEIGHT.flatten()[: 12 * 2**rank].view(3, 4, *(2,) * rank) for rank in (1, 2, 3)}
aten = torch.ops.aten


class Function(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


ADAPTIVE = [
    (f"{kind} {rank}d {size} {shape}", getattr(F, f"adaptive_{kind}_pool{rank}d"), (size,), shape)
    for kind in ("max", "avg")
    for rank, shape, sizes in (
        (1, LINE, (1, 3, 4, 13)),
        (1, LINE[1:], (1, 3)),
        (2, IMAGE, (1, 2, 3, 11, (None, 2), (1, 4))),
        (2, IMAGE[1:], (1, 5)),
        (3, VOLUME, (1, 3, (3, 4, 2))),
        (3, VOLUME[1:], (3,)),
    )
    for size in sizes
]
WINDOWS = [
    (f"{kind} {rank}d {arguments} {shape}", getattr(F, f"{kind}_pool{rank}d"), arguments, shape)
    for kind in ("max", "avg")
    for rank, shape in ((1, LINE), (1, LINE[1:]), (2, IMAGE[1:]), (3, VOLUME), (3, VOLUME[1:]))
    for arguments in ((2,), (3, 2, 1))
]
PADDED = {"stride": 2, "padding": 1, "count_include_pad": False}
OTHERS: list[tuple[str, Callable[..., Any], tuple[Any, ...], tuple[int, ...]]] = [
    ("max 1d dilated", lambda x: F.max_pool1d(x, 3, 2, 1, 2, ceil_mode=True), (), LINE),
    ("max 3d uneven", lambda x: F.max_pool3d(x, (3, 1, 2), (2, 1, 1), (1, 0, 1), ceil_mode=True), (), VOLUME),
    ("avg 1d ceil", lambda x: F.avg_pool1d(x, 3, 2, 1, ceil_mode=True), (), LINE),
    ("avg 3d excluded", lambda x: F.avg_pool3d(x, 3, **PADDED), (), VOLUME),
    ("avg 3d ceil", lambda x: F.avg_pool3d(x, (3, 2, 2), (3, 2, 1), 1, ceil_mode=True), (), VOLUME),
    *((f"divisor {d}", lambda x, d: F.avg_pool2d(x, 2, divisor_override=d), (d,), IMAGE) for d in (1, 4, 7)),
    ("divisor padded", lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=5), (), IMAGE),
    ("divisor ceil", lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, divisor_override=5), (), (1, 2, 7, 6)),
    ("divisor unbatched", lambda x: F.avg_pool2d(x, 2, divisor_override=3), (), IMAGE[1:]),
    ("divisor 3d", lambda x: F.avg_pool3d(x, 2, 2, 1, ceil_mode=True, divisor_override=3), (), VOLUME),
    ("local response", lambda x: F.local_response_norm(x, 3), (), IMAGE),
    ("local response 1d", lambda x: F.local_response_norm(x, 2), (), LINE),
    *(
        (f"crop {mode}", lambda x, m: F.pad(x, (-1, 2, 1, -2), mode=m), (mode,), IMAGE)
        for mode in ("constant", "reflect")
    ),
    ("crop replicate", lambda x: F.pad(x, (2, -1), mode="replicate"), (), LINE),
    ("crop and view", lambda x: F.pad(x, (-1, -1)).flatten(1), (), IMAGE),
    ("crop to a value", lambda x: F.pad(x, (1, -1, -2, 0), value=1.5), (), IMAGE),
    ("fold", lambda x: F.fold(x, (4, 5), 2), (), (2, 12, 12)),
    ("fold blocks", lambda x: F.fold(x, (4, 6), 2, stride=2), (), (2, 12, 6)),
    ("fold odd", lambda x: F.fold(x, (6, 7), (3, 2), (1, 2), (1, 0), (2, 3)), (), (1, 12, 6)),
    ("fold unbatched", lambda x: F.fold(x, (4, 5), 2, padding=1, stride=3), (), (12, 4)),
    ("max rows", lambda x: x.max(3)[0], (), IMAGE),
    ("max columns", lambda x: x.max(2, keepdim=True)[0], (), IMAGE),
    ("max channels", lambda x: x.max(1)[0], (), IMAGE),
    ("max line", lambda x: x.max(-1)[0], (), LINE),
    ("min rows", lambda x: x.min(-1, keepdim=True)[0], (), IMAGE),
    ("amax pixels", lambda x: x.amax((-1, 2)), (), IMAGE),
    ("rrelu", lambda x: F.rrelu(x, training=False), (), IMAGE),
    ("rrelu bounds", lambda x: F.rrelu(x, 0.1, 0.9, training=False), (), LINE),
    *(
        (f"bilinear {shape}", lambda x, b: F.bilinear(x, x.flip(-1), WEIGHT, b), (bias,), shape)
        for shape, bias in (((2, 6), None), ((6,), torch.arange(4.0)), (IMAGE, torch.arange(4.0)))
    ),
    ("median", lambda x: x.median(), (), IMAGE),
    ("median row", lambda x: x.median(-2, keepdim=True)[0], (), IMAGE),
    ("median column", lambda x: x.median(3).values, (), (2, 3, 4, 5)),
    *(
        (f"distances {p}", lambda x, p: torch.cdist(x, x[..., 1:3, :].flip(1), p), (p,), (2, 3, 20, 6))
        for p in (1.0, 2.0, math.inf)
    ),
    *(
        (
            f"late outputs {rank}d",
            lambda x, f, w, e: f(x, w, torch.arange(4.0), 2, 1, e, 1, 4),
            (getattr(F, f"conv_transpose{rank}d"), KERNELS[rank], extra),
            shape,
        )
        for rank, shape, extra in ((1, LINE, 3), (2, IMAGE, (2, 1)), (3, VOLUME, (0, 1, 3)))
    ),
    ("bilinear of weights", lambda x: F.bilinear(x, x[..., :5], x[0, :3, :6, :5], None), (), (2, 3, 7, 6)),
    *(
        (
            f"{mode} {align} {size}",
            lambda x, m, a, s: F.interpolate(x, s, None, m, a, antialias=True),
            (mode, align, size),
            IMAGE,
        )
        for mode in ("bilinear", "bicubic")
        for align in (False, True)
        for size in ((5, 4), (3, 12))
    ),
    (
        "antialiased scale",
        lambda x: F.interpolate(x, scale_factor=0.45, mode="bilinear", antialias=True).flatten(1),
        (),
        IMAGE,
    ),
]
GONE = {
    aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten.max_pool1d.default,
    aten.max_pool3d.default,
    aten.avg_pool1d.default,
    aten.avg_pool3d.default,
    aten.max.dim,
    aten.min.dim,
    aten.col2im.default,
    aten.rrelu.default,
    aten.rrelu_with_noise_functional.default,
    aten.bilinear.default,
    aten.cdist.default,
    aten.median.default,
    aten.median.dim,
    aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.vec,
}


@pytest.mark.parametrize(("name", "function", "arguments", "shape"), [*ADAPTIVE, *WINDOWS, *OTHERS])
def test_plain_ops_compute_the_same(
    name: str, function: Callable[..., Any], arguments: tuple[Any, ...], shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    graph = capture(Function(lambda x: function(x, *arguments)).eval(), (x,))
    expected, got = function(x, *arguments), graph(x)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert not GONE & {node.target for node in calls}
    for node in calls:
        if node.target is aten.pad.default:
            assert min(node.args[1]) >= 0
        if node.target is aten.conv_transpose2d.input:
            assert all(extra < stride for extra, stride in zip(node.args[5], node.args[3], strict=True))
        if node.target is aten.avg_pool2d.default:
            assert len(node.args) < 7 or node.args[6] is None


def test_indices_that_are_read_stay() -> None:
    x = torch.randn(IMAGE)
    graph = capture(Function(lambda x: tuple(x.max(1))).eval(), (x,))
    for expected, got in zip(x.max(1), graph(x), strict=True):
        assert torch.equal(expected, got)
    graph = capture(Function(lambda x: F.adaptive_max_pool2d(x, 3, return_indices=True)).eval(), (x,))
    for expected, got in zip(F.adaptive_max_pool2d(x, 3, return_indices=True), graph(x), strict=True):
        assert torch.equal(expected, got)


def test_what_reads_a_value_finds_it_in_its_layout() -> None:
    x = torch.randn(2, 10, 3)
    function = Function(lambda x: F.max_pool1d(x.transpose(1, 2), 3, 2).transpose(1, 2).reshape(2, -1)).eval()
    torch.testing.assert_close(capture(function, (x,))(x), function(x))
