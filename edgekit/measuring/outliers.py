"""Outlier runs: those that other work on the machine slowed down, told from the others by their times.

A core that is shared, by the core's other thread or a neighbor on the same machine, changes between a fast and a slow
state every few milliseconds to seconds, and the median of all runs tells how busy the neighbor was. Stretches of runs
that nothing slowed down are alike, and come back in process after process.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgekit.measuring.latency import Latency

if TYPE_CHECKING:
    import numpy as np

STRETCH_MS = 10.0
FASTEST = 1.0  # percentile of the stretches' medians that stands for an undisturbed one: a single fast one is no rule
NEAR = 0.05  # share by which an undisturbed stretch may be slower than that
MARGIN = 0.02  # share of the p50 that it may be off
FEWEST = 5  # processes that tell a p50: where a file lies in memory makes them differ
MANY = 10  # processes, of which some are fast if the machine ever is
QUIET = 0.1  # share of disturbed runs up to which FEWEST are enough


def undisturbed(latency: Latency) -> Latency:
    """Returns `latency` with its undisturbed runs told apart, or as it is where a single process has any.

    A stretch is as many runs in a row as take 10 ms. It is undisturbed if its median is at most 5 % above the first
    percentile of all stretches. A file whose processes slow down step by step is throttled, not disturbed: its first
    runs are not what it keeps up, and all of them count.
    """
    import numpy as np

    from edgekit.runtimes.stopwatch import slowdown

    throttled = sum(slowdown(process) is not None for process in latency.processes)
    if 2 * throttled > len(latency.processes):
        return latency
    stretches = [_stretches(process) for process in latency.processes]
    limit = (1 + NEAR) * np.percentile([np.median(runs) for process in stretches for runs in process], FASTEST)
    kept = ([run for runs in process if np.median(runs) <= limit for run in runs.tolist()] for process in stretches)
    found = tuple(tuple(runs) for runs in kept if runs)
    return replace(latency, undisturbed=found) if len(found) > 1 else latency


def is_known(latency: Latency) -> bool:
    """Whether enough processes have undisturbed runs, and are near enough to each other, to tell the p50."""
    enough = len(latency.processes) >= (FEWEST if latency.disturbed <= QUIET else MANY)
    return enough and len(latency.undisturbed) >= FEWEST and (latency.margin or 0.0) <= MARGIN


def _stretches(process: tuple[float, ...]) -> list[np.ndarray]:
    import numpy as np

    runs = np.asarray(process)
    each = max(1, round(STRETCH_MS / float(np.median(runs))))
    return np.array_split(runs, max(1, len(runs) // each))
