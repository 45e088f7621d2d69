"""Metrics of regression: MAE, RMSE and cosine similarity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgekit.errors import EdgeKitError
from edgekit.metrics.scores import (
    OTHER_METRIC,
    Sums,
    finite_or_refused,
    mean,
    of_errors,
    per_sample,
    root_of_mean,
    shape_text,
)

if TYPE_CHECKING:
    import numpy as np
    import torch


def mae(outputs: Sequence[np.ndarray], target: np.ndarray) -> Sums:
    """Scores regression by |output − target|: both of one shape (N, …)."""
    from torchmetrics.functional.regression import mean_absolute_error

    found, true = _values_across("mae", outputs[0], target)
    errors = mean_absolute_error(found, true, num_outputs=found.shape[1]).reshape(-1).numpy()
    return of_errors(errors, target, mean, 1)


def rmse(outputs: Sequence[np.ndarray], target: np.ndarray) -> Sums:
    """Scores regression by (output − target)², of whose mean the root is taken: both of one shape (N, …)."""
    from torchmetrics.functional.regression import mean_squared_error

    found, true = _values_across("rmse", outputs[0], target)
    squares = mean_squared_error(found, true, num_outputs=found.shape[1]).reshape(-1).numpy()
    return of_errors(squares, target, root_of_mean, 2)


def cosine(outputs: Sequence[np.ndarray], target: np.ndarray) -> Sums:
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
            f"{name} needs targets of the outputs' own shape; the model's first output is {shape_text(output)}, the "
            f"targets {shape_text(target)}",
            OTHER_METRIC,
        )
    if target.dtype == object or not np.isfinite(target).all():
        raise EdgeKitError(f"{name} needs finite numbers as targets", "clean the data first")
    found, true = (a.reshape(len(a), -1).astype(np.float64).T for a in (finite_or_refused(output), target))
    return torch.from_numpy(np.ascontiguousarray(found)), torch.from_numpy(np.ascontiguousarray(true))
