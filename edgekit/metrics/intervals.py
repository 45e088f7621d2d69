"""How sure a comparison is: paired tests and 95 % confidence intervals of a drop and of a speed-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgekit.types import Interval

if TYPE_CHECKING:
    import numpy as np

Z = 1.959964  # the 97.5 % point of the normal distribution
RESAMPLES = 999  # with which the quantiles of 2.5 and 97.5 % are the 25th from either end
BATCH = 1 << 22  # weights that are drawn at once
GRAIN = 1 << 20  # weights are multiples of 1/GRAIN, so that their sums are exact: all is found at a recall of 1
FEWEST = 20  # samples: of fewer, no bound says anything
NO_BOUND = (-math.inf, math.inf)


def tango(n: float, lost: float, won: float) -> Interval:
    """Returns the interval of a paired drop in points: `lost` and `won` of `n` samples are right in one file only.

    It is Tango's score interval for matched pairs (Statistics in Medicine 17, 1998): all drops that the test of the
    score does not tell from what was seen. Of no discordant pair it is ±3.84/(n + 3.84); Agresti and Min's interval,
    at half of that, misses a share of 0.5 % that is lost in 13 % of all data sets of 400 samples.
    """
    return -100 * _highest_drop(n, won, lost), 100 * _highest_drop(n, lost, won)


def _highest_drop(n: float, lost: float, won: float) -> float:
    """Returns the largest drop, as a share, that Tango's score does not tell from `lost` and `won` of `n`."""
    from scipy.optimize import brentq

    def score(drop: float) -> float:
        """Returns how many standard errors, as they are at this drop, the seen one lies above `drop`, and Z more."""
        b = (2 * n - lost + won) * drop - lost - won
        both = (math.sqrt(max(b * b + 8 * n * won * drop * (1 - drop), 0.0)) - b) / (4 * n)  # its likeliest `won`
        return lost - won - n * drop + Z * math.sqrt(max(n * (2 * both + drop * (1 - drop)), 0.0))

    above = (lost - won) / n + 1e-6 / n  # where the score is 0 at what was seen, it rises before it falls
    return float(brentq(score, above, 1.0)) if above < 1 and score(1.0) < 0 else 1.0


def mcnemar(lost: int, won: int) -> float:
    """Returns the p-value of McNemar's exact test that as many samples are lost as won: a two-sided binomial test."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def resampled(
    highest: Callable[[np.ndarray], np.ndarray], lowest: Callable[[np.ndarray], np.ndarray], n: int
) -> Interval:
    """Returns the interval of a drop that is measured on `n` samples; no bound for fewer than FEWEST.

    `highest` and `lowest` take weights (R, n + 1), how much of each sample is in a resample, and return the drop (R,)
    of original and file on it, which pairs them. What samples have not shown they cannot bound: the last weight is that
    of one sample more, lost wholly by the file in `highest` and by the original in `lowest`. The weights are spacings
    of n uniform numbers, and the bounds are the quantiles of 97.5 % and 2.5 %.

    This is Gaffke's bound of the mean of bounded numbers ("Three test statistics for a nonparametric one-sided
    hypothesis on the mean of a nonnegative variable", Mathematical Methods of Statistics 14, 2005; Learned-Miller and
    Thomas, arXiv:1905.06208), here of any function of the samples. Of numbers of which k are 1 and the others 0 it is
    Clopper and Pearson's: up to 3.7/n may be lost where no loss was seen. A bootstrap without the last sample says 0.
    """
    import numpy as np

    if n < FEWEST:
        return NO_BOUND
    rng = np.random.default_rng(0)
    # The last weight is drawn evenly from its distribution, whose tail is the bound where no sample differs.
    last = 1 - (1 - np.arange(1, RESAMPLES + 1) / (RESAMPLES + 1)) ** (1 / n)
    found = []
    for start in range(0, RESAMPLES, max(BATCH // n, 1)):
        share = last[start : start + max(BATCH // n, 1), None]
        spacings = rng.standard_exponential((len(share), n))
        weights = np.concatenate([spacings * (1 - share) / spacings.sum(axis=1, keepdims=True), share], axis=1)
        weights = np.round(weights * (n + 1) * GRAIN) / GRAIN
        found.append([highest(weights), lowest(weights)])
    upper, lower = np.concatenate(found, axis=1)
    return (
        float(np.quantile(lower, 0.025, method="weibull")),
        float(np.quantile(upper, 0.975, method="weibull")),
    )


def with_unseen(n: int) -> np.ndarray:
    """Returns weights (1, n + 1) of n samples alike and of one lost wholly, as large as Gaffke's bound has it alone."""
    import numpy as np

    share = 1 - 0.025 ** (1 / n)
    return np.array([[(1 - share) / n] * n + [share]])
