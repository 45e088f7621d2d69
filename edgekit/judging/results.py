"""Results: frozen dataclasses of what was measured and judged, and their JSON forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekit.artifacts.artifact import Artifact, Culprit
from edgekit.measuring.latency import Latency
from edgekit.measuring.op_times import OpTimes
from edgekit.metrics.accuracy import Accuracy
from edgekit.metrics.parity import Parity
from edgekit.types import UNITS, Interval, Unit

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Verdict:
    """`ship`, `reject` or `inconclusive`, and why."""

    word: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Measurement:
    """Everything that was measured of one artifact.

    `structure` counts what in an int8 file does not run in int8 (see `int8_coverage.Structure`; None for other files),
    and `suspects` says it in words. On an emulated device `timing` is "emulated" and every figure in ms and bytes is
    None: `instructions` of one run, and of one of the fp32 file, are counted instead. `same_machine` is False where the
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
        from edgekit.measuring.latency import speedup_interval

        beside = self.latency is not None and self.same_machine and not self.baseline_cached
        return speedup_interval(self.baseline_latency, self.latency) if self.latency and beside else None

    @property
    def speedup_fp32_ci95(self) -> Interval | None:
        """The 95 % interval of `speedup_fp32`; None of one process."""
        from edgekit.measuring.latency import speedup_interval

        return speedup_interval(self.fp32_latency, self.latency) if self.latency and self.fp32_latency else None

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


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


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
