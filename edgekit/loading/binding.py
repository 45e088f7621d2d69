"""Bind a module to its inputs: find their names, make the example, run it, and name the outputs."""

from __future__ import annotations

import inspect
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from edgekit.data.batch_axis import Placement, placements
from edgekit.data.sources import ANY_INPUT
from edgekit.errors import EdgeKitError, MissingInputs, reason
from edgekit.loading import example_inputs, forward_errors
from edgekit.loading.example_inputs import Range
from edgekit.loading.input_shapes import Inferred, infer
from edgekit.loading.open_outputs import Watch, open_onnx, open_torch
from edgekit.loading.openers import Opened, release_modes
from edgekit.loading.state import Buffers, explicit, run_watched, state_note
from edgekit.loading.wrappers import SLOT, Flat, OnnxReference, leaves
from edgekit.screening import watchdog
from edgekit.types import State, TensorSpec
from edgekit.util.wording import counted

_SHAPES_HELP = "give one --input per input, such as --input 1x3x224x224, or --data with samples"
OBJECTS = (
    "module",
    "state_dict",
    "checkpoint",
    "safetensors",
    "factory",
    "object",
)  # forms with a forward of their own
_NUMBERS_HELP = "export a model that takes numbers, and prepare its text outside of it"
_FLOAT_HELP = "load the float model: EdgeKit quantizes it"


@dataclass(frozen=True)
class Bound:
    """A flat module with the example it was run on, and the specs of both sides; see `edgekit.loading.model.Model`."""

    module: torch.nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example: tuple[torch.Tensor, ...]
    state: tuple[State, ...] = ()
    unscaled: bool = False
    ranges: tuple[Range | None, ...] = ()
    random: str | None = None


@dataclass(frozen=True)
class Parameter:
    """One argument of a forward method."""

    name: str
    required: bool
    keyword_only: bool


@dataclass(frozen=True)
class Signature:
    """The arguments of a forward method; `variadic` where it takes `*args` as well."""

    parameters: tuple[Parameter, ...]
    variadic: bool = False

    @property
    def names(self) -> list[str]:
        """The names of all arguments, in order."""
        return [p.name for p in self.parameters]

    @property
    def required(self) -> list[str]:
        """The names of those without a default."""
        return [p.name for p in self.parameters if p.required]

    def __str__(self) -> str:
        """The arguments as a person reads them, optional ones in brackets."""
        shown = [p.name if p.required else f"[{p.name}]" for p in self.parameters] + ["*inputs"] * self.variadic
        return ", ".join(shown) or "none"


Named = list[tuple[str, Any]]  # names and tensors; a tuple of tensors for an argument that is one


def copied(module: torch.nn.Module) -> torch.nn.Module:
    """A deep copy, so that the caller's module stays as it is; EdgeKitError where it cannot be copied."""
    from edgekit.quant.graph.copies import deep_copy

    try:
        return deep_copy(module)
    except Exception as error:
        raise EdgeKitError(
            f"the {type(module).__name__} cannot be copied: {reason(error)}", "pass a factory instead"
        ) from error


def tidy(opened: Opened) -> None:
    """Bring `opened.module` to eval mode, the CPU, float32, contiguous and gradient-free; note what that changed.

    Raises EdgeKitError for weights that are quantized, complex, not loaded at all, or not finite.
    """
    module, notes = opened.module, opened.notes
    _check_tree(module, opened.what)
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    while isinstance(module, wrappers) or hasattr(module, "_orig_mod"):
        notes.append(f"taken out of its {type(module).__name__} wrapper")
        module = module.module if isinstance(module, wrappers) else module._orig_mod
    opened.module = module
    if opened.form in ("module", "object", "torchscript") and any(
        getattr(m, "training", False) for m in module.modules()
    ):
        notes.append("was in training mode: switched to eval mode")
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    ready = {k: t for k, t in tensors.items() if not torch.nn.parameter.is_lazy(t)}
    quantized = [name for name, m in module.named_modules() if type(m).__module__.startswith("torch.ao.nn")]
    if quantized:
        raise EdgeKitError(f"{opened.what} is quantized already (module {quantized[0]!r})", _FLOAT_HELP)
    _check_kinds(ready, opened.what)
    if isinstance(module, torch.fx.GraphModule):
        release_modes(module)
    module.eval()
    if any(t.device.type != "cpu" for t in ready.values()):
        module.cpu()
        notes.append("moved to the CPU")
    floats = {t.dtype for t in ready.values() if t.is_floating_point()} - {torch.float32}
    if floats:
        module.float()
        notes.append(f"{', '.join(sorted(str(d).removeprefix('torch.') for d in floats))} weights cast to float32")
    ready = {k: t for k, t in [*module.named_parameters(), *module.named_buffers()] if k in ready}
    check_finite(ready.items(), opened.what)
    strided = [t for t in ready.values() if not t.is_contiguous()]
    for tensor in strided:
        tensor.data = tensor.data.contiguous()
    if strided:
        weights = counted(len(strided), "weight")
        notes.append(f"{weights} with another memory format (channels_last) made contiguous")


def _check_tree(module: torch.nn.Module, what: str) -> None:
    """Raise EdgeKitError where a module contains itself: no walk over its layers would end."""
    path: list[torch.nn.Module] = []
    done: set[int] = set()

    def walk(owner: torch.nn.Module, name: str) -> None:
        if any(owner is other for other in path):
            raise EdgeKitError(
                f"{what} contains itself: its layer {name!r} is a module that holds it",
                "keep such a reference out of the layers, in a list or a weakref: self.owner = [parent]",
            )
        if id(owner) in done:
            return
        path.append(owner)
        for child, part in owner._modules.items():
            if part is not None:
                walk(part, f"{name}.{child}" if name else child)
        done.add(id(path.pop()))

    if not isinstance(module, torch.jit.ScriptModule):
        walk(module, "")


def _check_kinds(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_quantized:
            raise EdgeKitError(f"{what} is quantized already (weight {name!r})", _FLOAT_HELP)
        if tensor.is_meta:
            raise EdgeKitError(
                f"the weight {name!r} of {what} was never loaded (meta device)", "load the weights first"
            )
        if tensor.is_complex() or tensor.layout is not torch.strided:
            raise EdgeKitError(
                f"the weight {name!r} of {what} is complex or sparse", "no runtime here can run such weights"
            )


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], what: str) -> None:
    """Raise EdgeKitError naming the first tensor with NaN, or with Inf unless it is a buffer such as a mask."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or torch.isfinite(tensor).all():
            continue
        if torch.isnan(tensor).any():
            raise EdgeKitError(
                f"the weight {name!r} of {what} contains NaN", "the training diverged: load an earlier checkpoint"
            )
        if isinstance(tensor, torch.nn.Parameter) or name.endswith(("running_mean", "running_var")):
            raise EdgeKitError(
                f"the weight {name!r} of {what} contains Inf", "the training diverged: load an earlier checkpoint"
            )


def bind(
    opened: Opened,
    specs: Sequence[TensorSpec],
    example: Sequence[Any] | Mapping[str, Any] | None,
    images: Sequence[Any] | Mapping[str, Any] | None = None,
) -> Bound:
    """Settle the inputs (from `specs`, else `example`, else the file), run the module on them, and name the outputs.

    `images` are the example as images of 0..255, which take its place where the model takes bytes or scales them.

    Raises EdgeKitError where inputs are missing, unknown or do not fit, where the module does not run on them, or
    where it returns something that is no tensor.
    """
    signature = _signature(opened)
    unscaled = images is not None and _takes_bytes(opened, specs, images)
    samples = _samples(images if unscaled else example, opened.notes)
    if unscaled and samples is not None:
        samples = _of_kinds(samples, specs or opened.specs)
    if specs:
        given = _made(specs, samples, signature, "--input", opened.what)
    elif samples is not None:
        fixed = _has_fixed_batch(opened.specs)
        given = (
            _made(opened.specs, samples, signature, "the file", opened.what)
            if fixed
            else _unstacked(samples, opened.specs)
        )
    else:
        given = _from_file(opened, signature)
    made_up = samples is None and not (opened.example and not specs)
    as_dict = not specs and _is_one_dict(given, signature, opened)
    packings = [given] if as_dict or opened.call else [*_packings(given, signature), given]
    for packing in packings:
        arranged = packing if as_dict else _arranged(packing, signature, opened.what)
        inputs = _flattened(arranged)
        if isinstance(opened.module, OnnxReference):
            module: torch.nn.Module = opened.module
            call: Any = module
        else:
            flat = Flat(opened.module, *(opened.call or _call(arranged, signature, as_dict)))
            module, call = flat, flat.raw
        if packing is given:
            break
        with _unmoved(opened.module):
            if _gives_numbers(call, tuple(t for _, t in inputs)):
                break
    input_specs = tuple(_spec(name, t) for name, t in inputs)
    with _unmoved(opened.module):
        tensors, ranges = _plausible(call, inputs, input_specs, opened, made_up)
    inputs = [(spec.name, tensor) for spec, tensor in zip(input_specs, tensors, strict=True)]
    states: tuple[State, ...] = ()
    drawn = None
    if isinstance(opened.module, OnnxReference):
        results = _run(module, tensors, inputs, opened.what)
        pairs = list(zip([o.name for o in opened.onnx.graph.output], results, strict=True))
        opens: Callable[[Sequence[TensorSpec]], Sequence[TensorSpec]] = partial(open_onnx, opened.onnx.graph)
    else:
        watch = Watch()
        run = partial(_run, flat, tensors, inputs, opened.what, watch)
        if opened.form == "torchscript":
            raw, buffers = _run_script(flat, run, opened.what), Buffers(())
            drawn = _randomness(call, tensors, opened)
            flat = _converted(opened, flat, tensors, raw, drawn is not None)
        else:
            raw, buffers = run_watched(opened.module, run, opened.what)
        pairs = _outputs(raw, opened)
        module = flat
        if buffers.read:
            module, states = explicit(flat, buffers, [name for name, _ in (*inputs, *pairs)])
            opened.notes.append(state_note(states))
        first = tuple(torch.from_numpy(state.value.copy()) for state in states)
        opens = partial(open_torch, module, (*tensors, *first)) if watch.seen else tuple
    for parameter in module.parameters():  # only now: lazy ones came to be in the run
        parameter.requires_grad_(False)
    taken = {name for name, _ in inputs}
    outputs = tuple(opens([_spec(f"{name}_out" if name in taken else name, t) for name, t in pairs]))
    example = (*tensors, *(torch.from_numpy(state.value.copy()) for state in states))
    if opened.form != "torchscript":
        with _unmoved(module):
            drawn = _randomness(module, example, opened)
    return Bound(module, input_specs, outputs, example, states, unscaled, ranges, drawn)


def _takes_bytes(opened: Opened, specs: Sequence[TensorSpec], images: Sequence[Any] | Mapping[str, Any]) -> bool:
    """Whether images of 0..255 are to go in as they are: an input is of uint8, or the network scales its one itself."""
    from edgekit.loading.pixel_scaling import onnx_scales_bytes, scales_bytes

    if any(spec.dtype == "uint8" for spec in specs or opened.specs):
        return True
    named = _samples(images, []) or []
    if len(named) != 1:
        return False
    if opened.onnx is not None:
        return onnx_scales_bytes(opened.onnx, opened.specs[0].name)
    return scales_bytes(opened.module, (named[0][1],))


def _of_kinds(samples: Named, specs: Sequence[TensorSpec]) -> Named:
    """Images in the types of `specs`, by name or else by position, where those are known."""
    by_name = {spec.name: spec.dtype for spec in specs}
    found = []
    for (name, tensor), dtype in zip_longest(samples, [spec.dtype for spec in specs][: len(samples)]):
        kind = getattr(torch, by_name.get(name, dtype) or "", None)
        found.append((name, tensor.to(kind) if isinstance(kind, torch.dtype) else tensor))
    return found


def _plausible(
    call: Any, inputs: Named, specs: tuple[TensorSpec, ...], opened: Opened, made_up: bool
) -> tuple[tuple[torch.Tensor, ...], tuple[Range | None, ...]]:
    """The example, and what each input may be filled with: integers that are made up get the range of their table.

    A first run, on zeros and ones, shows which tables they are indices into. Where the model fails on what was made
    up, or gives no numbers, other values are tried.
    """
    tensors = tuple(t for _, t in inputs)
    if all(t.is_floating_point() and not example_inputs.is_mask(s.name) for t, s in zip(tensors, specs, strict=True)):
        return tensors, (None,) * len(tensors)
    limits = _limits(call, tensors, specs, opened)
    found = example_inputs.ranges(specs, limits)
    if not made_up:
        return tensors, found
    for ranges in (found, *example_inputs.alternatives(found)):
        rng = np.random.default_rng(0)
        filled = tuple(
            t if r is None else torch.from_numpy(example_inputs.fill(s, r, rng))
            for t, s, r in zip(tensors, specs, ranges, strict=True)
        )
        if _gives_numbers(call, filled):
            return filled, ranges
    return tensors, found


def _limits(call: Any, tensors: tuple[torch.Tensor, ...], specs: tuple[TensorSpec, ...], opened: Opened) -> Any:
    """The rows of the tables that integer inputs are indices into, by the inputs' positions."""
    if opened.onnx is not None:
        return example_inputs.onnx_limits(opened.onnx, [spec.name for spec in specs])
    limits: dict[int, int] = {}
    rng = np.random.default_rng(0)
    guesses = example_inputs.ranges(specs)
    for ranges in (guesses, *example_inputs.alternatives(guesses)):
        probes = tuple(
            t if r is None else torch.from_numpy(example_inputs.fill(s, r, rng))
            for t, s, r in zip(tensors, specs, ranges, strict=True)
        )
        recorder = example_inputs.recorder(probes)
        try:
            with torch.no_grad(), warnings.catch_warnings(), recorder:
                warnings.simplefilter("ignore")
                call(*probes)
        except Exception:  # whatever the user's forward raises on values that it does not expect
            limits |= recorder.limits
            continue
        return limits | recorder.limits
    return limits


def _gives_numbers(call: Any, tensors: tuple[torch.Tensor, ...]) -> bool:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = [leaf for _, leaf in leaves(call(*tensors)) if isinstance(leaf, torch.Tensor)]
    except Exception:  # whatever the user's forward raises on values that it does not expect
        return False
    return all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point())


def _randomness(call: Any, tensors: tuple[torch.Tensor, ...], opened: Opened) -> str | None:
    """What draws random numbers that reach the outputs, or None: two seeds give two results, and one seed one."""

    def run(seed: int, mode: Any = None) -> list[torch.Tensor]:
        np.random.seed(seed)
        random.seed(seed)
        torch.manual_seed(seed)
        with torch.no_grad(), warnings.catch_warnings(), mode or nullcontext():
            warnings.simplefilter("ignore")
            return [leaf for _, leaf in leaves(call(*tensors)) if isinstance(leaf, torch.Tensor)]

    recorder = None if opened.onnx is not None else example_inputs.recorder(())
    states = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        first, second = run(0, recorder), run(1)
        if _equal(first, second):
            return None
        drawn = recorder.random if recorder is not None else _onnx_random(opened.onnx)
        if not drawn and not _equal(first, run(0)):
            return None  # not by the seed: state that a run leaves behind
        return f"{opened.what} draws random numbers" + (f" ({drawn[0]})" if drawn else "")
    except Exception:  # a model that runs once only is told elsewhere
        return None
    finally:
        torch.random.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _onnx_random(model: Any) -> list[str]:
    drawing = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
    kinds = (*drawing, "Dropout")  # a Dropout in training mode
    return [f"{node.op_type} '{node.name}'" for node in model.graph.node if node.op_type in kinds]


def _equal(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Whether two runs gave the same, but for the order in which threads add."""
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x.double(), y.double(), rtol=1e-4, atol=1e-6, equal_nan=True)
        for x, y in zip(a, b, strict=True)
        if not x.is_complex()
    )


@contextmanager
def _unmoved(module: torch.nn.Module) -> Iterator[None]:
    """Puts the state of `module` back as it was: buffers, and tensors in plain attributes, which a run may change."""
    scripts = [m for m in module.modules() if isinstance(m, torch.jit.ScriptModule)]
    own = [(m, name, b.clone()) for m in scripts for name, b in m.named_buffers(recurse=False)]
    parts = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
    holders = [holder for part in parts for holder in (vars(part), part._buffers)]
    before = [{key: value for key, value in holder.items() if _is_state(value)} for holder in holders]
    values = [{key: value.clone() for key, value in kept.items() if value is not None} for kept in before]
    try:
        yield
    finally:
        with torch.no_grad():
            for holder, kept, copies in zip(holders, before, values, strict=True):
                for key in [key for key, value in holder.items() if _is_state(value) and key not in kept]:
                    del holder[key]
                holder.update(kept)
                for key, value in copies.items():
                    if not torch.equal(kept[key], value):
                        kept[key].copy_(value)
            for script, name, value in own:
                if not _same(getattr(script, name), value):
                    setattr(script, name, value)


def _is_state(value: object) -> bool:
    """Whether a run may leave a tensor here that it reads in the next one."""
    ready = isinstance(value, torch.Tensor) and not torch.nn.parameter.is_lazy(value) and not value.is_meta
    return value is None or ready


def _packings(given: Named, signature: Signature) -> list[Named]:
    """The ways in which `given` may make up the arguments; tensors of one tuple argument become one entry.

    They are named `state.0`, `state.1` (or `state_0`), or are simply more than there are arguments.
    """
    names = signature.names
    packed: dict[str, Any] = {}
    for name, value in given:
        head = re.sub(r"[._]\d+$", "", name)
        if name not in names and head != name and head in names:
            packed[head] = (*packed.get(head, ()), value)
        elif name:
            packed[name] = value
    loose = [value for name, value in given if not name]
    free = [name for name in names if name not in packed]
    surplus = len(loose) - len(free)
    if surplus <= 0 or signature.variadic or not free:
        return [
            [*packed.items(), *(("", value) for value in loose)] if len(packed) < len(given) - len(loose) else given
        ]
    found = []
    for place in reversed(range(len(free))):
        values = [*loose[:place], tuple(loose[place : place + surplus + 1]), *loose[place + surplus + 1 :]]
        found.append([*packed.items(), *zip(free, values, strict=True)])
    return found


def _flattened(inputs: Named) -> Named:
    """One entry for each tensor: the parts of an argument that is a tuple are numbered."""
    flat: Named = []
    for name, value in inputs:
        parts = [(f"{name}_{number}", part) for number, part in enumerate(value)] if isinstance(value, tuple) else None
        flat += [(name, value)] if parts is None else _flattened(parts)
    return flat


def _slots(value: Any) -> Any:
    return tuple(map(_slots, value)) if isinstance(value, tuple) else SLOT


def _signature(opened: Opened) -> Signature:
    if opened.form in ("pt2", "onnx"):
        return Signature(tuple(Parameter(s.name, True, False) for s in opened.specs))
    if opened.form == "torchscript":
        if not hasattr(opened.module, "forward"):
            raise EdgeKitError(f"{opened.what} is TorchScript without a forward method", "script a model that has one")
        arguments = opened.module.forward.schema.arguments[1:]
        return Signature(tuple(Parameter(a.name, not a.has_default_value(), a.kwarg_only) for a in arguments))
    found = inspect.signature(opened.module.forward).parameters.values()
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return Signature(
        tuple(Parameter(p.name, p.default is p.empty, p.kind is p.KEYWORD_ONLY) for p in found if p.kind in named),
        variadic=any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in found),
    )


def _samples(example: Sequence[Any] | Mapping[str, Any] | None, notes: list[str]) -> Named | None:
    """The caller's arrays as named tensors; those given by position have an empty name."""
    if example is None:
        return None
    pairs = list(example.items()) if isinstance(example, Mapping) else [("", v) for v in example]
    named: Named = []
    for name, value in pairs:
        if isinstance(value, (tuple, list)) and value and all(hasattr(part, "shape") for part in value):
            parts = _samples([*value], notes) or []
            named.append((name, tuple(part for _, part in parts)))
            continue
        array = value if isinstance(value, torch.Tensor) else np.ascontiguousarray(value)
        try:
            tensor = torch.as_tensor(array).detach().cpu().clone(memory_format=torch.contiguous_format)
        except TypeError as error:
            raise EdgeKitError(
                f"the sample {name!r} is no array of numbers ({array.dtype})", "give numeric arrays"
            ) from error
        if tensor.is_floating_point() and tensor.dtype is not torch.float32:
            notes.append(
                f"the samples {name or 'of an input'} are {tensor.dtype}, cast to float32".replace("torch.", "")
            )
            tensor = tensor.float()
        named.append((name, tensor))
    return named


def _has_fixed_batch(specs: Sequence[TensorSpec]) -> bool:
    """Whether a file was exported for one batch size above 1, which samples must then be cut or repeated to."""
    return bool(specs) and all(0 not in s.shape for s in specs) and any(s.shape and s.shape[0] > 1 for s in specs)


def _from_file(opened: Opened, signature: Signature) -> Named:
    """Inputs as the file knows them: its samples, else made from its shapes."""
    if opened.example:
        return [(s.name, t.clone()) for s, t in zip(opened.specs, opened.example, strict=True)]
    if opened.specs and not any(0 in s.shape for s in opened.specs):
        return _made(opened.specs, None, signature, "the file", opened.what)
    inferred = Inferred((), "")
    if not opened.specs:
        with _unmoved(opened.module):
            inferred = infer(opened.module, signature.required or signature.names[:1])
    if not inferred.specs:
        if opened.specs:
            raise _open_shapes(opened)
        hint = f"{inferred.told}, or give --data with samples" if inferred.told else _SHAPES_HELP
        raise EdgeKitError(f"the shapes of the inputs of {opened.what} are not known; its inputs: {signature}", hint)
    opened.notes.append(inferred.told)
    return _made(inferred.specs, None, signature, "its layers", opened.what)


def _open_shapes(opened: Opened) -> EdgeKitError:
    """The error for a file that leaves sizes of its inputs open, which it holds as 0."""
    shapes = [[str(size or "?") for size in spec.shape] for spec in opened.specs]
    inputs = [f"{spec.name}:{spec.dtype}[{','.join(s)}]" for spec, s in zip(opened.specs, shapes, strict=True)]
    options = [
        f"{spec.name}:{'x'.join(sizes)}" if sizes and spec.dtype == "float32" else f"'{text}'"
        for spec, sizes, text in zip(opened.specs, shapes, inputs, strict=True)
    ]
    return EdgeKitError(
        f"the shapes of the inputs of {opened.what} are open: {', '.join(inputs)}",
        f"give each with --input and numbers for the question marks, as {', '.join(options)}, or --data with samples",
    )


def _made(specs: Sequence[TensorSpec], samples: Named | None, signature: Signature, said: str, what: str) -> Named:
    """One tensor per spec: the sample that belongs to it, else normal random numbers, or zeros for integers."""
    generator = torch.Generator().manual_seed(0)
    by_name = {name: t for name, t in samples or [] if name}
    in_order = [t for _, t in samples or []]
    given: Named = []
    for i, (spec, place) in enumerate(zip(specs, placements(specs), strict=True)):
        dtype = getattr(torch, spec.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise EdgeKitError(
                f"input {spec.name} of {what} is of type {spec.dtype}, which torch has no tensors of", _NUMBERS_HELP
            )
        name = spec.name or (signature.names[i] if i < len(signature.names) else "")
        sample = by_name.get(name, in_order[i] if i < len(in_order) else None)
        if sample is not None:
            given.append((spec.name, _cut(sample, place, dtype, said)))
        elif dtype.is_floating_point:
            given.append((spec.name, torch.randn(spec.shape, generator=generator, dtype=dtype)))
        else:
            given.append((spec.name, torch.zeros(spec.shape, dtype=dtype)))
    return given


def _cut(sample: torch.Tensor, place: Placement, dtype: torch.dtype, said: str) -> torch.Tensor:
    """The sample with the batch of the spec: its first rows, repeated from the start where there are too few."""
    spec = place.spec
    if sample.dtype is dtype and tuple(sample.shape) == spec.shape:
        return sample
    rows = place.rows(sample.numpy(), len(sample)) if sample.ndim else None
    if rows is None or sample.dtype is not dtype:
        raise EdgeKitError(f"the samples are {_spec(spec.name, sample)}, but {said} says {spec}", "make the two agree")
    return torch.from_numpy(place.of(rows[np.arange(place.size) % len(rows)]))


def _unstacked(samples: Named, specs: Sequence[TensorSpec]) -> Named:
    """The samples without a batch in front where each is a whole input of the rank that the file tells."""
    ranks = {spec.name: len(spec.shape) for spec in specs}
    in_order = [len(spec.shape) for spec in specs] if len(specs) == len(samples) else [None] * len(samples)
    return [
        (name, t[0] if len(t) == 1 and t.ndim - 1 == (ranks.get(name) if name else rank) else t)
        for (name, t), rank in zip(samples, in_order, strict=True)
    ]


def _is_one_dict(given: Named, signature: Signature, opened: Opened) -> bool:
    """Whether named tensors, none of which the model knows, are meant as the one dict that its forward takes.

    One alone is, where the model does not run on it as a tensor.
    """
    if len(signature.required) != 1 or any(not name or name in signature.names for name, _ in given):
        return False
    if len(given) > 1 or opened.form not in OBJECTS:
        return len(given) > 1
    (name, tensor) = given[0]
    return not _runs(opened.module, tensor) and _runs(opened.module, {name: tensor})


def _runs(module: torch.nn.Module, argument: object) -> bool:
    try:
        with torch.no_grad():
            module(argument)
    except Exception:  # whatever a forward raises for what it does not take
        return False
    return True


def _arranged(given: Named, signature: Signature, what: str) -> Named:
    """The tensors under the model's own names, in the model's order."""
    names = signature.names
    if (
        len(given) == 1
        and len(signature.required) <= 1
        and given[0][0] not in names
        and given[0][0] in {"", *ANY_INPUT}
    ):
        given = [("", given[0][1])]  # a data file has a word of its own for its one array
    unknown = [name for name, _ in given if name and name not in names]
    if unknown:
        raise EdgeKitError(
            f"{what} has no input {unknown[0]!r}; its inputs: {signature}",
            "name the inputs, or the arrays of the data, as the model does",
        )
    placed = {name: t for name, t in given if name}
    if len(placed) < sum(bool(name) for name, _ in given):
        raise EdgeKitError(f"an input of {what} is given twice", "give each input once")
    free = [n for n in names if n not in placed]
    loose = [t for name, t in given if not name]
    if len(loose) > len(free) and not signature.variadic:
        raise EdgeKitError(
            f"{what} has {counted(len(names), 'input')} ({signature}), but {len(given)} were given",
            "give one per input",
        )
    placed.update(zip(free, loose, strict=False))
    missing = [n for n in signature.required if n not in placed]
    if missing:
        raise MissingInputs(
            f"{what} needs the inputs {', '.join(missing)} as well; its inputs: {signature}", _SHAPES_HELP, missing
        )
    rest = loose[len(free) :]
    extra = [("input" if len(rest) == 1 and not placed else f"input_{i}", t) for i, t in enumerate(rest)]
    return [(n, placed[n]) for n in names if n in placed] + extra


def _call(inputs: Named, signature: Signature, as_dict: bool) -> tuple[pytree.TreeSpec, tuple[object, ...]]:
    """How the tensors make up `(args, kwargs)`: by position up to the first argument left out, by name from there."""
    args: list[object] = []
    kwargs: dict[str, object] = {}
    by_name = {p.name: p for p in signature.parameters}
    for i, (name, value) in enumerate(inputs):
        parameter = by_name.get(name)
        if parameter is None or (not parameter.keyword_only and signature.names[i] == name):
            args.append(_slots(value))
        else:
            kwargs[name] = _slots(value)
    if as_dict:
        args, kwargs = [{name: SLOT for name, _ in inputs}], {}
    template, in_spec = pytree.tree_flatten((tuple(args), kwargs))
    return in_spec, tuple(template)


def _run(
    module: Any,
    tensors: tuple[torch.Tensor, ...],
    inputs: Named,
    what: str,
    watch: AbstractContextManager | None = None,
) -> Any:
    try:
        with torch.no_grad(), warnings.catch_warnings(), watch or nullcontext():
            warnings.simplefilter("ignore")
            return module.raw(*tensors) if isinstance(module, Flat) else module(*tensors)
    except Exception as error:
        if watchdog.is_inside() and watchdog.ran_out_of_memory(error):
            raise MemoryError from error
        shapes = ", ".join(str(_spec(name, t)) for name, t in inputs)
        raise EdgeKitError(
            f"{what} does not run on {shapes or 'no inputs'}: {forward_errors.told(error)}",
            forward_errors.remedy(error, module, "give the shapes and types it was trained with: --input, or --data"),
        ) from error


def _run_script(script: Flat, call: Callable[[], Any], what: str) -> Any:
    """What a TorchScript module returns; EdgeKitError for one with state, which the conversion would freeze."""
    before = {key: tensor.clone() for key, tensor in script.inner.named_buffers()}
    raw = call()
    changed = [key for key, tensor in script.inner.named_buffers() if not _same(before[key], tensor)]
    if changed:
        raise EdgeKitError(
            f"{what} is TorchScript that keeps state in its buffer '{changed[0]}', which cannot be taken out of it",
            "load the model from its state_dict with --code, or save it with torch.export.save",
        )
    return raw


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _outputs(raw: object, opened: Opened) -> Named:
    """Names and tensors of what the module returned; names are unique."""
    found: Named = []
    dropped = []
    for name, leaf in leaves(raw):
        if leaf is None:
            dropped.append(name)
        elif isinstance(leaf, torch.Tensor):
            _check_output(name, leaf, opened.what)
            while any(name == other for other, _ in found):
                name += "_"
            found.append((name, leaf))
        else:
            kind = f"{'an' if type(leaf).__name__[0] in 'aeiou' else 'a'} {type(leaf).__name__}"
            raise EdgeKitError(
                f"{opened.what} returns {kind} as {name!r}, and only tensors can be exported",
                "wrap the model in one that returns its tensors, and name that with --code",
            )
    if not found:
        raise EdgeKitError(f"{opened.what} returns no tensors", "its forward must return the outputs to export")
    if dropped:
        opened.notes.append(f"outputs that are None left out: {', '.join(dropped)}")
    return found


def _check_output(name: str, tensor: torch.Tensor, what: str) -> None:
    """Raises EdgeKitError for an output that no runtime here gives: of complex numbers, bfloat16, or not dense."""
    if tensor.is_complex():
        kind, help_ = "complex numbers", "return torch.view_as_real(x), or .real and .imag"
    elif tensor.dtype is torch.bfloat16:
        kind = "bfloat16"
        help_ = "return x.float(), and leave autocast and .bfloat16() out of forward: --precision chooses the dtype"
    elif tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        kind, help_ = "a sparse, nested or quantized tensor", "return a dense one: x.to_dense(), or x.dequantize()"
    else:
        return
    raise EdgeKitError(f"{what} returns {kind} as {name!r}, which the files do not hold", help_)


def _converted(opened: Opened, script: Flat, tensors: tuple[torch.Tensor, ...], raw: object, random: bool) -> Flat:
    """A TorchScript module as an exportable one, checked against the script's own outputs unless they are random."""
    from torch._export.converter import TS2EPConverter

    args, kwargs = pytree.tree_unflatten(list(tensors), script.in_spec)
    help_ = "load the model from its state_dict with --code"
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = TS2EPConverter(opened.module, args, kwargs).convert()
            inner: Any = program.module(check_guards=False)
            release_modes(inner)
            _as_parameters(inner, {name for name, _ in opened.module.named_parameters()})
            module = Flat(inner.requires_grad_(False), script.in_spec, [SLOT] * len(tensors))
            got = module(*tensors)
    except Exception as error:
        raise EdgeKitError(
            f"{opened.what} cannot be turned from TorchScript into a graph: {reason(error)}", help_
        ) from error
    want = [leaf for _, leaf in leaves(raw) if isinstance(leaf, torch.Tensor)]
    same = len(got) == len(want) and all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5)
        for a, b in zip(got, want, strict=True)
    )
    if not same and not random:
        raise EdgeKitError(f"{opened.what} computes something else as a graph than as TorchScript", help_)
    opened.notes.append("TorchScript turned into a graph; it gives the same outputs on the example")
    return module


def _as_parameters(module: torch.nn.Module, names: Iterable[str]) -> None:
    """Makes parameters of the buffers called `names`, as which a converted program holds TorchScript's weights."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:  # not read by the program
            continue
        if leaf in owner._buffers and owner._buffers[leaf] is not None:
            weight = owner._buffers.pop(leaf)
            owner.register_parameter(leaf, torch.nn.Parameter(weight, requires_grad=False))


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
