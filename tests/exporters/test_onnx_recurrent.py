"""RNNs and LSTMs with projections in ONNX and in TFLite; int8 weights of recurrent layers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from int8_nets import sqnr
from tflite_tools import run_onnx, run_tflite
from torch import nn

from edgekit.exporters.onnx.export import to_onnx
from edgekit.exporters.tflite import convert
from edgekit.quant.ptq.recipes import RECIPES
from edgekit.quant.ptq.shares import shares


class Layer(nn.Module):
    """A layer with its states as inputs, or without."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, last = self.layer(x, *([states if len(states) > 1 else states[0]] if states else []))
        return y, *(last if isinstance(last, tuple) else [last])


def states(layers: int, *widths: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(layers, 2, width) for width in widths)


# layer, its states, time steps, the ops that it becomes
LAYERS: dict[str, tuple[Any, tuple[torch.Tensor, ...], int, dict[str, int]]] = {
    "rnn": (lambda: nn.RNN(6, 16, 2), (), 20, {"RNN": 2}),
    "rnn relu": (
        lambda: nn.RNN(6, 16, 2, bidirectional=True, nonlinearity="relu", bias=False, batch_first=True),
        states(4, 16),
        5,
        {"RNN": 2},
    ),
    "rnn one step": (lambda: nn.RNN(6, 16), (), 1, {"RNN": 1}),
    "projection": (lambda: nn.LSTM(6, 16, 2, proj_size=4, batch_first=True), states(2, 4, 16), 20, {"LSTM": 2}),
    "projection two ways": (lambda: nn.LSTM(6, 16, bidirectional=True, proj_size=4, bias=False), (), 5, {"LSTM": 2}),
    "projection one step": (lambda: nn.LSTM(6, 16, proj_size=4), (), 1, {}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    make, given, time, ops = LAYERS[name]
    torch.manual_seed(0)
    module = Layer(make()).eval()
    inputs = (torch.randn(2, time, 6) if module.layer.batch_first else torch.randn(time, 2, 6), *given)
    expected = module(*inputs)
    names = [f"x{index}" for index in range(len(inputs))], [f"y{index}" for index in range(len(expected))]
    made = to_onnx(RECIPES["fp32"].apply(module, inputs).program, *names)
    counts = Counter(node.op_type for node in made.graph.node)
    assert {op: counts[op] for op in ("RNN", "LSTM") if counts[op]} == ops and len(made.graph.node) < 80
    feeds = {name: value.numpy() for name, value in zip(names[0], inputs, strict=True)}
    for actual in (run_onnx(made, feeds), run_tflite(convert(made), feeds)):
        for name, value in zip(names[1], expected, strict=True):
            np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=1e-5)


# precision → the bytes that a weight takes there
BYTES = {"fp32": 4, "fp16": 2, "int8-dynamic": 1, "int8-weight-only": 1, "int8": 1}


@torch.no_grad()
@pytest.mark.parametrize("width", [64, 256], ids=["folded by torch", "not folded by torch"])
@pytest.mark.parametrize("precision", BYTES)
def test_a_projection_is_stored_as_a_factor(precision: str, width: int) -> None:
    """Its product with the recurrent weights takes up to four times their room."""
    torch.manual_seed(0)
    module = Layer(nn.LSTM(width // 4, width, proj_size=width // 8)).eval()
    x, recipe = torch.randn(20, 1, width // 4), RECIPES[precision]
    expected, program = module(x), recipe.apply(module, (x,), [(x,)]).program
    made = to_onnx(program, ["x"], ["y", "h", "c"], half_weights=recipe.half_weights)
    written = convert(made)
    matrices = sum(p.numel() for p in module.parameters() if p.ndim > 1) * BYTES[precision]
    vectors = 4 * sum(p.numel() for p in module.parameters() if p.ndim == 1)
    per_row = 2 * vectors if precision.startswith("int8") else 0  # scales
    for size in (made.ByteSize(), len(written)):
        assert size < 1.3 * (matrices + vectors) + per_row + 20_000
    least = {"fp32": 100, "fp16": 50}.get(precision, 25)
    for actual in (run_onnx(made, {"x": x.numpy()}), run_tflite(written, {"x": x.numpy()})):
        for name, value in zip("yhc", expected, strict=True):
            assert sqnr(value, torch.from_numpy(actual[name])) > least


class Tagger(nn.Module):
    """A recurrent network whose cell is called step by step."""

    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.enter, self.cell, self.leave = nn.Linear(8, 16), cell(16, 96), nn.Linear(96, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for step in torch.relu(self.enter(x)).unbind(1):
            state = self.cell(step, state)
        return self.leave(state[0] if isinstance(state, tuple) else state)


@torch.no_grad()
@pytest.mark.parametrize(
    ("cell", "precision"),
    [(nn.LSTMCell, "int8"), (nn.LSTMCell, "int8-dynamic"), (nn.GRUCell, "int8"), (nn.RNNCell, "int8-weight-only")],
)
def test_cells_have_int8_weights(cell: type[nn.RNNCellBase], precision: str) -> None:
    torch.manual_seed(0)
    module, inputs = Tagger(cell).eval(), (torch.randn(2, 20, 8),)
    compressed = RECIPES[precision].apply(module, inputs, [inputs])
    kind = cell.__name__.removesuffix("Cell")
    assert precision == "int8-weight-only" or any(f"1 {kind} layer in float" in note for note in compressed.notes)
    assert shares(compressed.program).weights > 0.95 and not shares(compressed.program).left
    made = to_onnx(compressed.program, ["x"], ["y"])
    weights = sum(parameter.nbytes for parameter in module.parameters())
    assert len(made.SerializeToString()) < 0.3 * weights + 8192  # of which the graph takes some kilobytes
    feeds, expected = {"x": inputs[0].numpy()}, module(*inputs)
    for actual in (run_onnx(made, feeds), run_tflite(convert(made), feeds)):
        assert sqnr(expected, torch.from_numpy(np.array(actual["y"]))) > 25
