"""Run a function on many numbers in a forked process that is started anew where it dies: an abort is a result too."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

SECONDS = 60
Verdict = tuple[str, str]


def outcomes(
    function: Callable[[int], Verdict], seeds: Sequence[int], seconds: int = SECONDS
) -> Iterator[tuple[int, Verdict]]:
    """Yield each number with what the function returned for it: a kind and a detail.

    An exception is the kind "raised", the death of the process "died", and more than `seconds` "hung". What runtimes
    print is dropped. The calling process has to be one that may be forked: no threads that hold locks.
    """
    left = list(seeds)
    while left:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _work(function, left, writer, seconds)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            for line in pipe:
                kind, detail = json.loads(line)
                yield left.pop(0), (kind, detail)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code and left:
            yield left.pop(0), ("hung" if code == -signal.SIGALRM else "died", f"exit status {code}")


def _work(function: Callable[[int], Verdict], seeds: Sequence[int], writer: int, seconds: int) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    with os.fdopen(writer, "w") as pipe:
        for seed in seeds:
            signal.alarm(seconds)
            try:
                verdict = function(seed)
            except Exception as error:
                frame = sys.exc_info()[2]
                while frame is not None and frame.tb_next is not None:
                    frame = frame.tb_next
                where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else ""
                verdict = "raised", f"{type(error).__name__} at {where}: {str(error)[:200]}"
            signal.alarm(0)
            pipe.write(json.dumps(verdict) + "\n")
            pipe.flush()
    os._exit(0)
