"""What a device is: a place that takes files, runs a command on them, and gives files back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

STALL_S = 20.0


class Exit(NamedTuple):
    """How a command ended: its exit code (negative: minus the signal that killed it), and what it printed."""

    code: int
    output: str


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
        """Run a command and wait. Raises TimeoutError after `timeout_s`, when nothing of it runs any more."""
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

        The list is empty where the emulator cannot count.
        """
        ...
