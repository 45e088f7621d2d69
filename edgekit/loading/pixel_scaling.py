"""Whether a network scales the bytes of images itself, told from the first numbers that it computes with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
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
# Likewise of ONNX, also of what the numbers go through before they are used.
ONNX_MOVES = {
    "Cast", "Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Split", "Concat",
    "Expand",
}  # fmt: skip
MOST_NUMBERS = 1 << 20  # of a mean image
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
        return len(numbers) == 1 and _of_bytes(torch.as_tensor(numbers[0]).numpy(), is_factor=func in PRODUCTS)


def _of_bytes(numbers: np.ndarray, is_factor: bool) -> bool:
    """Whether only values of up to 255 are normalized by these numbers: as a factor, or else as divisor or mean."""
    largest = float(np.abs(numbers).max(initial=0))
    return 0 < largest < 1 / LARGEST_SHARE**4 if is_factor else largest > LARGEST_SHARE


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


def onnx_scales_bytes(model: onnx.ModelProto, name: str) -> bool:
    """Whether the graph normalizes its input `name` as images of 0..255, told by the first op that computes with it."""
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer if _is_small(tensor)}
    pixels = {name}
    for node in model.graph.node:
        given = [value for value in node.input if value]
        if node.op_type == "Constant":
            held = next((helper.get_attribute_value(a) for a in node.attribute if a.name.startswith("value")), None)
            known[node.output[0]] = numpy_helper.to_array(held) if isinstance(held, TensorProto) else np.asarray(held)
        elif node.op_type in ONNX_MOVES and given[0] in known and len(node.output) == 1:
            known[node.output[0]] = known[given[0]]
        elif pixels.intersection(given):
            if node.op_type not in ONNX_MOVES:
                return _onnx_scales(node.op_type, [known.get(value) for value in given if value not in pixels])
            pixels.update(node.output)
    return False


def _onnx_scales(op: str, numbers: Sequence[np.ndarray | None]) -> bool:
    if op == "BatchNormalization":  # factor, offset, mean, variance
        numbers = numbers[2:3]
    elif op not in ("Add", "Sub", "Div", "Mul"):
        return False
    return len(numbers) == 1 and numbers[0] is not None and _of_bytes(numbers[0], is_factor=op == "Mul")


def _is_small(tensor: TensorProto) -> bool:
    """Whether a constant may be what images are normalized by, and lies in the model itself."""
    return tensor.data_location != TensorProto.EXTERNAL and math.prod(tensor.dims) <= MOST_NUMBERS
