"""Latencies: raw samples, percentiles, and 95 % intervals of a p50 and of a speed-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgekit.types import Interval
from edgekit.util.wording import counted


@dataclass(frozen=True, repr=False)
class Latency:
    """Raw latencies in ms of one artifact: a tuple of samples for each process that measured it.

    `undisturbed` holds those that nothing slowed down, of the processes that have some, where they are told apart (see
    `edgekit.measuring.outliers`): the medians are of them, and all other percentiles of all samples.
    """

    processes: tuple[tuple[float, ...], ...]
    threads: int
    undisturbed: tuple[tuple[float, ...], ...] = ()

    def __repr__(self) -> str:
        return f"Latency(p50 {self.p50:.4g} ms, {counted(len(self.samples), 'run')}, {counted(self.threads, 'thread')})"

    @property
    def samples(self) -> tuple[float, ...]:
        """All samples of all processes."""
        return tuple(value for process in self.processes for value in process)

    def percentile(self, q: float) -> float:
        """Returns the q-th percentile (0–100) of all samples, linearly interpolated, in ms."""
        from edgekit.runtimes.stopwatch import percentile

        return percentile(self.samples, q)

    @property
    def medians(self) -> tuple[float, ...]:
        """The median of each process, in ms; of the undisturbed runs where they are told apart."""
        from edgekit.runtimes.stopwatch import percentile

        return tuple(percentile(process, 50) for process in self.undisturbed or self.processes)

    @property
    def disturbed(self) -> float:
        """The share of the samples that the p50 leaves out."""
        return 1 - sum(map(len, self.undisturbed)) / len(self.samples) if self.undisturbed else 0.0

    @property
    def p50(self) -> float:
        """Median over the processes of each process's median, in ms: one disturbed process does not move it."""
        from edgekit.runtimes.stopwatch import percentile

        return percentile(self.medians, 50)

    @property
    def margin(self) -> float | None:
        """How far the p50 may be off, as a share of it (see `intervals.margin`); None of one process."""
        pass

        return margin(self)

    @property
    def slowdown(self) -> float | None:
        """How many times slower the runs became, as a throttled processor's do, or None where they did not.

        It is the most that a process slowed down (see `stopwatch.slowdown`), or all processes one after another.
        """
        from edgekit.runtimes.stopwatch import slowdown

        found = [ratio for part in (*self.processes, self.medians) if (ratio := slowdown(part)) is not None]
        return max(found, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form: percentiles in ms, number of samples, threads."""
        return {
            "p50": self.p50,
            "p50_margin": self.margin,
            "disturbed": self.disturbed,
            "p90": self.percentile(90),
            "p99": self.percentile(99),
            "n": len(self.samples),
            "processes": len(self.processes),
            "threads": self.threads,
            "slowdown": self.slowdown,
        }


FEWEST_PROCESSES = 2


def speedup_interval(reference: Latency, latency: Latency) -> Interval | None:
    """Returns the interval of how many times faster `latency` is than `reference`; None of fewer than two processes.

    Both were measured in turn, a process each: the logarithms of the ratios of their medians, round by round, are
    taken as normal, and their mean has Student's interval. What moves both files of a round cancels out.
    """
    logs = [
        math.log(before / after)
        for before, after in zip(reference.medians, latency.medians, strict=False)
        if before > 0 and after > 0
    ]
    if len(logs) < FEWEST_PROCESSES:
        return None
    mean, half = sum(logs) / len(logs), _students_half(logs)
    return math.exp(mean - half), math.exp(mean + half)


def margin(latency: Latency) -> float | None:
    """Returns how far the p50 may be off, as a share of it; None of fewer than two processes.

    It is half of Student's 95 % interval of the processes' medians, which are taken as normal.
    """
    medians = latency.medians
    if len(medians) < FEWEST_PROCESSES or not latency.p50:
        return None
    return _students_half(medians) / latency.p50


def _students_half(values: Sequence[float]) -> float:
    """Returns half of Student's 95 % interval of the mean of `values`, which are two or more."""
    from scipy import stats

    mean, count = sum(values) / len(values), len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return float(stats.t.ppf(0.975, count - 1)) * error
