"""The quantizer's tables and torch's weighted layers, tried one by one: int8 files of each format against the graph.

Every row is quantized and run in the three runtimes: the graph has to be near eager torch, and each file near it.
`python tests/quant/test_audit.py [PART OF A NAME]` tries all rows; pytest those of SOME.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import pytest
import torch
from formats import RUNTIMES, through
from int8_nets import chain, conv, flat, net, sqnr
from torch import nn

from edgekit.errors import EdgeKitError
from edgekit.quant.ptq.recipes import int8_static

GRAPH_DB, FILE_DB = 25.0, 35.0
SHAPES = {1: (1, 4, 12), 2: (1, 4, 9, 10), 3: (1, 4, 5, 6, 7)}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
OPTIONS: dict[str, dict] = {
    "plain": {},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "dilated": {"dilation": 2},
    "strided": {"stride": 2, "padding": 1},
    "biasless": {"bias": False},
}

Row = tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]


def _rows() -> Iterator[tuple[str, Row]]:
    for rank, shape in SHAPES.items():
        plain, transposed = CONVOLUTIONS[rank], TRANSPOSED[rank]
        for name, options in OPTIONS.items():
            layer = lambda made=plain, given=options: made(4, 8, 3, **given)  # noqa: E731
            yield f"conv{rank}d {name}", (chain_of(layer, nn.ReLU), (shape,))
        for name, options in {**OPTIONS, "outputs": {"stride": 2, "padding": 1, "output_padding": 1}}.items():
            layer = lambda made=transposed, given=options: made(4, 8, 3, **given)  # noqa: E731
            first = lambda made=plain: made(4, 4, 3, padding=1)  # noqa: E731
            last = lambda made=plain: made(8, 2, 1)  # noqa: E731
            yield f"transposed{rank}d {name}", (chain_of(first, nn.ReLU, layer, nn.ReLU, last), (shape,))
    for rank in range(1, 6):
        shape = (*(2,) * (rank - 1), 8)
        yield f"linear rank {rank}", (chain_of(lambda: nn.Linear(8, 4), nn.ReLU), (shape,))
    for rank in range(2, 6):
        shape = (2, 4, *(5,) * (rank - 2))
        yield f"prelu rank {rank}", (chain_of(lambda: nn.PReLU(4)), (shape,))
    image, row = ((1, 3, 8, 8),), ((2, 8),)
    others: dict[str, Row] = {
        "prelu of one slope": (chain_of(conv, nn.PReLU, lambda: conv(8)), image),
        "prelu and pool": (chain_of(conv, lambda: nn.PReLU(8), lambda: nn.MaxPool2d(2), lambda: conv(8)), image),
        "prelu of rows": (chain_of(lambda: nn.Linear(8, 8), lambda: nn.PReLU(8), lambda: nn.Linear(8, 4)), row),
        "norm of images": (chain_of(conv, nn.ReLU, lambda: nn.BatchNorm2d(8), lambda: conv(8)), image),
        "norm of rows": (
            chain_of(lambda: nn.Linear(8, 8), nn.ReLU, lambda: nn.BatchNorm1d(8), lambda: nn.Linear(8, 4)),
            row,
        ),
        "group norm": (chain_of(conv, lambda: nn.GroupNorm(2, 8), lambda: conv(8)), image),
        "max pool 1d": (
            chain_of(lambda: nn.Conv1d(4, 8, 3), nn.ReLU, lambda: nn.MaxPool1d(2), lambda: nn.Conv1d(8, 4, 3)),
            ((1, 4, 12),),
        ),
        "bilinear": (net(lambda n, x, y: n.b(x, y), b=lambda: nn.Bilinear(4, 5, 6)), ((2, 4), (2, 5))),
        "attention": (
            net(lambda n, x: n.a(x, x, x)[0], a=lambda: nn.MultiheadAttention(16, 2, batch_first=True)),
            ((2, 6, 16),),
        ),
        "multiplied": (net(lambda n, x: n.a(x) * n.b(x), a=conv, b=conv), image),
        "mean": (net(lambda n, x: n.a(x).mean((2, 3)), a=conv), image),
        "average pool": (chain_of(conv, lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)), image),
        "shuffles": (chain_of(conv, lambda: nn.PixelShuffle(2), lambda: conv(2)), image),
        "sigmoid": (chain_of(conv, nn.Sigmoid), image),
    }
    yield from others.items()


def chain_of(*makers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: chain(*(make() for make in makers))()


ROWS = dict(_rows())
SOME = ("transposed1d groups", "conv3d plain", "transposed3d outputs", "bilinear", "norm of rows", "max pool 1d")


def audit(name: str) -> dict[str, float | str]:
    """Returns the SQNR in dB of the graph to eager torch and of each file to the graph, or why a file does not run."""
    torch.manual_seed(0)
    make, shapes = ROWS[name]
    module = make().eval()
    batches = [tuple(torch.randn(shape) for shape in shapes) for _ in range(4)]
    program = int8_static(module, batches[0], batches).program
    found: dict[str, float | str] = {}
    with torch.no_grad():
        graph = flat(program.module()(*batches[0]))
        found["graph"] = _worst(flat(module(*batches[0])), graph)
        for format in RUNTIMES:
            try:
                found[format] = _worst(graph, through(program, format, batches[0]))
            except (EdgeKitError, RuntimeError, ValueError) as error:
                found[format] = f"{type(error).__name__}: {error}"
    return found


def _worst(reference: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return min(sqnr(a, b) for a, b in zip(reference, other, strict=True))


def problems(found: dict[str, float | str]) -> list[str]:
    """Says which of the results of `audit` are not as they should be."""
    limits = {"graph": GRAPH_DB}
    return [
        f"{place}: {value}"
        for place, value in found.items()
        if isinstance(value, str) or value < limits.get(place, FILE_DB)
    ]


@pytest.mark.parametrize("name", SOME)
def test_int8_files_compute_what_the_graph_does(name: str) -> None:
    assert problems(audit(name)) == []


if __name__ == "__main__":
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    wrong = 0
    for name in ROWS:
        if part in name:
            results = audit(name)
            wrong += bool(problems(results))
            shown = ", ".join(f"{k} {v if isinstance(v, str) else f'{v:.1f} dB'}" for k, v in results.items())
            print(f"{'WRONG' if problems(results) else 'ok':5} {name}: {shown}", flush=True)
    sys.exit(wrong > 0)
