"""Loops over recurrent cells become layers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from edgekit.quant.graph.passes import aten, capture
from edgekit.quant.graph.recurrent_cells import LAYERS

TIME, BATCH = 7, 2


class Loop(nn.Module):
    """Runs a cell over a sequence; gives all outputs and the last state."""

    def __init__(self, cell: type[nn.RNNCellBase], **options: object) -> None:
        super().__init__()
        self.cell = cell(4, 8, **options)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, outputs = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1), *(state if isinstance(state, tuple) else [state])


class Two(nn.Module):
    """Two cells a step, the second of which reads the first, backward in time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTMCell(4, 8), nn.GRUCell(8, 8)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen = []
        for index in reversed(range(TIME)):
            h, c = self.first(x[index], (h, c))
            g = self.second(torch.relu(h), g)
            seen.append(g.mean())
        return torch.stack(seen), h, c, g


class Decoder(nn.Module):
    """Reads what it wrote: nothing here is a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, outputs = torch.zeros(BATCH, 8), []
        for _ in range(3):
            h = self.cell(x, h)
            x = self.head(h)
            outputs.append(x)
        return torch.stack(outputs)


class Looks(nn.Module):
    """Looks at the cell state of every step, which a layer does not give."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, seen = (torch.zeros(BATCH, 8), torch.zeros(BATCH, 8)), []
        for step in x:
            state = self.cell(step, state)
            seen.append(state[1])
        return torch.stack(seen)


class Step(nn.Module):
    """One step of a stream, whose state comes from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 8)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.cell(x, (h, c))


SEQUENCE, STATE = torch.randn(BATCH, TIME, 4), torch.randn(BATCH, 8)
NETWORKS = {
    "lstm": (lambda: Loop(nn.LSTMCell), (SEQUENCE,), {"lstm": 1}),
    "gru": (lambda: Loop(nn.GRUCell), (SEQUENCE,), {"gru": 1}),
    "gru without bias": (lambda: Loop(nn.GRUCell, bias=False), (SEQUENCE,), {"gru": 1}),
    "rnn": (lambda: Loop(nn.RNNCell), (SEQUENCE,), {"rnn_tanh": 1}),
    "rnn relu": (lambda: Loop(nn.RNNCell, nonlinearity="relu"), (SEQUENCE,), {"rnn_relu": 1}),
    "two": (Two, (torch.randn(TIME, BATCH, 4), STATE, STATE, STATE), {"lstm": 1, "gru": 1}),
    "decoder": (Decoder, (torch.randn(BATCH, 4),), {"gru": 3}),
    "cell states": (Looks, (torch.randn(TIME, BATCH, 4),), {"lstm": TIME}),
    "one step": (Step, (torch.randn(BATCH, 4), STATE, STATE), {"lstm": 1}),
    "one sample": (Step, (torch.randn(4), torch.randn(8), torch.randn(8)), {"lstm": 1}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_cells(name: str) -> None:
    make, inputs, layers = NETWORKS[name]
    torch.manual_seed(0)
    module = make().eval()
    graph = capture(module, inputs)
    found = Counter(node.target for node in graph.graph.nodes if node.target in {*LAYERS, *LAYERS.values()})
    assert found == {getattr(aten, kind).input: count for kind, count in layers.items()}
    torch.testing.assert_close(graph(*inputs), module(*inputs), rtol=1e-5, atol=1e-6)
