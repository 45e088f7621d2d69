"""A file is called by a precision only where that changed something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgekit
from edgekit.quant.ptq.recipes import RECIPES
from edgekit.quant.ptq.shares import shares


class Volume(nn.Module):
    """Nearly all weights lie in 3-D convolutions, which stay in float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv3d(2, 16, 3), nn.Conv3d(16, 16, 3), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3, 4)))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Softplus(), nn.Conv2d(16, 8, 3))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


VOLUME, IMAGE, ROW = (1, 2, 7, 7, 7), (1, 3, 9, 9), (1, 16)
# network, precision, formats, input → what each file is called, and a part of a note
CASES: dict[str, tuple[Any, str, tuple[int, ...], dict[str, str], str]] = {
    "volume int8": (Volume, "int8", VOLUME, {"onnx": "fp32", "tflite": "fp32"}, "int8 leaves 2 3-D convolution layers"),
    "convolutions dynamic": (
        convolutions,
        "int8-dynamic",
        IMAGE,
        {"executorch": "fp32", "onnx": "int8-dynamic", "tflite": "int8-dynamic"},
        "model.pte: int8 weights beside float inputs changed nothing",
    ),
    "mlp int8": (mlp, "int8", ROW, {"onnx": "int8"}, ""),
    "mlp fp16": (mlp, "fp16", ROW, {"onnx": "fp16", "tflite": "fp16"}, ""),
    "small fp16": (small, "fp16", (1, 4), {"onnx": "fp32", "tflite": "fp32"}, "model.onnx: fp16 changed nothing"),
}


@pytest.mark.parametrize("name", CASES)
def test_files_are_called_what_they_are(name: str, tmp_path: Path) -> None:
    make, precision, shape, called, note = CASES[name]
    data = {"x": np.random.default_rng(0).standard_normal((8, *shape[1:])).astype(np.float32)}
    bundle = edgekit.export(make(), formats=list(called), precision=precision, data=data, out=tmp_path)
    assert {artifact.format: artifact.precision for artifact in bundle.artifacts} == called
    assert bundle.manifest["precision"] == (precision if precision in called.values() else "fp32")
    assert any(note in line for line in bundle.notes)
    for entry in bundle.manifest["artifacts"]:
        if entry["precision"] == "fp32":
            assert entry["parity"]["sqnr_db"] is None or entry["parity"]["sqnr_db"] > 100


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (mlp, ROW, (1.0, 1.0)),
        (convolutions, IMAGE, (1.0, 1.0)),
        # 3 · 16 of its weights, each used once; 27 · 2 · 16 at 125 places and 27 · 16 · 16 at 27 are not
        (Volume, VOLUME, (48 / 7824, 48 / (48 + 864 * 125 + 6912 * 27))),
    ],
)
def test_shares_of_weights_and_multiplications(
    make: Any, shape: tuple[int, ...], expected: tuple[float, float]
) -> None:
    x = torch.randn(shape)
    found = shares(RECIPES["int8"].apply(make().eval(), (x,), [(x,)] * 2, frozenset()).program)
    assert (found.weights, found.products) == pytest.approx(expected)
