"""Activation observers: streaming, of bounded memory, and fast enough to calibrate in seconds."""

from __future__ import annotations

import math

import numpy as np
import torch
from torchao.quantization.pt2e import ObserverBase

BINS = 2048
LARGEST = 1e30  # of the magnitudes that are looked at
SMALLEST = 2.0**-64  # of the ranges that are told apart: no scale is as small, and 1 / SMALLEST is a float32 number
CANDIDATES = 64  # how many shrinkings of the range are tried at each end


class MSEObserver(ObserverBase):
    """Chooses the range whose int8 rounding and clipping errors are least, from a streaming histogram.

    The histogram covers [−2^k, 2^k) with BINS bins; when a larger value comes, pairs of bins merge and k grows, so
    that memory is constant and no value is ever lost. Ends of the range are searched one after the other, as
    fractions of the observed ones, for the least expected squared error (the L2 criterion of Krishnamoorthi,
    "Quantizing deep convolutional networks for efficient inference", 2018, §3.1.1, over histograms).
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.int8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        quant_min: int = -128,
        quant_max: int = 127,
        eps: float = 2**-16,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic)
        self.qscheme = qscheme
        self.quant_min, self.quant_max, self.eps = quant_min, quant_max, eps
        self.limit = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.low = self.high = 0.0  # the range always holds 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Counts the values of `x` and returns it unchanged."""
        values = x.detach().float().reshape(-1)
        if not values.numel():
            return x
        low, high = (float(v) for v in torch.aminmax(values))
        if not math.isfinite(high - low) or max(-low, high) > LARGEST:
            values = values[values.abs() <= LARGEST]  # what masks attention scores is no activation
            low, high = (float(v) for v in torch.aminmax(values)) if values.numel() else (0.0, 0.0)
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        if largest > 0:
            self._cover(max(2.0 ** math.frexp(largest)[1], SMALLEST))
            # torch's histc and count_nonzero take four times as long.
            bins = torch.add(torch.tensor(BINS / 2), values, alpha=BINS / (2 * self.limit)).int()
            counts = torch.bincount(bins, minlength=BINS + 1)
            counts[BINS - 1] += counts[BINS]  # a value just below the limit rounds up to it
            self.counts += counts[:BINS].double()
            nonzero = np.count_nonzero(values.numpy() != 0)
            self.counts[BINS // 2] -= len(values) - nonzero  # a zero is always exact
        return x

    def merge(self, other: MSEObserver) -> None:
        """Adds what `other` has seen, whose counts may change."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        if other.limit:
            self._cover(other.limit)
            other._cover(self.limit)
            self.counts += other.counts

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scale (float32) and zero point (int64), one element each."""
        low, high = self._search()
        scale = max((high - low) / (self.quant_max - self.quant_min), self.eps)
        zero_point = min(max(self.quant_min - round(low / scale), self.quant_min), self.quant_max)
        return torch.tensor([scale], dtype=torch.float32), torch.tensor([zero_point])

    def _cover(self, limit: float) -> None:
        """Makes the histogram reach to `limit`, a power of two."""
        self.limit = self.limit or limit
        while self.limit < limit:
            half = self.counts.reshape(-1, 2).sum(dim=1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : 3 * BINS // 4] = half
            self.limit *= 2

    def _search(self) -> tuple[float, float]:
        if self.low == self.high:
            return self.low, self.high
        width = 2 * self.limit / BINS
        centers = -self.limit + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)
        used = self.counts > 0
        centers, counts = centers[used].clamp(self.low, self.high), self.counts[used]
        fractions = torch.linspace(1.0, 0.3, CANDIDATES, dtype=torch.float64)
        low, high = self.low, self.high
        for _ in range(2):  # each end depends a little on the other
            high = self._best(centers, counts, torch.full_like(fractions, low), fractions * self.high)[1]
            low = self._best(centers, counts, fractions * self.low, torch.full_like(fractions, high))[0]
        return low, high

    def _best(
        self, centers: torch.Tensor, counts: torch.Tensor, lows: torch.Tensor, highs: torch.Tensor
    ) -> tuple[float, float]:
        """Returns the candidate range with the least Σ count·((center − clipped)² + step²/12 inside)."""
        steps = (highs - lows) / (self.quant_max - self.quant_min)
        clipped = torch.minimum(torch.maximum(centers[None], lows[:, None]), highs[:, None])
        errors = (centers[None] - clipped) ** 2
        inside = errors == 0
        cost = ((errors + inside * (steps**2 / 12)[:, None]) * counts[None]).sum(dim=1)
        best = int(cost.argmin())
        return float(lows[best]), float(highs[best])


class KnownScale(ObserverBase):
    """Quantizes weights by scales that are known before: rounding multiples of them again changes nothing."""

    def __init__(
        self,
        scale: torch.Tensor,
        dtype: torch.dtype = torch.int8,
        qscheme: torch.qscheme = torch.per_channel_symmetric,
        quant_min: int = -127,
        quant_max: int = 127,
        ch_axis: int = 0,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic)
        self.qscheme, self.quant_min, self.quant_max, self.ch_axis = qscheme, quant_min, quant_max, ch_axis
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` unchanged: there is nothing to observe."""
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the known scales (float32) and zero points of 0 (int64)."""
        return self.scale.float(), torch.zeros(len(self.scale), dtype=torch.int64)
