"""Attention whose mask hides rows whole: zeros, as in torch, in every format."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from formats import RUNTIMES, through
from torch import nn

from edgekit.quant.ptq.recipes import float32

LENGTHS = torch.tensor([0.0, 3.0])  # of the two sequences: the first is all padding
MASKS = {
    "bool": lambda kept: kept,
    "infinite": lambda kept: torch.zeros(kept.shape).masked_fill(~kept, -math.inf),
    "smallest": lambda kept: (1 - kept.float()) * torch.finfo(torch.float32).min,
}


class Attention(nn.Module):
    """Attends under every mask, made of the lengths that it is given, and of constant ones."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
        places = torch.arange(5)[None, None, None]
        kept = [places < given[:, None, None, None] for given in (lengths, LENGTHS)]
        masks = [make(k) for make in MASKS.values() for k in kept]
        return tuple(F.scaled_dot_product_attention(x, x, x + 1, attn_mask=mask) for mask in masks)


@torch.no_grad()
@pytest.mark.parametrize("format", RUNTIMES)
def test_rows_that_a_mask_hides_whole(format: str) -> None:
    torch.manual_seed(0)
    module, feeds = Attention(), (torch.randn(2, 2, 5, 8), LENGTHS)
    expected = module(*feeds)
    assert not any(result[0].any() for result in expected[:4])
    for want, got in zip(expected, through(float32(module, feeds).program, format, feeds), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
