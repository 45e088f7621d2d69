"""Runs one artifact on one device: sends the job, waits, and turns whatever happened into a result or an error."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgekit.errors import EdgeKitError
from edgekit.screening import limits
from edgekit.screening.watchdog import ran_out_of_memory
from edgekit.types import SUFFIXES, TensorSpec
from edgekit.util import atomic_files
from edgekit.util.ragged_arrays import stack

from . import native as native_job
from .devices import open_device
from .devices.device import Device, Emulator, Exit, Stalled
from .table import RUNTIMES, format_of, runtime_for
from .worker import TRACE

HERE = Path(__file__).parent
TIMEOUT_S = 600.0
STAGES = {
    "import": "while it was imported",
    "load": "while loading",
    "run": "while running",
    "time": "while running",
    "trace": "while profiling the ops of",
}
LOG_LINES = 3
WATCH_ENDED = "Timeout ("  # what faulthandler writes when the worker's watch ends it
CANNOT_START = (126, 127)  # what a shell says of a program that is not for this machine, or not there
IMPORTED = {".py", ".pyc", ".pyd", ".so"}
COUNTED = 3  # runs whose instructions are counted
HERE_TOO = ("local:", "python:")  # devices whose paths and commands are those of this machine


@dataclass(frozen=True)
class Timing:
    """How long to measure: see `stopwatch.time_runs`."""

    warmup_runs: int = 50
    seconds: float = 1.0
    min_runs: int = 100
    max_runs: int = 10_000


@dataclass(frozen=True, eq=False)
class RunResult:
    """What one artifact did in one process of its own on one device.

    `outputs` are stacked (runs, *shape). `latency_ms` holds every timed run in order, empty when none were asked for.
    `load_ms`, `first_ms` and `import_ms` are the load, the first run and the import of the runtime. `peak_rss_bytes` is
    that of the process, runtime included, or None where the system does not tell. `cpus` are the cores it was pinned
    to. Where `timing` is "emulated", all these figures are None and `latency_ms` is empty: those of an emulator say
    nothing. `instructions` of one run are counted there instead, when timing was asked for. `trace` is what the
    runtime's own profiler recorded, in its own form (see `measuring.op_times`), when that was asked for. `settings` are
    the options of the runtime that its processor needs to compute right.
    """

    outputs: tuple[np.ndarray, ...]
    latency_ms: tuple[float, ...]
    import_ms: float | None
    load_ms: float | None
    first_ms: float | None
    peak_rss_bytes: int | None
    runtime: str
    version: str
    device: str
    machine: str
    threads: int
    cpus: tuple[int, ...]
    input_specs: tuple[TensorSpec, ...]
    output_specs: tuple[TensorSpec, ...]
    timing: Literal["measured", "emulated"] = "measured"
    instructions: int | None = None
    trace: bytes | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


def run_artifact(
    path: str | Path,
    feeds: Sequence[np.ndarray],
    *,
    device: str | Device = "local:",
    threads: int = 1,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    state: Sequence[tuple[str, str, np.ndarray]] = (),
    weight_files: Sequence[Path] = (),
    timing: Timing | None = None,
    runtime: str | None = None,
    trace_runs: int = 0,
    timeout_s: float | None = None,
) -> RunResult:
    """Run the file at `path` once per sample, in order, in a pinned process of its own; with `timing`, then measure it.

    `feeds` holds one array (runs, *input shape) per input, in the order of `inputs`, or of the file without them. A
    file that has names has to have those in `inputs` and `outputs`; a .pte has none and takes them. `runtime` is a name
    in RUNTIMES, by default the one for the file's format; `weight_files` are those that an ONNX file names. `state` has
    the name of an input, of the output that is that input in the next run, and the input's first value; neither is one
    of `inputs` and `outputs`. Latency is measured on the first 8 samples in turn, each from the first state.
    With `trace_runs` the file runs so many times more under the runtime's profiler, in a session of its own.

    Raises EdgeKitError for a file that is corrupt or not for this runtime, feeds that do not match it, a runtime that
    is missing, crashes, makes no progress for the device's `stall_s` or does not end within `timeout_s` (600 s, or ten
    times `stall_s`), and a device that does not answer. `device` is a URI, or one that `open_device` opened, which
    stays open. Nothing is left on the device.
    """
    path = Path(path)
    kind = format_of(path)
    name = runtime or runtime_for(path)
    if name not in RUNTIMES:
        raise EdgeKitError(f"there is no runtime '{name}'", f"the runtimes are {', '.join(RUNTIMES)}")
    if RUNTIMES[name].format != kind:
        raise EdgeKitError(f"{name} runs {RUNTIMES[name].format} files, and {path} is in the {kind} format")
    if threads < 1:
        raise EdgeKitError(f"a model runs on at least one thread, not {threads}")
    _check_feeds(feeds)
    for file in weight_files:
        if file.suffix.lower() in IMPORTED:  # it will lie beside the worker, which would import it
            raise EdgeKitError(f"weights of {path} lie in {file.name}, a name of code", "give it another name")

    opened = open_device(device) if isinstance(device, str) else device
    longest = timeout_s or max(TIMEOUT_S, 10 * opened.stall_s)
    emulated = opened.timing == "emulated"
    try:
        with atomic_files.temporary_folder() as folder:
            here = Path(folder)
            job = {
                "runtime": name,
                "module": RUNTIMES[name].module,
                "package": RUNTIMES[name].package,
                "artifact": f"model{SUFFIXES[kind]}",
                "label": atomic_files.shown(path),
                "sha256": atomic_files.sha256(path),
                "threads": threads,
                "inputs": [*inputs, *(name for name, _, _ in state if inputs)],
                "outputs": [*outputs, *(name for _, name, _ in state if outputs)],
                "feeds": len(feeds),
                "state": {name: output for name, output, _ in state},
                # Under an emulator milliseconds say nothing: instructions are counted instead.
                "timing": None if timing is None or emulated else vars(timing),
                "count": COUNTED if timing is not None and emulated else 0,
                "trace": trace_runs,
                "memory_bytes": limits.budget((path, *weight_files), sum(feed[0].nbytes for feed in feeds)).memory,
                "stall_s": opened.stall_s,
            }
            counting = opened.counting() if isinstance(opened, Emulator) and job["count"] else nullcontext(list)
            with counting as marks:
                first = {name: value for name, _, value in state}
                result, arrays = _run_job(opened, here, (path, *weight_files), job, feeds, first, longest)
                instructions = _per_run(marks())
            trace = (here / TRACE).read_bytes() if trace_runs else None
    finally:
        if isinstance(device, str):
            opened.cleanup()
    return RunResult(
        outputs=arrays,
        latency_ms=tuple(result["latency_ms"]),
        import_ms=None if emulated else result["import_ms"],
        load_ms=None if emulated else result["load_ms"],
        first_ms=None if emulated else result["first_ms"],
        peak_rss_bytes=None if emulated else result["peak_rss_bytes"],
        runtime=name,
        version=result["version"],
        device=opened.uri,
        machine=result["machine"],
        threads=threads,
        cpus=tuple(result["cpus"]),
        input_specs=_specs(result["inputs"], feeds),
        output_specs=_specs(result["outputs"], arrays),
        timing=opened.timing,
        instructions=instructions,
        trace=trace,
        settings=result.get("settings", {}),
    )


def _run_job(
    device: Device,
    here: Path,
    model: Sequence[Path],
    job: Mapping[str, Any],
    feeds: Sequence[np.ndarray],
    state: Mapping[str, np.ndarray],
    timeout_s: float,
) -> tuple[dict[str, Any], tuple[np.ndarray, ...]]:
    """Send the job from the folder `here`, wait for it, and bring its result and outputs back into that folder."""
    native = job["runtime"] == "executorch" and device.runner is not None
    if native:
        there = device.push(native_job.files(here, model[0], job, feeds))
    else:
        there = device.push(_files(here, model, job, feeds, state))
    try:
        argv = native_job.command(device, there) if native else [device.python, f"{there}/worker.py", there]
        try:
            exit_ = device.exec(argv, timeout_s)
        except Stalled as error:
            raise _hang(job) from error
        except TimeoutError as error:
            raise EdgeKitError(
                f"{job['runtime']} did not finish {job['label']} within {timeout_s:g} s",
                "raise the time limit, or run fewer samples",
            ) from error
        device.pull(there, ["result.json", "log.txt"], here)
        if not (here / "result.json").is_file():
            raise _crash(exit_, here / "log.txt", job, device, argv[0])
        result = native_job.result(here, job, feeds) if native else _worker_result(here, device)
        suffix = "bin" if native else "npy"
        names = [f"out_{i}.{suffix}" for i in range(len(result["outputs"]))]
        device.pull(there, [*names, TRACE] if job["trace"] else names, here)
    except EdgeKitError as error:
        if ran_out_of_memory(error):
            error.help = f"it may take {job['memory_bytes'] / 1e9:.1f} GB there: {limits.MORE_MEMORY}"
        raise
    finally:
        with suppress(EdgeKitError):  # a connection that was lost is told already
            device.remove(there)
    if native:
        return result, native_job.outputs(here, result, len(feeds[0]))
    return result, tuple(
        _open_output(here / name, len(feeds[0])) if None in info["shape"] else np.load(here / name, allow_pickle=False)
        for name, info in zip(names, result["outputs"], strict=True)
    )


def _open_output(path: Path, runs: int) -> np.ndarray:
    """Reads the arrays that a worker left of an output of no fixed shape, one a run, as one array; see `stack`."""
    with path.open("rb") as file:
        return stack([np.lib.format.read_array(file, allow_pickle=False) for _ in range(runs)])


def _files(
    here: Path,
    model: Sequence[Path],
    job: Mapping[str, Any],
    feeds: Sequence[np.ndarray],
    state: Mapping[str, np.ndarray],
) -> dict[str, Path]:
    """Write the job's files into the folder `here`; what to push, by name. `model` is its file and those of weights."""
    runtime = RUNTIMES[job["runtime"]]
    (here / "job.json").write_text(json.dumps(job))
    sent = {
        **{path.name: path for path in model[1:]},
        "job.json": here / "job.json",
        job["artifact"]: model[0],
        "worker.py": HERE / "worker.py",
        "stopwatch.py": HERE / "stopwatch.py",
        **{f"{module}.py": HERE / f"{module}.py" for module in (runtime.module, *runtime.helpers)},
    }
    arrays = {f"in_{i}.npy": feed for i, feed in enumerate(feeds)}
    arrays |= {f"state_{i}.npy": state[name] for i, name in enumerate(job["state"])}
    for name, array in arrays.items():
        sent[name] = here / name
        np.save(sent[name], np.array(array, order="C", copy=None), allow_pickle=False)
    return sent


def _worker_result(here: Path, device: Device) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((here / "result.json").read_text())
    if not result["ok"]:
        where = "" if device.uri.startswith(HERE_TOO) else f"{device.uri}: "
        raise EdgeKitError(f"{where}{result['what']}", result["help"])
    return result


def _per_run(marks: Sequence[int]) -> int | None:
    """Instructions of one run, from the marks before and after each of the last COUNTED; None where there are none."""
    last = marks[-2 * COUNTED :]
    if len(last) < 2 * COUNTED:
        return None
    return int(np.median([after - before for before, after in zip(last[::2], last[1::2], strict=True)]))


def _check_feeds(feeds: Sequence[np.ndarray]) -> None:
    if not feeds:
        raise EdgeKitError("a model runs on at least one input")
    for feed in feeds:
        if feed.dtype.hasobject:
            raise EdgeKitError(f"inputs are arrays of numbers, not of {feed.dtype}")
    runs = {feed.shape[:1] for feed in feeds}
    if runs & {(), (0,)} or len(runs) != 1:
        shapes = ", ".join(str(list(feed.shape)) for feed in feeds)
        raise EdgeKitError(f"inputs are stacked with the same number of samples, at least one, not {shapes}")


def _crash(exit_: Exit, log: Path, job: Mapping[str, Any], device: Device, program: str) -> EdgeKitError:
    """The error for a worker that left no result: what ended it, how far it had come, and its last words."""
    if exit_.code in CANNOT_START and not log.is_file():
        said = exit_.output.strip().splitlines()[-1:]
        python = "" if program != device.python else (
            "name another interpreter: python:/path/to/python, or ?python=/path after the device; .pte files need none"
        )  # fmt: skip
        return EdgeKitError(
            f"{program} cannot be started on {device.uri}{''.join(f': {line}' for line in said)}",
            python or "the folder may forbid programs: name another one with ?dir=/path after the device",
        )
    lines = (log.read_text(errors="replace") if log.is_file() else exit_.output).splitlines()
    if exit_.code == -signal.SIGALRM or any(line.startswith(WATCH_ENDED) for line in lines):
        return _hang(job)
    stages = [line.removeprefix("edgekit stage: ") for line in lines if line.startswith("edgekit stage: ")]
    when = STAGES[stages[-1]] if stages and stages[-1] in STAGES else "before it began"
    if exit_.code == -signal.SIGKILL:
        how = "was killed, most likely because memory ran out,"
    elif exit_.code < 0:
        how = f"crashed with {signal.Signals(-exit_.code).name}"
    else:
        how = f"stopped with exit code {exit_.code}"
    said = [line.strip() for line in lines if line.strip() and not line.startswith("edgekit stage: ")][-LOG_LINES:]
    help_ = "check that the file is whole and was made for this runtime's version, or export it again"
    return EdgeKitError(
        f"{job['runtime']} {how} {when} {job['label']}", help_ + (f"; it printed: {' | '.join(said)}" if said else "")
    )


def _hang(job: Mapping[str, Any]) -> EdgeKitError:
    return EdgeKitError(
        f"{job['runtime']} hangs with {job['label']}: nothing has happened for {job['stall_s']:g} s",
        "check the file; if it is only slow on this device, give it more time with --timeout SECONDS",
    )


def _specs(infos: Sequence[Mapping[str, Any]], arrays: Sequence[np.ndarray]) -> tuple[TensorSpec, ...]:
    """Names and dtypes as the runtime declares them, with the shapes that the arrays had."""
    return tuple(
        TensorSpec(info["name"], info["dtype"], tuple(array.shape[1:]))
        for info, array in zip(infos, arrays, strict=True)
    )
