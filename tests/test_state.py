"""Models with state in buffers: it is recognized, starts anew in each stream of calls, and goes into every format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import edgekit
from edgekit.errors import EdgeKitError
from edgekit.loading import model
from edgekit.measuring import schedule
from edgekit.runtimes import Timing


class ConvCache(nn.Module):
    """A streaming convolution: the last two steps come before the next ones. It counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)
        self.register_buffer("cache", torch.ones(1, 4, 2))
        self.register_buffer("calls", torch.tensor([3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = torch.cat([self.cache, x], 2)
        self.cache = steps[:, :, -2:]
        self.calls += 1
        return self.conv(steps) * 0.5**self.calls


class KeyCache(nn.Module):
    """Rows of a cache written by index."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(4, 4)
        self.register_buffer("keys", torch.zeros(1, 8, 4))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        self.keys.index_copy_(1, position, self.key(x))
        return self.keys.sum(1)


class PlainAttribute(nn.Module):
    """A recurrent layer whose hidden state is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)
        self.hidden = torch.zeros(1, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden = self.cell(x, self.hidden)
        return self.hidden * 2


class Toggle(nn.Module):
    """A scalar state of booleans, and a buffer that is written and never read."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(4))
        self.register_buffer("on", torch.tensor(False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last.copy_(x[0])
        result = torch.where(self.on, x, self.layer(x))
        self.on.logical_not_()
        return result


class Table(nn.Module):
    """What the first call builds and the next ones read is no state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("positions", torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.positions) < x.shape[1]:
            self.positions = torch.arange(x.shape[1], dtype=x.dtype)
        return self.layer(x) + self.positions


class Growing(nn.Module):
    """A cache without an end."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache = torch.cat([self.cache, x], 1)
        return x + self.cache.sum()


class FromNothing(nn.Module):
    """A state that only the first call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.hidden = x if self.hidden is None else self.hidden + x
        return self.hidden * 2


STATES: list[tuple[Callable[[], nn.Module], list[str], list[str]]] = [
    (ConvCache, ["x:float32[1,4,5]"], ["cache:float32[1,4,2]", "calls:int64[1]"]),
    (KeyCache, ["x:float32[1,2,4]", "position:int64[2]"], ["keys:float32[1,8,4]"]),
    (PlainAttribute, ["x:float32[1,4]"], ["hidden:float32[1,4]"]),
    (Toggle, ["x:float32[1,4]"], ["on:bool[]"]),
    (Table, ["x:float32[1,4]"], []),
]


def stream(module: nn.Module, samples: np.ndarray) -> np.ndarray:
    """What a module gives for samples of one stream, from the state that it holds."""
    with torch.no_grad():
        return np.stack([module(torch.from_numpy(sample[None])).numpy() for sample in samples])


@pytest.mark.parametrize(("kind", "inputs", "states"), STATES, ids=lambda value: getattr(value, "__name__", ""))
def test_state_is_what_later_calls_read(kind: Callable[[], nn.Module], inputs: list[str], states: list[str]) -> None:
    found = model.load(kind().eval(), inputs=inputs)
    assert [str(state.input) for state in found.state] == states
    assert [state.output for state in found.state] == [f"{text.partition(':')[0]}_next" for text in states]
    assert bool(states) == any("state" in note for note in found.notes)


@pytest.mark.parametrize(("kind", "word"), [(Growing, r"\[1,2\] before a call"), (FromNothing, "register_buffer")])
def test_state_that_no_file_can_hold_is_refused(kind: Callable[[], nn.Module], word: str) -> None:
    with pytest.raises(EdgeKitError) as caught:
        model.load(kind().eval(), inputs=["x:float32[1,4]"])
    assert caught.match(word) or word in (caught.value.help or "")


def test_a_call_leaves_no_trace_in_the_module() -> None:
    found = model.load(ConvCache().eval(), inputs=["1x4x5"])
    with torch.no_grad():
        first, again = found.module(*found.example), found.module(*found.example)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_torchscript_with_state_is_refused(tmp_path: Path) -> None:
    torch.jit.trace(KeyCache().eval(), (torch.ones(1, 2, 4), torch.tensor([0, 1]))).save(tmp_path / "net.pt")
    with pytest.raises(EdgeKitError, match="keeps state in its buffer 'keys'"):
        model.load(tmp_path / "net.pt", inputs=["x:float32[1,2,4]", "position:int64[2]"])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_files_follow_a_stream_of_calls(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "TIMING", Timing(0, 0, 1, 1))
    torch.manual_seed(0)
    net = ConvCache().eval()
    samples = np.random.default_rng(0).standard_normal((12, 4, 5)).astype(np.float32)
    bundle = edgekit.export(net, target="x86", precision=precision, data={"x": samples}, out=tmp_path, name="net")
    assert int(net.calls) == 3  # the caller's module is left alone
    golden = np.load(bundle.path / "golden.npz")
    expected = stream(net, samples[:8])
    limit = 1e-6 if precision == "fp32" else 0.05
    for format in ("original", "executorch", "onnx", "tflite"):
        found = golden[f"{format}/output"]
        np.testing.assert_allclose(found, expected, atol=1e-6 if format == "original" else limit)
    assert [replay.problem for replay in edgekit.verify(bundle.path)] == [None] * 3
    comparison = edgekit.compare(again(net), [bundle], data={"x": samples}, cache=False, rounds=1)
    assert min(m.parity.sqnr_db for m in comparison.artifacts) > (100 if precision == "fp32" else 20)


def again(net: nn.Module) -> nn.Module:
    """A fresh copy with the same weights, at the start of its stream."""
    fresh = ConvCache().eval()
    weights = {key: value for key, value in net.state_dict().items() if key.startswith("conv")}
    fresh.load_state_dict(weights, strict=False)
    return fresh


def test_an_application_carries_the_state_as_the_manifest_says(tmp_path: Path) -> None:
    net = ConvCache().eval()
    bundle = edgekit.export(
        net, target="x86", formats="onnx", precision="fp32", inputs=["1x4x5"], out=tmp_path, name="net"
    )
    session = onnxruntime.InferenceSession(bundle.path / "model.onnx", providers=["CPUExecutionProvider"])
    states = {state.input.name: state.value for state in bundle.state}
    samples = np.random.default_rng(1).standard_normal((4, 4, 5)).astype(np.float32)
    given = []
    for sample in samples:
        names = ["output", *(state.output for state in bundle.state)]
        result, *following = session.run(names, {"x": sample[None], **states})
        states = dict(zip(states, following, strict=True))
        given.append(result)
    np.testing.assert_allclose(np.stack(given), stream(net, samples), atol=1e-6)


def test_training_on_samples_in_any_order_is_refused(tmp_path: Path) -> None:
    data = {"x": np.ones((4, 4, 5), np.float32)}
    with pytest.raises(EdgeKitError, match="has state from call to call"):
        edgekit.export(ConvCache(), target="x86", precision="int8", data=data, out=tmp_path, qat=edgekit.Qat())
    with pytest.raises(EdgeKitError, match="has state from call to call"):
        edgekit.prune(ConvCache(), ratio=0.3, data=data, out=tmp_path)
