"""Export a model: compress it, write the files of a target, and check each against the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import targets
from edgekit.artifacts import bundles, int8_coverage
from edgekit.artifacts.artifact import Artifact
from edgekit.commands import preflight
from edgekit.commands import prune as pruning
from edgekit.compression import compress, emit, gains, mixed_precision, qat_training
from edgekit.compression.emit import artifact_of
from edgekit.data import batch_axis, sources
from edgekit.errors import EdgeKitError, NotFaithful, SeveralErrors
from edgekit.judging import noise_floors, verdicts
from edgekit.loading import model_identity, with_data
from edgekit.measuring import running
from edgekit.measuring.feeds import first_target, golden_feeds
from edgekit.metrics import parity
from edgekit.types import INT8_ARITHMETIC
from edgekit.util.atomic_files import new_folder, resumable, write_pieces
from edgekit.util.progress import Progress, Silent

if TYPE_CHECKING:
    from edgekit.compression.qat_training import Qat
    from edgekit.loading.model import Model


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

    `model` is a torch.nn.Module or any source that `edgekit.loading.model.load` takes; `data` any that
    `edgekit.data.sources.load` takes (int8 calibrates on it; every precision is checked on it). Without a `precision`
    that is int8 where there is data, and else the best that needs none; without `formats` those of the target that can
    hold the model, and a note on each that cannot. With `tflite_layout` "nhwc" the .tflite file takes and gives rank-4
    tensors channels-last; golden values and the manifest's shapes stay NCHW. At int8, `max_drop` keeps the fewest
    layers in float with which at most so many points of top-1 are lost on labeled data, and `sensitivity` measures
    every layer; see `edgekit.compression.mixed_precision`. With `qat` the network is trained for int8 first; see
    `edgekit.Qat`. With `prune` that share of the multiply-adds goes before all that, and what is left is fine-tuned;
    see `edgekit.prune`, whose OUT/<name>-pruned/ is written too. Files are then checked against the pruned network.
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
        original, source = with_data.load(model, data=data, inputs=inputs, code=code, mean=mean, std=std)
    if original.state and (qat is not None or prune is not None or sensitivity or max_drop is not None):
        raise model_identity.no_state(original, "--qat, --prune, --sensitivity and --max-drop")
    if qat is not None:
        batch_axis.check_first(original.inputs, "--qat")
    model_identity.check_repeatable(original)
    identity = model_identity.identity(original, model)
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
    wanted = (precision,) if precision is not None else compress.precisions(original, source, row.precision)
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
        return (compress.ONNX_IS_FP32,)
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
    from edgekit.quant.ptq.recipes import RECIPES

    row, recipe, folder = targets.find(plan.target), RECIPES[precision], plan.folder
    chosen = [*targets.find_formats(plan.formats, row)]
    left_out: dict[str, EdgeKitError] = {}
    if plan.formats is None and original.onnx is not None and "executorch" in chosen:
        chosen = [format for format in chosen if format != "executorch"]
        left_out["executorch"] = EdgeKitError("ExecuTorch starts from a PyTorch model, and this is an ONNX file")
    chosen, without = emit.holding(original, chosen, plan.formats is not None)
    layouts = preflight.find_layouts(plan.tflite_layout, chosen)
    checkpoint = folder.with_name(f"{folder.name}.checkpoint.pt")
    with resumable(checkpoint), new_folder(folder, bundles.FILES) as building, ExitStack() as stack:
        tuned = None
        if source is not None and original.onnx is None and (sensitivity or max_drop is not None):
            tuned = mixed_precision.tune(original, source, progress, max_drop, sensitivity)
        trained = None
        if qat is not None and source is not None:
            trained = qat_training.train(original, source, qat, checkpoint, progress, mean, std)
        made = tuned or trained
        compressed = made.compressed if made else compress.compress(original, source, recipe.name, progress)
        compressed, precision, precision_notes = gains.named(original, compressed, recipe.name, progress)
        program = compressed.program if compressed is not None else None
        feeds, samples = golden_feeds(original, source)

        def building_of(format: str, exported: emit.Exported) -> Artifact:
            path = building / bundles.file_name(format)
            return artifact_of(original, path, format, exported.precision or precision, layouts[format])

        def write(format: str, exported: emit.Exported) -> None:
            write_pieces(building_of(format, exported).path, exported.pieces)

        def try_out(format: str, exported: emit.Exported) -> Any:
            return emit.try_out(building_of(format, exported), feeds, exported)

        exports = stack.enter_context(
            emit.emitting(
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
            reference = graph = running.run_module(original.module, feeds, state=original.state)
            if program is not None:
                graph = running.run_module(program.module(check_guards=False), feeds, state=original.state)
        classes = parity.classifies(first_target(original, source))
        floors = noise_floors.floors(program, original.onnx)
        graph_parity = parity.parities(*running.aligned(reference, graph, original), floors=floors)
        if plan.free and source is None and verdicts.loss(recipe.name, parity.worst(graph_parity)):
            raise NotFaithful(f"its SQNR is {parity.worst(graph_parity).sqnr_db:.1f} dB")
        results, entries = {"original": reference}, []
        notes = [*without, *plan.notes]
        notes += source.notes if source else ("checked on random inputs: no --data was given",)
        notes += (source.shared,) if source and source.shared and recipe.needs_data else ()
        notes += compressed.notes if compressed is not None else ()
        notes += made.notes if made else ()
        notes += precision_notes
        notes += verdicts.loss(precision, parity.worst(graph_parity))
        notes += verdicts.silent(reference, floors)
        for format, exported in exports:
            if exported.error is not None:
                left_out[format] = exported.error
                continue
            artifact, tried = building_of(format, exported), exported.checked
            each = parity.parities(*running.aligned(reference, tried.outputs, original), classes, floors)
            why = verdicts.faithful(artifact.precision, each, graph_parity)
            if why is not None:
                from edgekit.judging import discrepancies

                discrepancies.check(original, program, feeds, reference, graph_parity, recipe.name)
                others = [other for other in chosen if other != format]
                finite = isfinite(parity.worst(each).max_abs)
                refused = discrepancies.refusal(original, feeds, artifact, why, finite, others)
                if plan.formats is not None:
                    raise refused
                left_out[format] = refused
                continue
            results[format] = tried.outputs
            found = int8_coverage.structure(artifact)
            facts = {"parity": {**parity.worst(each).to_dict(), "samples": samples}, **exported.facts}
            facts |= {"structure": found.to_dict()} if found else {}
            about_file = {"format": format, "file": artifact.path.name, "precision": artifact.precision}
            entries.append({**about_file, "layout": layouts[format].upper(), **facts})
            notes += exported.notes
            known = row.int8_notes.get(format) if artifact.precision in INT8_ARITHMETIC else None
            notes += (known,) if known else running.settings_notes(artifact, tried)
            notes += found.notes(format) if found else ()
        about_calibration: dict[str, Any] = {}
        if source is not None and recipe.needs_data:
            about_calibration["calibration"] = compress.calibrated_on(original, source)
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
            qparams=compress.qparams(original, program),
            artifacts=entries,
            notes=list(dict.fromkeys(notes)),
        )
    if trained is not None:
        checkpoint.unlink(missing_ok=True)
    return bundles.read(folder)


def _none_left(left_out: Mapping[str, EdgeKitError]) -> EdgeKitError:
    """Returns the error of an export that no format can hold: NotFaithful where another precision may be."""
    errors = {error.what: error for error in left_out.values()}
    if any(isinstance(error, NotFaithful) for error in errors.values()):
        helps = dict.fromkeys(error.help for error in errors.values() if error.help)
        return NotFaithful("; ".join(errors), "; ".join(helps))
    return next(iter(errors.values())) if len(errors) == 1 else SeveralErrors(tuple(errors.values()))
