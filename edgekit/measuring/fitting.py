"""Fit a bare file to the original: its inputs and outputs by name, or else by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from edgekit.artifacts import bundles
from edgekit.artifacts.artifact import Artifact
from edgekit.errors import EdgeKitError
from edgekit.types import TensorSpec, axis_order

if TYPE_CHECKING:
    from edgekit.loading.model import Model


def fitted(artifact: Artifact, original: Model) -> Artifact:
    """Returns `artifact` with its inputs and outputs in the original's order, by name or else by position.

    A dimension that the file leaves open is the original's. Raises EdgeKitError where the two do not take the same
    inputs or do not give as many outputs.
    """
    artifact = _with_state(artifact, original)
    inputs, outputs = (
        _arranged(specs, wanted)
        for specs, wanted in ((artifact.inputs, original.inputs), (artifact.outputs, original.outputs))
    )
    if not all(_fits(a, b) for a, b in zip_longest(inputs, original.inputs)) or len(outputs) != len(original.outputs):
        last = [replace(spec, shape=_channels_last(spec.shape)) for spec in original.inputs]
        if all(_fits(a, b) for a, b in zip_longest(inputs, last)):
            raise EdgeKitError(
                f"{artifact.path} takes its images channels-last (NHWC), and nothing beside it says so",
                f"name the bundle that it was exported into: its {bundles.MANIFEST} tells the layout",
            )
        takes, wanted = (", ".join(map(str, specs)) for specs in (inputs, original.inputs))
        raise EdgeKitError(
            f"{artifact.path} is not this model: it takes {takes} and gives {len(outputs)} outputs; "
            f"the model takes {wanted} and gives {len(original.outputs)}",
            "name the model that it was exported from; files of another batch size are compared on their own",
        )
    inputs = [replace(spec, shape=other.shape) for spec, other in zip(inputs, original.inputs, strict=True)]
    return replace(artifact, inputs=tuple(inputs), outputs=tuple(outputs))


def _with_state(artifact: Artifact, original: Model) -> Artifact:
    """Returns a file without a bundle with the original's state told apart from its inputs and outputs, by name."""
    into, out_of = {part.input.name for part in original.state}, {part.output for part in original.state}
    if artifact.state or not original.state or not into <= {spec.name for spec in artifact.inputs}:
        return artifact
    inputs = tuple(spec for spec in artifact.inputs if spec.name not in into)
    outputs = tuple(spec for spec in artifact.outputs if spec.name not in out_of)
    return replace(artifact, inputs=inputs, outputs=outputs, state=original.state)


def _arranged(specs: Sequence[TensorSpec], wanted: Sequence[TensorSpec]) -> list[TensorSpec]:
    by_name = {spec.name: spec for spec in specs}
    names = [spec.name for spec in wanted]
    return [by_name[name] for name in names] if sorted(by_name) == sorted(names) else list(specs)


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in axis_order(len(shape), "nhwc"))


def _fits(spec: TensorSpec | None, original: TensorSpec | None) -> bool:
    if spec is None or original is None:
        return False
    open_or_same = (not a or a < 0 or a == b for a, b in zip_longest(spec.shape, original.shape, fillvalue=1))
    return spec.dtype == original.dtype and len(spec.shape) == len(original.shape) and all(open_or_same)
