"""The parity ladder: from the original to each file and device on the same real samples, and where it breaks first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgekit import bundle as bundles
from edgekit import data as sources
from edgekit import files, judge, qat, stages, taps
from edgekit.errors import EdgeKitError
from edgekit.progress import Progress
from edgekit.results import Artifact, Culprit, Parity, Rung

if TYPE_CHECKING:
    import numpy as np

    from edgekit.model import Model
    from edgekit.quant.recipes import Compressed
    from edgekit.runtimes.devices.device import Device

TAPPED_RUNS = 2  # every tensor of a network is kept
ORIGINAL, EXPORTED = "original", "exported graph"
TRAINED_HELP = "it was trained for int8 to give other outputs: accuracy alone tells what it is worth"
GRAPH_HELP = "quantizing itself loses this, whatever the file: edgekit export --sensitivity shows the layers"


@dataclass(frozen=True)
class Graph:
    """The captured graph at one precision, what it gives, and how near that is to the original."""

    compressed: Compressed | None
    outputs: tuple[np.ndarray, ...]
    parity: Parity


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
    same file as EdgeKit exports it now. One that was trained for int8 cannot be made again: it has no quantized graph.
    """
    feeds = [feed[: bundles.GOLDEN_SAMPLES] for feed in feeds]
    with progress.step("Explaining: the graphs"):
        reference = stages.run_module(original.module, feeds)
    rungs, graphs = [], {}
    if original.onnx is None:
        graphs["fp32"] = _graph(original, source, "fp32", feeds, reference, progress)
        near = graphs["fp32"].parity
        rungs.append(Rung(EXPORTED, ORIGINAL, near, judge.faithful("fp32", near, near)))
    trained = {artifact for artifact in artifacts if qat.is_trained(artifact)}
    for precision in dict.fromkeys(artifact.precision for artifact in artifacts if artifact not in trained):
        if precision.startswith("int8") and original.onnx is None:
            graph = graphs[precision] = _graph(original, source, precision, feeds, reference, progress)
            problem = GRAPH_HELP if graph.parity.sqnr_db < judge.POOR_SQNR_DB else None
            rungs.append(Rung(f"{precision} graph", EXPORTED, graph.parity, problem))
    for artifact in artifacts:
        name = f"{artifact.path.name} {artifact.precision}"
        with progress.step(f"Explaining: {name}"):
            local = stages.run(artifact, feeds).outputs
            before = (None if artifact in trained else graphs.get(artifact.precision)) or graphs.get("fp32")
            perfect = judge.parity(reference, reference)
            near = judge.parity(_flat(reference, original), _flat(local, original))
            culprit = None
            if artifact in trained:
                problem = TRAINED_HELP if near.sqnr_db < judge.POOR_SQNR_DB else None
            else:
                problem = judge.faithful(artifact.precision, near, before.parity if before else perfect)
            if problem is not None and artifact not in trained:
                culprit = _culprit(original, source, artifact, before, feeds, progress)
            below = EXPORTED if artifact in trained else _below(artifact, rungs)
            rungs.append(Rung(name, below, near, problem, culprit, artifact.path))
        if not here:
            with progress.step(f"Explaining: {name} on {device.uri}"):
                there = stages.run(artifact, feeds, device=device).outputs
                near = judge.parity(_flat(local, original), _flat(there, original))
                step = _output_step(original, before)
                if artifact in trained:
                    step = _step(bundles.read(artifact.path.parent).manifest["qparams"])
                problem = judge.reproduced(artifact.precision, near, step, judge.steps_allowed(artifact.format, here))
                rungs.append(Rung(f"{name} on {device.uri}", f"{name} here", near, problem, path=artifact.path))
    return tuple(rungs)


def _graph(
    original: Model,
    source: sources.Data,
    precision: str,
    feeds: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    progress: Progress,
) -> Graph:
    compressed = stages.compress(original, source, precision, progress)
    assert compressed is not None
    outputs = stages.run_module(compressed.program.module(check_guards=False), feeds)
    return Graph(compressed, outputs, judge.parity(_flat(reference, original), _flat(outputs, original)))


def _flat(outputs: Sequence[np.ndarray], original: Model) -> list[np.ndarray]:
    return stages.flat(outputs, stages.batch_of(original.inputs))


def _below(artifact: Artifact, rungs: Sequence[Rung]) -> str:
    names = {rung.name for rung in rungs}
    graph = f"{artifact.precision} graph"
    return next((name for name in (graph, EXPORTED) if name in names), ORIGINAL)


def _output_step(original: Model, graph: Graph | None) -> float:
    program = graph.compressed.program if graph is not None and graph.compressed is not None else None
    return _step(stages.qparams(original, program))


def _step(qparams: Mapping[str, Any]) -> float:
    return max((q["scale"] for q in qparams.get("outputs", {}).values()), default=0.0)


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
    from edgekit.quant.recipes import RECIPES

    if artifact.format not in taps.TAPPERS:
        return taps.UNTAPPED
    feeds = [feed[:TAPPED_RUNS] for feed in feeds]
    half = RECIPES[artifact.precision].half_weights
    program = graph.compressed.program if graph is not None and graph.compressed is not None else None
    layouts = {artifact.format: artifact.layout}
    try:
        with TemporaryDirectory(prefix="edgekit-") as folder:
            with stages.emitting(original, program, [artifact.format], half, progress, layouts, source) as exports:
                exported = dict(exports)
            twin = Path(folder, f"twin{artifact.path.suffix}")
            files.write(twin, exported[artifact.format].data)
            pair: list[Any] = []
            for path in (artifact.path, twin):
                into = Path(folder, f"tapped-{len(pair)}{path.suffix}")
                found = taps.tapped(path, artifact.format, into)
                pair += [found, stages.run(replace(artifact, path=into, outputs=()), feeds).outputs]
            return taps.first_difference(*pair)
    except EdgeKitError as error:
        return f"the op is not named: {error.what}"
