"""ExecuTorch: no weights stay in memory behind a lowering."""

from __future__ import annotations

import gc

import torch
from torch import nn

from edgekit.exporters.executorch.lower import to_executorch
from edgekit.quant.ptq.recipes import RECIPES


def held(least: int) -> int:
    """How many byte strings and tensors of at least so many bytes Python's containers hold."""
    gc.collect()
    objects = gc.get_objects()
    parts = {
        id(part): part for each in objects for part in gc.get_referents(each) if type(part) in (bytes, torch.Tensor)
    }
    return sum(size(part) >= least for part in parts.values())


def size(part: bytes | torch.Tensor) -> int:
    return part.numel() * part.element_size() if isinstance(part, torch.Tensor) else len(part)


def test_a_lowering_leaves_no_weights_behind() -> None:
    """Caches of torch, torchao and ExecuTorch kept the networks that they were asked about, and all delegates."""
    width, batch = 500, torch.randn(2, 500)
    before = held(width * width)
    for precision in ("fp32", "int8"):
        network = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).eval()
        program = RECIPES[precision].apply(network, (batch,), [(batch,)], frozenset()).program
        lowered = to_executorch(program)
        assert len(lowered.data) > width * width
        del lowered, program, network
        assert held(width * width) <= before, precision
