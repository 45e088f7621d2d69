"""SmoothQuant: exact in float, and what saves a transformer with outlier channels at static int8."""

from __future__ import annotations

import pytest
import torch
from attention_nets import Block
from int8_nets import Net, sqnr
from torch import nn

from edgekit.quant.graph.passes import aten, attribute, capture
from edgekit.quant.ptq import recipes
from edgekit.quant.ptq.quantizer import feeds_residual, is_residual
from edgekit.quant.ptq.recipes import int8_static
from edgekit.quant.ptq.smoothquant import find_groups, smooth

WIDTH = 32


def batches(count: int = 8, seed: int = 1) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, 12, WIDTH, generator=generator),) for _ in range(count)]


@torch.no_grad()
def transformer(outliers: float = 200.0) -> nn.Module:
    """Two pre-norm blocks; behind each LayerNorm two channels are far larger than the rest, as trained ones have them.

    What reads these channels has small weights there, so that they matter as much as any other.
    """
    torch.manual_seed(0)
    blocks = [Block(WIDTH, 2, 2 * WIDTH, nn.GELU()) for _ in range(2)]
    for block in blocks:
        for norm, reader in ((block.norms[0], block.attention.qkv), (block.norms[1], block.mlp[0])):
            norm.weight[[3, 17]] *= outliers
            reader.weight[:, [3, 17]] /= outliers
    return nn.Sequential(*blocks, nn.Linear(WIDTH, 8)).eval()


@torch.no_grad()
def test_outlier_channels_collapse_without_smoothing_and_not_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module, (x,) = transformer(), batches(1, seed=2)[0]
    made = int8_static(module, (x,), batches())
    smoothed = sqnr(module(x), made.program.module()(x))
    assert any("SmoothQuant evens out the inputs of linear layers behind 4 of 4 LayerNorms" in n for n in made.notes)
    monkeypatch.setattr(recipes, "smooth", lambda *_: ())
    plain = sqnr(module(x), int8_static(module, (x,), batches()).program.module()(x))
    assert plain < 15 and smoothed > 25, (plain, smoothed)


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_smoothing_is_exact_in_float(affine: bool, shared: bool) -> None:
    torch.manual_seed(0)
    scale = torch.ones(WIDTH)
    scale[4] = 500.0
    net = Net(
        lambda n, x: (n.a(y := n.norm(x * scale)), n.b(y), *([y] if shared else [])),
        norm=nn.LayerNorm(WIDTH, elementwise_affine=affine), a=nn.Linear(WIDTH, 5), b=nn.Linear(WIDTH, 7, bias=False),
    ).eval()  # fmt: skip
    (x,) = batches(1)[0]
    graph = capture(net, (x,))
    expected = graph(x)
    assert smooth(graph, batches())
    for a, b in zip(expected, graph(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    norms = [n for n in graph.graph.nodes if n.target == aten.layer_norm.default]
    assert len(norms) == 1 + shared
    scaled = [attribute(graph, n.args[2]) for n in norms if n.args[2] is not None]
    assert any(float(weight.max() / weight.min()) > 5 for weight in scaled)


def test_even_channels_are_left_alone() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)).eval()
    graph = capture(module, batches(1)[0])
    targets = [n.target for n in graph.graph.nodes]
    assert smooth(graph, batches()) == () and [n.target for n in graph.graph.nodes] == targets


def test_kept_layers_are_not_smoothed() -> None:
    graph = capture(transformer(), batches(1)[0])
    linear = [n.name for n in graph.graph.nodes if n.target == aten.linear.default]
    assert len(find_groups(graph, frozenset())) == 4
    assert len(find_groups(graph, frozenset(linear[:1]))) == 3
    assert smooth(graph, batches(), frozenset(linear)) == ()


def test_residual_stream_stays_float() -> None:
    graph = capture(transformer(), batches(1)[0])
    sums = [n for n in graph.graph.nodes if n.target == aten.add.Tensor]
    assert [is_residual(n) for n in sums] == [True, True, True, False]  # a linear head reads the last one
    layers = [n for n in graph.graph.nodes if n.target == aten.linear.default]
    assert [feeds_residual(n) for n in layers] == [False, True, False, True, False, True, False, False, False]


@torch.no_grad()
def test_without_norms_nothing_is_read() -> None:
    graph = capture(nn.Sequential(nn.Linear(WIDTH, 4)).eval(), batches(1)[0])
    assert smooth(graph, iter(())) == ()
