"""Recurrent layers in ExecuTorch: short ones unrolled, long ones in loops over a step that XNNPACK computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from int8_nets import sqnr
from torch import nn

from edgekit.exporters.executorch.lower import to_executorch
from edgekit.exporters.executorch.recurrent import LONG
from edgekit.quant.ptq.recipes import RECIPES, half_compute
from edgekit.runtimes import pte


class Layers(nn.Module):
    """Every kind of layer, one behind the other; takes the states of the first, and gives the last of each."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        options: dict[str, Any] = {"batch_first": True}
        self.lstm = nn.LSTM(6, width, bidirectional=True, proj_size=5, **options)
        self.gru = nn.GRU(10, width, 2, dropout=0.5, **options)
        self.relu = nn.RNN(width, width, nonlinearity="relu", bias=False, **options)
        self.tanh = nn.RNN(width, width, **options)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, (h, c) = self.lstm(x, (h, c))
        lasts = [h, c]
        for layer in (self.gru, self.relu, self.tanh):
            x, last = layer(x)
            lasts.append(last)
        return (x, *lasts)


def example(time: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return torch.randn(2, time, 6), torch.randn(2, 2, 5), torch.randn(2, 2, 16)


def run(data: bytes, inputs: tuple[torch.Tensor, ...], outputs: int, path: Path) -> list[torch.Tensor]:
    """Runs a file twice: nothing is left of the first run."""
    path.write_bytes(data)
    names, results = [f"x{index}" for index in range(len(inputs))], [f"y{index}" for index in range(outputs)]
    session = pte.load(str(path), threads=1, inputs=names, outputs=results)
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    session.run(feeds)
    actual = session.run(feeds)
    return [torch.from_numpy(actual[name]) for name in results]


@torch.no_grad()
@pytest.mark.parametrize("time", [3, LONG + 5])
def test_layers(time: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs = Layers().eval(), example(time)
    lowered = to_executorch(RECIPES["fp32"].apply(module, inputs).program)
    assert not lowered.undelegated.keys() - {"flip", "cat"}
    expected = module(*inputs)
    for value, actual in zip(expected, run(lowered.data, inputs, len(expected), tmp_path / "model.pte"), strict=True):
        assert sqnr(value, actual) > 110


@torch.no_grad()
@pytest.mark.parametrize(("precision", "nearness", "share"), [("fp16", 45, 0.6), ("int8-dynamic", 35, 0.35)])
def test_precisions(precision: str, nearness: float, share: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs = nn.GRU(64, 128, batch_first=True).eval(), (torch.randn(1, 160, 64),)
    program = half_compute(module, inputs) if precision == "fp16" else RECIPES[precision].apply(module, inputs).program
    lowered = to_executorch(program)
    assert len(lowered.data) < share * sum(parameter.nbytes for parameter in module.parameters())
    for value, actual in zip(module(*inputs), run(lowered.data, inputs, 2, tmp_path / "model.pte"), strict=True):
        assert sqnr(value, actual) > nearness


class Guided(nn.Module):
    """Has weights that come from its input."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(1, x.shape[1], x.shape[2])
        return torch.rnn_tanh(x, state, [weight, weight], False, 1, 0.0, False, False, False)[0]


@torch.no_grad()
def test_weights_that_are_inputs(tmp_path: Path) -> None:
    inputs = torch.randn(LONG, 1, 4), torch.randn(4, 4)
    lowered = to_executorch(RECIPES["fp32"].apply(Guided(), inputs).program)
    (actual,) = run(lowered.data, inputs, 1, tmp_path / "model.pte")
    torch.testing.assert_close(actual, Guided()(*inputs), rtol=1e-5, atol=1e-6)


class Entered(nn.Module):
    """A quantized layer in front of a recurrent one, with nothing between them, and states from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.layer, self.cell = nn.Linear(8, 16), nn.RNN(16, 32), nn.LSTMCell(32, 32)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cell(self.layer(torch.relu(self.enter(x)))[0][-1], (h, c))


@torch.no_grad()
def test_recurrent_layers_in_an_int8_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs = Entered().eval(), (torch.randn(LONG, 2, 8), torch.rand(2, 32), torch.rand(2, 32) * 100)
    lowered = to_executorch(RECIPES["int8"].apply(module, inputs, [inputs]).program)
    for value, actual in zip(module(*inputs), run(lowered.data, inputs, 2, tmp_path / "model.pte"), strict=True):
        assert sqnr(value, actual) > 30
    # No state is rounded: one sample whose cell state is small beside others keeps it.
    small = (inputs[0], inputs[1], inputs[2] * 1e-4)
    for value, actual in zip(module(*small), run(lowered.data, small, 2, tmp_path / "model.pte"), strict=True):
        assert sqnr(value, actual) > 25
