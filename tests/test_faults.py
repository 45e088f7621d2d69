"""Kills, full places and strange surroundings: what was left goes with the next command, and nothing traces back.

`python tests/test_faults.py [export] [compare] [prune]` kills each of them, or those named, at ten random moments.
"""

# ruff: noqa: E501 (a case to a line)

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import NET, command, environment, samples, tree

from edgekit.errors import EdgeKitError
from edgekit.measuring import baseline_cache
from edgekit.quant.pruning import distillation
from edgekit.runtimes import cache
from edgekit.util import atomic_files

HOLD = """
import sys, time
from pathlib import Path
from edgekit.util import atomic_files
with atomic_files.new_folder(Path("out"), {"a"}) as made, atomic_files.temporary_folder() as scratch:
    (made / "a").write_text("half")
    Path(scratch, "b").write_text("half")
    written = atomic_files._claim(Path.cwd(), ".file-", ".partial", file=True)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


@pytest.fixture
def holder(place: Path) -> Iterator[subprocess.Popen[str]]:
    """A process amid its writing, in `place`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, env=environment(TMPDIR=str(place / "tmp"))
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def use(place: Path) -> None:
    """Writes what the process of `holder` writes too."""
    with atomic_files.new_folder(place / "out", {"a"}) as made, atomic_files.temporary_folder():
        (made / "a").write_text("whole")
    atomic_files.write(place / "file", b"whole")


def test_what_a_killed_process_left_goes_with_the_next_one(place: Path, holder: subprocess.Popen[str]) -> None:
    use(place)
    others = [name for name in tree(place) if name not in ("file", "out", "out/a", "tmp")]
    assert len(others) == 5, others  # it lives: its folders, and the files in them, are left alone
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    use(place)
    assert tree(place) == ["file", "out", "out/a", "tmp"]
    assert (place / "out" / "a").read_text() == "whole"


def test_a_kill_between_the_two_renames_is_put_right(place: Path) -> None:
    use(place)
    (place / "out").rename(place / ".out-0123456789abcdef.old")
    with pytest.raises(RuntimeError), atomic_files.new_folder(place / "out", {"a"}):
        raise RuntimeError  # whatever became of the next one
    assert tree(place) == ["file", "out", "out/a", "tmp"]


def test_folders_of_others_are_left_alone(place: Path) -> None:
    for name in ("edgekit-abcdefgh", "edgekit-0123456789abcdeg", "other-0123456789abcdef"):
        (place / "tmp" / name).mkdir()
    (place / "tmp" / "edgekit-0123456789abcdef").symlink_to(place / "tmp" / "edgekit-abcdefgh")
    before = tree(place)
    with atomic_files.temporary_folder() as folder:
        assert Path(folder).name in [Path(name).name for name in tree(place)]
    assert tree(place) == before


def test_processes_that_write_the_same_file_and_folder(place: Path) -> None:
    writers = []
    for number in range(4):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                for _ in range(20):
                    atomic_files.write(place / "file", bytes([number]) * 100_000)
                    with atomic_files.new_folder(place / "out", {"a"}) as made:
                        (made / "a").write_bytes(bytes([number]) * 1000)
                code = 0
            finally:
                os._exit(code)
        writers.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in writers]
    assert codes == [0, 0, 0, 0]
    assert len(set((place / "file").read_bytes())) == 1
    assert len((place / "file").read_bytes()) == 100_000
    assert tree(place) == ["file", "out", "out/a", "tmp"]


def as_nobody(work: object) -> int:
    """The exit code of `work` as a user without rights; skips where this one cannot become another."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            code = work()  # type: ignore[operator]
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_user_who_may_not_write_is_told(place: Path) -> None:
    def work() -> int:
        tempfile.tempdir = "/tmp"
        told = 0
        for write in (
            lambda: atomic_files.write(place / "file", b""),
            lambda: atomic_files.check_writable(place / "file"),
            use_folder,
        ):
            try:
                write()
            except EdgeKitError as error:
                told += "Permission denied" in error.what
        with atomic_files.temporary_folder():
            pass
        return 0 if told == 3 else 2

    def use_folder() -> None:
        with atomic_files.new_folder(place / "out", set()):
            pass

    assert as_nobody(work) == 0
    assert tree(place) == ["tmp"]


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory")))
    assert cache.root().name == f"edgekit-cache-{os.getuid()}"


# A locale without UTF-8, closed streams, warnings that are errors, no home: → the arguments, and the surroundings.
SURROUNDINGS = {
    "an export": (
        ("export", "net.py:make", "--target", "x86", "--precision", "fp32", "--format", "onnx", "--data", "data.npz"),
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONWARNINGS": "error", "HOME": "/nonexistent"},
        "",
    ),
    "closed standard output": (("targets",), {}, ">&-"),
    "all streams closed": (("targets",), {}, "<&- >&- 2>&-"),
    "a full standard output": (("targets",), {}, ">/dev/full"),
    "no such model, in ASCII": (("inspect", "none-é.pt"), {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_strange_surroundings(name: str, place: Path) -> None:
    args, given, streams = SURROUNDINGS[name]
    (place / "net.py").write_text(NET)
    np.savez(place / "data.npz", **samples(8))
    line = " ".join(f"'{word}'" for word in command(*args))
    kept = {key: value for key, value in environment(TMPDIR=str(place / "tmp"), **given).items() if "CACHE" not in key}
    done = subprocess.run(["sh", "-c", f"{line} {streams}"], env=kept, capture_output=True, timeout=300)
    said = done.stderr.decode("latin-1")
    assert "Traceback" not in said, said
    assert done.returncode == (1 if name.startswith(("a full", "no such")) else 0), said
    assert tree(place / "tmp") == []


def everything(place: Path, formats: str, user: dict[str, Any], *before: str, **env: str) -> None:
    """Exports, compares and verifies in `place` as `user`, after the words `before`; nothing else may be left there."""
    export = ("export", "net.py:make", "--target", "x86", "--precision", "fp32", "--data", "data.npz", "--out", "out")
    (place / "net.py").write_text(NET)
    np.savez(place / "data.npz", **samples(8))
    told = {key: value for key, value in environment(**env).items() if "CACHE" not in key}
    for args in (
        (*export, "--format", formats),
        ("compare", "net.py:make", "out/net-x86/model.onnx", "--data", "data.npz", "--rounds", "1"),
        ("verify", "out/net-x86"),
    ):
        done = subprocess.run([*before, *command(*args)], cwd=place, env=told, capture_output=True, text=True, **user)
        assert done.returncode == 0, (args, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
    left = [name for name in tree(place) if "__pycache__" not in name and not name.startswith("out/net-x86/")]
    assert left == ["data.npz", "net.py", "out", "out/net-x86"]


def test_a_user_without_rights_exports_compares_and_verifies() -> None:
    """In a folder of theirs, with a home that they may not write to; root becomes nobody for it."""
    with (
        tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryDirectory() as home,
        tempfile.TemporaryDirectory() as tmp,
    ):
        user: dict[str, Any] = {}
        if not os.geteuid():
            user = {"user": 65534, "group": 65534, "extra_groups": []}
            for folder in (name, tmp):
                os.chown(folder, 65534, 65534)
        Path(home).chmod(0o555)
        try:
            subprocess.run(
                [sys.executable, "-c", "import numpy, edgekit"],
                env=environment(),
                check=True,
                capture_output=True,
                **user,
            )
        except (PermissionError, subprocess.CalledProcessError):
            pytest.skip("the user nobody may not read this Python")
        everything(Path(name), "onnx", user, HOME=home, TMPDIR=tmp)
        assert [entry for entry in tree(Path(tmp)) if not entry.startswith("edgekit-cache-")] == []
        assert tree(Path(home)) == []


def test_a_machine_without_shared_memory(place: Path) -> None:
    namespace = ("unshare", "-m") if not os.geteuid() else ("unshare", "-Urm")
    hide = (*namespace, "sh", "-c", 'mount -t tmpfs -o ro,size=4k none /dev/shm && exec "$@"', "sh")
    if not shutil.which("unshare") or subprocess.run([*hide, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount anything, even for processes of their own")
    (place / "work").mkdir()
    everything(
        place / "work", "executorch,onnx", {}, *hide, TMPDIR=str(place / "tmp"), HOME=str(place / "tmp" / "home")
    )
    assert [entry for entry in tree(place / "tmp") if entry.partition("/")[0] != "home"] == []


CHECKPOINTS = {
    "empty": b"",
    "text": b"not a checkpoint",
    "a list": [1, 2],
    "a map": {"a": 1},
    "of another": {"key": "x"},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_is_none_is_told(name: str, place: Path) -> None:
    content = CHECKPOINTS[name]
    if isinstance(content, bytes):
        (place / "c.pt").write_bytes(content)
    else:
        torch.save(content, place / "c.pt")
    training = object.__new__(distillation._Training)
    training.device, training.key = torch.device("cpu"), "mine"
    with pytest.raises(EdgeKitError, match=r"no checkpoint|of another") as told:
        training.restore(place / "c.pt", "training")
    assert "weights_only" not in str(told.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x" * 100, b"PK\x05\x06" + bytes(18)])
def test_a_damaged_cache_is_measured_anew(content: bytes, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(baseline_cache, "folder", lambda: place)
    (place / "k.npz").write_bytes(content)
    assert baseline_cache.recall("k") is None


def main() -> None:
    """Kills commands at random moments, runs them again, and looks at what is left."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "tmp").mkdir()
        (place / "net.py").write_text(NET)
        np.savez(place / "data.npz", **samples())
        base = ("net.py:make", "--data", "data.npz")
        export = ("export", *base, "--target", "x86", "--precision", "int8", "--out", "out")
        jobs = {
            "export": export,
            "compare": ("compare", "net.py:make", "out/net-x86", "--data", "data.npz", "--no-cache"),
            "prune": ("prune", *base, "--ratio", "0.3", "--epochs", "1", "--format", "onnx", "--out", "out"),
        }
        env = environment(TMPDIR=str(place / "tmp"), HOME=str(place))
        wrong = 0
        subprocess.run(command(*export), cwd=place, env=env, check=True, capture_output=True)
        for job in sys.argv[1:] or jobs:
            args = jobs[job]
            started = time.monotonic()
            subprocess.run(command(*args), cwd=place, env=env, check=True, capture_output=True)
            longest = time.monotonic() - started
            for moment in range(10):
                process = subprocess.Popen(command(*args), cwd=place, env=env, stdout=-3, stderr=-3)
                time.sleep(rng.uniform(0, longest))
                process.kill()
                process.wait()
                again = subprocess.run(command(*args), cwd=place, env=env, capture_output=True, text=True)
                left = [path for path in tree(place) if "/." in f"/{path}" and not path.startswith((".cache", ".nv"))]
                left += tree(place / "tmp")
                bad = again.returncode != 0 or left or "Traceback" in again.stderr
                wrong += bool(bad)
                print(f"{job} {moment}: {'WRONG ' + again.stderr[-500:] + str(left) if bad else 'fine'}", flush=True)
        shutil.rmtree(place / "out", ignore_errors=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
