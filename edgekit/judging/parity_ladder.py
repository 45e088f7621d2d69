"""The parity ladder: from the original to each file and device on the same real samples, and where it breaks first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.artifacts import bundles, intermediate_outputs
from edgekit.artifacts.artifact import Artifact, Culprit, labels
from edgekit.compression import compress, emit, mixed_precision, qat_training
from edgekit.data import sources
from edgekit.errors import EdgeKitError
from edgekit.judging import noise_floors, verdicts
from edgekit.judging.results import Rung
from edgekit.measuring import running
from edgekit.metrics import parity
from edgekit.metrics.parity import Parity
from edgekit.util import atomic_files
from edgekit.util.progress import Progress

if TYPE_CHECKING:
    import numpy as np

    from edgekit.loading.model import Model
    from edgekit.quant.ptq.recipes import Compressed
    from edgekit.runtimes.devices.device import Device

TAPPED_RUNS = 2  # every tensor of a network is kept
ORIGINAL, EXPORTED = "original", "exported graph"
TRAINED_HELP = "it was trained for int8 to give other outputs: accuracy alone tells what it is worth"
NO_GRAPH_HELP = "is far from the original, and EdgeKit makes no graph of that precision to hold it against"
GRAPH_HELP = "quantizing itself loses this, whatever the file: edgekit export --sensitivity shows the layers"


@dataclass(frozen=True)
class Graph:
    """The captured graph at one precision, its outputs, and how near each of them is to the original's."""

    compressed: Compressed
    outputs: tuple[np.ndarray, ...]
    parities: tuple[Parity, ...]


def explain(
    original: Model,
    source: sources.Data,
    artifacts: Sequence[Artifact],
    feeds: Sequence[np.ndarray],
    device: Device,
    here: bool,
    progress: Progress,
) -> tuple[Rung, ...]:
    """Returns the rungs: original → exported graph → quantized graph → each artifact → each on the device.

    `feeds` are (runs, *shape) real samples; `here` says that the device is this machine. Quantized graphs are made
    from the data given, as the export made them from its own. An artifact that breaks is compared, op by op, with the
    same file as EdgeKit exports it now. One that was trained for int8 cannot be made again: it has no quantized graph,
    and neither has one of an ONNX original.
    """
    feeds = [feed[: bundles.GOLDEN_SAMPLES] for feed in feeds]
    with progress.step("Explaining: the graphs"):
        reference = running.run_module(original.module, feeds, state=original.state)
    rungs: list[Rung] = []
    captured: Graph | None = None
    if original.onnx is None:
        captured = _graph(original, source, "fp32", frozenset(), feeds, reference, progress)
        problem = verdicts.faithful("fp32", captured.parities, captured.parities)
        near = parity.worst(captured.parities)
        rungs.append(Rung(EXPORTED, ORIGINAL, near, near, problem))
    graphs: dict[str, Graph] = {}
    for artifact in artifacts:
        name = _graph_name(artifact)
        if name is None or captured is None or name in graphs:
            continue
        kept = mixed_precision.layers_in_float(artifact)
        graph = graphs[name] = _graph(original, source, artifact.precision, kept, feeds, reference, progress)
        added = parity.worst(_parities(captured.outputs, graph.outputs, original))
        near = parity.worst(graph.parities)
        rungs.append(Rung(name, EXPORTED, added, near, GRAPH_HELP if near.sqnr_db < verdicts.POOR_SQNR_DB else None))
    for artifact, name in labels(artifacts).items():
        below = _graph_name(artifact)
        found = graphs.get(below or "")
        stands_on = (below, found) if below is not None and found is not None else (EXPORTED, captured)
        rungs += _climb(original, source, artifact, name, stands_on, feeds, reference, device, here, progress)
    return tuple(rungs)


def _climb(
    original: Model,
    source: sources.Data,
    artifact: Artifact,
    name: str,
    stands_on: tuple[str, Graph | None],
    feeds: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    device: Device,
    here: bool,
    progress: Progress,
) -> list[Rung]:
    """Returns the rungs of one file: run here, and on the device where that is another machine."""
    below, graph = stands_on if stands_on[1] is not None else (ORIGINAL, None)
    trained = qat_training.is_trained(artifact)
    with progress.step(f"Explaining: {name}"):
        local = running.run(artifact, feeds).outputs
        near = _parities(reference, local, original, graph.compressed if graph is not None else None)
        added = _parities(graph.outputs, local, original, graph.compressed) if graph is not None else near
        problem = _problem(artifact, near, graph, trained)
        culprit = None
        if problem is not None and _has_twin(artifact, graph, trained):
            culprit = _culprit(original, source, artifact, graph, feeds, progress)
        rungs = [Rung(name, below, parity.worst(added), parity.worst(near), problem, culprit, artifact.path)]
    if here:
        return rungs
    with progress.step(f"Explaining: {name} on {device.uri}"):
        there = running.run(artifact, feeds, device=device).outputs
        moved = _parities(local, there, original)
        whole = parity.worst(_parities(reference, there, original))
        qparams = bundles.read(artifact.path.parent).manifest["qparams"] if trained else _qparams(original, graph)
        scales = compress.output_scales(qparams, original.outputs)
        problem = verdicts.reproduced(artifact.precision, moved, scales, verdicts.steps_allowed(artifact.format, here))
        where = f"{name} on {device.uri}"
        return [*rungs, Rung(where, f"{name} here", parity.worst(moved), whole, problem, path=artifact.path)]


def _problem(artifact: Artifact, near: Sequence[Parity], graph: Graph | None, trained: bool) -> str | None:
    """Returns why a file is not what its graph gives, or not at all near to the original where it has no graph."""
    if _has_twin(artifact, graph, trained):
        return verdicts.faithful(artifact.precision, near, graph.parities if graph is not None else near)
    if parity.worst(near).sqnr_db >= verdicts.POOR_SQNR_DB:
        return None
    return TRAINED_HELP if trained else NO_GRAPH_HELP


def _has_twin(artifact: Artifact, graph: Graph | None, trained: bool) -> bool:
    """Whether EdgeKit can make the file again: not one trained for int8, nor int8 of an ONNX original, nor int4."""
    from edgekit.quant.ptq.recipes import RECIPES

    known = artifact.precision in RECIPES
    return known and not trained and (graph is not None or not artifact.precision.startswith("int8"))


def _graph_name(artifact: Artifact) -> str | None:
    """Returns what the quantized graph of a file is called; None where there is none, or it cannot be made again."""
    if not artifact.precision.startswith("int8") or qat_training.is_trained(artifact):
        return None
    kept = mixed_precision.layers_in_float(artifact)
    return f"{artifact.precision} graph" + (f", in float: {', '.join(sorted(kept))}" if kept else "")


def _graph(
    original: Model,
    source: sources.Data,
    precision: str,
    keep_float: frozenset[str],
    feeds: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    progress: Progress,
) -> Graph:
    compressed = compress.compress(original, source, precision, progress, keep_float)
    assert compressed is not None
    outputs = running.run_module(compressed.program.module(check_guards=False), feeds, state=original.state)
    return Graph(compressed, outputs, _parities(reference, outputs, original, compressed))


def _parities(
    reference: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    original: Model,
    compressed: Compressed | None = None,
) -> tuple[Parity, ...]:
    floors = noise_floors.floors(compressed.program if compressed is not None else None, original.onnx)
    return parity.parities(*running.aligned(reference, outputs, original), floors=floors)


def _qparams(original: Model, graph: Graph | None) -> Mapping[str, Any]:
    program = graph.compressed.program if graph is not None else None
    return compress.qparams(original, program)


def _culprit(
    original: Model,
    source: sources.Data,
    artifact: Artifact,
    graph: Graph | None,
    feeds: Sequence[np.ndarray],
    progress: Progress,
) -> Culprit | str:
    """Returns the first op of the file that differs from the same file as EdgeKit exports it now, or why there is none.

    Both run with taps in processes of their own: the file is not to be trusted.
    """
    from edgekit.quant.ptq.recipes import RECIPES

    if artifact.format not in intermediate_outputs.TAPPERS:
        return intermediate_outputs.UNTAPPED
    feeds = [feed[:TAPPED_RUNS] for feed in feeds]
    half = RECIPES[artifact.precision].half_weights
    program = graph.compressed.program if graph is not None else None
    layouts = {artifact.format: artifact.layout}
    try:
        with atomic_files.temporary_folder() as folder:
            with emit.emitting(original, program, [artifact.format], half, progress, layouts, source) as exports:
                exported = dict(exports)
            twin = Path(folder, f"twin{artifact.path.suffix}")
            atomic_files.write_pieces(twin, exported[artifact.format].pieces)
            pair: list[Any] = []
            for path in (artifact.path, twin):
                into = Path(folder, f"tapped-{len(pair)}{path.suffix}")
                found = intermediate_outputs.tapped(path, artifact.format, into)
                pair += [found, running.run(replace(artifact, path=into, outputs=()), feeds).outputs]
            return intermediate_outputs.first_difference(*pair)
    except EdgeKitError as error:
        return f"the op is not named: {error.what}"
