"""Per-op times: what each runtime's own profiler recorded, read into one form, and written as a Chrome trace."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from edgekit.artifacts.pte_file import Table
from edgekit.errors import EdgeKitError
from edgekit.util import atomic_files

TRACE_RUNS = 200
TRACE_SECONDS = 5.0  # fewer runs of a slow model: medians of ten tell enough
TRACE_RUNS_AT_LEAST = 10
WARMUP = 0.2  # the share of the first runs that is left out
# XNNPACK (xnn_get_elapsed_time) and ONNX Runtime (TimeDiffMicroSeconds) round a duration down to whole microseconds,
# and so lose half of one on average. TFLite subtracts two rounded times, which loses nothing on average.
ROUNDED_DOWN_US = 0.5

# The fields of an ETDump's tables in the order of executorch/devtools/etdump/etdump_schema_flatcc.fbs.
ETDUMP = "version run_data"
RUN_DATA = "name bundled_input_index allocators events"
ETDUMP_EVENT = "profile_event allocation_event debug_event"
PROFILE_EVENT = (
    "name chain_index instruction_id delegate_debug_id_int delegate_debug_id_str delegate_debug_metadata start_time "
    "end_time"
)
EXECUTE, DELEGATE_CALL, OPERATOR_CALL = "Method::execute", "DELEGATE_CALL", "OPERATOR_CALL"
# What a reader stumbles over in a record that is not whole; StopIteration in a generator is a RuntimeError.
DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, struct.error)
LAYOUT = re.compile(r"_(nchwc|token_\d+)$")  # what ONNX Runtime adds to names of ops whose layout it changes
NUMBER = re.compile(r" #\d+$")  # XNNPACK counts the ops of one kind
# TFLite's Profiler::EventType.
STAGE, INVOKE_OP, DELEGATE_OPS = 1, 2, (4, 8)
INVOKE = "Invoke"
KERNEL = "_kernel_time"


class Event(NamedTuple):
    """One op of one run: its kind, its name in the file where it has one, its start and duration in µs.

    `lost_us` is what the clock's rounding takes from a duration on average. `shapes` are those of its inputs and
    outputs, as "float 1x3x8x8", where the profiler tells them.
    """

    op: str
    name: str
    start_us: float
    us: float
    lost_us: float = 0.0
    shapes: tuple[tuple[str, ...], tuple[str, ...]] | None = None


class Run(NamedTuple):
    """One run under the profiler: its start and duration in µs, and its ops in order."""

    start_us: float
    us: float
    events: tuple[Event, ...]


def runs_for(latency_ms: float) -> int:
    """Returns how many runs to profile of a model that takes `latency_ms`."""
    return max(TRACE_RUNS_AT_LEAST, min(TRACE_RUNS, int(TRACE_SECONDS * 1e3 / max(latency_ms, 1e-3))))


def read(runtime: str, record: bytes) -> tuple[Run, ...]:
    """Reads what the profiler of `runtime` recorded. Raises EdgeKitError where it holds no run, or is not whole."""
    try:
        runs = tuple(READERS[runtime](record))
    except DAMAGE as error:
        raise EdgeKitError(f"the profile of {runtime} cannot be read: {error}", "profile without --ops") from error
    if not any(run.events for run in runs):
        raise EdgeKitError(f"the profiler of {runtime} recorded no op", "profile without --ops")
    return runs


def summarize(runs: Sequence[Run], latency_us: float) -> OpTimes:
    """Returns each op's mean time over the middle half of the runs after warm-up, in the order in which the ops run.

    A disturbed run is not in the middle half; a median of each op would make 0 µs of those that take less than one
    tick of the profiler's clock. What that clock loses by rounding is added. `latency_us` is the p50 of runs without a
    profiler. Runs whose ops are not those of most runs are left out.
    """
    kept = [runs[number] for number in _typical(runs)]
    times = zip(*([event.us + event.lost_us for event in run.events] for run in kept), strict=True)
    ops = tuple(OpTime(event.op, event.name, fmean(us)) for event, us in zip(kept[0].events, times, strict=True))
    return OpTimes(ops, len(kept), len(runs), fmean(run.us for run in kept), latency_us)


def _typical(runs: Sequence[Run]) -> list[int]:
    """The numbers of the runs that `summarize` takes the means of."""
    warm = range(int(len(runs) * WARMUP), len(runs))
    kinds = {number: tuple((event.op, event.name) for event in runs[number].events) for number in warm}
    common, _ = Counter(kinds.values()).most_common(1)[0]
    alike = sorted((number for number in warm if kinds[number] == common), key=lambda number: runs[number].us)
    return alike[len(alike) // 4 : len(alike) - len(alike) // 4]


def modules(path: Path) -> dict[str, str]:
    """Returns op name → the module of the network that holds its weights, as far as the .onnx file at `path` tells.

    Weights are called as in the network where they are stored as they were: at int8 few are.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    found: dict[str, str] = {}
    for node in graph.node:
        owner = next((name.rpartition(".")[0] for name in node.input if name in weights and "." in name), "")
        if owner:
            found |= dict.fromkeys((node.name, *node.output), owner.removeprefix("inner."))
    return found


def write_trace(path: Path, runs: Sequence[Run], about: str, owners: Mapping[str, str] | None = None) -> None:
    """Writes every run as a Chrome trace, which chrome://tracing and Perfetto open. `about` names file and device.

    Each event says whether its run is one of those that the table is made of, and where the runtime tells them the
    op's shapes and, by `owners` (see `modules`), its module. The label of the process says what it does not tell.
    """
    first = runs[0].start_us
    typical = set(_typical(runs))
    events = []
    for number, run in enumerate(runs):
        args = {"run": number, "in_table": number in typical}
        begin = {"pid": 1, "tid": 1, "ph": "X"}
        events.append({"name": "run", "cat": "run", "ts": run.start_us - first, "dur": run.us, **begin, "args": args})
        for event in run.events:
            where = {"name": event.name or event.op, "cat": event.op, "ts": event.start_us - first}
            about_op = {**args, **_about(event, owners or {})}
            events.append({**where, "dur": event.us + event.lost_us, **begin, "args": about_op})
    shaped = any(event.shapes for run in runs for event in run.events)
    untold = [what for what, told in (("shapes", shaped), ("module names", bool(owners))) if not told]
    labels = f"{len(runs)} runs, {len(typical)} of them in the table"
    labels += f"; this runtime's profiler tells no {' and no '.join(untold)}" if untold else ""
    process = [
        {"name": name, "ph": "M", "pid": 1, "args": args}
        for name, args in (("process_name", {"name": about}), ("process_labels", {"labels": labels}))
    ]
    atomic_files.write(path, json.dumps({"traceEvents": [*process, *events], "displayTimeUnit": "ms"}).encode())


def _about(event: Event, owners: Mapping[str, str]) -> dict[str, Any]:
    """What a trace's event tells of an op beside its time."""
    owner = owners.get(event.name) or owners.get(LAYOUT.sub("", event.name))
    told: dict[str, Any] = {"module": owner} if owner else {}
    return told | (dict(zip(("inputs", "outputs"), map(list, event.shapes), strict=True)) if event.shapes else {})


def _onnxruntime(record: bytes) -> Iterator[Run]:
    """ONNX Runtime's own trace: a `model_run` for each run, and in its time a `<node>_kernel_time` for each node."""
    entries = json.loads(record)
    kernels = sorted(
        (entry for entry in entries if entry.get("cat") == "Node" and entry["name"].endswith(KERNEL)),
        key=lambda entry: entry["ts"],
    )
    place = 0
    for run in sorted((e for e in entries if e["name"] == "model_run"), key=lambda e: e["ts"]):
        events = []
        while place < len(kernels) and kernels[place]["ts"] < run["ts"] + run["dur"]:
            entry = kernels[place]
            place += 1
            name = entry["name"].removesuffix(KERNEL)
            kind = entry["args"]["op_name"]
            said = entry["args"]
            shapes = _shapes(said.get("input_type_shape", ())), _shapes(said.get("output_type_shape", ()))
            events.append(Event(kind, name, float(entry["ts"]), float(entry["dur"]), ROUNDED_DOWN_US, shapes))
        yield Run(float(run["ts"]), float(run["dur"]), tuple(events))


def _shapes(tensors: Iterable[Mapping[str, Sequence[int]]]) -> tuple[str, ...]:
    """ONNX Runtime's [{"float": [1, 3]}, …] as "float 1x3"."""
    pairs = [pair for tensor in tensors for pair in tensor.items()]
    return tuple(f"{kind} {'x'.join(map(str, shape)) or 'scalar'}" for kind, shape in pairs)


def _executorch(record: bytes) -> Iterator[Run]:
    """An ETDump, in nanoseconds: the kernels, and in place of a delegate's call the ops that it tells of."""
    start = 4 if record[8:12] == b"ED00" else 0  # a size in front of the flatbuffer
    data = record[start:]
    for block in Table(data, struct.unpack_from("<I", data, 0)[0], ETDUMP).tables("run_data", RUN_DATA):
        found: list[tuple[str, bool, float, float]] = []
        for event in block.tables("events", ETDUMP_EVENT):
            timed = event.table("profile_event", PROFILE_EVENT)
            if timed is not None:
                start_us, end_us = (timed.number(field, "<Q") / 1e3 for field in ("start_time", "end_time"))
                name = timed.text("delegate_debug_id_str") or timed.text("name")
                found.append((name, bool(timed.text("delegate_debug_id_str")), start_us, end_us))
        whole = next((event for event in found if event[0] == EXECUTE), None)
        if whole is not None:
            yield Run(whole[2], whole[3] - whole[2], tuple(_executed(found)))


def _executed(found: Sequence[tuple[str, bool, float, float]]) -> Iterator[Event]:
    """The ops among ETDump's events; what a delegate tells of comes before the end of its call."""
    inside = False
    for name, delegated, start, end in found:
        if delegated:
            inside = True
            yield Event(NUMBER.sub("", name), name, start, end - start, ROUNDED_DOWN_US)
        elif name == DELEGATE_CALL:
            if not inside:
                yield Event(name, "", start, end - start)
            inside = False
        elif name not in (EXECUTE, OPERATOR_CALL):
            yield Event(name.removeprefix("native_call_"), "", start, end - start)


def _litert(record: bytes) -> Iterator[Run]:
    """The events of LiteRT's profiler: ops of a delegate have no start, and are laid end to end."""
    for entries in json.loads(record)["runs"]:
        whole = next((start, us) for tag, kind, start, us in entries if kind == STAGE and tag == INVOKE)
        end = float(whole[0])
        events = []
        for tag, kind, start, us in entries:
            if kind == INVOKE_OP:
                end = float(start)
            if kind == INVOKE_OP or kind in DELEGATE_OPS:
                events.append(Event(tag, "", end, float(us), 0.0 if kind == INVOKE_OP else ROUNDED_DOWN_US))
                end += us
        yield Run(float(whole[0]), float(whole[1]), tuple(events))


READERS: dict[str, Callable[[bytes], Iterator[Run]]] = {
    "onnxruntime": _onnxruntime,
    "executorch": _executorch,
    "litert": _litert,
}


@dataclass(frozen=True)
class OpTime:
    """One op of a file: its kind, its name where the runtime tells one, and its time in µs."""

    op: str
    name: str
    us: float


@dataclass(frozen=True)
class OpTimes:
    """The time of each op of a file under the runtime's profiler, in the order in which they run.

    They are means over `runs` of the `recorded` runs. `whole_us` is that of a profiled run as the runtime itself sees
    it, `latency_us` the p50 of a run without profiler.
    A profiler costs time of its own, in the ops and between them.
    """

    ops: tuple[OpTime, ...] = field(repr=False)
    runs: int
    recorded: int
    whole_us: float
    latency_us: float

    @property
    def sum_us(self) -> float:
        """What the ops sum to, in µs."""
        return sum(op.us for op in self.ops)

    @property
    def scale(self) -> float:
        """What brings the ops' times down to a run without profiler: 1, or less where they sum to more than its p50."""
        return min(1.0, self.latency_us / self.sum_us) if self.sum_us else 1.0

    @property
    def between_us(self) -> float:
        """What of a profiled run is in no op: the runtime's work, and its profiler's, between them. In µs."""
        return max(0.0, self.whole_us - self.sum_us)

    @property
    def outside_us(self) -> float:
        """What of a run without profiler is in no op: calls, copies, the runtime itself. In µs."""
        return max(0.0, self.latency_us - self.sum_us)

    def by_op(self) -> dict[str, tuple[int, float]]:
        """Returns count and summed time in µs of each kind of op, the longest first."""
        found: dict[str, tuple[int, float]] = {}
        for op in self.ops:
            count, us = found.get(op.op, (0, 0.0))
            found[op.op] = (count + 1, us + op.us)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of `profile --ops`."""
        total = self.whole_us or 1.0
        return {
            "runs": self.runs,
            "recorded_runs": self.recorded,
            "sum_us": self.sum_us,
            "between_us": self.between_us,
            "profiled_run_us": self.whole_us,
            "latency_us": self.latency_us,
            "scale": self.scale,
            "outside_us": self.outside_us,
            "by_op": [
                {"op": op, "count": count, "us": us, "scaled_us": us * self.scale, "share": us / total}
                for op, (count, us) in self.by_op().items()
            ],
            "ops": [asdict(op) for op in self.ops],
        }
