"""GPTQ and bias correction: never worse than rounding to the nearest, where a layer's inputs are correlated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgekit.errors import EdgeKitError
from edgekit.quant.graph.passes import attribute, capture
from edgekit.quant.ptq import gptq_rounding
from edgekit.quant.ptq.gptq_rounding import channel_scales, gptq, round_weights, roundable


class Case(NamedTuple):
    """One layer and the shape of its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


IMAGE = (4, 6, 9, 8)
CASES = {
    "linear": Case(lambda: nn.Linear(12, 5), (16, 12)),
    "linear_no_bias": Case(lambda: nn.Linear(12, 5, bias=False), (16, 12)),
    "linear_3d": Case(lambda: nn.Linear(12, 5), (4, 7, 12)),
    "linear_1d": Case(lambda: nn.Linear(12, 5), (12,)),
    "conv": Case(lambda: nn.Conv2d(6, 8, 3), IMAGE),
    "conv_stride_padding": Case(lambda: nn.Conv2d(6, 8, 3, stride=(2, 1), padding=(1, 2)), IMAGE),
    "conv_dilation": Case(lambda: nn.Conv2d(6, 8, (3, 2), dilation=(2, 3), padding=1), IMAGE),
    "conv_groups": Case(lambda: nn.Conv2d(6, 8, 3, groups=2, padding=1), IMAGE),
    "conv_pointwise": Case(lambda: nn.Conv2d(6, 8, 1, bias=False), IMAGE),
    "depthwise": Case(lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), IMAGE),
    "depthwise_multiplier": Case(lambda: nn.Conv2d(6, 12, 3, groups=6, stride=2), IMAGE),
    "conv1d": Case(lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1, dilation=2), (4, 6, 20)),
    "conv1d_groups": Case(lambda: nn.Conv1d(6, 9, 4, groups=3), (4, 6, 20)),
}


def correlated(shape: tuple[int, ...], seed: int, count: int = 12) -> list[tuple[torch.Tensor]]:
    """Batches whose values depend on their neighbors in every dimension, and whose mean is not 0."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count if len(shape) > 1 else 5 * count):
        x = torch.randn(shape, generator=generator)
        for dim in range(min(1, len(shape) - 1), len(shape)):
            x = x + 0.9 * x.roll(1, dim) + 0.5 * x.roll(2, dim)
        batches.append((x.relu(),))
    return batches


def test_inputs_that_never_change_are_rounded_too() -> None:
    """Their variance is rounding noise, of either sign."""
    weight, noise = torch.randn(1, 4, 3), -1e-9 * torch.ones(1, 3, 3)
    scale = channel_scales(weight[0]).reshape(1, 4, 1)
    rounded = gptq(weight, scale, noise) * scale
    assert ((rounded - weight).abs() < 2 * scale).all()


def nearest(weight: torch.Tensor) -> torch.Tensor:
    scale = channel_scales(weight).reshape(-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / scale).clamp(-127, 127) * scale


def layer_error(
    layer: nn.Module, batches: Iterable[tuple[torch.Tensor]], other: nn.Module
) -> tuple[float, torch.Tensor]:
    """Mean squared error of the output, and the mean error of each channel."""
    errors = torch.stack([other(x) - layer(x) for (x,) in batches]).double()
    channel = 2 if errors.ndim > 3 and not isinstance(layer, nn.Linear) else errors.ndim - 1
    return float(errors.square().mean()), errors.transpose(0, channel).flatten(1).mean(1)


def rounded(
    layer: nn.Module, batches: list[tuple[torch.Tensor]]
) -> tuple[torch.fx.GraphModule, torch.fx.Node, torch.Tensor]:
    graph = capture(layer, batches[0])
    scales = round_weights(graph, batches)
    (node,) = (n for n in graph.graph.nodes if roundable(n))
    return graph, node, scales[node.name]


@pytest.fixture(autouse=True)
def every_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at whole images, so that what is proved holds for the very data."""
    monkeypatch.setattr(gptq_rounding, "POSITIONS", 10_000)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_nearer_than_by_nearest_rounding(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    layer, batches = case.make().eval(), correlated(case.shape, 0)
    naive = copy.deepcopy(layer)
    naive.weight.data = nearest(layer.weight)
    graph, node, scale = rounded(copy.deepcopy(layer), batches)

    weight = attribute(graph, node.args[1])
    steps = weight.double() / scale.double().reshape(-1, *[1] * (weight.ndim - 1))
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert steps.abs().max() <= 127.0001
    assert weight.shape == layer.weight.shape and weight.dtype == torch.float32

    error, bias = layer_error(layer, batches, graph)
    naive_error, _ = layer_error(layer, batches, naive)
    assert error <= naive_error
    assert bias.abs().max() <= 0.02 * error**0.5 + 1e-6
    if len(case.shape) == 1:
        return  # one sample a batch is too few to hold on others
    assert (
        layer_error(layer, correlated(case.shape, 1), graph)[0]
        <= 1.1 * layer_error(layer, correlated(case.shape, 1), naive)[0]
    ), "worse on data that it has not seen"


@torch.no_grad()
def test_gptq_gains_where_inputs_are_correlated() -> None:
    torch.manual_seed(0)
    layer, batches = nn.Linear(32, 16), correlated((64, 32), 0)
    naive = nn.Linear(32, 16)
    naive.weight.data, naive.bias.data = nearest(layer.weight), layer.bias.data
    graph, *_ = rounded(copy.deepcopy(layer), batches)
    assert layer_error(layer, batches, graph)[0] < 0.5 * layer_error(layer, batches, naive)[0]


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in CASES if "conv" in name or "depthwise" in name])
def test_moments_are_those_of_unfolded_inputs(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    layer, batches = case.make().eval(), correlated(case.shape, 0, 3)
    graph = capture(layer, batches[0])
    layers = [node for node in graph.graph.nodes if roundable(node)]
    seen = gptq_rounding.Collector(graph, layers, layers)
    for batch in batches:
        seen.see(batch)
    (moments,) = seen.moments.values()
    rank = layer.weight.ndim - 2
    options = {key: getattr(layer, key) for key in ("dilation", "padding", "stride")}
    if rank == 1:
        options = {key: ((0 if key == "padding" else 1), *value) for key, value in options.items()}
    kernel = layer.kernel_size if rank == 2 else (1, *layer.kernel_size)
    columns = [F.unfold(x if rank == 2 else x.unsqueeze(2), kernel, **options) for (x,) in batches]
    columns = torch.cat(columns).double()  # (images, channels · kernel, positions)
    columns = columns.reshape(len(columns), layer.groups, -1, columns.shape[-1]).permute(1, 0, 3, 2).flatten(1, 2)
    assert moments.count == columns.shape[1]
    torch.testing.assert_close(moments.first.double(), columns.sum(1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(moments.second.double(), columns.mT @ columns, rtol=1e-4, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear", "conv", "depthwise"])
def test_dead_channels_and_dead_inputs(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    layer = case.make().eval()
    layer.weight[1] = 0
    batches = correlated(case.shape, 0)
    for (x,) in batches:
        x[:, 2] = 0
    for data in (batches, [(torch.zeros(case.shape),)]):
        graph, node, scale = rounded(copy.deepcopy(layer), data)
        weight = attribute(graph, node.args[1])
        assert torch.isfinite(weight).all() and not weight[1].any()
        assert torch.isfinite(attribute(graph, node.args[2])).all()
        assert (scale > 0).all()
    torch.testing.assert_close(weight, nearest(layer.weight), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_parts_are_rounded_as_the_whole_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments that do not fit in memory together are gathered in several runs through the data, with equal results."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(160, 4)).eval()
    batches = correlated(IMAGE, 0)
    whole, parts = (capture(copy.deepcopy(model), batches[0]) for _ in range(2))
    round_weights(whole, batches)
    monkeypatch.setattr(gptq_rounding, "MOST_BYTES", 4 * 100 * 100)
    round_weights(parts, batches)
    assert whole.state_dict().keys() == parts.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


@torch.no_grad()
def test_two_runs_are_equal() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(160, 4)).eval()
    batches = correlated(IMAGE, 0)
    first, second = (capture(copy.deepcopy(model), batches[0]) for _ in range(2))
    torch.manual_seed(1)
    round_weights(first, batches)
    torch.manual_seed(2)
    round_weights(second, batches)
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@torch.no_grad()
def test_layers_that_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too wide, and computed weights; not an image without a batch dimension."""
    monkeypatch.setattr(gptq_rounding, "MOST_COLUMNS", 20)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow, self.conv = nn.Linear(30, 20), nn.Linear(20, 5), nn.Conv2d(1, 2, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            computed = F.linear(x[:, :5], self.narrow.weight[:, :5] * x.amax(), self.narrow.bias * 2)
            return self.narrow(self.wide(x)), computed, self.conv(x.unsqueeze(0))

    model = Model().eval()
    batches = correlated((4, 30), 0)
    graph = capture(model, batches[0])
    assert list(round_weights(graph, batches)) == ["linear_2", "conv2d_default"]
    for left in ("linear", "linear_1"):
        node = next(n for n in graph.graph.nodes if n.name == left)
        assert "rounded" not in str(node.args[1])
    graph(*batches[0])


@torch.no_grad()
def test_weights_shared_by_layers_are_rounded_for_each() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(12, 12)
    batches = correlated((16, 12), 0)
    graph = capture(nn.Sequential(shared, nn.ReLU(), shared), batches[0])
    scales = round_weights(graph, batches)
    assert len(scales) == 2
    first, second = (attribute(graph, n.args[1]) for n in graph.graph.nodes if roundable(n))
    assert torch.equal(*scales.values()) and not torch.equal(first, second)


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_calibration_data_that_is_not_finite_is_an_error(bad: float) -> None:
    batches = correlated((16, 12), 0)
    batches[3][0][2, 2] = bad
    with pytest.raises(EdgeKitError, match="not finite"):
        rounded(nn.Linear(12, 5), batches)


def test_scales() -> None:
    weight = torch.zeros(4, 2, 3)
    weight[0], weight[1, 0, 0], weight[2, 1, 1] = 1.27, -2.54, 1e-9
    scales = channel_scales(weight)
    torch.testing.assert_close(scales[:2], torch.tensor([0.01, 0.02]))
    assert (scales[2:] == scales[1] * gptq_rounding.SMALLEST).all()
    torch.testing.assert_close(channel_scales(weight.transpose(0, 1), 1), scales)
    torch.testing.assert_close(channel_scales(weight, None), scales[1:2])
    assert (channel_scales(torch.zeros(3, 4)) > 1e-4).all()
