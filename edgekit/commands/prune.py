"""Prune: take channels out of a network or mask its weights, fine-tune what is left, and save it for everyone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.artifacts import bundles
from edgekit.commands import preflight
from edgekit.compression import compress, training_samples
from edgekit.data import batch_axis
from edgekit.errors import EdgeKitError
from edgekit.loading import model_identity, with_data
from edgekit.loading.pruned_mark import MANIFEST
from edgekit.measuring import running
from edgekit.pruning import saved_model
from edgekit.pruning.options import Options, check
from edgekit.pruning.result import Pruned
from edgekit.pruning.steps import Job, checkpoint_of
from edgekit.util.atomic_files import new_folder, not_resumed, resumable, temporary_folder, write_json
from edgekit.util.progress import Progress, Silent

if TYPE_CHECKING:
    import torch

    from edgekit.loading.model import Model
    from edgekit.pruning.cost import Measured
    from edgekit.pruning.target_search import Found

OWN_MODULES = ("module", "state_dict", "checkpoint", "safetensors", "factory", "object")
MISSED = 1.05  # of the limit: what a measurement of another moment may be above it without a word
FASTER = 0.9  # of the original's latency: a masked file below it is called faster


def prune(
    model: Any,
    *,
    ratio: float | None = None,
    target_latency: str | None = None,
    target_size: str | None = None,
    sparsity: str | float | None = None,
    block: str | None = None,
    data: Any = None,
    train: Any = None,
    method: str | None = None,
    allocation: str | None = None,
    schedule: str = "one-shot",
    steps: int | None = None,
    epochs: int | None = None,
    finetune: Any = None,
    learning_rate: float | None = None,
    augment: bool = True,
    patience: int | None = None,
    round_to: int | None = None,
    seed: int = 0,
    formats: str | Sequence[str] | None = None,
    precision: str | None = None,
    device: str = "local:",
    threads: int = 1,
    timeout: float | None = None,
    inputs: Any = (),
    code: str | None = None,
    out: str | Path = ".",
    name: str | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Takes channels out of `model`, or masks weights of it, fine-tunes the rest, and saves it.

    One of four says how much. `ratio` is the share of the multiply-adds of convolution, linear and recurrent layers
    that goes: at least so much, and little more, as layers keep multiples of `round_to` channels (8) where they have
    two of them. `target_latency` ("0.6x" of the original's p50 in the same runtime, or "5ms") and `target_size`
    ("0.5x", "800kB") try out ratios and roundings on exported files, see `target_search`. `sparsity` sets weights to
    zero and leaves shapes alone: 0.8 is the share of zeros of a layer, taken in `block`s ("4x1", outputs × inputs)
    where they are given; "2:4" leaves two of four along the inputs.

    With a target, a sparsity, `formats` or a `precision`, files are exported to `formats` (all three) at `precision`
    (fp32), checked, timed on `device` in turn with the original's, and written beside the network.

    `data` is any source that `edgekit.data.sources.load` takes. The methods "taylor" and "wanda" and the allocation
    "sensitivity" read its calibration samples; with labels the accuracy is measured on its evaluation samples.
    Fine-tuning reads all samples of `train`, else those that calibration may read; the original is the teacher, so
    labels are not needed. `finetune`, a function or FILE.py:function, trains in its place, see
    `edgekit.compression.finetuning`. The schedule "cubic" goes to the end in `steps`, with a training after each.
    Without data the least weights go, and nothing is fine-tuned.

    Writes OUT/<name>-pruned/ with `model.pt2`, `model.safetensors`, `prune.json` and the files, whole or not at all;
    beside it lies a checkpoint while the training runs, from which `resume` goes on. Raises EdgeKitError for bad input,
    a network that cannot be traced or has nothing to prune, a ratio or target out of reach, and a training that
    diverges.
    """
    from edgekit.pruning import target_search

    progress = progress or Silent()
    preflight.check_prune(
        model,
        data=data,
        train=train,
        formats=formats,
        precision=precision,
        inputs=inputs,
        code=code,
        out=out,
        name=name,
        mean=mean,
        std=std,
    )
    plan = {"learning_rate": learning_rate, "augment": augment, "patience": patience, "seed": seed}
    options = check(
        ratio=ratio,
        target_latency=target_latency,
        target_size=target_size,
        sparsity=sparsity,
        block=block,
        method=method,
        allocation=allocation,
        schedule=schedule,
        steps=steps,
        epochs=epochs,
        finetune=finetune,
        round_to=round_to,
        formats=formats,
        precision=precision,
        device=device,
        threads=threads,
        timeout=timeout,
        resume=resume,
        has_data=data is not None or train is not None,
        plan=plan,
    )
    with progress.step("Loading"):
        given = data if data is not None else train
        original, source = with_data.load(model, data=given, inputs=inputs, code=code, mean=mean, std=std)
        check_form(original)
        model_identity.check_repeatable(original)
        lessons = (
            None if train is None or data is None else training_samples.lessons(train, original, source, mean, std)
        )
    job = Job(original, source, lessons, data is not None, options, progress)
    folder = Path(out) / f"{name or original.name}-pruned"
    identity = model_identity.identity(original, model)
    replaced = bundles.replaced(folder, MANIFEST, original.name, identity)
    checkpoint = folder.with_name(f"{folder.name}.checkpoint.pt")
    anew = not_resumed(checkpoint, resume)
    with resumable(checkpoint), new_folder(folder, saved_model.FOLDER) as building:
        result = _run(job, folder, building, checkpoint, resume)
        with progress.step("Saving"):
            notes = saved_model.save(original, result.module, model, code, building)
        result = replace(result, notes=(*anew, *result.notes, *notes, *replaced))
        write_json(building / MANIFEST, {**result.to_dict(), "original": identity})
    for number in (None, *range(1, options.steps + 1)):
        kept = checkpoint_of(checkpoint, number)
        for path in (kept, kept.with_suffix(".safetensors"), target_search.record_of(kept)):
            path.unlink(missing_ok=True)
    return result


def check_form(original: Model) -> None:
    """Raises EdgeKitError for a model that is a graph, whose shapes are constants already, or that has state."""
    if original.state:
        raise model_identity.no_state(original, "pruning and its training")
    batch_axis.check_first(original.inputs, "pruning")
    if original.form not in OWN_MODULES:
        raise EdgeKitError(
            f"{original.name} is a graph ({original.form}) with every shape built in: its layers cannot lose channels",
            "prune the PyTorch model it was exported from (weights with --code, or FILE.py:factory), then export that",
        )


def _run(job: Job, folder: Path, building: Path, checkpoint: Path, resume: bool) -> Pruned:
    """Searches where a target is given, changes the network, and measures its files in `building`."""
    from edgekit.pruning import cost, target_search
    from edgekit.quant.pruning.allocation import changes, parameters

    original, options, progress = job.original, job.options, job.progress
    wanted, found = options.files, None
    with ExitStack() as stack:
        if wanted is not None:
            device = stack.enter_context(running.opened(wanted.device, timeout=wanted.timeout))
            scratch = Path(stack.enter_context(temporary_folder()))
        with compress.quickest_threads(original):
            if options.limit is not None and wanted is not None:
                search = target_search.search(job, options.limit, wanted, device, scratch, checkpoint, resume)
                found = search.found
                changed = job.narrow(original.module, search.analysis, search.kept, checkpoint, resume)
            elif options.pattern is not None:
                changed = job.masks(checkpoint, resume)
            else:
                assert options.ratio is not None
                changed = job.channels(options.ratio, checkpoint, resume)
        measured: tuple[Measured, ...] = ()
        if wanted is not None:
            (scratch / "before").mkdir()
            final = job.changed(changed.module)
            places = building, scratch / "before"
            made = cost.measure(original, final, job.source, wanted, device, *places, progress)
            measured = tuple(replace(m, artifact=replace(m.artifact, path=folder / m.artifact.path.name)) for m in made)
    kept = changed.structure.kept if changed.structure is not None else {}
    layers = changes(original.module, changed.module, original.example, kept)
    return Pruned(
        folder,
        original.name,
        options,
        tuple(replace(layer, name=own_name(layer.name), kept=_own_names(layer.kept)) for layer in layers),
        tuple(replace(layer, name=own_name(layer.name)) for layer in changed.masked),
        (parameters(original.module), parameters(changed.module)),
        changed.unrecovered,
        changed.accuracy,
        changed.recovered,
        found,
        measured,
        tuple(dict.fromkeys((*job.notes(changed), *_told(options, found, measured, changed.masks)))),
        changed.module,
    )


def _told(
    options: Options, found: Found | None, measured: Sequence[Measured], masks: Mapping[str, torch.Tensor]
) -> list[str]:
    """Returns what the measurement of the final files says of what was asked."""
    notes = [found.reason] if found else []
    if options.limit is not None:
        latency = options.limit.kind == "latency"
        costs = {m.artifact.format: (m.cost.value, m.original_cost.value) for m in measured}
        if not latency:
            costs = {m.artifact.format: (float(m.size), float(m.original_size)) for m in measured}
        shown = ", ".join(f"{new / old:.2f}x in {format}" for format, (new, old) in costs.items())
        missed = [f for f, (new, old) in costs.items() if new > MISSED * options.limit.allowed(old)]
        kept = f"missed in {', '.join(missed)}: prune again on a quiet machine, or ask for less" if missed else "kept"
        notes.append(
            f"the final files, measured again: {shown} of the original's {options.limit.kind}; the target is {kept}"
        )
    if masks and measured:
        gone = sum(int((~mask).sum()) for mask in masks.values())
        lost = [m.artifact.path.name for m in measured if m.zeros < gone]
        if lost:
            notes.append(f"{', '.join(lost)} stores some masked weights in a form that hides the zeros, or not at all")
        shown = ", ".join(f"{m.speed_share:.2f}x in {m.artifact.format}" for m in measured)
        quick = [m.artifact.format for m in measured if m.speed_share < FASTER]
        saved = ", ".join(f"{m.packed / m.original_packed:.2f}x in {m.artifact.format}" for m in measured)
        faster = f"{', '.join(quick)} runs zeros faster" if quick else "none of these runtimes runs zeros faster"
        notes.append(f"zeros make the files smaller once they are compressed ({saved}); {faster} (p50 {shown})")
    return notes


def own_name(path: str) -> str:
    """Returns a layer's name in the user's own model."""
    return path.removeprefix("inner.") or "(the model)"


def _own_names(text: str | None) -> str | None:
    return text.replace("inner.", "") if text is not None else None
