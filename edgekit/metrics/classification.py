"""Metrics of classification: top-k and F1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.errors import EdgeKitError
from edgekit.metrics.scores import (
    BEYOND_SHARES,
    OTHER_METRIC,
    Sums,
    are_whole,
    check_range,
    finite_or_refused,
    joined,
    mean_over_classes,
    per_sample,
    shape_text,
    worst_overlap,
)

if TYPE_CHECKING:
    import numpy as np
    import torch


CLASSES = "class scores (N, classes); class indices (N,), or one-hot rows of the same width"


def mean_f1_of(sums: np.ndarray) -> np.ndarray:
    """Returns the mean over classes of F1, of (hits, found + true)."""
    import numpy as np

    hits, sizes = np.split(sums, 2, axis=-1)
    return mean_over_classes(2 * hits, sizes)


def top_k(k: int, outputs: Sequence[np.ndarray], target: np.ndarray) -> Sums:
    """Scores classifiers: outputs (N, classes), target as `class_indices` reads it; scores of NaN are wrong."""
    import numpy as np
    import torch
    from torchmetrics.functional.classification import multiclass_accuracy

    logits = outputs[0]
    if logits.ndim != 2 or len(logits) != len(target) or logits.shape[1] <= k:
        raise EdgeKitError(
            f"top{k} needs one row of more than {k} class scores per sample, the model's first output is "
            f"{shape_text(logits)} for {len(target)} samples",
            OTHER_METRIC,
        )
    target = _classes(target, logits.shape[1])
    hits = multiclass_accuracy(
        torch.from_numpy(logits.astype(np.float64))[:, :, None],
        torch.from_numpy(target.astype(np.int64))[:, None],
        num_classes=logits.shape[1],
        top_k=k,
        average="micro",
        multidim_average="samplewise",
    )
    return per_sample((hits.numpy() == 1) & ~np.isnan(logits).any(axis=1))


def class_indices(target: np.ndarray, classes: int) -> np.ndarray | None:
    """Returns targets that tell one of several `classes` a sample as int64 (N,); None for all others.

    Those are whole numbers of any type, (N,) or (N, 1), and one-hot rows (N, classes).
    """
    import numpy as np

    if not are_whole(target):
        return None
    if is_one_hot(target) and target.shape[1] == classes:
        return target.argmax(axis=1)
    if target.ndim == 2 and target.shape[1] == 1:
        target = target[:, 0]
    return target.astype(np.int64) if target.ndim == 1 else None


def is_one_hot(target: np.ndarray) -> bool:
    """Whether targets are rows of one 1 among zeros."""
    if target.ndim != 2 or target.shape[1] < 2 or target.dtype.kind not in "iufb":
        return False
    return bool((((target == 0) | (target == 1)).all(axis=1) & (target.sum(axis=1) == 1)).all())


def _classes(target: np.ndarray, classes: int) -> np.ndarray:
    """Returns targets as class indices within `classes`, or raises EdgeKitError."""
    indices = class_indices(target, classes)
    if indices is None:
        raise EdgeKitError(
            f"labels must be one class index per sample or one-hot rows of {classes}, not {target.dtype} of shape "
            f"{shape_text(target)}",
            "give y as whole numbers (N,), or choose the --metric for such targets: f1 takes several labels a sample",
        )
    check_range(indices, classes)
    return indices


@dataclass(frozen=True, eq=False)
class _Labels:
    """Scores of labels (N, labels) with their outputs read as shares and as logits, and the range of the outputs."""

    of_shares: Sums
    of_logits: Sums
    lowest: float
    highest: float


def join_f1(parts: Sequence[Sums | _Labels]) -> Sums:
    """Joins parts, of whose outputs all are logits where any is none of a share."""
    of_classes = [part for part in parts if isinstance(part, Sums)]
    if of_classes:
        return joined(of_classes)
    labels = [part for part in parts if isinstance(part, _Labels)]
    shares = min(part.lowest for part in labels) >= -BEYOND_SHARES
    shares = shares and max(part.highest for part in labels) <= 1 + BEYOND_SHARES
    return joined([part.of_shares if shares else part.of_logits for part in labels])


def f1(outputs: Sequence[np.ndarray], target: np.ndarray) -> Sums | _Labels:
    """Scores F1, the mean over classes: target (N,) with outputs (N, classes); 0 and 1 (N, labels) with the same.

    Outputs (N,) or (N, 1) are those of the one class 1. A label is found where its probability is above 0.5, or its
    logit above 0: outputs are logits where any lies outside 0..1. Labels that are nowhere do not count.
    """
    import numpy as np
    from torchmetrics.functional.classification import multiclass_stat_scores, multilabel_stat_scores

    first = finite_or_refused(outputs[0])
    if first.ndim == 2 and first.shape[1] > 1 and target.ndim == 1 and len(first) == len(target):
        true = _classes(target, first.shape[1])[:, None]
        found = first.argmax(axis=1)[:, None]
        return _f1_sums(multiclass_stat_scores, found, true, num_classes=first.shape[1])
    first, true = (array[:, None] if array.ndim == 1 else array for array in (first, target))
    if first.ndim != 2 or first.shape != true.shape or not np.isin(true, (0, 1)).all():
        raise EdgeKitError(
            "f1 needs class scores (N, classes) and class indices (N,), or scores and 0 or 1 of the same shape "
            f"(N, labels); the model's first output is {shape_text(first)}, the labels {target.dtype} of "
            f"{shape_text(target)}",
            OTHER_METRIC,
        )
    of_shares, of_logits = (
        _f1_sums(multilabel_stat_scores, (first > limit)[:, :, None], true[:, :, None], num_labels=first.shape[1])
        for limit in (0.5, 0)
    )
    return _Labels(of_shares, of_logits, float(first.min()), float(first.max()))


def _f1_sums(score: Callable[..., torch.Tensor], found: np.ndarray, true: np.ndarray, **classes: int) -> Sums:
    import numpy as np
    import torch

    counts = score(
        torch.from_numpy(found.astype(np.int64)),
        torch.from_numpy(true.astype(np.int64)),
        average="none",
        multidim_average="samplewise",
        validate_args=False,  # they are checked above, and one label would not pass
        **classes,
    ).numpy()
    counts = counts.reshape(len(found), -1, 5)
    hits, false, missed = counts[..., 0], counts[..., 1], counts[..., 3]
    rows = np.concatenate([hits, 2 * hits + false + missed], axis=1)
    return Sums(rows.astype(np.float64), mean_f1_of, worst_overlap)
