"""The jobs, each readable on one screen: export a model, compare files with it, profile a file, verify a bundle."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import baseline as baselines
from edgekit import (
    batch_axis,
    files,
    gains,
    judge,
    metrics,
    preflight,
    pruned_files,
    pruning,
    rounding,
    stages,
    steady,
    suspects,
    targets,
    throttling,
    tune,
)
from edgekit import bundle as bundles
from edgekit import data as sources
from edgekit import explain as explaining
from edgekit import ops as op_times
from edgekit import qat as qats
from edgekit.doctor import cpu_name
from edgekit.errors import EdgeKitError, NotFaithful, SeveralErrors
from edgekit.evaluation import Chunk, Evaluation, Tally, evaluate
from edgekit.journal import Journal
from edgekit.progress import Progress, Silent
from edgekit.results import (
    Artifact,
    Baseline,
    Comparison,
    Latency,
    Layout,
    Measurement,
    OpTimes,
    Parity,
    Profile,
    Replay,
    labels,
)
from edgekit.runtimes import Timing

if TYPE_CHECKING:
    import numpy as np

    from edgekit.model import Model
    from edgekit.qat import Qat
    from edgekit.runtimes.devices.device import Device

ROUNDS = 3  # processes that time each artifact, taken in turn: machines drift
MOST_ROUNDS = 20  # processes that time a file which is profiled, where its p50 is not known earlier
LONGEST_S = 60.0  # seconds of timed runs after which ROUNDS processes are enough for a profile
TIMING = Timing(warmup_runs=50, seconds=0.6, min_runs=20, max_runs=5000)
DEVICE_FORMS = {
    "adb": "adb:SERIAL",
    "ssh": "ssh://user@host",
    "local": "local:",
}  # of a target's device, as it is given
SAME_MACHINE = ("local:", "python:")  # devices that are this machine


def export(
    model: Any,
    *,
    target: str = "android",
    formats: str | Sequence[str] | None = None,
    precision: str | None = None,
    data: Any = None,
    inputs: Any = (),
    code: str | None = None,
    out: str | Path = ".",
    name: str | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    tflite_layout: str = "nchw",
    max_drop: float | None = None,
    sensitivity: bool = False,
    qat: Qat | None = None,
    prune: float | None = None,
    progress: Progress | None = None,
) -> bundles.Bundle:
    """Exports `model` for `target`, checks every file against the original, and returns the bundle.

    `model` is a torch.nn.Module or any source that `edgekit.model.load` takes; `data` any that `edgekit.data.load`
    takes (int8 calibrates on it; every precision is checked on it). Without a `precision` that is int8 where there is
    data, and else the best that needs none; without `formats` those of the target that can hold the model, and a note
    on each that cannot. With `tflite_layout` "nhwc" the .tflite file takes and gives rank-4 tensors channels-last;
    golden values and the manifest's shapes stay NCHW. At int8, `max_drop` keeps the fewest layers in float with which
    at most so many points of top-1 are lost on labeled data, and `sensitivity` measures every layer; see
    `edgekit.tune`. With `qat` the network is trained for int8 first; see `edgekit.Qat`. With `prune` that share of the
    multiply-adds goes before all that, and what is left is fine-tuned; see `edgekit.prune`, whose OUT/<name>-pruned/ is
    written too. Files are then checked against the pruned network.
    Writes OUT/<name>-<target>/ whole or not at all, and never over the bundle of another model. Raises EdgeKitError for
    bad input, for a file of a format that was asked for and that is not faithful to the model, where `max_drop` cannot
    be reached, and for a training that diverges.
    """
    progress = progress or Silent()
    data = sources.rereadable(data)
    preflight.check_export(
        model,
        target=target,
        formats=formats,
        precision=precision,
        data=data,
        inputs=inputs,
        code=code,
        out=out,
        name=name,
        mean=mean,
        std=std,
        tflite_layout=tflite_layout,
        max_drop=max_drop,
        sensitivity=sensitivity,
        qat=qat,
        prune=prune,
    )
    row = targets.find(target)
    if qat is not None:
        qat = replace(qat, train=sources.rereadable(qat.train))
        data = qat.train if data is None else data
    with progress.step("Loading"):
        original, source = stages.load(model, data=data, inputs=inputs, code=code, mean=mean, std=std)
    if original.state and (qat is not None or prune is not None or sensitivity or max_drop is not None):
        raise stages.no_state(original, "--qat, --prune, --sensitivity and --max-drop")
    if qat is not None:
        batch_axis.check_first(original.inputs, "--qat")
    stages.check_repeatable(original)
    identity = stages.identity(original, model)
    about: dict[str, Any] = {"name": original.name, "form": original.form, "identity": identity}
    pruned_notes: tuple[str, ...] = ()
    if prune is not None:
        narrow = pruning.prune(
            model,
            ratio=prune,
            data=data,
            inputs=inputs,
            code=code,
            out=out,
            name=name,
            mean=mean,
            std=std,
            progress=progress,
        )
        original = replace(original, module=narrow.module)
        about["pruned"], pruned_notes = narrow.summary, narrow.summary_notes
    folder = Path(out) / f"{name or original.name}-{target}"
    bundles.replaced(folder, bundles.MANIFEST, name or original.name, identity)  # refuses now, before the work
    given: dict[str, Any] = {"source": source, "qat": qat, "max_drop": max_drop, "sensitivity": sensitivity}
    given |= {"mean": mean, "std": std}
    plan = _Plan(folder, target, formats, tflite_layout, about, (*original.notes, *pruned_notes), precision is None)
    wanted = (precision,) if precision is not None else stages.precisions(original, source, row.precision)
    failed: list[str] = []
    for choice in wanted:
        said = _default_notes(model, target, choice, code, original, source, failed) if precision is None else ()
        try:
            return _write(original, replace(plan, notes=(*said, *plan.notes)), choice, progress, **given)
        except NotFaithful as error:
            if choice == wanted[-1]:
                raise
            failed.append(f"{choice} does not suit this model: {error.what}")
    raise AssertionError("at least one precision is tried")


@dataclass(frozen=True)
class _Plan:
    """What an export is to write, whatever the precision: the folder, what the manifest says, and notes.

    With `free` choice of the precision a poor one is given up for the next.
    """

    folder: Path
    target: str
    formats: str | Sequence[str] | None
    tflite_layout: str
    about: Mapping[str, Any]
    notes: tuple[str, ...]
    free: bool


def _default_notes(
    model: Any,
    target: str,
    precision: str,
    code: str | None,
    original: Model,
    source: sources.Data | None,
    failed: Sequence[str],
) -> tuple[str, ...]:
    """Returns why `precision` was chosen, and the command for int8."""
    if original.onnx is not None:
        return (stages.ONNX_IS_FP32,)
    if source is not None:
        return ()
    why = ", as linear and recurrent layers hold most weights" if precision == "int8-dynamic" else ""
    if isinstance(model, str | Path):
        more = f" --code {code}" if code is not None else ""
        command = f"edgekit export {model}{more} --target {target} --precision int8 --data DATA"
    else:
        command = f'edgekit.export(model, target="{target}", precision="int8", data=...)'
    return (*failed, f"{precision}, the best that needs no data{why}; for int8: {command}")


def _write(
    original: Model,
    plan: _Plan,
    precision: str,
    progress: Progress,
    *,
    source: sources.Data | None,
    qat: Qat | None,
    max_drop: float | None,
    sensitivity: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> bundles.Bundle:
    """Compresses `original` to `precision`, exports and checks every file, and writes the bundle."""
    from edgekit.quant.recipes import RECIPES

    row, recipe, folder = targets.find(plan.target), RECIPES[precision], plan.folder
    chosen = [*targets.find_formats(plan.formats, row)]
    left_out: dict[str, EdgeKitError] = {}
    if plan.formats is None and original.onnx is not None and "executorch" in chosen:
        chosen = [format for format in chosen if format != "executorch"]
        left_out["executorch"] = EdgeKitError("ExecuTorch starts from a PyTorch model, and this is an ONNX file")
    chosen, without = stages.holding(original, chosen, plan.formats is not None)
    layouts = preflight.find_layouts(plan.tflite_layout, chosen)
    checkpoint = folder.with_name(f"{folder.name}.checkpoint.pt")
    with files.resumable(checkpoint), files.new_folder(folder, bundles.FILES) as building, ExitStack() as stack:
        tuned = None
        if source is not None and original.onnx is None and (sensitivity or max_drop is not None):
            tuned = tune.tune(original, source, progress, max_drop, sensitivity)
        trained = None
        if qat is not None and source is not None:
            trained = qats.train(original, source, qat, checkpoint, progress, mean, std)
        made = tuned or trained
        compressed = made.compressed if made else stages.compress(original, source, recipe.name, progress)
        compressed, precision, precision_notes = gains.named(original, compressed, recipe.name, progress)
        program = compressed.program if compressed is not None else None
        feeds, samples = stages.golden_feeds(original, source)

        def building_of(format: str, exported: stages.Exported) -> Artifact:
            path = building / bundles.file_name(format)
            return artifact_of(original, path, format, exported.precision or precision, layouts[format])

        def write(format: str, exported: stages.Exported) -> None:
            files.write_pieces(building_of(format, exported).path, exported.pieces)

        def try_out(format: str, exported: stages.Exported) -> Any:
            return stages.try_out(building_of(format, exported), feeds, exported)

        exports = stack.enter_context(
            stages.emitting(
                original,
                program,
                chosen,
                recipe.half_weights,
                progress,
                layouts,
                source,
                write,
                try_out,
                plan.formats is None,
            )
        )
        with progress.step("Running the original"):
            reference = graph = stages.run_module(original.module, feeds, state=original.state)
            if program is not None:
                graph = stages.run_module(program.module(check_guards=False), feeds, state=original.state)
        classes = judge.classifies(stages.first_target(original, source))
        floors = rounding.floors(program, original.onnx)
        graph_parity = judge.parities(*stages.aligned(reference, graph, original), floors=floors)
        if plan.free and source is None and judge.loss(recipe.name, judge.worst(graph_parity)):
            raise NotFaithful(f"its SQNR is {judge.worst(graph_parity).sqnr_db:.1f} dB")
        results, entries = {"original": reference}, []
        notes = [*without, *plan.notes]
        notes += source.notes if source else ("checked on random inputs: no --data was given",)
        notes += (source.shared,) if source and source.shared and recipe.needs_data else ()
        notes += compressed.notes if compressed is not None else ()
        notes += made.notes if made else ()
        notes += precision_notes
        notes += judge.loss(precision, judge.worst(graph_parity))
        notes += judge.silent(reference, floors)
        for format, exported in exports:
            if exported.error is not None:
                left_out[format] = exported.error
                continue
            artifact, tried = building_of(format, exported), exported.checked
            each = judge.parities(*stages.aligned(reference, tried.outputs, original), classes, floors)
            why = judge.faithful(artifact.precision, each, graph_parity)
            if why is not None:
                from edgekit import unfaithful

                unfaithful.check(original, program, feeds, reference, graph_parity, recipe.name)
                others = [other for other in chosen if other != format]
                finite = isfinite(judge.worst(each).max_abs)
                refused = unfaithful.refusal(original, feeds, artifact, why, finite, others)
                if plan.formats is not None:
                    raise refused
                left_out[format] = refused
                continue
            results[format] = tried.outputs
            found = suspects.structure(artifact)
            facts = {"parity": {**judge.worst(each).to_dict(), "samples": samples}, **exported.facts}
            facts |= {"structure": found.to_dict()} if found else {}
            about_file = {"format": format, "file": artifact.path.name, "precision": artifact.precision}
            entries.append({**about_file, "layout": layouts[format].upper(), **facts})
            notes += exported.notes
            known = row.int8_notes.get(format) if artifact.precision in judge.INT8_ARITHMETIC else None
            notes += (known,) if known else stages.settings_notes(artifact, tried)
            notes += found.notes(format) if found else ()
        about_calibration: dict[str, Any] = {}
        if source is not None and recipe.needs_data:
            about_calibration["calibration"] = stages.calibrated_on(original, source)
        if not entries:
            raise _none_left(left_out)
        for format, error in left_out.items():
            (building / bundles.file_name(format)).unlink(missing_ok=True)
            notes.append(f"{bundles.file_name(format)} was left out: {error.what}")
        entries.sort(key=lambda entry: chosen.index(entry["format"]))
        manifest = {"precision": bundles.precision_of(entries), "artifacts": entries}
        name, identity = folder.name.removesuffix(f"-{plan.target}"), plan.about["identity"]
        notes += bundles.replaced(folder, bundles.MANIFEST, name, identity, bundles.contents_of(manifest))
        bundles.write_golden(building, original.inputs, original.outputs, feeds, results)
        bundles.describe(
            building,
            model=plan.about,
            target=plan.target,
            precision=bundles.precision_of(entries),
            recipe={
                "name": recipe.name,
                "summary": recipe.summary,
                **about_calibration,
                **(made.to_dict() if made else {}),
            },
            inputs=original.inputs,
            outputs=original.outputs,
            state=original.state,
            preprocessing=source.preprocessing.to_dict() if source and source.preprocessing else None,
            labels=source.labels if source else (),
            qparams=stages.qparams(original, program),
            artifacts=entries,
            notes=list(dict.fromkeys(notes)),
        )
    if trained is not None:
        checkpoint.unlink(missing_ok=True)
    return bundles.read(folder)


def artifact_of(original: Model, path: Path, format: str, precision: str, layout: Layout) -> Artifact:
    """Returns the file at `path` as one that was exported from `original`."""
    state = () if format in bundles.KEEPS_STATE else original.state
    return Artifact(path, format, precision, original.inputs, original.outputs, layout, state=state)


def _none_left(left_out: Mapping[str, EdgeKitError]) -> EdgeKitError:
    """Returns the error of an export that no format can hold: NotFaithful where another precision may be."""
    errors = {error.what: error for error in left_out.values()}
    if any(isinstance(error, NotFaithful) for error in errors.values()):
        helps = dict.fromkeys(error.help for error in errors.values() if error.help)
        return NotFaithful("; ".join(errors), "; ".join(helps))
    return next(iter(errors.values())) if len(errors) == 1 else SeveralErrors(tuple(errors.values()))


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

    `metric` is one of `metrics.METRICS`, the user's own `FILE.py:function` or a function itself, and `max_drop` in the
    unit of its drop.
    Every file runs in processes of its own on `device`; latencies are taken in turn over `rounds` processes each (by
    default ROUNDS), pinned to `threads` cores, beside the fp32 file of the same runtime (exported here where none is
    given). The original is measured once on the same content, unless `cache` is off (see `edgekit.baseline`). A job
    that makes no progress for `timeout` seconds (by default 20) is ended. With `explain` the parity ladder is climbed
    too (see `edgekit.explain`), and a file that breaks on it is rejected. With `resume` runs that an earlier command
    finished before it failed are not run again. Raises EdgeKitError for bad input and for a file that its runtime
    cannot run.
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
    scale = metrics.find(metric)
    rounds = rounds or ROUNDS
    with ExitStack() as stack:
        there = stack.enter_context(stages.opened(device, baseline_device, timeout))
        found = expand(artifacts)
        with progress.step("Loading"):
            original, source = stages.load(
                model, data=data, inputs=inputs, code=code, mean=mean, std=std, like=found[0].inputs
            )
            if source is None:
                raise EdgeKitError(
                    "a comparison needs data", "give --data: real samples, with labels to measure accuracy"
                )
            baselines.check(original, baseline_device)
            stages.check_repeatable(original)
            given = unpruned([stages.fitted(artifact, original) for artifact in found], original)
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
        reference = baselines.Reference(original, baseline_device, threads, cache)
        settings: list[str] = []
        same_machine = device.startswith(SAME_MACHINE)
        machine, processor = processor_of(there)
        journal = stack.enter_context(Journal(resume))
        scores, tallies = run_all(evaluation, reference, given, scale, settings, there, threads, journal, progress)
        kept = reference.processes(rounds, TIMING)
        references, notes = fp32_references(original, given, stack, progress)
        ladder = None
        if explain:
            ladder = explaining.explain(original, source, given, evaluation.first, there, same_machine, progress)
        files_to_time = [*given, *(r for r in references.values() if r not in given)]
        baseline_latency, timed = race(
            original, files_to_time, evaluation.first, there, baseline_device, threads, rounds, kept, journal, progress
        )
        if kept is None:
            reference.keep(baseline_latency.processes, rounds, TIMING)
        names = labels(files_to_time)
        latencies = {names[artifact]: latency for artifact, (_, latency) in timed.items()}
        if same_machine and kept is None:
            latencies["the original"] = baseline_latency
        notes = (*notes, *settings, *throttling.notes(latencies, there))
    about = (baselines.note(baseline_device), baselines.CACHED if kept is not None else None)
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
        result = judge.accuracy(scale, scores, own) if scores is not None and own is not None else None
        is_reference = artifact.precision == "fp32" and not artifact.pruned
        fp32_file = None if is_reference else references.get(artifact.format)
        fp32_last, fp32 = timed[fp32_file] if fp32_file is not None else (None, None)
        structure = suspects.structure(artifact)
        blamed = structure.suspects if structure else None
        verdict = judge.verdict(
            artifact.precision,
            result,
            latency,
            fp32,
            near,
            max_drop,
            blamed,
            tune.most_sensitive(artifact),
            artifact.pruned is not None,
            elsewhere(artifact, machine),
            judge.unjudged(scale, outputs, tallies[artifact].outputs) if result is not None else (),
        )
        verdict = judge.explained(verdict, artifact, ladder or ())
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
        None if scores is None else metrics.value(scores),
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
    if near.max_rel <= judge.FP32_MAX_REL or not isfinite(near.max_abs) or artifact.precision.startswith("int"):
        return near
    program = None
    if original.onnx is None:
        compressed = stages.compress(original, None, "fp32", Silent())
        program = compressed.program if compressed is not None else None
    return tally.within(rounding.floors(program, original.onnx))


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


def expand(artifacts: Sequence[str | Path | bundles.Bundle]) -> list[Artifact]:
    """Turns bundles into their files, unchanged since the export, and paths of files into artifacts."""
    found: list[Artifact] = []
    for item in artifacts:
        if isinstance(item, bundles.Bundle) or bundles.is_bundle(Path(item)):
            bundle = item if isinstance(item, bundles.Bundle) else bundles.read(Path(item))
            for artifact, entry in zip(bundle.artifacts, bundle.manifest["artifacts"], strict=True):
                bundles.check_hash(artifact.path, entry["sha256"])
                found.append(artifact)
        else:
            found.append(identify(Path(item)))
    if not found:
        raise EdgeKitError("no artifacts to compare", "name files or bundle folders after the model")
    return list(dict.fromkeys(found))


def identify(path: Path) -> Artifact:
    """Returns the file at `path` as an artifact, as the bundle around it tells, or else as the file itself does."""
    if not path.is_file():
        raise EdgeKitError(f"no artifact at {path}", "name a .pte, .onnx or .tflite file, or a bundle folder")
    if (path.parent / bundles.MANIFEST).is_file():
        bundle = bundles.read(path.parent)
        for artifact, entry in zip(bundle.artifacts, bundle.manifest["artifacts"], strict=True):
            if artifact.path.name == path.name:
                bundles.check_hash(path, entry["sha256"])
                return artifact
    return replace(stages.bare(path), pruned=pruned_files.fingerprint_of(path.parent))


def unpruned(artifacts: Sequence[Artifact], original: Model) -> list[Artifact]:
    """Returns artifacts without the mark of a pruned network where `original` is that network itself."""
    if not any(artifact.pruned for artifact in artifacts):
        return list(artifacts)
    own = pruned_files.fingerprint(original.module)
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
        folder = Path(stack.enter_context(files.temporary_folder()))
        compressed = stages.compress(original, None, "fp32", progress)
        program = compressed.program if compressed is not None else None
        layouts = {artifact.format: artifact.layout for artifact in given}
        exports = stack.enter_context(stages.emitting(original, program, missing, False, progress, layouts))
        for format, exported in exports:
            path = folder / bundles.file_name(format)
            files.write_pieces(path, exported.pieces)
            references[format] = artifact_of(original, path, format, "fp32", layouts[format])
    return references, notes


def run_all(
    evaluation: Evaluation,
    original: baselines.Reference,
    artifacts: Sequence[Artifact],
    metric: metrics.Metric,
    notes: list[str],
    device: Device,
    threads: int,
    journal: Journal,
    progress: Progress,
) -> tuple[metrics.Scores | None, dict[Artifact, Tally]]:
    """Runs the original and every file on all samples, chunk by chunk; what to know of the runs goes to `notes`.

    Returns the scores of the original, and what is kept of each file's outputs.
    """

    def runner(artifact: Artifact) -> Any:
        def run(chunk: Chunk) -> Sequence[np.ndarray]:
            result = journal.run(artifact, chunk.feeds, device=device, threads=threads, digest=chunk.digest)
            notes.extend(note for note in stages.settings_notes(artifact, result) if note not in notes)
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


def race(
    original: Model,
    artifacts: Sequence[Artifact],
    feeds: Sequence[np.ndarray],
    device: Device,
    baseline_device: str,
    threads: int,
    rounds: int,
    kept: Sequence[tuple[float, ...]] | None,
    journal: Journal,
    progress: Progress,
) -> tuple[Latency, dict[Artifact, tuple[Any, Latency | None]]]:
    """Times the original and every artifact in turn, `rounds` times; returns latencies and each one's last result.

    The original is not timed again where its latencies are `kept` of an earlier command. On an emulated device each
    artifact runs once, for its instructions, and has no latency.
    """
    eager: list[tuple[float, ...]] = []
    results: dict[Artifact, list[Any]] = {artifact: [] for artifact in artifacts}
    with progress.step("Measuring latency", rounds * (len(artifacts) + (kept is None))) as advance:
        for count in range(rounds):
            if kept is None:
                eager.append(
                    stages.time_module(original.module, feeds, baseline_device, threads, TIMING, original.state)
                )
                advance()
            for artifact in artifacts:
                if count == 0 or device.timing == "measured":
                    run = journal.run(artifact, feeds, device=device, number=count, threads=threads, timing=TIMING)
                    results[artifact].append(replace(run, outputs=()))
                advance()
    timed = {artifact: (runs[-1], latency_of(runs, threads)) for artifact, runs in results.items()}
    return Latency(tuple(eager) if kept is None else tuple(kept), threads), timed


def latency_of(runs: Sequence[Any], threads: int) -> Latency | None:
    """Returns the latencies of several results of one file; None where an emulator ran it, whose times say nothing."""
    return Latency(tuple(r.latency_ms for r in runs), threads) if runs[-1].timing == "measured" else None


def profile(
    artifact: str | Path | bundles.Bundle,
    *,
    device: str = "local:",
    threads: int = 1,
    ops: bool = False,
    trace: str | Path | None = None,
    timeout: float | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Profile | tuple[Profile, ...]:
    """Measures latency, load time and memory of a file on `device`, over several processes.

    Of a bundle, or its folder, each file is measured: that gives one Profile a file. The inputs are the golden ones of
    the bundle, and of a bare file made up (see `example_inputs`).
    Processes of one file differ, in where its memory lies and in what else the machine does: up to MOST_ROUNDS of them
    are run until the p50 of the runs that nothing slowed down is known (see `edgekit.steady`). Notes say how many runs
    that leaves out, and where it is not known.
    With `ops` the runtime's own profiler then times each op, in a process of its own, and `trace` names a file for all
    of its runs as a Chrome trace; where the runtime gives no such times, a note says why. `timeout` and `resume` are
    those of `compare`. On an emulated device instructions are counted instead, in one process. Raises EdgeKitError
    where `ops` are asked of one, or a `trace` without `ops`.
    """
    preflight.check_profile(artifact, device=device, ops=ops, trace=trace)
    options: dict[str, Any] = {"device": device, "threads": threads, "ops": ops, "timeout": timeout, "resume": resume}
    if isinstance(artifact, bundles.Bundle) or bundles.is_bundle(Path(artifact)):
        found = expand([artifact])
        traces = [trace_of(trace, each, len(found)) for each in found]
        return tuple(
            _profile(each, trace=path, **options, progress=progress or Silent())
            for each, path in zip(found, traces, strict=True)
        )
    return _profile(identify(Path(artifact)), trace=trace, **options, progress=progress or Silent())


def trace_of(trace: str | Path | None, artifact: Artifact, files: int) -> Path | None:
    """Returns where the trace of one of several files goes: `t.json` becomes `t-onnx.json`."""
    if trace is None or files == 1:
        return None if trace is None else Path(trace)
    return Path(trace).with_stem(f"{Path(trace).stem}-{artifact.format}")


def _profile(
    subject: Artifact,
    *,
    device: str,
    threads: int,
    ops: bool,
    trace: str | Path | None,
    timeout: float | None,
    resume: bool,
    progress: Progress,
) -> Profile:
    times: OpTimes | None = None
    subject, notes = stages.closed(subject)
    feeds = stages.profile_feeds(subject)
    with Journal(resume) as journal, stages.opened(device, timeout=timeout) as there:
        if ops and there.timing == "emulated":
            raise EdgeKitError(f"{device} is emulated: the times of its ops say nothing", "leave out --ops")
        most = MOST_ROUNDS if there.timing == "measured" else 1
        runs: list[Any] = []

        def run() -> None:
            runs.append(journal.run(subject, feeds, device=there, number=len(runs), threads=threads, timing=TIMING))

        with progress.step("Measuring latency", most) as advance:
            while not runs or (len(runs) < most and not _is_known(runs, threads)):
                run()
                advance()
        latency = undisturbed_of(runs, threads)
        notes = (*notes, *throttling.unsteady(latency))
        if ops:
            with progress.step("Profiling the ops"):
                times, lacking = _op_times(subject, feeds, there, threads, latency, trace)
            notes = (*notes, *lacking)
        notes = (*notes, *throttling.notes({subject.path.name: latency}, there))
    last = runs[-1]
    notes = (*notes, *stages.settings_notes(subject, last))
    return Profile(
        subject,
        last.runtime,
        last.device,
        latency,
        last.load_ms,
        last.first_ms,
        last.peak_rss_bytes,
        last.timing,
        last.instructions,
        times,
        (*notes, *journal.notes),
    )


def undisturbed_of(runs: Sequence[Any], threads: int) -> Latency | None:
    """Returns what `latency_of` does, with the undisturbed runs told apart."""
    latency = latency_of(runs, threads)
    return steady.undisturbed(latency) if latency is not None else None


def _is_known(runs: Sequence[Any], threads: int) -> bool:
    """Whether the runs of a profile are enough."""
    latency = undisturbed_of(runs, threads)
    assert latency is not None  # an emulated file runs once
    return steady.is_known(latency) or (len(runs) >= ROUNDS and sum(latency.samples) > LONGEST_S * 1e3)


def _op_times(
    subject: Artifact,
    feeds: Sequence[np.ndarray],
    device: Device,
    threads: int,
    latency: Latency | None,
    trace: str | Path | None,
) -> tuple[OpTimes | None, tuple[str, ...]]:
    """Returns the time of each op, and writes the trace; without a profiler that is known, a note says so."""
    assert latency is not None
    runs = op_times.runs_for(latency.p50)
    try:
        result = stages.run(subject, feeds, device=device, threads=threads, trace_runs=runs)
        profiled = op_times.read(result.runtime, result.trace)
    except EdgeKitError as error:
        return None, (f"no per-op times: {error.what}",)
    if trace is not None:
        owners = op_times.modules(subject.path) if subject.format == "onnx" else None
        op_times.write_trace(Path(trace), profiled, f"{subject.path.name} on {device.uri}", owners)
    return op_times.summarize(profiled, latency.p50 * 1e3), ()


def verify(
    bundle: str | Path | bundles.Bundle,
    *,
    device: str = "local:",
    timeout: float | None = None,
    progress: Progress | None = None,
) -> tuple[Replay, ...]:
    """Replays a bundle's golden inputs on `device` and compares with the outputs that were recorded at export.

    A file whose hash has changed is not run. Raises EdgeKitError for a folder that is no bundle, and for a device
    that does not answer.
    """
    opened = bundles.read(bundle.path if isinstance(bundle, bundles.Bundle) else Path(bundle))
    with stages.opened(device, timeout=timeout, timed=False) as there:
        try:
            golden = bundles.read_golden(opened)
        except EdgeKitError as error:
            return tuple(Replay(artifact, None, error.what) for artifact in opened.artifacts)
        replays = []
        for artifact, entry in zip(opened.artifacts, opened.manifest["artifacts"], strict=True):
            with (progress or Silent()).step(f"Replaying {artifact.path.name}"):
                same = device.startswith(SAME_MACHINE) and opened.made_here
                replays.append(_replay(artifact, entry, golden, opened.manifest["qparams"], there, same))
        return tuple(replays)


def _replay(
    artifact: Artifact,
    entry: Mapping[str, Any],
    golden: Mapping[str, np.ndarray],
    qparams: Mapping[str, Any],
    device: Device,
    same_machine: bool,
) -> Replay:
    try:
        bundles.check_hash(artifact.path, entry["sha256"])
        feeds = [golden[f"input/{spec.name}"] for spec in artifact.inputs]
        outputs = stages.run(artifact, feeds, device=device).outputs
        recorded = [golden[f"{artifact.format}/{spec.name}"] for spec in artifact.outputs]
        before = [golden[f"original/{spec.name}"] for spec in artifact.outputs]
        rounded = [found.max_abs for found in judge.parities(*stages.aligned(before, recorded, artifact))]
        floors = rounded if artifact.precision == "fp32" else ()  # what was right then is no difference now
        near = judge.parities(*stages.aligned(recorded, outputs, artifact), floors=floors)
    except EdgeKitError as error:
        return Replay(artifact, None, error.what)
    scales = stages.output_scales(qparams, artifact.outputs)
    allowed = judge.steps_allowed(artifact.format, same_machine)
    return Replay(artifact, judge.worst(near), judge.reproduced(artifact.precision, near, scales, allowed))
