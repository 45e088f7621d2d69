"""LiteRT: runs a .tflite file with XNNPACK, its default delegate."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from .interpreter import InterpreterSession
from .litert_profiler import profile
from .session import Session


def version() -> str:
    """The runtime's version."""
    return importlib.metadata.version("ai-edge-litert")


def load(path: str, *, threads: int, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> Session:
    """A session on the .tflite file at `path`; its own names, in the order of `inputs` and `outputs` where given.

    Raises ValueError for names that the file does not have. What the runtime raises on a corrupt file passes through.
    """
    return InterpreterSession(Interpreter(model_path=path, num_threads=threads), inputs, outputs)


def trace(
    path: str, into: Path, *, threads: int, inputs: Sequence[str], feeds: Sequence[Mapping[str, np.ndarray]], runs: int
) -> None:
    """Run the file `runs` times on `feeds` in turn, and leave the events of every run (JSON) in the file `into`.

    The feeds have the file's own names, so `inputs` says nothing more. Raises RuntimeError where this version's
    profiler is not the one that is known.
    """
    into.write_text(json.dumps(profile(path, threads, feeds, runs)))
