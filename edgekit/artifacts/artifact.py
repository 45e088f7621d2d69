"""Artifacts: exported files, what they are called among others, and the op where one goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.types import Layout, State, TensorSpec, finite


@dataclass(frozen=True)
class Artifact:
    """One exported file, with the names and specs of its inputs and outputs where they are known.

    The shapes in the specs are NCHW; `layout` says how the file itself takes and gives rank-4 tensors. `pruned` is the
    fingerprint of the pruned network that it was exported from, None where it was not pruned. `weight_files` lie beside
    an ONNX file that names them, and hold weights of it. `state` are inputs and outputs beside those: whoever runs the
    file gives back as input what the run before gave as output. A file that keeps its state in itself has none.
    `target` is what its bundle was exported for, None where that is not known.
    """

    path: Path
    format: str
    precision: str
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    layout: Layout = "nchw"
    pruned: str | None = None
    weight_files: tuple[Path, ...] = ()
    state: tuple[State, ...] = ()
    target: str | None = None

    @property
    def size_bytes(self) -> int:
        """Size of the file in bytes, with its `weight_files`."""
        return sum(path.stat().st_size for path in (self.path, *self.weight_files))


def labels(artifacts: Sequence[Artifact]) -> dict[Artifact, str]:
    """Returns what each file is called among others: the end of its path that tells it apart, and its precision."""

    def end(artifact: Artifact, depth: int) -> str:
        return f"{'/'.join(artifact.path.parts[-depth:])} {artifact.precision}"

    found = {}
    for artifact in artifacts:
        others = [other for other in artifacts if other.path != artifact.path]
        depths = range(1, len(artifact.path.parts) + 1)
        apart = (d for d in depths if all(end(artifact, d) != end(other, d) for other in others))
        found[artifact] = end(artifact, next(apart, len(depths)))
    return found


@dataclass(frozen=True)
class Culprit:
    """The op of a file that loses more than its inputs had lost: its kind, its name, and the SQNR of what it writes."""

    op: str
    node: str
    sqnr_db: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {"op": self.op, "node": self.node, "sqnr_db": finite(self.sqnr_db)}
