"""Parity by hand, and verdicts by their tables."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from edgekit import types
from edgekit.artifacts.artifact import Artifact
from edgekit.errors import EdgeKitError
from edgekit.judging import verdicts
from edgekit.measuring.latency import Latency
from edgekit.metrics import intervals, table
from edgekit.metrics import parity as metrics_parity
from edgekit.metrics.accuracy import Accuracy, accuracy_of
from edgekit.metrics.parity import Parity
from edgekit.metrics.scores import Scores, per_sample
from edgekit.types import SUFFIXES

EQUAL = Parity(math.inf, 0, 0, 1, 1, 8)


def test_parity_by_hand() -> None:
    reference = [np.array([[3.0, 4.0], [0.0, 10.0]])]
    output = [np.array([[3.0, 4.5], [1.0, 10.0]])]
    got = metrics_parity.parity(reference, output)
    assert got.sqnr_db == pytest.approx(10 * math.log10((9 + 16 + 100) / (0.25 + 1)))
    assert (got.max_abs, got.max_rel, got.samples, got.agreement) == (1.0, 0.1, 2, 1.0)
    cosines = [(9 + 18) / (5 * math.hypot(3, 4.5)), 100 / (10 * math.hypot(1, 10))]
    assert got.cosine == pytest.approx(np.mean(cosines))


def test_parity_takes_the_worst_output() -> None:
    a, b = np.ones((4, 3)), np.full((4, 2), 100.0)
    got = metrics_parity.parity([a, b], [a * 1.1, b])
    assert got.sqnr_db == pytest.approx(20)
    assert got.max_rel == pytest.approx(0.1)


def test_equal_outputs_have_no_error_and_json_has_no_infinity() -> None:
    got = metrics_parity.parity([np.eye(3)], [np.eye(3)])
    assert got.sqnr_db == math.inf
    assert got.to_dict()["sqnr_db"] is None
    assert got.to_dict()["max_abs"] == 0


def test_agreement_is_the_share_of_equal_arg_max_and_none_without_classes() -> None:
    reference, output = np.eye(4), np.eye(4)[[0, 1, 2, 0]]
    assert metrics_parity.parity([reference], [output]).agreement == 0.75
    assert metrics_parity.parity([np.ones((4, 1))], [np.ones((4, 1))]).agreement is None


TARGETS = {
    "class indices": (np.array([0, 2, 1]), True),
    "class indices as numbers": (np.array([0.0, 2.0]), True),
    "none": (None, True),
    "measured numbers": (np.array([0.5, 2.0]), False),
    "vectors": (np.zeros((3, 4)), False),
    "labels that each may hold": (np.zeros((3, 4), int), False),
    "maps": (np.zeros((3, 4, 4), int), False),
    "boxes": (np.array([None, None], object), False),
}


@pytest.mark.parametrize("case", TARGETS)
def test_the_arg_max_of_a_regression_says_nothing(case: str) -> None:
    target, classes = TARGETS[case]
    assert metrics_parity.classifies(target) == classes
    reference = np.random.default_rng(0).standard_normal((3, 4))
    (near,) = metrics_parity.parities([reference], [reference + 0.1], metrics_parity.classifies(target))
    assert near.agreement == (1.0 if classes else None)


def test_nan_in_a_file_is_as_far_as_can_be_and_in_the_original_an_error() -> None:
    ref, nan = np.ones((2, 3)), np.full((2, 3), np.nan)
    got = metrics_parity.parity([ref], [nan])
    assert (got.sqnr_db, got.max_abs, got.agreement) == (-math.inf, math.inf, 0)
    assert got.to_dict()["max_abs"] is None
    with pytest.raises(EdgeKitError, match="the original model's own outputs hold NaN"):
        metrics_parity.parity([nan], [ref])


@pytest.mark.parametrize(
    ("outputs", "message"), [([np.ones((2, 4))], "2x4, the original's is 2x3"), ([np.ones((2, 3))] * 2, "2 outputs")]
)
def test_parity_refuses_other_shapes_and_counts(outputs: list[np.ndarray], message: str) -> None:
    with pytest.raises(EdgeKitError, match=message) as caught:
        metrics_parity.parity([np.ones((2, 3))], outputs)
    assert caught.value.help


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
    assert (verdicts.faithful(precision, [file], [graph]) is None) == good


def test_each_output_has_its_own_limit() -> None:
    """A coarse or a poor output hides nothing of a fine one."""
    boxes, scores = near(20, 2.5), near(19, 0.3)
    problem = verdicts.faithful("int8", [boxes, near(20)], [boxes, near(40)])
    assert problem is not None and problem.endswith("in output 2 of 2")
    assert verdicts.faithful("int8", [boxes, near(38)], [boxes, near(40)]) is None
    moved = verdicts.reproduced("int8", [boxes, scores], [2.5, 1 / 256])
    assert moved is not None and moved.endswith("in output 2 of 2")
    assert verdicts.reproduced("int8", [boxes, near(40, 1 / 256)], [2.5, 1 / 256]) is None


def accuracy(low: float, high: float) -> Accuracy:
    drop = (low + high) / 2 if math.isfinite(high) else 0.3
    return Accuracy("top1", 1000, 0.9 - drop / 100, 0.9, (low, high))


def ms(value: float, spread: float = 0.01) -> Latency:
    """Three processes, one of them slower and one faster by a share of `spread`."""
    return Latency(tuple((value * factor,) * 5 for factor in (1, 1 + spread, 1 - spread)), 1)


def outcomes(both: int, lost: int, won: int, neither: int) -> tuple[Scores, Scores]:
    counts = [both, lost, won, neither]
    return tuple(per_sample(np.repeat(right, counts)) for right in ([1, 1, 0, 0], [1, 0, 1, 0]))


TOP1 = table.METRICS["top1"]


BAD = Parity(-math.inf, math.inf, math.inf, -1, 0, 8)
VERDICTS = {
    "small drop, faster": ("int8", accuracy(-0.2, 0.4), 1.0, 2.0, near(), None, "ship"),
    "drop proven above": ("int8", accuracy(1.2, 3.0), 1.0, 2.0, near(), None, "reject"),
    "drop that may be above": ("int8", accuracy(0.2, 1.8), 1.0, 2.0, near(), None, "inconclusive"),
    "the same with more room": ("int8", accuracy(0.2, 1.8), 1.0, 2.0, near(), 2.0, "ship"),
    "slower than fp32": ("int8", accuracy(-0.2, 0.4), 2.0, 1.0, near(), None, "reject"),
    "slower for size": ("int8-weight-only", accuracy(-0.2, 0.4), 2.0, 1.0, near(), None, "ship"),
    "as fast as fp32": ("int8", accuracy(-0.2, 0.4), 1.0, 1.0, near(), None, "ship"),
    "too few for an interval": ("int8", accuracy(-math.inf, math.inf), 1.0, 2.0, near(), 90.0, "inconclusive"),
    "NaN and no accuracy": ("int8", None, 1.0, 2.0, BAD, None, "reject"),
    "no labels": ("int8", None, 1.0, 2.0, near(), None, "inconclusive"),
    "fp32 equal": ("fp32", accuracy(-0.2, 0.2), 1.0, None, near(), None, "ship"),
    "fp32 that differs": ("fp32", accuracy(-0.2, 0.2), 1.0, None, near(max_rel=1e-3), None, "reject"),
    "NaN": ("int8", accuracy(-0.2, 0.2), 1.0, 2.0, BAD, None, "reject"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict(case: str) -> None:
    precision, result, own, fp32, parity, limit, word = VERDICTS[case]
    got = verdicts.verdict(precision, result, ms(own), None if fp32 is None else ms(fp32), parity, limit)
    assert got.word == word
    assert got.reasons


SLOW, WORSE = accuracy(-0.2, 0.4), accuracy(1.2, 3.0)
BLAMED = {
    "slow": ("int8", SLOW, 1.0, ("9 Mul in float between int8 ops", "1 requantization"), (),
             "0.50x the speed of fp32 in the same runtime, 95 % interval 0.50 to 0.50: 9 Mul in float between int8 "
             "ops; 1 requantization"),
    "slow with nothing to blame": ("int8", SLOW, 1.0, (), (), "every op of it runs in int8"),
    "slow, not looked at": ("int8-dynamic", SLOW, 1.0, None, (), "runtime, 95 % interval 0.50 to 0.50"),
    "worse": ("int8", WORSE, 4.0, (), (), "edgekit export --sensitivity shows the layers to blame"),
    "worse by known layers": ("int8", WORSE, 4.0, (), ("head (linear) at 12.0 dB",),
                              "is above 1; the most sensitive layers: head (linear) at 12.0 dB"),
    "worse by weights": ("int8-weight-only", WORSE, 4.0, None, (), "is above 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BLAMED)
def test_a_rejection_names_who_is_to_blame(case: str) -> None:
    precision, result, fp32, suspects, sensitive, words = BLAMED[case]
    got = verdicts.verdict(precision, result, ms(2.0), ms(fp32), near(), None, suspects, sensitive)
    assert got.word == "reject"
    assert words in got.reasons[0]
    if case in ("slow, not looked at", "worse by weights"):
        assert got.reasons[0].endswith(words)


def test_every_word_of_a_verdict_is_tried() -> None:
    assert {row[-1] for row in VERDICTS.values()} == {"ship", "reject", "inconclusive"}


@pytest.mark.parametrize("counts", [(950, 8, 4, 38), (100, 0, 0, 0), (300, 3, 3, 20), (200, 3, 0, 7), (1000, 1, 9, 0)])
def test_samples_asked_for_would_do(counts: tuple[int, ...]) -> None:
    """With the number of samples that a doubt names, an interval at the same rates excludes the limit."""
    first = accuracy_of(TOP1, *outcomes(*counts))
    limit = first.drop + (0.4 if first.drop <= 0.9 else -0.4)
    doubt = verdicts.verdict("int8", first, ms(1), ms(2), near(), limit)
    assert doubt.word == "inconclusive"
    more = int(doubt.reasons[0].split("about ")[1].split(" more")[0].replace(",", ""))
    for share, decided in ((1.0, True), (0.9, False)):
        factor = (sum(counts) + share * more) / sum(counts)
        low, high = intervals.tango(*(factor * c for c in (sum(counts), counts[1], counts[2])))
        assert (high <= limit or low > limit) == decided


def test_a_drop_at_the_limit_is_never_told_from_it() -> None:
    first = accuracy_of(TOP1, *outcomes(900, 20, 10, 70))
    doubt = verdicts.verdict("int8", first, ms(1), ms(2), near(), first.drop)
    assert "no number of samples would tell" in doubt.reasons[0]


SPEEDS = {  # fp32 and int8 medians by process → word, what is said
    "twice as fast": ((2.0, 2.1, 1.9), (1.0, 1.02, 0.97), "ship", "2.00x"),
    "twice as slow": ((1.0, 1.02, 0.97), (2.0, 2.1, 1.9), "reject", "slower than fp32: 0.50x"),
    "slower by the noise": ((1.0, 1.2, 0.8), (1.05, 0.9, 1.3), "inconclusive", "whether it is slower is open"),
    "slower in a noise that both share": ((1.0, 1.5, 2.0), (1.2, 1.8, 2.4), "reject", "slower than fp32: 0.83x"),
    "one process each": ((1.0,), (2.0,), "inconclusive", "add --rounds 3"),
}


@pytest.mark.parametrize("case", SPEEDS)
def test_slower_is_said_where_the_interval_says_it(case: str) -> None:
    before, after, word, said = SPEEDS[case]
    fp32, int8 = (Latency(tuple((value,) for value in values), 1) for values in (before, after))
    got = verdicts.verdict("int8", accuracy(-0.2, 0.4), int8, fp32, near(), None)
    assert got.word == word
    assert any(said in reason for reason in got.reasons)
    assert ("--rounds" in got.reasons[0]) == (word == "inconclusive")


def test_a_speed_just_below_is_not_called_open() -> None:
    """0.96x to 0.98x is slower than fp32; open is whether that is too much."""
    got = verdicts.verdict("int8", accuracy(-0.2, 0.4), _at(np.log([0.967, 0.97, 0.972])), ms(1, 0), near(), None)
    assert got.word == "inconclusive"
    assert "slower than fp32, but whether by more than 3 % is open" in got.reasons[0]


def test_a_rejection_has_no_doubts_among_its_reasons() -> None:
    got = verdicts.verdict("int8", accuracy(0.2, 1.8), ms(2.0), ms(1.0), near(), None)
    assert got.word == "reject" and len(got.reasons) == 1 and "slower" in got.reasons[0]


ASKED = {  # drop, interval, of how many samples → what is said
    "far too many": (0.999, (-0.5, 2.5), 400, "even 10,000 samples would hardly tell"),
    "some": (0.2, (-0.3, 1.9), 400, r"about \d+(,\d00|0)? more samples would tell"),
    "too many of many": (0.99, (0.5, 1.5), 50_000, "even 1,000,000 samples would hardly tell"),
}


@pytest.mark.parametrize("case", ASKED)
def test_samples_that_nobody_has_are_not_asked_for(case: str) -> None:
    drop, interval, n, said = ASKED[case]
    result = Accuracy("miou", n, 0.9 - drop / 100, 0.9, interval, interval="Gaffke", unseen=0.1)
    doubt = verdicts.verdict("int8", result, ms(1), ms(2), near(), None)
    assert doubt.word == "inconclusive"
    assert re.search(said, doubt.reasons[0])


@pytest.mark.parametrize("own", [0.5, 2.0])
def test_speed_elsewhere_is_no_part_of_a_verdict(own: float) -> None:
    got = verdicts.verdict("int8", accuracy(-0.2, 0.4), ms(own), ms(1), near(), None, elsewhere="not measured there")
    assert got.word == "ship" and got.reasons[-1] == "not measured there"
    assert verdicts.verdict("int8", accuracy(1.2, 3.0), ms(own), ms(1), near(), None, elsewhere="x").word == "reject"


def test_rounds_asked_for_would_do() -> None:
    rng = np.random.default_rng(0)
    logs = rng.standard_normal(60)
    logs = 0.05 * (logs - logs.mean()) / logs.std() + math.log(0.94)
    few = np.array([-1.0, 0.0, 1.0]) * 0.05 + math.log(0.94)
    fp32 = Latency(((1.0,),) * 60, 1)
    doubt = verdicts.verdict("int8", accuracy(-0.2, 0.4), _at(few), fp32, near(), None)
    assert doubt.word == "inconclusive"
    assert int(doubt.reasons[0].split("--rounds ")[1].split()[0]) <= verdicts.MOST_ROUNDS
    assert verdicts.verdict("int8", accuracy(-0.2, 0.4), _at(logs), fp32, near(), None).word == "reject"


def _at(logs: np.ndarray) -> Latency:
    """Latencies whose speed-ups over 1 ms have these logarithms."""
    return Latency(tuple((float(np.exp(-log)),) for log in logs), 1)


UNITS = {
    "points": ("+0.30 points", "accuracy drop"),
    "percent": ("+0.30 %", "rise of the error"),
    "units": ("+0.3,", "drop of the metric"),
}


@pytest.mark.parametrize("unit", types.UNITS)
def test_a_drop_is_judged_in_its_own_unit(unit: types.Unit) -> None:
    baseline, value = {"points": (0.9, 0.897), "percent": (2.0, 2.006), "units": (2.0, 1.7)}[unit]
    result = Accuracy("m", 900, value, baseline, (0.1, 0.5), unit, "Gaffke")
    assert result.drop == pytest.approx(0.3)
    for limit, word in ((0.05, "reject"), (0.2, "inconclusive"), (0.6, "ship")):
        got = verdicts.verdict("int8", result, ms(1), ms(2), near(), limit)
        assert got.word == word
        assert all(part in got.reasons[0] for part in UNITS[unit])
    default = verdicts.verdict("int8", result, ms(1), ms(2), near(), None)
    assert default.word == ("inconclusive" if unit == "units" else "ship")
    assert ("--max-drop" in default.reasons[0]) == (unit == "units")


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
    assert (verdicts.reproduced(precision, [parity], [step]) is None) == good


@pytest.mark.parametrize(
    ("format", "same_machine", "steps"),
    [(f, same, 3 if f == "onnx" and not same else 1) for f in SUFFIXES for same in (False, True)],
)
def test_only_onnx_runtime_may_round_otherwise_elsewhere(format: str, same_machine: bool, steps: int) -> None:
    allowed = verdicts.steps_allowed(format, same_machine)
    assert allowed == steps
    for moved in range(1, 5):
        problem = verdicts.reproduced("int8", [near(max_rel=moved * 0.05)], [0.05], allowed)
        assert (problem is None) == (moved <= steps)
        assert problem is None or f"(limit {steps})" in problem


def test_the_median_of_medians_ignores_one_disturbed_process(tmp_path: Path) -> None:
    latency = Latency(((1.0, 1.0, 1.0), (1.0, 1.1, 1.0), (9.0, 9.0, 9.0)), 2)
    assert latency.p50 == 1.0
    assert latency.percentile(99) == pytest.approx(9)
    assert latency.to_dict()["processes"] == 3
    assert Artifact(tmp_path, "onnx", "fp32").size_bytes == tmp_path.stat().st_size


@pytest.mark.parametrize(
    ("precision", "nearer"),
    [("int8", "int8-dynamic"), ("int8-dynamic", "int8-weight-only"), ("int8-weight-only", "fp16")],
)
def test_a_loss_names_what_is_nearer(precision: str, nearer: str) -> None:
    original = np.sin(np.arange(20, dtype=np.float32))[None]
    far, fair, near = (metrics_parity.parity([original], [original + e * np.cos(original)]) for e in (0.5, 0.25, 0.0))
    assert 10 < fair.sqnr_db < 15
    for parity in (far, fair):
        (note,) = verdicts.loss(precision, parity)
        assert f"{precision} is far from the original" in note and nearer in note
    assert verdicts.loss(precision, near) == ()
