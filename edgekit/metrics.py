"""METRICS: the one table of what accuracy can mean, and what each sample brings to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from edgekit import detection
from edgekit.errors import EdgeKitError, UsageError
from edgekit.results import Unit

if TYPE_CHECKING:
    import numpy as np
    import torch

VOID = 255  # the label of pixels that no class is asked of
BEYOND_SHARES = 0.05  # how far quantized probabilities may lie outside 0..1; scores further out are logits
CHUNK = 64  # samples that a user's own function gets at once
CLASSES = "class scores (N, classes); class indices (N,), or one-hot rows of the same width"
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


@dataclass(frozen=True)
class Metric:
    """One row: its name, the unit of its drop, what it needs, and how samples are scored.

    `unit` is None for a user's own function, whose scores tell it. `part` takes the model's outputs and the targets of
    some samples, one row each, and raises EdgeKitError where they do not fit each other; `join` makes the scores of all
    samples out of such parts, in their order, and raises EdgeKitError where they say nothing. `part` looks at the first
    output, or at all of them with `whole`; `output` names the one that it shall look at in its place.
    """

    name: str
    unit: Unit | None
    needs: str
    part: Callable[[Sequence[np.ndarray], np.ndarray], Any]
    join: Callable[[Sequence[Any]], Scores] = lambda parts: joined(parts)
    whole: bool = False
    output: str | None = None

    def of(self, names: Sequence[str]) -> Metric:
        """Returns the metric for a model with outputs of these names, of which it looks at its own.

        Raises EdgeKitError where there is no such output.
        """
        if self.whole:
            return self
        wanted = names[0] if self.output is None else self.output
        if wanted not in names:
            raise EdgeKitError(f"the model has no output '{wanted}'", f"its outputs are {', '.join(names)}")
        place = list(names).index(wanted)
        return replace(self, part=lambda o, t: self.part([o[place]], t), output=wanted)

    def score(self, outputs: Sequence[np.ndarray], target: np.ndarray) -> Scores:
        """Returns the scores of samples that are all at hand."""
        return self.join([self.part(outputs, target)])

    def unit_of(self, original: Scores) -> Unit:
        """Returns the unit of a drop from `original`: points for shares, a user's own unit for scores beyond 0..1."""
        if self.unit is not None:
            return self.unit
        assert isinstance(original, Sums)
        means = original.statistics[:, 0]
        return "points" if means.min() >= 0 and means.max() <= 1 else "units"


def find(name: str | Callable[..., Any]) -> Metric:
    """Returns a metric by its name, or the user's own function: itself, or by `FILE.py:function`, which is imported.

    A name may be one of ALIASES, and `NAME:OUTPUT` names the output that is looked at.

    Raises EdgeKitError for a metric that EdgeKit does not know, and for code that fails or holds no such function.
    """
    from edgekit.code import import_code, is_code

    if not isinstance(name, str):
        given, own = name, getattr(name, "__name__", type(name).__name__)
        part = partial(_own, own, given, None)
        return Metric(own, None, "a function (outputs, target)", part, whole=True)
    known, _, output = name.partition(":")
    spelled = re.sub(r"[-_ ]", "", known).lower()
    if (row := METRICS.get(ALIASES.get(spelled, spelled))) is not None:
        if output and row.whole:
            raise UsageError(f"{row.name} looks at all outputs of a model", f"write --metric {row.name}")
        return replace(row, output=output) if output else row
    if not is_code(name):
        raise UsageError(f"unknown metric '{name}'", f"choose one of {', '.join(METRICS)}, or FILE.py:function")
    if name.endswith(".py"):
        raise EdgeKitError(f"{name} names a file but no function in it", f"write --metric {name}:function")
    code = import_code(name)
    function = code.get()
    if not callable(function):
        raise EdgeKitError(f"{name} is no function", "name a function (outputs, target) → one score per sample")
    part = partial(_own, name, function, code.folder)
    return Metric(name, None, "a function (outputs, target)", part, whole=True)


def value(scores: Scores) -> float:
    """Returns the metric of all samples."""
    import numpy as np

    return float(scores.values(np.ones((1, len(scores))))[0])


def outcomes(scores: Scores) -> np.ndarray | None:
    """Returns which samples are right, as booleans, where a metric is their share; else None."""
    if not isinstance(scores, Sums) or scores.of_sums is not _mean:
        return None
    means = scores.statistics[:, 0]
    return means == 1 if bool(((means == 0) | (means == 1)).all()) else None


def per_sample(scores: np.ndarray) -> Sums:
    """Returns the mean of scores (N,) as a metric."""
    import numpy as np

    return Sums(np.stack([scores.astype(np.float64), np.ones(len(scores))], axis=1), _mean, _worst_score)


def _of_errors(errors: np.ndarray, target: np.ndarray, of_sums: Callable[[np.ndarray], np.ndarray], power: int) -> Sums:
    """Returns errors (N,) as a metric; `target` (N, …) tells how large that of a lost sample is, of which `power`."""
    import numpy as np

    values = target.astype(np.float64).ravel()
    moments = float(values.size), float(values.sum()), float((values**2).sum())
    scores = per_sample(errors)
    return replace(scores, of_sums=of_sums, worst=lambda kept, lost: _worst_error(kept, lost, power), moments=moments)


def joined(parts: Sequence[Sums]) -> Sums:
    """Returns the scores of all samples from those of parts of them."""
    import numpy as np

    statistics = np.concatenate([part.statistics for part in parts])
    return replace(
        parts[0], statistics=statistics, moments=tuple(map(sum, zip(*(p.moments for p in parts), strict=True)))
    )


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _root_of_mean(sums: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.sqrt(_mean(sums))


def _mean_iou_of(sums: np.ndarray) -> np.ndarray:
    """Returns the mean over classes of intersection over union, of (intersections, found + true)."""
    import numpy as np

    both, sizes = np.split(sums, 2, axis=-1)
    return _mean_over_classes(both, sizes - both)


def _mean_f1_of(sums: np.ndarray) -> np.ndarray:
    """Returns the mean over classes of F1, of (hits, found + true)."""
    import numpy as np

    hits, sizes = np.split(sums, 2, axis=-1)
    return _mean_over_classes(2 * hits, sizes)


def _mean_over_classes(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Returns the mean of ratios over the last axis, without classes that nothing was said of."""
    import numpy as np

    there = below > 0
    ratios = np.divide(above, below, out=np.zeros_like(above), where=there)
    return ratios.sum(axis=-1) / np.maximum(there.sum(axis=-1), 1)


def _worst_score(kept: Sums, lost: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Returns the worst sample of a mean of scores: from the highest score to 0, or to the lowest where that is below.

    The highest of shares and cosines is 1; of a user's own scores beyond that, the highest that was seen.
    """
    import numpy as np

    seen = np.concatenate([kept.statistics[:, 0], lost.statistics[:, 0]])
    low, high = float(seen.min()), float(seen.max())
    high = 1.0 if low >= -1 and high <= 1 else high
    return np.array([high, 1.0]), np.array([min(low, 0.0), 1.0])


def _worst_error(kept: Sums, lost: Sums, power: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the worst sample of a mean of errors: no error against that of another sample's output.

    The latter is the root mean square difference of two targets, to the `power`; or the largest error that was seen.
    """
    import numpy as np

    count, total, squares = lost.moments
    apart = max(2 * (squares / count - (total / count) ** 2), 0.0) ** (power / 2)
    seen = max(float(scores.statistics[:, 0].max()) for scores in (kept, lost))
    return np.array([0.0, 1.0]), np.array([max(apart, seen), 1.0])


def _worst_overlap(kept: Sums, lost: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sample whose loss costs a mean over classes most: as much is found in it, and none of it is right."""
    import numpy as np

    half = lost.statistics.shape[1] // 2
    missed = np.concatenate([np.zeros((len(lost), half)), lost.statistics[:, half:]], axis=1)
    before = kept.of_sums(kept.statistics.sum(axis=0) + kept.statistics)
    after = lost.of_sums(lost.statistics.sum(axis=0) + missed)
    most = int((before - after).argmax())
    return kept.statistics[most], missed[most]


def _top(k: int, outputs: Sequence[np.ndarray], target: np.ndarray) -> Sums:
    """Scores classifiers: outputs (N, classes), target as `class_indices` reads it; scores of NaN are wrong."""
    import numpy as np
    import torch
    from torchmetrics.functional.classification import multiclass_accuracy

    logits = outputs[0]
    if logits.ndim != 2 or len(logits) != len(target) or logits.shape[1] <= k:
        raise EdgeKitError(
            f"top{k} needs one row of more than {k} class scores per sample, the model's first output is "
            f"{_shape(logits)} for {len(target)} samples",
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

    if not _whole(target):
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
            f"{_shape(target)}",
            "give y as whole numbers (N,), or choose the --metric for such targets: f1 takes several labels a sample",
        )
    _check_range(indices, classes)
    return indices


def _check_range(labels: np.ndarray, classes: int) -> None:
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        raise EdgeKitError(
            f"labels run from {labels.min()} to {labels.max()}, but the model has {classes} classes",
            "labels are class indices from 0",
        )


def _mean_iou(outputs: Sequence[np.ndarray], target: np.ndarray) -> Sums:
    """Scores segmentation: outputs (N, classes, H, W) or labels (N, H, W), target (N, H, W) with 255 for no class.

    Intersections and unions are summed over all samples, as Pascal VOC and Cityscapes do; classes that are neither
    in the outputs nor in the targets do not count.
    """
    import numpy as np
    import torch
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    first = _finite(outputs[0])
    scored = first.ndim == 4 and np.issubdtype(first.dtype, np.floating) and first.shape[1] > 1
    labels = first.argmax(axis=1) if scored else first
    fits = scored or (np.issubdtype(first.dtype, np.integer) and first.ndim == 3)
    if not fits or labels.shape != target.shape or not _whole(target):
        raise EdgeKitError(
            "miou needs class scores (N, classes, H, W) or class indices (N, H, W), and integer labels (N, H, W); the "
            f"model's first output is {first.dtype} of {_shape(first)}, the labels {target.dtype} of {_shape(target)}",
            OTHER_METRIC,
        )
    target = target.astype(np.int64)
    asked = target[target != VOID]
    classes = first.shape[1] if scored else max(int(asked.max(initial=0)), int(labels.max(initial=0))) + 1
    _check_range(asked, classes)
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
    return Sums(np.stack(rows).astype(np.float64), _mean_iou_of, _worst_overlap)


def _join_ious(parts: Sequence[Sums]) -> Sums:
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


@dataclass(frozen=True, eq=False)
class _Labels:
    """Scores of labels (N, labels) with their outputs read as shares and as logits, and the range of the outputs."""

    of_shares: Sums
    of_logits: Sums
    lowest: float
    highest: float


def _join_f1(parts: Sequence[Sums | _Labels]) -> Sums:
    """Joins parts, of whose outputs all are logits where any is none of a share."""
    of_classes = [part for part in parts if isinstance(part, Sums)]
    if of_classes:
        return joined(of_classes)
    labels = [part for part in parts if isinstance(part, _Labels)]
    shares = min(part.lowest for part in labels) >= -BEYOND_SHARES
    shares = shares and max(part.highest for part in labels) <= 1 + BEYOND_SHARES
    return joined([part.of_shares if shares else part.of_logits for part in labels])


def _f1(outputs: Sequence[np.ndarray], target: np.ndarray) -> Sums | _Labels:
    """Scores F1, the mean over classes: target (N,) with outputs (N, classes); 0 and 1 (N, labels) with the same.

    Outputs (N,) or (N, 1) are those of the one class 1. A label is found where its probability is above 0.5, or its
    logit above 0: outputs are logits where any lies outside 0..1. Labels that are nowhere do not count.
    """
    import numpy as np
    from torchmetrics.functional.classification import multiclass_stat_scores, multilabel_stat_scores

    first = _finite(outputs[0])
    if first.ndim == 2 and first.shape[1] > 1 and target.ndim == 1 and len(first) == len(target):
        true = _classes(target, first.shape[1])[:, None]
        found = first.argmax(axis=1)[:, None]
        return _f1_sums(multiclass_stat_scores, found, true, num_classes=first.shape[1])
    first, true = (array[:, None] if array.ndim == 1 else array for array in (first, target))
    if first.ndim != 2 or first.shape != true.shape or not np.isin(true, (0, 1)).all():
        raise EdgeKitError(
            "f1 needs class scores (N, classes) and class indices (N,), or scores and 0 or 1 of the same shape "
            f"(N, labels); the model's first output is {_shape(first)}, the labels {target.dtype} of "
            f"{_shape(target)}",
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
    return Sums(rows.astype(np.float64), _mean_f1_of, _worst_overlap)


def _mae(outputs: Sequence[np.ndarray], target: np.ndarray) -> Sums:
    """Scores regression by |output − target|: both of one shape (N, …)."""
    from torchmetrics.functional.regression import mean_absolute_error

    found, true = _values_across("mae", outputs[0], target)
    errors = mean_absolute_error(found, true, num_outputs=found.shape[1]).reshape(-1).numpy()
    return _of_errors(errors, target, _mean, 1)


def _rmse(outputs: Sequence[np.ndarray], target: np.ndarray) -> Sums:
    """Scores regression by (output − target)², of whose mean the root is taken: both of one shape (N, …)."""
    from torchmetrics.functional.regression import mean_squared_error

    found, true = _values_across("rmse", outputs[0], target)
    squares = mean_squared_error(found, true, num_outputs=found.shape[1]).reshape(-1).numpy()
    return _of_errors(squares, target, _root_of_mean, 2)


def _cosine(outputs: Sequence[np.ndarray], target: np.ndarray) -> Sums:
    """Scores vectors (N, …) by the cosine of the angle to their target; one without a direction counts as 0."""
    import numpy as np
    from torchmetrics.functional.regression import cosine_similarity

    found, true = _values_across("cosine", outputs[0], target)
    return per_sample(np.nan_to_num(cosine_similarity(found.T, true.T, reduction="none").numpy()))


def _values_across(name: str, output: np.ndarray, target: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns outputs and targets as float64 (values, N): the samples are columns."""
    import numpy as np
    import torch

    if output.size != target.size or len(output) != len(target) or output.ndim < target.ndim:
        raise EdgeKitError(
            f"{name} needs targets of the outputs' own shape; the model's first output is {_shape(output)}, the "
            f"targets {_shape(target)}",
            OTHER_METRIC,
        )
    if target.dtype == object or not np.isfinite(target).all():
        raise EdgeKitError(f"{name} needs finite numbers as targets", "clean the data first")
    found, true = (a.reshape(len(a), -1).astype(np.float64).T for a in (_finite(output), target))
    return torch.from_numpy(np.ascontiguousarray(found)), torch.from_numpy(np.ascontiguousarray(true))


def _own(name: str, function: Any, folder: Any, outputs: Sequence[np.ndarray], target: np.ndarray) -> Sums:
    """Scores by the user's own function: outputs (n, …), a tuple of them where the model gives several, and targets."""
    import numpy as np

    from edgekit.code import running

    found = []
    for start in range(0, len(target), CHUNK):
        part = slice(start, start + CHUNK)
        given = tuple(_finite(array)[part] for array in outputs)
        with running(name, folder):
            result = function(given[0] if len(given) == 1 else given, target[part])
            if hasattr(result, "detach"):
                result = result.detach().cpu()
            scores = np.asarray(result, dtype=np.float64)
        one_each = scores.shape == (len(target[part]),)
        if not one_each or not np.isfinite(scores).all():
            returned = "NaN or infinity" if one_each else f"values of shape {_shape(scores) or '()'}"
            raise EdgeKitError(
                f"{name} must return one finite score for each of {len(target[part])} samples, not {returned}",
                "return an array (N,), higher for better",
            )
        found.append(scores)
    return per_sample(np.concatenate(found))


def _whole(target: np.ndarray) -> bool:
    """Whether targets are whole numbers, of whatever type."""
    import numpy as np

    return target.dtype.kind in "iufb" and bool(np.isfinite(target).all() and (target == np.round(target)).all())


def _finite(output: np.ndarray) -> np.ndarray:
    import numpy as np

    if not np.isfinite(output).all():
        raise EdgeKitError("the model's outputs hold NaN or infinite values", "check its weights and --data")
    return output


def _shape(array: np.ndarray) -> str:
    return "x".join(map(str, array.shape))


METRICS = {
    metric.name: metric
    for metric in (
        Metric("top1", "points", CLASSES, lambda o, t: _top(1, o, t)),
        Metric("top5", "points", CLASSES, lambda o, t: _top(5, o, t)),
        Metric("f1", "points", "class scores (N, classes); class indices (N,), or 0 and 1 (N, labels)", _f1, _join_f1),
        Metric("miou", "points", "class scores (N, classes, H, W); class indices (N, H, W)", _mean_iou, _join_ious),
        Metric(
            "map",
            "points",
            "boxes (N, D, 4), scores and labels (N, D); boxes and labels",
            detection.matched,
            detection.ranked,
            whole=True,
        ),
        Metric("cosine", "points", "vectors (N, …); vectors of the same shape", _cosine),
        Metric("mae", "percent", "numbers (N, …); numbers of the same shape", _mae),
        Metric("rmse", "percent", "numbers (N, …); numbers of the same shape", _rmse),
    )
}

ALIASES = {  # what others call them, in small letters and without hyphens and underscores
    "accuracy": "top1", "acc": "top1", "top1accuracy": "top1", "top5accuracy": "top5",
    "f1score": "f1", "macrof1": "f1", "f1macro": "f1",
    "iou": "miou", "meaniou": "miou", "jaccard": "miou",
    "ap": "map", "meanaverageprecision": "map",
    "cosinesimilarity": "cosine",
    "l1": "mae", "meanabsoluteerror": "mae", "rootmeansquarederror": "rmse",
}  # fmt: skip
