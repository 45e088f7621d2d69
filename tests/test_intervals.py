"""Paired tests and intervals against scipy, and what they promise against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from edgekit import intervals, judge, metrics
from edgekit.results import Accuracy, Latency, Parity

NEAR = Parity(40, 1e-6, 1e-6, 1, 1, 8)
FAST = Latency(((1.0,), (1.0,), (1.0,)), 1)
SLOW = Latency(((2.0,), (2.0,), (2.0,)), 1)


def compared(n: int, lost: int, won: int) -> Accuracy:
    """The accuracy of `n` samples, nine in ten of them right in the original."""
    original = np.arange(n) < 0.9 * n
    artifact = original.copy()
    artifact[:lost] = False
    artifact[n - won :] = True
    return judge.accuracy(metrics.METRICS["top1"], *map(metrics.per_sample, (original, artifact)))


@pytest.mark.parametrize(("n", "lost", "won"), [(100, 4, 1), (200, 0, 0), (20, 0, 2), (300, 270, 0), (1000, 60, 20)])
def test_interval_is_agresti_and_min(n: int, lost: int, won: int) -> None:
    """Wald's interval of a paired difference on the 2x2 table with 1/2 added to each cell."""
    p10, p01 = (lost + 0.5) / (n + 2), (won + 0.5) / (n + 2)
    margin = stats.norm.ppf(0.975) * math.sqrt((p10 + p01 - (p10 - p01) ** 2) / (n + 2))
    got = compared(n, lost, won)
    assert (got.n, got.lost, got.won, got.interval) == (n, lost, won, "Agresti-Min")
    assert got.drop == pytest.approx(100 * (lost - won) / n)
    assert got.ci95 == pytest.approx((100 * (p10 - p01 - margin), 100 * (p10 - p01 + margin)), abs=1e-5)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (0, 7), (12, 3), (40, 40), (90, 41)])
def test_p_is_mcnemars_exact(lost: int, won: int) -> None:
    """Twice the tail of fair coins, by the binomial distribution itself."""
    tail = stats.binom.cdf(min(lost, won), lost + won, 0.5)
    got = compared(1000, lost, won)
    assert got.p_value == pytest.approx(min(2 * tail, 1))
    assert got.to_dict()["p_value"] == got.p_value


@pytest.mark.parametrize(("n", "lost", "won"), [(100, 0.05, 0.02), (500, 0.01, 0.002), (2000, 0.02, 0.02)])
def test_interval_covers_the_true_drop_95_times_in_100(n: int, lost: float, won: float) -> None:
    draws = np.random.default_rng(0).multinomial(n, [lost, won, 1 - lost - won], size=2000)
    found = [intervals.agresti_min(n, *row[:2]) for row in draws]
    assert np.mean([low <= 100 * (lost - won) <= high for low, high in found]) >= 0.94


def words(n: int, lost: float, won: float, count: int, limit: float) -> list[str]:
    """Verdicts on data sets in which each sample is lost or won at these rates."""
    draws = np.random.default_rng(1).multinomial(n, [lost, won, 1 - lost - won], size=count)
    results = [compared(n, int(row[0]), int(row[1])) for row in draws]
    return [judge.verdict("int8", result, FAST, SLOW, NEAR, limit).word for result in results]


@pytest.mark.parametrize(("lost", "won"), [(0.03, 0.0), (0.04, 0.01), (0.06, 0.03)])
def test_a_drop_of_3_points_is_not_shipped(lost: float, won: float) -> None:
    """At a limit of 1: 400 samples reject it or leave it open, 10,000 reject it."""
    assert set(words(400, lost, won, 200, 1.0)) <= {"reject", "inconclusive"}
    assert set(words(10_000, lost, won, 200, 1.0)) == {"reject"}


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize(("n", "rate"), [(400, 0.03), (400, 0.005), (10_000, 0.02)])
def test_no_drop_is_rarely_rejected(n: int, rate: float, limit: float) -> None:
    """Of 200 data sets in which as many samples are won as lost, fewer than 5 % are rejected."""
    assert words(n, rate, rate, 200, limit).count("reject") < 10


def bootstrapped(before: np.ndarray, after: np.ndarray) -> Accuracy:
    return judge.accuracy(metrics.METRICS["cosine"], metrics.per_sample(before), metrics.per_sample(after))


def test_bootstrap_is_scipys_on_pairs() -> None:
    rng = np.random.default_rng(0)
    before = rng.beta(8, 2, 300)
    after = before - rng.normal(0.02, 0.05, 300)
    theirs = stats.bootstrap(
        (before, after), lambda a, b, axis: 100 * (a.mean(axis=axis) - b.mean(axis=axis)), paired=True,
        n_resamples=4000, method="percentile", rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    got = bootstrapped(before, after)
    width = theirs.high - theirs.low
    assert got.interval == "paired bootstrap"
    assert got.p_value is None
    assert got.ci95 == pytest.approx(tuple(theirs), abs=0.08 * width)
    assert got.ci95 == bootstrapped(before, after).ci95  # seeded
    unpaired = stats.bootstrap((before - after.mean(),), np.mean, method="percentile", rng=np.random.default_rng(5))
    assert width < 100 * (unpaired.confidence_interval.high - unpaired.confidence_interval.low)


@pytest.mark.parametrize("n", [60, 400])
def test_bootstrap_covers_the_true_drop(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of skewed losses: few samples lose much. And a file that loses nothing is rarely rejected."""
    monkeypatch.setattr(intervals, "RESAMPLES", 400)
    rng = np.random.default_rng(2)
    hits, rejects = [], 0
    for _ in range(120):
        before = rng.beta(8, 2, n)
        noise, loss = rng.normal(0, 0.03, n), rng.exponential(0.02, n)
        low, high = bootstrapped(before, before + noise - loss).ci95
        hits.append(low <= 2.0 <= high)
        same = bootstrapped(before, before + noise)
        rejects += judge.verdict("int8", same, FAST, SLOW, NEAR, 0.0).word == "reject"
    assert np.mean(hits) >= 0.9
    assert rejects < 6


def test_a_drop_of_3_points_is_not_shipped_by_a_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit of 1, with noise that leaves it open for 400 samples and not for 10,000."""
    monkeypatch.setattr(intervals, "RESAMPLES", 400)
    rng = np.random.default_rng(3)
    for n, count, allowed in ((400, 60, {"reject", "inconclusive"}), (10_000, 5, {"reject"})):
        found = set()
        for _ in range(count):
            before = rng.beta(8, 2, n)
            after = before + rng.normal(0, 0.2, n) - rng.exponential(0.03, n)
            found.add(judge.verdict("int8", bootstrapped(before, after), FAST, SLOW, NEAR, 1.0).word)
        assert found == allowed


def test_few_samples_have_no_interval_and_are_never_shipped() -> None:
    scores = np.linspace(0.5, 0.9, intervals.FEWEST - 1)
    got = bootstrapped(scores, scores)
    assert got.ci95 == (-math.inf, math.inf)
    assert got.to_dict()["ci95_points"] == [None, None]
    verdict = judge.verdict("int8", got, FAST, SLOW, NEAR, 50.0)
    assert verdict.word == "inconclusive"
    assert "about 1 more samples" in verdict.reasons[0]


def test_samples_that_do_not_differ_bound_how_many_may() -> None:
    """The bound is Clopper and Pearson's on the share of samples that differ."""
    scores = np.linspace(0.5, 0.9, 100)
    got = bootstrapped(scores, scores)
    share = stats.binomtest(0, 100).proportion_ci(0.95, "exact").high
    assert got.ci95 == pytest.approx((-100 * share, 100 * share))


def latencies(logs: np.ndarray) -> Latency:
    return Latency(tuple((float(value), float(value) * 1.001) for value in np.exp(logs)), 1)


def test_speedup_is_students_interval_of_paired_logarithms() -> None:
    rng = np.random.default_rng(0)
    drift = rng.normal(0, 0.5, 6)
    before, after = latencies(drift + 0.7 + rng.normal(0, 0.02, 6)), latencies(drift + rng.normal(0, 0.02, 6))
    test = stats.ttest_rel(np.log(before.medians), np.log(after.medians)).confidence_interval(0.95)
    assert intervals.speedup(before, after) == pytest.approx((math.exp(test.low), math.exp(test.high)))


def test_speedup_covers_the_true_ratio_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(1000):
        drift = rng.normal(0, 0.1, 3)
        low, high = intervals.speedup(latencies(drift + 0.3 + rng.normal(0, 0.02, 3)), latencies(drift))  # type: ignore[misc]
        hits.append(low <= math.exp(0.3) <= high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


def test_one_process_has_no_interval() -> None:
    one = Latency(((1.0, 1.1, 0.9),), 1)
    assert intervals.speedup(one, one) is None
    assert intervals.speedup(FAST, FAST) == (1.0, 1.0)


def test_the_margin_of_a_p50_is_half_of_students_interval() -> None:
    medians = [1.0, 1.1, 1.05, 1.2]
    low, high = stats.ttest_1samp(medians, 0).confidence_interval()
    latency = Latency(tuple((value,) for value in medians), 1)
    assert latency.margin == pytest.approx((high - low) / 2 / latency.p50)
    assert latency.to_dict()["p50_margin"] == latency.margin
    assert Latency(((1.0, 2.0),), 1).margin is None
