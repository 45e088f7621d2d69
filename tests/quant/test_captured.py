"""What torch cannot capture is told by the user's own line, with what to write instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgekit.errors import EdgeKitError
from edgekit.quant.graph.passes import capture

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


RECURRENT = {kind.__name__: kind(3, 4, batch_first=True) for kind in (nn.LSTM, nn.GRU, nn.RNN)}


def packed(kind: str) -> Forward:
    def forward(x: torch.Tensor) -> torch.Tensor:
        lengths = torch.full((1,), len(x))
        sequence = nn.utils.rnn.pack_padded_sequence(x[None], lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = RECURRENT[kind](sequence)
        return nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)[0]

    return forward


def in_a_thread(x: torch.Tensor) -> torch.Tensor:
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(lambda: x * 2).result()


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
    "text": (lambda h: h * len(f"{h.mean():.3f}"), "h.mean():.3f", "asks for one", "texts"),
    "json": (lambda h: h * len(json.dumps(h.tolist())), "json.dumps(", "asks for one", "Python's numbers"),
    "nested": (lambda h: torch.nested.nested_tensor([h[0]]).to_padded_tensor(0.0), "nested_tensor(", "nested", "pad"),
    **{f"packed {kind}": (packed(kind), "RECURRENT[kind](sequence)", "packed sequence", "mask") for kind in RECURRENT},
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


def test_a_cause_without_a_line() -> None:
    with pytest.raises(EdgeKitError, match="something that a graph does not follow, such as another thread"):
        capture(Net(in_a_thread).eval(), (torch.ones(2, 3),))


def test_masked_outputs_are_those_of_a_packed_sequence() -> None:
    """What the message tells to write instead."""
    torch.manual_seed(0)
    x, lengths, layer = torch.randn(3, 5, 3), torch.tensor([5, 2, 3]), RECURRENT["LSTM"]
    given = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected, (last, _) = layer(given)
    y = layer(x)[0]
    masked = y * (torch.arange(y.shape[1]) < lengths[:, None])[..., None]
    torch.testing.assert_close(masked, nn.utils.rnn.pad_packed_sequence(expected, batch_first=True)[0])
    torch.testing.assert_close(y[torch.arange(len(y)), lengths - 1], last[0])


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
