"""Tiny networks, one per pattern that int8 deployment meets, each quantized once for all tests that look at it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import ExportedProgram

from edgekit.quant.ptq.recipes import int8_static

torch.set_num_threads(1)  # two spin at every op, and are ten times slower beside other work
BATCHES = 12
IMAGE = ((2, 3, 8, 8),)


class Net(nn.Module):
    """Named layers, and a function of them and the inputs."""

    def __init__(self, forward: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.function(self, *inputs)


class Constant(nn.Module):
    """Holds a constant tensor."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.randn(shape))


def conv(inputs: int = 3, outputs: int = 8, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2, **options})


def loud(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer whose outputs reach far beyond ±3."""
    layer.weight.data *= 8
    return layer


def normed(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A norm with statistics and parameters of its own."""
    with torch.no_grad():
        norm.running_mean.uniform_(0, 0.5)
        norm.running_var.uniform_(0.2, 1)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    return norm


def sloped(prelu: nn.PReLU) -> nn.PReLU:
    """One with a slope of its own for each channel, some of them negative."""
    nn.init.uniform_(prelu.weight, -0.1, 0.4)
    return prelu


def squeeze_excite(n: Net, x: torch.Tensor) -> torch.Tensor:
    x = F.relu(n.a(x))
    gate = F.relu(n.down(x.mean((2, 3), keepdim=True)))
    return n.b(x * torch.sigmoid(n.up(gate)))


def attention(n: Net, x: torch.Tensor) -> torch.Tensor:
    batch, length, width = x.shape
    query, key, value = (layer(x).view(batch, length, 2, width // 2).transpose(1, 2) for layer in (n.q, n.k, n.v))
    scores = torch.softmax(query @ key.transpose(2, 3) / (width // 2) ** 0.5, dim=-1)
    return n.out((scores @ value).transpose(1, 2).reshape(batch, length, width))


def masked_attention(mask: float) -> Callable[[Net, torch.Tensor], torch.Tensor]:
    def forward(n: Net, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.triu(torch.ones(x.shape[1], x.shape[1]), 1) * mask
        hidden = torch.nan_to_num(hidden, nan=0.0, neginf=mask)
        scores = torch.softmax(n.q(x) @ n.k(x).transpose(1, 2) + hidden, dim=-1)
        return n.out(scores @ n.v(x))

    return forward


def linears(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*size) for name, size in sizes.items()}


WIDE = dict.fromkeys(("q", "k", "v", "out"), (16, 16))


@dataclass(frozen=True)
class Case:
    """A network, the shapes of its float inputs, and what is claimed of it."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = IMAGE
    integers: int = 0  # how many of the inputs, the last ones, are indices below 8


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def net(forward: Callable[..., object], **layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Net(forward, **{name: make() for name, make in layers.items()})


CASES: dict[str, Case] = {
    "conv_relu": Case(lambda: nn.Sequential(conv(), nn.ReLU())),
    "conv_relu6_bn": Case(lambda: nn.Sequential(conv(bias=False), nn.BatchNorm2d(8), nn.ReLU6(), conv(8))),
    "conv_hardswish": Case(lambda: nn.Sequential(conv(), nn.Hardswish(), conv(8), nn.Hardsigmoid())),
    "loud_hardswish": Case(
        lambda: nn.Sequential(loud(conv()), nn.Hardswish(), conv(8), nn.AdaptiveAvgPool2d(1), conv(8, 4, 1))
    ),
    "residual": Case(lambda: Net(lambda n, x: n.b(F.relu((y := n.a(x)) + n.c(y))), a=conv(), b=conv(8), c=conv(8, 8))),
    "concat": Case(
        lambda: Net(lambda n, x: n.c(torch.cat([n.a(x), F.relu(n.b(x))], 1)), a=conv(), b=conv(), c=conv(16))
    ),
    "dense": Case(
        lambda: Net(
            lambda n, x: n.c(torch.cat([torch.cat([y := n.a(x), n.b(y)], 1), y], 1)),
            a=conv(),
            b=conv(8),
            c=conv(24),
        )
    ),
    "mul_scalar": Case(lambda: Net(lambda n, x: n.b(n.a(x) * 0.5 + 1), a=conv(), b=conv(8))),
    "mul_constant": Case(
        lambda: Net(lambda n, x: n.b(n.a(x) * n.c.value), a=conv(), b=conv(8), c=Constant(1, 8, 1, 1))
    ),
    "squeeze_excite": Case(lambda: Net(squeeze_excite, a=conv(), down=conv(8, 4, 1), up=conv(4, 8, 1), b=conv(8))),
    "max_pool": Case(lambda: nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), conv(8))),
    "norm_behind": Case(
        lambda: nn.Sequential(conv(), nn.ReLU(), normed(nn.BatchNorm2d(8)), nn.MaxPool2d(2), conv(8)),
    ),
    "prelu": Case(lambda: nn.Sequential(conv(), sloped(nn.PReLU(8)), nn.MaxPool2d(2), conv(8))),
    "transposed_1d": Case(
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 4, 4, stride=2), nn.ReLU()),
        ((2, 3, 16),),
    ),
    "avg_pool": Case(lambda: nn.Sequential(conv(), nn.ReLU(), nn.AvgPool2d(2), conv(8))),
    "resize": Case(lambda: nn.Sequential(conv(), nn.Upsample(scale_factor=2), conv(8))),
    "bilinear": Case(lambda: nn.Sequential(conv(), nn.Upsample(scale_factor=2, mode="bilinear"), conv(8))),
    "moves": Case(
        lambda: Net(
            lambda n, x: n.b(
                F.pad(n.a(x).permute(0, 1, 3, 2)[:, :, 1:], (1, 2, 0, 1)).reshape(2, 4, 11, -1)[:, :, :, 0:16]
            ),
            a=conv(),
            b=conv(4, 4),
        )
    )
    if False
    else Case(
        lambda: Net(
            lambda n, x: n.b(F.pad(n.a(x).permute(0, 1, 3, 2)[:, :, 1:], (1, 0, 2, 0)).reshape(2, 4, 9, 18)),
            a=conv(),
            b=conv(4, 4),
        )
    ),
    "linear_chain": Case(lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), ((4, 16),)),
    "linear_3d": Case(lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), ((2, 4, 16),)),
    "attention": Case(lambda: Net(attention, **linears(**WIDE)), ((2, 6, 16),)),
    "masked": Case(lambda: Net(masked_attention(-1e9), **linears(**WIDE)), ((2, 6, 16),)),
    "transposed": Case(lambda: nn.Sequential(conv(), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.ReLU())),
    "transposed_groups": Case(lambda: nn.Sequential(conv(), nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2))),
    "conv1d": Case(lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)), ((2, 3, 16),)),
    "depthwise": Case(lambda: nn.Sequential(conv(3, 8), nn.ReLU6(), conv(8, 8, groups=8), nn.ReLU6(), conv(8, 4, 1))),
    "head": Case(
        lambda: nn.Sequential(conv(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 4))
    ),
    "two_inputs": Case(
        lambda: Net(lambda n, x, i: n.b(n.a(x) + n.e(i)), a=nn.Linear(16, 8), e=nn.Embedding(8, 8), b=nn.Linear(8, 4)),
        ((4, 16), (4,)),
        integers=1,
    ),
    "gelu_sort": Case(
        lambda: Net(lambda n, x: n.b(F.gelu(n.a(x)).sort(-1).values), a=nn.Linear(16, 8), b=nn.Linear(8, 4)), ((4, 16),)
    ),
    "two_outputs": Case(
        lambda: Net(
            lambda n, x: (n.b(y := F.relu(n.a(x))), torch.sigmoid(n.c(y))), a=conv(), b=conv(8, 4), c=conv(8, 2)
        )
    ),
    "shared_conv": Case(lambda: Net(lambda n, x: n.b(F.relu(n.b(n.a(x)))), a=conv(), b=conv(8, 8))),
    "shared_transposed": Case(
        lambda: Net(lambda n, x: n.b(F.relu(n.b(n.a(x)))), a=conv(3, 4), b=nn.ConvTranspose2d(4, 4, 2, stride=2))
    ),
    "asymmetric_pad": Case(
        lambda: nn.Sequential(conv(), nn.ReLU6(), nn.ZeroPad2d((0, 1, 0, 1)), conv(8, 4, padding=0, stride=2))
    ),
    "split": Case(lambda: Net(lambda n, x: n.b(torch.cat([*reversed(n.a(x).chunk(2, 1))], 1)), a=conv(), b=conv(8))),
    "same_padding": Case(lambda: nn.Sequential(conv(padding="same"), nn.ReLU(), conv(8, 4, 2, padding="same"))),
    "dead": Case(lambda: dead()),
    "add_alpha": Case(lambda: Net(lambda n, x: n.c(torch.add(n.a(x), n.b(x), alpha=2)), a=conv(), b=conv(), c=conv(8))),
}


def dead() -> nn.Module:
    layers = nn.Sequential(conv(), nn.ReLU(), conv(8, 8))
    with torch.no_grad():
        layers[0].weight[2] = 0
        layers[0].bias[2] = 1.5
    return layers


class Batches:
    """Calibration batches, made anew in each pass over them."""

    def __init__(self, case: Case, count: int = BATCHES) -> None:
        self.case, self.count = case, count

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        generator = torch.Generator().manual_seed(1)
        floats = len(self.case.shapes) - self.case.integers
        for _ in range(self.count):
            yield tuple(
                torch.randn(shape, generator=generator)
                if index < floats
                else torch.randint(0, 8, shape, generator=generator)
                for index, shape in enumerate(self.case.shapes)
            )


@dataclass(frozen=True)
class Quantized:
    module: nn.Module
    batches: tuple[tuple[torch.Tensor, ...], ...]
    program: ExportedProgram


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name].make().eval()


@functools.cache
def quantized(name: str) -> Quantized:
    module, batches = build(name), Batches(CASES[name])
    return Quantized(module, tuple(batches), int8_static(module, next(iter(batches)), batches).program)


def flat(outputs: object) -> list[torch.Tensor]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Signal to quantization noise ratio in dB."""
    noise = (reference - other).double().square().mean()
    return float(10 * torch.log10(reference.double().square().mean() / noise.clamp(min=1e-30)))
