"""The schedule of timing: how many processes time a file in turn, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgekit.artifacts.artifact import Artifact
from edgekit.measuring import outliers, running
from edgekit.measuring.latency import Latency
from edgekit.measuring.run_cache import Journal
from edgekit.runtimes import Timing
from edgekit.util.progress import Progress

if TYPE_CHECKING:
    import numpy as np

    from edgekit.loading.model import Model
    from edgekit.runtimes.devices.device import Device


ROUNDS = 3  # processes that time each artifact, taken in turn: machines drift
MOST_ROUNDS = 20  # processes that time a file which is profiled, where its p50 is not known earlier
LONGEST_S = 60.0  # seconds of timed runs after which ROUNDS processes are enough for a profile
TIMING = Timing(warmup_runs=50, seconds=0.6, min_runs=20, max_runs=5000)


def race(
    original: Model,
    artifacts: Sequence[Artifact],
    feeds: Sequence[np.ndarray],
    device: Device,
    baseline_device: str,
    threads: int,
    rounds: int,
    kept: Sequence[tuple[float, ...]] | None,
    journal: Journal,
    progress: Progress,
) -> tuple[Latency, dict[Artifact, tuple[Any, Latency | None]]]:
    """Times the original and every artifact in turn, `rounds` times; returns latencies and each one's last result.

    The original is not timed again where its latencies are `kept` of an earlier command. On an emulated device each
    artifact runs once, for its instructions, and has no latency.
    """
    eager: list[tuple[float, ...]] = []
    results: dict[Artifact, list[Any]] = {artifact: [] for artifact in artifacts}
    with progress.step("Measuring latency", rounds * (len(artifacts) + (kept is None))) as advance:
        for count in range(rounds):
            if kept is None:
                eager.append(
                    running.time_module(original.module, feeds, baseline_device, threads, TIMING, original.state)
                )
                advance()
            for artifact in artifacts:
                if count == 0 or device.timing == "measured":
                    run = journal.run(artifact, feeds, device=device, number=count, threads=threads, timing=TIMING)
                    results[artifact].append(replace(run, outputs=()))
                advance()
    timed = {artifact: (runs[-1], latency_of(runs, threads)) for artifact, runs in results.items()}
    return Latency(tuple(eager) if kept is None else tuple(kept), threads), timed


def latency_of(runs: Sequence[Any], threads: int) -> Latency | None:
    """Returns the latencies of several results of one file; None where an emulator ran it, whose times say nothing."""
    return Latency(tuple(r.latency_ms for r in runs), threads) if runs[-1].timing == "measured" else None


def undisturbed_of(runs: Sequence[Any], threads: int) -> Latency | None:
    """Returns what `latency_of` does, with the undisturbed runs told apart."""
    latency = latency_of(runs, threads)
    return outliers.undisturbed(latency) if latency is not None else None


def is_known(runs: Sequence[Any], threads: int) -> bool:
    """Whether the runs of a profile are enough."""
    latency = undisturbed_of(runs, threads)
    assert latency is not None  # an emulated file runs once
    return outliers.is_known(latency) or (len(runs) >= ROUNDS and sum(latency.samples) > LONGEST_S * 1e3)
