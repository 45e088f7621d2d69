"""The facts that flow through EdgeKit: frozen dataclasses, raw samples kept, statistics as properties."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = {"executorch": ".pte", "onnx": ".onnx", "tflite": ".tflite"}  # format → what its files' names end in
Layout = Literal["nchw", "nhwc"]
LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc")  # of images in a file; EdgeKit's own arrays are always NCHW
Unit = Literal["points", "percent", "units"]
# Unit of a drop → what it is called, what stands behind its number, and how that is written.
UNITS: dict[Unit, tuple[str, str, str]] = {
    "points": ("accuracy drop", " points", ".2f"),  # of a share, higher for better: 100 · (original − file)
    "percent": ("rise of the error", " %", ".2f"),  # of the original's error, lower for better
    "units": ("drop of the metric", "", ".3g"),  # of a user's own scores, higher for better
}
Interval = tuple[float, float]


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name (`float32`, `int64`, …) and static shape of one model input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}:{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def nbytes(self) -> int:
        """The size of such a tensor in bytes."""
        import numpy as np

        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def axis_order(rank: int, layout: Layout) -> tuple[int, ...]:
    """Returns the NCHW axes in the order in which a file of `layout` has them: rank 4 is moved, all else stays."""
    return (0, 2, 3, 1) if layout == "nhwc" and rank == 4 else tuple(range(rank))


@dataclass(frozen=True)
class State:
    """One tensor that a model carries from call to call: it reads `input`, and gives the next value as `output`.

    `initial` is its value before the first call: little-endian numbers in C order, of the dtype and shape of `input`.
    """

    input: TensorSpec
    output: str
    initial: bytes = field(repr=False)

    @property
    def value(self) -> np.ndarray:
        """The initial value as an array of the shape of `input`."""
        import numpy as np

        return np.frombuffer(self.initial, np.dtype(self.input.dtype)).reshape(self.input.shape)


@dataclass(frozen=True)
class Artifact:
    """One exported file, with the names and specs of its inputs and outputs where they are known.

    The shapes in the specs are NCHW; `layout` says how the file itself takes and gives rank-4 tensors. `pruned` is the
    fingerprint of the pruned network that it was exported from, None where it was not pruned. `weight_files` lie beside
    an ONNX file that names them, and hold weights of it. `state` are inputs and outputs beside those: whoever runs the
    file gives back as input what the run before gave as output. A file that keeps its state in itself has none.
    `target` is what its bundle was exported for, None where that is not known.
    """

    path: Path
    format: str
    precision: str
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    layout: Layout = "nchw"
    pruned: str | None = None
    weight_files: tuple[Path, ...] = ()
    state: tuple[State, ...] = ()
    target: str | None = None

    @property
    def size_bytes(self) -> int:
        """Size of the file in bytes, with its `weight_files`."""
        return sum(path.stat().st_size for path in (self.path, *self.weight_files))


def labels(artifacts: Sequence[Artifact]) -> dict[Artifact, str]:
    """Returns what each file is called among others: the end of its path that tells it apart, and its precision."""

    def end(artifact: Artifact, depth: int) -> str:
        return f"{'/'.join(artifact.path.parts[-depth:])} {artifact.precision}"

    found = {}
    for artifact in artifacts:
        others = [other for other in artifacts if other.path != artifact.path]
        depths = range(1, len(artifact.path.parts) + 1)
        apart = (d for d in depths if all(end(artifact, d) != end(other, d) for other in others))
        found[artifact] = end(artifact, next(apart, len(depths)))
    return found


@dataclass(frozen=True)
class Parity:
    """How near one set of outputs is to another, over all outputs and samples.

    `sqnr_db` is 10·log10(Σ ref² / Σ (out − ref)²) of the worst output, inf where they are equal; `max_abs` the
    largest absolute and `max_rel` the largest difference relative to the largest |ref| of its output, which counts as
    so large at least that what rounding makes of it is small (see `edgekit.rounding`); `cosine` the lowest mean cosine
    of an output; `agreement` the share of samples with the same arg max of the first output, None where it has no
    classes.
    """

    sqnr_db: float
    max_abs: float
    max_rel: float
    cosine: float
    agreement: float | None
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values; what is infinite is null: SQNR of equal outputs, differences from NaN ones."""
        return {key: finite(value) if isinstance(value, float) else value for key, value in asdict(self).items()}


@dataclass(frozen=True, repr=False)
class Latency:
    """Raw latencies in ms of one artifact: a tuple of samples for each process that measured it.

    `undisturbed` holds those that nothing slowed down, of the processes that have some, where they are told apart (see
    `edgekit.steady`): the medians are of them, and all other percentiles of all samples.
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
        from edgekit.measure import percentile

        return percentile(self.samples, q)

    @property
    def medians(self) -> tuple[float, ...]:
        """The median of each process, in ms; of the undisturbed runs where they are told apart."""
        from edgekit.measure import percentile

        return tuple(percentile(process, 50) for process in self.undisturbed or self.processes)

    @property
    def disturbed(self) -> float:
        """The share of the samples that the p50 leaves out."""
        return 1 - sum(map(len, self.undisturbed)) / len(self.samples) if self.undisturbed else 0.0

    @property
    def p50(self) -> float:
        """Median over the processes of each process's median, in ms: one disturbed process does not move it."""
        from edgekit.measure import percentile

        return percentile(self.medians, 50)

    @property
    def margin(self) -> float | None:
        """How far the p50 may be off, as a share of it (see `intervals.margin`); None of one process."""
        from edgekit.intervals import margin

        return margin(self)

    @property
    def slowdown(self) -> float | None:
        """How many times slower the runs became, as a throttled processor's do, or None where they did not.

        It is the most that a process slowed down (see `measure.slowdown`), or all processes one after another.
        """
        from edgekit.measure import slowdown

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


def drop(unit: Unit, baseline: Any, value: Any) -> Any:
    """Returns how much worse `value` is than `baseline`, in `unit` (see UNITS): of numbers, or element by element."""
    if unit == "percent":
        return 100 * (value / baseline - 1)
    return (100 if unit == "points" else 1) * (baseline - value)


@dataclass(frozen=True)
class Accuracy:
    """A metric of an artifact against the original's on the same samples; the drop and its `ci95` are in `unit`.

    `interval` says how `ci95` was found; it is infinite where there are too few samples. Where the metric is a share
    of right samples, `lost` and `won` count those that one of the two gets right alone, and `p_value` is that of
    McNemar's exact test. For other metrics `unseen` is how much alone the samples that were not seen may add to the
    drop: of n none shows what 3.7/n of all samples do, which may be lost wholly.
    """

    metric: str
    n: int
    value: float
    baseline: float
    ci95: Interval
    unit: Unit = "points"
    interval: str = "Tango"
    p_value: float | None = None
    lost: int | None = None
    won: int | None = None
    unseen: float = 0.0

    @property
    def drop(self) -> float:
        """How much worse the artifact is than the original, in `unit`: points (percent of samples) for top-1."""
        return float(drop(self.unit, self.baseline, self.value))

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form; `drop_points` and `ci95_points` are in `unit`, null where they have no bound."""
        return {
            "metric": self.metric,
            "n": self.n,
            "value": self.value,
            "baseline": self.baseline,
            "drop_points": self.drop,
            "ci95_points": [finite(bound) for bound in self.ci95],
            "unit": self.unit,
            "interval": self.interval,
            "p_value": self.p_value,
            "lost": self.lost,
            "won": self.won,
            "unseen_points": self.unseen,
        }


@dataclass(frozen=True)
class Verdict:
    """`ship`, `reject` or `inconclusive`, and why."""

    word: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Measurement:
    """Everything that was measured of one artifact.

    `structure` counts what in an int8 file does not run in int8 (see `suspects.Structure`; None for other files), and
    `suspects` says it in words. On an emulated device `timing` is "emulated" and every figure in ms and bytes is None:
    `instructions` of one run, and of one of the fp32 file, are counted instead. `same_machine` is False where the
    original ran here and the file on another machine: their times are no speed-up. `baseline_cached` says that the
    original's time is of an earlier command. `processor` is what the times are of; it is not the target's where
    `on_target` is False, and they are no part of the verdict then.
    """

    artifact: Artifact
    runtime: str
    device: str
    parity: Parity
    accuracy: Accuracy | None
    latency: Latency | None
    fp32_latency: Latency | None
    baseline_latency: Latency
    load_ms: float | None
    first_ms: float | None
    peak_rss_bytes: int | None
    verdict: Verdict
    structure: Mapping[str, Any] | None = None
    suspects: tuple[str, ...] = ()
    timing: Literal["measured", "emulated"] = "measured"
    instructions: int | None = None
    fp32_instructions: int | None = None
    same_machine: bool = True
    baseline_cached: bool = False
    processor: str = ""
    on_target: bool = True

    @property
    def speedup(self) -> float | None:
        """How many times faster than the original model the artifact is, by p50; None across machines."""
        return self.baseline_latency.p50 / self.latency.p50 if self.latency and self.same_machine else None

    @property
    def speedup_fp32(self) -> float | None:
        """How many times faster than the fp32 file in the same runtime, by p50; None for fp32 files themselves."""
        return self.fp32_latency.p50 / self.latency.p50 if self.latency and self.fp32_latency else None

    @property
    def speedup_ci95(self) -> Interval | None:
        """The 95 % interval of `speedup`; None of one process, and where the original was not measured beside it."""
        from edgekit.intervals import speedup

        beside = self.latency is not None and self.same_machine and not self.baseline_cached
        return speedup(self.baseline_latency, self.latency) if self.latency and beside else None

    @property
    def speedup_fp32_ci95(self) -> Interval | None:
        """The 95 % interval of `speedup_fp32`; None of one process."""
        from edgekit.intervals import speedup

        return speedup(self.fp32_latency, self.latency) if self.latency and self.fp32_latency else None

    def within(self, max_drop: float) -> bool:
        """Whether the drop is proven to be at most `max_drop`, in its own unit: by the bound of its interval."""
        return self.accuracy is not None and self.accuracy.ci95[1] <= max_drop

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of `compare --json`."""
        return {
            "path": str(self.artifact.path),
            "format": self.artifact.format,
            "precision": self.artifact.precision,
            "runtime": self.runtime,
            "device": self.device,
            "size_bytes": self.artifact.size_bytes,
            "accuracy": self.accuracy.to_dict() if self.accuracy else None,
            "parity": self.parity.to_dict(),
            "timing": self.timing,
            "processor": self.processor,
            "target": self.artifact.target,
            "on_target": self.on_target,
            "latency_ms": self.latency.to_dict() if self.latency else None,
            "instructions": self.instructions,
            "fp32_instructions": self.fp32_instructions,
            "baseline_latency_ms": self.baseline_latency.to_dict(),
            "fp32_latency_ms": self.fp32_latency.to_dict() if self.fp32_latency else None,
            "speedup": self.speedup,
            "speedup_ci95": _listed(self.speedup_ci95),
            "speedup_fp32": self.speedup_fp32,
            "speedup_fp32_ci95": _listed(self.speedup_fp32_ci95),
            "load_ms": self.load_ms,
            "first_ms": self.first_ms,
            "peak_rss_bytes": self.peak_rss_bytes,
            "verdict": self.verdict.word,
            "reasons": list(self.verdict.reasons),
            "structure": self.structure,
            "suspects": list(self.suspects),
        }


@dataclass(frozen=True)
class Baseline:
    """The original model as it was measured; `cached` where that was by an earlier command on the same data."""

    model: str
    device: str
    accuracy: float | None
    metric: str | None
    samples: int
    latency: Latency
    unit: Unit = "points"
    cached: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {
            "model": self.model,
            "device": self.device,
            "metric": self.metric,
            "accuracy": self.accuracy,
            "n": self.samples,
            "latency_ms": self.latency.to_dict(),
            "arithmetic": "fp32",
            "tf32": False,
            "cached": self.cached,
        }


@dataclass(frozen=True)
class Culprit:
    """The op of a file that loses more than its inputs had lost: its kind, its name, and the SQNR of what it writes."""

    op: str
    node: str
    sqnr_db: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {"op": self.op, "node": self.node, "sqnr_db": finite(self.sqnr_db)}


@dataclass(frozen=True)
class Rung:
    """One step of the parity ladder: how near it is to `against` and to the original, and what is wrong with it.

    A file adds little to the graph that it stands on, `against`, and is judged by how near that is to the original.
    `culprit` is the first op in it that differs, or the sentence that says why none is named; None where nothing is
    wrong. `path` is that of a file.
    """

    name: str
    against: str
    parity: Parity
    to_original: Parity
    problem: str | None
    culprit: Culprit | str | None = None
    path: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of one entry of `ladder`."""
        return {
            "rung": self.name,
            "against": self.against,
            "parity": self.parity.to_dict(),
            "to_original": self.to_original.to_dict(),
            "ok": self.problem is None,
            "problem": self.problem,
            "op": self.culprit.to_dict() if isinstance(self.culprit, Culprit) else None,
            "op_note": self.culprit if isinstance(self.culprit, str) else None,
        }


@dataclass(frozen=True)
class Comparison:
    """The original and every artifact, measured in one run; `ladder` where an explanation was asked for."""

    baseline: Baseline
    artifacts: tuple[Measurement, ...]
    notes: tuple[str, ...] = ()
    ladder: tuple[Rung, ...] | None = None

    @property
    def unit(self) -> str:
        """What stands behind a drop of the metric: ` points`, ` %` or nothing."""
        return UNITS[self.baseline.unit][1]

    @property
    def first_divergence(self) -> Rung | None:
        """The first rung of the ladder that something is wrong with."""
        return next((rung for rung in self.ladder or () if rung.problem is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of `compare --json`."""
        return {
            "baseline": self.baseline.to_dict(),
            "artifacts": [measurement.to_dict() for measurement in self.artifacts],
            "notes": list(self.notes),
            "ladder": [rung.to_dict() for rung in self.ladder] if self.ladder is not None else None,
            "first_divergence": self.first_divergence.name if self.first_divergence else None,
        }


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, in the plural where it is one: `1 layer`, `1,200 layers`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def finite(value: float) -> float | None:
    """Returns `value`, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


@dataclass(frozen=True)
class OpTime:
    """One op of a file: its kind, its name where the runtime tells one, and its time in µs."""

    op: str
    name: str
    us: float


@dataclass(frozen=True)
class OpTimes:
    """The time of each op of a file under the runtime's profiler, in the order in which they run.

    They are means over `runs` of the `recorded` runs. `whole_us` is that of a profiled run as the runtime itself sees
    it, `latency_us` the p50 of a run without profiler.
    A profiler costs time of its own, in the ops and between them.
    """

    ops: tuple[OpTime, ...] = field(repr=False)
    runs: int
    recorded: int
    whole_us: float
    latency_us: float

    @property
    def sum_us(self) -> float:
        """What the ops sum to, in µs."""
        return sum(op.us for op in self.ops)

    @property
    def scale(self) -> float:
        """What brings the ops' times down to a run without profiler: 1, or less where they sum to more than its p50."""
        return min(1.0, self.latency_us / self.sum_us) if self.sum_us else 1.0

    @property
    def between_us(self) -> float:
        """What of a profiled run is in no op: the runtime's work, and its profiler's, between them. In µs."""
        return max(0.0, self.whole_us - self.sum_us)

    @property
    def outside_us(self) -> float:
        """What of a run without profiler is in no op: calls, copies, the runtime itself. In µs."""
        return max(0.0, self.latency_us - self.sum_us)

    def by_op(self) -> dict[str, tuple[int, float]]:
        """Returns count and summed time in µs of each kind of op, the longest first."""
        found: dict[str, tuple[int, float]] = {}
        for op in self.ops:
            count, us = found.get(op.op, (0, 0.0))
            found[op.op] = (count + 1, us + op.us)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of `profile --ops`."""
        total = self.whole_us or 1.0
        return {
            "runs": self.runs,
            "recorded_runs": self.recorded,
            "sum_us": self.sum_us,
            "between_us": self.between_us,
            "profiled_run_us": self.whole_us,
            "latency_us": self.latency_us,
            "scale": self.scale,
            "outside_us": self.outside_us,
            "by_op": [
                {"op": op, "count": count, "us": us, "scaled_us": us * self.scale, "share": us / total}
                for op, (count, us) in self.by_op().items()
            ],
            "ops": [asdict(op) for op in self.ops],
        }


@dataclass(frozen=True)
class Profile:
    """One file's speed and memory on one device; on an emulated one only `instructions`, see Measurement.

    `ops` is None where per-op times were not asked for, or where the runtime gives none, which `notes` tell.
    """

    artifact: Artifact
    runtime: str
    device: str
    latency: Latency | None
    load_ms: float | None
    first_ms: float | None
    peak_rss_bytes: int | None
    timing: Literal["measured", "emulated"] = "measured"
    instructions: int | None = None
    ops: OpTimes | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of `profile --json`."""
        return {
            "path": str(self.artifact.path),
            "format": self.artifact.format,
            "precision": self.artifact.precision,
            "runtime": self.runtime,
            "device": self.device,
            "size_bytes": self.artifact.size_bytes,
            "timing": self.timing,
            "latency_ms": self.latency.to_dict() if self.latency else None,
            "instructions": self.instructions,
            "load_ms": self.load_ms,
            "first_ms": self.first_ms,
            "peak_rss_bytes": self.peak_rss_bytes,
            "ops": self.ops.to_dict() if self.ops else None,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Replay:
    """Golden inputs replayed through one file: how near its outputs are to the recorded ones, and what is wrong."""

    artifact: Artifact
    parity: Parity | None
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of `verify --json`."""
        return {
            "path": str(self.artifact.path),
            "format": self.artifact.format,
            "ok": self.problem is None,
            "parity": self.parity.to_dict() if self.parity else None,
            "problem": self.problem,
        }
