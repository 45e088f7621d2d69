"""What long work says while it runs: named steps, each with an optional count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

every_note = ContextVar("every_note", default=False)  # --verbose: notes that are alike are not brought to one line
Advance = Callable[[], None]


class Progress(Protocol):
    """Told about each step of long work."""

    def step(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Opens a step; the yielded function counts one of its `total` units as done."""
        ...


class Silent:
    """Shows nothing: the default of the Python API."""

    @contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Opens a step that nobody sees."""
        yield lambda: None


class Terminal:
    """Shows the running step with its time, and leaves one line for each finished one that took over two seconds.

    Where the console is no terminal, the lines are all that it shows.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Opens a step, shown until it ends."""
        from time import monotonic

        started = monotonic()
        if self.console.is_terminal:
            with self._bar(name, total) as advance:
                yield advance
        else:
            yield lambda: None
        if monotonic() - started >= 2:
            self.console.print(f"{name}: {monotonic() - started:.1f} s", style="dim", markup=False, highlight=False)

    @contextmanager
    def _bar(self, name: str, total: int | None) -> Iterator[Advance]:
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()]
        if total is not None:
            columns += [BarColumn(bar_width=24), MofNCompleteColumn()]
        # Redirecting would show what libraries print, which the command line keeps out of the terminal.
        with Bar(*columns, console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
            task = bar.add_task(name, total=total)
            yield lambda: bar.advance(task)
