"""Feeds: golden inputs of real samples, or made-up ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgekit.artifacts import bundles
from edgekit.artifacts.artifact import Artifact
from edgekit.data import sources
from edgekit.errors import EdgeKitError
from edgekit.loading import example_inputs
from edgekit.screening import limits
from edgekit.types import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from edgekit.loading.model import Model


def golden_feeds(original: Model, source: sources.Data | None) -> tuple[tuple[np.ndarray, ...], int]:
    """Returns inputs for eight runs, (runs, *shape) each, and how many real samples they hold (0: random ones)."""
    import numpy as np

    if source is None:
        return random_feeds(original.inputs, ranges=original.ranges), 0
    feeds, count = [], 0
    for arrays, real, _ in sources.batches(source.evaluation, original.inputs):
        feeds.append(arrays)
        count += real
        if len(feeds) == bundles.GOLDEN_SAMPLES:
            break
    return tuple(np.stack(arrays) for arrays in zip(*feeds, strict=True)), count


def first_target(original: Model, source: sources.Data | None) -> np.ndarray | None:
    """Returns the targets of the first samples, which tell the kind of all; None without labels."""
    return next(iter(sources.batches(source.evaluation, original.inputs)))[2] if source is not None else None


def random_feeds(
    inputs: Sequence[TensorSpec],
    runs: int = bundles.GOLDEN_SAMPLES,
    ranges: Sequence[example_inputs.Range | None] | None = None,
) -> tuple[np.ndarray, ...]:
    """Returns seeded inputs, (runs, *shape) each: normal for floats, integers of `ranges`, ones for masks.

    Without `ranges` they are those that the names and types of the inputs tell.
    Raises EdgeKitError for an input of an open shape, or of what numpy has no numbers for.
    """
    import numpy as np

    for spec in inputs:
        if min(spec.shape, default=0) < 0 or spec.dtype not in np.sctypeDict:
            raise EdgeKitError(
                f"there are no random inputs for {spec}",
                "a file is timed on numbers of a fixed shape: export it with one, or measure it by edgekit compare",
            )
    size = sum(spec.nbytes for spec in inputs)
    if size > limits.RUN_BYTES:
        raise EdgeKitError(
            f"one run takes {size:,} bytes of inputs, and random ones are made up to {limits.RUN_BYTES:,}",
            "measure the file on data of its own: edgekit compare",
        )
    rng = np.random.default_rng(0)
    known = ranges or example_inputs.ranges(inputs)
    return tuple(example_inputs.fill(spec, filled, rng, runs) for spec, filled in zip(inputs, known, strict=True))


def profile_feeds(artifact: Artifact) -> tuple[np.ndarray, ...]:
    """Returns what a file is timed on: the golden inputs of the bundle around it, else made-up ones."""
    if bundles.is_bundle(artifact.path.parent):
        golden = bundles.read_golden(bundles.read(artifact.path.parent))
        return tuple(golden[f"input/{spec.name}"] for spec in artifact.inputs)
    limits: dict[int, int] = {}
    if artifact.format == "onnx":
        import onnx

        graph = onnx.load(artifact.path, load_external_data=False)
        limits = example_inputs.onnx_limits(graph, [spec.name for spec in artifact.inputs])
    return random_feeds(artifact.inputs, ranges=example_inputs.ranges(artifact.inputs, limits))
