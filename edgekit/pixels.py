"""Whether a network scales the bytes of images itself, told from the first numbers that it computes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
LARGEST_SHARE = 2.0  # numbers by which pixels of 0..1 are normalized are means and deviations below it
# Ops whose results hold the values that they were given.
MOVES = {
    op.default if hasattr(op, "default") else op
    for op in (
        aten._to_copy, aten.clone, aten.detach, aten.alias, aten.permute, aten.view, aten._unsafe_view, aten.reshape,
        aten.unsqueeze, aten.squeeze, aten.flip, aten.slice.Tensor, aten.index.Tensor, aten.index_select,
        aten.select.int, aten.transpose.int, aten.expand, aten.lift_fresh_copy, aten.cat,
    )
}  # fmt: skip
SUMS = {aten.sub.Tensor, aten.add.Tensor, aten.sub.Scalar, aten.add.Scalar, aten.sub_.Tensor, aten.add_.Tensor}
QUOTIENTS = {aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor}
PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor}


class _Known(Exception):
    """Ends the run: what was asked is known."""


class _First(TorchDispatchMode):
    """Follows the inputs through moves to the first op that computes with a number."""

    def __init__(self, inputs: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self._pixels = list(inputs)  # kept alive, so that an identity is that of one tensor
        self.scales: bool | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        pixels = {id(tensor) for tensor in self._pixels}
        result = func(*args, **(kwargs or {}))
        if not any(id(tensor) in pixels for tensor in tensors):
            return result
        if func in MOVES:
            self._pixels += [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            return result
        self.scales = self._scales(func, args, pixels)
        raise _Known

    def _scales(self, func: Any, args: Any, pixels: set[int]) -> bool:
        """Whether `func` subtracts, or divides by, what only values of up to 255 are normalized with."""
        if func not in SUMS | QUOTIENTS | PRODUCTS or len(args) < 2:
            return False
        numbers = [value for value in args[:2] if id(value) not in pixels]
        if len(numbers) != 1:
            return False
        largest = float(torch.as_tensor(numbers[0]).abs().max())
        return 0 < largest < 1 / LARGEST_SHARE**4 if func in PRODUCTS else largest > LARGEST_SHARE


def scales_bytes(call: Callable[..., object], images: tuple[torch.Tensor, ...]) -> bool:
    """Whether `call` normalizes `images` of uint8 as such: x / 255, or x minus a mean above 2.

    False where it takes neither them nor the same numbers as float32.
    """
    for given in (images, tuple(image.float() for image in images)):
        first = _First(given)
        try:
            with torch.no_grad(), first:
                call(*given)
        except Exception:  # _Known, which TorchScript wraps, or what comes of a type that the network does not take
            pass
        if first.scales is not None:
            return first.scales
    return False
