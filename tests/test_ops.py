"""Per-op times, by the runtimes' own profilers, of the tiny network: which ops there are, and what they sum to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kit import invoke, quick
from rich.console import Console

import edgekit
from edgekit.artifacts.bundles import Bundle
from edgekit.errors import EdgeKitError
from edgekit.measuring import op_times, running
from edgekit.measuring.op_times import OpTime, OpTimes
from edgekit.reports import tables
from edgekit.runtimes import RUNTIMES

# What the network's two convolutions and its linear layer are called: runtime, precision → part of the ops' kinds.
LAYERS = {
    ("onnxruntime", "fp32"): (("Conv", 2), ("Gemm", 1)),
    ("onnxruntime", "int8"): (("QLinearConv", 2), ("QGemm", 1)),
    ("executorch", "fp32"): (("Convolution (NHWC, F32)", 2), ("Fully Connected (NC, F32)", 1)),
    ("executorch", "int8"): (("Convolution (NHWC, QC8)", 2), ("Fully Connected (NC, QS8, QC8W)", 1)),
    ("litert", "fp32"): (("Convolution (NHWC, F32)", 2), ("Fully Connected (NC, F32)", 1)),
    ("litert", "int8"): (("Convolution (NHWC, QC8)", 2), ("Fully Connected (NC, QS8, QC8W)", 1)),
}
# The layers whose weights are stored under their modules' names (BatchNorm is folded into the others): what each reads
# and writes first, as ONNX Runtime's profiler tells it.
MODULES = {"6": ("float 1x16", "float 1x10")}


@pytest.fixture(autouse=True)
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


def test_the_table_is_complete() -> None:
    assert {runtime for runtime, _ in LAYERS} == set(op_times.READERS) == set(RUNTIMES) - {"tflite-runtime"}


@pytest.mark.parametrize(("runtime", "precision"), LAYERS)
def test_every_layer_is_timed(runtime: str, precision: str, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    path = next(a.path for a in bundles[precision].artifacts if RUNTIMES[runtime].format == a.format)
    trace = tmp_path / "trace.json"
    profile = edgekit.profile(path, ops=True, trace=trace)
    assert profile.runtime == runtime and profile.ops is not None
    assert all("x64quantprecision" in note for note in profile.notes)  # of processors that need it
    for kind, count in LAYERS[runtime, precision]:
        assert sum(n for op, (n, _) in profile.ops.by_op().items() if op.startswith(kind)) == count, kind
    assert profile.ops.latency_us == profile.latency.p50 * 1e3
    values = profile.to_dict()["ops"]
    shown = sum(row["us"] for row in values["by_op"]) + values["between_us"]
    # The clock counts whole microseconds, and what it loses of an op is known on average only.
    assert shown == pytest.approx(values["profiled_run_us"], abs=0.5 * len(profile.ops.ops))
    assert sum(row["share"] for row in values["by_op"]) == pytest.approx(profile.ops.sum_us / profile.ops.whole_us)
    scaled = sum(row["scaled_us"] for row in values["by_op"])
    assert scaled + values["outside_us"] == pytest.approx(profile.ops.latency_us)
    events = json.loads(trace.read_text())["traceEvents"]
    runs = [event for event in events if event["name"] == "run"]
    assert len(runs) == op_times.TRACE_RUNS and runs[0]["ts"] == 0
    assert sum(run["args"]["in_table"] for run in runs) == profile.ops.runs == values["runs"]
    assert len(runs) == profile.ops.recorded == values["recorded_runs"]
    label = next(event["args"]["labels"] for event in events if event["name"] == "process_labels")
    assert label.startswith(f"{len(runs)} runs, {profile.ops.runs} of them in the table")
    assert ("tells no shapes" in label) == (runtime != "onnxruntime")
    if (runtime, precision) == ("onnxruntime", "fp32"):
        first = [e["args"] for e in events if e["ph"] == "X" and e["args"]["run"] == 0]
        layers = {args["module"]: (args["inputs"][0], args["outputs"][0]) for args in first if "module" in args}
        assert layers == MODULES and "tells no" not in label
    for run in runs:
        inside = [e for e in events if e["ph"] == "X" and e["cat"] != "run" and e["args"]["run"] == run["args"]["run"]]
        assert len(inside) == len(profile.ops.ops)
        assert all(run["ts"] - 1 <= e["ts"] <= run["ts"] + run["dur"] + 1 for e in inside)


def test_command_line(bundles: dict[str, Bundle], capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    path = next(a.path for a in bundles["fp32"].artifacts if a.format == "onnx")
    result = tmp_path / "result.json"
    ran = invoke(capfd, "profile", path, "--ops", "--trace", tmp_path / "trace.json", "--json", result)
    assert ran.code == 0 and "Conv" in ran.out and "between the ops" in ran.out and "without profiler" in ran.out
    assert json.loads(result.read_text())["ops"]["by_op"][0]["op"] == "Conv"
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    refused = invoke(capfd, "profile", path, "--trace", tmp_path / "other.json")
    assert refused.code == 1 and "add --ops" in refused.err and not (tmp_path / "other.json").exists()


def test_a_profiler_that_fails_is_told(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(a.path for a in bundles["fp32"].artifacts if a.format == "tflite")
    run = running.run

    def spoiled(*args: object, trace_runs: int = 0, **options: object) -> object:
        if trace_runs:
            raise EdgeKitError("litert 9.9 gives no per-op times of model.tflite")
        return run(*args, **options)

    monkeypatch.setattr(running, "run", spoiled)
    profile = edgekit.profile(path, ops=True)
    assert profile.ops is None and profile.latency is not None
    assert profile.notes == ("no per-op times: litert 9.9 gives no per-op times of model.tflite",)


@pytest.mark.parametrize("runtime", op_times.READERS)
@pytest.mark.parametrize("record", [b"", b"{}", b"[1, 2]", b'{"runs": [[]]}', b"\x0c\0\0\0ED00" + bytes(40)])
def test_a_damaged_record_is_told(runtime: str, record: bytes) -> None:
    with pytest.raises(EdgeKitError, match=f"the profile of {runtime} cannot be read|recorded no op"):
        op_times.read(runtime, record)


@pytest.mark.parametrize(("ms", "runs"), [(0.0, 200), (0.1, 200), (100.0, 50), (5_000.0, 10)])
def test_slow_models_run_less_often(ms: float, runs: int) -> None:
    assert op_times.runs_for(ms) == runs


def test_disturbed_and_odd_runs_do_not_count() -> None:
    def run(us: float, *names: str) -> op_times.Run:
        return op_times.Run(0.0, us * len(names), tuple(op_times.Event("Conv", name, 0.0, us) for name in names))

    cold, odd, slow = run(50.0, "a", "b"), run(1.0, "a"), run(900.0, "a", "b")
    runs = [*[cold] * 4, odd, slow, slow, *(run(float(us % 2), "a", "b") for us in range(13))]
    times = op_times.summarize(runs, latency_us=4.0)
    assert [op.name for op in times.ops] == ["a", "b"]
    assert all(op.us == pytest.approx(0.5, abs=0.2) for op in times.ops)
    assert times.outside_us == pytest.approx(4 - times.sum_us) and times.scale == 1


def test_what_the_clock_rounds_away_is_added() -> None:
    """Half a tick of an op on a clock that rounds down; what is in no op has a row of its own."""
    events = (op_times.Event("Conv", "a", 0.0, 3.0, op_times.ROUNDED_DOWN_US), op_times.Event("Add", "b", 4.0, 2.0))
    times = op_times.summarize([op_times.Run(0.0, 8.0, events)] * 8, latency_us=10.0)
    assert [op.us for op in times.ops] == [3.5, 2.0]
    assert (times.sum_us, times.between_us, times.outside_us) == (5.5, 2.5, 4.5)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(tables.ops_report(times))
    text = capture.get()
    assert "between the ops" in text and "31.2 %" in text and "8.0" in text and "10.0 µs (p50)" in text


def test_times_that_the_profiler_inflates_are_scaled_and_said_so() -> None:
    times = OpTimes((OpTime("Conv", "a", 150.0), OpTime("Add", "b", 50.0)), 10, 25, 260.0, 100.0)
    assert times.scale == 0.5 and times.outside_us == 0
    console = Console(width=200)
    with console.capture() as capture:
        console.print(tables.ops_report(times))
    text = capture.get()
    assert "75.0" in text and "150.0" in text and "the profiler's own cost is in the times" in text
