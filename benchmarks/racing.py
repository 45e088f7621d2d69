"""Timing files against one another: each in processes of its own, pinned to one core, in turn, as machines drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgekit import steady
from edgekit.results import Latency
from edgekit.runtimes import RunResult, Timing

SAMPLES = 8  # that a timed process runs over and over


def race(
    files: Sequence[Callable[..., RunResult]], feeds: Sequence[np.ndarray], rounds: int, timing: Timing
) -> list[Latency]:
    """Times each of `files` once a round on (runs, *shape) feeds; a file is called as `edgekit.stages.run`.

    The p50 of each is that of its undisturbed runs (see `edgekit.steady`).
    """
    first = [feed[:SAMPLES] for feed in feeds]
    samples: list[list[tuple[float, ...]]] = [[] for _ in files]
    for _ in range(rounds):
        for kept, file in zip(samples, files, strict=True):
            kept.append(file(first, timing=timing).latency_ms)
    return [steady.undisturbed(Latency(tuple(kept), 1)) for kept in samples]
