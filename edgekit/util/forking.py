"""Forks: a copy of this process does a part of a job on another core, while this one goes on."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")
Item = TypeVar("Item")

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
GRACE_S = 3.0
_is_copy = False


def deal(
    items: Iterable[Item],
    here: Callable[[Item], object],
    there: Callable[[Item], object],
    result: Callable[[], T],
    useful: bool = True,
) -> T:
    """Gives items to `here` and `there` in turn, and returns what `result` then tells of the latter's.

    `there` and `result` run beside this process, as `beside` does it, and else in it. `items` are read here alone; only
    where the copy ends without a result, those of `there` are read once more. They have to be picklable.
    """
    if not useful or not can_fork():
        for number, item in enumerate(items):
            (there if number % 2 else here)(item)
        return result()
    return _feed(items, here, there, result, 2)


def share(
    items: Iterable[Item],
    here: Callable[[Item], object],
    there: Callable[[Item], object],
    result: Callable[[], T],
    meanwhile: Callable[[], object],
) -> T:
    """Gives each item to both `here` and `there`, and does all else as `deal` does.

    After the last one `meanwhile` is done here, beside `result`.
    """
    if not can_fork():
        for item in items:
            here(item)
            there(item)
        meanwhile()
        return result()
    return _feed(items, here, there, result, 1, meanwhile)


def _feed(
    items: Iterable[Item],
    here: Callable[[Item], object],
    there: Callable[[Item], object],
    result: Callable[[], T],
    sides: int,
    meanwhile: Callable[[], object] = lambda: None,
) -> T:
    """Gives each item to one of two sides in turn, or with one side to both `here` and the copy of this process."""
    theirs, ours = multiprocessing.get_context("fork").Pipe(duplex=False)
    this = os.getpid()

    def work() -> T:
        for item in islice(items, sides - 1, None, sides) if os.getpid() == this else _received(theirs, ours):
            there(item)
        return result()

    with beside(work) as waiting:
        theirs.close()
        for number, item in enumerate(items):
            if number % sides == sides - 1:
                with suppress(BrokenPipeError):  # its result tells what ended the copy
                    ours.send_bytes(pickle.dumps(item))
            if number % sides == 0:
                here(item)
        ours.close()
        meanwhile()
        return waiting()


def _received(channel: Connection, other_end: Connection) -> Iterator[Item]:
    other_end.close()  # else it would never end
    while True:
        try:
            yield pickle.loads(channel.recv_bytes())
        except EOFError:
            return


@contextmanager
def beside(work: Callable[[], T], useful: bool = True) -> Iterator[Callable[[], T]]:
    """Starts `work` in a copy of this process, and yields what waits for its result, which has to be picklable.

    Where there is one core, where processes cannot be forked safely (macOS, Windows), and where it is not `useful`,
    `work` runs here, when its result is asked for; so it does where the copy ends without one, as when memory ran out.
    What `work` raises is raised where its result is asked for. The copy does not outlive the block: where it is not
    asked for its result, or the user interrupts both, it is given GRACE_S to clean up after itself.
    """
    if not useful or not can_fork():
        yield work
        return
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_run, args=(work, theirs), daemon=True)
    process.start()
    theirs.close()
    over = False

    def result() -> T:
        nonlocal over
        try:
            sent = ours.recv_bytes()
        except (EOFError, OSError):  # it ended before, or amid, its message
            sent = None
        over = True
        if sent is None:
            return work()
        done, found, trace = pickle.loads(sent)
        if done:
            return found
        if trace:
            found.add_note(trace)
        raise found

    try:
        yield result
    finally:
        try:
            if not over:
                process.terminate()
                process.join(GRACE_S)
        finally:  # also where the user interrupts once more
            process.kill()
            process.join()
            ours.close()


def can_fork() -> bool:
    """Whether a copy of this process can work beside it."""
    alone = multiprocessing.current_process().daemon  # which may have no processes of its own
    return sys.platform.startswith("linux") and not alone and len(os.sched_getaffinity(0)) > 1


def is_copy() -> bool:
    """Whether this process is a copy that works beside another, in one thread."""
    return _is_copy


def die_with_parent(number: int) -> None:
    """Has the system send this process a signal once the one that it is a copy of is no more. For Linux."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, number)


def _unwind(number: int, frame: object) -> None:
    """Ends a copy by what its `with` blocks notice, once."""
    for ending in ENDING:
        signal.signal(ending, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _run(work: Callable[[], object], channel: Connection) -> None:
    """Sends (True, result, "") or (False, error, traceback), and ends without the clean-up of the process it copies."""
    global _is_copy
    _is_copy = True
    gc.freeze()  # else its first collection would copy the pages of all objects
    for number in ENDING:
        signal.signal(number, _unwind)
    die_with_parent(signal.SIGTERM)  # one that is killed says nothing
    import torch

    torch.set_num_threads(1)  # the threads of the original are not in its copy
    try:
        # Not send(), by which tensors would go through shared memory, of which containers have little.
        channel.send_bytes(pickle.dumps((True, work(), "")))
    except Exception as error:
        trace = traceback.format_exc()
        try:
            told = pickle.dumps((False, error, trace))
            pickle.loads(told)
        except Exception:  # whatever an exception that cannot be pickled, or read again, raises
            lost = RuntimeError(f"{type(error).__name__}: {error}")
            told = pickle.dumps((False, lost, trace))
        channel.send_bytes(told)
    finally:
        channel.close()
        os._exit(0)
