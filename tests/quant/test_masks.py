"""Masks: which weights go, that they stay away while a network is trained, and what stays dense."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from edgekit.errors import EdgeKitError
from edgekit.quant.pruning import masks
from edgekit.quant.pruning.masks import Pattern


class Net(nn.Module):
    """Every kind of layer that is masked, and some that stay dense."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 32, 1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.linear = nn.Linear(16, 24)
        self.tiny = nn.Linear(24, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.grouped(self.point(self.depthwise(self.first(x)).relu())).relu())
        y, _ = self.lstm(y.flatten(2).mT)
        return self.tiny(self.linear(y[:, -1]).relu())


MASKED = {
    "first.weight", "point.weight", "grouped.weight", "up.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0",
    "linear.weight",
}  # fmt: skip
PATTERNS = {
    "0.8": Pattern(0.8),
    "0.5 in blocks": Pattern(0.5, (4, 1)),
    "2:4": Pattern(0.5, (1, 4), 2),
    "1:4": Pattern(0.75, (1, 4), 1),
}


def inputs(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def rows(net: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """A weight or its mask as (outputs, inputs), written down for each kind of layer on its own."""
    layer: Any = net.get_submodule(name.rpartition(".")[0])
    if isinstance(layer, nn.ConvTranspose2d):
        return value.permute(1, 2, 3, 0).flatten(1)
    return value.permute(0, 2, 3, 1).flatten(1) if isinstance(layer, nn.Conv2d) else value


@pytest.mark.parametrize("method", masks.METHODS)
@pytest.mark.parametrize("name", PATTERNS)
def test_every_masked_layer_has_the_pattern(name: str, method: str) -> None:
    pattern, net = PATTERNS[name], Net()
    found, kept = masks.find(net, pattern, method, [(inputs(),)])
    dense = {"first.weight"} if pattern.stay else set()  # three inputs are no multiple of four
    assert set(found) == MASKED - dense
    assert set(kept) == {"depthwise", "tiny"} | {n.partition(".")[0] for n in dense}
    for key, mask in found.items():
        assert mask.shape == net.get_parameter(key).shape and mask.dtype == torch.bool
        matrix = rows(net, key, mask)
        height, width = pattern.block
        if pattern.stay is not None:
            assert (matrix.reshape(len(matrix), -1, width).sum(2) == pattern.stay).all()
            continue
        blocks = matrix.reshape(len(matrix) // height, height, -1, width).permute(0, 2, 1, 3).flatten(2)
        assert (blocks.all(2) | ~blocks.any(2)).all()
        share = float((~mask).float().mean())
        assert abs(share - pattern.level) <= height * width / mask.numel() + 1e-9


def test_the_least_of_each_output_goes_by_weight_and_input() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8))
    x = torch.randn(50, 12) * torch.linspace(0.01, 3, 12)
    found, _ = masks.find(net, Pattern(0.25), "wanda", [(x[:25],), (x[25:],)])
    score = net[0].weight.detach().abs() * x.norm(dim=0)
    score = score / score.norm(dim=1, keepdim=True)
    expected = score > score.flatten().sort().values[23]  # 24 of 96 go
    assert torch.equal(found["0.weight"], expected)
    by_weight, _ = masks.find(net, Pattern(0.25), "l1")
    assert not torch.equal(by_weight["0.weight"], expected)


def test_masked_weights_stay_zero_through_a_training_and_in_copies() -> None:
    net = Net()
    found, _ = masks.find(net, Pattern(0.8), "l1")
    masks.hold(net, found)
    student = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(student.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        student(inputs()).square().mean().backward()
        optimizer.step()
    masks.release(student, found)
    for key, mask in found.items():
        weight = student.get_parameter(key)
        assert not weight[~mask].any()
        assert not torch.equal(weight[mask], net.get_parameter(key)[mask])
    assert not any(layer._forward_pre_hooks for layer in student.modules())
    assert student.state_dict().keys() == Net().state_dict().keys()


def test_a_mask_grows_from_step_to_step() -> None:
    net, zeros = Net(), 0
    assert masks.shares(1) == [1.0]
    steps = masks.shares(4)
    assert list(steps) == sorted(steps) and steps[-1] == 1.0
    for part in steps:
        found, _ = masks.find(net, Pattern(0.8).at(part), "l1")
        before = {key: net.get_parameter(key) == 0 for key in found}
        assert all(not found[key][gone].any() for key, gone in before.items())  # what is zero stays masked
        masks.apply(net, found)
        assert sum(int((~mask).sum()) for mask in found.values()) > zeros
        zeros = sum(int((~mask).sum()) for mask in found.values())


def test_the_description_counts_zeros() -> None:
    net = Net()
    found, kept = masks.find(net, Pattern(0.5, (1, 4), 2), "l1")
    layers = {layer.name: layer for layer in masks.describe(net, found, kept)}
    assert layers["linear"].zeros == layers["linear"].weights // 2 == 16 * 24 // 2
    assert layers["lstm"].weights == 4 * 16 * 32 and layers["lstm"].zeros == 2 * 16 * 32
    assert layers["depthwise"].zeros == 0 and "depthwise" in str(layers["depthwise"].kept)
    assert "no multiple of 4" in str(layers["first"].kept)


PARSED = {
    ("0.8", None): Pattern(0.8),
    ("2:4", None): Pattern(0.5, (1, 4), 2),
    ("1:8", None): Pattern(0.875, (1, 8), 1),
    ("0.5", "4x1"): Pattern(0.5, (4, 1)),
}
REFUSED = {
    ("1.0", None): "would leave nothing",
    ("0", None): "would leave everything",
    ("4:4", None): "leaves all of a block",
    ("0:4", None): "leaves nothing of a block",
    ("much", None): "cannot read the sparsity",
    ("nan", None): "would leave everything",
    ("2:4", "4x1"): "a block of its own",
    ("0.8", "4"): "cannot read the block",
    ("0.8", "0x4"): "cannot read the block",
}


@pytest.mark.parametrize("given", PARSED)
def test_patterns_are_read(given: tuple[str, str | None]) -> None:
    assert masks.parse(*given) == PARSED[given]


@pytest.mark.parametrize("given", REFUSED)
def test_other_patterns_are_refused(given: tuple[str, str | None]) -> None:
    with pytest.raises(EdgeKitError, match=REFUSED[given]):
        masks.parse(*given)


def test_a_network_without_a_layer_to_mask_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU())
    with pytest.raises(EdgeKitError, match=r"no layer of this network can be masked 2:4: a depthwise"):
        masks.find(net, PATTERNS["2:4"], "l1")
