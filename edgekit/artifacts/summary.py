"""Summary of an exported file, op by op, and of a bundle."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.artifacts.contents import Contents, QParams, float_islands
from edgekit.errors import EdgeKitError
from edgekit.types import TensorSpec

if TYPE_CHECKING:
    from edgekit.artifacts.bundles import Bundle

READERS = {"onnx": "onnx_file", "tflite": "tflite_file", "executorch": "pte_file"}  # format → module
DAMAGED = (
    ValueError, IndexError, KeyError, struct.error, TypeError, AttributeError, OverflowError, MemoryError,
    RecursionError,
)  # fmt: skip


@dataclass(frozen=True)
class ArtifactSummary:
    """What one exported file holds; see `contents.Contents`. Sizes are in bytes.

    `int8_ops` and `float_ops` count arithmetic on activations; `float_islands` names the float ops between quantized
    ones, one entry for each group. `delegates` and `undelegated` are ExecuTorch's: backend → parts, operator → calls.
    """

    path: Path
    format: str
    version: str
    size_bytes: int
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    qparams: dict[str, QParams]
    ops: dict[str, int]
    int8_ops: int
    float_ops: int
    requantizations: int
    float_islands: tuple[str, ...]
    parameter_bytes: dict[str, int]
    delegates: dict[str, int]
    undelegated: dict[str, int]
    notes: tuple[str, ...]
    weight_files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of `inspect --json` for a file."""
        return {"type": "artifact", **as_json(asdict(self))}


def is_artifact(path: Path) -> bool:
    """Whether the file at `path` is an ONNX, TFLite or ExecuTorch file, by its content."""
    from edgekit.runtimes import format_of

    try:
        return bool(format_of(path))
    except EdgeKitError:
        return False


def inspect_artifact(path: Path) -> ArtifactSummary:
    """Reads what an exported file holds. Raises EdgeKitError where it is none, cannot be read, or is damaged."""
    from edgekit.runtimes import format_of
    from edgekit.screening.limits import budget
    from edgekit.screening.watchdog import guarded
    from edgekit.util.atomic_files import sha256

    format = format_of(path)
    try:
        reader = import_module(f"edgekit.artifacts.{READERS[format]}")
        contents: Contents = guarded(lambda: reader.read(path), str(path), budget([path]))
    except OSError as error:
        raise EdgeKitError(f"cannot read {path}: {error.strerror}") from error
    except DAMAGED as error:
        raise EdgeKitError(
            f"{path} is damaged, or not what its content says it is ({format}): {error}", "export or download it again"
        ) from error
    return ArtifactSummary(
        path=path,
        format=format,
        version=contents.version,
        size_bytes=path.stat().st_size,
        sha256=sha256(path),
        inputs=contents.inputs,
        outputs=contents.outputs,
        qparams=contents.qparams,
        ops=contents.ops(),
        int8_ops=contents.count("int8"),
        float_ops=contents.count("float"),
        requantizations=contents.count("requantize"),
        float_islands=tuple(", ".join(group) for graph in contents.graphs for group in float_islands(graph)),
        parameter_bytes=contents.parameter_bytes,
        delegates=contents.delegates,
        undelegated=contents.undelegated,
        notes=contents.notes,
        weight_files=contents.weight_files,
    )


@dataclass(frozen=True)
class BundleSummary:
    """What a bundle's manifest says, and what each of its files holds."""

    path: Path
    manifest: Mapping[str, Any]
    artifacts: tuple[ArtifactSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of `inspect --json` for a bundle."""
        files = [summary.to_dict() for summary in self.artifacts]
        return {"type": "bundle", "path": str(self.path), "manifest": dict(self.manifest), "artifacts": files}


def inspect_bundle(bundle: Bundle) -> BundleSummary:
    """Reads what each file of a bundle holds; see `inspect_artifact`."""
    found = tuple(inspect_artifact(artifact.path) for artifact in bundle.artifacts)
    return BundleSummary(bundle.path, bundle.manifest, found)


def as_json(value: Any) -> Any:
    """Dataclass fields as JSON values: tuples become lists, paths text."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value
