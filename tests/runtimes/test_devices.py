"""Every device runs every runtime that it can have, and passes the same conformance test."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conformance import INPUTS, OUTPUTS
from jobs import artifact, processes_of, stacked
from rich.console import Console
from servers import Adbd, missing_qemu, skip

from edgekit.artifacts.bundles import Bundle, read_golden
from edgekit.doctor.device import _diagnosis
from edgekit.errors import EdgeKitError
from edgekit.reports.doctor import render_device
from edgekit.runtimes import DEVICES, RUNTIMES, Timing, open_device, pte_runner, run_artifact
from edgekit.runtimes.devices import facts, qemu
from edgekit.runtimes.devices.device import Device

QUICK = Timing(warmup_runs=2, seconds=0.0, min_runs=5, max_runs=5)
PYTHON = f"python={sys.executable}"


def started(kind: str, request: pytest.FixtureRequest) -> str:
    """The URI of a device of this kind, whose server runs and whose client is first on the path."""
    if kind == "qemu":
        if reason := missing_qemu():
            skip(reason)
        return "qemu:arm64"
    if kind in ("ssh", "adb"):
        server = request.getfixturevalue(f"{kind}_server")
        os.environ["PATH"] = f"{server.bin}{os.pathsep}{os.environ['PATH']}"
        return f"{server.uri}{'&' if '?' in server.uri else '?'}{PYTHON}" + (
            "" if kind == "adb" else f"&dir={server.home}"
        )
    return {"local": "local:", "python": f"python:{sys.executable}"}[kind]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """One opened device of each kind."""
    path = os.environ["PATH"]
    try:
        opened = open_device(started(request.param, request))
        yield opened
        opened.cleanup()
    finally:
        os.environ["PATH"] = path


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runtime_on_device(device: Device, runtime: str, files: Path) -> None:
    """Outputs of several samples in order, names, dtypes and figures; nothing is left but the runner."""
    if runtime == "tflite-runtime":
        pytest.skip("it runs beside numpy 1 only: another interpreter, which test_worker reaches")
    feeds = stacked(files, "pair", 3)
    names = {"inputs": INPUTS["pair"], "outputs": OUTPUTS["pair"]}
    result = run_artifact(artifact(files, "pair", runtime), feeds, device=device, timing=QUICK, **names)
    total = np.maximum(feeds[0] + feeds[1].reshape(-1, 1, 1, 1, 1).astype("float32"), 0)
    np.testing.assert_allclose(result.outputs[0], total, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(result.outputs[1], total.mean((3, 4)), rtol=1e-5, atol=1e-6)
    assert [spec.name for spec in result.input_specs + result.output_specs] == ["image", "offset", "total", "mean"]
    assert result.input_specs[1].dtype == "int64" and result.output_specs[1].shape == (1, 2)
    assert (result.runtime, result.device, result.threads) == (runtime, device.uri, 1)
    assert result.version[0].isdigit() and result.timing == device.timing
    if device.timing == "emulated":
        assert (result.latency_ms, result.load_ms, result.first_ms, result.import_ms) == ((), None, None, None)
        assert result.instructions is not None and 1000 < result.instructions < 10_000_000
    else:
        assert len(result.latency_ms) == 5 and min(result.latency_ms) > 0 and result.instructions is None
        assert result.load_ms and result.first_ms and result.peak_rss_bytes and len(result.cpus) == 1


def test_doctor(device: Device) -> None:
    """What the device is and has, as a table and as JSON."""
    diagnosis = _diagnosis(device, device.probe())
    assert diagnosis.ok and diagnosis.uri in diagnosis.verdict
    assert diagnosis.python is not None and diagnosis.cpu and diagnosis.cores and diagnosis.memory_bytes
    versions = {runtime.name: runtime.version for runtime in diagnosis.runtimes}
    assert versions["onnxruntime"] and versions["litert"] and versions["executorch"]
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(render_device(diagnosis))
    text = console.export_text()
    assert diagnosis.verdict in text and all(version in text for version in versions.values() if version)
    emulated = device.timing == "emulated"
    assert any("emulated" in note for note in diagnosis.notes) == emulated
    if emulated:
        dot_product = next(feature for feature in diagnosis.features if feature.name == "asimddp")
        assert diagnosis.machine == "aarch64" and dot_product.present


# format → how far int8 outputs may be from those on x86, in steps of the output's scale. XNNPACK computes in integers.
STEPS = {"executorch": 0, "tflite": 0, "onnx": 1}


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_outputs_on_arm64(precision: str, bundles: dict[str, Bundle]) -> None:
    """A bundle's golden outputs, which were recorded here, are those of a phone's processor too."""
    if reason := missing_qemu():
        skip(reason)
    bundle = bundles[precision]
    golden = read_golden(bundle)
    assert {file.format for file in bundle.artifacts} == set(STEPS)
    device = open_device("qemu:arm64")
    try:
        for file in bundle.artifacts:
            feeds = [golden[f"input/{spec.name}"] for spec in file.inputs]
            names = {"inputs": [spec.name for spec in file.inputs], "outputs": [spec.name for spec in file.outputs]}
            got = run_artifact(file.path, feeds, device=device, **names)
            for spec, output in zip(file.outputs, got.outputs, strict=True):
                recorded = golden[f"{file.format}/{spec.name}"]
                qparams = bundle.manifest["qparams"].get("outputs", {}).get(spec.name)
                limit = STEPS[file.format] * qparams["scale"] * 1.001 if qparams else 1e-4
                assert np.abs(output - recorded).max() <= limit, file.path.name
    finally:
        device.cleanup()


def test_adb_device_vanishes(adb_server: Adbd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{adb_server.bin}{os.pathsep}{os.environ['PATH']}")
    device = open_device(adb_server.uri)
    job = device.push({"a": Path(__file__)})
    start = time.monotonic()
    plug = threading.Timer(0.5, adb_server.drop)
    plug.start()
    with pytest.raises(EdgeKitError, match=r"the connection to 127\.0\.0\.1:5555 was lost") as caught:
        device.exec(["sh", "-c", f"sleep 60; cat {job}/a"], 60)
    assert caught.value.help and time.monotonic() - start < 30
    plug.join()
    device.cleanup()
    deadline = time.monotonic() + 5
    while adb_server.left_behind() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert adb_server.left_behind() == [] and not processes_of(adb_server.home)


WRONG = {
    "adb:-s": "names no device",
    "adb:x y": "names no device",
    "adb:x?cpu=1": "unknown option 'cpu'",
    "qemu:": "no emulated machine",
    "qemu:x86": "no emulated machine",
    "qemu:arm64?cpu=486": "no emulated processor '486'",
    "qemu:arm64?cpus=2": "unknown option 'cpus'",
}


@pytest.mark.parametrize("uri", WRONG)
def test_wrong_address(uri: str) -> None:
    with pytest.raises(EdgeKitError, match=WRONG[uri]) as caught:
        open_device(uri)
    assert caught.value.help


def test_no_such_adb_device(adb_server: Adbd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{adb_server.bin}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(EdgeKitError, match=r"cannot reach nobody: .*not found") as caught:
        open_device("adb:nobody")
    assert caught.value.help and "adb devices" in caught.value.help


PROGRAMS: dict[str, tuple[str, Callable[[], object]]] = {
    "adb": ("adb is not installed", lambda: open_device("adb:x")),
    "qemu": ("qemu-aarch64 is not installed", lambda: open_device("qemu:arm64")),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_missing_program(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    message, call = PROGRAMS[case]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EdgeKitError, match=message) as caught:
        call()
    assert caught.value.help and "apt-get install" in caught.value.help


@pytest.mark.parametrize("missing", ["mmdebstrap", "g++"])
def test_what_is_put_together_whole_or_not_at_all(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cache that cannot be filled stays empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    make = {"mmdebstrap": lambda: qemu._system("cortex-a53"), "g++": lambda: pte_runner.bundle(os.uname().machine)}
    with pytest.raises(EdgeKitError, match=f"{missing.replace('+', '.')} is not installed") as caught:
        make[missing]()
    assert caught.value.help and "apt-get install" in caught.value.help
    kept = tmp_path / "cache/edgekit"
    assert not kept.exists() or list(kept.iterdir()) == []


def test_the_runner_is_that_of_the_installed_executorch() -> None:
    assert pte_runner.release() == importlib.metadata.version("executorch")
    if shutil.which("g++") is None:
        skip("g++ is not installed: apt-get install g++")
    assert {path.name for path in pte_runner.bundle(os.uname().machine).values()} >= {"runner", "loader", "libc.so.6"}


PHONE = """Welcome to my phone = really
machine=aarch64
system=Linux 5.10.43
os=Android 13
model=Google Pixel 7
cpuinfo=processor\t: 0
cpuinfo=CPU part\t: 0xd05
cpus=0-3,6
memory_kb=1000
available_kb=10
disk_kb=7
governor=schedutil
governor=performance
khz=1000000
khz=2850000
max_khz=2850000
temperature=41500 cpu-0-0
temperature=712 battery
temperature=35 skin
temperature=
temperature=none gpu
"""


def test_facts() -> None:
    read = facts.read(PHONE)
    assert read["cpus"] == [0, 1, 2, 3, 6] and read["memory_bytes"] == 1_024_000 and read["disk_free_bytes"] == 7168
    assert read["temperatures_c"] == {"cpu-0-0": 41.5, "battery": 71.2, "skin": 35.0}
    assert read["cpuinfo"] == "processor\t: 0\nCPU part\t: 0xd05" and "python" not in read
    assert facts.read("") == {}


class Phone:
    """A device without Python that is hot and changes its clock."""

    uri, python, timing, runner = "adb:phone", "python3", "measured", "aarch64"


def test_doctor_of_a_phone() -> None:
    diagnosis = _diagnosis(Phone(), facts.read(PHONE))
    assert diagnosis.ok and diagnosis.verdict == "executorch files run on adb:phone"
    assert diagnosis.ghz == (2.85, 2.85) and diagnosis.model == "Google Pixel 7"
    notes = " | ".join(diagnosis.notes)
    assert "no python3" in notes and "schedutil" in notes and "hot (battery 71 °C)" in notes
