"""Watchdog: work on a file from elsewhere, in a copy of this process with limits of memory and time.

Whatever becomes of the copy, a crash, a hang or memory that runs out, is one EdgeKitError here. It is no sandbox: what
a file may ask for is screened by name before (see `torch_archives`, `unpickle` and `onnx_graphs`).
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar

from edgekit.errors import EdgeKitError
from edgekit.screening import limits
from edgekit.screening.limits import Budget
from edgekit.util.forking import die_with_parent

T = TypeVar("T")

SMALL_FILE = 4096  # bytes: tempfile tries a folder by writing into it
MEMORY_RAN_OUT = (
    "can't allocate memory", "bad_alloc", "Failed to allocate memory", "Unable to allocate", "bfc_arena",
    "MemoryAllocationFailed",
)  # fmt: skip
_inside = False


def is_inside() -> bool:
    """Whether this process is such a copy, which works in one thread."""
    return _inside


def works() -> bool:
    """Whether work can be watched: in copies of a process on Linux alone, and not in a copy once more."""
    return sys.platform.startswith("linux") and not _inside


def rehearse(work: Callable[[], object], what: str, budget: Budget) -> None:
    """Does `work` in a copy of this process and throws away what it returns, before it is done here.

    Raises what `work` raises, and EdgeKitError where the copy crashes, hangs, or takes more memory than it may.
    """

    def rehearsal() -> None:
        work()

    if works():
        _watched(rehearsal, what, budget)


def guarded(work: Callable[[], T], what: str, budget: Budget) -> T:
    """Returns what `work` returns, which has to be picklable, from a copy of this process; raises as `rehearse` does.

    Where no copies can be watched, `work` runs here.
    """
    return _watched(work, what, budget) if works() else work()


def _watched(work: Callable[[], T], what: str, budget: Budget) -> T:
    for stream in (sys.stdout, sys.stderr):  # else the copy would write what waits in them once more
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()
    reads, writes = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reads)
        _work(work, writes, budget)
    os.close(writes)
    status = None
    try:
        sent = _received(reads, time.monotonic() + budget.deadline)
        if sent is None:
            raise _stopped(what, budget)
        status = os.waitpid(pid, 0)[1]
    finally:
        os.close(reads)
        if status is None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if not sent:
        raise _death(what, os.waitstatus_to_exitcode(status), budget)
    done, found, trace = pickle.loads(sent)
    if done:
        return found
    if ran_out_of_memory(found):
        raise _greedy(what, budget) from None
    if trace:
        found.add_note(trace)
    raise found


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error tells, in the words of any library here, that there was not enough memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in MEMORY_RAN_OUT)


def _received(channel: int, deadline: float) -> bytes | None:
    """All that is sent until the other end closes; None where that is not before the deadline."""
    parts: list[bytes] = []
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([channel], [], [], left)[0]:
            return None
        part = os.read(channel, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)


def _work(work: Callable[[], object], channel: int, budget: Budget) -> NoReturn:
    """Sends (True, result, "") or (False, error, traceback), and ends without the clean-up of the process it copies."""
    global _inside
    _inside = True
    try:
        faulthandler.disable()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is interrupted ends this one
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        die_with_parent(signal.SIGKILL)
        limit_process(budget)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # the threads of the original are not in its copy
        try:
            told = pickle.dumps((True, work(), ""))
        except EdgeKitError as error:
            told = pickle.dumps((False, EdgeKitError(error.what, error.help), ""))
        except MemoryError:
            told = pickle.dumps((False, MemoryError(), ""))
        except BaseException as error:
            told = _pickled(error)
        while told:
            told = told[os.write(channel, told) :]
    finally:
        os._exit(0)


def _pickled(error: BaseException) -> bytes:
    trace = traceback.format_exc()
    try:
        told = pickle.dumps((False, error, trace))
        pickle.loads(told)
    except Exception:  # whatever an exception that cannot be pickled, or read again, raises
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}"), trace))
    return told


def limit_process(budget: Budget) -> None:
    """Holds this process to `budget`, and to writing neither files of any size nor core dumps."""
    import resource

    for kind, most in (
        (resource.RLIMIT_DATA, _data_bytes() + budget.memory),
        (resource.RLIMIT_CPU, max(1, round(budget.seconds))),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, SMALL_FILE),
    ):
        _, hard = resource.getrlimit(kind)
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(kind, (soft, hard))


def _data_bytes() -> int:
    """The bytes of this process that its limit of data counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))


def _death(what: str, code: int, budget: Budget) -> EdgeKitError:
    """The error for a copy that ended without a word."""
    if code == -signal.SIGXCPU:
        return _stopped(what, budget)
    if code == -signal.SIGKILL:
        return _greedy(what, budget)
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return EdgeKitError(f"{what} crashed the process that tried it ({how})", limits.UNTRUSTED)


def _stopped(what: str, budget: Budget) -> EdgeKitError:
    return EdgeKitError(
        f"{what} was given up: one run of it takes more than {budget.seconds:.0f} s",
        f"give smaller inputs; if you trust the file, allow it more: {limits.SECONDS_VARIABLE}=600",
    )


def _greedy(what: str, budget: Budget) -> EdgeKitError:
    return EdgeKitError(
        f"{what} was given up: it asks for more than {budget.memory / 1e9:.1f} GB of memory",
        limits.MORE_MEMORY,
    )
