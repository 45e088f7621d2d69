"""Batch axis of an input: where a batch of samples lies in it, which is not always the first dimension.

An LSTM's state is (layers, batch, hidden); a sample rate has no batch at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.errors import EdgeKitError
from edgekit.types import TensorSpec

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Placement:
    """How the samples of a run make up one input: along `axis`, or one input for all `size` of them (None)."""

    spec: TensorSpec
    axis: int | None
    size: int

    @property
    def row(self) -> tuple[int, ...]:
        """The shape of one sample."""
        shape = self.spec.shape
        return shape if self.axis is None else (*shape[: self.axis], *shape[self.axis + 1 :])

    def rows(self, array: np.ndarray, count: int, in_front: bool = True) -> np.ndarray | None:
        """Returns `array`, which holds `count` samples, with the samples in front; None where it does not fit.

        It may hold samples, (count, *row), or whole inputs for runs of one sample, (count, *shape). Unless the samples
        are known to be `in_front`, it may be one batch as the model takes it, with `count` in the place of the batch.
        Raises EdgeKitError where it can be read both ways.
        """
        import numpy as np

        axis, shape = self.axis, self.spec.shape
        as_taken = not in_front and axis and array.shape == (*shape[:axis], count, *shape[axis + 1 :])
        if array.shape == (count, *self.row):
            if as_taken:
                raise EdgeKitError(
                    f"a batch of {count} samples for input {self.spec} can be read in two ways: its first dimension is "
                    f"as long as the batch, which the model has as dimension {axis}",
                    "give batches of another size",
                )
            return array
        if axis is not None and self.size == 1 and array.shape == (count, *shape):
            return array.reshape(count, *self.row)
        return np.moveaxis(array, axis, 0) if axis and as_taken else None

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the input that `size` samples make up; EdgeKitError where they differ and it takes one for all."""
        import numpy as np

        if self.axis is not None:
            return np.ascontiguousarray(np.moveaxis(rows, 0, self.axis))
        if (rows != rows[:1]).any():
            raise EdgeKitError(
                f"input '{self.spec.name}' is the same for the {self.size} samples of a run, and the data's differ",
                "export the model for runs of one sample, with a batch of 1 in --input",
            )
        return np.array(rows[0])


def placements(inputs: Sequence[TensorSpec]) -> list[Placement]:
    """Returns where the batch lies in each input: at the first dimension as long as the first input's."""
    size = inputs[0].shape[0] if inputs and inputs[0].shape else 1
    axes = [next((k for k, length in enumerate(spec.shape) if length == size), None) for spec in inputs]
    return [Placement(spec, axis, size) for spec, axis in zip(inputs, axes, strict=True)]


def check_first(inputs: Sequence[TensorSpec], what: str) -> None:
    """Raises EdgeKitError for an input whose batch is not its first dimension, along which `what` cuts batches."""
    other = next((p.spec for p in placements(inputs) if p.axis != 0), None)
    if other is not None:
        raise EdgeKitError(
            f"{what} cuts batches along the first dimension, and input {other} has its batch elsewhere",
            "leave it out, or wrap the model in one whose inputs all begin with the batch",
        )


def batch_of(specs: Sequence[TensorSpec]) -> int:
    """Returns how many samples one run takes: the first dimension of the first input, 1 for a scalar."""
    return specs[0].shape[0] if specs and specs[0].shape else 1
