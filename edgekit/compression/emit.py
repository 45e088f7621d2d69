"""Emit files: lower a program to each format, write the file, and try it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.artifacts import bundles
from edgekit.artifacts.artifact import Artifact
from edgekit.artifacts.int8_coverage import counted, missing_kernels
from edgekit.compression.compress import compress
from edgekit.data import sources
from edgekit.errors import EdgeKitError
from edgekit.measuring.running import run
from edgekit.types import SUFFIXES, Layout
from edgekit.util import ragged_arrays
from edgekit.util.forking import beside, is_copy
from edgekit.util.memory import is_large, map_weights, release_memory
from edgekit.util.progress import Progress, Silent

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from torch.export import ExportedProgram

    from edgekit.exporters.tflite import Description
    from edgekit.loading.model import Model


HOLDS_RAGGED = ("onnx",)  # formats whose outputs may have a size that the input's values decide


@dataclass(frozen=True)
class Exported:
    """One format's file, what there is to say about it, and what a check of it returned.

    `pieces` are its bytes, one behind the other, to be read once: a large model's are made as they are read.
    """

    pieces: Iterable[bytes | memoryview]
    facts: dict[str, Any]
    notes: tuple[str, ...]
    checked: Any = None
    precision: str | None = None  # where it is not the one that was asked for, which changed nothing in this format
    error: EdgeKitError | None = None  # why there is no file


@contextmanager
def emitting(
    original: Model,
    program: ExportedProgram | None,
    formats: Sequence[str],
    half_weights: bool,
    progress: Progress,
    layouts: Mapping[str, Layout],
    source: sources.Data | None = None,
    write: Callable[[str, Exported], None] | None = None,
    check: Callable[[str, Exported], Any] | None = None,
    tolerant: bool = False,
) -> Iterator[Iterator[tuple[str, Exported]]]:
    """Yields an iterator over each format's file, in the layout of `layouts`. TFLite is lowered from the ONNX model.

    A format that cannot hold the model raises EdgeKitError; with `tolerant` its Exported tells the error instead.

    What `source` tells of images and labels goes into the formats that have a place for it. Each file is given to
    `write`, after which it is not in memory any more, and then to `check`. The .pte file comes last: it takes longest,
    and is lowered and checked on another core from the start, so that what `check` returns has to be picklable. Of a
    model with LARGE weights, which each format holds more than once, one comes after the other, and the ONNX model is
    let go of before files are checked.
    """
    if "executorch" in formats and program is None:
        raise EdgeKitError(
            f"ExecuTorch starts from a PyTorch model, and {original.name} is an ONNX file",
            "leave it out: --format onnx,tflite",
        )
    others = [format for format in formats if format != "executorch"]
    pte = len(others) < len(formats)
    weights_alone = pte and _quantizes_weights_alone(program)

    large = is_large(original.module)
    if large:
        map_weights()

    def written(format: str, exported: Exported) -> Exported:
        if write is None:
            return exported
        write(format, exported)
        return replace(exported, pieces=())

    def checked(format: str, exported: Exported) -> Exported:
        return exported if check is None else replace(exported, checked=check(format, exported))

    def attempt(make: Callable[[], Exported]) -> Exported:
        try:
            return make()
        except EdgeKitError as error:
            if program is None and error.help:  # an ONNX file has no way to ExecuTorch
                error.help = error.help.replace("--format onnx or executorch", "--format onnx")
            if not tolerant:
                raise
            return Exported((), {}, (), error=error)

    @cache
    def proto() -> onnx.ModelProto:
        with progress.step("Exporting ONNX"):
            return _onnx(original, program, half_weights)

    def other(format: str) -> Exported:
        plain = half_weights and not _has_halves(proto())
        if large:
            release_memory()
        if format == "onnx":
            exported = _onnx_file(last if large else proto, program is not None)
        else:
            exported = _tflite(proto(), original, source, layouts["tflite"], progress)
        if plain:
            exported = replace(exported, precision="fp32", notes=(*exported.notes, _no_gain(format, "fp16")))
        exported = written(format, exported)
        return exported if large else finished(format, exported)

    def last() -> onnx.ModelProto:
        """The ONNX model, of which nothing else is made."""
        model = proto()
        proto.cache_clear()
        return model

    def finished(format: str, exported: Exported) -> Exported:
        with progress.step(f"Checking {bundles.file_name(format)}") if check is not None else nullcontext():
            return checked(format, exported)

    def executorch() -> Exported:
        with progress.step("Lowering to ExecuTorch"):
            return lowered()

    def files() -> Iterator[tuple[str, Exported]]:
        if large:
            made = {format: attempt(partial(other, format)) for format in sorted(others, reverse=True)}
            proto.cache_clear()
            release_memory()
            for format in others:
                exported = made[format]
                yield format, exported if exported.error else attempt(partial(finished, format, exported))
        else:
            for format in others:
                yield format, attempt(partial(other, format))
        if pte:
            yield "executorch", attempt(executorch)

    def lower() -> Exported:
        exported = _executorch(original, program, half_weights)
        if weights_alone and not _holds_int8(b"".join(exported.pieces)):
            note = _no_gain("executorch", "int8 weights beside float inputs")
            plain = compress(original, None, "fp32", Silent())
            assert plain is not None  # an ONNX file has no .pte
            exported = _executorch(original, plain.program, False)
            exported = replace(exported, precision="fp32", notes=(*exported.notes, note))
        exported = written("executorch", exported)
        if large:
            release_memory()
        return checked("executorch", exported)

    with beside(lower, useful=pte and bool(others) and not large) as lowered:
        yield files()


def _has_halves(proto: onnx.ModelProto) -> bool:
    """Whether a model stores weights as float16."""
    from edgekit.exporters.onnx.halves import has_halves

    return has_halves(proto)


def _quantizes_weights_alone(program: ExportedProgram) -> bool:
    """Whether `program` has int8 weights, and multiplies by them in float."""
    from edgekit.quant.ptq.shares import LEAST_WEIGHTS, shares

    found = shares(program)
    return found.weights >= LEAST_WEIGHTS and found.products < LEAST_WEIGHTS


def _holds_int8(data: bytes) -> bool:
    """Whether a .pte file stores more than hardly any of its weights as int8: XNNPACK may have taken them as floats."""
    from edgekit.artifacts.pte_file import Program
    from edgekit.quant.ptq.shares import LEAST_WEIGHTS

    sizes = {"int8": 0, "float32": 0}
    for dtype, shape, _ in Program(data).constant_values():
        if len(shape) > 1 and dtype in sizes:
            sizes[dtype] += prod(shape)
    return sizes["int8"] >= LEAST_WEIGHTS * sum(sizes.values())


def _no_gain(format: str, what: str) -> str:
    return f"{bundles.file_name(format)}: {what} changed nothing in this format: the file is fp32, and is called so"


def _onnx_file(proto: Callable[[], onnx.ModelProto], ours: bool) -> Exported:
    """Makes the file from what gives the ONNX model, which is let go of as soon as it was read."""
    from edgekit.exporters.onnx.ort_passes import fastest
    from edgekit.exporters.onnx.pieces import file_pieces

    if ours:
        model = fastest(proto())
        return Exported(file_pieces(model), {"opset": model.opset_imports[""]}, ())
    final = proto()
    return Exported((final.SerializeToString(),), {"opset": final.opset_import[0].version}, ())


def _tflite(
    proto: onnx.ModelProto, original: Model, source: sources.Data | None, layout: Layout, progress: Progress
) -> Exported:
    from edgekit.exporters.tflite import check_int8, convert_with_notes

    with progress.step("Lowering to TFLite"):
        shapes = {spec.name: spec.shape for spec in original.inputs} if original.onnx is not None else None
        converted = convert_with_notes(proto, layout=layout, about=_about(original, source), shapes=shapes)
    notes = converted.notes
    if converted.places:
        with progress.step("Checking the int8 operators"):
            pairs = zip(original.all_inputs, original.example, strict=True)
            feeds = {spec.name: tensor.numpy() for spec, tensor in pairs}
            notes += check_int8(proto, converted, feeds, layout=layout)
    facts = {"min_runtime": converted.min_runtime}
    return Exported(converted.pieces, facts, tuple(f"TFLite: {note}" for note in notes))


def _about(original: Model, source: sources.Data | None) -> Description:
    from edgekit.exporters.tflite import Description

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    if source is not None and source.preprocessing is not None:
        given = source.preprocessing
        # EdgeKit normalizes what is scaled; TFLite Metadata speaks of values from 0 to 255.
        mean, std = (tuple(v / given.scale for v in values) for values in (given.mean or (0.0,), given.std or (1.0,)))
    return Description(original.name, mean, std, source.labels if source is not None else ())


def _onnx(original: Model, program: ExportedProgram | None, half_weights: bool) -> onnx.ModelProto:
    from edgekit.exporters.onnx.export import to_onnx
    from edgekit.exporters.onnx.halves import halve

    if program is None:
        return halve(original.onnx) if half_weights else original.onnx
    names = [spec.name for spec in original.all_inputs], [spec.name for spec in original.all_outputs]
    return to_onnx(program, *names, half_weights=half_weights)


def _executorch(original: Model, program: ExportedProgram, half_weights: bool) -> Exported:
    from edgekit.exporters.executorch.lower import to_executorch

    if half_weights:
        from edgekit.quant.ptq.recipes import half_compute

        program = half_compute(original.module, original.example)
    if original.state:
        program = keeps_state(program, original)
    lowered = to_executorch(program)
    notes = []
    if lowered.undelegated:
        outside = {name.rpartition("::")[2]: count for name, count in lowered.undelegated.items()}
        parts = f"; the network is cut into {lowered.delegates} parts" if lowered.delegates > 1 else ""
        notes.append(f"ExecuTorch: {counted(outside)} outside the XNNPACK delegate{parts}")
    if "quantized_kernels" in lowered.libraries:
        notes.append("ExecuTorch: the runtime loads this file where the library quantized_kernels is linked too")
    if half_weights:
        notes.append(
            "ExecuTorch: fp16 computes in half precision but stores convolution weights in fp32: the file is no smaller"
        )
    notes += [f"ExecuTorch: {note}" for note in lowered.notes]
    facts = {
        "delegates": lowered.delegates,
        "undelegated": lowered.undelegated,
        "kernels": list(lowered.kernels),
        "kernel_libraries": list(lowered.libraries),
    }
    return Exported(lowered.pieces, facts, tuple(notes))


def keeps_state(program: ExportedProgram, original: Model) -> ExportedProgram:
    """Returns the program of a model with state as one that keeps it in buffers, from their initial values on."""
    from edgekit.loading.state import StateInBuffers
    from edgekit.quant.graph.passes import export

    count = len(original.inputs)
    module = StateInBuffers(program.module(check_guards=False), original.example[count:])
    return export(module, original.example[:count])


def try_out(artifact: Artifact, feeds: Sequence[np.ndarray], exported: Exported) -> Any:
    """Runs a file that was exported just now; where it does not run, the error names the kernels that are missing."""
    from edgekit.runtimes.devices.forked import ForkedDevice

    try:
        return run(artifact, feeds, device=ForkedDevice() if is_copy() else "local:")
    except EdgeKitError as error:
        missing = ", ".join(missing_kernels(exported.facts.get("kernels", ())))
        if not missing:
            raise EdgeKitError(
                f"{artifact.path.name} was exported, but does not run here: {error.what}", error.help
            ) from error
        raise EdgeKitError(
            f"{artifact.path.name} was exported, but does not run here: the runtime has no kernel for {missing}",
            f"compute what {missing} does otherwise, or leave {artifact.format} out with --format",
        ) from error


def holding(original: Model, formats: Sequence[str], asked: bool) -> tuple[list[str], tuple[str, ...]]:
    """Returns those of `formats` whose files can hold the model's outputs, and a note on the others.

    Raises EdgeKitError where there are none, or where one was `asked` for that cannot.
    """
    opens = [spec.name for spec in original.outputs if ragged_arrays.is_open(spec)]
    able = [format for format in formats if format in HOLDS_RAGGED]
    if not opens or len(able) == len(formats):
        return list(formats), ()
    others = ", ".join(SUFFIXES[format] for format in formats if format not in able)
    why = f"the number of rows of '{opens[0]}' depends on the values, and {others} files hold outputs of a fixed shape"
    if asked or not able:
        raise EdgeKitError(
            why,
            "export with --format onnx, or return a fixed number of rows and which of them count, such as "
            "scores.topk(100) in the place of a mask",
        )
    return able, (f"without {others}: {why}",)


def artifact_of(original: Model, path: Path, format: str, precision: str, layout: Layout) -> Artifact:
    """Returns the file at `path` as one that was exported from `original`."""
    state = () if format in bundles.KEEPS_STATE else original.state
    return Artifact(path, format, precision, original.inputs, original.outputs, layout, state=state)
