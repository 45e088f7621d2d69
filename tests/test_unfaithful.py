"""Files that do not compute what the model computes: the cause is named where it lies in the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgekit
from edgekit.artifacts.artifact import Artifact
from edgekit.errors import EdgeKitError
from edgekit.judging import discrepancies
from edgekit.loading.model import load


class Net(nn.Module):
    """A layer, and what a function makes of the module and the layer's outputs."""

    def __init__(self, function: Callable[[Net, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function, self.calls = nn.Linear(8, 8), function, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, self.layer(x))


def counted(net: Net, h: torch.Tensor) -> torch.Tensor:
    net.calls += 1
    return h * net.calls


def seeded(net: Net, h: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return h + torch.randn(8)


def tried(net: Net, h: torch.Tensor) -> torch.Tensor:
    try:
        return h / (abs(int(h.sum())) + 2)
    except Exception:  # in a capture there is no value
        return h


def huge(net: Net, h: torch.Tensor) -> torch.Tensor:
    return (h * 1e4).square() * 1e-9


def tiny(net: Net, h: torch.Tensor) -> torch.Tensor:
    small = h * 1e-20 * 1e-20
    return small / small.abs().mean()


def cancelled(net: Net, h: torch.Tensor) -> torch.Tensor:
    return (h + 300) - 300


# the forward, precision and format → what the message says of it, and what helps
TOLD = {
    "state in an attribute": (counted, "fp32", "onnx", "other outputs when it is called again", "register_buffer"),
    "its own seed": (seeded, "fp32", "onnx", r"seeds its own random numbers \(aten.randn\)", "hold them in a buffer"),
    "an error that it catches": (tried, "fp32", "onnx", "a try that catches errors", "shapes and settings"),
    "beyond half": (huge, "fp16", "executorch", "half precision ends at 65504", "fp32"),
    "denormals": (tiny, "fp32", "tflite", "below 1.2e-38, which runtimes take for 0", "scale them up"),
    "digits of half": (cancelled, "fp16", "executorch", "has 11 bits", "fp32"),
}


@pytest.mark.parametrize("case", TOLD)
def test_the_cause_is_named(case: str, tmp_path: Path) -> None:
    function, precision, format, said, help = TOLD[case]
    with pytest.raises(EdgeKitError, match=said) as refused:
        edgekit.export(Net(function), inputs=["2x8"], precision=precision, formats=[format], out=tmp_path)
    assert re.search(help, refused.value.help) and "report" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_to_blame() -> None:
    original = load(Net(lambda net, h: h), inputs=["2x8"])
    feeds = [np.ones((1, 2, 8), np.float32)]
    artifact = Artifact(Path("model.onnx"), "onnx", "fp32", original.inputs, original.outputs)
    for others, help in ((["tflite"], "--format tflite"), ([], "another --precision")):
        refused = discrepancies.refusal(original, feeds, artifact, "differs", True, others)
        assert refused.what == (
            "model.onnx is not faithful to the model: it differs; nothing in the model explains it: an exporter or a "
            "runtime is at fault"
        )
        assert help in refused.help and "nothing was written" in refused.help


def test_attention_with_a_boolean_mask_of_its_own(tmp_path: Path) -> None:
    """Its buffer is among the numbers that rounding is told by."""
    hidden = torch.tensor([[True, False], [False, False]])

    def attended(net: Net, h: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(h, h, h, attn_mask=net.mask)

    net = Net(attended)
    net.register_buffer("mask", hidden)
    bundle = edgekit.export(net, inputs=["1x2x8"], precision="fp32", formats=["onnx"], out=tmp_path)
    assert len(bundle.artifacts) == 1
