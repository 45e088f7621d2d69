"""Load a model: every form of model file becomes a Model, and no file runs code that the user did not name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgeKitError
from edgekit.types import ITEM_BITS, State, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

_DTYPES = ("float32", "int64", "int32", "int16", "int8", "uint8", "bool")
_SPEC = re.compile(r"(?:(?P<name>[A-Za-z_][\w./]*):)?(?P<dtype>[a-z]+\d*)\[(?P<dims>[^\]]*)\]")
_SHORT = re.compile(r"(?:(?P<name>[A-Za-z_][\w./]*):)?(?P<dims>\d+(?:[x×]\d+)*)")
_SPEC_HELP = "write 1x3x224x224, name:1x3x224x224 or name:float32[1,3,224,224]"


@dataclass(frozen=True)
class Model:
    """One loaded model, ready for quantization and export.

    `module` is in eval mode on the CPU with contiguous float32 parameters that require no gradient; it is called
    with one tensor per entry of `inputs` and returns a flat tuple with one tensor per entry of `outputs`.
    `form` is `state_dict`, `checkpoint`, `module`, `torchscript`, `pt2`, `safetensors`, `onnx`, `factory` or `object`.
    `example` holds one tensor per input: the caller's samples, or made-up values. `notes` tell what was done to the
    model. For the form `onnx`, `onnx` is the checked graph, and `module` runs it in ONNX Runtime (not exportable).
    `unscaled` says that it takes the images that it was loaded with as they are, of 0..255.
    Where a model has `state`, `module` takes it behind the inputs and gives its next value behind the outputs, and the
    tensors of `example` end with its initial value.
    `ranges` say what each input may be filled with (see `example_inputs.ranges`), and `random` what makes the outputs
    differ from run to run, None where nothing does.
    """

    module: torch.nn.Module
    name: str
    form: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example: tuple[torch.Tensor, ...]
    notes: tuple[str, ...]
    onnx: onnx.ModelProto | None
    state: tuple[State, ...] = ()
    unscaled: bool = False
    ranges: tuple[tuple[int, int] | None, ...] = ()
    random: str | None = None

    @property
    def all_inputs(self) -> tuple[TensorSpec, ...]:
        """What `module` takes: the inputs, then the state."""
        return (*self.inputs, *(state.input for state in self.state))

    @property
    def all_outputs(self) -> tuple[TensorSpec, ...]:
        """What `module` gives: the outputs, then the next state."""
        return (*self.outputs, *(replace(state.input, name=state.output) for state in self.state))


def load(
    source: str | Path | torch.nn.Module,
    *,
    code: str | None = None,
    inputs: Any = (),
    example: Sequence[np.ndarray] | Mapping[str, np.ndarray] | None = None,
    images: Sequence[np.ndarray] | Mapping[str, np.ndarray] | None = None,
) -> Model:
    """Load a model file, the code that makes a model, or a module object, and try it on example inputs.

    The static input shapes (batch included) come from `inputs` (see `parse_spec`), else from `example` (arrays by
    position or by input name), else from the file where it holds them, else from the layers where they leave no doubt
    (see `input_shapes`). Where there are no samples, the example is seeded: normal random numbers for float inputs,
    integers of the range of the table that they index, ones for masks. A module object is copied, never changed.
    `images` are the example with images of uint8 as they are: they take its place where an input is of that type, or
    where the model scales its images itself.

    Raises EdgeKitError for everything that is wrong with the file, the code, the weights or the inputs.
    """
    from torch import nn

    from edgekit.loading.binding import Bound, bind, copied, tidy
    from edgekit.loading.openers import Opened, check_module, open_source, rehearsed, runs_user_code

    specs = read_specs(inputs)
    named = enumerate(given_inputs(inputs))
    arrays = {name or i: given for i, (name, given) in named if not isinstance(given, (str, TensorSpec))}
    if example is None and arrays:
        by_name = all(isinstance(name, str) for name in arrays)
        example = {str(k): v for k, v in arrays.items()} if by_name else list(arrays.values())
    if not isinstance(source, (str, Path)):
        check_module(source)

    def opened_and_bound() -> tuple[Opened, Bound]:
        if isinstance(source, nn.Module):
            opened = Opened(copied(source), type(source).__name__, "object")
        else:
            opened = open_source(str(source), code)
        if opened.onnx is None:
            tidy(opened)
        return opened, bind(opened, specs, example, images)

    if not isinstance(source, nn.Module) and not runs_user_code(str(source), code):
        rehearsed(str(source), opened_and_bound, _bytes(specs, example))
    opened, bound = opened_and_bound()
    return Model(
        bound.module,
        opened.name,
        opened.form,
        bound.inputs,
        bound.outputs,
        bound.example,
        tuple(opened.notes),
        opened.onnx,
        bound.state,
        bound.unscaled,
        bound.ranges,
        bound.random,
    )


def _bytes(specs: Sequence[TensorSpec], example: Sequence[Any] | Mapping[str, Any] | None) -> int:
    """The bytes of the inputs that the caller gives."""
    arrays = list(example.values() if isinstance(example, Mapping) else example or ())
    asked = sum(math.prod(spec.shape) * ITEM_BITS[spec.dtype] // 8 for spec in specs)
    return max(asked, sum(int(getattr(array, "nbytes", 0)) for array in arrays))


def given_inputs(inputs: Any) -> list[tuple[str, Any]]:
    """Returns name (or none) and what is given of each input: a text for `parse_spec`, or an array.

    `inputs` is a text or an array, several of them, some of them in tuples, or a dict of arrays.
    """
    if isinstance(inputs, Mapping):
        return [(str(name), given) for name, given in inputs.items()]
    if isinstance(inputs, str) or hasattr(inputs, "shape"):
        return [("", inputs)]
    found = []
    for given in inputs:
        found += given_inputs(given) if isinstance(given, (tuple, list, Mapping)) else [("", given)]
    return found


def read_specs(inputs: Any) -> list[TensorSpec]:
    """Returns the specs of what `given_inputs` returns; raises EdgeKitError for what is neither text nor array."""
    specs = []
    for name, given in given_inputs(inputs):
        if isinstance(given, (str, TensorSpec)):
            specs.append(parse_spec(str(given)))
        elif hasattr(given, "shape") and hasattr(given, "dtype"):
            kind = str(given.dtype).removeprefix("torch.")
            kind = "float32" if kind.startswith(("float", "bfloat", "double", "half")) else kind
            specs.append(TensorSpec(name, kind, tuple(map(int, given.shape))))
        else:
            raise EdgeKitError(f"a {type(given).__name__} is given as an input", "give a shape or a tensor for each")
    return specs


def parse_spec(text: str) -> TensorSpec:
    """Read `1x3x224x224` (float32) or `float32[1,3,224,224]`, with a name before it or none: `left:1x3x224x224`.

    Raises EdgeKitError where the text has another form, a dimension is not a positive number, or the dtype is none
    of float32, int64, int32, int16, int8, uint8, bool.
    """
    text = text.strip()
    if match := _SHORT.fullmatch(text):
        dtype, name, dims = "float32", match["name"] or "", re.split("[x×]", match["dims"])
    elif match := _SPEC.fullmatch(text):
        dtype, name = match["dtype"], match["name"] or ""
        dims = [d.strip() for d in match["dims"].split(",")] if match["dims"].strip() else []
    else:
        raise EdgeKitError(f"cannot read the input {text!r}", _SPEC_HELP)
    if dtype not in _DTYPES:
        raise EdgeKitError(f"unknown type {dtype!r} in the input {text!r}", f"it can be {', '.join(_DTYPES)}")
    if not all(d.isdecimal() and int(d) > 0 for d in dims):
        raise EdgeKitError(
            f"the input {text!r} has a dimension that is not a positive number", f"shapes are static: {_SPEC_HELP}"
        )
    return TensorSpec(name, dtype, tuple(map(int, dims)))
