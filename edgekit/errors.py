"""The one error that EdgeKit raises for everything its user can mend."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

MOST_SHOWN = 200  # characters of what another library says


class EdgeKitError(Exception):
    """What went wrong, and what to do about it, worded for the person at the keyboard.

    `what` is one sentence without a trailing period; `help` is the next step, or None where `what` already
    says it all. The command line prints both and exits with 1. Any other exception is a bug in EdgeKit.
    """

    def __init__(self, what: str, help: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.help = help

    def __str__(self) -> str:
        return f"{self.what}\n  help: {self.help}" if self.help else self.what


class MissingInputs(EdgeKitError):
    """A model takes more inputs than are given: `names`."""

    def __init__(self, what: str, help: str | None = None, names: Sequence[str] = ()) -> None:
        super().__init__(what, help)
        self.names = tuple(names)


class NotFaithful(EdgeKitError):
    """No file of a precision computes what the model computes; another precision may."""


class UsageError(EdgeKitError):
    """A value that an option does not know, such as a target; the command line exits with 2 instead of 1."""


class SeveralErrors(EdgeKitError):
    """What several checks found, each with its own help: told together, so that one run shows all there is to mend."""

    def __init__(self, errors: Sequence[EdgeKitError]) -> None:
        super().__init__("; ".join(error.what for error in errors), "; ".join(e.help for e in errors if e.help) or None)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(map(str, self.errors))

    def __reduce__(self) -> tuple[type[SeveralErrors], tuple[Sequence[EdgeKitError]]]:
        return SeveralErrors, (self.errors,)


Given = ParamSpec("Given")
Found = TypeVar("Found")


class Checks:
    """Runs checks one after another, keeps what they raise, and raises all of it in the end."""

    def __init__(self) -> None:
        self.errors: list[EdgeKitError] = []

    def run(self, check: Callable[Given, Found], *args: Given.args, **kwargs: Given.kwargs) -> Found | None:
        """Returns what `check` returns; None where it raises an EdgeKitError, which is kept."""
        try:
            return check(*args, **kwargs)
        except EdgeKitError as error:
            self.errors += single_errors(error)
            return None

    def finish(self) -> None:
        """Raises what was kept: the one error as it is, or a SeveralErrors."""
        if self.errors:
            raise self.errors[0] if len(self.errors) == 1 else SeveralErrors(self.errors)


def single_errors(error: EdgeKitError) -> tuple[EdgeKitError, ...]:
    """Returns the errors that `error` is made of, or it alone."""
    return error.errors if isinstance(error, SeveralErrors) else (error,)


def user_line(error: BaseException) -> str | None:
    """Returns `FILE line N` of the user's own innermost frame that an error came through, None where there is none."""
    ours, theirs = str(Path(__file__).parents[1]), sys.base_prefix + "/lib"
    library = ("<", theirs, f"{ours}/edgekit/", f"{ours}/quant/", f"{ours}/exporters/", f"{ours}/runtimes/")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(library) and "site-packages" not in frame.filename:
            return f"{Path(frame.filename).name} line {frame.lineno}"
    return None


def reason(error: BaseException) -> str:
    """Returns the line that tells what an error of another library is about, or its class where it says nothing.

    That is the first line; of TorchScript's errors, which begin with a traceback, the last, and where that names
    a class alone, the line of code before it.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if not any(line.startswith("Traceback of TorchScript") for line in lines):
        return lines[0][:MOST_SHOWN]
    said = lines[-1]
    marks = [index for index, line in enumerate(lines) if line.endswith("<--- HERE")]
    if said.endswith(":") and marks:
        said += f" in {lines[marks[-1] - 1].strip()!r}"
    return said[:MOST_SHOWN]
