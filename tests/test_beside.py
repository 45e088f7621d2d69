"""Work in a forked process: its result, its errors, and its end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import EdgeKitError
from edgekit.util.forking import beside, deal, is_copy, share

forks = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)


@forks
def test_the_result_comes_from_another_process() -> None:
    with beside(os.getpid) as result:
        assert result() != os.getpid()


def test_what_is_of_no_use_there_is_done_here() -> None:
    with beside(os.getpid, useful=False) as result:
        assert result() == os.getpid()


def test_one_core_does_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    with beside(os.getpid) as result:
        assert result() == os.getpid()


def test_a_process_that_may_have_none_does_it_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    with beside(os.getpid) as result:
        assert result() == os.getpid()


def test_errors_are_raised_where_the_result_is_asked_for() -> None:
    def fail() -> None:
        raise EdgeKitError("no lowering for 'x'", "report this model")

    with beside(fail) as result, pytest.raises(EdgeKitError) as caught:
        result()
    assert (caught.value.what, caught.value.help) == ("no lowering for 'x'", "report this model")


@forks
def test_errors_that_cannot_be_sent_are_told() -> None:
    class Odd(Exception):
        pass

    def fail() -> None:
        raise Odd("of a class that only the other process has")

    with beside(fail) as result, pytest.raises(RuntimeError, match="Odd: of a class") as caught:
        result()
    assert "in fail" in caught.value.__notes__[0]


class Picky(Exception):
    """Can be pickled, and not be read again."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message} ({code})")


@forks
def test_errors_that_cannot_be_read_again_are_told() -> None:
    def fail() -> None:
        raise Picky(3, "no such op")

    with beside(fail) as result, pytest.raises(RuntimeError, match=r"Picky: no such op \(3\)"):
        result()


@forks
def test_where_it_is_killed_amid_its_answer_the_work_is_done_here() -> None:
    def answer() -> bytes:
        if os.getpid() != here:  # more than a pipe holds: it waits to be read
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return bytes(1 << 22)

    here = os.getpid()
    with beside(answer) as result:
        time.sleep(0.6)
        assert result() == bytes(1 << 22)


@forks
def test_where_it_is_killed_the_work_is_done_here() -> None:
    here = os.getpid()

    def work() -> int:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
        return os.getpid()

    with beside(work) as result:
        assert result() == here


def interrupted(work: Callable[[], None], begun: Path) -> None:
    """Interrupts the block around `work` when that has written something into the file `begun`."""
    with pytest.raises(KeyboardInterrupt), beside(work):
        while not begun.is_file() or not begun.read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt


@forks
def test_it_does_not_outlive_the_block(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    interrupted(work, tmp_path / "pid")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@forks
def test_it_cleans_up_after_itself_where_nobody_waits(tmp_path: Path) -> None:
    def work() -> None:
        try:
            (tmp_path / "begun").write_text("yes")
            time.sleep(60)
        finally:
            (tmp_path / "begun").unlink()

    interrupted(work, tmp_path / "begun")
    assert not (tmp_path / "begun").exists()


@forks
def test_a_copy_that_cannot_be_interrupted_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.util.forking.GRACE_S", 0.1)

    def work() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # as a long call of a C library does
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    interrupted(work, tmp_path / "pid")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@forks
def test_it_is_known_which_processes_are_copies() -> None:
    """A worker of a user's own pool is none: it may have threads."""
    assert not is_copy()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(is_copy) is False
    with beside(is_copy) as result:
        assert result() is True


class Kept:
    """Items, how often they were read, and what each side took."""

    def __init__(self, count: int) -> None:
        self.count, self.reads = count, 0
        self.here: list[int] = []
        self.there: list[int] = []

    def __iter__(self) -> Iterator[int]:
        self.reads += 1
        yield from range(self.count)

    def dealt(self, useful: bool = True) -> tuple[list[int], int]:
        return deal(self, self.here.append, self.there.append, lambda: (self.there, os.getpid()), useful)


@pytest.mark.parametrize("useful", [pytest.param(True, marks=forks), False])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_items_are_dealt_in_turn(count: int, useful: bool) -> None:
    kept = Kept(count)
    there, where = kept.dealt(useful)
    assert (kept.here, there, kept.reads) == ([*range(0, count, 2)], [*range(1, count, 2)], 1)
    assert (where != os.getpid()) == useful


@pytest.mark.parametrize("forked", [pytest.param(True, marks=forks), False])
def test_items_are_shared(forked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not forked:
        monkeypatch.setattr("edgekit.util.forking.can_fork", lambda: False)
    kept = Kept(5)
    then: list[int] = []
    result, meanwhile = (lambda: (kept.there, os.getpid())), (lambda: then.extend(kept.here))
    there, where = share(kept, kept.here.append, kept.there.append, result, meanwhile)
    assert (kept.here, there, kept.reads) == ([*range(5)], [*range(5)], 1)
    assert (where != os.getpid()) == forked
    assert then == [*range(5)]  # all that was done before


@forks
def test_many_large_items_are_dealt() -> None:
    items = [np.full(1 << 18, number) for number in range(9)]
    seen: list[np.ndarray] = []
    total = deal(items, lambda item: None, seen.append, lambda: sum(int(item[0]) for item in seen))
    assert total == 1 + 3 + 5 + 7


@forks
def test_what_a_dealt_item_raises_there_is_raised_here() -> None:
    def fail(item: int) -> None:
        raise EdgeKitError("no more", f"item {item}")

    with pytest.raises(EdgeKitError, match="no more") as caught:
        deal(range(1000), lambda item: None, fail, list)
    assert caught.value.help == "item 1"


@forks
def test_items_of_a_copy_that_is_killed_are_taken_here() -> None:
    here, kept = os.getpid(), Kept(1000)

    def take(item: int) -> None:
        if os.getpid() != here and item > 100:
            os.kill(os.getpid(), signal.SIGKILL)
        kept.there.append(item)

    found = deal(kept, kept.here.append, take, lambda: kept.there)
    assert (kept.here, found, kept.reads) == ([*range(0, 1000, 2)], [*range(1, 1000, 2)], 2)
