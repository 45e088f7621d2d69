"""Make up plausible inputs where there are no samples: token numbers of the table's range, masks of ones, lengths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgekit.types import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import onnx

Range = tuple[int, int]  # integers from the first up to, and without, the second; None stands for normal numbers

_PADDING = re.compile(r"pad(ding)?_?mask|key_padding|is_pad", re.IGNORECASE)  # True where there is nothing
_MASK = re.compile(r"mask|valid", re.IGNORECASE)
_LENGTH = re.compile(r"(^|_)(len|length)s?($|_)|lens?$|lengths?$", re.IGNORECASE)
_ONES, _ZEROS = (1, 2), (0, 1)
BYTES: Mapping[str, Range] = {"uint8": (0, 256), "int8": (-128, 128)}
UNKNOWN = (0, 2)  # of integers of which nothing is known: an index into the smallest table, a flag, a type

# Operators that pass numbers on, changed by a little at most, and whose results are indices where their inputs are.
_PASSING = (
    "_to_copy", "_unsafe_view", "add", "alias", "cat", "clamp", "clone", "contiguous", "copy_", "detach", "expand",
    "lift_fresh", "mul", "permute", "remainder", "repeat", "reshape", "select", "slice", "squeeze", "stack", "sub", "t",
    "transpose", "unsqueeze", "view", "where",
)  # fmt: skip
# ONNX ops that pass numbers on as they are, and those that look a number up in a table: op → input with the indices.
_PASSES_ON = {"Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose", "Slice", "Concat"}
_LOOKS_UP = {"Gather": 1, "GatherElements": 1}


def ranges(specs: Sequence[TensorSpec], limits: Mapping[int, int] | None = None) -> tuple[Range | None, ...]:
    """Returns what each input is filled with, by its name, its type, and what is known of it.

    `limits` maps the position of an input to the number of rows of the smallest table that it is an index into.
    """
    return tuple(_range(spec, specs, (limits or {}).get(position)) for position, spec in enumerate(specs))


def _range(spec: TensorSpec, specs: Sequence[TensorSpec], limit: int | None) -> Range | None:
    if _PADDING.search(spec.name) and not spec.dtype.startswith("float"):
        return _ZEROS
    if _MASK.search(spec.name) or spec.dtype == "bool":
        return _ONES
    if spec.dtype.startswith(("float", "bfloat")):
        return None
    if _LENGTH.search(spec.name) and len(spec.shape) < 2:
        longest = max((other.shape[1] for other in specs if len(other.shape) > 1), default=1)
        return longest, longest + 1
    if limit is not None:
        return 0, limit
    if spec.dtype in BYTES and len(spec.shape) > 2:
        return BYTES[spec.dtype]
    return UNKNOWN


def is_mask(name: str) -> bool:
    """Whether an input of this name is a mask, of whatever type."""
    return _MASK.search(name) is not None


def alternatives(found: Sequence[Range | None]) -> list[tuple[Range | None, ...]]:
    """Returns what to try where a model fails on, or gives no numbers for, what `ranges` says; zeros last."""
    flipped = tuple({_ONES: _ZEROS, _ZEROS: _ONES}.get(r, r) if r is not None else None for r in found)
    halves = tuple(r and (r[0], max(r[0] + 1, (r[0] + r[1]) // 2)) for r in found)
    small, zeros = (tuple(r and fixed for r in found) for fixed in (_ONES, _ZEROS))
    return list(dict.fromkeys([flipped, halves, small, zeros]))


def fill(spec: TensorSpec, filled: Range | None, rng: np.random.Generator, runs: int | None = None) -> np.ndarray:
    """Returns an array of the spec's shape and type, (runs, *shape) where `runs` is given."""
    import numpy as np

    shape = spec.shape if runs is None else (runs, *spec.shape)
    if filled is None:
        return rng.standard_normal(shape).astype(spec.dtype)
    values = rng.integers(*filled, size=shape).astype(spec.dtype)
    if filled[0] == 0 and filled[1] > 1 and values.size and not values.any():
        np.ravel(values)[-1] = filled[1] - 1  # all zeros are all padding
    return np.asarray(values)


def recorder(inputs: Sequence[Any]) -> Any:
    """Returns a dispatch mode that follows integer `inputs` through a run: `limits` has the rows of their tables.

    `random` lists the operators that drew random numbers, with the user's file and line where they are known.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    aten = torch.ops.aten
    # op → positions of the table, of the indices, and of the axis that they count along (None: the first axis).
    tables = {
        aten.embedding.default: (0, 1, None),
        aten._embedding_bag.default: (0, 1, None),
        aten._embedding_bag_forward_only.default: (0, 1, None),
        aten.index_select.default: (0, 2, 1),
        aten.gather.default: (0, 2, 1),
        aten.scatter.value: (0, 2, 1),
        aten.scatter_.value: (0, 2, 1),
    }

    passes_on = {getattr(aten, name) for name in _PASSING}

    class Recorder(TorchDispatchMode):
        supports_higher_order_operators = True  # branches and loops of an exported program

        def __init__(self) -> None:
            super().__init__()
            self.limits: dict[int, int] = {}
            self.random: list[str] = []
            self.sources: dict[int, set[int]] = {}  # storage → positions of the inputs that it was made from
            self.held: list[Any] = []  # so that no storage is freed and its address used again
            for position, tensor in enumerate(inputs):
                if not tensor.is_floating_point():
                    self.follow(tensor, {position})

        def follow(self, tensor: Any, positions: set[int]) -> None:
            self.held.append(tensor)
            self.sources.setdefault(tensor.untyped_storage()._cdata, set()).update(positions)

        def origin(self, value: Any) -> set[int]:
            whole = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
            return set().union(*(self.sources.get(t.untyped_storage()._cdata, set()) for t in whole))

        def limit(self, indices: Any, rows: int) -> None:
            for position in self.origin(indices):
                self.limits[position] = min(rows, self.limits.get(position, rows))

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in tables:
                table, indices, axis = tables[func]
                self.limit(args[indices], args[table].shape[0 if axis is None else args[axis]])
            elif func is aten.index.Tensor:
                for axis, indices in enumerate(args[1]):
                    if indices is not None and indices.dtype is not torch.bool:
                        self.limit(indices, args[0].shape[axis])
            if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()) and "attention" not in str(func):
                self.random.append(f"{str(func).rpartition('.')[0]}{user_line()}")
            result = func(*args, **(kwargs or {}))
            passes = self.sources and getattr(func, "overloadpacket", None) in passes_on
            origin = self.origin((args, kwargs)) if passes else set()
            for tensor in tree_leaves(result) if origin else ():
                if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
                    self.follow(tensor, origin)
            return result

    return Recorder()


def user_line() -> str:
    """Returns `, FILE line N` of the user's code that the innermost torch call comes from, or nothing."""
    import sys
    from pathlib import Path

    import torch

    ours, theirs = str(Path(__file__).parents[1]), (str(Path(torch.__file__).parent), "<", sys.base_prefix + "/lib")
    frame: Any = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(ours):
        name = frame.f_code.co_filename
        if not name.startswith(theirs) and "site-packages" not in name:
            return f", {Path(name).name} line {frame.f_lineno}"
        frame = frame.f_back
    return ""


def onnx_limits(model: onnx.ModelProto, names: Sequence[str]) -> dict[int, int]:
    """Returns the rows of the smallest table that each input of an ONNX graph is an index into, by position."""
    rows = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    rows |= {n.output[0]: n.attribute[0].t.dims for n in model.graph.node if n.op_type == "Constant" and n.attribute}
    origin = {name: {position} for position, name in enumerate(names)}
    limits: dict[int, int] = {}
    for node in model.graph.node:
        if node.op_type in _LOOKS_UP and node.input[0] in rows:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            dims = rows[node.input[0]]
            for position in origin.get(node.input[_LOOKS_UP[node.op_type]], ()) if dims else ():
                limits[position] = min(dims[axis], limits.get(position, dims[axis]))
        elif node.op_type in _PASSES_ON:
            origin[node.output[0]] = set().union(*(origin.get(name, set()) for name in node.input))
    return limits
