"""Digests of samples and of whole feeds: names for their content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgekit.data.batch_axis import placements
from edgekit.types import TensorSpec

if TYPE_CHECKING:
    import numpy as np


def sample_digests(arrays: Sequence[np.ndarray], inputs: Sequence[TensorSpec], count: int) -> list[str]:
    """Returns a name for the content of each of the first `count` samples of a batch, all inputs together."""
    import hashlib

    import numpy as np

    axes = [place.axis for place in placements(inputs)]

    def content(i: int) -> bytes:
        parts = (a if axis is None else np.take(a, i, axis) for a, axis in zip(arrays, axes, strict=True))
        return b"".join(part.tobytes() for part in parts)

    return [hashlib.blake2b(content(i), digest_size=6).hexdigest() for i in range(count)]


def digest_of(feeds: Sequence[np.ndarray]) -> str:
    """Returns a name for the content of feeds."""
    import hashlib

    import numpy as np

    digest = hashlib.blake2b(digest_size=16)
    for feed in feeds:
        digest.update(f"{feed.dtype.str}{feed.shape}".encode())
        digest.update(np.ascontiguousarray(feed).data)
    return digest.hexdigest()
