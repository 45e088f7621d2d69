"""Metrics: the one table of what accuracy can mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgeKitError, UsageError
from edgekit.metrics import detection
from edgekit.metrics.classification import CLASSES, f1, join_f1, top_k
from edgekit.metrics.regression import cosine, mae, rmse
from edgekit.metrics.scores import Scores, Sums, finite_or_refused, joined, per_sample, shape_text
from edgekit.metrics.segmentation import join_ious, mean_iou
from edgekit.types import Unit

if TYPE_CHECKING:
    import numpy as np

CHUNK = 64  # samples that a user's own function gets at once


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
    from edgekit.util.user_code import import_code, is_code

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


def _own(name: str, function: Any, folder: Any, outputs: Sequence[np.ndarray], target: np.ndarray) -> Sums:
    """Scores by the user's own function: outputs (n, …), a tuple of them where the model gives several, and targets."""
    import numpy as np

    from edgekit.util.user_code import running

    found = []
    for start in range(0, len(target), CHUNK):
        part = slice(start, start + CHUNK)
        given = tuple(finite_or_refused(array)[part] for array in outputs)
        with running(name, folder):
            result = function(given[0] if len(given) == 1 else given, target[part])
            if hasattr(result, "detach"):
                result = result.detach().cpu()
            scores = np.asarray(result, dtype=np.float64)
        one_each = scores.shape == (len(target[part]),)
        if not one_each or not np.isfinite(scores).all():
            returned = "NaN or infinity" if one_each else f"values of shape {shape_text(scores) or '()'}"
            raise EdgeKitError(
                f"{name} must return one finite score for each of {len(target[part])} samples, not {returned}",
                "return an array (N,), higher for better",
            )
        found.append(scores)
    return per_sample(np.concatenate(found))


METRICS = {
    metric.name: metric
    for metric in (
        Metric("top1", "points", CLASSES, lambda o, t: top_k(1, o, t)),
        Metric("top5", "points", CLASSES, lambda o, t: top_k(5, o, t)),
        Metric("f1", "points", "class scores (N, classes); class indices (N,), or 0 and 1 (N, labels)", f1, join_f1),
        Metric("miou", "points", "class scores (N, classes, H, W); class indices (N, H, W)", mean_iou, join_ious),
        Metric(
            "map",
            "points",
            "boxes (N, D, 4), scores and labels (N, D); boxes and labels",
            detection.matched,
            detection.ranked,
            whole=True,
        ),
        Metric("cosine", "points", "vectors (N, …); vectors of the same shape", cosine),
        Metric("mae", "percent", "numbers (N, …); numbers of the same shape", mae),
        Metric("rmse", "percent", "numbers (N, …); numbers of the same shape", rmse),
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
