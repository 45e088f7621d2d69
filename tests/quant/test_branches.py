"""Whole residual branches: which are found, what is left without them, and what is exported then."""

from __future__ import annotations

import architectures
import pytest
import torch
from torch import Tensor, nn

from edgekit.quant.graph.passes import capture
from edgekit.quant.graph.residual_branches import branches
from edgekit.quant.pruning import allocation, dependency_graph, distillation, surgery

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (2, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, 2, 1), (2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 4, (3, 5), (2, 1), (0, 2), (1, 2)), (2, 6, 12, 13)),
    "unbatched": (lambda: nn.Conv2d(6, 4, 3), (6, 12, 13)),
    "same": (lambda: nn.Conv2d(6, 4, 4, padding="same", dilation=2), (2, 6, 9, 9)),
    "valid": (lambda: nn.Conv2d(6, 4, 4, 3, padding="valid"), (2, 6, 9, 10)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, 2, 1, groups=6), (2, 6, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 3, 2), (1, 6, 7, 8, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, dilation=2), (2, 6, 5, 6)),
    "batch norm": (lambda: nn.BatchNorm2d(6), (2, 6, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 5, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_absent_gives_zeros_of_the_same_shape(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make().eval(), torch.randn(shape)
    got = surgery.Absent(layer)(x)
    assert got.shape == layer(x).shape
    assert not got.any()


class Blocks(nn.Module):
    """A stage of two residual blocks, one with a convolution in its shortcut, and branches that have to stay."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage = nn.Sequential(Block(8, 8), Block(8, 16))
        self.gate, self.shared, self.head = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stage(torch.relu(self.stem(x)))
        y = y + torch.sigmoid(self.gate(y))  # of zeros it gives no zeros
        z = self.shared(y)
        return self.head(torch.relu((y + z) * z).mean((2, 3)))  # the product reads the branch as well


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.b = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.short = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.norm(self.a(x))))
        y += self.short(x)
        return torch.relu(y)


def test_branches_are_what_only_a_sum_with_a_shortcut_reads() -> None:
    found = [group.branch for group in branches(Blocks().eval(), (torch.randn(1, 3, 8, 8),))]
    assert found == [("stage.0.a", "stage.0.norm", "stage.0.b")]  # the other's shortcut changes the shape


def without_branches(network: nn.Module, example: tuple[Tensor, ...]) -> tuple[nn.Module, set[str]]:
    groups = [group for group in dependency_graph.structure(network, example).groups if group.branch]
    return allocation.prune(network, {group: [0] for group in groups}), {
        path for group in groups for path in group.branch
    }


def test_nothing_of_a_branch_is_exported() -> None:
    network, x = Blocks().eval(), torch.randn(2, 3, 8, 8)
    pruned, gone = without_branches(network, (x,))
    assert len(gone) == 3
    y = network.stage[1](torch.relu(network.stem(x)))  # the first block's two ReLUs are one
    y = y + torch.sigmoid(network.gate(y))
    z = network.shared(y)
    expected = network.head(torch.relu((y + z) * z).mean((2, 3)))
    torch.testing.assert_close(pruned(x), expected)
    graph = capture(pruned, (x,))
    torch.testing.assert_close(graph(x)[0] if isinstance(graph(x), tuple) else graph(x), expected)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count("aten.conv2d.default") == 6
    assert targets.count("aten.relu.default") == 4
    assert not any("zeros" in target or "full" in target for target in targets)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "regnet_y400", "vit_tiny", "bert_tiny"])
def test_well_known_networks_lose_all_branches(name: str) -> None:
    network, example = architectures.build(name), architectures.example(name)
    pruned, gone = without_branches(network, example)
    layers = allocation.changes(network, pruned, example, {})
    assert gone
    assert {layer.name for layer in layers if not layer.after} == {layer.name for layer in layers} & gone
    assert sum(layer.macs_after for layer in layers) < 0.9 * sum(layer.macs_before for layer in layers)
    assert all(layer.macs_after == 0 for layer in layers if layer.name in gone)
    graph, expected = capture(pruned, example), pruned(*example)
    got = graph(*example)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    names = {name for name, _ in graph.named_parameters()}
    read = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    assert not any(parameter.startswith(f"{path}.") for path in gone for parameter in names & read)


def test_weights_tell_which_layers_went() -> None:
    network, x = Blocks().eval(), torch.randn(2, 3, 8, 8)
    pruned, _ = without_branches(network, (x,))
    again = Blocks()
    surgery.narrow(again, pruned.state_dict())
    again.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(again.eval()(x), pruned(x))


def test_branches_go_first_and_no_more_than_asked() -> None:
    network, example = architectures.build("resnet18"), architectures.example("resnet18")
    found = dependency_graph.structure(network, example)
    whole = [group for group in found.groups if group.branch]
    scores = {group: torch.rand(group.size, generator=torch.Generator().manual_seed(0)) for group in found.groups}
    costs = allocation.Costs(network, found, example)
    losses = {
        group: {count: (group.size - count) / group.size for count in allocation.levels(group)}
        for group in found.groups
    }
    losses[whole[0]][0] = 1e-3  # the cheapest of all
    removed = {}
    for depth in (0.0, 0.5, 1.0):
        kept = allocation.allocate(costs, scores, 0.5, "sensitivity", 8, losses, depth)
        assert 0.5 <= 1 - costs.macs(kept) / costs.total < 0.58
        removed[depth] = [group for group in whole if not kept[group]]
    assert not removed[0.0]
    assert whole[0] in removed[0.5]
    assert len(removed[0.5]) < len(removed[1.0])
    only = {group: group.size if not group.branch else int(group not in removed[1.0]) for group in found.groups}
    assert costs.macs(only) >= 0.5 * costs.total


def test_blocks_make_up_for_a_branch_by_the_output_of_their_stage() -> None:
    network, x = Blocks().eval(), torch.randn(2, 3, 8, 8)
    wrapped, student = nn.ModuleDict({"inner": network}), nn.ModuleDict()
    student["inner"], _ = without_branches(network, (x,))
    wrapped.forward, student.forward = wrapped["inner"].forward, student["inner"].forward
    with distillation.ExitStack() as stack:
        pairs = distillation._features(student, wrapped, (x,), stack)
        assert [tuple(tap.value.shape for tap in pair) for pair in pairs] == [((2, 16, 8, 8),) * 2]


def test_mixed_images_are_made_of_two() -> None:
    images = torch.arange(8.0)[:, None, None, None].expand(8, 3, 16, 24).contiguous()
    kinds = set()
    for seed in range(30):
        (mixed,), labels = distillation.augment((images,), torch.arange(8), torch.Generator().manual_seed(seed))
        assert mixed.shape == images.shape
        values = [torch.unique(image) for image in mixed]
        whole = all(len(v) == 1 and float(v) == i for i, v in enumerate(values))
        pieces = all(len(v) <= 2 and bool((v == v.round()).all()) for v in values)
        kind = "plain" if whole else "patched" if pieces else "blended"
        assert (labels is None) == (kind != "plain")
        kinds.add(kind)
    assert kinds == {"plain", "patched", "blended"}


@pytest.mark.parametrize(("mixed", "share"), [(0.0, 0.0), (0.8, 0.8), (1.0, 1.0)])
def test_so_many_batches_are_mixed(mixed: float, share: float) -> None:
    images, generator = torch.randn(2, 3, 16, 16), torch.Generator().manual_seed(0)
    labels = [distillation.augment((images,), torch.arange(2), generator, mixed)[1] for _ in range(200)]
    assert sum(found is None for found in labels) / 200 == pytest.approx(share, abs=0.06)
