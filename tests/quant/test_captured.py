"""What torch cannot capture is told by the user's own line, with what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgekit.errors import EdgeKitError
from edgekit.quant.passes import capture

Forward = Callable[[torch.Tensor], Any]


@torch.library.custom_op("edgekit_tests::tripled", mutates_args=())
def tripled(x: torch.Tensor) -> torch.Tensor:
    return x * 3


SCRIPTED = torch.jit.script(nn.Linear(3, 3))


class Net(nn.Module):
    """A forward inside another module, as in models that people have."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), Inner(forward))

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


class Inner(nn.Module):
    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function
        self.scripted = SCRIPTED

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def halved(x: torch.Tensor) -> torch.Tensor:
    while x.abs().max() > 1:  # by values
        x = x / 2
    return x


def checked(x: torch.Tensor) -> torch.Tensor:
    assert torch.isfinite(x).all()
    return x * 2


def repeated(x: torch.Tensor) -> torch.Tensor:
    for _ in range(int(x.abs().sum())):
        x = x + 1
    return x


# forward → what its line holds, what torch could not capture, what helps
FAILING: dict[str, tuple[Forward, str, str, str]] = {
    "if": (lambda h: h * 2 if h.mean() > 0 else h - 1, "if h.mean() > 0", "value of a tensor", "torch.where"),
    "while": (halved, "while x.abs().max() > 1:", "value of a tensor", "torch.cond"),
    "range": (repeated, "range(int(", "value of a tensor", "shapes"),
    "slice": (lambda h: h[:, : int(h.sum())], "h[:, : int(h.sum())]", "value of a tensor", "shapes"),
    "assert": (checked, "assert torch.isfinite", "value of a tensor", "checks"),
    "numpy": (lambda h: h + torch.from_numpy(np.sin(h.numpy())), "np.sin(", "NumPy", "torch's functions"),
    "memory": (lambda h: h if h.data_ptr() else h + 1, "h.data_ptr()", "lie in memory", "custom_op"),
    "kernel": (tripled, "return self.function(x)", "shape of its result", "register_fake"),
    "scripted": (lambda h: SCRIPTED(h), "SCRIPTED(h)", "TorchScript", "Python class"),
}


@pytest.mark.parametrize("name", FAILING)
def test_the_line_and_the_remedy(name: str, capfd: pytest.CaptureFixture) -> None:
    forward, line, what, help = FAILING[name]
    with pytest.raises(EdgeKitError) as caught:
        capture(Net(forward).eval(), (torch.ones(2, 3),))
    assert f"{__file__}:" in caught.value.what and line in caught.value.what
    assert what in caught.value.what and help in str(caught.value.help)
    assert len(caught.value.what.splitlines()) == 1
    assert caught.value.__cause__ is not None  # for who looks deeper
    assert not "".join(capfd.readouterr())  # torch logs the half-captured graph


def changed(x: torch.Tensor) -> torch.Tensor:
    x += 1
    return x * 2


@pytest.mark.parametrize(
    "forward",
    [
        lambda h: {"b": h, "a": h * 2}["a"],
        changed,
        lambda h: torch.where(h.mean() > 0, h * 2, h - 1),
        lambda h: torch.cond(h.sum() > 0, lambda h: h * 2, lambda h: h - 1, (h,)),
    ],
)
def test_what_can_be_captured_is(forward: Forward) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(capture(Net(forward).eval(), (x.clone(),))(x.clone()), forward(x.clone()))
