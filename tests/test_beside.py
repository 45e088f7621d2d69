"""Work in a forked process: its result, its errors, and its end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from edgekit.beside import beside
from edgekit.errors import EdgeKitError

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


@forks
def test_where_it_is_killed_the_work_is_done_here() -> None:
    here = os.getpid()

    def work() -> int:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
        return os.getpid()

    with beside(work) as result:
        assert result() == here


@forks
def test_it_does_not_outlive_the_block(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt), beside(work):
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
