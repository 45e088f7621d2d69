"""What every runtime hands back: a session, and the checks that keep a feed from being misread.

It is pushed to devices beside the worker, so it imports the standard library and numpy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np


class TensorInfo(NamedTuple):
    """One input or output: name, numpy dtype name, and shape with None for a dimension that may vary."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        """Dtype and shape, such as `float32[1,3,?,?]`."""
        return f"{self.dtype}[{','.join('?' if size is None else str(size) for size in self.shape)}]"


class Session(Protocol):
    """One loaded artifact. It runs; it never times, compares or converts."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, in arrays of their own. Raises ValueError for a feed that does not match `inputs`."""
        ...

    def prepared(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """What runs once on `feeds`, and nothing else, for the clock: they are checked already.

        Raises ValueError as `run` does.
        """
        ...

    def close(self) -> None:
        """Let go of the artifact's memory; `run` raises ValueError afterwards."""
        ...


def named(declared: Sequence[TensorInfo], names: Sequence[str], kind: str) -> tuple[TensorInfo, ...]:
    """`declared` in the order of `names`, or as it is when `names` is empty.

    Raises ValueError when `names` are not the names in the file. `kind` is "input" or "output".
    """
    if not names:
        return tuple(declared)
    by_name = {info.name: info for info in declared}
    if len(by_name) != len(declared) or sorted(names) != sorted(by_name):
        raise ValueError(
            f"the file's {kind}s are named {', '.join(info.name for info in declared)}, not {', '.join(names)}"
        )
    return tuple(by_name[name] for name in names)


def numbered(names: Sequence[str], count: int, kind: str) -> tuple[str, ...]:
    """`names`, or `input_0`, `input_1`, … for a model that has none. Raises ValueError when their number is wrong."""
    if not names:
        return tuple(f"{kind}_{i}" for i in range(count))
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"the model has {count} {kind}s, which {', '.join(names)} do not name one by one")
    return tuple(names)


def checked_feeds(inputs: Sequence[TensorInfo], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The feeds in the order of `inputs`, C-contiguous. Raises ValueError for a wrong name, dtype or shape."""
    if len(feeds) != len(inputs):
        raise ValueError(_wrong_names(inputs, feeds))
    arrays = []
    for info in inputs:
        feed = feeds.get(info.name)
        if feed is None:
            raise ValueError(_wrong_names(inputs, feeds))
        if not isinstance(feed, np.ndarray):
            raise ValueError(f"input '{info.name}' takes a numpy array, not {type(feed).__name__}")
        if feed.dtype != info.dtype or not _fits(feed.shape, info.shape):
            got = TensorInfo(info.name, feed.dtype.name, feed.shape)
            raise ValueError(f"input '{info.name}' takes {info}, not {got}")
        arrays.append(feed if feed.flags.c_contiguous else np.ascontiguousarray(feed))
    return arrays


def _fits(shape: tuple[int, ...], declared: tuple[int | None, ...]) -> bool:
    if shape == declared:
        return True
    return len(shape) == len(declared) and all(want in (None, got) for got, want in zip(shape, declared, strict=True))


def _wrong_names(inputs: Sequence[TensorInfo], feeds: Mapping[str, np.ndarray]) -> str:
    wanted = ", ".join(info.name for info in inputs)
    return f"the model takes the inputs {wanted or '(none)'}, not {', '.join(map(str, feeds)) or '(none)'}"
