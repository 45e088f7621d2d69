"""What a device is: a place that takes files, runs a command on them, and gives files back."""

from __future__ import annotations

import os
import re
import selectors
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Literal, NamedTuple, Protocol, runtime_checkable

STALL_S = 20.0
GRACE_S = (
    4.0  # how long after the time that it allowed itself a job that its own watch has not ended is ended from here
)
ALLOWS = re.compile(rb"^edgekit allows ([\d.]+) s\r?\n", re.MULTILINE)
ALLOWS_BYTES = 40  # of one such line, at most


class Stalled(TimeoutError):
    """A job went on for longer than it allowed itself, and its own watch did not end it: its process stands still."""


class Exit(NamedTuple):
    """How a command ended: its exit code (negative: minus the signal that killed it), and what it printed."""

    code: int
    output: str


class Process(Protocol):
    """A running command, as subprocess.Popen knows it."""

    pid: int
    stdout: IO[bytes] | None
    stderr: IO[bytes] | None

    def wait(self) -> int:
        """Wait for its end; how it ended, as in Exit."""
        ...


class Device(Protocol):
    """One transport to one machine. `cleanup` removes everything that it put there.

    Every method raises EdgeKitError when the device cannot be reached or does not take the files.
    """

    uri: str
    python: str
    """The Python interpreter there."""
    timing: Literal["measured", "emulated"]
    """Whether a millisecond there is one of the machine's, or of an emulator's, which says nothing."""
    stall_s: float
    """How long a job there may go without any progress, in seconds, before it counts as hanging."""
    runner: str | None
    """The machine (`uname -m`) whose C++ runner takes .pte files there; None where Python's executorch does."""

    def probe(self) -> dict[str, object]:
        """Facts about the machine, see `facts.py`."""
        ...

    def push(self, files: Mapping[str, Path]) -> str:
        """Put `files` (name there → path here) into a new folder; its path there."""
        ...

    def exec(self, argv: Sequence[str], timeout_s: float) -> Exit:
        """Run a command and wait. Raises TimeoutError after `timeout_s`, when nothing of it runs any more.

        A command may print lines such as `edgekit allows 20 s`: if it then neither ends nor allows itself more time
        within so many seconds, Stalled is raised.
        """
        ...

    def pull(self, job: str, names: Sequence[str], into: Path) -> None:
        """Bring files of a folder into the folder `into`; names that are not there are left out."""
        ...

    def remove(self, folder: str) -> None:
        """Remove one folder that `push` made."""
        ...

    def cleanup(self) -> None:
        """Remove every folder, and let go of the machine."""
        ...


@runtime_checkable
class Emulator(Device, Protocol):
    """A device whose processor is emulated: its milliseconds say nothing, but it can count instructions."""

    def counting(self) -> AbstractContextManager[Callable[[], list[int]]]:
        """While open, `exec` counts. The function gives the instructions so far at every call of getppid in a command.

        Raises EdgeKitError where the emulator cannot count.
        """
        ...


def listen(process: Process, timeout_s: float) -> tuple[bytes, bytes]:
    """Read what a process prints until it ends: its standard output, without the times it allows itself, and errors.

    Raises TimeoutError after `timeout_s`, and Stalled as `Device.exec` does; the process then still runs.
    """
    said = {pipe: bytearray() for pipe in (process.stdout, process.stderr) if pipe is not None}
    end = limit = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for pipe in said:
            selector.register(pipe, selectors.EVENT_READ, said[pipe])
        while selector.get_map():
            now = time.monotonic()
            if now >= min(end, limit):
                raise (Stalled if limit < end else TimeoutError)(f"it ran longer than {timeout_s:g} s")
            for key, _ in selector.select(min(end, limit) - now):
                block = os.read(key.fd, 1 << 16)
                if not block:
                    selector.unregister(key.fileobj)
                    continue
                key.data.extend(block)
                if key.fileobj is process.stdout:
                    allowed = ALLOWS.findall(key.data[-len(block) - ALLOWS_BYTES :])
                    limit = time.monotonic() + float(allowed[-1]) + GRACE_S if allowed else limit
    process.wait()
    output, errors = (bytes(said[pipe]) if pipe is not None else b"" for pipe in (process.stdout, process.stderr))
    return ALLOWS.sub(b"", output), errors
