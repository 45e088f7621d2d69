"""Constant folding: what no input reaches is a constant of the captured graph, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from int8_nets import flat, sqnr
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from edgekit.quant.graph.passes import aten, capture, is_attribute
from edgekit.quant.ptq.quantizer import WEIGHTED
from edgekit.quant.ptq.recipes import int8_static, int8_weight_only

IMAGE = (2, 3, 8, 8)


class Computed(nn.Module):
    """A function of itself and the input, with parameters and buffers."""

    def __init__(self, function: Callable[..., object], **members: torch.Tensor | nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: torch.Tensor) -> object:
        return self.function(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.tanh(weight) / 2


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


def standardized(m: Computed, x: torch.Tensor) -> torch.Tensor:
    w = m.w - m.w.mean((1, 2, 3), keepdim=True)
    return F.conv2d(x, w / w.std((1, 2, 3), keepdim=True))


def coordinates(m: Computed, x: torch.Tensor) -> torch.Tensor:
    batch, _, height, width = x.shape
    rows = torch.linspace(-1, 1, height).view(1, 1, height, 1).expand(batch, 1, height, width)
    columns = torch.arange(width, dtype=torch.float32).view(1, 1, 1, width).expand(batch, 1, height, width) / width
    return m.conv(torch.cat([x, rows, columns], 1))


def relative_bias(m: Computed, x: torch.Tensor) -> torch.Tensor:
    places = torch.arange(8)
    bias = m.table[(places[:, None] - places[None] + 7).flatten()].view(8, 8, 3).permute(2, 0, 1)
    return torch.softmax(x @ x.transpose(2, 3) + bias, -1) @ x


def sinusoids(m: Computed, x: torch.Tensor) -> torch.Tensor:
    places, rates = torch.arange(8.0)[:, None], torch.exp(torch.arange(0, 8, 2) * -1.15)
    return m.layer(x + torch.stack([torch.sin(places * rates), torch.cos(places * rates)], -1).flatten(1))


def masked(m: Computed, x: torch.Tensor) -> torch.Tensor:
    mask = torch.full((8, 8), float("-inf")).triu(1)
    return torch.softmax(x.masked_fill(mask.isinf(), -1e9) + torch.ones_like(x).triu(), -1)


def layered(m: Computed, x: torch.Tensor) -> torch.Tensor:
    first, second = m.w.chunk(2)  # a result of several tensors, between constants
    return F.conv2d(x, first * 2) + F.conv2d(x, second + first)


# name → a module, and the ops that are left of it
CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "conv2d"),
    "old_weight_norm": (lambda: nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), "conv2d"),
    "weight_norm_transposed": (lambda: nn.utils.weight_norm(nn.ConvTranspose2d(3, 4, 3)), "conv_transpose2d"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 4)), "linear"),
    "old_spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(8, 4)), "linear"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), "linear"),
    "parametrization": (lambda: parametrized(nn.Conv2d(3, 4, 3)), "conv2d"),
    "batch_norm_behind": (
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3, bias=False)), nn.BatchNorm2d(4)),
        "conv2d",
    ),
    "weight_standardization": (lambda: Computed(standardized, w=parameter(4, 3, 3, 3)), "conv2d"),
    "scaled": (lambda: Computed(lambda m, x: (m.w * m.g) @ x, w=parameter(8, 8), g=parameter(8, 8)), "matmul"),
    "low_rank": (lambda: Computed(lambda m, x: F.linear(x, m.a @ m.b), a=parameter(5, 2), b=parameter(2, 8)), "linear"),
    "transposed": (lambda: Computed(lambda m, x: x @ m.w.t(), w=parameter(5, 8)), "matmul"),
    "coordinates": (lambda: Computed(coordinates, conv=nn.Conv2d(5, 4, 3)), "cat conv2d"),
    "relative_bias": (
        lambda: Computed(relative_bias, table=parameter(15, 3)),
        "transpose matmul add softmax matmul",
    ),
    "sinusoids": (lambda: Computed(sinusoids, layer=nn.Linear(8, 4)), "add linear"),
    "learned_positions": (lambda: Computed(lambda m, x: x + m.e(torch.arange(8)), e=nn.Embedding(9, 8)), "add"),
    "mask": (lambda: Computed(masked), "masked_fill add softmax"),
    "several": (lambda: Computed(layered, w=parameter(8, 3, 3, 3)), "conv2d conv2d add"),
    "literal": (lambda: Computed(lambda m, x: x * torch.tensor([[0.1] * 8]) + 1), "mul add"),
    "zeros_of_a_shape": (lambda: Computed(lambda m, x: torch.cat([x, x.new_zeros(2, 1, 8, 8)], 1)), "cat"),
    # what is no constant, or better stays computed
    "input": (lambda: Computed(lambda m, x: F.linear(x, x[0, 0] * 2)), "select select mul linear"),
    "random": (lambda: Computed(lambda m, x: x + torch.randn(8) * 0), "randn mul add"),
    "returned": (lambda: Computed(lambda m, x: (x + 1, m.w * 2), w=parameter(4)), "add mul"),
    "broadcast": (lambda: Computed(lambda m, x: x.sum() + m.w.expand(512, 1024), w=parameter(1, 1)), "sum expand add"),
    "enlarged": (lambda: Computed(lambda m, x: x.sum() + (m.w * 2).expand(999, 999), w=parameter(1)), "sum expand add"),
    "read_elsewhere": (
        lambda: Computed(
            lambda m, x: m.e(x.argmax(-1)) @ (m.e.weight.t() * 2), e=nn.Embedding(8000, 64)
        ),
        "argmax embedding numpy_T mul matmul",
    ),
}  # fmt: skip


def ops(graph: torch.fx.Graph) -> list[str]:
    return sorted(n.target.__name__.split(".")[0] for n in graph.nodes if n.op == "call_function")


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_what_no_input_reaches_is_folded(name: str) -> None:
    torch.manual_seed(0)
    make, expected = CASES[name]
    module, x = make().eval(), torch.randn(IMAGE)
    graph = capture(module, (x,))
    left = {"t": "numpy_T"}
    assert [left.get(op, op) for op in ops(graph.graph)] == sorted(expected.split())
    if name != "random":
        for a, b in zip(flat(module(x)), flat(graph(x)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_state_is_no_constant() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + self.count * 2
            self.count.add_(1)
            return y

    graph = capture(Counts(), (torch.randn(IMAGE),))
    with torch.no_grad():
        first, second = (flat(graph(torch.zeros(IMAGE)))[-1] for _ in range(2))
    assert torch.equal(second - first, torch.full(IMAGE, 2.0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["weight_norm", "old_weight_norm", "old_spectral_norm", "weight_standardization"])
def test_computed_weights_are_quantized(name: str) -> None:
    torch.manual_seed(0)
    module = CASES[name][0]().eval()
    batches = [(torch.randn(IMAGE),) for _ in range(4)]
    for program in (int8_static(module, batches[0], batches).program, int8_weight_only(module, batches[0]).program):
        (layer,) = [n for n in program.graph.nodes if n.target in WEIGHTED]
        assert "dequantize" in str(layer.args[1].target)
        assert sqnr(module(*batches[0]), flat(program.module()(*batches[0]))[0]) > 25


def test_folding_leaves_the_module_alone() -> None:
    module = parametrizations.weight_norm(nn.Conv2d(3, 4, 3)).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    graph = capture(module, (torch.randn(IMAGE),))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    (layer,) = [n for n in graph.graph.nodes if n.target == aten.conv2d.default]
    assert is_attribute(layer.args[1])
