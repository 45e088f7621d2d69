"""Profile files: latency, load time, memory and the time of each op."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.artifacts import bare, bundles
from edgekit.artifacts.artifact import Artifact
from edgekit.commands import preflight
from edgekit.commands.given import expand, identify
from edgekit.errors import EdgeKitError
from edgekit.judging.results import Profile
from edgekit.measuring import op_times, running, schedule, steadiness
from edgekit.measuring.feeds import profile_feeds
from edgekit.measuring.latency import Latency
from edgekit.measuring.op_times import OpTimes
from edgekit.measuring.run_cache import Journal
from edgekit.util.progress import Progress, Silent

if TYPE_CHECKING:
    import numpy as np

    from edgekit.runtimes.devices.device import Device


def profile(
    artifact: str | Path | bundles.Bundle,
    *,
    device: str = "local:",
    threads: int = 1,
    ops: bool = False,
    trace: str | Path | None = None,
    timeout: float | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Profile | tuple[Profile, ...]:
    """Measures latency, load time and memory of a file on `device`, over several processes.

    Of a bundle, or its folder, each file is measured: that gives one Profile a file. The inputs are the golden ones of
    the bundle, and of a bare file made up (see `example_inputs`). Processes of one file differ, in where its memory
    lies and in what else the machine does: up to MOST_ROUNDS of them are run until the p50 of the runs that nothing
    slowed down is known (see `edgekit.measuring.outliers`). Notes say how many runs that leaves out, and where it is
    not known. With `ops` the runtime's own profiler then times each op, in a process of its own, and `trace` names a
    file for all of its runs as a Chrome trace; where the runtime gives no such times, a note says why. `timeout` and
    `resume` are those of `compare`. On an emulated device instructions are counted instead, in one process. Raises
    EdgeKitError where `ops` are asked of one, or a `trace` without `ops`.
    """
    preflight.check_profile(artifact, device=device, ops=ops, trace=trace)
    options: dict[str, Any] = {"device": device, "threads": threads, "ops": ops, "timeout": timeout, "resume": resume}
    if isinstance(artifact, bundles.Bundle) or bundles.is_bundle(Path(artifact)):
        found = expand([artifact])
        traces = [trace_of(trace, each, len(found)) for each in found]
        return tuple(
            _profile(each, trace=path, **options, progress=progress or Silent())
            for each, path in zip(found, traces, strict=True)
        )
    return _profile(identify(Path(artifact)), trace=trace, **options, progress=progress or Silent())


def trace_of(trace: str | Path | None, artifact: Artifact, files: int) -> Path | None:
    """Returns where the trace of one of several files goes: `t.json` becomes `t-onnx.json`."""
    if trace is None or files == 1:
        return None if trace is None else Path(trace)
    return Path(trace).with_stem(f"{Path(trace).stem}-{artifact.format}")


def _profile(
    subject: Artifact,
    *,
    device: str,
    threads: int,
    ops: bool,
    trace: str | Path | None,
    timeout: float | None,
    resume: bool,
    progress: Progress,
) -> Profile:
    times: OpTimes | None = None
    subject, notes = bare.closed(subject)
    feeds = profile_feeds(subject)
    with Journal(resume) as journal, running.opened(device, timeout=timeout) as there:
        if ops and there.timing == "emulated":
            raise EdgeKitError(f"{device} is emulated: the times of its ops say nothing", "leave out --ops")
        most = schedule.MOST_ROUNDS if there.timing == "measured" else 1
        runs: list[Any] = []

        def run() -> None:
            timing, number = schedule.TIMING, len(runs)
            runs.append(journal.run(subject, feeds, device=there, number=number, threads=threads, timing=timing))

        with progress.step("Measuring latency", most) as advance:
            while not runs or (len(runs) < most and not schedule.is_known(runs, threads)):
                run()
                advance()
        latency = schedule.undisturbed_of(runs, threads)
        notes = (*notes, *steadiness.unsteady(latency))
        if ops:
            with progress.step("Profiling the ops"):
                times, lacking = _op_times(subject, feeds, there, threads, latency, trace)
            notes = (*notes, *lacking)
        notes = (*notes, *steadiness.notes({subject.path.name: latency}, there))
    last = runs[-1]
    notes = (*notes, *running.settings_notes(subject, last))
    return Profile(
        subject,
        last.runtime,
        last.device,
        latency,
        last.load_ms,
        last.first_ms,
        last.peak_rss_bytes,
        last.timing,
        last.instructions,
        times,
        (*notes, *journal.notes),
    )


def _op_times(
    subject: Artifact,
    feeds: Sequence[np.ndarray],
    device: Device,
    threads: int,
    latency: Latency | None,
    trace: str | Path | None,
) -> tuple[OpTimes | None, tuple[str, ...]]:
    """Returns the time of each op, and writes the trace; without a profiler that is known, a note says so."""
    assert latency is not None
    runs = op_times.runs_for(latency.p50)
    try:
        result = running.run(subject, feeds, device=device, threads=threads, trace_runs=runs)
        profiled = op_times.read(result.runtime, result.trace)
    except EdgeKitError as error:
        return None, (f"no per-op times: {error.what}",)
    if trace is not None:
        owners = op_times.modules(subject.path) if subject.format == "onnx" else None
        op_times.write_trace(Path(trace), profiled, f"{subject.path.name} on {device.uri}", owners)
    return op_times.summarize(profiled, latency.p50 * 1e3), ()
