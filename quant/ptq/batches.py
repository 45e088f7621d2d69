"""Calibration batches, as two processes share them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from edgekit.util import forking


@dataclass(frozen=True)
class Batches:
    """Copies of the first `most` of `batches` (None: of all): with a view, all of the data would be sent."""

    batches: Iterable[tuple[torch.Tensor, ...]]
    most: int | None = None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for batch in islice(self.batches, self.most):
            yield tuple(tensor.clone() for tensor in batch)


def processes_help() -> bool:
    """Whether a second process makes calibration faster: where torch's own threads are used, they take all cores."""
    return torch.get_num_threads() == 1 and forking.can_fork()
