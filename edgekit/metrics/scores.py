"""Scores: what each sample brings to a metric, and what a lost sample would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from edgekit.errors import EdgeKitError

if TYPE_CHECKING:
    import numpy as np


BEYOND_SHARES = 0.05  # how far quantized probabilities may lie outside 0..1; scores further out are logits
OTHER_METRIC = "choose another --metric, or leave the labels out to compare outputs by SQNR and cosine"


class Scores(Protocol):
    """What each sample brings to a metric, so that the metric can be taken of any resample."""

    def __len__(self) -> int: ...

    def values(self, weights: np.ndarray) -> np.ndarray:
        """Returns the metric of each resample: weights (R, N), how much of a sample is in it → (R,)."""
        ...

    def with_loss(self, losing: Any) -> tuple[Scores, Scores]:
        """Returns these scores and `losing`, those of the other file, with one more sample, of N + 1.

        It is the sample that costs most where these have it and the others lose it wholly.
        """
        ...


@dataclass(frozen=True, eq=False)
class Sums:
    """Scores of a metric that is a function of sums: `statistics` (N, k), and `of_sums`, (…, k) → (…).

    `worst` gives the rows (k,) of one sample that is lost wholly, from both files' statistics: as the file that has it
    scores it, and as the one that loses it does. `moments` are how many values the targets of errors hold, their sum,
    and that of their squares.
    """

    statistics: np.ndarray
    of_sums: Callable[[np.ndarray], np.ndarray]
    worst: Callable[[Sums, Sums], tuple[np.ndarray, np.ndarray]]
    moments: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.statistics)

    def values(self, weights: np.ndarray) -> np.ndarray:
        """See Scores."""
        return self.of_sums(weights @ self.statistics)

    def with_loss(self, losing: Any) -> tuple[Scores, Scores]:
        """See Scores."""
        kept, lost = self.worst(self, losing)
        return self._and(kept), losing._and(lost)

    def _and(self, row: np.ndarray) -> Sums:
        import numpy as np

        return replace(self, statistics=np.concatenate([self.statistics, row[None]]))


def value(scores: Scores) -> float:
    """Returns the metric of all samples."""
    import numpy as np

    return float(scores.values(np.ones((1, len(scores))))[0])


def outcomes(scores: Scores) -> np.ndarray | None:
    """Returns which samples are right, as booleans, where a metric is their share; else None."""
    if not isinstance(scores, Sums) or scores.of_sums is not mean:
        return None
    means = scores.statistics[:, 0]
    return means == 1 if bool(((means == 0) | (means == 1)).all()) else None


def per_sample(scores: np.ndarray) -> Sums:
    """Returns the mean of scores (N,) as a metric."""
    import numpy as np

    return Sums(np.stack([scores.astype(np.float64), np.ones(len(scores))], axis=1), mean, worst_score)


def of_errors(errors: np.ndarray, target: np.ndarray, of_sums: Callable[[np.ndarray], np.ndarray], power: int) -> Sums:
    """Returns errors (N,) as a metric; `target` (N, …) tells how large that of a lost sample is, of which `power`."""
    import numpy as np

    values = target.astype(np.float64).ravel()
    moments = float(values.size), float(values.sum()), float((values**2).sum())
    scores = per_sample(errors)
    return replace(scores, of_sums=of_sums, worst=lambda kept, lost: worst_error(kept, lost, power), moments=moments)


def joined(parts: Sequence[Sums]) -> Sums:
    """Returns the scores of all samples from those of parts of them."""
    import numpy as np

    statistics = np.concatenate([part.statistics for part in parts])
    return replace(
        parts[0], statistics=statistics, moments=tuple(map(sum, zip(*(p.moments for p in parts), strict=True)))
    )


def mean(sums: np.ndarray) -> np.ndarray:
    """Returns the mean of (..., 2) sums: of a statistic, and of how many it is."""
    return sums[..., 0] / sums[..., 1]


def root_of_mean(sums: np.ndarray) -> np.ndarray:
    """Returns the square root of `mean`."""
    import numpy as np

    return np.sqrt(mean(sums))


def mean_over_classes(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Returns the mean of ratios over the last axis, without classes that nothing was said of."""
    import numpy as np

    there = below > 0
    ratios = np.divide(above, below, out=np.zeros_like(above), where=there)
    return ratios.sum(axis=-1) / np.maximum(there.sum(axis=-1), 1)


def worst_score(kept: Sums, lost: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Returns the worst sample of a mean of scores: from the highest score to 0, or to the lowest where that is below.

    The highest of shares and cosines is 1; of a user's own scores beyond that, the highest that was seen.
    """
    import numpy as np

    seen = np.concatenate([kept.statistics[:, 0], lost.statistics[:, 0]])
    low, high = float(seen.min()), float(seen.max())
    high = 1.0 if low >= -1 and high <= 1 else high
    return np.array([high, 1.0]), np.array([min(low, 0.0), 1.0])


def worst_error(kept: Sums, lost: Sums, power: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the worst sample of a mean of errors: no error against that of another sample's output.

    The latter is the root mean square difference of two targets, to the `power`; or the largest error that was seen.
    """
    import numpy as np

    count, total, squares = lost.moments
    apart = max(2 * (squares / count - (total / count) ** 2), 0.0) ** (power / 2)
    seen = max(float(scores.statistics[:, 0].max()) for scores in (kept, lost))
    return np.array([0.0, 1.0]), np.array([max(apart, seen), 1.0])


def are_whole(target: np.ndarray) -> bool:
    """Whether targets are whole numbers, of whatever type."""
    import numpy as np

    return target.dtype.kind in "iufb" and bool(np.isfinite(target).all() and (target == np.round(target)).all())


def finite_or_refused(output: np.ndarray) -> np.ndarray:
    """Returns an output; raises EdgeKitError where it holds NaN or infinite values."""
    import numpy as np

    if not np.isfinite(output).all():
        raise EdgeKitError("the model's outputs hold NaN or infinite values", "check its weights and --data")
    return output


def shape_text(array: np.ndarray) -> str:
    """Returns a shape as messages have it, such as 8x3x224x224."""
    return "x".join(map(str, array.shape))


def check_range(labels: np.ndarray, classes: int) -> None:
    """Raises EdgeKitError for labels that are no indices of `classes`."""
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        raise EdgeKitError(
            f"labels run from {labels.min()} to {labels.max()}, but the model has {classes} classes",
            "labels are class indices from 0",
        )


def worst_overlap(kept: Sums, lost: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sample whose loss costs a mean over classes most: as much is found in it, and none of it is right."""
    import numpy as np

    half = lost.statistics.shape[1] // 2
    missed = np.concatenate([np.zeros((len(lost), half)), lost.statistics[:, half:]], axis=1)
    before = kept.of_sums(kept.statistics.sum(axis=0) + kept.statistics)
    after = lost.of_sums(lost.statistics.sum(axis=0) + missed)
    most = int((before - after).argmax())
    return kept.statistics[most], missed[most]
