"""Cost of a changed network: the size and the latency of its exported files, timed in turn with the original's."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.artifacts import bundles
from edgekit.artifacts import sparsity as zeros
from edgekit.artifacts.artifact import Artifact
from edgekit.compression import compress, emit
from edgekit.data import batch_axis, sources
from edgekit.errors import EdgeKitError
from edgekit.judging import noise_floors, verdicts
from edgekit.measuring import outliers, running
from edgekit.measuring.feeds import golden_feeds
from edgekit.measuring.latency import Latency
from edgekit.metrics.parity import Parity, parities, worst
from edgekit.types import Layout
from edgekit.util import atomic_files
from edgekit.util.progress import Silent

if TYPE_CHECKING:
    import numpy as np

    from edgekit.loading.model import Model
    from edgekit.pruning.options import Wanted
    from edgekit.runtimes.devices.device import Device


FINAL_ROUNDS = 10  # processes that time each final file


@dataclass(frozen=True)
class Cost:
    """What a run of a file takes: a latency, or on an emulated device instructions."""

    latency: Latency | None
    instructions: int | None

    @property
    def value(self) -> float:
        """The p50 in ms, or the instructions."""
        return self.latency.p50 if self.latency else float(self.instructions or 0)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {"latency_ms": self.latency.to_dict() if self.latency else None, "instructions": self.instructions}


@dataclass(frozen=True)
class Measured:
    """One exported file beside the original's of its format and precision.

    `packed` is the size after zlib, as in an APK or a download; `zeros` are weights that are zero, of `weights`.
    `parity` is against the network that was exported.
    """

    artifact: Artifact
    size: int
    original_size: int
    packed: int
    original_packed: int
    cost: Cost
    original_cost: Cost
    zeros: int
    weights: int
    parity: Parity

    @property
    def speed_share(self) -> float:
        """Its latency (instructions on an emulated device) as a share of the original's."""
        return self.cost.value / self.original_cost.value

    @property
    def size_share(self) -> float:
        """Its size as a share of the original's."""
        return self.size / self.original_size

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {
            "file": self.artifact.path.name,
            "format": self.artifact.format,
            "precision": self.artifact.precision,
            "size_bytes": self.size,
            "original_size_bytes": self.original_size,
            "compressed_bytes": self.packed,
            "original_compressed_bytes": self.original_packed,
            **self.cost.to_dict(),
            "original": self.original_cost.to_dict(),
            "share_of_original": self.speed_share,
            "zero_weights": self.zeros,
            "weights": self.weights,
            "parity": self.parity.to_dict(),
        }


def write(
    model: Model, source: sources.Data | None, wanted: Wanted, folder: Path
) -> tuple[dict[str, Artifact], dict[str, emit.Exported], Any]:
    """Exports `model` into `folder`: artifacts by format, what was exported of each, and the captured program."""
    from edgekit.quant.ptq.recipes import RECIPES

    compressed = compress.compress(model, source, wanted.precision, Silent())
    assert compressed is not None  # a graph is refused long before
    half = RECIPES[wanted.precision].half_weights
    artifacts, found = {}, {}
    layouts: dict[str, Layout] = dict.fromkeys(wanted.formats, "nchw")
    with emit.emitting(model, compressed.program, wanted.formats, half, Silent(), layouts, source) as exports:
        for format, exported in exports:
            path = folder / bundles.file_name(format)
            atomic_files.write_pieces(path, exported.pieces)
            artifacts[format] = Artifact(path, format, wanted.precision, model.inputs, model.outputs)
            found[format] = exported
    return artifacts, found, compressed.program


def race(
    artifacts: Sequence[Artifact],
    feeds: Sequence[np.ndarray],
    device: Device,
    threads: int,
    rounds: int,
    advance: Callable[[], None],
) -> dict[Artifact, Cost]:
    """Times all files in turn, in `rounds` processes each; on an emulated device each runs once.

    The p50 are of undisturbed runs where enough processes tell them apart (see `edgekit.measuring.outliers`).
    """
    from edgekit.measuring import schedule

    first = [feed[: bundles.GOLDEN_SAMPLES] for feed in feeds]
    runs: dict[Artifact, list[Any]] = {artifact: [] for artifact in artifacts}
    for count in range(rounds):
        for artifact in artifacts:
            if count == 0 or device.timing == "measured":
                timing = schedule.TIMING
                runs[artifact].append(running.run(artifact, first, device=device, threads=threads, timing=timing))
            advance()
    latency_of = schedule.undisturbed_of if rounds >= outliers.FEWEST else schedule.latency_of
    return {a: Cost(latency_of(found, threads), found[-1].instructions) for a, found in runs.items()}


def measure(
    original: Model,
    changed: Model,
    source: sources.Data | None,
    wanted: Wanted,
    device: Device,
    folder: Path,
    originals: Path,
    progress: Any,
) -> tuple[Measured, ...]:
    """Exports `changed` into `folder` and `original` into `originals`, checks each file of `changed`, and times all.

    They are timed in turn, in FINAL_ROUNDS processes each, and the p50 are of runs that nothing slowed down.
    Raises EdgeKitError for a file that is not faithful to `changed`.
    """
    with progress.step(f"Exporting {', '.join(wanted.formats)}"):
        before, _, _ = write(original, source, wanted, originals)
        after, exported, program = write(changed, source, wanted, folder)
    feeds, _ = golden_feeds(changed, source)
    with progress.step("Checking the files"):
        near = _checked(changed, after, exported, program, feeds)
    files_to_time = [artifact for format in wanted.formats for artifact in (before[format], after[format])]
    with progress.step("Measuring latency", FINAL_ROUNDS * len(files_to_time)) as advance:
        costs = race(files_to_time, feeds, device, wanted.threads, FINAL_ROUNDS, advance)
    found = []
    for format in wanted.formats:
        old, new = before[format], after[format]
        sizes = new.size_bytes, old.size_bytes
        packed = _packed(new.path), _packed(old.path)
        counted = zeros.count_zeros(new.path)
        found.append(Measured(new, *sizes, *packed, costs[new], costs[old], *counted, near[format]))
    return tuple(found)


def _packed(path: Path) -> int:
    return len(zlib.compress(path.read_bytes(), 6))


def _checked(
    model: Model,
    artifacts: Mapping[str, Artifact],
    exported: Mapping[str, emit.Exported],
    program: Any,
    feeds: Sequence[np.ndarray],
) -> dict[str, Parity]:
    """Returns how near each file is to `model`."""
    batch = batch_axis.batch_of(model.inputs)
    reference = running.flat(running.run_module(model.module, feeds), batch)
    graph = running.flat(running.run_module(program.module(check_guards=False), feeds), batch)
    floors = noise_floors.floors(program)
    limits = parities(reference, graph, floors=floors)
    found = {}
    for format, artifact in artifacts.items():
        outputs = emit.try_out(artifact, feeds, exported[format]).outputs
        each = parities(reference, running.flat(outputs, batch), floors=floors)
        found[format] = worst(each)
        why = verdicts.faithful(artifact.precision, each, limits)
        if why is not None:
            raise EdgeKitError(
                f"{artifact.path.name} is not faithful to the network: it {why}",
                f"leave {format} out with --format: an exporter or a runtime is at fault",
            )
    return found
