"""Numbers and verdicts against hand computation, scipy and simulation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from edgekit import judge
from edgekit.errors import EdgeKitError
from edgekit.results import SUFFIXES, Accuracy, Artifact, Latency, Parity

EQUAL = Parity(math.inf, 0, 0, 1, 1, 8)


def test_parity_by_hand() -> None:
    reference = [np.array([[3.0, 4.0], [0.0, 10.0]])]
    output = [np.array([[3.0, 4.5], [1.0, 10.0]])]
    got = judge.parity(reference, output)
    assert got.sqnr_db == pytest.approx(10 * math.log10((9 + 16 + 100) / (0.25 + 1)))
    assert (got.max_abs, got.max_rel, got.samples, got.agreement) == (1.0, 0.1, 2, 1.0)
    cosines = [(9 + 18) / (5 * math.hypot(3, 4.5)), 100 / (10 * math.hypot(1, 10))]
    assert got.cosine == pytest.approx(np.mean(cosines))


def test_parity_takes_the_worst_output() -> None:
    a, b = np.ones((4, 3)), np.full((4, 2), 100.0)
    got = judge.parity([a, b], [a * 1.1, b])
    assert got.sqnr_db == pytest.approx(20)
    assert got.max_rel == pytest.approx(0.1)


def test_equal_outputs_have_no_error_and_json_has_no_infinity() -> None:
    got = judge.parity([np.eye(3)], [np.eye(3)])
    assert got.sqnr_db == math.inf
    assert got.to_dict()["sqnr_db"] is None
    assert got.to_dict()["max_abs"] == 0


def test_agreement_is_the_share_of_equal_arg_max_and_none_without_classes() -> None:
    reference, output = np.eye(4), np.eye(4)[[0, 1, 2, 0]]
    assert judge.parity([reference], [output]).agreement == 0.75
    assert judge.parity([np.ones((4, 1))], [np.ones((4, 1))]).agreement is None


def test_nan_in_a_file_is_as_far_as_can_be_and_in_the_original_an_error() -> None:
    ref, nan = np.ones((2, 3)), np.full((2, 3), np.nan)
    got = judge.parity([ref], [nan])
    assert (got.sqnr_db, got.max_abs, got.agreement) == (-math.inf, math.inf, 0)
    assert got.to_dict()["max_abs"] is None
    with pytest.raises(EdgeKitError, match="the original model's own outputs hold NaN"):
        judge.parity([nan], [ref])


@pytest.mark.parametrize(
    ("outputs", "message"), [([np.ones((2, 4))], "2x4, the original's is 2x3"), ([np.ones((2, 3))] * 2, "2 outputs")]
)
def test_parity_refuses_other_shapes_and_counts(outputs: list[np.ndarray], message: str) -> None:
    with pytest.raises(EdgeKitError, match=message) as caught:
        judge.parity([np.ones((2, 3))], outputs)
    assert caught.value.help


@pytest.mark.parametrize(("metric", "k"), judge.METRICS.items())
def test_metrics_match_numpy(metric: str, k: int) -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.standard_normal((500, 12)).astype(np.float32), rng.integers(0, 12, 500)
    expected = (np.argsort(-logits, axis=1)[:, :k] == target[:, None]).any(axis=1)
    got = judge.correct(metric, logits, target)
    assert got.dtype == bool
    assert np.array_equal(got, expected)


def test_top1_breaks_ties_like_arg_max() -> None:
    logits = np.round(np.random.default_rng(0).standard_normal((500, 6)))  # int8 outputs tie often
    target = np.random.default_rng(1).integers(0, 6, 500)
    assert np.array_equal(judge.correct("top1", logits, target), logits.argmax(1) == target)


def test_a_sample_with_nan_scores_is_wrong() -> None:
    logits = np.array([[np.nan] * 3, [np.nan, 1, 2], [0, 1, 2]])
    assert judge.correct("top1", logits, np.array([0, 0, 2])).tolist() == [False, False, True]


BAD_LABELS = {
    "a picture as output": ("top1", np.ones((2, 3, 4, 4)), np.zeros(2, int), "2x3x4x4 for 2 samples"),
    "one class": ("top1", np.ones((2, 1)), np.zeros(2, int), "more than 1 class scores"),
    "top 5 of five": ("top5", np.ones((2, 5)), np.zeros(2, int), "more than 5 class scores"),
    "another number": ("top1", np.ones((2, 3)), np.zeros(3, int), "2x3 for 3 samples"),
    "one-hot": ("top1", np.ones((2, 3)), np.eye(3, dtype=int)[:2], "int64 of shape 2x3"),
    "floats": ("top1", np.ones((2, 3)), np.zeros(2), "float64 of shape 2"),
    "from one": ("top1", np.ones((2, 3)), np.array([1, 3]), "labels run from 1 to 3, but the model has 3 classes"),
    "negative": ("top1", np.ones((2, 3)), np.array([-1, 2]), "labels run from -1"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels_that_do_not_fit_are_refused(case: str) -> None:
    metric, logits, target, message = BAD_LABELS[case]
    with pytest.raises(EdgeKitError, match=message) as caught:
        judge.correct(metric, logits, target)
    assert caught.value.help


def outcomes(both: int, lost: int, won: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    original = np.repeat([True, True, False, False], [both, lost, won, neither])
    return original, np.repeat([True, False, True, False], [both, lost, won, neither])


@pytest.mark.parametrize("counts", [(90, 4, 1, 5), (200, 0, 0, 0), (10, 0, 7, 3), (0, 30, 0, 0), (900, 60, 20, 20)])
def test_interval_is_agresti_and_min(counts: tuple[int, int, int, int]) -> None:
    """Wald's interval of a paired difference on the 2x2 table with 1/2 added to each cell."""
    table = np.array(counts) + 0.5
    n = table.sum()
    p10, p01 = table[1] / n, table[2] / n
    z = stats.norm.ppf(0.975)
    margin = z * math.sqrt((p10 + p01 - (p10 - p01) ** 2) / n)
    got = judge.accuracy("top1", *outcomes(*counts))
    assert got.n == sum(counts)
    assert got.drop == pytest.approx(100 * (counts[1] - counts[2]) / sum(counts))
    assert got.ci95 == pytest.approx((100 * (p10 - p01 - margin), 100 * (p10 - p01 + margin)), abs=1e-5)


@pytest.mark.parametrize(("n", "lost", "won"), [(100, 0.05, 0.02), (500, 0.01, 0.002), (2000, 0.02, 0.02)])
def test_interval_covers_the_true_drop_95_times_in_100(n: int, lost: float, won: float) -> None:
    draws = np.random.default_rng(0).multinomial(n, [0.9 - lost, lost, won, 0.1 - won], size=2000)
    hits = []
    for counts in draws:
        low, high = judge.accuracy("top1", *outcomes(*counts)).ci95
        hits.append(low <= 100 * (lost - won) <= high)
    assert np.mean(hits) >= 0.94


def near(sqnr_db: float = 40.0, max_rel: float = 1e-6) -> Parity:
    return Parity(sqnr_db, max_rel, max_rel, 1, 1, 8)


FAITHFUL = {
    "fp32 equal": ("fp32", EQUAL, EQUAL, True),
    "fp32 near": ("fp32", near(max_rel=9e-5), EQUAL, True),
    "fp32 far": ("fp32", near(max_rel=2e-4), EQUAL, False),
    "fp16 near": ("fp16", near(31, 1e-3), EQUAL, True),
    "fp16 far": ("fp16", near(29, 1e-1), EQUAL, False),
    "int8 as its graph": ("int8", near(25), near(25), True),
    "int8 5 dB below": ("int8", near(20), near(25), True),
    "int8 7 dB below": ("int8", near(18), near(25), False),
    "int8 with an exact graph": ("int8", near(70), EQUAL, True),
    "int8 that gives NaN": ("int8", Parity(-math.inf, math.inf, math.inf, -1, 0, 8), near(-math.inf), False),
    "dynamic 7 dB below": ("int8-dynamic", near(18), near(25), False),
}


@pytest.mark.parametrize("case", FAITHFUL)
def test_faithful(case: str) -> None:
    precision, file, graph, good = FAITHFUL[case]
    assert (judge.faithful(precision, file, graph) is None) == good


def accuracy(low: float, high: float) -> Accuracy:
    drop = (low + high) / 2
    return Accuracy("top1", 1000, 0.9 - drop / 100, 0.9, (low, high))


def ms(value: float) -> Latency:
    return Latency(((value,) * 5,), 1)


BAD = Parity(-math.inf, math.inf, math.inf, -1, 0, 8)
VERDICTS = {
    "small drop, faster": ("int8", accuracy(-0.2, 0.4), 1.0, 2.0, near(), None, "ship"),
    "drop proven above": ("int8", accuracy(1.2, 3.0), 1.0, 2.0, near(), None, "reject"),
    "drop that may be above": ("int8", accuracy(0.2, 1.8), 1.0, 2.0, near(), None, "inconclusive"),
    "the same with more room": ("int8", accuracy(0.2, 1.8), 1.0, 2.0, near(), 2.0, "ship"),
    "slower than fp32": ("int8", accuracy(-0.2, 0.4), 2.0, 1.0, near(), None, "reject"),
    "slower for size": ("int8-weight-only", accuracy(-0.2, 0.4), 2.0, 1.0, near(), None, "ship"),
    "no labels": ("int8", None, 1.0, 2.0, near(), None, "inconclusive"),
    "fp32 equal": ("fp32", accuracy(-0.2, 0.2), 1.0, None, near(), None, "ship"),
    "fp32 that differs": ("fp32", accuracy(-0.2, 0.2), 1.0, None, near(max_rel=1e-3), None, "reject"),
    "NaN": ("int8", accuracy(-0.2, 0.2), 1.0, 2.0, BAD, None, "reject"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict(case: str) -> None:
    precision, result, own, fp32, parity, limit, word = VERDICTS[case]
    got = judge.verdict(precision, result, ms(own), None if fp32 is None else ms(fp32), parity, limit)
    assert got.word == word
    assert got.reasons


SLOW, WORSE = accuracy(-0.2, 0.4), accuracy(1.2, 3.0)
BLAMED = {
    "slow": ("int8", SLOW, 1.0, ("9 Mul in float between int8 ops", "1 requantization"), (),
             "0.50x the speed of fp32 in the same runtime: 9 Mul in float between int8 ops; 1 requantization"),
    "slow with nothing to blame": ("int8", SLOW, 1.0, (), (), "every op of it runs in int8"),
    "slow, not looked at": ("int8-dynamic", SLOW, 1.0, None, (), "0.50x the speed of fp32 in the same runtime"),
    "worse": ("int8", WORSE, 4.0, (), (), "edgekit export --sensitivity shows the layers to blame"),
    "worse by known layers": ("int8", WORSE, 4.0, (), ("head (linear) at 12.0 dB",),
                              "is above 1; the most sensitive layers: head (linear) at 12.0 dB"),
    "worse by weights": ("int8-weight-only", WORSE, 4.0, None, (), "is above 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BLAMED)
def test_a_rejection_names_who_is_to_blame(case: str) -> None:
    precision, result, fp32, suspects, sensitive, words = BLAMED[case]
    got = judge.verdict(precision, result, ms(2.0), ms(fp32), near(), None, suspects, sensitive)
    assert got.word == "reject"
    assert words in got.reasons[0]
    if case in ("slow, not looked at", "worse by weights"):
        assert got.reasons[0].endswith(words)


def test_every_word_of_a_verdict_is_tried() -> None:
    assert {row[-1] for row in VERDICTS.values()} == {"ship", "reject", "inconclusive"}


def test_samples_asked_for_would_do() -> None:
    """With the number of samples that a doubt names, an interval at the same rates excludes the limit."""
    first = judge.accuracy("top1", *outcomes(950, 8, 4, 38))
    doubt = judge.verdict("int8", first, ms(1), ms(2), near(), 1.0)
    assert doubt.word == "inconclusive"
    more = int(doubt.reasons[0].split("about ")[1].split(" more")[0].replace(",", ""))
    factor = (1000 + more) / 1000
    again = judge.accuracy("top1", *outcomes(*(round(c * factor) for c in (950, 8, 4, 38))))
    assert again.ci95[1] <= 1.02


REPRODUCED = {
    "fp32 equal": ("fp32", EQUAL, 0.0, True),
    "fp32 far": ("fp32", near(max_rel=2e-4), 0.0, False),
    "fp16": ("fp16", near(max_rel=5e-3), 0.0, True),
    "int8 one step": ("int8", near(max_rel=0.05), 0.05, True),
    "int8 two steps": ("int8", near(max_rel=0.1), 0.05, False),
    "int8 with float outputs": ("int8", near(max_rel=5e-3), 0.0, True),
    "int8 with float outputs, far": ("int8", near(max_rel=5e-2), 0.0, False),
}


@pytest.mark.parametrize("case", REPRODUCED)
def test_reproduced(case: str) -> None:
    precision, parity, step, good = REPRODUCED[case]
    assert (judge.reproduced(precision, parity, step) is None) == good


@pytest.mark.parametrize(
    ("format", "same_machine", "steps"),
    [(f, same, 3 if f == "onnx" and not same else 1) for f in SUFFIXES for same in (False, True)],
)
def test_only_onnx_runtime_may_round_otherwise_elsewhere(format: str, same_machine: bool, steps: int) -> None:
    allowed = judge.steps_allowed(format, same_machine)
    assert allowed == steps
    for moved in range(1, 5):
        problem = judge.reproduced("int8", near(max_rel=moved * 0.05), 0.05, allowed)
        assert (problem is None) == (moved <= steps)
        assert problem is None or f"(limit {steps})" in problem


def test_the_median_of_medians_ignores_one_disturbed_process(tmp_path: Path) -> None:
    latency = Latency(((1.0, 1.0, 1.0), (1.0, 1.1, 1.0), (9.0, 9.0, 9.0)), 2)
    assert latency.p50 == 1.0
    assert latency.percentile(99) == pytest.approx(9)
    assert latency.to_dict()["processes"] == 3
    assert Artifact(tmp_path, "onnx", "fp32").size_bytes == tmp_path.stat().st_size
