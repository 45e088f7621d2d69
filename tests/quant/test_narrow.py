"""Weights of a pruned network go back into the code's network, branches that are gone between narrower layers too."""

from __future__ import annotations

import torch
from torch import nn

from edgekit.quant.pruning import dependency_graph, surgery
from edgekit.quant.pruning.allocation import prune


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.a, self.norm, self.b = nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.Conv2d(24, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = x + self.b(torch.relu(self.norm(self.a(x))))
        return self.head(x.mean((2, 3)))


def test_a_branch_that_is_gone_has_the_width_of_its_narrower_shortcut() -> None:
    net, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    groups = dependency_graph.structure(net, (x,)).groups
    gone = {group: [0] if group.branch else range(group.size // 3) for group in groups}
    assert any(group.branch for group in groups) and any(not group.branch for group in groups)
    pruned = prune(net, gone)
    assert pruned.first.out_channels == 16
    weights = pruned.state_dict()
    again = Residual().eval()
    surgery.narrow(again, weights)
    again.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(again(x), pruned(x))
