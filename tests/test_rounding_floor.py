"""Outputs next to nothing: what rounding makes of them is no difference, what a wrong file makes of them is one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import edgekit
from edgekit.judging import noise_floors, verdicts
from edgekit.metrics import parity

EPS = float(np.finfo(np.float32).eps)


class Ends(nn.Module):
    """A layer, and what is made of it."""

    def __init__(self, end: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.end = nn.Linear(8, 4, bias=False), end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        return {
            "sigmoid": lambda: h.sigmoid(),
            "moved sigmoid": lambda: h.sigmoid().reshape(-1, 2, 2).transpose(1, 2)[:, :1].clamp(0, 1),
            "softmax": lambda: torch.cat([h.softmax(1), h], 1),
            "tanh": lambda: h.tanh() * 3,
            "softplus": lambda: nn.functional.softplus(h),
            "shifted": lambda: h + 5 - 5,
            "shares": lambda: 100 * h.sigmoid(),
            "linear": lambda: h,
            "relu": lambda: h.relu(),
            "product": lambda: h * h.sigmoid(),
        }[self.end]()


SIZES = {
    "sigmoid": 1, "moved sigmoid": 1, "softmax": 1, "tanh": 3, "softplus": 1, "shifted": 5, "shares": 100, "linear": 0,
    "relu": 0, "product": 0,
}  # fmt: skip


@pytest.mark.parametrize("end", SIZES)
@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_rounding_is_that_of_the_numbers_that_an_output_is_a_sum_of(end: str, form: str) -> None:
    x = torch.zeros(1, 8)
    if form == "torch":
        found = noise_floors.floors(torch.export.export(Ends(end).eval(), (x,)))
    else:
        buffer = io.BytesIO()
        torch.onnx.export(Ends(end).eval(), (x,), buffer, dynamo=False)
        found = noise_floors.floors(None, onnx.load_from_string(buffer.getvalue()))
    assert found == pytest.approx([2 * EPS * SIZES[end]])


def test_a_bias_that_a_layer_cancels_out_counts() -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([-7.0, 2.0]))
    assert noise_floors.floors(torch.export.export(layer, (torch.zeros(1, 3),))) == pytest.approx([2 * EPS * 7])


# original's outputs, the file's, the floor → whether the file is right at fp32
NEAR_NOTHING = {
    "all 0, and 1e-9": (np.zeros(4), np.full(4, 1e-9), 2 * EPS, True),
    "1e-8, and 2.7e-8": (np.full(4, 1e-8), np.full(4, 2.7e-8), 2 * EPS, True),
    "1e-6 on some samples": (np.array([0, 1e-6, 0.5, 0]), np.array([1e-9, 1.1e-6, 0.5, 0]), 2 * EPS, True),
    "1e-6, and 0": (np.full(4, 1e-6), np.zeros(4), 2 * EPS, False),
    "1e-8, and 1e-5": (np.full(4, 1e-8), np.full(4, 1e-5), 2 * EPS, False),
    "0.3, and 0": (np.array([1e-8, 0.3, 1e-8]), np.zeros(3), 2 * EPS, False),
    "tiny numbers of a layer, and 0": (np.full(4, 1e-8), np.zeros(4), 0.0, False),
    "tiny numbers of a layer, right": (np.full(4, 1e-8), np.full(4, 1.00001e-8), 0.0, True),
    "0 of a layer, and 1e-9": (np.zeros(4), np.full(4, 1e-9), 0.0, False),
}


@pytest.mark.parametrize("case", NEAR_NOTHING)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_files_of_outputs_next_to_nothing(case: str, precision: str) -> None:
    reference, output, floor, right = NEAR_NOTHING[case]
    near = parity.parities([reference], [output], floors=[floor])
    assert (verdicts.faithful(precision, near, near) is None) == right
    result = verdicts.verdict(precision, None, None, None, parity.worst(near), None)
    assert (result.word == "reject") == (not right and precision == "fp32")


class Detector(nn.Module):
    """A detector of what is in none of the samples: its output is some 1e-8, and 0 in some runtimes."""

    def __init__(self, at: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.ReLU(), nn.Linear(16, 1))
        with torch.no_grad():
            self.layers[3].bias.fill_(at)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).sigmoid()


@pytest.mark.parametrize("at", [-17.5, -60.0, -120.0])
def test_a_detector_of_nothing_is_exported_and_shipped(at: float, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((20, 3, 8, 8)).astype(np.float32)
    bundle = edgekit.export(
        Detector(at).eval(), target="x86", formats="onnx,tflite", precision="fp32", data={"x": x}, out=tmp_path
    )
    assert len(bundle.artifacts) == 2
    assert any("give --data on which the model finds something" in note for note in bundle.notes)
    assert all(replay.problem is None for replay in edgekit.verify(bundle.path))
