"""LiteRT: runs a .tflite file with XNNPACK, its default delegate."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

from ai_edge_litert.interpreter import Interpreter

from .interpreter import InterpreterSession
from .session import Session


def version() -> str:
    """The runtime's version."""
    return importlib.metadata.version("ai-edge-litert")


def load(path: str, *, threads: int, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> Session:
    """A session on the .tflite file at `path`; its own names, in the order of `inputs` and `outputs` where given.

    Raises ValueError for names that the file does not have. What the runtime raises on a corrupt file passes through.
    """
    return InterpreterSession(Interpreter(model_path=path, num_threads=threads), inputs, outputs)
