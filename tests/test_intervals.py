"""Paired tests and intervals against scipy, and what they promise against simulation."""

from __future__ import annotations

import math

import losses
import numpy as np
import pytest
from scipy import optimize, stats

from edgekit.judging import verdicts
from edgekit.measuring.latency import Latency, speedup_interval
from edgekit.metrics import accuracy, intervals, table
from edgekit.metrics.accuracy import Accuracy
from edgekit.metrics.parity import Parity
from edgekit.metrics.scores import per_sample

NEAR = Parity(40, 1e-6, 1e-6, 1, 1, 8)
FAST = Latency(((1.0,), (1.0,), (1.0,)), 1)
SLOW = Latency(((2.0,), (2.0,), (2.0,)), 1)


def compared(n: int, lost: int, won: int) -> Accuracy:
    """The accuracy of `n` samples, nine in ten of them right in the original."""
    original = np.arange(n) < 0.9 * n
    artifact = original.copy()
    artifact[:lost] = False
    artifact[n - won :] = True
    return accuracy.accuracy_of(table.METRICS["top1"], *map(per_sample, (original, artifact)))


COUNTS = [(100, 4, 1), (200, 0, 0), (20, 0, 2), (300, 270, 0), (300, 300, 0), (1000, 60, 20), (400, 0, 400)]


def score_of(n: int, lost: int, won: int, drop: float) -> float:
    """Tango's score of a drop: its standard error is that of the likeliest shares among those with this drop."""

    def unlikely(share: float) -> float:
        cells = np.array([lost, won, n - lost - won]), np.array([share + drop, share, 1 - 2 * share - drop])
        return -float(sum(count * math.log(p) for count, p in zip(*cells, strict=True) if count))

    tiny = 1e-12
    found = optimize.minimize_scalar(
        unlikely, bounds=(max(-drop, 0) + tiny, (1 - drop) / 2 - tiny), method="bounded", options={"xatol": 1e-10}
    )
    variance = (2 * found.x + drop - drop**2) / n
    return ((lost - won) / n - drop) / math.sqrt(variance)


@pytest.mark.parametrize(("n", "lost", "won"), COUNTS)
def test_interval_is_all_that_the_score_does_not_exclude(n: int, lost: int, won: int) -> None:
    got = compared(n, lost, won) if lost + won < 0.9 * n else None
    interval = intervals.tango(n, lost, won)
    if got is not None:
        assert (got.n, got.lost, got.won, got.interval) == (n, lost, won, "Tango")
        assert got.drop == pytest.approx(100 * (lost - won) / n)
        assert got.ci95 == interval
    for bound, z in zip(interval, (1.959964, -1.959964), strict=True):
        if abs(bound) < 100:
            assert score_of(n, lost, won, bound / 100) == pytest.approx(z, abs=1e-3)
        else:
            assert bound == pytest.approx(100 * (lost - won) / n)


@pytest.mark.parametrize(("n", "k"), [(20, 3), (400, 0), (100, 100)])
def test_interval_of_losses_alone_ends_where_wilsons_does(n: int, k: int) -> None:
    theirs = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
    assert intervals.tango(n, k, 0)[1] == pytest.approx(100 * theirs.high, abs=1e-3)
    assert intervals.tango(n, 0, k)[0] == pytest.approx(-100 * theirs.high, abs=1e-3)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (0, 7), (12, 3), (40, 40), (90, 41)])
def test_p_is_mcnemars_exact(lost: int, won: int) -> None:
    """Twice the tail of fair coins, by the binomial distribution itself."""
    tail = stats.binom.cdf(min(lost, won), lost + won, 0.5)
    got = compared(1000, lost, won)
    assert got.p_value == pytest.approx(min(2 * tail, 1))
    assert got.to_dict()["p_value"] == got.p_value


RATES = [
    (20, 0.1, 0.0), (50, 0.03, 0.0), (100, 0.05, 0.02), (100, 0.02, 0.0), (200, 0.01, 0.0), (400, 0.005, 0.0),
    (400, 0.01, 0.0), (500, 0.01, 0.002), (2000, 0.02, 0.02),
]  # fmt: skip


@pytest.mark.parametrize(("n", "lost", "won"), RATES)
def test_interval_covers_the_true_drop(n: int, lost: float, won: float) -> None:
    """Also where a few samples in a hundred or a thousand are lost. All data sets are tried, by their probability."""
    counts = np.array(
        [(a, b) for a in range(n + 1) for b in range(n + 1 - a if won else 1) if a + b < 9 + 3 * n * (lost + won)]
    )
    chances = stats.multinomial.pmf([(a, b, n - a - b) for a, b in counts], n, [lost, won, 1 - lost - won])
    likely = chances > 1e-6
    bounds = np.array([intervals.tango(n, *row) for row in counts[likely].tolist()])
    true = 100 * (lost - won)
    too_low, too_high = (chances[likely][side].sum() for side in (bounds[:, 1] < true, bounds[:, 0] > true))
    assert too_low + too_high < 0.07
    assert too_low < 0.027


def words(n: int, lost: float, won: float, count: int, limit: float) -> list[str]:
    """Verdicts on data sets in which each sample is lost or won at these rates."""
    draws = np.random.default_rng(1).multinomial(n, [lost, won, 1 - lost - won], size=count)
    results = [compared(n, int(row[0]), int(row[1])) for row in draws]
    return [verdicts.verdict("int8", result, FAST, SLOW, NEAR, limit).word for result in results]


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


def resampled(before: np.ndarray, after: np.ndarray) -> Accuracy:
    return accuracy.accuracy_of(table.METRICS["cosine"], per_sample(before), per_sample(after))


def test_of_many_samples_the_interval_is_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    before = rng.beta(8, 2, 5000)
    after = before - rng.normal(0.02, 0.3, 5000)
    theirs = stats.bootstrap(
        (before, after), lambda a, b, axis: 100 * (a.mean(axis=axis) - b.mean(axis=axis)), paired=True,
        n_resamples=2000, method="percentile", rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    got = resampled(before, after)
    width = theirs.high - theirs.low
    assert got.interval == "Gaffke"
    assert got.p_value is None
    assert got.ci95 == pytest.approx(tuple(theirs), abs=0.08 * width)
    assert got.ci95 == resampled(before, after).ci95  # seeded


@pytest.mark.parametrize(("n", "k"), [(20, 0), (100, 1), (400, 12), (50, 50)])
def test_of_scores_that_are_lost_wholly_or_kept_the_bound_is_clopper_and_pearsons(n: int, k: int) -> None:
    kept = np.ones(n)
    got = resampled(kept, np.where(np.arange(n) < k, 0.0, 1.0 - 1e-9))
    bound = 100 * stats.binomtest(k, n).proportion_ci(0.95, "exact").high
    assert got.ci95[1] == pytest.approx(bound, rel=0.05)


@pytest.mark.parametrize("n", [300, 1000])
def test_of_samples_with_little_noise_the_interval_is_little_more_than_what_is_unseen(n: int) -> None:
    """An interval of whole losses would be of no use if ordinary noise made it wide."""
    rng = np.random.default_rng(0)
    before = rng.beta(80, 2, n)
    got = resampled(before, before - rng.normal(0.001, 0.01, n))
    assert got.unseen == pytest.approx(100 * (1 - 0.025 ** (1 / n)), rel=0.1)
    assert got.ci95[1] < got.drop + 1.1 * got.unseen
    assert got.to_dict()["unseen_points"] == got.unseen


@pytest.mark.parametrize("n", [60, 400])
def test_resampling_covers_the_true_drop(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of skewed losses: few samples lose much. And a file that loses nothing is rarely rejected."""
    monkeypatch.setattr(intervals, "RESAMPLES", 399)
    rng = np.random.default_rng(2)
    hits, rejects = [], 0
    for _ in range(120):
        before = rng.beta(8, 2, n)
        noise, loss = rng.normal(0, 0.03, n), rng.exponential(0.02, n)
        low, high = resampled(before, before + noise - loss).ci95
        hits.append(low <= 2.0 <= high)
        same = resampled(before, before + noise)
        rejects += verdicts.verdict("int8", same, FAST, SLOW, NEAR, 0.0).word == "reject"
    assert np.mean(hits) >= 0.9
    assert rejects < 6


def test_a_drop_of_3_points_is_not_shipped_by_resampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit of 1, with noise that leaves it open for 400 samples and not for 10,000."""
    monkeypatch.setattr(intervals, "RESAMPLES", 399)
    rng = np.random.default_rng(3)
    for n, count, allowed in ((400, 60, {"reject", "inconclusive"}), (10_000, 5, {"reject"})):
        found = set()
        for _ in range(count):
            before = rng.beta(8, 2, n)
            after = before + rng.normal(0, 0.2, n) - rng.exponential(0.03, n)
            found.add(verdicts.verdict("int8", resampled(before, after), FAST, SLOW, NEAR, 1.0).word)
        assert found == allowed


def test_few_samples_have_no_interval_and_are_never_shipped() -> None:
    scores = np.linspace(0.5, 0.9, intervals.FEWEST - 1)
    got = resampled(scores, scores)
    assert got.ci95 == (-math.inf, math.inf)
    assert got.to_dict()["ci95_points"] == [None, None]
    verdict = verdicts.verdict("int8", got, FAST, SLOW, NEAR, 50.0)
    assert verdict.word == "inconclusive"
    assert "about 1 more samples" in verdict.reasons[0]


def test_samples_that_do_not_differ_bound_how_many_may() -> None:
    """The bound is Clopper and Pearson's on the share of samples that differ."""
    scores = np.linspace(0.5, 0.9, 100)
    got = resampled(scores, scores)
    share = stats.binomtest(0, 100).proportion_ci(0.95, "exact").high
    assert got.ci95 == pytest.approx((-100 * share, 100 * share))


LOSSES = [("cosine", 60), ("miou", 60), ("f1", 60), ("map", 8), ("mae", 30), ("rmse", 30), ("top1", 100)]


@pytest.mark.parametrize(("name", "count"), LOSSES)
def test_rare_whole_losses_are_in_the_interval_and_not_shipped(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 % of the samples are lost wholly: many data sets of 20 or 50 hold none. See benchmarks/judging.py."""
    monkeypatch.setattr(intervals, "RESAMPLES", 199)
    people = losses.population(name, 0.03, noisy=True, count=1500)
    for n in (20, 50, 400):
        held, shipped = losses.simulated(people, n, count, limit=1.0)
        assert held >= 0.93
        assert shipped <= 0.03


def latencies(logs: np.ndarray) -> Latency:
    return Latency(tuple((float(value), float(value) * 1.001) for value in np.exp(logs)), 1)


def test_speedup_is_students_interval_of_paired_logarithms() -> None:
    rng = np.random.default_rng(0)
    drift = rng.normal(0, 0.5, 6)
    before, after = latencies(drift + 0.7 + rng.normal(0, 0.02, 6)), latencies(drift + rng.normal(0, 0.02, 6))
    test = stats.ttest_rel(np.log(before.medians), np.log(after.medians)).confidence_interval(0.95)
    assert speedup_interval(before, after) == pytest.approx((math.exp(test.low), math.exp(test.high)))


def test_speedup_covers_the_true_ratio_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(1000):
        drift = rng.normal(0, 0.1, 3)
        low, high = speedup_interval(latencies(drift + 0.3 + rng.normal(0, 0.02, 3)), latencies(drift))  # type: ignore[misc]
        hits.append(low <= math.exp(0.3) <= high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


def test_one_process_has_no_interval() -> None:
    one = Latency(((1.0, 1.1, 0.9),), 1)
    assert speedup_interval(one, one) is None
    assert speedup_interval(FAST, FAST) == (1.0, 1.0)


def test_the_margin_of_a_p50_is_half_of_students_interval() -> None:
    medians = [1.0, 1.1, 1.05, 1.2]
    low, high = stats.ttest_1samp(medians, 0).confidence_interval()
    latency = Latency(tuple((value,) for value in medians), 1)
    assert latency.margin == pytest.approx((high - low) / 2 / latency.p50)
    assert latency.to_dict()["p50_margin"] == latency.margin
    assert Latency(((1.0, 2.0),), 1).margin is None
