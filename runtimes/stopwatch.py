"""The only clock: warm-up and timed runs, percentiles, peak memory and pinning.

It is pushed to devices beside the worker, so it imports the standard library and numpy alone.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

# 50 warm-ups bring a pinned process to within 0.5 % of its final median. Above 50 ms a run, caches and clocks have
# settled after fewer, and the cap keeps a slow model from spending minutes on them.
WARMUP_RUN_CAP_S = 0.05
WARMUP_RUNS_AT_LEAST = 3
SLOWER = 1.10  # the last third of the runs against the first: more than timing varies by
THIRDS_FROM = 9  # runs: thirds of fewer are single runs


def time_runs(
    call: Callable[[], object],
    *,
    warmup_runs: int,
    seconds: float,
    min_runs: int,
    max_runs: int,
    own_ms: Callable[[], float] | None = None,
) -> list[float]:
    """Milliseconds of each timed `call()`, in order, after warm-up and with the garbage collector off.

    `own_ms` tells what the last call took where it has a clock of its own, as a GPU has.

    Warm-up ends after `warmup_runs` calls, or once it has taken `warmup_runs` x 50 ms and at least 3 calls. Timing ends
    when both `seconds` have passed and `min_runs` are done, and never goes beyond `max_runs`.

    Raises ValueError for bounds that contradict each other.
    """
    if warmup_runs < 0 or seconds < 0 or min_runs < 1 or max_runs < min_runs:
        raise ValueError(
            "timing needs warmup_runs >= 0, seconds >= 0 and 1 <= min_runs <= max_runs, got "
            f"warmup_runs={warmup_runs}, seconds={seconds}, min_runs={min_runs}, max_runs={max_runs}"
        )
    clock = time.perf_counter_ns
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        warmup_end = clock() + int(warmup_runs * WARMUP_RUN_CAP_S * 1e9)
        for done in range(warmup_runs):
            if done >= WARMUP_RUNS_AT_LEAST and clock() >= warmup_end:
                break
            call()
        samples: list[float] = []
        end = clock() + int(seconds * 1e9)
        while len(samples) < max_runs:
            start = clock()
            call()
            stop = clock()
            samples.append((stop - start) / 1e6 if own_ms is None else own_ms())
            if stop >= end and len(samples) >= min_runs:
                break
    finally:
        if collecting:
            gc.enable()
    return samples


def longest_s(run_s: float, *, warmup_runs: int, seconds: float, min_runs: int, max_runs: int) -> float:
    """How many seconds `time_runs` takes at most with a call that takes `run_s`."""
    warmup = min(warmup_runs * run_s, max(warmup_runs * WARMUP_RUN_CAP_S, WARMUP_RUNS_AT_LEAST * run_s) + run_s)
    return warmup + min(max(seconds, min_runs * run_s) + run_s, max_runs * run_s)


def percentile(samples: Sequence[float], q: float) -> float:
    """The `q`-th percentile (0 to 100) by linear interpolation between order statistics: numpy's default.

    Source: Hyndman and Fan, "Sample Quantiles in Statistical Packages", 1996, definition 7. Raises ValueError when
    `samples` is empty.
    """
    if len(samples) == 0:
        raise ValueError("a percentile needs at least one sample")
    return float(np.percentile(np.asarray(samples, dtype=np.float64), q, method="linear"))


def slowdown(samples: Sequence[float]) -> float | None:
    """How many times slower runs became from their first third to their last, None where that is at most 1.1.

    A throttled processor slows down step by step: the middle third lies in between. Few samples, one of each process,
    have to rise each time.
    """
    if len(samples) < 3:
        return None
    parts = np.array_split(np.asarray(samples, dtype=np.float64), 3 if len(samples) >= THIRDS_FROM else len(samples))
    medians = [float(np.median(part)) for part in parts]
    rising = all(before < after for before, after in pairwise(medians))
    return medians[-1] / medians[0] if rising and medians[-1] > SLOWER * medians[0] else None


def peak_rss_bytes() -> int | None:
    """Peak resident memory of this process in bytes, or None on a system without /proc.

    It is VmHWM, which starts anew at exec. `getrusage().ru_maxrss` is inherited across exec, so that the small child
    of a large parent would report the parent.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def pin(threads: int) -> list[int]:
    """Pin this process to the `threads` fastest cores it may use; the cores, empty where it cannot.

    Call it before a runtime is imported: thread pools read the affinity when they start. Fewer than `threads` cores
    come back where the machine has no more.
    """
    if not hasattr(os, "sched_setaffinity"):
        return []
    chosen = sorted(sorted(os.sched_getaffinity(0), key=_core_rank)[:threads])
    os.sched_setaffinity(0, chosen)
    return chosen


def _core_rank(cpu: int) -> tuple[int, int, int]:
    """Sort key: hardware threads before their siblings, fast cores before slow ones (big.LITTLE), lower numbers."""
    folder = Path(f"/sys/devices/system/cpu/cpu{cpu}")
    siblings = _read(folder / "topology/thread_siblings_list").replace("-", ",").split(",")
    khz = _read(folder / "cpufreq/cpuinfo_max_freq")
    return (int(siblings[0] not in ("", str(cpu))), -int(khz or 0), cpu)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
