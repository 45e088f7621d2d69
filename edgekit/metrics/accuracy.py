"""Accuracy: a metric of a file against the original's on the same samples, with a 95 % interval of the drop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgeKitError
from edgekit.metrics import intervals, scores
from edgekit.types import Interval, Unit, finite

if TYPE_CHECKING:
    import numpy as np

    from edgekit.metrics.scores import Scores
    from edgekit.metrics.table import Metric


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


def accuracy_of(metric: Metric, original: Scores, artifact: Scores) -> Accuracy:
    """Compares the scores of the original and the artifact on the same samples.

    The interval of the drop is Tango's where a metric is a share of right samples, and McNemar's exact test tells how
    likely as clear a difference is by chance. All other metrics have Gaffke's: see `intervals.resampled`. Raises
    EdgeKitError where a drop in percent has no measure: the original makes no error.
    """
    n, unit = len(original), metric.unit_of(original)
    before, after = scores.value(original), scores.value(artifact)
    right, kept = scores.outcomes(original), scores.outcomes(artifact)
    if unit == "points" and right is not None and kept is not None:
        lost, won = int((right & ~kept).sum()), int((kept & ~right).sum())
        interval = intervals.tango(n, lost, won)
        p_value = intervals.mcnemar(lost, won)
        return Accuracy(metric.name, n, after, before, interval, unit, "Tango", p_value, lost, won)
    if unit == "percent" and not before:
        raise EdgeKitError(
            f"the original's {metric.name} is 0, and no share of that can be told",
            "give measured targets, or leave them out: outputs are then compared by SQNR and cosine",
        )
    kept_by_original, lost_by_file = original.with_loss(artifact)
    kept_by_file, lost_by_original = artifact.with_loss(original)

    def highest(weights: np.ndarray) -> np.ndarray:
        return drop(unit, kept_by_original.values(weights), lost_by_file.values(weights))

    def lowest(weights: np.ndarray) -> np.ndarray:
        return drop(unit, lost_by_original.values(weights), kept_by_file.values(weights))

    interval = intervals.resampled(highest, lowest, n)
    unseen = float(highest(intervals.with_unseen(n))[0]) - drop(unit, before, after)
    return Accuracy(metric.name, n, after, before, interval, unit, "Gaffke", unseen=unseen)
