"""Bare files: artifacts without a bundle around them, as they tell themselves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgekit.artifacts.artifact import Artifact
from edgekit.errors import EdgeKitError


def bare(path: Path) -> Artifact:
    """Returns a file that comes without a bundle as an artifact; its names, shapes and precision are read from it."""
    from edgekit.artifacts.summary import inspect_artifact

    found = inspect_artifact(path)
    beside = tuple(_beside(path, place) for place in found.weight_files)
    precision = precision_of(found.parameter_bytes)
    return Artifact(path, found.format, precision, tuple(found.inputs), tuple(found.outputs), weight_files=beside)


def closed(artifact: Artifact) -> tuple[Artifact, tuple[str, ...]]:
    """Returns `artifact` with an open batch as one sample, and a note that says so."""
    inputs = tuple(
        replace(spec, shape=(1, *spec.shape[1:])) if spec.shape[:1] == (-1,) else spec for spec in artifact.inputs
    )
    if inputs == artifact.inputs:
        return artifact, ()
    return replace(artifact, inputs=inputs), (f"{artifact.path.name} takes any batch: it was measured with one sample",)


def _beside(path: Path, place: str) -> Path:
    """Returns the file `place` in the folder of `path`; EdgeKitError where it is elsewhere, or not there."""
    if Path(place).name != place:
        raise EdgeKitError(
            f"weights of {path} lie in {place!r}, which EdgeKit does not follow",
            "save it with its weights in itself, or in a file beside it (onnx.save_model's location)",
        )
    if not path.with_name(place).is_file():
        raise EdgeKitError(f"weights of {path} lie in {place}, which is missing", "put it beside the file")
    return path.with_name(place)


def precision_of(parameter_bytes: Mapping[str, int]) -> str:
    """Returns the precision of a bare file: that in which most of its weights are stored.

    Wider integers are biases, shapes and indices: they do not count.
    """
    weights: Counter[str] = Counter()
    for dtype, size in parameter_bytes.items():
        bits = re.fullmatch(r"(float|bfloat|int|uint)(\d+).*", dtype)
        if bits is None or ("int" in dtype and int(bits[2]) > 8):
            continue
        precision = f"int{bits[2]}" if "int" in dtype else "fp16" if int(bits[2]) <= 16 else "fp32"
        weights[precision] += 8 * size // int(bits[2])
    return max(weights, key=lambda name: weights[name], default="fp32")
