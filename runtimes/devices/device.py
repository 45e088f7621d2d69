"""What a device is: a place that takes files, runs a command on them, and gives files back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol


class Exit(NamedTuple):
    """How a command ended: its exit code (negative: minus the signal that killed it), and what it printed."""

    code: int
    output: str


class Device(Protocol):
    """One transport to one machine. `cleanup` removes everything that it put there."""

    uri: str
    python: str
    """The Python interpreter there."""

    def probe(self) -> dict[str, object]:
        """Facts about the machine: python, machine, system, cpu, cpus. Raises EdgeKitError when it does not answer."""
        ...

    def push(self, files: Mapping[str, Path]) -> str:
        """Put `files` (name there → path here) into a new job folder; its path there."""
        ...

    def exec(self, argv: Sequence[str], timeout_s: float) -> Exit:
        """Run a command and wait. Raises TimeoutError after `timeout_s`, when nothing of it runs any more."""
        ...

    def pull(self, job: str, names: Sequence[str], into: Path) -> None:
        """Bring files of a job folder into the folder `into`; names that are not there are left out."""
        ...

    def cleanup(self) -> None:
        """Remove every job folder."""
        ...
