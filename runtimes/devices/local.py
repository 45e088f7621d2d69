"""`local:`: a fresh process on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from edgekit.errors import EdgeKitError
from edgekit.util.atomic_files import make_temporary
from edgekit.util.atomic_files import remove as remove_temporary

from . import facts
from .device import STALL_S, Device, Exit, Process, listen

PROBE_TIMEOUT_S = 30


def open_local(uri: str) -> Device:
    """The device for `local:`. Raises EdgeKitError when something follows the colon."""
    if uri not in ("local", "local:"):
        raise EdgeKitError(f"'{uri}' names nothing: local: takes no address", "write local:")
    return LocalDevice("local:", sys.executable)


class LocalDevice:
    """Processes of one Python interpreter on this machine."""

    timing: Literal["measured", "emulated"] = "measured"
    stall_s = STALL_S
    runner: str | None = None

    def __init__(self, uri: str, python: str) -> None:
        """`python` is the path of the interpreter, which stays as written: a virtual environment is found by it."""
        self.uri = uri
        self.python = python
        self._jobs: list[str] = []

    def probe(self) -> dict[str, object]:
        """Facts about this machine and interpreter. Raises EdgeKitError when the interpreter does not answer."""
        try:
            exit_ = self.exec(["sh", "-c", facts.script(self.python, tempfile.gettempdir())], PROBE_TIMEOUT_S)
        except TimeoutError as error:
            raise EdgeKitError(f"{self.python} did not answer within {PROBE_TIMEOUT_S} s") from error
        found = facts.read(exit_.output)
        if "python" not in found:
            raise EdgeKitError(f"{self.python} does not work as a Python interpreter", "start it by hand to see why")
        return found

    def push(self, files: Mapping[str, Path]) -> str:
        """A temporary folder with a link to every file: nothing is copied on one machine."""
        job = str(make_temporary())
        self._jobs.append(job)
        for name, path in files.items():
            (Path(job) / name).symlink_to(path.resolve())
        return job

    def exec(self, argv: Sequence[str], timeout_s: float) -> Exit:
        """Run a command in a process group of its own. Raises TimeoutError or Stalled when it was stopped."""
        try:
            process = self._start(argv)
        except OSError as error:
            raise EdgeKitError(f"cannot start {argv[0]}: {error.strerror}") from error
        try:
            output, _ = listen(process, timeout_s)
        except BaseException:  # Ctrl-C too: it does not reach a process group of its own
            _kill_group(process)
            raise
        finally:
            if process.stdout is not None:
                process.stdout.close()
        return Exit(process.wait(), output.decode(errors="replace"))

    def _start(self, argv: Sequence[str]) -> Process:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

    def pull(self, job: str, names: Sequence[str], into: Path) -> None:
        """Move the files."""
        for name in names:
            source = Path(job) / name
            if source.is_file():
                shutil.move(source, into / name)

    def remove(self, folder: str) -> None:
        """Remove one folder."""
        self._jobs.remove(folder)
        remove_temporary(Path(folder))

    def cleanup(self) -> None:
        """Remove the job folders."""
        while self._jobs:
            remove_temporary(Path(self._jobs.pop()))


def _kill_group(process: Process) -> None:
    """End the process and its children."""
    for kill in (os.killpg, os.kill):  # it may not lead its group yet
        with contextlib.suppress(ProcessLookupError):
            kill(process.pid, signal.SIGKILL)
    process.wait()
