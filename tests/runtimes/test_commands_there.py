"""Whole commands on a machine behind a real OpenSSH server: mishaps on the way, `--resume`, the ladder's last rung."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from kit import invoke, quick
from servers import Sshd, mounted, uri

from edgekit.artifacts.bundles import Bundle
from edgekit.measuring import running, schedule
from edgekit.measuring.run_cache import KEPT
from edgekit.runtimes import Timing
from edgekit.runtimes.devices import device as device_module

SOON_S = 30.0
DISK = 64 << 20
CUT = 'case "$*" in *"tar -xzf"*) head -c 3000 | {ssh} "$@" ;; *) exec {ssh} "$@" ;; esac'


def while_a_job_is_timed(server: Sshd, act: Callable[[int], object]) -> None:
    """Calls `act` with the process of the job that is timed next, from a thread."""

    def wait_and_act() -> None:
        deadline = time.monotonic() + SOON_S
        while time.monotonic() < deadline:
            for log in server.home.glob("*/*/log.txt"):
                if "edgekit stage: time" in log.read_text():
                    [process] = [p for p in processes() if words(p)[-1:] == [str(log.parent)]]
                    act(process)
                    return
            time.sleep(0.01)

    threading.Thread(target=wait_and_act, daemon=True).start()


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def words(process: int) -> list[str]:
    """Of the process's command line; none where it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def kill_the_connection(server: Sshd) -> None:
    while_a_job_is_timed(server, lambda process: server.drop())


def stop_the_worker(server: Sshd) -> None:
    """The process stands still, its own watch with it."""
    while_a_job_is_timed(server, lambda process: os.kill(process, signal.SIGSTOP))


def fill_the_disk(server: Sshd) -> None:
    with (server.home / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass


def cut_the_push(server: Sshd) -> None:
    server.command(CUT.format(ssh=server.client))


def mend(server: Sshd) -> None:
    (server.home / "ballast").unlink(missing_ok=True)
    server.configure()


# mishap → what causes it, and what is said
MISHAPS: dict[str, tuple[Callable[[Sshd], None], str]] = {
    "the connection is killed": (kill_the_connection, "the connection to {name} was lost"),
    "the worker stands still": (stop_the_worker, "nothing has happened for 2 s"),
    "the disk fills up": (fill_the_disk, "the disk of {name} is full"),
    "a push is cut short": (cut_the_push, "did not pass between here and {name} whole"),
}
KILLED, STOPPED, FULL, CUT_SHORT = MISHAPS
# Python's worker and the runner without it
CASES = [
    *(("profile", ("executorch",), mishap) for mishap in MISHAPS),
    *(("profile", ("onnx",), mishap) for mishap in (KILLED, STOPPED)),
    ("compare", ("onnx", "tflite"), KILLED),
]
FAILS_AT = {"profile": 2, "compare": 4}  # the run; the first runs of a comparison are not timed
RUNS = {"profile": 2, "compare": 6}


class Runs:
    """`stages.run`, which counts, and has `cause` called before the run number `fails_at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int, cause: Callable[[], None]) -> None:
        self.count, self._fails_at, self._cause, self._run = 0, fails_at, cause, running.run
        monkeypatch.setattr(running, "run", self)

    def __call__(self, *args: object, **options: object) -> object:
        self.count += 1
        if self.count == self._fails_at:
            self._cause()
        return self._run(*args, **options)


@pytest.mark.parametrize(("command", "formats", "mishap"), CASES)
def test_a_mishap_is_told_soon_and_resume_completes(
    command: str, formats: tuple[str, ...], mishap: str, sshd: Sshd, bundles: dict[str, Bundle], workshop: Path,
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cause, said = MISHAPS[mishap]
    name = sshd.uri.removeprefix("ssh://")
    monkeypatch.setattr(schedule, "ROUNDS", 2)
    monkeypatch.setattr(schedule, "MOST_ROUNDS", 2)
    monkeypatch.setattr(schedule, "TIMING", Timing(warmup_runs=1, seconds=0.3, min_runs=5, max_runs=1_000_000))
    monkeypatch.setattr(device_module, "GRACE_S", 0.5)
    typed: list[object] = [a.path for a in bundles["fp32"].artifacts if a.format in formats]
    if command == "compare":
        typed = [f"{workshop / 'net.py'}:make", *typed, "--data", workshop / "data.npz"]
    typed = [command, *typed, "--device", uri(sshd), "--timeout", "2"]
    runs = Runs(monkeypatch, FAILS_AT[command], lambda: cause(sshd))
    with mounted(sshd.home, f"size={DISK}") if cause is fill_the_disk else nullcontext():
        start = time.monotonic()
        failed = invoke(capfd, *typed)
        assert time.monotonic() - start < SOON_S
        assert failed.code == 1 and said.format(name=name) in failed.err and KEPT in failed.err, failed.err
        mend(sshd)
        kept = runs.count - 1
        done = invoke(capfd, *typed, "--resume")
    assert done.code == 0, done.err
    assert kept > 0 and f"{kept} results are those of the command before" in done.out
    assert runs.count == 1 + RUNS[command]


SPOILED = """
import onnxruntime
run = onnxruntime.InferenceSession.run
onnxruntime.InferenceSession.run = lambda *args, **options: [out + 0.5 for out in run(*args, **options)]
"""


@pytest.fixture
def spoiled_python(tmp_path: Path) -> str:
    """An interpreter whose ONNX Runtime computes something else."""
    (tmp_path / "sitecustomize.py").write_text(SPOILED)
    (tmp_path / "python").write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    return f"python={tmp_path}/python"


def test_the_ladder_ends_on_the_device(
    sshd: Sshd, bundles: dict[str, Bundle], workshop: Path, spoiled_python: str, tmp_path: Path,
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A .pte file needs no Python there; what the other one gives is rejected, though the file is what was exported."""
    quick(monkeypatch)
    paths = {a.format: a.path for a in bundles["fp32"].artifacts if a.format != "tflite"}
    result = tmp_path / "result.json"
    ran = invoke(
        capfd, "compare", f"{workshop / 'net.py'}:make", *paths.values(), "--data", workshop / "data.npz",
        "--device", uri(sshd, spoiled_python), "--explain", "--json", result,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    values = json.loads(result.read_text())
    here = {format: f"{path.name} fp32" for format, path in paths.items()}
    there = {format: f"{name} on {sshd.uri}" for format, name in here.items()}
    rungs = {rung["rung"]: rung for rung in values["ladder"]}
    assert list(rungs) == ["exported graph", *(n for f in paths for n in (here[f], there[f]))]
    assert [name for name, rung in rungs.items() if not rung["ok"]] == [there["onnx"]] == [values["first_divergence"]]
    assert all(rungs[there[format]]["against"] == f"{here[format]} here" for format in paths)
    for format, artifact in zip(paths, values["artifacts"], strict=True):
        assert ("not what was exported" in artifact["reasons"][0]) == (format == "onnx")
    assert values["artifacts"][list(paths).index("onnx")]["verdict"] == "reject"
    assert (
        "outputs differ from the recorded ones by" in ran.out
        and f"the first rung that diverges: {there['onnx']}" in ran.out
    )
