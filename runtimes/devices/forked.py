"""A copy of this process, which has imported most of what a runtime needs: seconds less than a fresh one."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from edgekit.runtimes import worker
from edgekit.util.forking import ENDING, die_with_parent

from .device import Process
from .local import LocalDevice


class ForkedDevice(LocalDevice):
    """This machine, where each job runs in a copy of this process, which must have no other thread. It runs no probe.

    For Linux, and for checks alone: what is timed here, and the memory that it takes, are not those of a fresh process.
    """

    def __init__(self) -> None:
        """The interpreter is this one."""
        super().__init__("local:", sys.executable)

    def _start(self, argv: Sequence[str]) -> Process:
        """Run the worker's command, `python worker.py JOBDIR`."""
        reads, writes = os.pipe()
        pid = os.fork()
        if not pid:
            _work(Path(argv[-1]), writes)
        os.close(writes)
        return _Copy(pid, os.fdopen(reads, "rb"))


class _Copy:
    """A forked process, as subprocess.Popen knows one."""

    stderr: IO[bytes] | None = None

    def __init__(self, pid: int, stdout: IO[bytes] | None) -> None:
        self.pid, self.stdout = pid, stdout
        self._code: int | None = None

    def wait(self) -> int:
        """Wait for its end."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code


def _work(job: Path, output: int) -> None:
    """Run the worker on the folder `job`, print into `output`, and end without the clean-up of the process copied."""
    code = 1
    try:
        faulthandler.disable()
        die_with_parent(signal.SIGKILL)
        os.setsid()
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for given, standard in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(given, standard)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        code = worker.main(job)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
