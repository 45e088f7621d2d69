"""Artifacts run in a process of their own: whatever happens there becomes a result or an error that says what to do."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import flatbuffers
import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from conformance import INPUTS, OUTPUTS
from executorch.exir import to_edge
from jobs import SPOILED, Spoil, artifact, endless_onnx, stacked, wait_for
from servers import skip

from edgekit.errors import EdgeKitError
from edgekit.measuring import op_times
from edgekit.runtimes import RUNTIMES, Timing, open_device, pte_runner, run_artifact, stopwatch, table, worker
from edgekit.runtimes.devices.device import STALL_S, Device
from edgekit.runtimes.devices.forked import ForkedDevice
from edgekit.screening import limits
from edgekit.util.forking import beside

QUICK = Timing(warmup_runs=2, seconds=0.0, min_runs=5, max_runs=5)
HERE = tuple(name for name in RUNTIMES if name != "tflite-runtime")


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test checks that its job folders are gone."""
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(jobs))
    yield
    assert not list(jobs.iterdir())


@pytest.mark.parametrize("runtime", HERE)
def test_runs_and_measures(runtime: str, files: Path) -> None:
    feeds = stacked(files, "pair", 11)
    names = {"inputs": INPUTS["pair"], "outputs": OUTPUTS["pair"]}
    result = run_artifact(artifact(files, "pair", runtime), feeds, timing=QUICK, **names)
    total = np.maximum(feeds[0] + feeds[1].reshape(-1, 1, 1, 1, 1).astype("float32"), 0)
    np.testing.assert_allclose(result.outputs[0], total, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(result.outputs[1], total.mean((3, 4)), rtol=1e-5, atol=1e-6)
    assert len(result.latency_ms) == 5 and min(result.latency_ms) > 0
    assert result.load_ms > 0 and result.first_ms > 0 and result.import_ms > 0
    assert [spec.name for spec in result.input_specs + result.output_specs] == ["image", "offset", "total", "mean"]
    assert result.input_specs[1].dtype == "int64" and result.output_specs[1].shape == (1, 2)
    assert (result.runtime, result.device, result.threads, len(result.cpus)) == (runtime, "local:", 1, 1)


def test_does_not_measure_unasked(files: Path) -> None:
    assert run_artifact(files / "cnn.onnx", stacked(files, "cnn", 1)).latency_ms == ()


def test_peak_memory_is_the_workers(files: Path) -> None:
    held = np.ones(500_000_000, dtype=np.uint8)
    parent = stopwatch.peak_rss_bytes()
    result = run_artifact(files / "cnn.tflite", stacked(files, "cnn", 1))
    assert parent is not None and result.peak_rss_bytes is not None
    assert parent > held.nbytes > 2 * result.peak_rss_bytes > 20_000_000


def test_peak_memory_does_not_grow_with_the_samples(files: Path) -> None:
    few, many = (run_artifact(files / "cnn.tflite", [np.zeros((n, 1, 3, 16, 16), "float32")]) for n in (1, 20_000))
    assert few.peak_rss_bytes is not None and many.peak_rss_bytes is not None
    assert many.peak_rss_bytes - few.peak_rss_bytes < 10_000_000  # the samples are 61 MB
    assert many.outputs[0].shape == (20_000, 1, 10)


def test_reads_weights_beside_an_onnx_file(files: Path, tmp_path: Path) -> None:
    model = onnx.load(files / "cnn.onnx")
    path = tmp_path / "split.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    feeds = stacked(files, "cnn", 1)
    want = run_artifact(files / "cnn.onnx", feeds).outputs[0]
    np.testing.assert_array_equal(run_artifact(path, feeds, weight_files=[tmp_path / "weights.bin"]).outputs[0], want)


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
@pytest.mark.parametrize("runtime", HERE)
def test_corrupt_file(runtime: str, spoil: Spoil, files: Path, tmp_path: Path) -> None:
    whole = artifact(files, "cnn", runtime)
    path = tmp_path / f"corrupt{whole.suffix}"
    path.write_bytes(spoil(whole.read_bytes()))
    with pytest.raises(EdgeKitError) as caught:
        run_artifact(path, stacked(files, "cnn", 1), runtime=runtime)
    assert "corrupt" in caught.value.what and caught.value.help
    assert str(tmp_path / "jobs") not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x00", b"garbage" * 99, b"PK\x03\x04" + bytes(60)])
def test_other_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.onnx"
    path.write_bytes(content)
    with pytest.raises(EdgeKitError, match=r"some\.onnx is not a file that EdgeKit can run"):
        run_artifact(path, [np.zeros((1, 1), "float32")])


@pytest.mark.parametrize("runtime", HERE)
def test_formats_are_read_from_content(runtime: str, files: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    shutil.copy(artifact(files, "pair", runtime), path)
    assert table.runtime_for(path) == runtime


def recursive_tflite(path: Path) -> None:
    """A file whose IF calls its own subgraph: LiteRT 2.3 recurses until the stack ends."""
    model = schema.ModelT()
    model.version = 3
    model.buffers = [schema.BufferT()]
    code = schema.OperatorCodeT()
    code.deprecatedBuiltinCode = code.builtinCode = schema.BuiltinOperator.IF
    model.operatorCodes = [code]
    graph = schema.SubGraphT()
    graph.tensors = [schema.TensorT() for _ in range(2)]
    for tensor in graph.tensors:
        tensor.type, tensor.shape = schema.TensorType.BOOL, [1]
    call = schema.OperatorT()
    call.inputs, call.outputs = [0, 0], [1]
    call.builtinOptionsType, call.builtinOptions = schema.BuiltinOptions.IfOptions, schema.IfOptionsT()
    graph.operators, graph.inputs, graph.outputs = [call], [0], [1]
    model.subgraphs = [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path.write_bytes(bytes(builder.Output()))


def fresh() -> Device:
    return open_device("local:")


linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
processes = pytest.mark.parametrize("local", [fresh, pytest.param(ForkedDevice, marks=linux)])


@processes
def test_crash(local: Callable[[], Device], tmp_path: Path) -> None:
    recursive_tflite(tmp_path / "crash.tflite")
    with pytest.raises(EdgeKitError, match=r"litert crashed with SIGSEGV while loading \S*crash\.tflite") as caught:
        run_artifact(tmp_path / "crash.tflite", [np.zeros((1, 1), bool)], device=local())
    assert caught.value.help


@processes
def test_hang(local: Callable[[], Device], tmp_path: Path) -> None:
    endless_onnx(tmp_path / "endless.onnx")
    with pytest.raises(EdgeKitError, match=r"onnxruntime did not finish \S*endless\.onnx within 3 s"):
        run_artifact(tmp_path / "endless.onnx", [np.zeros((1, 1), "float32")], timeout_s=3, device=local())
    assert not _running(tmp_path)


@processes
def test_a_runtime_without_progress_is_ended(local: Callable[[], Device], tmp_path: Path) -> None:
    """By the worker itself, long before the time limit of the whole job."""
    endless_onnx(tmp_path / "endless.onnx")
    device = local()
    device.stall_s = 2.0
    start = time.monotonic()
    with pytest.raises(EdgeKitError, match=r"hangs with \S*endless\.onnx: nothing has happened for 2 s") as caught:
        run_artifact(tmp_path / "endless.onnx", [np.zeros((1, 1), "float32")], device=device)
    assert time.monotonic() - start < 30 and "--timeout" in (caught.value.help or "")
    device.cleanup()
    assert not _running(tmp_path)


@linux
@pytest.mark.parametrize("runtime", HERE)
def test_a_copy_of_this_process_computes_what_a_fresh_one_does(runtime: str, files: Path) -> None:
    path, feeds = artifact(files, "pair", runtime), stacked(files, "pair", 3)
    names = {"inputs": INPUTS["pair"], "outputs": OUTPUTS["pair"]}
    alone, forked = (run_artifact(path, feeds, device=local(), **names) for local in (fresh, ForkedDevice))
    for expected, got in zip(alone.outputs, forked.outputs, strict=True):
        np.testing.assert_array_equal(got, expected)


@linux
def test_a_copy_that_fails_tells_why(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "run_job", lambda *args: 1 / 0)
    with pytest.raises(EdgeKitError, match="stopped with exit code 1") as caught:
        run_artifact(artifact(files, "pair", "onnxruntime"), stacked(files, "pair", 1), device=ForkedDevice())
    assert "ZeroDivisionError" in (caught.value.help or "")


@linux
def test_a_job_beside_this_process_ends_where_nobody_waits(tmp_path: Path) -> None:
    endless_onnx(tmp_path / "endless.onnx")
    jobs = Path(tempfile.gettempdir())

    def work() -> None:
        run_artifact(tmp_path / "endless.onnx", [np.zeros((1, 1), "float32")])

    with pytest.raises(KeyboardInterrupt), beside(work):
        wait_for(lambda: bool(list(jobs.glob("*/log.txt"))), seconds=30)
        raise KeyboardInterrupt
    assert not _running(tmp_path)


@linux
def test_a_job_ends_with_the_copy_that_waits_for_it(tmp_path: Path) -> None:
    """As when the kernel ends the copy because memory runs out."""
    endless_onnx(tmp_path / "endless.onnx")
    jobs = Path(tempfile.gettempdir())
    here = os.getpid()

    def work() -> str:
        if os.getpid() == here:
            return "here"
        (jobs / "pid").write_text(str(os.getpid()))
        run_artifact(tmp_path / "endless.onnx", [np.zeros((1, 1), "float32")], device=ForkedDevice())
        return "there"

    with beside(work) as result:
        wait_for(lambda: bool(list(jobs.glob("*/log.txt"))), seconds=30)
        os.kill(int((jobs / "pid").read_text()), signal.SIGKILL)
        start = time.monotonic()
        assert result() == "here" and time.monotonic() - start < 10
    shutil.rmtree(jobs)
    jobs.mkdir()


def test_a_hang_ends_within_half_a_minute_by_default() -> None:
    assert all(open_device(uri).stall_s <= 20 for uri in ("local:", f"python:{sys.executable}"))
    assert STALL_S <= 20


def without_python() -> Device:
    """This machine as a device on which the C++ runner runs .pte files."""
    device = open_device("local:")
    device.runner = platform.machine()
    if device.runner not in pte_runner.TARGETS or not shutil.which("g++"):
        skip("there is no runner for this machine, or no compiler to build it with: apt-get install g++")
    return device


class Greedy(torch.nn.Module):
    """64 MB for activations, from inputs and weights of 16 kB."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x.expand(4096, 4096) + 1).amax().reshape(1)


def test_a_small_file_does_not_take_all_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = to_edge(torch.export.export(Greedy(), (torch.ones(1, 4096),))).to_executorch()
    (tmp_path / "greedy.pte").write_bytes(program.buffer)
    feeds = [np.ones((1, 1, 4096), np.float32)]
    for device in (open_device("local:"), without_python()):
        monkeypatch.delenv(limits.MEMORY_VARIABLE, raising=False)
        total = run_artifact(tmp_path / "greedy.pte", feeds, device=device).outputs[0]
        np.testing.assert_allclose(total, [[np.sin(2.0)]], rtol=1e-6)
        monkeypatch.setenv(limits.MEMORY_VARIABLE, "32MB")
        with pytest.raises(EdgeKitError, match=f"may take 0.0 GB there: .*{limits.MEMORY_VARIABLE}=16GB"):
            run_artifact(tmp_path / "greedy.pte", feeds, device=device)
        device.cleanup()


def test_the_runner_without_python_profiles_too(files: Path) -> None:
    device = without_python()
    feeds = stacked(files, "cnn", 2)
    there = run_artifact(files / "cnn.pte", feeds, device=device, trace_runs=12, timing=QUICK)
    device.cleanup()
    here = run_artifact(files / "cnn.pte", feeds, trace_runs=12)
    np.testing.assert_array_equal(there.outputs[0], here.outputs[0])
    runs = [op_times.read("executorch", result.trace or b"") for result in (there, here)]
    kinds = [[event.op for event in run[-1].events] for run in runs]
    assert kinds[0] == kinds[1] and sum("Convolution" in kind for kind in kinds[0]) == 2
    assert [len(run) for run in runs] == [12, 12]


def test_progress_is_no_hang(files: Path) -> None:
    """Samples and timing that take longer than the limit together, but each of them less."""
    device = open_device("local:")
    device.stall_s = 3.0
    timing = Timing(warmup_runs=5, seconds=4.0, min_runs=5, max_runs=1_000_000)
    result = run_artifact(files / "cnn.onnx", stacked(files, "cnn", 3), device=device, timing=timing)
    assert sum(result.latency_ms) > 3_000
    device.cleanup()


def _running(folder: Path) -> list[Path]:
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in _read(path)]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "one input too few": ({"feeds": [np.zeros((1, 1, 2, 4, 4), "float32")]}, "takes 2 inputs"),
    "dtype": (
        {"feeds": [np.zeros((1, 1, 2, 4, 4)), np.zeros((1, 1), "int64")]},
        r"'image' takes float32\[1,2,4,4\], not float64",
    ),
    "shape": (
        {"feeds": [np.zeros((1, 2, 4, 4), "float32"), np.zeros((1, 1), "int64")]},
        r"takes float32\[1,2,4,4\], not float32\[2,4,4\]",
    ),
    "number of samples": ({"feeds": [np.zeros((2, 1, 2, 4, 4), "float32"), np.zeros((1, 1), "int64")]}, "same number"),
    "no samples": ({"feeds": [np.zeros((0, 1, 2, 4, 4), "float32"), np.zeros((0, 1), "int64")]}, "at least one"),
    "objects": ({"feeds": [np.array([["a", None]], object)] * 2}, "arrays of numbers"),
    "no inputs": ({"feeds": []}, "at least one input"),
    "input names": ({"inputs": ("a", "b")}, "named image, offset, not a, b"),
    "threads": ({"threads": 0}, "at least one thread"),
    "runtime": ({"runtime": "tensorrt"}, "no runtime 'tensorrt'"),
    "runtime of another format": ({"runtime": "litert"}, "litert runs tflite files"),
    "device": ({"device": "telnet://pi"}, "no device 'telnet://pi'"),
    "address of local": ({"device": "local:there"}, "names nothing"),
    "no such interpreter": ({"device": "python:/nowhere/python"}, "names no Python interpreter"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_request(case: str, files: Path) -> None:
    options, message = WRONG[case]
    arguments = {"feeds": stacked(files, "pair", 1), **options}
    with pytest.raises(EdgeKitError, match=message):
        run_artifact(files / "pair.onnx", arguments.pop("feeds"), **arguments)


@pytest.mark.parametrize("runtime", HERE)
def test_missing_runtime(runtime: str, files: Path, bare_python: str) -> None:
    with pytest.raises(EdgeKitError, match=f"{runtime} is not installed for {bare_python}") as caught:
        run_artifact(artifact(files, "cnn", runtime), stacked(files, "cnn", 1), device=f"python:{bare_python}")
    assert caught.value.help == f"{bare_python} -m pip install {RUNTIMES[runtime].package}"


def test_program_that_is_no_python(files: Path) -> None:
    with pytest.raises(EdgeKitError, match="exit code 1 before it began"):
        run_artifact(files / "cnn.onnx", stacked(files, "cnn", 1), device=f"python:{shutil.which('false')}")


def test_damaged_on_the_way(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.util.atomic_files.sha256", lambda path: "0" * 64)
    with pytest.raises(EdgeKitError, match="SHA-256 differs"):
        run_artifact(files / "cnn.onnx", stacked(files, "cnn", 1))


def test_another_interpreter(files: Path) -> None:
    python = os.environ.get("EDGEKIT_TFLITE_RUNTIME_PYTHON")
    if not python:
        pytest.skip("EDGEKIT_TFLITE_RUNTIME_PYTHON does not name an interpreter that has tflite-runtime")
    feeds = stacked(files, "cnn", 3)
    there = run_artifact(files / "cnn.tflite", feeds, device=f"python:{python}", runtime="tflite-runtime", timing=QUICK)
    here = run_artifact(files / "cnn.tflite", feeds)
    np.testing.assert_allclose(there.outputs[0], here.outputs[0], rtol=1e-5, atol=1e-6)
    assert there.version == "2.14.0" and len(there.latency_ms) == 5 and there.device == f"python:{python}"


THREADS = """
import os, sys, numpy as np
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from edgekit.runtimes import pte
before = len(os.listdir("/proc/self/task"))
session = pte.load(sys.argv[2], threads=int(sys.argv[3]))
session.run({"input_0": np.zeros((1, 3, 16, 16), "float32")})
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.parametrize(("threads", "added"), [(1, 0), (2, 1), (3, 2)])
def test_executorch_uses_as_many_threads_as_asked(threads: int, added: int, files: Path) -> None:
    """The calling thread is one of them."""
    root = str(Path(stopwatch.__file__).parents[1])
    argv = [sys.executable, "-c", THREADS, root, str(files / "cnn.pte"), str(threads)]
    assert int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout) == added


def test_worker_leaves_a_result_file_and_a_log(files: Path, tmp_path: Path) -> None:
    """The folder protocol itself, as a device sees it."""
    job = tmp_path / "job"
    job.mkdir()
    runtimes = Path(table.__file__).parent
    for path in (runtimes / "worker.py", runtimes / "session.py", runtimes / "ort.py", Path(stopwatch.__file__)):
        shutil.copy(path, job)
    shutil.copy(files / "cnn.onnx", job / "model.onnx")
    np.save(job / "in_0.npy", stacked(files, "cnn", 2)[0])
    (job / "job.json").write_text(
        json.dumps(
            {
                "runtime": "onnxruntime",
                "module": "ort",
                "package": "onnxruntime",
                "artifact": "model.onnx",
                "label": "cnn.onnx",
                "sha256": hashlib.sha256((job / "model.onnx").read_bytes()).hexdigest(),
                "threads": 1,
                "inputs": [],
                "outputs": [],
                "feeds": 1,
                "state": {},
                "timing": None,
                "count": 0,
                "trace": 0,
                "memory_bytes": 1 << 30,
                "stall_s": 20.0,
            }
        )
    )
    done = subprocess.run([sys.executable, str(job / "worker.py"), str(job)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "edgekit allows 25.0 s" and "edgekit allows 20.0 s" in done.stdout
    result = json.loads((job / "result.json").read_text())
    assert result["ok"] and result["timing"] == "measured" and result["numpy"] == np.__version__
    assert result["outputs"] == [{"name": "logits", "dtype": "float32", "shape": [1, 10]}]
    assert np.load(job / "out_0.npy").shape == (2, 1, 10)
    assert "edgekit stage: run" in (job / "log.txt").read_text()
