"""Types that travel everywhere: tensor specs, layouts, units, state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = {"executorch": ".pte", "onnx": ".onnx", "tflite": ".tflite"}  # format → what its files' names end in
Layout = Literal["nchw", "nhwc"]
LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc")  # of images in a file; EdgeKit's own arrays are always NCHW
Unit = Literal["points", "percent", "units"]
# Unit of a drop → what it is called, what stands behind its number, and how that is written.
UNITS: dict[Unit, tuple[str, str, str]] = {
    "points": ("accuracy drop", " points", ".2f"),  # of a share, higher for better: 100 · (original − file)
    "percent": ("rise of the error", " %", ".2f"),  # of the original's error, lower for better
    "units": ("drop of the metric", "", ".3g"),  # of a user's own scores, higher for better
}
Interval = tuple[float, float]


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name (`float32`, `int64`, …) and static shape of one model input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}:{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def nbytes(self) -> int:
        """The size of such a tensor in bytes."""
        import numpy as np

        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def axis_order(rank: int, layout: Layout) -> tuple[int, ...]:
    """Returns the NCHW axes in the order in which a file of `layout` has them: rank 4 is moved, all else stays."""
    return (0, 2, 3, 1) if layout == "nhwc" and rank == 4 else tuple(range(rank))


@dataclass(frozen=True)
class State:
    """One tensor that a model carries from call to call: it reads `input`, and gives the next value as `output`.

    `initial` is its value before the first call: little-endian numbers in C order, of the dtype and shape of `input`.
    """

    input: TensorSpec
    output: str
    initial: bytes = field(repr=False)

    @property
    def value(self) -> np.ndarray:
        """The initial value as an array of the shape of `input`."""
        import numpy as np

        return np.frombuffer(self.initial, np.dtype(self.input.dtype)).reshape(self.input.shape)


def finite(value: float) -> float | None:
    """Returns `value`, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


ITEM_BITS = {
    "bool": 8, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32, "uint32": 32,
    "int64": 64, "uint64": 64, "float16": 16, "bfloat16": 16, "float32": 32, "float64": 64, "complex64": 64,
    "complex128": 128, "float8e4m3fn": 8, "float8e4m3fnuz": 8, "float8e5m2": 8, "float8e5m2fnuz": 8, "float4e2m1": 4,
    "complex32": 32, "uint1": 1, "uint2": 2,
}  # fmt: skip


def stored_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Returns the bytes that a dense tensor of this dtype name takes; sub-byte types are packed."""
    return -(-math.prod(shape) * ITEM_BITS[dtype] // 8)


INT8_ARITHMETIC = ("int8", "int8-dynamic")  # which has to pay in speed; weight-only int8 is for size
