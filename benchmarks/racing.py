"""Timing files against one another: each in processes of its own, pinned to one core, in turn, as machines drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgekit.measuring import outliers
from edgekit.measuring.latency import Latency
from edgekit.runtimes import RunResult, Timing

SAMPLES = 8  # that a timed process runs over and over


def race(
    files: Sequence[Callable[..., RunResult]], feeds: Sequence[np.ndarray], rounds: int, timing: Timing
) -> list[Latency]:
    """Times each of `files` once a round on (runs, *shape) feeds; a file is called as `edgekit.measuring.running.run`.

    The p50 of each is that of its undisturbed runs (see `edgekit.measuring.outliers`).
    """
    first = [feed[:SAMPLES] for feed in feeds]
    samples: list[list[tuple[float, ...]]] = [[] for _ in files]
    for _ in range(rounds):
        for kept, file in zip(samples, files, strict=True):
            kept.append(file(first, timing=timing).latency_ms)
    return [outliers.undisturbed(Latency(tuple(kept), 1)) for kept in samples]
