"""Runs one artifact in a process of its own: `python worker.py JOBDIR`.

JOBDIR holds job.json, the artifact, in_<i>.npy of shape (runs, *input shape), state_<i>.npy with the first value of an
input that later runs take from an output, and beside them the modules that the worker loads (session.py, stopwatch.py,
and those of the runtime). It leaves out_<i>.npy of shape (runs, *output shape), or with the arrays of all runs one
behind the other where the file declares no fixed shape, log.txt with what the runtime printed, and last of all
result.json. Meanwhile it prints how long it may take until the next such line or the end: `edgekit allows 20.0 s`.

It runs on devices: the standard library, numpy and one runtime, Python 3.10 or later.
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import hashlib
import importlib
import itertools
import json
import math
import os
import platform
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = "edgekit_job"
TIMED_SAMPLES = 8
START_S = 25.0  # importing a runtime may take longer than its runs are allowed to
TELL_EVERY_S = 1.0  # runs may be short and many
PATIENCE = 3  # how many times longer than expected a series of runs may take before it counts as hanging
TRACE = "trace.bin"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OLDEST_PYTHON = (3, 10)


class Failure(Exception):
    """Something the user can mend: `what` happened, and `help`."""

    def __init__(self, what: str, help: str | None = None) -> None:
        """`what` is one sentence; `help` is the next step."""
        super().__init__(what)
        self.what = what
        self.help = help


def main(folder: Path) -> int:
    """Run the job in `folder`; 0 when result.json says ok, 1 when it says why not."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before ONNX Runtime is imported: it would write files of its own
    watch = _Watch()
    _print_into(folder / "log.txt")
    _forget_script_folder()
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(f"Python {platform.python_version()} is too old: EdgeKit's worker runs on 3.10 or later")
    job = json.loads((folder / "job.json").read_text())
    watch.allow(max(job["stall_s"], START_S))
    try:
        result = {"ok": True, **run_job(folder, job, watch)}
    except Failure as failure:
        # Runtimes quote the path that they were given, which means nothing to the user.
        what = failure.what.replace(str(folder / job["artifact"]), job["label"])
        result = {"ok": False, "what": what, "help": failure.help}
    except OSError as error:
        if error.errno not in FULL:
            raise
        for path in folder.glob("out_*.npy"):  # makes room for the result
            path.unlink()
        what = f"the device's disk is full, or a limit there is too low: {error.strerror}"
        help_ = "free some space there, or name another folder: TMPDIR here, ?dir=/path on a device"
        result = {"ok": False, "what": what, "help": help_}
    unfinished = folder / "result.json.tmp"
    unfinished.write_text(json.dumps(result))
    unfinished.replace(folder / "result.json")
    return 0 if result["ok"] else 1


def run_job(folder: Path, job: dict[str, Any], watch: _Watch) -> dict[str, Any]:
    """Load the artifact, run every sample in order, then time the first few; the facts for result.json."""
    artifact = folder / job["artifact"]
    with artifact.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _sha256(file)
    if digest.hexdigest() != job["sha256"]:
        raise Failure(f"{job['label']} is not the file that was sent: its SHA-256 differs", "run the command again")

    _stage("import")
    _make_package(folder)
    numpy = _import("numpy", "numpy", "numpy")
    stopwatch = importlib.import_module(f"{PACKAGE}.stopwatch")
    cpus = stopwatch.pin(job["threads"])
    start = time.perf_counter()
    runtime = _import(f"{PACKAGE}.{job['module']}", job["runtime"], job["package"])
    imported = time.perf_counter()

    _stage("load")
    watch.allow(job["stall_s"])
    _limit_memory(job["memory_bytes"])
    try:
        session = runtime.load(str(artifact), threads=job["threads"], inputs=job["inputs"], outputs=job["outputs"])
    except Exception as error:
        raise Failure(
            f"{job['runtime']} cannot load {job['label']}: {_message(error)}",
            "check that the file is whole and was made for this runtime's version, or export it again",
        ) from error
    loaded = time.perf_counter()
    slowest = 0.0

    _stage("run")
    inputs, outputs = _parts(session, job)
    samples = _Samples(numpy, folder, [info.name for info in inputs], list(job["state"]))
    paths = [folder / f"out_{i}.npy" for i in range(len(outputs))]
    writers = [
        _OpenWriter(numpy, path) if None in info.shape else _Writer(numpy, path, samples.runs)
        for info, path in zip(outputs, paths, strict=True)
    ]
    first_ms = 0.0
    state: dict[str, Any] = {}
    for i, sample in enumerate(samples):
        feeds = {**sample, **state}
        watch.allow(job["stall_s"])
        start_run = time.perf_counter()
        given = _run(session, feeds, job)
        took = time.perf_counter() - start_run
        slowest = max(slowest, took)
        if i == 0:
            first_ms = took * 1e3
        for info, writer in zip(outputs, writers, strict=True):
            writer.append(given[info.name])
        state = {name: given[output] for name, output in job["state"].items()}
    for writer in writers:
        writer.close()

    latency_ms: list[float] = []
    if job["timing"] is not None:
        _stage("time")
        watch.allow(job["stall_s"] + PATIENCE * stopwatch.longest_s(slowest, **job["timing"]))
        cycle = itertools.cycle([session.prepared(feeds) for feeds in itertools.islice(samples, TIMED_SAMPLES)])
        latency_ms = stopwatch.time_runs(lambda: next(cycle)(), **job["timing"])
    if job["count"]:
        first = session.prepared(next(iter(samples)))
        watch.allow(job["stall_s"] + PATIENCE * job["count"] * slowest)
        count_runs(first, job["count"])
    peak = stopwatch.peak_rss_bytes()
    session.close()
    if job["trace"]:
        _stage("trace")
        watch.allow(job["stall_s"] + PATIENCE * job["trace"] * slowest)
        trace(runtime, folder, job, list(itertools.islice(samples, TIMED_SAMPLES)))
    watch.end()
    return {
        "runtime": job["runtime"],
        "version": runtime.version(),
        "settings": getattr(runtime, "SETTINGS", {}),
        "timing": "measured",
        "latency_ms": latency_ms,
        "import_ms": (imported - start) * 1e3,
        "load_ms": (loaded - imported) * 1e3,
        "first_ms": first_ms,
        "peak_rss_bytes": peak,
        "cpus": cpus,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "inputs": [info._asdict() for info in inputs],
        "outputs": [info._asdict() for info in outputs],
    }


def _parts(session: Any, job: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The inputs that are fed and the outputs that are kept: those that are not state."""
    state = job["state"]
    inputs = [info for info in session.inputs if info.name not in state]
    outputs = [info for info in session.outputs if info.name not in state.values()]
    if len(session.inputs) - len(inputs) != len(state) or len(session.outputs) - len(outputs) != len(state):
        raise Failure(f"{job['label']} lacks the state {', '.join(map(' → '.join, state.items()))}")
    if len(inputs) != job["feeds"]:
        wanted = ", ".join(f"{info.name}:{info}" for info in inputs)
        raise Failure(f"{job['label']} takes {len(inputs)} inputs ({wanted}), not {job['feeds']}")
    return inputs, outputs


def trace(runtime: types.ModuleType, folder: Path, job: dict[str, Any], feeds: list[dict[str, Any]]) -> None:
    """Leave what the runtime's own profiler says of each op in trace.bin, in the runtime's own form."""
    if not hasattr(runtime, "trace"):
        raise Failure(f"{job['runtime']} has no profiler of ops", "use another runtime, or profile without --ops")
    options = {"threads": job["threads"], "inputs": job["inputs"], "feeds": feeds, "runs": job["trace"]}
    try:
        runtime.trace(str(folder / job["artifact"]), folder / TRACE, **options)
    except RuntimeError as error:
        what = f"{job['runtime']} {runtime.version()} gives no per-op times of {job['label']}: {_message(error)}"
        raise Failure(what, "profile without --ops") from error


def count_runs(call: Callable[[], object], runs: int) -> None:
    """Mark the beginning and the end of each of `runs` runs for an emulator that counts instructions."""
    call()
    for _ in range(runs):
        os.getppid()
        call()
        os.getppid()


class _Watch:
    """Ends this process unless it gets on.

    The watch is a thread of C: it needs neither the interpreter nor its lock, which a hanging runtime may hold. Who
    started this process is told too, on its standard output, and ends one that stands still with its watch.
    """

    def __init__(self) -> None:
        """Keeps standard output as it is now."""
        self._channel = os.dup(1)
        self._told = (0.0, 0.0)

    def allow(self, seconds: float) -> None:
        """End this process unless it gets to the next call of this, or to `end`, within `seconds`."""
        faulthandler.dump_traceback_later(seconds, exit=True)
        before, when = self._told
        now = time.monotonic()
        if seconds != before or now - when > TELL_EVERY_S:
            self._told = (seconds, now)
            try:
                os.write(self._channel, f"edgekit allows {seconds:.1f} s\n".encode())
            except BrokenPipeError:  # who asked for this job is no more
                os._exit(1)
            except OSError:
                pass

    def end(self) -> None:
        """Nothing is left that could hang."""
        faulthandler.cancel_dump_traceback_later()


class _Samples:
    """The samples of in_<i>.npy, read one at a time: what was read does not stay in memory and count as the model's.

    Each has the first value of the state beside it.
    """

    def __init__(self, numpy: types.ModuleType, folder: Path, names: list[str], state: list[str]) -> None:
        self._numpy = numpy
        self._tables = [(name, _Table.open(numpy, folder / f"in_{i}.npy")) for i, name in enumerate(names)]
        self._state = {name: numpy.load(folder / f"state_{i}.npy") for i, name in enumerate(state)}
        self.runs = self._tables[0][1].shape[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in range(self.runs):
            yield {**{name: self._read(table, i) for name, table in self._tables}, **self._state}

    def _read(self, table: _Table, i: int) -> Any:
        count = math.prod(table.shape[1:])
        start = table.offset + i * count * table.dtype.itemsize
        return self._numpy.fromfile(table.path, table.dtype, count, offset=start).reshape(table.shape[1:])


class _Table(NamedTuple):
    """A .npy file in C order, and where its numbers begin."""

    path: Path
    shape: tuple[int, ...]
    dtype: Any
    offset: int

    @classmethod
    def open(cls, numpy: types.ModuleType, path: Path) -> _Table:
        with path.open("rb") as file:
            numpy.lib.format.read_magic(file)
            shape, _, dtype = numpy.lib.format.read_array_header_1_0(file)
            return cls(path, shape, dtype, file.tell())


class _OpenWriter:
    """Writes the arrays of an output that declares no fixed shape, one behind the other."""

    def __init__(self, numpy: types.ModuleType, path: Path) -> None:
        self._numpy = numpy
        self._file = path.open("wb")

    def append(self, array: Any) -> None:
        """Add one run."""
        self._numpy.lib.format.write_array(self._file, self._numpy.asarray(array), allow_pickle=False)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


class _Writer:
    """Writes an array of shape (runs, *shape) one run at a time."""

    def __init__(self, numpy: types.ModuleType, path: Path, runs: int) -> None:
        self._numpy = numpy
        self._file = path.open("wb")
        self._runs = runs
        self._kind: tuple[Any, tuple[int, ...]] | None = None

    def append(self, array: Any) -> None:
        """Add one run. Raises Failure when its dtype or shape differs from the first."""
        if self._kind is None:
            self._kind = (array.dtype, array.shape)
            descr = self._numpy.lib.format.dtype_to_descr(array.dtype)
            header = {"descr": descr, "fortran_order": False, "shape": (self._runs, *array.shape)}
            self._numpy.lib.format.write_array_header_1_0(self._file, header)
        elif self._kind != (array.dtype, array.shape):
            raise Failure(
                f"an output changes from {self._kind[0]}{list(self._kind[1])} to {array.dtype}{list(array.shape)} "
                "between samples",
                "export the model with static shapes",
            )
        self._file.write(array.tobytes())

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


def _limit_memory(more: int) -> None:
    """Hold this process to so many bytes more than it has: a file of a few kB can ask for terabytes."""
    status = Path("/proc/self/status")
    with suppress(ImportError, OSError, ValueError):  # Linux alone has both
        resource = importlib.import_module("resource")
        held = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmData:"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, ((held << 10) + more, hard))


def _run(session: Any, feeds: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    try:
        outputs: dict[str, Any] = session.run(feeds)
    except ValueError as error:
        raise Failure(f"{job['label']} cannot be fed: {_message(error)}") from error
    except Exception as error:
        raise Failure(f"{job['runtime']} failed while running {job['label']}: {_message(error)}") from error
    return outputs


def _import(name: str, runtime: str, package: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(PACKAGE)
        problem = "is not installed for" if missing else "cannot be imported by"
        detail = "" if missing else f": {_message(error)}"
        help_ = f"{sys.executable} -m pip install {package}"
        raise Failure(f"{runtime} {problem} {sys.executable}{detail}", help_) from error


def _make_package(folder: Path) -> None:
    """Make the modules of the job folder importable as one package, so that they import each other as in EdgeKit."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package


def _forget_script_folder() -> None:
    """Python puts the script's folder first on the path, where its files would hide packages of the same name."""
    if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
        del sys.path[0]


def _print_into(path: Path) -> None:
    """Send stdout and stderr to `path` by file descriptor: runtimes print from C."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _stage(name: str) -> None:
    """Note in the log how far the job came, for the case that the runtime takes the process down."""
    print(f"edgekit stage: {name}", flush=True)


def _message(error: Exception) -> str:
    """The first line of an error, without the trailing period."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _sha256(file: Any) -> Any:
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    gc.freeze()  # what is left goes with the process: collecting it takes torch half a second
    sys.exit(code)
