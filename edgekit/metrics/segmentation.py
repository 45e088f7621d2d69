"""Metrics of segmentation: the mean IoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgekit.errors import EdgeKitError
from edgekit.metrics.scores import (
    OTHER_METRIC,
    Sums,
    are_whole,
    check_range,
    finite_or_refused,
    mean_over_classes,
    shape_text,
    worst_overlap,
)

if TYPE_CHECKING:
    import numpy as np


VOID = 255  # the label of pixels that no class is asked of


def mean_iou_of(sums: np.ndarray) -> np.ndarray:
    """Returns the mean over classes of intersection over union, of (intersections, found + true)."""
    import numpy as np

    both, sizes = np.split(sums, 2, axis=-1)
    return mean_over_classes(both, sizes - both)


def mean_iou(outputs: Sequence[np.ndarray], target: np.ndarray) -> Sums:
    """Scores segmentation: outputs (N, classes, H, W) or labels (N, H, W), target (N, H, W) with 255 for no class.

    Intersections and unions are summed over all samples, as Pascal VOC and Cityscapes do; classes that are neither
    in the outputs nor in the targets do not count.
    """
    import numpy as np
    import torch
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    first = finite_or_refused(outputs[0])
    scored = first.ndim == 4 and np.issubdtype(first.dtype, np.floating) and first.shape[1] > 1
    labels = first.argmax(axis=1) if scored else first
    fits = scored or (np.issubdtype(first.dtype, np.integer) and first.ndim == 3)
    if not fits or labels.shape != target.shape or not are_whole(target):
        raise EdgeKitError(
            "miou needs class scores (N, classes, H, W) or class indices (N, H, W), and integer labels (N, H, W); the "
            f"model's first output is {first.dtype} of {shape_text(first)}, the labels {target.dtype} of "
            f"{shape_text(target)}",
            OTHER_METRIC,
        )
    target = target.astype(np.int64)
    asked = target[target != VOID]
    classes = first.shape[1] if scored else max(int(asked.max(initial=0)), int(labels.max(initial=0))) + 1
    check_range(asked, classes)
    rows = []
    for found, true in zip(labels, target, strict=True):
        counts = multiclass_confusion_matrix(
            torch.from_numpy(found.astype(np.int64)),
            torch.from_numpy(true.astype(np.int64)),
            num_classes=classes,
            ignore_index=VOID,
            validate_args=False,
        ).numpy()
        rows.append(np.concatenate([counts.diagonal(), counts.sum(axis=0) + counts.sum(axis=1)]))
    return Sums(np.stack(rows).astype(np.float64), mean_iou_of, worst_overlap)


def join_ious(parts: Sequence[Sums]) -> Sums:
    """Joins parts of as many classes as each has seen."""
    import numpy as np

    classes = max(part.statistics.shape[1] for part in parts) // 2
    rows = []
    for part in parts:
        both = np.stack(np.split(part.statistics, 2, axis=1), axis=1)
        more = classes - both.shape[2]
        rows.append(np.pad(both, ((0, 0), (0, 0), (0, more))).reshape(len(both), -1))
    statistics = np.concatenate(rows)
    if not statistics.any():
        raise EdgeKitError(f"every label is {VOID}, which stands for no class", "give labels from 0")
    return replace(parts[0], statistics=statistics)
