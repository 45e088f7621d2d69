"""The files of a pruned network: each is read back and compared before it is handed over."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import files
from edgekit.errors import EdgeKitError
from edgekit.results import SUFFIXES

if TYPE_CHECKING:
    import torch

    from edgekit.model import Model

MANIFEST = "prune.json"
PROGRAM, WEIGHTS = "model.pt2", "model.safetensors"
FILES = (PROGRAM, WEIGHTS)
FOLDER = {MANIFEST, *FILES, *(f"model{suffix}" for suffix in SUFFIXES.values())}  # all that a folder of it holds
MARK = ("edgekit", "pruned")  # in a .safetensors file: its tensors have fewer channels than the code makes
SAME = 1e-4  # of the largest output: what saving and loading may change


def save(original: Model, pruned: torch.nn.Module, model: Any, code: str | None, folder: Path) -> list[str]:
    """Writes both files into `folder`, loads each as anyone would, and returns notes.

    `pruned` is a `Flat` like the original's; `model` and `code` are what the user gave. Raises EdgeKitError where the
    pruned network cannot be captured, or a file does not give its outputs.
    """
    files.write(folder / PROGRAM, program_bytes(original, pruned))
    files.write(folder / WEIGHTS, weight_bytes(pruned.inner))
    _check(folder / PROGRAM, original, pruned, None)
    from edgekit.openers import is_code

    named = code if code is not None else str(model) if isinstance(model, (str, Path)) and is_code(str(model)) else None
    if named is None:
        return [f"{WEIGHTS} goes with the code of the model: load it with --code"]
    _check(folder / WEIGHTS, original, pruned, named)
    return [f"{WEIGHTS} goes with --code {named}"]


def program_bytes(original: Model, pruned: Any) -> bytes:
    """Returns the exported program of the user's own module, with the example as its sample inputs."""
    import torch
    from torch.utils import _pytree as pytree

    from edgekit.quant.captured import told

    leaves = list(pruned.fixed)
    for slot, tensor in zip(pruned.slots, original.example, strict=True):
        leaves[slot] = tensor
    args, kwargs = pytree.tree_unflatten(leaves, pruned.in_spec)
    held = io.BytesIO()
    with told():
        torch.export.save(torch.export.export(pruned.inner, args, kwargs), held)
    return held.getvalue()


def weight_bytes(module: torch.nn.Module) -> bytes:
    """Returns the state_dict of the user's module, marked so that EdgeKit narrows the code's layers to its shapes."""
    from safetensors.torch import save

    from edgekit.quant.copies import state_tensors

    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in state_tensors(module).items()}
    return save(tensors, metadata=dict([MARK, ("format", "pt")]))


def is_pruned(path: Path) -> bool:
    """Whether a .safetensors file was written by `save`."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        return (opened.metadata() or {}).get(MARK[0]) == MARK[1]


def fingerprint(module: torch.nn.Module) -> str:
    """Returns a hash of the parameters of `module`, whatever they are called: other files of the network have it."""
    hashes = sorted(
        hashlib.sha256(repr(tuple(p.shape)).encode() + p.detach().contiguous().numpy().tobytes()).hexdigest()
        for p in module.parameters()
    )
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:32]


def fingerprint_of(folder: Path) -> str | None:
    """Returns the fingerprint of the pruned network that the files in `folder` are of; None where there is none."""
    import json

    try:
        found = json.loads((folder / MANIFEST).read_text("utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _check(path: Path, original: Model, pruned: torch.nn.Module, code: str | None) -> None:
    import torch

    from edgekit.model import load

    example = {spec.name: tensor.numpy() for spec, tensor in zip(original.inputs, original.example, strict=True)}
    loaded = load(path, code=code, example=example)
    with torch.no_grad():
        expected, got = pruned(*original.example), loaded.module(*original.example)
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=SAME * max(float(a.abs().max()), 1e-6)):
            raise EdgeKitError(f"{path.name} does not give what the pruned network gives", "report this model")
