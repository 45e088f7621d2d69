"""Parity: how near the outputs of two networks are, by SQNR, largest difference, cosine and agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgeKitError
from edgekit.metrics import classification
from edgekit.types import finite

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Parity:
    """How near one set of outputs is to another, over all outputs and samples.

    `sqnr_db` is 10·log10(Σ ref² / Σ (out − ref)²) of the worst output, inf where they are equal; `max_abs` the
    largest absolute and `max_rel` the largest difference relative to the largest |ref| of its output, which counts as
    so large at least that what rounding makes of it is small (see `judging.noise_floors`); `cosine` the lowest mean
    cosine of an output; `agreement` the share of samples with the same arg max of the first output, None where it has
    no classes.
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


SLICE_VALUES = 1 << 20  # values that are compared at once, in float64


def parity(reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> Parity:
    """Compares outputs with reference outputs: the worst of `parities`, from which its errors come too."""
    return worst(parities(reference, outputs))


def worst(each: Sequence[Parity]) -> Parity:
    """Returns the parity of several outputs from that of each."""
    return Parity(
        min(near.sqnr_db for near in each),
        max(near.max_abs for near in each),
        max(near.max_rel for near in each),
        min(near.cosine for near in each),
        each[0].agreement,
        each[0].samples,
    )


def parities(
    reference: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    classes: bool = True,
    floors: Sequence[float] = (),
) -> tuple[Parity, ...]:
    """Compares each output with its reference: one array per model output, samples along axis 0.

    Integer outputs are compared as they are; outputs with NaN are as far from the reference as can be. Without
    `classes` there is no agreement of the arg max, which of numbers that are no scores of classes says nothing.
    `floors` are the differences that rounding alone makes in each output (see `edgekit.judging.noise_floors`). Raises
    EdgeKitError where the number or the shapes of outputs differ, or where the reference itself holds NaN.
    """
    sums = ParitySums()
    sums.add(reference, outputs, classes)
    return sums.parities(floors)


def classifies(target: np.ndarray | None) -> bool:
    """Whether targets may be those of a classifier: a whole number from 0 on or a one-hot row each, or none at all."""
    if target is None:
        return True
    indices = classification.class_indices(target, target.shape[1] if target.ndim == 2 else 0)
    return indices is not None and target.shape[1:] != (1,) and bool((indices >= 0).all())


class ParitySums:
    """What the parity of each output follows from, taken in over parts of the samples one after another."""

    def __init__(self) -> None:
        self._outputs: list[_Sums] | None = None

    def add(self, reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray], classes: bool = True) -> None:
        """Takes in some samples, as `parities` does."""
        if len(reference) != len(outputs):
            raise EdgeKitError(f"the file gives {len(outputs)} outputs, the original {len(reference)}", ANOTHER_MODEL)
        self._outputs = self._outputs or [_Sums() for _ in outputs]
        for sums, ref, out in zip(self._outputs, reference, outputs, strict=True):
            sums.add(ref, out, classes)

    @property
    def finite(self) -> bool:
        """Whether no output so far held NaN or infinite values."""
        return all(sums.finite for sums in self._outputs or ())

    def parities(self, floors: Sequence[float] = ()) -> tuple[Parity, ...]:
        """Returns the parity of each output on all samples so far, as `parities` does."""
        return tuple(
            sums.parity(floor)
            for sums, floor in zip_longest(self._outputs or (), floors, fillvalue=0.0)
            if isinstance(sums, _Sums)
        )


@dataclass
class _Sums:
    """Of one output: Σ (out − ref)², Σ ref², the largest |out − ref| and |ref|, Σ cosines, and equal arg maxima."""

    error: float = 0.0
    signal: float = 0.0
    largest: float = 0.0
    scale: float = 0.0
    cosines: float = 0.0
    alike: int = 0
    classes: bool = True
    samples: int = 0
    finite: bool = True

    def add(self, ref: np.ndarray, out: np.ndarray, classes: bool) -> None:
        if ref.shape != out.shape:
            shapes = ("x".join(map(str, array.shape)) for array in (out, ref))
            raise EdgeKitError("an output of the file is {}, the original's is {}".format(*shapes), ANOTHER_MODEL)
        self.classes &= classes and ref.ndim == 2 and ref.shape[1] >= 2
        if self.classes:
            self.alike += int((ref.argmax(axis=1) == out.argmax(axis=1)).sum())
        self.samples += len(ref)
        rows = max(SLICE_VALUES // max(ref[:1].size, 1), 1)
        for start in range(0, len(ref), rows):
            self._add(ref[start : start + rows], out[start : start + rows])

    def _add(self, ref: np.ndarray, out: np.ndarray) -> None:
        import numpy as np

        a, b = (array.astype(np.float64).reshape(len(array), -1) for array in (ref, out))
        if not np.isfinite(a).all():
            raise EdgeKitError(
                "the original model's own outputs hold NaN or infinite values",
                "check its weights and --data, and whether a mask hides all positions of a row",
            )
        if not np.isfinite(b).all():
            self.finite = False
            return
        products, norms = (a * b).sum(axis=1), np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        self.cosines += float(np.divide(products, norms, out=np.ones_like(norms), where=norms > 0).sum())
        self.signal += float((a**2).sum())
        self.scale = max(self.scale, float(np.abs(a).max(initial=0)))
        b -= a
        self.error += float((b**2).sum())
        self.largest = max(self.largest, float(np.abs(b, out=b).max(initial=0)))

    def parity(self, floor: float) -> Parity:
        """Returns the parity on all samples so far; an output is at least so large that `floor` is no difference."""
        if not self.finite:
            return Parity(-math.inf, math.inf, math.inf, -1.0, 0.0, self.samples)
        agreement = self.alike / self.samples if self.classes and self.samples else None
        if not self.error:
            return Parity(math.inf, 0.0, 0.0, 1.0, agreement, self.samples)
        sqnr = 10 * math.log10(self.signal / self.error) if self.signal else -math.inf
        scale = max(self.scale, floor / FP32_MAX_REL)
        max_rel = self.largest / scale if scale else math.inf
        return Parity(sqnr, self.largest, max_rel, self.cosines / self.samples, agreement, self.samples)


ANOTHER_MODEL = "name the model that the file was exported from, or export it again"

FP32_MAX_REL = 1e-4
