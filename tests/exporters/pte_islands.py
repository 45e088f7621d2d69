"""Tries float ops at many places of int8 networks in .pte files: `python tests/exporters/pte_islands.py`.

Each pair is a network whose int8 layers lie around one op that stays in float, or half of it. What ExecuTorch's runtime
computes from the .pte file is compared with the quantized graph, and that, more loosely, with eager torch. Options:
--only WORD tries the pairs with WORD in their names, --verbose tells those that are right too.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from pte_audit import Case, isolated
from torch import nn

Tensor = torch.Tensor

# What keeps the shape of a tensor of any rank from 2, with 8 channels in the second dimension.
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "mish": F.mish,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "celu": lambda x: F.celu(x, 0.5),
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "softsign": F.softsign,
    "hardshrink": F.hardshrink,
    "leaky_relu": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, torch.linspace(-0.2, 0.5, 8)),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "comparisons": lambda x: ((x >= 0) & (x <= 1)).float() * x + (x > 0.3) * 0.5,
    "maximum": lambda x: torch.maximum(x, x.neg() * 0.3),
    "clamp tensors": lambda x: torch.clamp(x, torch.full_like(x, -0.5), torch.full_like(x, 1.0)),
    "amax": lambda x: x - x.amax(1, keepdim=True),
    "amax rows": lambda x: x - x.amax(-1, keepdim=True),
    "mean channels": lambda x: x - x.mean(1, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "softmax": lambda x: torch.softmax(x, 1),
    "softmax rows": lambda x: torch.softmax(x, -1),
    "cumsum": lambda x: x.cumsum(1),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, 1),
    "pow": lambda x: x.abs() ** 1.5,
    "log1p": lambda x: torch.log1p(x.abs()) * torch.sign(x),
    "sqrt": lambda x: torch.sqrt(x.abs() + 0.1),
    "erf": torch.erf,
    "atan": torch.atan,
    "round": lambda x: torch.round(x * 2) / 2,
    "topk": lambda x: x * x.topk(1, 1).values,
    "gather": lambda x: x + x.gather(1, x.argmax(1, keepdim=True)),
    "position": lambda x: x + torch.linspace(-1, 1, 8).view(8, *[1] * (x.ndim - 2)),
    "swapped": lambda x: torch.sigmoid(x.transpose(1, -1)).transpose(1, -1) * x,
    "split": lambda x: torch.cat([torch.tanh(x[:, :4]), torch.sin(x[:, 4:])], 1),
}
# Those of images alone.
IMAGE_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "pixel_shuffle": lambda x: F.pixel_unshuffle(F.mish(F.pixel_shuffle(x, 2)), 2),
    "channel_shuffle": lambda x: F.channel_shuffle(torch.atan(x), 2),
    "reflected": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1),
    "bilinear": lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear"),
    "group norm": lambda x: F.group_norm(x, 2),
    "local response": lambda x: F.local_response_norm(x, 2),
    "amax pixels": lambda x: x - x.amax((2, 3), keepdim=True),
    "std": lambda x: (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 0.1),
}


class Place(nn.Module):
    """A network of layers `a`, `b`, … around an op: `wire(self, op, x)`."""

    def __init__(
        self, wire: Callable[..., object], op: Callable[[Tensor], Tensor], layers: dict[str, nn.Module]
    ) -> None:
        super().__init__()
        self.wire, self.op = wire, op
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> object:
        return self.wire(self, self.op, x)


def conv(**options: object) -> nn.Module:
    return nn.Conv2d(8, 8, 3, **{"padding": 1, **options})


def depthwise() -> nn.Module:
    return conv(groups=8)


def wider() -> nn.Module:
    return nn.Conv2d(16, 8, 1)


def transposed() -> nn.Module:
    return nn.ConvTranspose2d(8, 8, 2, stride=2)


def line() -> nn.Module:
    return nn.Conv1d(8, 8, 3, padding=1)


def transposed_line() -> nn.Module:
    return nn.ConvTranspose1d(8, 8, 2, stride=2)


def linear() -> nn.Module:
    return nn.Linear(8, 8)


def pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


IMAGE, ALONE, LINE, ROWS, TOKENS = (1, 8, 8, 8), (8, 8, 8), (1, 8, 8), (2, 8), (1, 8, 8)
# Name → shape of the input, how the network is wired, and what makes its layers a, b, c.
PLACES: dict[str, tuple[tuple[int, ...], Callable[..., object], tuple[Callable[[], nn.Module], ...]]] = {
    "chain": (IMAGE, lambda n, op, x: n.b(op(n.a(x))), (conv, conv)),
    "behind relu": (IMAGE, lambda n, op, x: n.b(op(F.relu(n.a(x)))), (conv, conv)),
    "first": (IMAGE, lambda n, op, x: n.a(op(x)), (conv,)),
    "last": (IMAGE, lambda n, op, x: op(n.b(F.relu(n.a(x)))), (conv, conv)),
    "cat": (IMAGE, lambda n, op, x: n.c(torch.cat([op(n.a(x)), n.b(x)], 1)), (conv, conv, wider)),
    "cat both": (IMAGE, lambda n, op, x: n.c(torch.cat([op(n.a(x)), op(n.b(x))], 1)), (conv, conv, wider)),
    "add": (IMAGE, lambda n, op, x: n.c(op(n.a(x)) + n.b(x)), (conv, conv, conv)),
    "add both": (IMAGE, lambda n, op, x: n.c(op(n.a(x)) + op(n.b(x))), (conv, conv, conv)),
    "residual": (IMAGE, lambda n, op, x: n.b((y := n.a(x)) + op(y)), (conv, conv)),
    "residual layer": (IMAGE, lambda n, op, x: n.c((y := n.a(x)) + n.b(op(y))), (conv, conv, conv)),
    "gate": (IMAGE, lambda n, op, x: n.b((y := n.a(x)) * op(y)), (conv, conv)),
    "two readers": (IMAGE, lambda n, op, x: (n.b(y := op(n.a(x))), n.c(y), y), (conv, conv, conv)),
    "depthwise": (IMAGE, lambda n, op, x: n.c(n.b(op(n.a(x)))), (conv, depthwise, conv)),
    "behind depthwise": (IMAGE, lambda n, op, x: n.c(op(n.b(n.a(x)))), (conv, depthwise, conv)),
    "transposed": (IMAGE, lambda n, op, x: n.b(op(n.a(x[:, :, :4, :4]))), (transposed, conv)),
    "before transposed": (IMAGE, lambda n, op, x: n.b(op(n.a(x))), (conv, transposed)),
    "pool": (IMAGE, lambda n, op, x: n.b(F.max_pool2d(op(n.a(x)), 2)), (conv, conv)),
    "upsampled": (IMAGE, lambda n, op, x: n.b(F.interpolate(op(n.a(x)), scale_factor=2)), (conv, conv)),
    "mean": (IMAGE, lambda n, op, x: n.b(op(n.a(x)).mean((2, 3))), (conv, linear)),
    "average pool": (IMAGE, lambda n, op, x: n.b(pooled(op(n.a(x)))), (conv, linear)),
    "squeeze": (IMAGE, lambda n, op, x: n.c((y := n.a(x)) * op(n.b(y.mean((2, 3), True)))), (conv, conv, conv)),
    "patches": (IMAGE, lambda n, op, x: n.b(op(n.a(x)).flatten(2).transpose(1, 2)), (conv, linear)),
    "unbatched": (ALONE, lambda n, op, x: n.b(op(n.a(x))), (conv, conv)),
    "line": (LINE, lambda n, op, x: n.b(op(n.a(x))), (line, line)),
    "line residual": (LINE, lambda n, op, x: n.b((y := n.a(x)) + op(y)), (line, line)),
    "line transposed": (LINE, lambda n, op, x: n.b(op(n.a(x[:, :, :4]))), (transposed_line, line)),
    "line mean": (LINE, lambda n, op, x: n.b(op(n.a(x)).mean(2)), (line, linear)),
    "rows": (ROWS, lambda n, op, x: n.b(op(n.a(x))), (linear, linear)),
    "rows residual": (ROWS, lambda n, op, x: n.c((y := n.a(x)) + n.b(op(y))), (linear, linear, linear)),
    "rows cat": (
        ROWS,
        lambda n, op, x: n.c(torch.cat([op(n.a(x)), n.b(x)], 1)),
        (linear, linear, lambda: nn.Linear(16, 4)),
    ),
    "tokens": (TOKENS, lambda n, op, x: n.b(op(n.a(x))), (linear, linear)),
}


def pairs() -> Iterator[Case]:
    """Every op at every place that it fits."""
    for place, (shape, wire, layers) in PLACES.items():
        for name, op in {**OPS, **(IMAGE_OPS if len(shape) == 4 else {})}.items():
            if place == "squeeze" and name in IMAGE_OPS:
                continue  # it has one pixel there
            yield Case(f"{place}: {name}", _made(wire, op, layers), (shape,))


def _made(
    wire: Callable[..., object], op: Callable[[Tensor], Tensor], layers: tuple[Callable[[], nn.Module], ...]
) -> Callable[[], nn.Module]:
    return lambda: Place(wire, op, {name: make() for name, make in zip("abc", layers, strict=False)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    counts = {"ok": 0, "refused": 0, "wrong": 0}
    for verdict in isolated("network", [case for case in pairs() if options.only in case.name]):
        counts[verdict.kind] += 1
        if options.verbose or verdict.verdict != "ok":
            print(verdict.name, "|", verdict.verdict, "|", verdict.delegates, *verdict.outside, flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return bool(counts["wrong"])


if __name__ == "__main__":
    sys.exit(main())
