"""Work on another core: a forked process does a part of a job while this one goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def beside(work: Callable[[], T], useful: bool = True) -> Iterator[Callable[[], T]]:
    """Starts `work` in a copy of this process, and yields what waits for its result, which has to be picklable.

    Where there is one core, where processes cannot be forked safely (macOS, Windows), and where it is not `useful`,
    `work` runs here, when its result is asked for; so it does where the copy ends without one, as when memory ran out.
    What `work` raises is raised where its result is asked for. The copy does not outlive the block.
    """
    if not useful or not _can_fork():
        yield work
        return
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_run, args=(work, theirs), daemon=True)
    process.start()
    theirs.close()

    def result() -> T:
        try:
            done, found, trace = ours.recv()
        except EOFError:
            return work()
        if done:
            return found
        if trace:
            found.add_note(trace)
        raise found

    try:
        yield result
    finally:
        process.kill()
        process.join()
        ours.close()


def _can_fork() -> bool:
    alone = multiprocessing.current_process().daemon  # which may have no processes of its own
    return sys.platform.startswith("linux") and not alone and len(os.sched_getaffinity(0)) > 1


def _run(work: Callable[[], object], channel: Connection) -> None:
    """Sends (True, result, "") or (False, error, traceback), and ends without the clean-up of the process it copies."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)  # the threads of the original are not in its copy
    try:
        channel.send((True, work(), ""))
    except Exception as error:
        trace = traceback.format_exc()
        try:
            channel.send((False, error, trace))
        except Exception:  # whatever an exception that cannot be pickled raises
            channel.send((False, RuntimeError(f"{type(error).__name__}: {error}"), trace))
    finally:
        channel.close()
        os._exit(0)
