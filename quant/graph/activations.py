"""Looking at what a float network computes on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import islice

import torch
from torch.fx import GraphModule, Interpreter, Node


class _Watcher(Interpreter):
    """Runs a graph and shows what the watched nodes compute."""

    def __init__(self, model: GraphModule, nodes: Collection[Node], see: Callable[[Node, torch.Tensor], None]) -> None:
        super().__init__(model)
        self.nodes, self.see = nodes, see

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if n in self.nodes and isinstance(result, torch.Tensor):
            self.see(n, result)
        return result


def watch(
    model: GraphModule,
    nodes: Collection[Node],
    batches: Iterable[tuple[torch.Tensor, ...]],
    most: int,
    see: Callable[[Node, torch.Tensor], None],
) -> None:
    """Runs the first `most` of `batches` through `model`, and calls `see` with each tensor that `nodes` compute."""
    watcher = _Watcher(model, nodes, see)
    with torch.inference_mode():
        for batch in islice(batches, most):
            watcher.run(*batch)
