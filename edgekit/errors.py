"""The one error that EdgeKit raises for everything its user can mend."""

from __future__ import annotations

from collections.abc import Sequence

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


def reason(error: BaseException) -> str:
    """Returns the first line of what an error of another library says, or its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:MOST_SHOWN]
