"""LOAD: every form of model file becomes a Model, and no file runs code that the user did not name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.contents import ITEM_BITS
from edgekit.errors import EdgeKitError
from edgekit.results import State, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

_DTYPES = ("float32", "int64", "int32", "int16", "int8", "uint8", "bool")
_SPEC = re.compile(r"(?:(?P<name>[A-Za-z_][\w./]*):)?(?P<dtype>[a-z]+\d*)\[(?P<dims>[^\]]*)\]")
_SPEC_HELP = "write 1x3x224x224 or name:float32[1,3,224,224]"


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
    inputs: Sequence[str] = (),
    example: Sequence[np.ndarray] | Mapping[str, np.ndarray] | None = None,
    images: Sequence[np.ndarray] | Mapping[str, np.ndarray] | None = None,
) -> Model:
    """Load a model file, the code that makes a model, or a module object, and try it on example inputs.

    The static input shapes (batch included) come from `inputs` (see `parse_spec`), else from `example` (arrays by
    position or by input name), else from the file where it holds them. Where there are no samples, the example is
    seeded: normal random numbers for float inputs, zeros for integers and booleans. A module object is copied, never
    changed. `images` are the example with images of uint8 as they are: they take its place where an input is of that
    type, or where the model scales its images itself.

    Raises EdgeKitError for everything that is wrong with the file, the code, the weights or the inputs.
    """
    from torch import nn

    from edgekit.bind import Bound, bind, copied, tidy
    from edgekit.openers import Opened, open_source, rehearsed, runs_user_code

    specs = [parse_spec(text) for text in inputs]

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
    )


def _bytes(specs: Sequence[TensorSpec], example: Sequence[Any] | Mapping[str, Any] | None) -> int:
    """The bytes of the inputs that the caller gives."""
    arrays = list(example.values() if isinstance(example, Mapping) else example or ())
    asked = sum(math.prod(spec.shape) * ITEM_BITS[spec.dtype] // 8 for spec in specs)
    return max(asked, sum(int(getattr(array, "nbytes", 0)) for array in arrays))


def parse_spec(text: str) -> TensorSpec:
    """Read `1x3x224x224` (float32, no name) or `name:float32[1,3,224,224]` (the name may be left out).

    Raises EdgeKitError where the text has another form, a dimension is not a positive number, or the dtype is none
    of float32, int64, int32, int16, int8, uint8, bool.
    """
    text = text.strip()
    if re.fullmatch(r"\d+([x×]\d+)*", text):
        dtype, name, dims = "float32", "", re.split("[x×]", text)
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
