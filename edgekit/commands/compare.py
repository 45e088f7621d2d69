"""Compare files with the original: accuracy, parity, latency and a verdict."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import targets
from edgekit.artifacts import bundles, int8_coverage
from edgekit.artifacts.artifact import Artifact, labels
from edgekit.commands import preflight
from edgekit.commands.given import expand
from edgekit.commands.verify import SAME_MACHINE
from edgekit.compression import compress, emit, mixed_precision
from edgekit.compression.emit import artifact_of
from edgekit.doctor.packages import cpu_name
from edgekit.errors import EdgeKitError
from edgekit.judging import noise_floors, parity_ladder, verdicts
from edgekit.judging.results import Baseline, Comparison, Measurement
from edgekit.loading import pruned_mark, with_data
from edgekit.loading.model_identity import check_repeatable
from edgekit.measuring import baseline_cache, fitting, running, schedule, steadiness
from edgekit.measuring.evaluation import Chunk, Evaluation, Tally, evaluate
from edgekit.measuring.run_cache import Journal
from edgekit.metrics import accuracy, parity, table
from edgekit.metrics.parity import Parity
from edgekit.metrics.scores import Scores, value
from edgekit.util.atomic_files import temporary_folder, write_pieces
from edgekit.util.progress import Progress, Silent

if TYPE_CHECKING:
    import numpy as np

    from edgekit.loading.model import Model
    from edgekit.runtimes.devices.device import Device


DEVICE_FORMS = {
    "adb": "adb:SERIAL",
    "ssh": "ssh://user@host",
    "local": "local:",
}  # of a target's device, as it is given


def compare(
    model: Any,
    artifacts: str | Path | bundles.Bundle | Sequence[str | Path | bundles.Bundle],
    *,
    data: Any,
    inputs: Any = (),
    code: str | None = None,
    metric: str | Callable[[list[np.ndarray], np.ndarray], Any] = "top1",
    max_drop: float | None = None,
    device: str = "local:",
    baseline_device: str = "cpu",
    threads: int = 1,
    rounds: int | None = None,
    cache: bool = True,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    explain: bool = False,
    timeout: float | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Measures files or bundles against the original `model` on labeled `data`: accuracy, latency, memory, size.

    `metric` is one of `metrics.table.METRICS`, the user's own `FILE.py:function` or a function itself, and `max_drop`
    in the unit of its drop. Every file runs in processes of its own on `device`; latencies are taken in turn over
    `rounds` processes each (by default ROUNDS), pinned to `threads` cores, beside the fp32 file of the same runtime
    (exported here where none is given). The original is measured once on the same content, unless `cache` is off (see
    `edgekit.measuring.baseline_cache`). A job that makes no progress for `timeout` seconds (by default 20) is ended.
    With `explain` the parity ladder is climbed too (see `edgekit.judging.parity_ladder`), and a file that breaks on it
    is rejected. With `resume` runs that an earlier command finished before it failed are not run again. Raises
    EdgeKitError for bad input and for a file that its runtime cannot run.
    """
    progress = progress or Silent()
    artifacts = [artifacts] if isinstance(artifacts, str | Path | bundles.Bundle) else artifacts
    preflight.check_compare(
        model,
        artifacts,
        data=data,
        inputs=inputs,
        code=code,
        metric=metric,
        device=device,
        baseline_device=baseline_device,
        mean=mean,
        std=std,
    )
    scale = table.find(metric)
    rounds = rounds or schedule.ROUNDS
    with ExitStack() as stack:
        there = stack.enter_context(running.opened(device, baseline_device, timeout))
        found = expand(artifacts)
        with progress.step("Loading"):
            original, source = with_data.load(
                model, data=data, inputs=inputs, code=code, mean=mean, std=std, like=found[0].inputs
            )
            if source is None:
                raise EdgeKitError(
                    "a comparison needs data", "give --data: real samples, with labels to measure accuracy"
                )
            baseline_cache.check(original, baseline_device)
            check_repeatable(original)
            given = unpruned([fitting.fitted(artifact, original) for artifact in found], original)
            if explain and any(artifact.pruned for artifact in given):
                raise EdgeKitError(
                    "these files are of a pruned network, which differs from the original from the start",
                    "name the pruned network in the place of the original: NAME-pruned/model.pt2",
                )
            evaluation = Evaluation(source, original, once=True)
        if max_drop is not None and evaluation.target is None:
            raise EdgeKitError(
                "a largest drop cannot be proven: the data has no labels", "add labels, or drop --max-drop"
            )
        outputs = [spec.name for spec in original.outputs]
        scale = scale.of(outputs)
        reference = baseline_cache.Reference(original, baseline_device, threads, cache)
        settings: list[str] = []
        same_machine = device.startswith(SAME_MACHINE)
        machine, processor = processor_of(there)
        journal = stack.enter_context(Journal(resume))
        scores, tallies = run_all(evaluation, reference, given, scale, settings, there, threads, journal, progress)
        kept = reference.processes(rounds, schedule.TIMING)
        references, notes = fp32_references(original, given, stack, progress)
        ladder = None
        if explain:
            ladder = parity_ladder.explain(original, source, given, evaluation.first, there, same_machine, progress)
        files_to_time = [*given, *(r for r in references.values() if r not in given)]
        baseline_latency, timed = schedule.race(
            original, files_to_time, evaluation.first, there, baseline_device, threads, rounds, kept, journal, progress
        )
        if kept is None:
            reference.keep(baseline_latency.processes, rounds, schedule.TIMING)
        names = labels(files_to_time)
        latencies = {names[artifact]: latency for artifact, (_, latency) in timed.items()}
        if same_machine and kept is None:
            latencies["the original"] = baseline_latency
        notes = (*notes, *settings, *steadiness.notes(latencies, there))
    about = (baseline_cache.note(baseline_device), baseline_cache.CACHED if kept is not None else None)
    notes = (*notes, *filter(None, about))
    if not same_machine:
        notes = (*notes, f"the original ran here and the files on {device}: their times are no speed-up")
    notes = (*notes, *elsewhere_notes(given, machine, processor, there))
    if scores is not None and len(outputs) > 1 and not scale.whole:
        notes = (
            *notes,
            f"{scale.name} looks at '{scale.output}' of {len(outputs)} outputs: --metric {scale.name}:NAME",
        )
    measured = []
    for artifact in given:
        last, latency = timed[artifact]
        near, own = parity_of(artifact, tallies[artifact], original), tallies[artifact].scores()
        result = accuracy.accuracy_of(scale, scores, own) if scores is not None and own is not None else None
        is_reference = artifact.precision == "fp32" and not artifact.pruned
        fp32_file = None if is_reference else references.get(artifact.format)
        fp32_last, fp32 = timed[fp32_file] if fp32_file is not None else (None, None)
        structure = int8_coverage.structure(artifact)
        blamed = structure.suspects if structure else None
        verdict = verdicts.verdict(
            artifact.precision,
            result,
            latency,
            fp32,
            near,
            max_drop,
            blamed,
            mixed_precision.most_sensitive(artifact),
            artifact.pruned is not None,
            elsewhere(artifact, machine),
            verdicts.unjudged(scale, outputs, tallies[artifact].outputs) if result is not None else (),
        )
        verdict = verdicts.explained(verdict, artifact, ladder or ())
        measured.append(
            Measurement(
                artifact,
                last.runtime,
                last.device,
                near,
                result,
                latency,
                fp32,
                baseline_latency,
                last.load_ms,
                last.first_ms,
                last.peak_rss_bytes,
                verdict,
                structure.to_dict() if structure else None,
                blamed or (),
                last.timing,
                last.instructions,
                fp32_last.instructions if fp32_last is not None else None,
                same_machine,
                kept is not None,
                processor,
                targets.is_of(artifact.target, machine),
            )
        )
    baseline = Baseline(
        original.name,
        baseline_device,
        None if scores is None else value(scores),
        None if scores is None else scale.name,
        evaluation.count,
        baseline_latency,
        "points" if scores is None else scale.unit_of(scores),
        kept is not None,
    )
    return Comparison(baseline, tuple(measured), (*original.notes, *source.notes, *notes, *journal.notes), ladder)


def parity_of(artifact: Artifact, tally: Tally, original: Model) -> Parity:
    """Returns the parity of a file; where that of a float file seems poor, what rounding alone makes is looked at."""
    near = tally.parity
    if near.max_rel <= parity.FP32_MAX_REL or not isfinite(near.max_abs) or artifact.precision.startswith("int"):
        return near
    program = None
    if original.onnx is None:
        compressed = compress.compress(original, None, "fp32", Silent())
        program = compressed.program if compressed is not None else None
    return tally.within(noise_floors.floors(program, original.onnx))


def processor_of(device: Device) -> tuple[str, str]:
    """Returns a device's machine, as `uname -m` calls it, and its processor in words."""
    facts = device.probe()
    machine = str(facts.get("machine") or platform.machine())
    name = cpu_name(str(facts.get("cpuinfo", "")))
    return machine, f"{name} ({machine})" if name else machine


def elsewhere(artifact: Artifact, machine: str) -> str | None:
    """Returns why times of `machine` say nothing of a file: it is for another target. None where they do."""
    if artifact.target is None or targets.is_of(artifact.target, machine):
        return None
    device = targets.find(artifact.target).device
    return f"latency not measured on the target ({artifact.target}): --device {DEVICE_FORMS.get(device, device)}"


def elsewhere_notes(artifacts: Sequence[Artifact], machine: str, processor: str, device: Device) -> tuple[str, ...]:
    """Returns a note that names the processor where what it measures is no part of the verdicts."""
    found = {artifact.target: reason for artifact in artifacts if (reason := elsewhere(artifact, machine))}
    if not found or device.timing == "emulated":
        return ()
    return (f"the times are those of {processor} and no part of the verdicts: {'; '.join(found.values())}",)


def unpruned(artifacts: Sequence[Artifact], original: Model) -> list[Artifact]:
    """Returns artifacts without the mark of a pruned network where `original` is that network itself."""
    if not any(artifact.pruned for artifact in artifacts):
        return list(artifacts)
    own = pruned_mark.fingerprint(original.module)
    return [replace(artifact, pruned=None) if artifact.pruned == own else artifact for artifact in artifacts]


def fp32_references(
    original: Model, given: Sequence[Artifact], stack: ExitStack, progress: Progress
) -> tuple[dict[str, Artifact], tuple[str, ...]]:
    """Returns one fp32 file per format that needs one to compare with, given or exported for the while, and notes."""
    references = {a.format: a for a in given if a.precision == "fp32" and not a.pruned}
    missing = sorted({a.format for a in given if a.precision != "fp32" or a.pruned} - references.keys())
    notes: tuple[str, ...] = ()
    if original.onnx is not None and "executorch" in missing:
        missing.remove("executorch")
        notes = ("no fp32 .pte to compare speed with: ExecuTorch starts from a PyTorch model",)
    if missing:
        folder = Path(stack.enter_context(temporary_folder()))
        compressed = compress.compress(original, None, "fp32", progress)
        program = compressed.program if compressed is not None else None
        layouts = {artifact.format: artifact.layout for artifact in given}
        exports = stack.enter_context(emit.emitting(original, program, missing, False, progress, layouts))
        for format, exported in exports:
            path = folder / bundles.file_name(format)
            write_pieces(path, exported.pieces)
            references[format] = artifact_of(original, path, format, "fp32", layouts[format])
    return references, notes


def run_all(
    evaluation: Evaluation,
    original: baseline_cache.Reference,
    artifacts: Sequence[Artifact],
    metric: table.Metric,
    notes: list[str],
    device: Device,
    threads: int,
    journal: Journal,
    progress: Progress,
) -> tuple[Scores | None, dict[Artifact, Tally]]:
    """Runs the original and every file on all samples, chunk by chunk; what to know of the runs goes to `notes`.

    Returns the scores of the original, and what is kept of each file's outputs.
    """

    def runner(artifact: Artifact) -> Any:
        def run(chunk: Chunk) -> Sequence[np.ndarray]:
            result = journal.run(artifact, chunk.feeds, device=device, threads=threads, digest=chunk.digest)
            notes.extend(note for note in running.settings_notes(artifact, result) if note not in notes)
            return result.outputs

        return run

    calibrated = {name: known for a, name in labels(artifacts).items() if (known := bundles.calibrated_on(a))}
    seen = dict.fromkeys(calibrated, 0)

    def look(chunk: Chunk) -> None:
        digests = chunk.digests(evaluation.inputs) if calibrated else ()
        for name, known in calibrated.items():
            seen[name] += sum(digest in known for digest in digests)

    total = None if evaluation.chunks is None else evaluation.chunks * (1 + len(artifacts))
    with progress.step(f"Running the original and {', '.join(labels(artifacts).values())}", total) as advance:
        found = evaluate(evaluation, original, {a: runner(a) for a in artifacts}, metric, advance, look)
    for count in sorted(set(seen.values()) - {0}):
        names = ", ".join(name for name, shared in seen.items() if shared == count)
        notes.append(f"{names} calibrated on {count:,} of these {evaluation.count:,} samples, which flatters a little")
    return found
