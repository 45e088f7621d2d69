"""The original as a baseline: measured once for one content, and on a GPU by its own clock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from kit import SHAPE, invoke, network, quick, samples
from torch import nn

import edgekit
from edgekit.artifacts.bundles import Bundle
from edgekit.data import digests
from edgekit.errors import EdgeKitError
from edgekit.judging.results import Comparison
from edgekit.loading import model
from edgekit.measuring import baseline_cache, running, schedule
from edgekit.measuring.evaluation import Chunk
from edgekit.runtimes import Timing, eager

FEEDS = (np.random.default_rng(0).standard_normal((4, 1, *SHAPE)).astype(np.float32),)
OUTPUTS = (np.arange(6.0, dtype=np.float32).reshape(2, 3), np.arange(4))
PROCESSES = ((2.0, 2.5, 2.1), (2.0,))


class Branching(nn.Module):
    """Its graph depends on its values, so that none can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x.flatten(1))
        return y if float(y.detach().sum()) > 0 else -y


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for baselines."""
    monkeypatch.setattr(baseline_cache, "folder", lambda: tmp_path / "baselines")
    quick(monkeypatch)
    return tmp_path / "baselines"


def load(module: nn.Module) -> model.Model:
    return model.load(module, inputs=["1x3x16x16"])


def key(module: nn.Module, feeds: tuple[np.ndarray, ...] = FEEDS, *options: Any) -> str | None:
    return baseline_cache.key(
        baseline_cache.content(load(module)), [digests.digest_of(feeds)], "cpu", *(options or (1, 3))
    )


def other(change: Callable[[nn.Module], None]) -> nn.Module:
    module = network()
    with torch.no_grad():
        change(module)
    return module


@pytest.mark.parametrize("threads", [1, 2])
def test_an_onnx_original_runs_on_as_many_threads_as_asked(threads: int, tmp_path: Path) -> None:
    """When it gives its outputs, and when it is timed: torch's number of threads does not reach ONNX Runtime."""
    feeds = tuple(feed[:2] for feed in FEEDS)
    torch.onnx.export(network(), (torch.from_numpy(feeds[0][0]),), tmp_path / "net.onnx", dynamo=False)
    module = model.load(tmp_path / "net.onnx").module
    expected = module(torch.from_numpy(feeds[0][0]))[0].numpy()
    (outputs,) = running.run_module(module, feeds, threads=threads)
    np.testing.assert_allclose(outputs[0], expected, rtol=1e-5, atol=1e-6)
    assert module.session.get_session_options().intra_op_num_threads == threads
    running.time_module(module, feeds, "cpu", threads + 1, Timing(1, 0.0, 2, 2))
    assert module.session.get_session_options().intra_op_num_threads == threads + 1


OTHERS = {
    "a weight": lambda: key(other(lambda m: m[0].weight[0, 0, 0, 0].add_(1e-6))),
    "an op without weights": lambda: key(other(lambda m: m.__setitem__(1, nn.ReLU6()))),
    "an attribute": lambda: key(other(lambda m: setattr(m[2], "stride", (1, 1)))),
    "a constant": lambda: key(other(lambda m: m.__setitem__(3, nn.LeakyReLU(0.2)))),
    "another constant": lambda: key(other(lambda m: m.__setitem__(3, nn.LeakyReLU(0.3)))),
    "a sample": lambda: key(network(), (FEEDS[0] + 1e-6,)),
    "fewer samples": lambda: key(network(), (FEEDS[0][:2],)),
    "threads": lambda: key(network(), FEEDS, 2, 3),
    "rounds": lambda: key(network(), FEEDS, 1, 5),
}


def test_the_same_content_has_the_same_key_and_other_content_another() -> None:
    first = key(network())
    assert first is not None
    assert first == key(network())
    keys = {name: make() for name, make in OTHERS.items()}
    assert None not in keys.values()
    assert len({first, *keys.values()}) == 1 + len(OTHERS)


def test_a_model_that_cannot_be_captured_has_no_key() -> None:
    assert key(Branching()) is None
    assert baseline_cache.recall(None) is None
    baseline_cache.keep(None, PROCESSES)
    baseline_cache.keep_outputs(None, OUTPUTS)


def test_an_onnx_file_is_known_by_its_content(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    path = bundles["fp32"].path / "model.onnx"
    proto = onnx.load(path)
    proto.graph.initializer[0].raw_data = bytes(len(proto.graph.initializer[0].raw_data))
    onnx.save(proto, tmp_path / "zero.onnx")
    keys = [baseline_cache.content(model.load(p)) for p in (path, path, tmp_path / "zero.onnx")]
    assert keys[0] is not None
    assert keys[0] == keys[1] != keys[2]


def test_what_was_kept_comes_back(place: Path) -> None:
    assert baseline_cache.recall("a") is None and baseline_cache.recall_outputs("b") is None
    baseline_cache.keep("a", PROCESSES)
    baseline_cache.keep_outputs("b", OUTPUTS)
    assert baseline_cache.recall("a") == PROCESSES
    outputs = baseline_cache.recall_outputs("b")
    assert outputs is not None
    assert [(a.dtype, a.tolist()) for a in outputs] == [(a.dtype, a.tolist()) for a in OUTPUTS]


def test_old_entries_are_forgotten(place: Path) -> None:
    baseline_cache.keep("old", PROCESSES)
    long_ago = time.time() - (baseline_cache.KEPT_DAYS + 1) * 86400
    os.utime(place / "old.npz", (long_ago, long_ago))
    baseline_cache.keep("a", PROCESSES)
    assert [path.name for path in place.iterdir()] == ["a.npz"]


def test_what_was_disturbed_is_not_kept(place: Path) -> None:
    baseline_cache.keep("a", ((1.0, 1.0), (1.2, 1.2), (1.0, 9.0)))
    assert baseline_cache.recall("a") is None
    baseline_cache.keep("a", ((1.0, 1.0), (1.05, 1.05)))
    assert baseline_cache.recall("a") is not None


def test_outputs_beyond_a_size_are_run_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three chunks of 96 bytes of outputs are kept; the outputs are the same either way."""
    monkeypatch.setattr(baseline_cache, "LARGEST", 200)
    original = load(network())
    chunks = [Chunk((FEEDS[0][i : i + 2] + i,), 1, 2, None) for i in range(3)]
    first = baseline_cache.Reference(original, "cpu", 1, cache=True)
    before = [first(chunk)[0] for chunk in chunks]
    ran = []
    real = running.run_module
    monkeypatch.setattr(running, "run_module", lambda *args: (ran.append(args[1][0]), real(*args))[1])
    again = baseline_cache.Reference(original, "cpu", 1, cache=True)
    after = [again(chunk)[0] for chunk in chunks]
    assert [np.array_equal(a, b) for a, b in zip(before, after, strict=True)] == [True] * 3
    assert [np.array_equal(feed, chunks[2].feeds[0]) for feed in ran] == [True]


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut short"])
def test_what_is_damaged_is_measured_again(content: bytes, place: Path) -> None:
    place.mkdir()
    (place / "a.npz").write_bytes(content)
    assert baseline_cache.recall("a") is None


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(place: Path) -> None:
    place.write_text("a file where the folder should be")
    baseline_cache.keep("a", PROCESSES)
    assert baseline_cache.recall("a") is None


def compare(bundles: dict[str, Bundle], **options: Any) -> Comparison:
    return edgekit.compare(network(), [bundles["fp32"].path / "model.onnx"], data=samples(6), **options)


def test_an_original_is_measured_once(bundles: dict[str, Bundle], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time neither its outputs nor its time are taken, and that is said; --no-cache takes both."""
    first = compare(bundles)
    assert not first.baseline.cached
    runs = []
    for name in ("run_module", "time_module"):
        real = getattr(running, name)
        monkeypatch.setattr(running, name, lambda *args, real=real, name=name: (runs.append(name), real(*args))[1])
    second = compare(bundles)
    assert runs == []
    assert second.baseline.cached
    assert second.to_dict()["baseline"]["cached"] is True
    assert second.baseline.latency == first.baseline.latency
    assert second.baseline.accuracy == first.baseline.accuracy
    assert second.artifacts[0].parity == first.artifacts[0].parity
    assert second.artifacts[0].speedup_ci95 is None
    assert (baseline_cache.CACHED in second.notes, baseline_cache.CACHED in first.notes) == (True, False)
    third = compare(bundles, cache=False)
    assert runs == ["run_module", "time_module"]
    assert not third.baseline.cached
    assert compare(bundles).baseline.latency == third.baseline.latency  # the newer one is kept


def test_rounds_are_processes_and_give_intervals(bundles: dict[str, Bundle], place: Path) -> None:
    result = edgekit.compare(network(), [bundles["int8"].path / "model.onnx"], data=samples(6), rounds=3)
    (measured,) = result.artifacts
    assert [len(lat.processes) for lat in (measured.latency, measured.fp32_latency, result.baseline.latency)] == [3] * 3
    entry = measured.to_dict()
    for name in ("speedup", "speedup_fp32"):
        low, high = entry[f"{name}_ci95"]
        assert 0 < low < high
    assert any("x the speed of fp32" in reason for reason in measured.verdict.reasons)


def test_a_gpu_that_is_not_there_is_an_error(
    bundles: dict[str, Bundle], workshop: Path, capfd: pytest.CaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    given = (f"{workshop}/net.py:make", bundles["fp32"].path, "--data", workshop / "data.npz")
    ran = invoke(capfd, "compare", *given, "--baseline-device", "cuda")
    assert ran.code == 1
    assert "without CUDA" in ran.err or "no CUDA device" in ran.err
    assert "leave out --baseline-device" in ran.err


def test_an_onnx_original_runs_on_the_cpu_alone(bundles: dict[str, Bundle]) -> None:
    original = model.load(bundles["fp32"].path / "model.onnx")
    baseline_cache.check(original, "cpu")
    baseline_cache.check(load(network()), "cuda")
    with pytest.raises(EdgeKitError, match="ONNX Runtime on the CPU") as caught:
        baseline_cache.check(original, "cuda")
    assert "--baseline-device" in caught.value.help


def test_feeds_that_lie_on_the_device_are_taken_in_turn() -> None:
    module, feeds = network(), [{"x": sample} for sample in FEEDS[0]]
    call = eager.load(module).resident(feeds)
    with torch.inference_mode():
        expected = [module(torch.from_numpy(feed["x"])) for feed in (*feeds, feeds[0])]
    assert all(torch.equal(call(), out) for out in expected)
    closed = eager.load(module)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        closed.resident(feeds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_timed_by_its_events_in_full_fp32() -> None:
    timing = Timing(warmup_runs=3, seconds=0.0, min_runs=10, max_runs=10)
    wide = nn.Sequential(nn.Conv2d(3, 512, 7, padding=3), nn.Conv2d(512, 512, 7, padding=3)).eval()
    slow, fast = (running.time_module(m, FEEDS, "cuda", 1, timing) for m in (wide, network()))
    assert len(slow) == len(fast) == 10
    assert min(fast) > 0
    assert np.median(slow) > np.median(fast)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    (on_gpu,), (on_cpu,) = (running.run_module(network(), FEEDS, device) for device in ("cuda", "cpu"))
    assert np.abs(on_gpu - on_cpu).max() < 1e-5 * np.abs(on_cpu).max()
    assert "TF32 off" in (baseline_cache.note("cuda") or "")


def test_the_cpu_needs_no_note() -> None:
    assert baseline_cache.note("cpu") is None
    assert schedule.ROUNDS >= 3
