"""Open every form of model source: tell it apart by content, check it, and make the module that it holds."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from edgekit.errors import EdgeKitError, reason
from edgekit.loading.weights import Checkpoint, Reading, build, find_weights, fit
from edgekit.screening.limits import budget
from edgekit.screening.unpickle import LEGACY_MAGIC, globals_of, read_pickle, refusal
from edgekit.screening.watchdog import rehearse
from edgekit.types import TensorSpec
from edgekit.util.user_code import UserCode, import_code, is_code, model_name
from edgekit.util.wording import counted

_FORMS_HELP = "give a .pt/.pth, .pt2, .safetensors or .onnx file, or FILE.py:factory"


@dataclass
class Opened:
    """What a source holds, before its inputs are bound.

    A file that knows its inputs gives `specs` (a dimension of 0 is not known); a `.pt2` gives `call` as well: how the
    inputs make up its arguments. `example` has the file's own samples, one per spec. `what` is what messages call it.
    """

    module: Any
    name: str
    form: str
    notes: list[str] = field(default_factory=list)
    specs: tuple[TensorSpec, ...] = ()
    example: tuple[Any, ...] = ()
    call: tuple[Any, tuple[Any, ...]] | None = None  # pytree.TreeSpec of (args, kwargs), and its leaves with flat.SLOT
    onnx: Any = None
    what: str = ""

    def __post_init__(self) -> None:
        self.what = self.what or self.name


def open_source(source: str, code: str | None) -> Opened:
    """The module that `source`, a file or code, holds; `code` is what the user named with `--code`.

    Raises EdgeKitError for everything that is wrong with the file, the code or the weights.
    """
    if is_code(source):
        if code is not None:
            raise EdgeKitError(f"{source} is code already, so --code has nothing to add", "give only one of the two")
        factory = import_code(source)
        return Opened(build(factory), model_name(source), "factory", what=source)
    path = Path(source)
    kind = sniff(path)
    user = import_code(code) if code is not None and kind in ("torch", "safetensors") else None
    opened = _OPENERS[kind](path, user)
    opened.what = source
    if code is not None and user is None:
        opened.notes.append(f"--code is not needed for {kind} files, and was left aside")
    return opened


def rehearsed(source: str, work: Callable[[], object], input_bytes: int) -> None:
    """Does `work` on the file `source` in a copy of this process first; see `edgekit.screening.watchdog`."""
    path = Path(source)
    for name in _NEEDED.get(sniff(path), ()):
        import_module(name)  # here, as the copy keeps what it imports to itself
    rehearse(work, str(path), budget([path], input_bytes))


def runs_user_code(source: str, code: str | None) -> bool:
    """Whether `source` is the user's own code, or a file that is filled into what `code` names."""
    return is_code(source) or (code is not None and sniff(Path(source)) in ("torch", "safetensors"))


def sniff(path: Path) -> str:
    """`torch`, `torchscript`, `pt2`, `safetensors` or `onnx`, from the first bytes and the members of an archive.

    Raises EdgeKitError with what the file seems to be where it is none of them.
    """
    if path.is_dir():
        raise EdgeKitError(f"{path} is a folder, not a model file", _FORMS_HELP)
    if not path.is_file():
        raise EdgeKitError(f"{path} does not exist", _FORMS_HELP)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise EdgeKitError(f"{path} is empty", "copy or download the file again")
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path)
    if head.startswith(LEGACY_MAGIC):
        return "torch"
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= 100_000_000:
        if struct.unpack("<Q", head[:8])[0] + 8 > size:
            raise EdgeKitError(f"{path} is cut short", "copy or download the file again")
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        raise _plain_pickle(path)
    for start, marker, what, help_ in _OTHER_FILES:
        if head[start : start + len(marker)].lower() == marker:
            raise EdgeKitError(f"{path} is {what}", help_)
    if head[:1] == b"\x08":  # protobuf field 1, a number: the ir_version that every ONNX file begins with
        return "onnx"
    if not any(b < 9 for b in head):
        raise EdgeKitError(
            f"{path} is text, not a model: it begins {head[:40].decode(errors='replace')!r}", _FORMS_HELP
        )
    raise EdgeKitError(f"{path} is not a model file of a known form", _FORMS_HELP)


_OTHER_FILES = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the weights", "fetch the weights with: git lfs pull"),
    (0, b"<!doctype", "a web page, not a model", "download the file itself; the link may need a login"),
    (0, b"<html", "a web page, not a model", "download the file itself; the link may need a login"),
    (0, b"\x89hdf", "an HDF5 (Keras) file", "EdgeKit takes PyTorch and ONNX models"),
    (4, b"tfl3", "a TFLite file, an artifact already", "measure it with edgekit profile or edgekit compare"),
    (4, b"et12", "an ExecuTorch file, an artifact already", "measure it with edgekit profile or edgekit compare"),
    (0, b"gguf", "a GGUF file", "EdgeKit takes PyTorch and ONNX models"),
    (0, b"\x93numpy", "a NumPy array, not a model", "give it as --data"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first"),
)


def _sniff_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise EdgeKitError(f"{path} is damaged or cut short", "copy or download the file again") from error
    inside = {n.partition("/")[2] for n in names}
    if "constants.pkl" in inside or any(n.startswith("code/") for n in inside):
        return "torchscript"
    if "archive_format" in inside or "archive_version" in inside or any(n.startswith("models/") for n in inside):
        return "pt2"
    if "serialized_exported_program.json" in names:
        raise EdgeKitError(f"{path} is an exported program of torch 2.7 or older", "export it again with a newer torch")
    if "data.pkl" in inside:
        return "torch"
    if all(n.endswith(".npy") for n in names):
        raise EdgeKitError(f"{path} is an .npz file of arrays, not a model", "give it as --data")
    raise EdgeKitError(f"{path} is a zip archive without a model in it", _FORMS_HELP)


def _plain_pickle(path: Path) -> EdgeKitError:
    asked = sorted(globals_of(path))
    return refusal(f"{path} is a bare pickle, not written by torch.save, and", asked or ["(no names)"], None)


def _open_torch(path: Path, code: UserCode | None) -> Opened:
    if code is not None:  # without it, the whole of what comes of the file is rehearsed
        rehearsed(str(path), lambda: read_pickle(path, code), 0)
    loaded, inert = read_pickle(path, code)
    form, found, notes = find_weights(loaded, str(path))
    if not isinstance(found, Checkpoint):
        if inert:
            raise refusal(str(path), inert, code)
        _check_whole(found, str(path))
        return Opened(found, path.stem, form, notes)
    if inert:
        notes.append(f"ignored in the checkpoint: values of {', '.join(inert)}")
    return _filled(path, found, code, form, notes)


def _check_whole(module: Any, what: str) -> None:
    """Raises EdgeKitError for a module whose state is none of a module, or that holds itself."""
    try:
        module.state_dict()
        _ = [part.training for part in module.modules()]
    except Exception as error:  # whatever its methods raise without what they rely on
        why = "it contains itself" if isinstance(error, RecursionError) else reason(error)
        raise EdgeKitError(
            f"{what} holds a {type(module).__name__} that is not whole: {why}",
            "save it again, or save model.state_dict() and name its class with --code",
        ) from error


def _open_safetensors(path: Path, code: UserCode | None) -> Opened:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from edgekit.loading.pruned_mark import is_pruned

    try:
        weights = load_file(path, device="cpu")
    except (SafetensorError, ValueError, KeyError) as error:
        raise EdgeKitError(f"{path} is damaged or cut short: {error}", "copy or download the file again") from error
    if not weights:
        raise EdgeKitError(f"{path} holds no tensors", "save the model's state_dict")
    return _filled(path, Checkpoint((Reading(weights),), weights), code, "safetensors", [], is_pruned(path))


def _filled(
    path: Path, held: Checkpoint, code: UserCode | None, form: str, notes: list[str], pruned: bool = False
) -> Opened:
    """A module made by the user's code, with the weights of the file in it, narrowed to them where they are pruned."""
    if code is None:
        weights = held.readings[0].weights
        first = ", ".join(list(weights)[:4])
        raise EdgeKitError(
            f"{path} holds weights only ({counted(len(weights), 'tensor')}: {first}, …), not the network they "
            "belong to",
            "name the file that defines its class: --code FILE.py, or FILE.py:factory",
        )
    module, more = fit(code, held, str(path), pruned)
    return Opened(module, path.stem, form, notes + more)


def _open_torchscript(path: Path, _code: UserCode | None) -> Opened:
    from edgekit.screening.torch_archives import load_script

    script = load_script(path)
    return Opened(script, path.stem, "torchscript", **_traced_call(path, script))


def _traced_call(path: Path, script: Any) -> dict[str, Any]:
    """`specs` of a traced module: of the inputs that it was traced with, where they are plain tensors."""
    import torch

    from edgekit.screening.torch_archives import traced_inputs

    samples = traced_inputs(path)
    if not samples or not hasattr(script, "forward"):
        return {}
    names = [argument.name for argument in script.forward.schema.arguments[1:]]
    if len(samples) > len(names) or not all(isinstance(sample, torch.Tensor) for sample in samples):
        return {}
    kinds = [str(sample.dtype).removeprefix("torch.") for sample in samples]
    shapes = [tuple(sample.shape) for sample in samples]
    return {"specs": tuple(map(TensorSpec, names, kinds, shapes))}


def _open_pt2(path: Path, _code: UserCode | None) -> Opened:
    import torch

    from edgekit.screening.torch_archives import load_exported

    program = load_exported(path)
    training = {"aten.batch_norm.default": 5, "aten.dropout.default": 2}
    for node in program.graph.nodes:
        at = training.get(str(node.target))
        if at is not None and len(node.args) > at and node.args[at] is True:
            raise EdgeKitError(f"{path} was exported in training mode", "call model.eval() before torch.export.export")
    wide = [k for k, v in program.state_dict.items() if v.is_floating_point() and v.dtype != torch.float32]
    if wide:
        raise EdgeKitError(f"{path} was exported in {program.state_dict[wide[0]].dtype}", "export the float32 model")
    module: Any = program.module(check_guards=False)
    release_modes(module)
    return Opened(module, path.stem, "pt2", **_exported_call(program))


def release_modes(module: Any) -> None:
    """Let `eval()` reach an exported graph without raising: it has no mode, so there is nothing to switch."""
    module.__dict__.pop("train", None)
    module.__dict__.pop("eval", None)


def _exported_call(program: Any) -> dict[str, Any]:
    """`specs`, `example` and `call` of an exported program: from its samples, else from the shapes in its graph."""
    import torch
    from torch.export._tree_utils import reorder_kwargs
    from torch.export.graph_signature import InputKind, TensorArgument
    from torch.utils import _pytree as pytree

    from edgekit.loading.wrappers import SLOT

    in_spec = program.call_spec.in_spec
    arguments = [s.arg for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    template = tuple(SLOT if isinstance(a, TensorArgument) else a.value for a in arguments)
    names = [a.name for a in arguments if isinstance(a, TensorArgument)]
    samples: tuple[Any, ...] = ()
    if program.example_inputs:
        args, kwargs = program.example_inputs
        flat = pytree.tree_leaves((args, reorder_kwargs(kwargs, in_spec)), is_leaf=lambda v: v is None)
        samples = tuple(v.detach() for v in flat if isinstance(v, torch.Tensor))
    nodes = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and "val" in n.meta}
    values = samples or tuple(nodes[name] for name in names)
    specs = tuple(
        TensorSpec(name, str(v.dtype).removeprefix("torch."), tuple(d if isinstance(d, int) else 0 for d in v.shape))
        for name, v in zip(names, values, strict=True)
    )
    return {"specs": specs, "example": samples, "call": (in_spec, template)}


def _open_onnx(path: Path, _code: UserCode | None) -> Opened:
    import onnx
    from google.protobuf.message import DecodeError

    from edgekit.loading.wrappers import OnnxReference
    from edgekit.screening.onnx_graphs import screen

    try:
        proto = onnx.load(path, load_external_data=False)
        screen(proto, path)
        onnx.load_external_data_for_model(proto, str(path.parent))
        onnx.checker.check_model(proto)
        content = proto.SerializeToString()
    except EdgeKitError:
        raise
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as error:
        raise EdgeKitError(
            f"{path} is not a valid ONNX model: {reason(error)}", "copy it again, or export it again"
        ) from error
    if not proto.graph.node:
        raise EdgeKitError(f"{path} is not a valid ONNX model: it has no operators", _FORMS_HELP)
    _check_finite_onnx(proto, str(path))
    notes: list[str] = []
    specs = _onnx_specs(proto, notes)
    return Opened(OnnxReference(content), path.stem, "onnx", notes, specs=specs, onnx=proto)


def _check_finite_onnx(proto: Any, what: str) -> None:
    import numpy as np
    from onnx import numpy_helper

    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        # Infinity is meant in masks and clip bounds, which ONNX keeps among the weights.
        if values.dtype.kind == "f" and np.isnan(values).any():
            raise EdgeKitError(f"the weights {tensor.name!r} in {what} contain NaN", "train or save the model again")


def _onnx_specs(proto: Any, notes: list[str]) -> tuple[TensorSpec, ...]:
    """Inputs of the graph; an open first dimension counts as a batch of 1, any other open one as 0 (not known)."""
    import onnx

    given = {i.name for i in proto.graph.initializer}
    specs = []
    for value in proto.graph.input:
        if value.name in given:
            continue
        kind = value.type.tensor_type
        if not kind.elem_type:
            raise EdgeKitError(
                f"the input {value.name!r} of the ONNX model is no tensor", "export it with tensor inputs"
            )
        shape = [max(d.dim_value, 0) for d in kind.shape.dim] if kind.HasField("shape") else [0, 0]
        if shape and shape[0] == 0:
            shape[0] = 1
            notes.append(f"the batch dimension of {value.name!r} is open in the file: taken as 1")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        specs.append(TensorSpec(value.name, dtype, tuple(shape)))
    return tuple(specs)


_NEEDED = {
    "torchscript": ("torch._export.converter",),
    "pt2": ("torch.export.pt2_archive._package", "torch._export.serde.serialize"),
    "onnx": ("onnx", "onnxruntime", "edgekit.runtimes.ort"),
}
_OPENERS = {
    "torch": _open_torch,
    "torchscript": _open_torchscript,
    "pt2": _open_pt2,
    "safetensors": _open_safetensors,
    "onnx": _open_onnx,
}


def check_module(model: Any) -> None:
    """Raises EdgeKitError for an object that is neither a source nor a torch module."""
    if isinstance(model, type):
        raise EdgeKitError(
            f"{model.__name__} is a class, not a model", f"give an object of it with its weights: {model.__name__}(...)"
        )
    if isinstance(model, Mapping):
        raise EdgeKitError(
            "a dict of weights is given, not the network they belong to", "load them: module.load_state_dict(weights)"
        )
    if not callable(getattr(model, "forward", None)):
        raise EdgeKitError(
            f"a {type(model).__name__} is given as the model", "give a torch.nn.Module, or the path of a model file"
        )
