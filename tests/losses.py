"""Populations of samples of which a file loses some wholly, and what the intervals of data sets drawn of them hold.

The true drop is that of the whole population. `benchmarks/judging.py` simulates many data sets, the tests a few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgekit.data.boxes import objects
from edgekit.judging import verdicts
from edgekit.measuring.latency import Latency
from edgekit.metrics import accuracy
from edgekit.metrics.accuracy import Accuracy, drop
from edgekit.metrics.detection import AveragePrecision, Ranked
from edgekit.metrics.parity import Parity
from edgekit.metrics.scores import Scores, Sums, value
from edgekit.metrics.table import METRICS, Metric

NEAR = Parity(40, 1e-6, 1e-6, 1, 1, 8)
FAST, SLOW = (Latency(((ms,),) * 3, 1) for ms in (1.0, 2.0))
CLASSES = 5
Outputs = list[np.ndarray]


@dataclass(frozen=True)
class Population:
    """All samples that there are, as the original and the file score them."""

    metric: Metric
    original: Scores
    artifact: Scores

    @property
    def drop(self) -> float:
        """The drop over all of them, in the metric's unit."""
        unit = self.metric.unit_of(self.original)
        return float(drop(unit, value(self.original), value(self.artifact)))

    def judged(self, n: int, rng: np.random.Generator) -> Accuracy:
        """Draws a data set of `n` samples, and judges the file by it."""
        picked = rng.choice(len(self.original), n, replace=False)
        return accuracy.accuracy_of(self.metric, taken(self.original, picked), taken(self.artifact, picked))


def taken(scores: Any, picked: np.ndarray) -> Scores:
    """The scores of some of the samples, each at most once."""
    if isinstance(scores, Sums):
        return replace(scores, statistics=scores.statistics[picked])
    place = np.full(len(scores), -1)
    place[picked] = np.arange(len(picked))

    def some(ranked: Ranked) -> Ranked:
        there = place[ranked.image] >= 0
        at = np.cumsum(there) - 1
        hits = tuple(at[found[there[found]]] for found in ranked.hits)
        return Ranked(place[ranked.image[there]], hits, ranked.objects[picked])

    return AveragePrecision(tuple(map(some, scores.classes)), len(picked))


def _top1(count: int, rng: np.random.Generator) -> tuple[Outputs, np.ndarray, Outputs, Outputs]:
    """Returns outputs of the original, targets, outputs with little noise, and outputs that are lost, of a classifier.

    The lost ones are zeros, which name the first class, for half of the samples, and another sample's for the others.
    """
    target = rng.integers(0, CLASSES, count)
    logits = np.eye(CLASSES)[target] * 3 + rng.standard_normal((count, CLASSES))
    return [logits], target, [logits + 0.02 * rng.standard_normal(logits.shape)], [_half(logits, 0 * logits)]


def _segmentation(count: int, rng: np.random.Generator) -> tuple[Outputs, np.ndarray, Outputs, Outputs]:
    """Images of two regions each; see `_top1`."""
    size, kinds = 8, rng.integers(0, CLASSES, (count, 2))
    split = rng.integers(1, size, count)
    target = np.where(np.arange(size)[None, None] < split[:, None, None], *(kinds[:, i, None, None] for i in (0, 1)))
    target = np.broadcast_to(target, (count, size, size)).copy()
    maps = np.eye(CLASSES)[target].transpose(0, 3, 1, 2) * 3 + rng.standard_normal((count, CLASSES, size, size))
    return [maps], target, [maps + 0.02 * rng.standard_normal(maps.shape)], [_half(maps, 0 * maps)]


def _vectors(count: int, rng: np.random.Generator) -> tuple[Outputs, np.ndarray, Outputs, Outputs]:
    """Vectors and their targets; see `_top1`."""
    target = rng.standard_normal((count, 64))
    found = target + 0.3 * rng.standard_normal(target.shape)
    return [found], target, [found + 0.03 * rng.standard_normal(target.shape)], [_half(found, 0 * found)]


def _numbers(count: int, rng: np.random.Generator) -> tuple[Outputs, np.ndarray, Outputs, Outputs]:
    """One number a sample; see `_top1`."""
    target = 20 + 5 * rng.standard_normal((count, 1))
    found = target + 0.5 * rng.standard_normal(target.shape)
    return [found], target, [found + 0.02 * rng.standard_normal(target.shape)], [_half(found, 0 * found + 20)]


def _scenes(count: int, rng: np.random.Generator) -> tuple[Outputs, np.ndarray, Outputs, Outputs]:
    """Three objects in each image, some of them missed; lost images have the boxes of others, or none."""
    corner = rng.uniform(0, 80, (count, 3, 2))
    true = np.concatenate([corner, corner + rng.uniform(8, 20, (count, 3, 2))], axis=2)
    labels = rng.integers(0, 3, (count, 3))
    boxes = true + rng.normal(0, 0.5, true.shape)
    scores = np.where(rng.random((count, 3)) < 0.1, 0, rng.uniform(0.3, 1, (count, 3)))
    target = objects("scenes", {"boxes": true, "labels": labels})
    assert target is not None
    moved = boxes + rng.normal(0, 0.05, boxes.shape)
    return (
        [boxes, scores, labels],
        target,
        [moved, scores, labels],
        [_half(boxes, boxes), _half(scores, 0 * scores), labels],
    )


def _half(outputs: np.ndarray, dead: np.ndarray) -> np.ndarray:
    """Half of the samples have the outputs of another sample, the others none."""
    odd = np.arange(len(outputs)).reshape(-1, *[1] * (outputs.ndim - 1)) % 2
    return np.where(odd, np.roll(outputs, 1, axis=0), dead)


MAKERS: dict[str, Callable[[int, np.random.Generator], tuple[Outputs, np.ndarray, Outputs, Outputs]]] = {
    "top1": _top1,
    "f1": _top1,
    "miou": _segmentation,
    "map": _scenes,
    "cosine": _vectors,
    "mae": _numbers,
    "rmse": _numbers,
}


def population(name: str, lost: float, noisy: bool, count: int = 20_000, seed: int = 0) -> Population:
    """Returns `count` samples judged by the metric `name`, of which the file loses a share `lost` wholly.

    The other outputs are the original's, with a little noise where they are `noisy`.
    """
    rng = np.random.default_rng(seed)
    outputs, target, noise, gone = MAKERS[name](count, rng)
    away = rng.permutation(count) < lost * count
    made = [
        np.where(away.reshape(-1, *[1] * (a.ndim - 1)), b, c)
        for a, b, c in zip(outputs, gone, noise if noisy else outputs, strict=True)
    ]
    metric = METRICS[name]
    return Population(metric, metric.score(outputs, target), metric.score(made, target))


def simulated(people: Population, n: int, count: int, limit: float | None = None) -> tuple[float, float]:
    """Returns which shares of `count` data sets of `n` samples have an interval that holds the true drop, and ship."""
    rng = np.random.default_rng(n)
    held, shipped = 0, 0
    for _ in range(count):
        result = people.judged(n, rng)
        held += result.ci95[0] <= people.drop <= result.ci95[1]
        shipped += verdicts.verdict("int8", result, FAST, SLOW, NEAR, limit).word == "ship"
    return held / count, shipped / count


def of_drop(name: str, drop: float, noisy: bool, count: int = 20_000) -> Population:
    """Returns a population of which so much is lost that the true drop is about `drop`."""
    per_share = population(name, 0.1, noisy, count).drop / 0.1
    return population(name, drop / per_share, noisy, count)
