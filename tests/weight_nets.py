"""Tiny networks for the precisions that need no calibration data, each compressed once for all tests."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from int8_nets import Net, attention, conv
from torch import nn
from torch.export import ExportedProgram

from edgekit.quant.ptq.recipes import RECIPES, Compressed

PRECISIONS = ("int8-dynamic", "int8-weight-only")


@dataclass(frozen=True)
class Case:
    """A network, its input's shape, how large an index may be (0: the input is float), and what it is made of.

    `layers` counts by name what each precision quantizes; convolutions are left out by int8-dynamic.
    """

    module: nn.Module
    shape: tuple[int, ...]
    indices: int
    layers: dict[str, int]


def tied() -> nn.Module:
    net = Net(lambda n, x: n.out(F.relu(n.e(x))), e=nn.Embedding(64, 32), out=nn.Linear(32, 64, bias=False))
    net.out.weight = net.e.weight
    return net


def recurrent(layer: nn.Module, width: int) -> nn.Module:
    return Net(lambda n, x: n.f(n.l(n.e(x))[0][:, -1]), e=nn.Embedding(50, 16), l=layer, f=nn.Linear(width, 5))


@functools.cache
def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    width = {"batch_first": True}
    found = {
        "mlp": Case(
            nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32, bias=False), nn.GELU(), nn.Linear(32, 8)),
            (3, 48), 0, {"linear": 3},
        ),
        "attention": Case(
            Net(attention, q=nn.Linear(32, 32), k=nn.Linear(32, 32), v=nn.Linear(32, 32), out=nn.Linear(32, 32)),
            (2, 7, 32), 0, {"linear": 4},
        ),
        "shared": Case(Net(lambda n, x: n.a(F.relu(n.a(x))) + n.b(x), a=nn.Linear(32, 32), b=nn.Linear(32, 32)),
                       (2, 5, 32), 0, {"linear": 3}),
        "tied": Case(tied(), (2, 6), 64, {"embedding": 1, "linear": 1}),
        "lstm": Case(recurrent(nn.LSTM(16, 24, **width), 24), (2, 3), 50, {"embedding": 1, "LSTM": 1, "linear": 1}),
        "lstm_two_ways": Case(
            recurrent(nn.LSTM(16, 12, 2, bidirectional=True, **width), 24),
            (1, 2), 50, {"embedding": 1, "LSTM": 1, "linear": 1},
        ),
        "gru": Case(recurrent(nn.GRU(16, 24, **width), 24), (2, 3), 50, {"embedding": 1, "GRU": 1, "linear": 1}),
        "conv_head": Case(
            nn.Sequential(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2), nn.ReLU(),
                          nn.Flatten(), nn.Linear(8 * 16 * 16, 16)),
            (1, 3, 8, 8), 0, {"convolution": 1, "transposed convolution": 1, "linear": 1},
        ),
        "conv1d": Case(
            nn.Sequential(nn.Conv1d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 32)),
            (2, 4, 8), 0, {"convolution": 1, "linear": 1},
        ),
    }  # fmt: skip
    for case in found.values():
        case.module.eval()
    return found


NAMES = ("mlp", "attention", "shared", "tied", "lstm", "lstm_two_ways", "gru", "conv_head", "conv1d")


def batch(name: str, seed: int = 1) -> tuple[torch.Tensor, ...]:
    case, generator = cases()[name], torch.Generator().manual_seed(seed)
    if case.indices:
        return (torch.randint(0, case.indices, case.shape, generator=generator),)
    return (torch.randn(case.shape, generator=generator),)


@functools.cache
def compressed(name: str, precision: str) -> Compressed:
    return RECIPES[precision].apply(cases()[name].module, batch(name), (), frozenset())


def program(name: str, precision: str) -> ExportedProgram:
    return compressed(name, precision).program
