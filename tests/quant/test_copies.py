"""Copies of modules that torch alone refuses to copy, and states that hold more than tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgekit
from edgekit import Qat
from edgekit.compression.finetuning import Samples
from edgekit.quant.graph.copies import deep_copy, state_tensors


class Keeps(nn.Module):
    """Keeps features of its last call, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(4, 3), {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen["last"] = [self.layer(x)]
        return self.seen["last"][0]


MODULES = {
    "weight_norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.ReLU()),
    "spectral_norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3))),
    "features": Keeps,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_modules_that_hold_computed_tensors_are_copied(name: str) -> None:
    module, x = MODULES[name](), torch.randn(2, 4)
    module(x)
    module.eval()
    with pytest.raises(RuntimeError, match="deepcopy"):
        __import__("copy").deepcopy(module)
    copied = deep_copy(module)
    with torch.no_grad():
        torch.testing.assert_close(copied(x), module(x))
        next(copied.parameters()).add_(1)
        assert not torch.equal(next(copied.parameters()), next(module.parameters()))


class Extra(nn.Module):
    """Has an extra state that is no tensor, and a layer normed in the old way."""

    def __init__(self, normed: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        if normed:
            nn.utils.weight_norm(self.first)

    def get_extra_state(self) -> Any:
        return {"epoch": 3, "names": ["a"]}

    def set_extra_state(self, state: Any) -> None:
        assert state["epoch"] == 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


def touch(student: nn.Module, teacher: nn.Module, samples: Samples) -> None:
    for (x,), _ in samples:
        student(x).sum().backward()
        break


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [touch, None])
def test_what_trains_takes_both(training: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = {"x": np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)}
    plan = Qat(epochs=None if training else 1, finetune=training)
    bundle = edgekit.export(Extra(), formats="onnx", precision="int8", data=data, qat=plan, out=tmp_path)
    assert bundle.manifest["artifacts"][0]["parity"]["sqnr_db"] > 15
    pruned = edgekit.prune(
        Extra(normed=False), ratio=0.3, data=data, out=tmp_path, finetune=training, epochs=None if training else 1
    )
    assert state_tensors(pruned.module.inner).keys() == state_tensors(Extra(normed=False)).keys()
