"""Files of a pruned network: each is read back and compared before it is handed over."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgeKitError
from edgekit.loading.pruned_mark import MANIFEST, weight_bytes
from edgekit.types import SUFFIXES
from edgekit.util import atomic_files

if TYPE_CHECKING:
    import torch

    from edgekit.loading.model import Model

PROGRAM, WEIGHTS = "model.pt2", "model.safetensors"
FILES = (PROGRAM, WEIGHTS)
FOLDER = {MANIFEST, *FILES, *(f"model{suffix}" for suffix in SUFFIXES.values())}  # all that a folder of it holds
SAME = 1e-4  # of the largest output: what saving and loading may change


def save(original: Model, pruned: torch.nn.Module, model: Any, code: str | None, folder: Path) -> list[str]:
    """Writes both files into `folder`, loads each as anyone would, and returns notes.

    `pruned` is a `Flat` like the original's; `model` and `code` are what the user gave. Raises EdgeKitError where the
    pruned network cannot be captured, or a file does not give its outputs.
    """
    atomic_files.write(folder / PROGRAM, program_bytes(original, pruned))
    atomic_files.write(folder / WEIGHTS, weight_bytes(pruned.inner))
    _check(folder / PROGRAM, original, pruned, None)
    from edgekit.loading.openers import is_code

    named = code if code is not None else str(model) if isinstance(model, (str, Path)) and is_code(str(model)) else None
    if named is None:
        return [f"{WEIGHTS} goes with the code of the model: load it with --code"]
    _check(folder / WEIGHTS, original, pruned, named)
    return [f"{WEIGHTS} goes with --code {named}"]


def program_bytes(original: Model, pruned: Any) -> bytes:
    """Returns the exported program of the user's own module, with the example as its sample inputs."""
    import torch
    from torch.utils import _pytree as pytree

    from edgekit.quant.graph.capture_errors import told

    leaves = list(pruned.fixed)
    for slot, tensor in zip(pruned.slots, original.example, strict=True):
        leaves[slot] = tensor
    args, kwargs = pytree.tree_unflatten(leaves, pruned.in_spec)
    held = io.BytesIO()
    with told():
        torch.export.save(torch.export.export(pruned.inner, args, kwargs), held)
    return held.getvalue()


def _check(path: Path, original: Model, pruned: torch.nn.Module, code: str | None) -> None:
    import torch

    from edgekit.loading.model import load

    example = {spec.name: tensor.numpy() for spec, tensor in zip(original.inputs, original.example, strict=True)}
    loaded = load(path, code=code, example=example)
    with torch.no_grad():
        expected, got = pruned(*original.example), loaded.module(*original.example)
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=SAME * max(float(a.abs().max()), 1e-6)):
            raise EdgeKitError(f"{path.name} does not give what the pruned network gives", "report this model")
