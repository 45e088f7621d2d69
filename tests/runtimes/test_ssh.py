"""The ssh device against a real OpenSSH server: what goes wrong ends in its message, and nothing stays behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance import INPUTS, OUTPUTS
from executorch.exir import to_edge
from jobs import SPOILED, Spoil, artifact, endless_onnx, processes_of, stacked, wait_for
from servers import PYTHON, Sshd, missing_sshd, mounted, skip, uri

from edgekit.errors import EdgeKitError
from edgekit.measuring import op_times
from edgekit.runtimes import RUNTIMES, Timing, open_device, pte_runner, run_artifact
from edgekit.runtimes.devices import shell, ssh

SOON_S = 30.0
HERE = tuple(name for name in RUNTIMES if name != "tflite-runtime")


def fails(what: str, call: Callable[[], object]) -> EdgeKitError:
    """The error of `call`, which says `what` and what to do, soon."""
    start = time.monotonic()
    with pytest.raises(EdgeKitError, match=what) as caught:
        call()
    assert time.monotonic() - start < SOON_S
    assert caught.value.help
    return caught.value


def test_names_are_not_commands(sshd: Sshd, files: Path, tmp_path: Path) -> None:
    """Neither a file's name, nor a folder's, nor an option is ever read by a shell."""
    evil = """x y;touch pwned;$(touch pwned)`touch pwned`'"&|#.onnx"""
    shutil.copy(files / "cnn.onnx", tmp_path / evil)
    (tmp_path / f"{evil}.data").write_bytes(b"beside it")
    place = sshd.home / "a b;touch pwned"
    place.mkdir()
    try:
        got = run_artifact(
            tmp_path / evil, stacked(files, "cnn", 1), device=f"{sshd.uri}?{PYTHON}&dir={sshd.home}/a+b%3Btouch+pwned"
        )
        assert list(place.iterdir()) == []
    finally:
        place.rmdir()
    want = run_artifact(files / "cnn.onnx", stacked(files, "cnn", 1))
    np.testing.assert_array_equal(got.outputs[0], want.outputs[0])
    homes = (Path.home(), Path.cwd(), tmp_path, sshd.home, Path("/tmp"))
    assert not [home for home in homes if (home / "pwned").exists()]


def test_talkative_login_shell(sshd: Sshd, files: Path) -> None:
    """What a ~/.bashrc prints before each command is no part of the files."""
    sshd.command(f'echo "Welcome = $$"; echo "a1b2 hello" >&2; exec {sshd.client} "$@"')
    for runtime in ("executorch", "litert"):
        run_artifact(artifact(files, "cnn", runtime), stacked(files, "cnn", 1), device=uri(sshd))
    device = open_device(uri(sshd))
    assert device.probe()["machine"] == os.uname().machine
    device.cleanup()


def test_times_ops(sshd: Sshd, files: Path) -> None:
    """By the runtimes' own profilers there; ExecuTorch's is that of the runner without Python."""
    for runtime in HERE:
        path = artifact(files, "cnn", runtime)
        result = run_artifact(path, stacked(files, "cnn", 1), device=uri(sshd), trace_runs=10)
        runs = op_times.read(runtime, result.trace or b"")
        assert len(runs) == 10 and all(run.us > 0 for run in runs)
        assert sum("conv" in event.op.lower() for event in runs[-1].events) == 2


def test_tells_what_the_machine_is(sshd: Sshd) -> None:
    device = open_device(uri(sshd))
    try:
        facts = device.probe()
    finally:
        device.cleanup()
    local = open_device("local:").probe()
    for key in ("machine", "system", "python", "packages", "memory_bytes", "cpuinfo"):
        assert key in facts and (key == "cpuinfo" or facts[key] == local[key])
    assert facts["machine"] == os.uname().machine and "onnxruntime" in facts["packages"]


def test_shares_one_connection(sshd: Sshd, files: Path) -> None:
    """Jobs on an opened device go through the connection that is there, and their folders are removed one by one."""
    device = open_device(uri(sshd))
    try:
        before = (sshd.folder / "log").read_text().count("Accepted publickey")
        for runtime in ("executorch", "executorch"):
            run_artifact(artifact(files, "cnn", runtime), stacked(files, "cnn", 2), device=device)
        (home,) = sshd.home.iterdir()
        assert len(list(home.iterdir())) == 1  # the runner, which the second .pte finds there
        assert (sshd.folder / "log").read_text().count("Accepted publickey") == before > 0
    finally:
        device.cleanup()


ADDRESSES = {
    "ssh://pi": ("", "pi", "", "python3", "/tmp"),
    "ssh://me@Pi.local:2222/": ("me", "Pi.local", "2222", "python3", "/tmp"),
    "ssh://me@[fe80::1%eth0]:22?python=/venv/bin/python&dir=/data": (
        "me", "fe80::1%eth0", "22", "/venv/bin/python", "/data",
    ),
    "ssh://pi?dir=/a%20b": ("", "pi", "", "python3", "/a b"),
}  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_address(address: str) -> None:
    assert ssh.parse(address) == ADDRESSES[address]


WRONG_ADDRESSES = {
    "ssh://": "names no machine",
    "ssh:pi": "names no machine",
    "ssh://-oProxyCommand=touch%20pwned": "names no machine",
    "ssh://-l@pi": "names no machine",
    "ssh://me:secret@pi": "names no machine",
    "ssh://pi:ssh": "names no machine",
    "ssh://pi/home": "names no machine",
    "ssh://a b": "names no machine",
    "ssh://pi?identity=x": "unknown option 'identity'",
    "ssh://pi?dir=tmp": "wrong dir",
    "ssh://pi?python=": "wrong python",
    "ssh://pi?python=%0Atouch%20pwned": "wrong python",
    "ssh://pi?python": "cannot be read",
}


@pytest.mark.parametrize("address", WRONG_ADDRESSES)
def test_wrong_address(address: str) -> None:
    fails(WRONG_ADDRESSES[address], lambda: open_device(address))


def test_unknown_host_key(sshd: Sshd) -> None:
    (sshd.folder / "nobody").write_text("")
    sshd.configure(known_hosts="nobody")
    error = fails("Host key verification failed", lambda: open_device(uri(sshd)))
    assert error.help is not None and f"ssh -p {sshd.port} " in error.help
    assert (sshd.folder / "nobody").read_text() == ""


def test_changed_host_key(sshd: Sshd) -> None:
    (sshd.folder / "old").write_text(f"[127.0.0.1]:{sshd.port} {(sshd.folder / 'stranger.pub').read_text()}")
    sshd.configure(known_hosts="old")
    fails("Host key verification failed", lambda: open_device(uri(sshd)))


def test_unknown_user_key(sshd: Sshd) -> None:
    sshd.configure(key="stranger")
    error = fails("Permission denied", lambda: open_device(uri(sshd)))
    assert error.help is not None and "ssh-copy-id" in error.help


def test_nobody_listens(sshd: Sshd) -> None:
    fails("Connection refused", lambda: open_device("ssh://127.0.0.1:1"))


def test_folder_that_is_not_there(sshd: Sshd) -> None:
    fails("cannot make a folder in /nowhere", lambda: open_device(f"{sshd.uri}?dir=/nowhere"))


def test_no_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    fails("ssh is not installed", lambda: open_device("ssh://pi"))


def run_hanging(server: Sshd, tmp_path: Path, seconds: float) -> None:
    endless_onnx(tmp_path / "endless.onnx")
    run_artifact(tmp_path / "endless.onnx", [np.zeros((1, 1), "float32")], device=uri(server), timeout_s=seconds)


def test_hang(sshd: Sshd, tmp_path: Path) -> None:
    fails(r"onnxruntime did not finish \S*endless\.onnx within 3 s", lambda: run_hanging(sshd, tmp_path, 3))
    assert not processes_of(sshd.home)


def test_a_runtime_without_progress_is_ended(sshd: Sshd, tmp_path: Path) -> None:
    endless_onnx(tmp_path / "endless.onnx")
    device = open_device(uri(sshd))
    device.stall_s = 2.0
    feeds = [np.zeros((1, 1), "float32")]
    said = r"onnxruntime hangs with \S*endless\.onnx: nothing has happened for 2 s"
    fails(said, lambda: run_artifact(tmp_path / "endless.onnx", feeds, device=device))
    device.cleanup()
    assert not processes_of(sshd.home)


def test_the_runner_without_python_ends_itself(sshd: Sshd, tmp_path: Path) -> None:
    """The one run of a network that takes many seconds, where half a second is allowed."""
    slow = torch.nn.Conv2d(32, 32, 31, padding=15).eval()
    program = torch.export.export(slow, (torch.zeros(1, 32, 128, 128),))
    (tmp_path / "slow.pte").write_bytes(to_edge(program).to_executorch().buffer)
    device = open_device(uri(sshd))
    device.stall_s = 0.5
    feeds = [np.zeros((1, 1, 32, 128, 128), "float32")]
    said = r"executorch hangs with \S*slow\.pte: nothing has happened for 0\.5 s"
    fails(said, lambda: run_artifact(tmp_path / "slow.pte", feeds, device=device))
    device.cleanup()


def test_device_vanishes(sshd: Sshd, tmp_path: Path) -> None:
    """The server and all its sessions die while a job runs."""

    def pull_the_plug() -> None:
        wait_for(lambda: bool(processes_of(sshd.home, "worker.py")))
        sshd.drop()

    plug = threading.Thread(target=pull_the_plug)
    plug.start()
    fails("the connection to .* was lost", lambda: run_hanging(sshd, tmp_path, 60))
    plug.join()


def test_edgekit_is_killed(sshd: Sshd, tmp_path: Path) -> None:
    """Nobody is left to clean up here: the device does it itself."""
    endless_onnx(tmp_path / "endless.onnx")
    script = (
        "import numpy; from edgekit.runtimes import run_artifact; "
        f"run_artifact({str(tmp_path / 'endless.onnx')!r}, [numpy.zeros((1, 1), 'float32')], device={uri(sshd)!r})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    deadline = time.monotonic() + 20
    while not processes_of(sshd.home, "worker.py"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


CUT = 'case "$*" in *"{words}"*) {cut} ;; *) exec {ssh} "$@" ;; esac'
DAMAGE = {
    "cut short on the way there": ("tar -xzf", 'head -c 3000 | {ssh} "$@"'),
    "changed on the way there": ("tar -xzf", 'tr l k | {ssh} "$@"'),
    "cut short on the way back": ("tar -cf", '{ssh} "$@" | head -c 600'),
    "changed on the way back": ("tar -cf", '{ssh} "$@" | tr e f'),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_on_the_way(case: str, sshd: Sshd, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "LAST_WORDS_S", 0.1)  # the connection stands: nothing to wait for
    device = open_device(uri(sshd))
    words, cut = DAMAGE[case]
    sshd.command(CUT.format(words=words, cut=cut.format(ssh=sshd.client), ssh=sshd.client))
    try:
        fails(
            "SHA-256 differs|cannot read",
            lambda: run_artifact(files / "cnn.onnx", stacked(files, "cnn", 1), device=device),
        )
    finally:
        device.cleanup()


@pytest.mark.parametrize("runtime", HERE)
def test_limit_on_file_sizes(runtime: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written there is told, whether files arrive or results are written."""
    if reason := missing_sshd():
        skip(reason)
    (tmp_path / "server").mkdir()
    server = Sshd(tmp_path / "server", limit_kb=200)
    monkeypatch.setenv("PATH", f"{server.bin}{os.pathsep}{os.environ['PATH']}")
    try:
        fails(
            "disk .* is full, or a limit",
            lambda: run_artifact(artifact(files, "cnn", runtime), stacked(files, "cnn", 1000), device=uri(server)),
        )
        wait_for(lambda: not server.left_behind())
        assert server.left_behind() == []
    finally:
        server.stop()


@pytest.mark.parametrize("runtime", HERE)
def test_disk_that_fills_up(runtime: str, sshd: Sshd, files: Path) -> None:
    """The files fit, and the results do not."""
    feeds = stacked(files, "pair", 6000)
    names = {"inputs": INPUTS["pair"], "outputs": OUTPUTS["pair"]}
    size = sum(feed.nbytes for feed in feeds) * 3 // 2
    if runtime == "executorch":
        size += sum(path.stat().st_size + 4096 for path in pte_runner.bundle(os.uname().machine).values())
    with mounted(sshd.home, f"size={size}"):
        fails(
            "disk is full, or a limit there is too low: No space left on device",
            lambda: run_artifact(artifact(files, "pair", runtime), feeds, device=uri(sshd), **names),
        )


def test_wrong_architecture(sshd: Sshd, files: Path, tmp_path: Path) -> None:
    """An interpreter for another processor, and a processor that there is no runner for."""
    foreign = bytearray(Path(shutil.which("true") or "/bin/true").read_bytes())
    foreign[18:20] = (8).to_bytes(2, "little")  # e_machine: MIPS
    (tmp_path / "python").write_bytes(foreign)
    (tmp_path / "python").chmod(0o755)
    address = uri(sshd, f"python={tmp_path}/python")
    fails(
        f"{tmp_path}/python cannot be started on .*[Ee]xec format error",
        lambda: run_artifact(files / "cnn.onnx", stacked(files, "cnn", 1), device=address),
    )
    device = open_device(uri(sshd))
    try:
        device.runner = "riscv64"
        fails(
            "no ExecuTorch runner for riscv64",
            lambda: run_artifact(files / "cnn.pte", stacked(files, "cnn", 1), device=device),
        )
    finally:
        device.cleanup()


def test_folder_that_forbids_programs(sshd: Sshd, files: Path) -> None:
    with mounted(sshd.home, "noexec"):
        error = fails(
            "loader cannot be started on .*Permission denied",
            lambda: run_artifact(files / "cnn.pte", stacked(files, "cnn", 1), device=uri(sshd)),
        )
    assert error.help is not None and "?dir=" in error.help


def test_silent_device(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that takes a command and never answers."""
    device = open_device(uri(sshd))
    sshd.command("exec sleep 60")
    monkeypatch.setattr(shell, "ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(shell, "CLOSE_TIMEOUT_S", 0.5)
    try:
        fails(r"did not answer within 0\.5 s", device.probe)
    finally:
        monkeypatch.undo()
        device.cleanup()


def test_silent_while_results_come_back(sshd: Sshd, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection stands, and not one more byte arrives."""
    device = open_device(uri(sshd))
    sshd.command(CUT.format(words="tar -cf", cut="exec sleep 60", ssh=sshd.client))
    monkeypatch.setattr(shell, "ANSWER_TIMEOUT_S", 2.0)
    monkeypatch.setattr(shell, "CLOSE_TIMEOUT_S", 0.5)
    try:
        fails(
            "did not answer within 2 s",
            lambda: run_artifact(files / "cnn.pte", stacked(files, "cnn", 1), device=device),
        )
    finally:
        monkeypatch.undo()
        device.cleanup()


def test_no_python(sshd: Sshd, files: Path) -> None:
    """A .pte file needs none."""
    feeds = stacked(files, "cnn", 2)
    address = uri(sshd, "python=/nowhere/python3")
    fails("/nowhere/python3 cannot be started", lambda: run_artifact(files / "cnn.tflite", feeds, device=address))
    run_artifact(files / "cnn.pte", feeds, device=address)


def test_missing_runtime(sshd: Sshd, files: Path, bare_python: str) -> None:
    error = fails(
        f"ssh://.*: onnxruntime is not installed for {bare_python}",
        lambda: run_artifact(files / "cnn.onnx", stacked(files, "cnn", 1), device=uri(sshd, f"python={bare_python}")),
    )
    assert error.help == f"{bare_python} -m pip install onnxruntime"


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_corrupt_file(spoil: Spoil, sshd: Sshd, files: Path, tmp_path: Path) -> None:
    """A .pte file that is not whole takes down the runner at most."""
    (tmp_path / "corrupt.pte").write_bytes(spoil((files / "cnn.pte").read_bytes()))
    fails(
        r"executorch .*corrupt\.pte",
        lambda: run_artifact(tmp_path / "corrupt.pte", stacked(files, "cnn", 1), device=uri(sshd)),
    )


FEEDS = {
    "takes 2 inputs .image:float32.1,2,4,4., offset:int64.1.., not 1": [np.zeros((1, 1, 2, 4, 4), "float32")],
    "input 'image' takes float32.1,2,4,4., not float64": [np.zeros((1, 1, 2, 4, 4)), np.zeros((1, 1), "int64")],
    "takes float32.1,2,4,4., not float32.2,4,4.": [np.zeros((1, 2, 4, 4), "float32"), np.zeros((1, 1), "int64")],
}


@pytest.mark.parametrize("message", FEEDS)
def test_wrong_feeds(message: str, sshd: Sshd, files: Path) -> None:
    """The runner says what the Python worker says."""
    with pytest.raises(EdgeKitError, match=rf"^\S*pair\.pte .*{message}"):
        run_artifact(files / "pair.pte", FEEDS[message], device=uri(sshd), inputs=INPUTS["pair"])


def test_runner_measures_as_the_worker_does(sshd: Sshd, files: Path) -> None:
    """As many runs as asked for, a process of its own, threads and cores as asked for."""
    timing = Timing(warmup_runs=2, seconds=0.0, min_runs=5, max_runs=5)
    result = run_artifact(files / "cnn.pte", stacked(files, "cnn", 3), device=uri(sshd), timing=timing)
    assert len(result.latency_ms) == 5 and min(result.latency_ms) > 0
    assert result.load_ms and result.first_ms and result.timing == "measured"
    assert result.peak_rss_bytes is not None and 2_000_000 < result.peak_rss_bytes < 50_000_000  # no torch, no Python
    assert (result.threads, len(result.cpus), result.version) == (1, 1, pte_runner.release())
    longer = Timing(warmup_runs=0, seconds=0.1, min_runs=1, max_runs=1_000_000)
    took = sum(run_artifact(files / "cnn.pte", stacked(files, "cnn", 3), device=uri(sshd), timing=longer).latency_ms)
    assert took > 50
