"""The stages that the pipeline is made of: load, compress, emit, run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import islice, zip_longest
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import bundle as bundles
from edgekit import data as sources
from edgekit import example_inputs, forward_errors, judge, limits, pruned_files, ragged
from edgekit.batch_axis import placements
from edgekit.beside import beside, is_copy
from edgekit.errors import EdgeKitError, MissingInputs, UsageError
from edgekit.progress import Progress, Silent
from edgekit.results import SUFFIXES, Artifact, Layout, State, TensorSpec, axis_order
from edgekit.suspects import counted, missing_kernels

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch
    from torch.export import ExportedProgram

    from edgekit.exporters.tflite import Description
    from edgekit.model import Model
    from edgekit.quant.recipes import Compressed
    from edgekit.runtimes import Timing
    from edgekit.runtimes.devices.device import Device


HOLDS_RAGGED = ("onnx",)  # formats whose outputs may have a size that the input's values decide
LARGE = 128 << 20  # bytes of weights from which a model is lowered to one format after the other
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)
MAPPED = 1 << 20  # bytes of a block from which memory of its own is mapped for it
ONNX_IS_FP32 = "fp32, because an ONNX file is not quantized: give the PyTorch model for int8"
MOST_LINEAR = 0.5  # of the weights: where int8-dynamic reaches so many, it makes the smaller and faster file


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


def load(
    model: Any,
    *,
    data: Any,
    inputs: Any,
    code: str | None,
    mean: Sequence[float],
    std: Sequence[float],
    like: Sequence[TensorSpec] = (),
) -> tuple[Model, sources.Data | None]:
    """Loads the model and opens its data, each telling the other what it does not know: shapes, or an image size.

    Where `inputs` are not given, the batch and the image size are those of `like`, the inputs of an exported file.
    """
    from edgekit.model import given_inputs, read_specs
    from edgekit.model import load as load_model

    sources.check_normalization(mean, std)
    if data is None:
        if mean:
            raise EdgeKitError("--mean and --std normalize data, and none are given", "add --data, or leave them out")
        return load_model(model, code=code, inputs=inputs), None
    asked = bool(given_inputs(inputs))
    specs = read_specs(inputs) if asked else like
    shape = specs[0].shape if specs else ()
    size = image_size(shape, channels_last=not asked)
    source = sources.load(data, image_size=size, mean=mean, std=std)
    if any(spec.name == "y" for spec in specs):
        source = source.with_targets_as("y") or source
    try:
        loaded, source = _loaded(model, source, inputs, code, like)
    except MissingInputs as error:
        found = source.with_targets_as(error.names[0]) if len(error.names) == 1 else None
        if found is None:
            raise
        loaded, source = _loaded(model, found, inputs, code, like)
    if any(spec.name == "y" for spec in loaded.inputs):  # as forward names it, where `inputs` names none
        source = source.with_targets_as("y") or source
    first = next(iter(sources.batches(source.evaluation, loaded.inputs)))[0]  # tells now whether the data fits
    return replace(loaded, example=(*_tensors(first), *loaded.example[len(first) :])), source


def _loaded(
    model: Any, source: sources.Data, inputs: Any, code: str | None, like: Sequence[TensorSpec]
) -> tuple[Model, sources.Data]:
    """Loads the model on a sample of `source`; images stay as they are where it takes bytes or scales them itself."""
    from edgekit.model import given_inputs
    from edgekit.model import load as load_model

    scaled = source.preprocessing
    unscaled = source.unscaled() if scaled is not None and not scaled.mean else None
    examples = [None if given is None else given.example() for given in (source, unscaled)]
    if like and like[0].shape and not given_inputs(inputs):
        repeats = max(like[0].shape[0], 1)
        examples = [e and {key: array.repeat(repeats, axis=0) for key, array in e.items()} for e in examples]
        if examples[1] and like[0].dtype != "uint8":
            examples[1] = {key: array.astype(like[0].dtype) for key, array in examples[1].items()}
    example, images = (None if given is None else _named(given) for given in examples)
    loaded = load_model(model, code=code, inputs=inputs, example=example, images=images)
    return loaded, source if unscaled is None or not loaded.unscaled else unscaled


def calibrated_on(original: Model, source: sources.Data) -> dict[str, Any]:
    """Returns what the manifest says of the samples that a recipe calibrated on: their source, and a digest of each."""
    most = -(-sources.CALIBRATION_SAMPLES // batch_of(original.inputs))
    found: list[str] = []
    for arrays, real, _ in islice(sources.batches(source.calibration, original.inputs), most):
        found += sample_digests(arrays, original.inputs, real)
    return {"source": source.source, "samples": len(found), "digests": found}


def sample_digests(arrays: Sequence[np.ndarray], inputs: Sequence[TensorSpec], count: int) -> list[str]:
    """Returns a name for the content of each of the first `count` samples of a batch, all inputs together."""
    import hashlib

    import numpy as np

    axes = [place.axis for place in placements(inputs)]

    def content(i: int) -> bytes:
        parts = (a if axis is None else np.take(a, i, axis) for a, axis in zip(arrays, axes, strict=True))
        return b"".join(part.tobytes() for part in parts)

    return [hashlib.blake2b(content(i), digest_size=6).hexdigest() for i in range(count)]


def no_state(original: Model, what: str) -> EdgeKitError:
    """Returns the error for a model whose state `what` does not know how to carry from sample to sample."""
    names = ", ".join(state.input.name for state in original.state)
    return EdgeKitError(
        f"{what} take samples in any order, and {original.name} has state from call to call ({names})",
        "leave them out; --precision int8 calibrates along the stream of samples",
    )


def identity(original: Model, model: Any) -> dict[str, str | None]:
    """Returns what tells one model from another: hashes of where it came from, of its weights and of its structure.

    `model` is what the user gave. The source is None for a module object.
    """
    import hashlib

    from edgekit.code import is_code

    def hashed(*parts: Any) -> str:
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    source = None
    if isinstance(model, str | Path):
        head, colon, name = str(model).rpartition(":") if is_code(str(model)) else (str(model), "", "")
        source = hashed(str(Path(head or name).resolve()), colon and name)
    shapes = [tuple(parameter.shape) for parameter in original.module.parameters()]
    structure = hashed(shapes, original.inputs, original.outputs)
    if original.onnx is not None:
        weights = hashlib.sha256(original.onnx.SerializeToString()).hexdigest()[:32]
        return {"source": source, "weights": weights, "structure": weights}
    content = pruned_files.fingerprint(original.module) if shapes else structure
    return {"source": source, "weights": content, "structure": structure}


def precisions(original: Model, source: sources.Data | None, target: str) -> tuple[str, ...]:
    """Returns what to export where no precision is asked for: the best first, and what to take where that fails.

    With data that is `target`, the precision that pays on the target. Without, int8-dynamic where it reaches most
    weights, and else fp16.
    """
    if original.onnx is not None:
        return ("fp32",)
    if source is not None:
        return (target,)
    from edgekit.quant.dynamic import reachable_share

    share = reachable_share(original.module, original.example)
    return (*(["int8-dynamic"] if share >= MOST_LINEAR else []), "fp16", "fp32")


def check_repeatable(original: Model) -> None:
    """Raises EdgeKitError for a model whose outputs differ from run to run: no file can be compared with them."""
    if original.random is not None:
        raise EdgeKitError(
            f"{original.random}: it gives other outputs at every run, and no file can be compared with them",
            "return what is not random (of a VAE the mean), take the noise as an input, or draw it in training alone: "
            "F.dropout(x, training=self.training)",
        )


def image_size(shape: Sequence[int], channels_last: bool = False) -> tuple[int, int, int] | None:
    """Returns the (channels, height, width) of images of `shape`, None where they are open or it has none.

    With `channels_last` shapes of that layout are read too: `fitted` then tells what is wrong with such a file.
    """
    if len(shape) != 4 or min(shape[1:]) < 1:
        return None
    last = channels_last and shape[1] not in sources.IMAGE_CHANNELS and shape[3] in sources.IMAGE_CHANNELS
    return (shape[3], shape[1], shape[2]) if last else (shape[1], shape[2], shape[3])


def compress(
    original: Model,
    source: sources.Data | None,
    precision: str,
    progress: Progress,
    keep_float: frozenset[str] = frozenset(),
) -> Compressed | None:
    """Applies the recipe called `precision`; None for an ONNX file, which is not taken apart.

    `keep_float` names nodes of the canonical graph that stay in float.
    """
    from edgekit.quant.recipes import RECIPES

    recipe = RECIPES[precision]
    if original.onnx is not None:
        if precision not in ("fp32", "fp16"):
            raise EdgeKitError(
                f"{precision} starts from a PyTorch model, and {original.name} is an ONNX file",
                "give the PyTorch model, or export the ONNX file with --precision fp32 or fp16",
            )
        return None
    if not recipe.needs_data:
        with progress.step("Capturing the graph"):
            return recipe.apply(original.module, original.example, (), keep_float)
    assert source is not None
    large = is_large(original.module)
    with progress.step(f"Calibrating {precision}"), quickest_threads(original):
        if large:
            map_weights()
        made = recipe.apply(original.module, original.example, calibration_of(original, source), keep_float)
    if large:
        release_memory()
    return made


@contextmanager
def quickest_threads(original: Model) -> Iterator[None]:
    """Lets torch use one thread or all of them, whichever runs the model quicker.

    Threads that wait for each other spin: for small models, or beside other work, several are up to ten times slower
    than one.
    """
    import torch

    from edgekit import measure

    def run_ms(count: int, runs: int) -> float:
        torch.set_num_threads(count)
        times = measure.time_runs(
            lambda: original.module(*original.example), warmup_runs=0, seconds=0, min_runs=runs, max_runs=runs
        )
        return measure.percentile(times, 50)

    most = torch.get_num_threads()
    together = False
    if most > 2:  # two gain little at best
        with torch.inference_mode():
            alone = run_ms(1, 5)
            # A second process, which one thread leaves room for, halves the time. One run tells of threads that would
            # take seconds to be measured.
            together = run_ms(most, 1) < 4 * alone and run_ms(most, 5) < 0.5 * alone
    torch.set_num_threads(most if together else 1)
    try:
        yield
    finally:
        torch.set_num_threads(most)


@dataclass(frozen=True)
class Calibration:
    """Batches for a recipe, which may read them any number of times; each time one at a time.

    A `module` with state is run along: each batch ends with the state that the ones before it left.
    """

    source: sources.Data
    inputs: tuple[TensorSpec, ...]
    module: torch.nn.Module | None = None
    state: tuple[torch.Tensor, ...] = ()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        import torch

        most = -(-sources.CALIBRATION_SAMPLES // batch_of(self.inputs))
        state = self.state
        for arrays, _, _ in islice(sources.batches(self.source.calibration, self.inputs), most):
            yield (*_tensors(arrays), *state)
            if self.module is not None:
                with torch.no_grad():
                    state = self.module(*_tensors(arrays), *state)[-len(state) :]


def calibration_of(original: Model, source: sources.Data) -> Calibration:
    """Returns the batches of `source` that `original` is calibrated on."""
    if not original.state:
        return Calibration(source, original.inputs)
    return Calibration(source, original.inputs, original.module, original.example[-len(original.state) :])


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


def is_large(module: torch.nn.Module) -> bool:
    """Whether a module has so many weights that their copies are what matters for memory."""
    state = module.state_dict().values()  # a module's extra state may be anything
    return sum(getattr(value, "nbytes", 0) for value in state) > LARGE


def map_weights() -> None:
    """Has each larger block of memory go back to the system as soon as nothing uses it, from now on.

    glibc learns from the first ones to keep them for later, between others: an export then holds weights twice.
    """
    import ctypes

    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if set_option is not None:
        set_option(MMAP_THRESHOLD, MAPPED)


def release_memory() -> None:
    """Gives memory that nothing uses any more back to the system."""
    import ctypes
    import gc

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _has_halves(proto: onnx.ModelProto) -> bool:
    """Whether a model stores weights as float16."""
    from edgekit.exporters.onnx_halves import has_halves

    return has_halves(proto)


def _quantizes_weights_alone(program: ExportedProgram) -> bool:
    """Whether `program` has int8 weights, and multiplies by them in float."""
    from edgekit.quant.shares import LEAST_WEIGHTS, shares

    found = shares(program)
    return found.weights >= LEAST_WEIGHTS and found.products < LEAST_WEIGHTS


def _holds_int8(data: bytes) -> bool:
    """Whether a .pte file stores more than hardly any of its weights as int8: XNNPACK may have taken them as floats."""
    from edgekit.quant.shares import LEAST_WEIGHTS
    from edgekit.read_pte import Program

    sizes = {"int8": 0, "float32": 0}
    for dtype, shape, _ in Program(data).constant_values():
        if len(shape) > 1 and dtype in sizes:
            sizes[dtype] += prod(shape)
    return sizes["int8"] >= LEAST_WEIGHTS * sum(sizes.values())


def _no_gain(format: str, what: str) -> str:
    return f"{bundles.file_name(format)}: {what} changed nothing in this format: the file is fp32, and is called so"


def _onnx_file(proto: Callable[[], onnx.ModelProto], ours: bool) -> Exported:
    """Makes the file from what gives the ONNX model, which is let go of as soon as it was read."""
    from edgekit.exporters.onnx_bytes import file_pieces
    from edgekit.exporters.onnx_codes import fastest

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
    from edgekit.exporters.onnx_halves import halve
    from edgekit.exporters.to_onnx import to_onnx

    if program is None:
        return halve(original.onnx) if half_weights else original.onnx
    names = [spec.name for spec in original.all_inputs], [spec.name for spec in original.all_outputs]
    return to_onnx(program, *names, half_weights=half_weights)


def _executorch(original: Model, program: ExportedProgram, half_weights: bool) -> Exported:
    from edgekit.exporters.to_executorch import to_executorch

    if half_weights:
        from edgekit.quant.recipes import half_compute

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
    from edgekit.quant.passes import export
    from edgekit.state import StateInBuffers

    count = len(original.inputs)
    module = StateInBuffers(program.module(check_guards=False), original.example[count:])
    return export(module, original.example[:count])


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


def qparams(original: Model, program: ExportedProgram | None) -> dict[str, Any]:
    """Returns scale and zero point of each quantized input and output, by name."""
    if program is None:
        return {}
    from edgekit.quant.recipes import io_qparams

    return io_qparams(program, [s.name for s in original.all_inputs], [s.name for s in original.all_outputs])


def output_scales(qparams: Mapping[str, Any], outputs: Sequence[TensorSpec]) -> list[float]:
    """Returns the scale of each output from what `qparams` returned, 0 where an output is not quantized."""
    found = qparams.get("outputs", {})
    return [found[spec.name]["scale"] if spec.name in found else 0.0 for spec in outputs]


@contextmanager
def in_process(module: torch.nn.Module, device: str, threads: int) -> Iterator[Any]:
    """Yields a session on a torch module in this process, and then puts the module and the threads back."""
    import torch

    from edgekit.flat import OnnxReference
    from edgekit.runtimes import eager

    before = torch.get_num_threads()
    if isinstance(module, OnnxReference):
        module.use(threads)
    session = eager.load(module, device=device, threads=threads)
    try:
        yield session
    finally:
        session.close()
        module.to("cpu")
        torch.set_num_threads(before)


def run_module(
    module: torch.nn.Module,
    feeds: Sequence[np.ndarray],
    device: str = "cpu",
    threads: int = 1,
    state: Sequence[State] = (),
    start: int = 0,
) -> tuple[np.ndarray, ...]:
    """Runs a torch module in this process on (runs, *shape) inputs; returns (runs, *shape) outputs.

    A module with `state` takes it behind the inputs and gives its next value behind the outputs: it is at its initial
    value in the first run, and each run goes on where the one before it ended.

    One thread is the default because torch's spin at every op: on a machine with other work, two took ten times
    as long as one. Raises EdgeKitError where the module fails on a sample; the first is number `start` of the data.
    """
    import numpy as np

    runs = len(feeds[0])
    values = [part.value for part in state]
    outputs: list[Any] = []
    with in_process(module, device, threads) as session:
        for run in range(runs):
            try:
                given = enumerate((*(feed[run] for feed in feeds), *values))
                found = list(session.run({f"input_{i}": array for i, array in given}).values())
            except (EdgeKitError, MemoryError):
                raise
            except Exception as error:  # whatever the user's forward raises
                raise EdgeKitError(
                    f"the model fails on batch {start + run} of the data: {forward_errors.told(error)}",
                    forward_errors.remedy(error, module, "check the values in --data"),
                ) from error
            found, values = found[: len(found) - len(state)], found[len(found) - len(state) :]
            outputs = outputs or [np.empty((runs, *array.shape), array.dtype) for array in found]
            for i, array in enumerate(found):
                if isinstance(outputs[i], np.ndarray) and outputs[i].shape[1:] != array.shape:
                    outputs[i] = list(outputs[i][:run])  # its shape depends on the values
                if isinstance(outputs[i], list):
                    outputs[i].append(array)
                else:
                    outputs[i][run] = array
    return tuple(ragged.stack(output) if isinstance(output, list) else output for output in outputs)


def run(artifact: Artifact, feeds: Sequence[np.ndarray], **options: Any) -> Any:
    """Runs an artifact in a process of its own, on NCHW feeds and to NCHW outputs whatever the file's layout is.

    One with state starts at its initial value, and each run goes on where the one before it ended.
    """
    import numpy as np

    from edgekit.runtimes import run_artifact

    inputs, outputs = ([spec.name for spec in specs] for specs in (artifact.inputs, artifact.outputs))
    there = [feed.transpose(_stacked_order(feed, artifact)) for feed in feeds]
    state = [(part, part.value.transpose(axis_order(part.value.ndim, artifact.layout))) for part in artifact.state]
    result = run_artifact(
        artifact.path,
        there,
        inputs=inputs,
        outputs=outputs,
        state=[(part.input.name, part.output, value) for part, value in state],
        weight_files=artifact.weight_files,
        **options,
    )
    back = [array.transpose(np.argsort(_stacked_order(array, artifact))) for array in result.outputs]
    return replace(result, outputs=tuple(np.ascontiguousarray(array) for array in back))


def settings_notes(artifact: Artifact, result: Any) -> tuple[str, ...]:
    """Returns a note where int8 is right on this processor only with options that a runtime does not set itself."""
    if not result.settings or artifact.precision not in judge.INT8_ARITHMETIC:
        return ()
    options = ", ".join(f"{key}={value}" for key, value in result.settings.items())
    return (
        f"{artifact.path.name} ran with {options}: without it {result.runtime}'s int8 sums overflow on this processor, "
        "so set it in your application for such processors too",
    )


def _stacked_order(stacked: np.ndarray, artifact: Artifact) -> tuple[int, ...]:
    return (0, *(axis + 1 for axis in axis_order(stacked.ndim - 1, artifact.layout)))


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


def digest_of(feeds: Sequence[np.ndarray]) -> str:
    """Returns a name for the content of feeds."""
    import hashlib

    import numpy as np

    digest = hashlib.blake2b(digest_size=16)
    for feed in feeds:
        digest.update(f"{feed.dtype.str}{feed.shape}".encode())
        digest.update(np.ascontiguousarray(feed).data)
    return digest.hexdigest()


def flat(outputs: Sequence[np.ndarray], batch: int, specs: Sequence[TensorSpec] | None = None) -> list[np.ndarray]:
    """Joins runs and batch, (runs, batch, …) → (runs·batch, …); outputs without the batch in front stay as they are.

    So do those whose number of rows depends on values, as the `specs` of the outputs tell.
    """
    fixed = [not ragged.is_open(spec) for spec in specs] if specs is not None else [True] * len(outputs)
    return [
        a.reshape(-1, *a.shape[2:]) if fits and a.ndim > 1 and a.shape[1] == batch else a
        for a, fits in zip(outputs, fixed, strict=True)
    ]


def aligned(
    reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray], subject: Model | Artifact
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns (runs, …) outputs of two networks as one row a sample; those of data-dependent shape as pairs of rows."""
    batch = batch_of(subject.inputs)
    left, right = ragged.matched(reference, outputs, subject.outputs)
    return flat(left, batch, subject.outputs), flat(right, batch, subject.outputs)


def holding(original: Model, formats: Sequence[str], asked: bool) -> tuple[list[str], tuple[str, ...]]:
    """Returns those of `formats` whose files can hold the model's outputs, and a note on the others.

    Raises EdgeKitError where there are none, or where one was `asked` for that cannot.
    """
    opens = [spec.name for spec in original.outputs if ragged.is_open(spec)]
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


def batch_of(specs: Sequence[TensorSpec]) -> int:
    """Returns how many samples one run takes: the first dimension of the first input, 1 for a scalar."""
    return specs[0].shape[0] if specs and specs[0].shape else 1


def _named(example: sources.Arrays) -> list[np.ndarray] | dict[str, np.ndarray]:
    if all(isinstance(key, int) for key in example):
        return list(example.values())
    return {"x" if key == 0 else str(key): array for key, array in example.items()}


def _tensors(arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, ...]:
    import torch

    return tuple(torch.from_numpy(array) for array in arrays)


def time_module(
    module: torch.nn.Module,
    feeds: Sequence[np.ndarray],
    device: str,
    threads: int,
    timing: Timing,
    state: Sequence[State] = (),
) -> tuple[float, ...]:
    """Times the original in this process, on `device` with `threads` threads; returns latencies in ms.

    Every run starts from the initial `state`.

    On "cuda" they are those of the forward pass by CUDA events, without the copies to the GPU and back.
    """
    import os
    from itertools import cycle

    from edgekit import measure

    values = [part.value for part in state]
    samples = [
        {f"input_{i}": array for i, array in enumerate((*(feed[run] for feed in feeds), *values))}
        for run in range(len(feeds[0]))
    ]
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    with in_process(module, device, threads) as session:
        try:
            measure.pin(threads)
            if device == "cuda":
                call, own_ms = session.clocked(samples)
                return tuple(measure.time_runs(call, own_ms=own_ms, **asdict(timing)))
            turns = cycle(samples)
            return tuple(measure.time_runs(lambda: session.run(next(turns)), **asdict(timing)))
        finally:
            if cores is not None:
                os.sched_setaffinity(0, cores)


@contextmanager
def opened(device: str, baseline: str = "cpu", timeout: float | None = None, timed: bool = True) -> Iterator[Device]:
    """Yields the device at a URI, connected once for all jobs, and cleans it up.

    `timeout` is how many seconds a job may go without progress, the device's own limit by default. With `timed` files
    are to be timed there. Raises EdgeKitError for a device that does not answer, for an emulated one that cannot count
    the instructions of `timed` files, or for a baseline device that torch cannot use.
    """
    from edgekit.runtimes import open_device
    from edgekit.runtimes.devices.device import Emulator

    if baseline not in ("cpu", "cuda"):
        raise UsageError(f"unknown baseline device '{baseline}'", "choose cpu or cuda")
    if baseline == "cuda":
        import torch

        if not torch.cuda.is_available():
            why = "finds no CUDA device here" if torch.version.cuda else "is built without CUDA"
            raise EdgeKitError(
                f"torch {torch.__version__} {why}",
                "leave out --baseline-device, or use a machine with an NVIDIA GPU and a CUDA build of torch",
            )
    there = open_device(device)
    try:
        there.probe()
        if timed and isinstance(there, Emulator):
            with there.counting():
                pass
        if timeout is not None:
            there.stall_s = timeout
        yield there
    finally:
        there.cleanup()


def bare(path: Path) -> Artifact:
    """Returns a file that comes without a bundle as an artifact; its names, shapes and precision are read from it."""
    from edgekit.summary import inspect_artifact

    found = inspect_artifact(path)
    beside = tuple(_beside(path, place) for place in found.weight_files)
    precision = precision_of(found.parameter_bytes)
    return Artifact(path, found.format, precision, tuple(found.inputs), tuple(found.outputs), weight_files=beside)


def closed(artifact: Artifact) -> tuple[Artifact, tuple[str, ...]]:
    """Returns `artifact` with an open batch as one sample, and a note that says so."""
    inputs = tuple(
        replace(spec, shape=(1, *spec.shape[1:])) if spec.shape[:1] == (-1,) else spec for spec in artifact.inputs
    )
    if inputs == artifact.inputs:
        return artifact, ()
    return replace(artifact, inputs=inputs), (f"{artifact.path.name} takes any batch: it was measured with one sample",)


def _beside(path: Path, place: str) -> Path:
    """Returns the file `place` in the folder of `path`; EdgeKitError where it is elsewhere, or not there."""
    if Path(place).name != place:
        raise EdgeKitError(
            f"weights of {path} lie in {place!r}, which EdgeKit does not follow",
            "save it with its weights in itself, or in a file beside it (onnx.save_model's location)",
        )
    if not path.with_name(place).is_file():
        raise EdgeKitError(f"weights of {path} lie in {place}, which is missing", "put it beside the file")
    return path.with_name(place)


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


def precision_of(parameter_bytes: Mapping[str, int]) -> str:
    """Returns the precision of a bare file: that in which most of its weights are stored.

    Wider integers are biases, shapes and indices: they do not count.
    """
    weights: Counter[str] = Counter()
    for dtype, size in parameter_bytes.items():
        bits = re.fullmatch(r"(float|bfloat|int|uint)(\d+).*", dtype)
        if bits is None or ("int" in dtype and int(bits[2]) > 8):
            continue
        precision = f"int{bits[2]}" if "int" in dtype else "fp16" if int(bits[2]) <= 16 else "fp32"
        weights[precision] += 8 * size // int(bits[2])
    return max(weights, key=lambda name: weights[name], default="fp32")
