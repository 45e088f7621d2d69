"""Tries every row of the XNNPACK partitioner's table against eager torch: `python tests/exporters/pte_audit.py --full`.

Each case is one operation, alone, behind a convolution (whose layout is another), and between two convolutions in
int8. What ExecuTorch's runtime computes from the .pte file is compared with eager torch (int8: with the quantized
graph). Options: --full runs all cases (minutes) instead of a seeded choice, --only WORD those with WORD in their names.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from edgekit.artifacts.int8_coverage import missing_kernels
from edgekit.errors import EdgeKitError
from edgekit.exporters.executorch.lower import to_executorch
from edgekit.quant.ptq.recipes import float32, half_compute, int8_static

Shape = tuple[int, ...]

SIZES = (2, 3, 8, 6, 5, 4)  # of the first to sixth dimension


def ranked(rank: int) -> Shape:
    """The shape of `rank` dimensions that cases are tried with: batch and channels in front."""
    return SIZES[:rank]


class Op(nn.Module):
    """A function of inputs, with what modules and constants it needs."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for index, part in enumerate(parts):
            if isinstance(part, nn.Module):
                self.add_module(f"part{index}", part)
            else:
                self.register_buffer(f"part{index}", part)
        self.count = len(parts)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, *(getattr(self, f"part{index}") for index in range(self.count)))


@dataclass(frozen=True)
class Case:
    """One operation: how it is made, and the shapes of its inputs.

    `dtypes` are those of the inputs, float32 by default; `positive` inputs are squared and moved off zero.
    """

    name: str
    make: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...] = ()
    positive: bool = False

    def inputs(self, seed: int = 0) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        made = []
        for shape, dtype in itertools.zip_longest(self.shapes, self.dtypes, fillvalue=torch.float32):
            value = torch.randn(shape, generator=generator) * 2  # type: ignore[arg-type]
            if self.positive:
                value = value.square() + 0.1
            made.append(value.to(dtype) if dtype.is_floating_point else (value * 3).to(dtype))  # type: ignore[union-attr]
        return tuple(made)


def op(name: str, function: Callable[..., Any], *shapes: Shape, **options: Any) -> Case:
    return Case(name, lambda: Op(function), shapes, **options)


def layer(name: str, make: Callable[[], nn.Module], *shapes: Shape, **options: Any) -> Case:
    return Case(name, make, shapes, **options)


# Functions of one tensor, of any shape.
UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "abs": torch.abs,
    "ceil": torch.ceil,
    "floor": torch.floor,
    "exp": torch.exp,
    "neg": torch.neg,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "square": torch.square,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
    "leaky_relu 0": lambda x: F.leaky_relu(x, 0.0),
    "leaky_relu 2": lambda x: F.leaky_relu(x, 2.0),
    "leaky_relu -0.5": lambda x: F.leaky_relu(x, -0.5),
    "hardtanh": F.hardtanh,
    "hardtanh 1 2": lambda x: F.hardtanh(x, 1, 2),
    "hardtanh -inf 0": lambda x: F.hardtanh(x, -math.inf, 0.0),
    "clamp min": lambda x: torch.clamp(x, min=-0.5),
    "clamp max": lambda x: torch.clamp(x, max=0.5),
    "clamp max int": lambda x: torch.clamp(x, max=1),
    "clamp both": lambda x: torch.clamp(x, -1, 0.25),
    "clamp crossed": lambda x: torch.clamp(x, 1.0, -1.0),
    "clamp equal": lambda x: torch.clamp(x, 0.5, 0.5),
    "clamp tensor": lambda x: torch.clamp(x, torch.tensor(-0.5), torch.tensor(0.5)),
    "relu6": F.relu6,
    "pow 2": lambda x: x**2,
    "pow 2.0": lambda x: x**2.0,
    "pow 3": lambda x: x**3,
    "pow 0": lambda x: x**0,
    "pow base 2": lambda x: 2**x,
    "clone": torch.clone,
    "contiguous": lambda x: x.contiguous() + 1,
    "add number": lambda x: x + 2,
    "sub number": lambda x: x - 2.5,
    "rsub number": lambda x: 1 - x,
    "rsub alpha": lambda x: torch.rsub(x, 1.5, alpha=2),
    "mul number": lambda x: x * 3,
    "div number": lambda x: x / 3,
    "div floor": lambda x: torch.div(x, 0.7, rounding_mode="floor"),
    "div trunc": lambda x: torch.div(x, 0.7, rounding_mode="trunc"),
    "add alpha": lambda x: torch.add(x, x, alpha=3),
    "add alpha 0": lambda x: torch.add(x, x, alpha=0),
    "sub alpha": lambda x: torch.sub(x, x, alpha=2),
    "add itself": lambda x: x + x,
    "maximum number": lambda x: torch.maximum(x, torch.tensor(0.3)),
    "minimum number": lambda x: torch.minimum(x, torch.tensor(0.3)),
    "to double": lambda x: (x.double() * 2).float(),
    "to int": lambda x: x.to(torch.int32).float(),
    "flatten": lambda x: x.flatten() * 2,
    "view": lambda x: x.reshape(-1, *x.shape[:1]) * 2,
    "as strided": lambda x: x.as_strided((2,), (1,)),
}
POSITIVE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "pow 0.5": lambda x: x**0.5,
    "pow -1": lambda x: x**-1,
    "log2": torch.log2,
    "log1p": torch.log1p,
}
BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}
REDUCTIONS: dict[str, Callable[..., Any]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "amax": torch.amax,
    "amin": torch.amin,
    "var": torch.var,
    "logsumexp": torch.logsumexp,
}
# Reductions of one dimension.
ALONG: dict[str, Callable[..., Any]] = {
    "max values": lambda x, dim, keep: torch.max(x, dim, keepdim=keep).values,
    "max indices": lambda x, dim, keep: torch.max(x, dim, keepdim=keep).indices,
    "max both": lambda x, dim, keep: tuple(torch.max(x, dim, keepdim=keep)),
    "min values": lambda x, dim, keep: torch.min(x, dim, keepdim=keep).values,
    "argmax": lambda x, dim, keep: torch.argmax(x, dim, keepdim=keep),
}
DIMENSIONS: dict[str, Callable[[torch.Tensor, int], Any]] = {
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "cumsum": torch.cumsum,
    "unsqueeze": torch.unsqueeze,
    "select": lambda x, dim: x.select(dim, 1),
    "select -1": lambda x, dim: x.select(dim, -1),
    "slice": lambda x, dim: x.narrow(dim, 1, 1),
    "slice step": lambda x, dim: torch.ops.aten.slice.Tensor(x, dim, 0, None, 2),
    "slice negative": lambda x, dim: torch.ops.aten.slice.Tensor(x, dim, -2, -1),
    "flip": lambda x, dim: x.flip(dim),
    "roll": lambda x, dim: x.roll(1, dim),
    "split": lambda x, dim: x.split(1, dim)[1],
    "chunk": lambda x, dim: tuple(x.chunk(2, dim)),
    "cat": lambda x, dim: torch.cat([x, x * 2], dim),
    "cat same": lambda x, dim: torch.cat([x, x], dim),
    "cat one": lambda x, dim: torch.cat([x], dim) * 2,
    "cat 3": lambda x, dim: torch.cat([x, -x, x], dim),
    "cat 7": lambda x, dim: torch.cat([x * i for i in range(7)], dim),
    "stack": lambda x, dim: torch.stack([x, -x], dim),
    "glu": lambda x, dim: F.glu(torch.cat([x, x + 1], dim), dim),
    "index_select": lambda x, dim: x.index_select(dim, torch.tensor([1, 0])),
    "repeat": lambda x, dim: x.repeat_interleave(2, dim),
}
SHAPES_WITH: tuple[tuple[Shape, Shape], ...] = (
    ((2, 3, 8, 6), (2, 3, 8, 6)),
    ((2, 3, 8, 6), (1, 3, 1, 1)),
    ((2, 3, 8, 6), (3, 1, 1)),
    ((2, 3, 8, 6), (6,)),
    ((2, 3, 8, 6), (8, 6)),
    ((2, 3, 8, 6), ()),
    ((2, 3, 8, 6), (2, 1, 8, 6)),
    ((2, 3, 8, 6), (1, 1, 8, 1)),
    ((1, 3, 1, 6), (2, 1, 8, 1)),
    ((4, 1), (1, 5)),
    ((4,), (3, 1)),
    ((), ()),
    ((2, 3, 8, 6, 5), (2, 3, 8, 6, 5)),
    ((2, 3, 8, 6, 5), (3, 1, 1, 1)),
    ((2, 3, 8, 6, 5, 4), (6, 1, 4)),
    ((1, 2, 3, 1, 2, 3, 2), (1, 2, 3, 1, 2, 3, 2)),
)


def unary() -> Iterator[Case]:
    for name, function in UNARY.items():
        for rank in range(7):
            yield (
                op(f"{name} rank {rank}", function, ranked(rank))
                if name != "as strided" or rank
                else op(f"{name} rank {rank}", torch.abs, ())
            )
    for name, function in POSITIVE.items():
        for rank in range(7):
            yield op(f"{name} rank {rank}", function, ranked(rank), positive=True)
    for name in ("abs", "neg", "relu", "clamp both", "add number", "mul number", "pow 2", "flatten", "div number"):
        for dtype in (torch.int32, torch.int64, torch.float64):
            yield op(f"{name} {dtype}", UNARY[name], ranked(4), dtypes=(dtype,))


def binary() -> Iterator[Case]:
    for name, function in BINARY.items():
        for a, b in SHAPES_WITH:
            yield op(f"{name} {a} {b}", function, a, b, positive=name == "div")
            yield op(f"{name} {b} {a}", function, b, a, positive=name == "div")
            yield layer(
                f"{name} constant {a} {b}",
                lambda f=function, b=b: Op(f, torch.rand(b) + 0.5),
                a,
                positive=name == "div",
            )
        for dtypes in itertools.permutations((torch.float32, torch.int32, torch.int64), 2):
            yield op(f"{name} {dtypes}", function, ranked(4), ranked(4), dtypes=dtypes, positive=True)
        for dtype in (torch.int32, torch.int64):
            yield op(f"{name} {dtype}", function, ranked(4), ranked(4), dtypes=(dtype, dtype), positive=True)


def reductions() -> Iterator[Case]:
    for rank in range(1, 6):
        dims = [[d] for d in range(-rank, rank)]
        several = [[*d] for n in (2, 3) for d in itertools.combinations(range(rank), n)]
        several += [[d - rank for d in reversed(dims)] for dims in several]
        for keep in (False, True):
            for name, function in REDUCTIONS.items():
                for dim in dims + several:
                    yield op(f"{name} rank {rank} {dim} keep={keep}", _bound(function, dim, keepdim=keep), ranked(rank))
            for name, along in ALONG.items():
                for dim in range(-rank, rank):
                    yield op(f"{name} rank {rank} {dim} keep={keep}", _bound(along, dim, keep), ranked(rank))
        for name in ("mean", "sum", "amax"):
            yield op(f"{name} rank {rank} all", _bound(REDUCTIONS[name], list(range(rank))), ranked(rank))
    yield op("mean dtype", lambda x: x.mean((2, 3), keepdim=True, dtype=torch.float64).float(), ranked(4))
    yield op("max all", lambda x: x.max(), ranked(4))
    yield op("mean all", lambda x: x.mean(), ranked(4))


def dimensions() -> Iterator[Case]:
    for name, function in DIMENSIONS.items():
        for rank in range(1, 6):
            for dim in range(-rank, rank):
                yield op(f"{name} rank {rank} {dim}", _bound(function, dim), ranked(rank))
    for rank in range(2, 7):
        orders = list(itertools.permutations(range(rank)))
        for order in random.Random(rank).sample(orders, min(len(orders), 8)):
            yield op(f"permute {order}", _bound(torch.permute, order), ranked(rank))
            negative = tuple(axis - rank for axis in order)
            yield op(f"permute {negative}", _bound(torch.permute, negative), ranked(rank))
        yield op(f"transpose rank {rank}", lambda x: x.transpose(-1, -2), ranked(rank))
    for shape in ((48,), (1, 48), (2, 3, 8), (6, 8, 1, 1), (1, 2, 3, 1, 8), (1, 2, 3, 2, 2, 2), (1, 2, 3, 2, 2, 2, 1)):
        for source in ((2, 3, 8), (2, 3, 4, 2), (2, 3, 2, 2, 2), (48,)):
            yield op(f"view {source} {shape}", _bound(torch.reshape, shape), source)
    for source in ((2, 1, 3, 1), (1, 3), (2, 1), (1, 1, 1, 1), (2, 1, 4, 1, 3)):
        yield op(f"squeeze {source}", lambda x: x.squeeze() * 2, source)
        for dim in range(len(source)):
            yield op(f"squeeze {source} {dim}", _bound(torch.squeeze, dim), source)
    yield op("view scalar", lambda x: x.reshape(()) + 1, (1, 1))
    yield op("expand", lambda x: x.expand(2, 3, 4) * 2, (3, 1))
    yield op("tile", lambda x: x.repeat(2, 1, 3), (2, 3, 4))
    yield op("slice empty", lambda x: torch.cat([x[:, 2:2], x], 1), (2, 3, 4))
    yield op("channels last", lambda x: x.to(memory_format=torch.channels_last) * 2, ranked(4))
    yield op("clone channels last", lambda x: x.clone(memory_format=torch.channels_last) * 2, ranked(4))
    yield op("unflatten", lambda x: x.unflatten(1, (1, 3)) * 2, ranked(4))
    yield op("movedim", lambda x: x.movedim(1, -1) * 2, ranked(4))
    yield op("pixel shuffle", lambda x: F.pixel_shuffle(x, 2), (1, 8, 3, 4))
    yield op("pixel unshuffle", lambda x: F.pixel_unshuffle(x, 2), (1, 2, 4, 6))


def pads() -> Iterator[Case]:
    for rank in range(1, 7):
        for count in range(1, rank + 1):
            amounts = [(i * 7 + 1) % 3 for i in range(2 * count)]
            for value in (0.0, 1.5, -math.inf):
                yield op(f"pad rank {rank} {amounts} {value}", _bound(F.pad, amounts, value=value), ranked(rank))
    yield op("pad int value", lambda x: F.pad(x, (1, 2), value=3), ranked(4))
    yield op("pad negative", lambda x: F.pad(x, (-1, 2, 1, -1)), ranked(4))
    yield op("pad nothing", lambda x: F.pad(x, (0, 0)) * 2, ranked(4))
    for mode in ("reflect", "replicate", "circular"):
        yield op(f"pad {mode}", _bound(F.pad, (1, 2, 2, 1), mode=mode), ranked(4))
        yield op(f"pad {mode} rank 3", _bound(F.pad, (1, 2), mode=mode), ranked(3))
        yield op(f"pad {mode} unbatched", _bound(F.pad, (1, 2, 1, 0), mode=mode), ranked(3))


def pools() -> Iterator[Case]:
    kernels = (1, 2, 3, (3, 1), (1, 2), (8, 6))
    for kernel, stride, pad, ceil in itertools.product(kernels, (None, 1, 2, 3, (2, 1)), (0, 1, (1, 0)), (False, True)):
        widths = [kernel] * 2 if isinstance(kernel, int) else kernel
        pad_widths = [pad] * 2 if isinstance(pad, int) else pad
        if any(2 * p > k for p, k in zip(pad_widths, widths, strict=True)):
            continue
        about = f"{kernel} {stride} {pad} ceil={ceil}"
        yield op(f"max_pool2d {about}", _bound(F.max_pool2d, kernel, stride, pad, 1, ceil), ranked(4))
        for include in (False, True):
            yield op(
                f"avg_pool2d {about} include={include}",
                _bound(F.avg_pool2d, kernel, stride, pad, ceil, include),
                ranked(4),
            )
    for divisor in (1, 4, 7):
        yield op(f"avg_pool2d divisor {divisor}", _bound(F.avg_pool2d, 2, divisor_override=divisor), ranked(4))
    for dilation, ceil in itertools.product((2, (1, 3)), (False, True)):
        yield op(f"max_pool2d dilation {dilation} {ceil}", _bound(F.max_pool2d, 2, 1, 1, dilation, ceil), ranked(4))
    for rank, name, arguments in ((3, "1d", (2,)), (3, "2d", (2,)), (5, "3d", (2,)), (4, "3d", (2,)), (2, "1d", (2,))):
        for kind in ("max", "avg"):
            function = getattr(F, f"{kind}_pool{name}")
            yield op(f"{kind}_pool{name} rank {rank}", _bound(function, *arguments), ranked(rank))
            yield op(f"{kind}_pool{name} rank {rank} padded", _bound(function, 3, 2, 1), ranked(rank))
            yield op(f"{kind}_pool{name} rank {rank} ceil", _bound(function, 3, 2, ceil_mode=True), ranked(rank))
    yield op("max_pool2d indices", lambda x: F.max_pool2d(x, 2, return_indices=True), ranked(4))
    yield op("lp_pool2d", lambda x: F.lp_pool2d(x, 2.0, 2), ranked(4), positive=True)
    for size in (1, 2, 3, 5, (2, 3), (None, 2), 8, 11):
        for kind in ("avg", "max"):
            yield op(f"adaptive_{kind}_pool2d {size}", _bound(getattr(F, f"adaptive_{kind}_pool2d"), size), ranked(4))
            yield op(
                f"adaptive_{kind}_pool2d {size} rank 3", _bound(getattr(F, f"adaptive_{kind}_pool2d"), size), ranked(3)
            )
    for size in (1, 2, 3, 5):
        for kind in ("avg", "max"):
            yield op(f"adaptive_{kind}_pool1d {size}", _bound(getattr(F, f"adaptive_{kind}_pool1d"), size), ranked(3))
            yield op(f"adaptive_{kind}_pool3d {size}", _bound(getattr(F, f"adaptive_{kind}_pool3d"), size), ranked(5))


def _rest(*options: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """Pairs of options: each value of each option, with a few of the others'."""
    every = list(itertools.product(*options))
    yield from random.Random(0).sample(every, min(len(every), 24))


def convolutions() -> Iterator[Case]:
    for rank in (1, 2, 3):
        image = (2, 4, *(9, 7, 6)[:rank])
        plain, transposed = (getattr(nn, f"Conv{t}{rank}d") for t in ("", "Transpose"))
        for kernel, stride, pad, dilation, groups, bias, width in _rest(
            (1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2), (1, 2, 4), (True, False), (4, 8)
        ):
            settings = {"stride": stride, "padding": pad, "dilation": dilation, "groups": groups, "bias": bias}
            yield layer(f"conv{rank}d {kernel} {width} {settings}", _made(plain, 4, width, kernel, **settings), image)
            for extra in range(min(2, max(stride, dilation))):
                yield layer(
                    f"conv_transpose{rank}d {kernel} {width} {settings} extra={extra}",
                    _made(transposed, 4, width, kernel, output_padding=extra, **settings),
                    image,
                )
        yield layer(f"conv{rank}d unbatched", _made(plain, 4, 8, 3), image[1:])
        yield layer(f"conv_transpose{rank}d unbatched", _made(transposed, 4, 8, 3), image[1:])
        for mode in ("reflect", "replicate", "circular"):
            yield layer(f"conv{rank}d {mode}", _made(plain, 4, 8, 3, padding=1, padding_mode=mode), image)
        yield layer(f"conv{rank}d same", _made(plain, 4, 8, 2, padding="same"), image)
        function = getattr(F, f"conv{rank}d")
        yield op(f"conv{rank}d of two inputs", function, image, (8, 4, *(3,) * rank))
    yield layer(
        "conv2d uneven", _made(nn.Conv2d, 4, 8, (3, 1), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), (1, 4, 9, 7)
    )
    yield layer(
        "conv_transpose2d uneven",
        _made(nn.ConvTranspose2d, 4, 8, (3, 2), stride=(1, 2), padding=(1, 0), output_padding=(0, 1)),
        (1, 4, 9, 7),
    )
    yield layer(
        "conv_transpose2d late",
        _made(nn.ConvTranspose2d, 4, 8, 3, stride=1, dilation=2, output_padding=1),
        (1, 4, 9, 7),
    )
    for norm, rank in itertools.product((True, False), (1, 2, 3)):
        batch_norm = getattr(nn, f"BatchNorm{rank}d")
        image = (2, 4, *(9, 7, 6)[:rank])
        yield layer(f"batch_norm{rank}d affine={norm}", _normed(batch_norm, 4, affine=norm), image)
        conv = getattr(nn, f"Conv{rank}d")
        yield layer(
            f"conv{rank}d batch_norm affine={norm}",
            lambda c=conv, b=batch_norm, norm=norm: nn.Sequential(c(4, 4, 3), _normed(b, 4, affine=norm)()),
            image,
        )
        yield layer(f"batch_norm{rank}d untracked", _made(batch_norm, 4, track_running_stats=False), image)
    yield layer("batch_norm1d rank 2", _normed(nn.BatchNorm1d, 4), (2, 4))
    yield layer("linear batch_norm", lambda: nn.Sequential(nn.Linear(6, 4), _normed(nn.BatchNorm1d, 4)()), (2, 6))
    for name, norm in (
        ("layer_norm", _made(nn.LayerNorm, 6)),
        ("layer_norm 2", _made(nn.LayerNorm, (8, 6))),
        ("group_norm", _made(nn.GroupNorm, 3, 3)),
        ("instance_norm", _made(nn.InstanceNorm2d, 3, affine=True)),
        ("local_response_norm", _made(nn.LocalResponseNorm, 3)),
        ("rms_norm", _made(nn.RMSNorm, 6)),
    ):
        yield layer(name, norm, ranked(4))
    for rank in range(2, 6):
        yield layer(f"prelu rank {rank}", _made(nn.PReLU), ranked(rank))
        yield layer(f"prelu channels rank {rank}", _made(nn.PReLU, 3), ranked(rank))
    yield layer("prelu rank 1", _made(nn.PReLU), (5,))
    yield layer("prelu after linear", lambda: nn.Sequential(nn.Linear(6, 8), nn.PReLU(8), nn.Linear(8, 4)), (2, 6))
    yield layer("prelu after linear 3", lambda: nn.Sequential(nn.Linear(6, 8), nn.PReLU(), nn.Linear(8, 4)), (2, 3, 6))
    yield layer("prelu after conv1d", lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.PReLU(8)), ranked(3))
    yield layer("prelu after conv3d", lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.PReLU(8)), ranked(5))
    yield layer("prelu twice", lambda: _Twice(nn.PReLU(3)), ranked(4))
    yield op("prelu of two inputs", lambda x, w: F.prelu(x, w), ranked(4), (3,))


class _Twice(nn.Module):
    """One activation of a 4-D value and of a 3-D one: their weight is shared."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.act(x), self.act(x.flatten(2))


def products() -> Iterator[Case]:
    for rank in range(1, 6):
        for bias in (True, False):
            width = ranked(rank)[-1]
            yield layer(f"linear rank {rank} bias={bias}", _made(nn.Linear, width, 5, bias=bias), ranked(rank))
            for name, act in (("relu", nn.ReLU), ("relu6", nn.ReLU6), ("hardtanh", nn.Hardtanh)):
                yield layer(
                    f"linear {name} rank {rank} bias={bias}",
                    lambda w=width, b=bias, a=act: nn.Sequential(nn.Linear(w, 5, bias=b), a()),
                    ranked(rank),
                )
    for shape in ((6,), (2, 6), (2, 3, 6)):
        yield layer(f"bilinear layer {shape}", _made(nn.Bilinear, 6, 5, 4), shape, (*shape[:-1], 5))
    yield op("linear of inputs", F.linear, (2, 6), (4, 6))
    yield op("linear of inputs with bias", F.linear, (2, 6), (4, 6), (4,))
    yield op("mm", torch.mm, (2, 6), (6, 4))
    yield op("bmm", torch.bmm, (3, 2, 6), (3, 6, 4))
    yield op("addmm", torch.addmm, (4,), (2, 6), (6, 4))
    yield op("addmm factors", lambda b, x, y: torch.addmm(b, x, y, beta=0.5, alpha=2), (4,), (2, 6), (6, 4))
    yield op("baddbmm", lambda b, x, y: torch.baddbmm(b, x, y, beta=0.5, alpha=2), (3, 2, 4), (3, 2, 6), (3, 6, 4))
    for a, b in (
        ((6,), (6,)),
        ((2, 6), (6,)),
        ((6,), (6, 2)),
        ((3, 2, 6), (6, 4)),
        ((2, 6), (3, 6, 4)),
        ((2, 1, 3, 6), (4, 6, 5)),
        ((2, 3, 4, 6), (2, 3, 6, 5)),
        ((2, 1, 2, 4, 6), (3, 1, 6, 5)),
    ):
        yield op(f"matmul {a} {b}", torch.matmul, a, b)
        yield layer(f"matmul constant {a} {b}", lambda b=b: Op(torch.matmul, torch.randn(b)), a)
    yield layer(
        "addmm constants", lambda: Op(lambda x, w, b: torch.addmm(b, x, w), torch.randn(6, 4), torch.randn(4)), (2, 6)
    )
    yield layer(
        "addmm constants factors",
        lambda: Op(lambda x, w, b: torch.addmm(b, x, w, beta=2, alpha=0.5), torch.randn(6, 4), torch.randn(4)),
        (2, 6),
    )
    yield layer(
        "addmm constants matrix",
        lambda: Op(lambda x, w, b: torch.addmm(b, x, w), torch.randn(6, 4), torch.randn(2, 4)),
        (2, 6),
    )
    yield op("einsum", lambda x, y: torch.einsum("bik,bjk->bij", x, y), (2, 3, 6), (2, 4, 6))
    for heads in ((2, 4, 6), (2, 3, 4, 6), (1, 2, 3, 4, 6)):
        yield op(f"sdpa {heads}", F.scaled_dot_product_attention, heads, heads, heads)
        yield op(
            f"sdpa causal {heads}",
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            *[heads] * 3,
        )
        yield op(
            f"sdpa scale {heads}", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), *[heads] * 3
        )
        mask = (heads[-2], heads[-2])
        yield op(f"sdpa mask {heads}", F.scaled_dot_product_attention, heads, heads, heads, mask)
    yield op(
        "attention by hand",
        lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) * 0.4, -1) @ v,
        *[(2, 3, 4, 6)] * 3,
    )
    yield op(
        "attention by hand with a mask",
        lambda q, k, v, m: torch.softmax(q @ k.transpose(-1, -2) / 2 + m, -1) @ v,
        *[(2, 3, 4, 6)] * 3,
        (4, 4),
    )


def resizes() -> Iterator[Case]:
    for mode in ("bilinear", "nearest", "nearest-exact", "bicubic"):
        options: dict[str, Any] = {"mode": mode}
        for align in (False, True) if mode in ("bilinear", "bicubic") else (None,):
            options["align_corners"] = align
            for size in ((16, 12), (5, 4), (1, 1), (8, 6), (13, 7)):
                yield op(f"{mode} {align} size {size}", _bound(F.interpolate, size, **options), ranked(4))
            for scale in (2, 0.5, 1.3, (1.5, 2.7), 0.3):
                yield op(f"{mode} {align} scale {scale}", _bound(F.interpolate, None, scale, **options), ranked(4))
                yield op(
                    f"{mode} {align} scale {scale} recomputed",
                    _bound(F.interpolate, None, scale, recompute_scale_factor=True, **options),
                    ranked(4),
                )
            if mode.startswith("bi"):
                for size in ((16, 12), (5, 4)):
                    yield op(
                        f"{mode} {align} antialias {size}",
                        _bound(F.interpolate, size, antialias=True, **options),
                        ranked(4),
                    )
    yield op("linear 1d", lambda x: F.interpolate(x, 12, mode="linear"), ranked(3))
    yield op("trilinear", lambda x: F.interpolate(x, (4, 5, 6), mode="trilinear"), ranked(5))
    yield op("nearest 1d", lambda x: F.interpolate(x, 12), ranked(3))
    yield op("nearest 3d", lambda x: F.interpolate(x, scale_factor=2), ranked(5))
    yield op("fold", lambda x: F.fold(x, (4, 5), 2), (1, 12, 12))
    yield op("unfold", lambda x: F.unfold(x, 3, padding=1), (1, 2, 5, 6))
    yield op(
        "grid_sample", lambda x, g: F.grid_sample(x, torch.tanh(g), align_corners=False), (1, 2, 5, 6), (1, 4, 4, 2)
    )


def activations() -> Iterator[Case]:
    made: dict[str, Callable[[], nn.Module]] = {
        "Mish": nn.Mish,
        "Softplus": nn.Softplus,
        "Softplus beta": lambda: nn.Softplus(2, 5),
        "LogSigmoid": nn.LogSigmoid,
        "CELU": nn.CELU,
        "CELU 0.5": lambda: nn.CELU(0.5),
        "ELU": nn.ELU,
        "ELU 0.5": lambda: nn.ELU(0.5),
        "SELU": nn.SELU,
        "SiLU": nn.SiLU,
        "Tanhshrink": nn.Tanhshrink,
        "Softsign": nn.Softsign,
        "Hardshrink": nn.Hardshrink,
        "Softshrink": nn.Softshrink,
        "Threshold": lambda: nn.Threshold(0.1, 0.2),
        "Softmin": lambda: nn.Softmin(1),
        "Softmax2d": nn.Softmax2d,
        "LogSoftmax": lambda: nn.LogSoftmax(1),
        "Softmax -1": lambda: nn.Softmax(-1),
        "PReLU": lambda: nn.PReLU(),
        "RReLU": nn.RReLU,
        "GELU tanh": lambda: nn.GELU("tanh"),
        "GLU": lambda: nn.GLU(1),
        "GroupNorm": lambda: nn.GroupNorm(2, 8),
        "InstanceNorm": lambda: nn.InstanceNorm2d(8),
        "ChannelShuffle": lambda: nn.ChannelShuffle(2),
        "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
    }
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "where": lambda x: torch.where(x > 0, x, x * 0.1),
        "where number": lambda x: torch.where(x > 0.5, 0.5, x),
        "mask": lambda x: (x > 0.1).float() * x,
        "comparisons": lambda x: ((x >= 0) & (x <= 1)).float() + (x == x.abs()).float() + (x < -1) * 2.0,
        "logical": lambda x: torch.where(torch.logical_or(x > 1, torch.logical_not(x > -1)), x, -x),
        "amax": lambda x: x * x.amax(1, keepdim=True),
        "amax pixels": lambda x: x - x.amax((2, 3), keepdim=True),
        "max": lambda x: x * x.max(1, keepdim=True)[0],
        "max rows": lambda x: x - x.max(2, keepdim=True)[0],
        "min": lambda x: x - x.min(1, keepdim=True)[0],
        "argmax": lambda x: x * x.argmax(1, keepdim=True),
        "mean channels": lambda x: x - x.mean(1, keepdim=True),
        "norm": lambda x: x / x.norm(dim=1, keepdim=True).clamp(min=1e-3),
        "normalize": lambda x: F.normalize(x, dim=1),
        "std": lambda x: (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 0.1),
        "erf": torch.erf,
        "expm1": torch.expm1,
        "log1p abs": lambda x: torch.log1p(x.abs()) * torch.sign(x),
        "sign": torch.sign,
        "round": torch.round,
        "frac": torch.frac,
        "fmod": lambda x: torch.fmod(x, 0.7),
        "remainder": lambda x: torch.remainder(x, 0.7),
        "pow": lambda x: x.abs() ** 1.5,
        "pow by itself": lambda x: torch.pow(x.abs() + 0.5, x),
        "atan": torch.atan,
        "sinh": torch.sinh,
        "cumsum": lambda x: x.cumsum(1),
        "flip": lambda x: x.flip(3),
        "roll": lambda x: x.roll(1, 2),
        "sort": lambda x: x.sort(1).values,
        "topk": lambda x: x * x.topk(1, 1).values,
        "gather": lambda x: x.gather(1, x.argmax(1, keepdim=True)) + x,
        "clamp min": lambda x: x.clamp(min=-0.5),
        "clamp tensors": lambda x: torch.clamp(x, torch.zeros(8, 1, 1), torch.ones(8, 1, 1)),
        "softmax pixels": lambda x: torch.softmax(x.flatten(2), -1).view(x.shape),
        "softmax rows": lambda x: torch.softmax(x, 2),
        "swapped": lambda x: x.transpose(2, 3) * torch.sigmoid(x),
        "triangle": lambda x: torch.tril(x),
        "unfold": lambda x: F.unfold(x, 3, padding=1).view(x.shape[0], 8, 9, *x.shape[2:]).sum(2),
        "correlation": lambda x: F.conv2d(x, F.adaptive_avg_pool2d(x, 2).tanh()),
        "correlation int8": lambda x: F.conv2d(x, F.adaptive_avg_pool2d(x, 2)),
        "transposed correlation": lambda x: F.conv_transpose2d(x, F.adaptive_avg_pool2d(x, 2).transpose(0, 1)),
        "computed linear": lambda x: x @ F.relu(x.mean((0, 1))),
        "computed addmm": lambda x: F.linear(x, x.amax((0, 1)), x.mean((0, 1, 2))),
        "position": lambda x: x + torch.arange(8.0).view(1, 8, 1, 1),
        "position rows": lambda x: x + torch.arange(8.0),
        "bilinear": lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear"),
        "bicubic": lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bicubic"),
        "pad reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")[:, :, 1:-1, 1:-1],
        "full pool": lambda x: x * F.adaptive_max_pool2d(x, 1),
        "einsum": lambda x: torch.einsum("bchw,dc->bdhw", x, torch.eye(8)),
        "attention": lambda x: (
            torch.softmax(x.flatten(2).transpose(1, 2) @ x.flatten(2), -1).sum(1).view(1, 1, 8, 8) + x
        ),
    }
    for name, make in made.items():
        yield layer(f"act {name}", make, (1, 8, 8, 8))
    for name, function in functions.items():
        yield op(f"act {name}", function, (1, 8, 8, 8))


def _bound(function: Callable[..., Any], *arguments: Any, **named: Any) -> Callable[..., Any]:
    return lambda x: function(x, *arguments, **named)


def _made(kind: Callable[..., nn.Module], *arguments: Any, **named: Any) -> Callable[[], nn.Module]:
    return lambda: kind(*arguments, **named)


def _normed(kind: Callable[..., Any], *arguments: Any, **named: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        norm = kind(*arguments, **named)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        return norm

    return make


TABLES = (unary, binary, reductions, dimensions, pads, pools, convolutions, products, resizes, activations)


def images(case: Case) -> bool:
    """Whether a case takes one float image, as convolutions give them."""
    return len(case.shapes) == 1 and len(case.shapes[0]) == 4 and not case.dtypes


class Behind(nn.Module):
    """The operation behind a convolution that gives as many channels, and before a reader of another layout."""

    def __init__(self, operation: nn.Module, channels: int, positive: bool) -> None:
        super().__init__()
        self.conv, self.operation = nn.Conv2d(channels, channels, 3, padding=1), operation
        self.positive = positive

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return self.operation(y.square() + 0.1 if self.positive else y), y


class Between(nn.Module):
    """The operation between two convolutions, where what it gives is an image."""

    def __init__(self, operation: nn.Module, channels: int, after: int | None) -> None:
        super().__init__()
        self.conv, self.operation = nn.Conv2d(channels, channels, 3, padding=1), operation
        self.last = nn.Conv2d(after, 4, 1) if after else nn.Identity()

    def forward(self, x: torch.Tensor) -> Any:
        return torch.utils._pytree.tree_map(self._end, self.operation(self.conv(x)))

    def _end(self, y: torch.Tensor) -> torch.Tensor:
        ours = isinstance(self.last, nn.Conv2d) and y.ndim == 4 and y.shape[1] == self.last.in_channels
        return self.last(y) if ours and y.dtype == torch.float32 else y


CONTEXTS = ("alone", "half", "behind", "int8")
INT8 = ("int8", "network")  # a "network" is int8 too, and the case is all of it: see `pte_islands.py`
NEAR_DB = 12  # of int8 to eager torch, with random weights and ops that jump
TOGETHER = 16  # cases in one file: each alone would take ten times as long


@dataclass(frozen=True)
class Verdict:
    """What became of a case: "ok", "refused" with a message of ours, or what is wrong."""

    name: str
    verdict: str
    delegates: int = 0
    outside: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """One of "ok", "refused" and "wrong"."""
        return self.verdict.partition(":")[0] if self.verdict.startswith(("ok", "refused")) else "wrong"


class Together(nn.Module):
    """Modules side by side, each with inputs of its own."""

    def __init__(self, modules: list[nn.Module], counts: list[int]) -> None:
        super().__init__()
        self.parts, self.counts = nn.ModuleList(modules), counts

    def forward(self, *inputs: torch.Tensor) -> Any:
        rest, results = list(inputs), []
        for part, count in zip(self.parts, self.counts, strict=True):
            results.append(part(*rest[:count]))
            del rest[:count]
        return results


def execute(data: bytes, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Runs a .pte file in this process."""
    from executorch.runtime import Runtime, Verification

    method = Runtime.get().load_program(data, verification=Verification.Minimal).load_method("forward")
    assert method is not None
    return [torch.as_tensor(value).clone() for value in method.execute([x.contiguous() for x in inputs])]


def built(case: Case, context: str) -> nn.Module:
    """Returns the network that `context` puts a case in."""
    torch.manual_seed(0)
    operation = case.make().eval()
    if context == "behind":
        return Behind(operation, case.shapes[0][1], case.positive).eval()
    if context == "int8":
        after = [y for y in leaves(operation(*case.inputs())) if y.ndim == 4 and y.dtype == torch.float32]
        return Between(operation, case.shapes[0][1], after[0].shape[1] if after else None).eval()
    return operation


def trial(cases: list[Case], context: str) -> list[Verdict]:
    """Exports cases in one file, runs it, and compares; where something is wrong, halves of them, to find which."""
    with torch.no_grad():
        said, delegates, outside = _tried(cases, context)
    if said == "ok" or len(cases) == 1:
        return [Verdict(f"{context}: {case.name}", said, delegates, outside) for case in cases]
    half = len(cases) // 2
    return [*trial(cases[:half], context), *trial(cases[half:], context)]


def _tried(cases: list[Case], context: str) -> tuple[str, int, tuple[str, ...]]:
    modules = [built(case, context) for case in cases]
    module = Together(modules, [len(case.shapes) for case in cases]).eval()
    batches = [tuple(x for case in cases for x in case.inputs(seed)) for seed in range(4 if context in INT8 else 1)]
    inputs = batches[0]
    expected = leaves(module(*inputs))
    if context == "half":
        expected = [y for part, case in zip(modules, cases, strict=True) for y in in_halves(part, case.inputs())]
    try:
        if context in INT8:
            program = int8_static(module, inputs, batches).program
            eager, expected = expected, leaves(program.module()(*inputs))
            worst = min(map(signal_to_noise, eager, expected))
            if context == "network" and worst < NEAR_DB:
                return f"the graph is {worst:.1f} dB from eager torch", 0, ()
        else:
            program = half_compute(module, inputs) if context == "half" else float32(module, inputs).program
        lowered = to_executorch(program)
    except EdgeKitError as error:
        return f"refused: {error.what.splitlines()[0][:150]}", 0, ()
    except Exception as error:  # every other is a fault
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:200]}", 0, ()
    outside = tuple(sorted(lowered.undelegated))
    try:
        got = execute(lowered.data, inputs)
    except RuntimeError as error:
        if missing := missing_kernels(lowered.kernels):
            return f"refused: no kernel for {', '.join(missing)}", lowered.delegates, outside
        return f"does not run: {str(error)[:100]}", lowered.delegates, outside
    return compared(expected, got, context), lowered.delegates, outside


def in_halves(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What torch computes in half precision, where functions jump elsewhere, or in float what it has no halves for."""
    expected = leaves(module(*inputs))
    try:
        halves = leaves(copy.deepcopy(module).half()(*(x.half() if x.is_floating_point() else x for x in inputs)))
    except RuntimeError:
        return expected
    return [half.to(whole.dtype) for half, whole in zip(halves, expected, strict=True)]


def leaves(outputs: Any) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(outputs)


def compared(expected: list[torch.Tensor], got: list[torch.Tensor], context: str) -> str:
    """Says "ok", or what is wrong with the outputs of a file."""
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{tuple(b.shape)} {b.dtype} instead of {tuple(a.shape)} {a.dtype}"
        if context == "half":
            largest = float(a.float().nan_to_num(posinf=0, neginf=0).abs().max()) if a.numel() else 0.0
            close = torch.allclose(a.float(), b.float(), rtol=2e-2, atol=max(2e-2, 5e-3 * largest), equal_nan=True)
        elif context in INT8:
            close = signal_to_noise(a, b) > 30
        else:
            close = torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-4, equal_nan=True)
        if not close:
            return f"wrong by {(a.double() - b.double()).abs().max():.3g} of {a.double().abs().max():.3g}"
    return "ok"


def signal_to_noise(reference: torch.Tensor, other: torch.Tensor) -> float:
    a, b = reference.double(), other.double()
    if torch.equal(a, b):
        return math.inf
    return float(10 * torch.log10(a.square().mean() / (a - b).square().mean().clamp(min=1e-30)))


def trials(share: float = 1.0, only: str = "", contexts: Iterable[str] = CONTEXTS) -> dict[str, list[Case]]:
    """Returns a seeded `share` of the cases by context, those of the table `only` or with it in their names."""
    chosen = random.Random(0)
    found: dict[str, list[Case]] = {context: [] for context in contexts}
    for case in (case for table in TABLES for case in table() if only in ("", table.__name__) or only in case.name):
        for context in found:
            fits = images(case) if context in ("behind", "int8") else not (context == "half" and case.dtypes)
            if fits and chosen.random() < share:
                found[context].append(case)
    return found


def isolated(context: str, cases: list[Case]) -> Iterator[Verdict]:
    """Runs trials in a process of its own, and goes on in another where one takes it down."""
    work = [cases[start : start + TOGETHER] for start in range(0, len(cases), TOGETHER)]
    while work:
        ours, theirs = get_context("fork").Pipe(duplex=False)
        process = get_context("fork").Process(target=_work, args=(work, context, theirs))
        process.start()
        theirs.close()
        while True:
            try:
                yield from ours.recv()
                del work[0]
            except EOFError:
                break
        process.join()
        if work:
            died = work.pop(0)
            if len(died) == 1:
                yield Verdict(f"{context}: {died[0].name}", f"the process ended with {process.exitcode}")
            else:
                work[:0] = [died[: len(died) // 2], died[len(died) // 2 :]]


def _work(work: list[list[Case]], context: str, channel: Any) -> None:
    for cases in work:
        channel.send(trial(cases, context))
    channel.close()
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all cases, not a seeded tenth of them")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--context", choices=CONTEXTS)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    every = options.full or options.only
    contexts = (options.context,) if options.context else CONTEXTS
    count = bad = refused = 0
    for context, cases in trials(1.0 if every else 0.1, options.only, contexts).items():
        for verdict in isolated(context, cases):
            count += 1
            bad += verdict.kind == "wrong"
            refused += verdict.kind == "refused"
            if options.verbose or verdict.verdict != "ok":
                print(verdict.name, "|", verdict.verdict, "|", verdict.delegates, *verdict.outside, flush=True)
    print(f"{count} cases: {bad} wrong, {refused} refused")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
