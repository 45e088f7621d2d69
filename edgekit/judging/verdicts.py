"""Verdicts: what a file is worth, by accuracy and speed, and whether it is faithful to what was exported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgekit.artifacts.artifact import Artifact, Culprit
from edgekit.judging.results import Rung, Verdict
from edgekit.measuring.latency import Latency, speedup_interval
from edgekit.metrics import intervals
from edgekit.metrics.accuracy import Accuracy
from edgekit.metrics.parity import FP32_MAX_REL, Parity
from edgekit.types import INT8_ARITHMETIC, UNITS, Interval
from edgekit.util.wording import times

if TYPE_CHECKING:
    import numpy as np

    from edgekit.metrics.table import Metric

DEFAULT_MAX_DROP = 1.0  # points, or percent of the original's error; a user's own unit has no default
FP16_MIN_SQNR_DB = 30.0
INT8_SQNR_SLACK_DB = 6.0  # an error at most twice that of the quantized graph in torch
INT8_SQNR_ENOUGH_DB = 60.0  # asked of no int8 file, however near its graph comes
POOR_SQNR_DB = 10.0  # below, the error has a third of the outputs' size
DOUBTFUL_SQNR_DB = 15.0  # below, a sixth: an export says what would be nearer
ONNX_STEPS_ELSEWHERE = 3  # EfficientNet-Lite0, 50 layers deep, moves by 2 between x86-64 and ARM64, ResNet-20 by 1
MIN_SPEEDUP = 0.97  # below, int8 is slower than fp32 by more than its smaller file is worth
MOST_APART = 3.0  # times: bounds of a speed-up that are further apart say that rounds were disturbed
MOST_TIMES, FEW_ASKED = 20, 10_000  # samples: of more than so many times those given, and than so many, none are asked
MOST_ROUNDS = 30  # likewise


def faithful(precision: str, to_original: Sequence[Parity], graph_to_original: Sequence[Parity]) -> str | None:
    """Returns why an exported file is not faithful to what was exported, or None where it is; a Parity per output.

    Each output is held against its own limit: a good one would hide what a file makes of another.
    fp32 must be within 1e-4 of the original's largest output; fp16 above 30 dB; int8 within 6 dB of what the
    quantized graph itself reaches in torch (integer runtimes round differently from one another).
    """
    return _first_problem([_unfaithful(precision, *pair) for pair in zip(to_original, graph_to_original, strict=True)])


def _first_problem(problems: Sequence[str | None]) -> str | None:
    """Returns the first of the outputs' problems, and of which output it is where there are several."""
    for number, problem in enumerate(problems, 1):
        if problem is not None:
            return f"{problem}, in output {number} of {len(problems)}" if len(problems) > 1 else problem
    return None


def _unfaithful(precision: str, to_original: Parity, graph_to_original: Parity) -> str | None:
    if not math.isfinite(to_original.max_abs):
        return "gives NaN or infinite values"
    if precision == "fp32" and to_original.max_rel > FP32_MAX_REL:
        return f"differs from the original by {_share_of_largest(to_original)} (limit {FP32_MAX_REL:.0e})"
    nothing = precision == "fp16" or to_original.sqnr_db == -math.inf  # an SQNR there tells only how they are rounded
    if nothing and to_original.max_rel <= FP32_MAX_REL:
        return None
    if precision == "fp16" and to_original.sqnr_db < FP16_MIN_SQNR_DB:
        return f"has an SQNR of {to_original.sqnr_db:.1f} dB to the original (limit {FP16_MIN_SQNR_DB:.0f})"
    graph = min(graph_to_original.sqnr_db, INT8_SQNR_ENOUGH_DB)
    if precision.startswith("int") and to_original.sqnr_db < graph - INT8_SQNR_SLACK_DB:
        return f"has an SQNR of {to_original.sqnr_db:.1f} dB to the original, the quantized graph {graph:.1f} dB"
    return None


# Precision → what is nearer to the original.
NEARER = {
    "int8": "--precision int8-dynamic, which keeps activations and recurrent states in float, and --max-drop, which "
    "keeps the layers in float that lose most, are nearer",
    "int8-dynamic": "--precision int8-weight-only and fp16 are nearer",
    "int8-weight-only": "--precision fp16 is nearer",
}


def unjudged(metric: Metric, names: Sequence[str], each: Sequence[Parity]) -> tuple[str, ...]:
    """Returns doubts in the outputs that a metric does not look at: those that are far from the original's."""
    if metric.whole:
        return ()
    return tuple(
        f"output '{name}' is not judged by {metric.name}, and its SQNR is {near.sqnr_db:.1f} dB: --metric NAME:{name}"
        for name, near in zip(names, each, strict=True)
        if name != metric.output and near.sqnr_db < POOR_SQNR_DB and near.max_rel > FP32_MAX_REL
    )


def _share_of_largest(near: Parity) -> str:
    if math.isinf(near.max_rel):
        return f"{near.max_abs:.1e}, where its outputs are all 0"
    return f"{near.max_rel:.1e} of its largest output"


def silent(reference: Sequence[np.ndarray], floors: Sequence[float]) -> tuple[str, ...]:
    """Returns a note where an output is so near to 0 on all samples that rounding alone makes as much of it."""
    import numpy as np

    sizes = [float(np.abs(array).max(initial=0)) for array in reference]
    quiet = [
        i
        for i, (array, size, floor) in enumerate(zip(reference, sizes, floors, strict=False), 1)
        if array.dtype.kind == "f" and size <= floor
    ]
    return tuple(
        f"output {i} of {len(sizes)} is at most {sizes[i - 1]:.1e} on all samples that the files were checked on: "
        "that tells little of them; give --data on which the model finds something"
        for i in quiet
    )


def loss(precision: str, graph_to_original: Parity) -> tuple[str, ...]:
    """Returns a note where quantizing alone, whatever the format, moved the outputs far from the original's."""
    if graph_to_original.sqnr_db >= DOUBTFUL_SQNR_DB or graph_to_original.max_rel <= FP32_MAX_REL:
        return ()
    return (
        f"{precision} is far from the original: its SQNR is {graph_to_original.sqnr_db:.1f} dB; "
        f"measure the accuracy with edgekit compare before it is used; {NEARER.get(precision, 'fp32 is nearer')}",
    )


def verdict(
    precision: str,
    result: Accuracy | None,
    latency: Latency | None,
    fp32: Latency | None,
    parity: Parity,
    max_drop: float | None,
    suspects: Sequence[str] | None = None,
    sensitive: Sequence[str] = (),
    pruned: bool = False,
    elsewhere: str | None = None,
    unjudged: Sequence[str] = (),
) -> Verdict:
    """Says whether an artifact is worth shipping: accuracy by its interval's bound, speed by the runtime's fp32.

    A rejection for speed names the `suspects`, what in the file does not run in int8 (None where that is not known);
    one for accuracy the most `sensitive` layers, or how to find them. A `pruned` network's file is another network than
    the original: its accuracy alone is judged. `elsewhere` says why its latency says nothing, where it was measured on
    a processor that is not the target's: speed is not judged then. `unjudged` are doubts in outputs that the metric
    does not look at.
    """
    rejects: list[str] = []
    doubts: list[str] = list(unjudged)
    reasons: list[str] = []
    if not math.isfinite(parity.max_abs):
        rejects.append("outputs hold NaN or infinite values")
    elif precision == "fp32" and not pruned and parity.max_rel > FP32_MAX_REL:
        rejects.append(f"differs from the original by {_share_of_largest(parity)}")
    if result is not None:
        _judge_drop(precision, result, max_drop, sensitive, rejects, doubts, reasons)
    elif (precision != "fp32" or pruned) and not rejects:
        doubts.append("no labels: accuracy was not measured")
    if elsewhere is not None:
        reasons.append(elsewhere)
    elif fp32 is not None and latency is not None:
        _judge_speed(precision, fp32, latency, suspects, rejects, doubts, reasons)
    if rejects:
        return Verdict("reject", tuple(rejects))
    return Verdict("inconclusive", tuple(doubts + reasons)) if doubts else Verdict("ship", tuple(reasons))


def _judge_drop(
    precision: str,
    result: Accuracy,
    max_drop: float | None,
    sensitive: Sequence[str],
    rejects: list[str],
    doubts: list[str],
    reasons: list[str],
) -> None:
    low, high = result.ci95
    name, unit, digits = UNITS[result.unit]
    line = f"{name} {result.drop:+{digits}}{unit}"
    if not math.isfinite(high):
        more = intervals.FEWEST - result.n
        doubts.append(f"{line} on {result.n} samples has no interval; about {more} more samples would give one")
        return
    line += f", 95 % interval {low:+{digits}} to {high:+{digits}}"
    if result.p_value is not None:
        line += f" (McNemar p = {result.p_value:.2g})"
    if max_drop is None and result.unit == "units":
        doubts.append(f"{line}: how much is too much is yours to say with --max-drop")
        return
    limit = DEFAULT_MAX_DROP if max_drop is None else max_drop
    if low > limit:
        rejects.append(f"{line} is above {limit:g}{_lossy(precision, sensitive)}")
    elif high > limit:
        doubts.append(f"{line} does not exclude more than {limit:g}; {_more_samples(result, limit)}")
    else:
        reasons.append(line)


def _judge_speed(
    precision: str,
    fp32: Latency,
    latency: Latency,
    suspects: Sequence[str] | None,
    rejects: list[str],
    doubts: list[str],
    reasons: list[str],
) -> None:
    """Holds the bounds of the speed-up against MIN_SPEEDUP, as those of the drop are held against its limit."""
    line = f"{times(fp32.p50 / latency.p50)}x the speed of fp32 in the same runtime"
    interval = speedup_interval(fp32, latency)
    if interval is None:
        if precision in INT8_ARITHMETIC:
            doubts.append(f"{line}, in one process each: that has no interval; add --rounds 3")
        return
    low, high = interval
    line += f", 95 % interval {times(low)} to {times(high)}"
    if precision not in INT8_ARITHMETIC or low >= MIN_SPEEDUP:
        reasons.append(line)
    elif high < MIN_SPEEDUP:
        rejects.append(f"slower than fp32: {line}{_slow(suspects)}")
    else:
        slower = (
            f"slower than fp32, but whether by more than {100 * (1 - MIN_SPEEDUP):.0f} %"
            if high < 1
            else "whether it is slower"
        )
        doubts.append(f"{line}: {slower} is open; {_more_rounds(interval, len(latency.processes))}")


def is_unsteady(speedup: Interval | None) -> bool:
    """Whether the interval of a speed-up is too wide for one figure: its rounds differ by a disturbance."""
    return speedup is not None and speedup[1] > MOST_APART * speedup[0]


def explained(verdict: Verdict, artifact: Artifact, ladder: Sequence[Rung]) -> Verdict:
    """Returns a rejection where the parity ladder breaks at `artifact`, and else `verdict` as it is."""
    broken = next((rung for rung in ladder if rung.problem and rung.path == artifact.path), None)
    if broken is None:
        return verdict
    before = verdict.reasons if verdict.word == "reject" else ()
    where = f" from {broken.culprit.op} '{broken.culprit.node}' on" if isinstance(broken.culprit, Culprit) else ""
    return Verdict("reject", (f"it is not what was exported{where}: it {broken.problem}", *before))


def _lossy(precision: str, sensitive: Sequence[str]) -> str:
    if precision != "int8":
        return ""
    if sensitive:
        return f"; the most sensitive layers: {', '.join(sensitive)}"
    return "; edgekit export --sensitivity shows the layers to blame, --max-drop keeps them in float"


def _slow(suspects: Sequence[str] | None) -> str:
    if suspects is None:
        return ""
    return (
        f": {'; '.join(suspects)}" if suspects else "; every op of it runs in int8: this machine is no faster at that"
    )


def _more_samples(result: Accuracy, limit: float) -> str:
    """Estimates how many samples would bring the interval to one side of `limit`, at the rates seen so far."""
    n = result.n
    if result.drop == limit:
        return "at this drop no number of samples would tell"
    most = max(MOST_TIMES * n, FEW_ASKED)
    needed = _first(n, most, lambda more: not _spans(_interval_of(result, more), limit))
    if needed > most:
        return f"the drop is so near to that limit that even {most:,} samples would hardly tell"
    return f"about {_rounded(needed - n):,} more samples would tell"


def _interval_of(result: Accuracy, n: int) -> Interval:
    """Returns about the interval that `n` samples would have: what was seen weighs by √n, what was not by n."""
    times = n / result.n
    if result.lost is not None and result.won is not None:
        return intervals.tango(n, result.lost * times, result.won * times)
    sides = []
    for side in (result.drop - result.ci95[0], result.ci95[1] - result.drop):
        unseen = min(result.unseen, side)
        sides.append(math.sqrt((side**2 - unseen**2) / times + (unseen / times) ** 2))
    return result.drop - sides[0], result.drop + sides[1]


def _rounded(number: int) -> int:
    """Returns a number of two digits and zeros, not below `number`, which is an estimate."""
    grain = 10 ** max(len(str(number)) - 2, 0)
    return max(-(-number // grain) * grain, 1)


def _spans(interval: tuple[float, float], limit: float) -> bool:
    return interval[0] <= limit < interval[1]


def _first(low: int, most: int, done: Callable[[int], bool]) -> int:
    """Returns the first number from `low` on with which `done` holds, as for all beyond; `most` + 1 if never."""
    high = most + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if done(middle) else (middle + 1, high)
    return high


def _more_rounds(interval: tuple[float, float], rounds: int) -> str:
    """Estimates how many rounds would bring the interval to one side of MIN_SPEEDUP."""
    low, high = map(math.log, interval)
    room = abs((low + high) / 2 - math.log(MIN_SPEEDUP))
    needed = math.ceil(rounds * ((high - low) / 2 / room) ** 2) if room else MOST_ROUNDS + 1
    if needed > MOST_ROUNDS:
        return f"measure on an idle machine, or with --rounds {max(MOST_ROUNDS, rounds)}"
    return f"--rounds {max(needed, rounds + 1)} would tell"


def steps_allowed(format: str, same_machine: bool) -> int:
    """Returns how many steps of its scale an int8 output may move: more for ONNX Runtime on another processor.

    Its kernels requantize in float, each processor's in an order of its own, and the roundings add up along the
    network; XNNPACK, which runs .pte and .tflite files, computes the same integers everywhere.
    """
    return ONNX_STEPS_ELSEWHERE if format == "onnx" and not same_machine else 1


def reproduced(precision: str, near: Sequence[Parity], scales: Sequence[float], steps: int = 1) -> str | None:
    """Returns why replayed outputs are not the recorded ones, or None where they are; a Parity and a scale per output.

    Floating-point files must be within 1e-4 (fp16: 1e-2) of the largest output, int8 ones within `steps` of the
    output's scale (0 where it is not quantized: then within 1 % of the largest).
    """
    return _first_problem([_moved(precision, found, scale, steps) for found, scale in zip(near, scales, strict=True)])


def _moved(precision: str, near: Parity, scale: float, steps: int) -> str | None:
    what = "outputs differ from the recorded ones by"
    if precision == "int8" and scale:
        found = near.max_abs / scale
        return f"{what} {found:.1f} steps of the output's scale (limit {steps})" if found > steps + 0.001 else None
    limit = FP32_MAX_REL if precision == "fp32" else 1e-2
    return f"{what} {near.max_rel:.1e} (limit {limit:g})" if near.max_rel > limit else None
