"""The mark of a pruned network: how its files are told from others, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


MANIFEST = "prune.json"
MARK = ("edgekit", "pruned")  # in a .safetensors file: its tensors have fewer channels than the code makes


def weight_bytes(module: torch.nn.Module) -> bytes:
    """Returns the state_dict of the user's module, marked so that EdgeKit narrows the code's layers to its shapes."""
    from safetensors.torch import save

    from edgekit.quant.graph.copies import state_tensors

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
