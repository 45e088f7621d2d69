"""Cross-layer equalization against the network it is to leave unchanged, and what int8 loses without it."""

import pytest
import torch
import torch.nn.functional as F
from int8_nets import CASES, Batches, Net, build, conv, flat, sqnr
from torch import nn

from edgekit.quant.graph.passes import capture
from edgekit.quant.ptq import recipes
from edgekit.quant.ptq.cross_layer_equalization import apply, equalize, find_groups

# network → writers, readers of each group of tensors that may be scaled together
GROUPS = {
    "chain": (lambda: nn.Sequential(conv(), nn.ReLU(), conv(8, 4)), [(1, 1)]),
    "depthwise": (
        lambda: nn.Sequential(conv(), nn.ReLU(), conv(8, 8, groups=8), nn.ReLU(), conv(8, 4, 1)),
        [(1, 1)] * 2,
    ),
    "multiplier": (lambda: nn.Sequential(conv(), conv(8, 16, groups=8), conv(16, 4, 1)), [(1, 1)] * 2),
    "clip": (lambda: nn.Sequential(conv(), nn.ReLU6(), conv(8, 4)), []),
    "groups": (lambda: nn.Sequential(conv(), nn.ReLU(), conv(8, 4, groups=2)), []),
    "residual": (
        lambda: Net(lambda n, x: n.c(F.relu((y := F.relu(n.a(x))) + n.b(y))), a=conv(), b=conv(8, 8), c=conv(8)),
        [(2, 2)],
    ),
    "head": (
        lambda: nn.Sequential(
            conv(), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        ),
        [(1, 1)],
    ),
    "concat": (lambda: Net(lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], 1)), a=conv(), b=conv(), c=conv(16)), []),
    "linear on sequences": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), conv()), []),
    "an image of its own": (lambda: nn.Sequential(conv(3, 3), nn.ReLU(), nn.Conv3d(1, 4, 3)), []),
    "output": (lambda: Net(lambda n, x: (y := n.a(x), n.b(y)), a=conv(), b=conv(8)), []),
}


def uneven(spread: float) -> nn.Sequential:
    """A small MobileNet whose channels differ in range by up to 10^(2·spread), and yet compute the same for any spread.

    Folding BatchNorm into depthwise networks makes such channels.
    """
    torch.manual_seed(0)
    a, b, c = conv(3, 32), conv(32, 32, groups=32), conv(32, 16, 1)
    head = nn.Linear(16, 10)
    first, second = (10 ** (spread * (2 * torch.rand(32) - 1)) for _ in range(2))
    a.weight.data *= first.reshape(-1, 1, 1, 1)
    a.bias.data *= first
    b.weight.data *= (second / first).reshape(-1, 1, 1, 1)
    b.bias.data *= second
    c.weight.data /= second.reshape(1, -1, 1, 1)
    return nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", GROUPS)
def test_what_may_be_scaled_together(name: str) -> None:
    torch.manual_seed(0)
    make, expected = GROUPS[name]
    module, x = make().eval(), torch.randn(1, 3, 8, 8)
    graph = capture(module, (x,))
    groups = [g for g in find_groups(graph) if g.writers and g.readers and not g.fixed]
    assert [(len(g.writers), len(g.readers)) for g in groups] == expected
    for group in groups:
        channels = group.writers[0].args[1].meta["val"].shape[0]
        apply(graph, group, torch.logspace(-2, 2, channels))
    graph.recompile()
    for one, other in zip(flat(module(x)), flat(graph(x)), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_every_network_computes_what_it_did(name: str) -> None:
    module, batches = build(name), list(Batches(CASES[name]))
    graph = capture(module, batches[0])
    equalize(graph, batches)
    for one, other in zip(flat(module(*batches[0])), flat(graph(*batches[0])), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * max(float(one.abs().max()), 1e-3))


@torch.no_grad()
def test_channels_of_extreme_range_collapse_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = uneven(spread=2)
    images = torch.randn(40, 3, 16, 16)
    batches = [(image[None],) for image in images[:24]]

    def loss() -> tuple[float, tuple[str, ...]]:
        compressed = recipes.int8_static(module, batches[0], batches)
        graph = compressed.program.module()
        outputs = torch.cat([graph(image[None]) for image in images])
        return sqnr(module(images), outputs), compressed.notes

    remedied, notes = loss()
    assert remedied > 40
    assert any("cross-layer equalization" in note for note in notes)
    monkeypatch.setattr(recipes, "equalize", lambda *_: ())
    collapsed, notes = loss()
    assert collapsed < 15
    assert notes == ()


@torch.no_grad()
def test_layers_kept_in_float_are_left_alone() -> None:
    module, x = uneven(spread=2), torch.randn(1, 3, 16, 16)
    graph = capture(module, (x,))
    layers = frozenset(node.name for group in find_groups(graph) for node in group.readers)
    assert equalize(graph, [(x,)], keep_float=layers) == ()
