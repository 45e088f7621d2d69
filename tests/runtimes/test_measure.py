"""The clock: what it counts, when it stops, and what it leaves as it was."""

from __future__ import annotations

import gc
import os
import time

import numpy as np
import pytest

from edgekit.runtimes import stopwatch


class Counter:
    def __init__(self, seconds: float = 0.0) -> None:
        self.calls = 0
        self.collecting: set[bool] = set()
        self._seconds = seconds

    def __call__(self) -> None:
        self.calls += 1
        self.collecting.add(gc.isenabled())
        time.sleep(self._seconds)


@pytest.mark.parametrize(
    ("warmup_runs", "seconds", "min_runs", "max_runs", "samples"),
    [(50, 0.0, 7, 100, 7), (0, 10.0, 1, 9, 9), (3, 0.0, 1, 1, 1)],
)
def test_counts(warmup_runs: int, seconds: float, min_runs: int, max_runs: int, samples: int) -> None:
    call = Counter()
    got = stopwatch.time_runs(call, warmup_runs=warmup_runs, seconds=seconds, min_runs=min_runs, max_runs=max_runs)
    assert len(got) == samples and call.calls == samples + warmup_runs and all(sample >= 0 for sample in got)
    assert call.collecting == {False} and gc.isenabled()


def test_goes_on_for_the_seconds_asked() -> None:
    start = time.perf_counter()
    got = stopwatch.time_runs(Counter(0.001), warmup_runs=0, seconds=0.05, min_runs=1, max_runs=10_000)
    assert time.perf_counter() - start >= 0.05 and len(got) > 1 and min(got) >= 1.0


def test_warmup_of_a_slow_call_is_capped() -> None:
    call = Counter(0.12)
    stopwatch.time_runs(call, warmup_runs=8, seconds=0.0, min_runs=1, max_runs=1)
    assert 4 <= call.calls <= 6  # 8 runs of 50 ms are spent after 3 or 4 of these


def test_collector_comes_back_after_an_error() -> None:
    def fail() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        stopwatch.time_runs(fail, warmup_runs=0, seconds=0.0, min_runs=1, max_runs=1)
    assert gc.isenabled()


@pytest.mark.parametrize("bounds", [(-1, 1.0, 1, 1), (0, -1.0, 1, 1), (0, 1.0, 0, 1), (0, 1.0, 2, 1)])
def test_contradicting_bounds(bounds: tuple[int, float, int, int]) -> None:
    names = ("warmup_runs", "seconds", "min_runs", "max_runs")
    with pytest.raises(ValueError, match="min_runs <= max_runs"):
        stopwatch.time_runs(Counter(), **dict(zip(names, bounds, strict=True)))


@pytest.mark.parametrize(
    ("samples", "q", "value"),
    [([3.0], 99, 3.0), ([1.0, 2.0], 50, 1.5), ([4.0, 1.0, 3.0, 2.0], 90, 3.7), (list(range(101)), 99, 99.0)],
)
def test_percentile(samples: list[float], q: float, value: float) -> None:
    assert stopwatch.percentile(samples, q) == pytest.approx(value)


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        stopwatch.percentile([], 50)


def test_peak_memory_grows_with_use() -> None:
    before = stopwatch.peak_rss_bytes()
    held = np.ones((before or 0) + 100_000_000, dtype=np.uint8)
    after = stopwatch.peak_rss_bytes()
    assert before is not None and after is not None and after > held.nbytes


def test_pin() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        chosen = stopwatch.pin(1)
        assert len(chosen) == 1 and os.sched_getaffinity(0) == set(chosen) <= allowed
        os.sched_setaffinity(0, allowed)
        assert stopwatch.pin(1000) == sorted(allowed)
    finally:
        os.sched_setaffinity(0, allowed)
