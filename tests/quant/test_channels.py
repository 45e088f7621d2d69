"""Which channels go together, found and taken out of well-known architectures, and what stays with the reason."""

from __future__ import annotations

import copy

import architectures
import pytest
import torch
from torch import Tensor, nn
from torchao.prototype.sparsity.pruner.saliency_pruner import SaliencyPruner

from edgekit.errors import EdgeKitError
from edgekit.quant.pruning import allocation, dependency_graph, saliency, surgery

# Architecture → how many groups of channels can go, how many branches, and how many layers keep their outputs.
FOUND = {
    "resnet18": (12, 5, 1), "mobilenet_v2": (11, 2, 1), "mobilenet_v3_small": (12, 1, 1), "efficientnet_b0": (14, 2, 1),
    "shufflenet_v2": (8, 0, 12), "regnet_y400": (19, 2, 1), "squeezenet": (25, 0, 1), "googlenet": (27, 0, 1),
    "densenet121": (21, 0, 1), "vit_tiny": (2, 4, 8), "bert_tiny": (2, 3, 11), "unet": (2, 0, 11), "lstm": (1, 0, 1),
    "gru": (1, 0, 1), "audio_m5": (4, 0, 1), "autoencoder": (5, 0, 1), "vae": (5, 0, 4), "deeplab_v3": (11, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_is_left_computes_as_with_zeros(name: str) -> None:
    network, example = architectures.build(name), architectures.example(name)
    found = dependency_graph.structure(network, example)
    whole = sum(bool(group.branch) for group in found.groups)
    assert (len(found.groups) - whole, whole, len(found.kept)) == FOUND[name]
    gone = {group: range(0, group.size, 3) for group in found.groups}
    pruned, zeroed = copy.deepcopy(network), copy.deepcopy(network)
    surgery.remove(pruned, gone)
    surgery.zero(zeroed, gone)
    with torch.no_grad():
        got, expected = pruned(*example), zeroed(*example)
    for a, b in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    assert allocation.parameters(pruned) < 0.95 * allocation.parameters(network)


def test_costs_are_those_of_the_pruned_network() -> None:
    for name in ("mobilenet_v2", "densenet121", "regnet_y400", "lstm", "vae"):
        network, example = architectures.build(name), architectures.example(name)
        found = dependency_graph.structure(network, example)
        kept = {group: group.size - group.size // 3 for group in found.groups}
        pruned = allocation.prune(network, {group: range(group.size - kept[group]) for group in kept})
        assert allocation.Costs(network, found, example).macs(kept) == sum(allocation.macs(pruned, example).values()), (
            name
        )


class Shuffled(nn.Module):
    """Its one way from `a` to `b` mixes channels by a reshape that the dependency graph does not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.c(torch.relu(self.b(y)))


class BuiltIn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.relu(self.a(x))).view(-1, 256))


def test_reshapes_that_are_not_followed_keep_their_channels() -> None:
    found = dependency_graph.structure(Shuffled().eval(), (torch.randn(1, 3, 8, 8),))
    assert [group.name for group in found.groups] == ["b"]
    assert set(found.kept) == {"a", "c"}


def test_a_width_in_the_forward_pass_keeps_the_layer() -> None:
    found = dependency_graph.structure(BuiltIn().eval(), (torch.randn(1, 3, 8, 8),))
    assert [group.name for group in found.groups] == ["a"]
    assert "built in" in found.kept["b"]


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("network", [Detached(), nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.ReLU())])
def test_nothing_to_prune_is_said(network: nn.Module) -> None:
    with pytest.raises(EdgeKitError):
        dependency_graph.structure(network.eval(), (torch.randn(1, 4),))


def test_weights_narrow_the_layers_of_the_code() -> None:
    network, example = architectures.build("densenet121"), architectures.example("densenet121")
    groups = dependency_graph.structure(network, example).groups
    pruned = allocation.prune(network, {group: range(group.size // 2) for group in groups})
    again = architectures.build("densenet121")
    surgery.narrow(again, pruned.state_dict())
    again.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(again(*example), pruned(*example))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, 5),
    ).eval()  # fmt: skip


def test_l1_takes_the_channels_that_torchao_takes() -> None:
    network, example = plain(), (torch.randn(1, 3, 12, 12),)
    groups = dependency_graph.structure(network, example).groups
    scores = saliency.saliency(network, groups, "l1")
    masked = plain()
    pruner = SaliencyPruner({})
    pruner.prepare(masked, [{"tensor_fqn": f"{group.name}.weight", "sparsity_level": 0.5} for group in groups])
    pruner.enable_mask_update = True
    pruner.step()
    for group in groups:
        mask = masked.get_submodule(group.name).parametrizations.weight[0].mask
        gone = (~mask.bool()).nonzero().flatten().tolist()
        assert gone == sorted(allocation.least_salient(scores[group], group.size // 2))


def test_taylor_is_the_slope_of_the_loss() -> None:
    network, x = plain().double(), torch.randn(4, 3, 12, 12, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    groups = dependency_graph.structure(network, (x,)).groups
    scores = saliency.saliency(network, groups, "taylor", [((x,), labels)])[groups[1]]
    slopes = []
    for unit in range(groups[1].size):  # of the loss, as the weights that read the channel shrink
        losses = []
        for change in (-1e-4, 1e-4):
            moved = copy.deepcopy(network)
            with torch.no_grad():
                moved[6].weight[:, unit] *= 1 + change
                losses.append(float(torch.nn.functional.cross_entropy(moved(x), labels)))
        slopes.append(abs(losses[1] - losses[0]))
    expected = torch.tensor(slopes, dtype=torch.float64)
    torch.testing.assert_close(scores.double(), expected / expected.mean(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", saliency.METHODS)
def test_every_method_finds_dead_channels_least_salient(method: str) -> None:
    network, x = plain(), torch.randn(8, 3, 12, 12)
    groups = dependency_graph.structure(network, (x[:1],)).groups
    dead = [1, 5, 11]
    with torch.no_grad():
        weights = network[2].weight
        weights[dead] = weights.mean(0) if method == "fpgm" else 0.0  # nearest to all others, or nothing at all
        network[2].bias[dead] = 0.0
        network[6].weight[:, dead] = 0.0
    scores = saliency.saliency(network, groups, method, [((x,), None)])[groups[1]]
    assert sorted(allocation.least_salient(scores, 3)) == dead


@pytest.mark.parametrize("how", allocation.ALLOCATIONS)
@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_allocation_reaches_the_ratio_in_eights(how: str, ratio: float) -> None:
    network, example = architectures.build("resnet18"), architectures.example("resnet18")
    found = dependency_graph.structure(network, example)
    scores = saliency.saliency(network, found.groups, "l2")
    losses = allocation.sensitivity(network, scores, [example])
    costs = allocation.Costs(network, found, example)
    kept = allocation.allocate(costs, scores, ratio, how, 8, losses)
    assert ratio <= 1 - costs.macs(kept) / costs.total < ratio + 0.08
    assert all(count % 8 == 0 for group, count in kept.items() if not group.branch)


def test_a_ratio_out_of_reach_says_what_can_be_reached() -> None:
    network, example = architectures.build("vit_tiny"), architectures.example("vit_tiny")
    found = dependency_graph.structure(network, example)
    scores = saliency.saliency(network, found.groups, "l2")
    with pytest.raises(EdgeKitError, match=r"cannot be removed: .* % go") as caught:
        allocation.allocate(allocation.Costs(network, found, example), scores, 0.9, "uniform")
    assert "--ratio 0." in str(caught.value.help)
