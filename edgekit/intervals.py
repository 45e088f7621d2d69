"""How sure a comparison is: paired tests and 95 % confidence intervals of a drop and of a speed-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgekit.results import Interval, Latency

if TYPE_CHECKING:
    import numpy as np

Z = 1.959964  # the 97.5 % point of the normal distribution
RESAMPLES = 1000
BATCH = 1 << 22  # indices that are drawn at once
FEWEST = 20  # samples: of fewer, a bootstrap knows too little of rare ones
FEWEST_PROCESSES = 2
NO_BOUND = (-math.inf, math.inf)


def agresti_min(n: float, lost: float, won: float) -> Interval:
    """Returns the interval of a paired drop in points: `lost` and `won` of `n` samples are right in one file only.

    It is Agresti and Min's for matched pairs (Statistics in Medicine 24, 2005): Wald's with half an observation added
    to each cell, which holds its 95 % down to no discordant pair at all.
    """
    total = n + 2
    lost, won = lost + 0.5, won + 0.5
    center = (lost - won) / total
    margin = Z * math.sqrt(max(lost + won - (lost - won) ** 2 / total, 0)) / total
    return 100 * (center - margin), 100 * (center + margin)


def mcnemar(lost: int, won: int) -> float:
    """Returns the p-value of McNemar's exact test that as many samples are lost as won: a two-sided binomial test."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def bootstrap(drop: Callable[[np.ndarray], np.ndarray], n: int) -> Interval:
    """Returns the percentile interval of `drop` over resamples of `n` samples, seeded; no bound for fewer than FEWEST.

    `drop` takes counts (R, n), how often each sample is in a resample, and returns (R,): the original and the file are
    measured on the same resample, which pairs them.
    """
    import numpy as np
    from scipy import stats

    if n < FEWEST:
        return NO_BOUND

    def statistic(indices: np.ndarray, axis: int) -> np.ndarray:
        rows = indices.astype(np.int64).reshape(-1, n)
        flat = rows + n * np.arange(len(rows))[:, None]
        return drop(np.bincount(flat.ravel(), minlength=rows.size).reshape(rows.shape).astype(np.float64))

    found = stats.bootstrap(
        (np.arange(n),),
        statistic,
        n_resamples=RESAMPLES,
        batch=max(BATCH // n, 1),
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def none_differs(n: int) -> Interval:
    """Returns the interval of a drop in points where none of `n` samples differs, and any may be lost whole.

    By Clopper and Pearson, a share of 1 − 0.025^(1/n) of all samples may still differ: about 3.7/n.
    """
    bound = 100 * (1 - 0.025 ** (1 / n))
    return -bound, bound


def speedup(reference: Latency, latency: Latency) -> Interval | None:
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
