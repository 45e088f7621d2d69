"""Ragged arrays: outputs whose number of rows differs from run to run, padded with NaN and compared as sets.

A spec has OPEN for such a dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgekit.types import TensorSpec

if TYPE_CHECKING:
    import numpy as np

OPEN = -1
IN_ORDER = 1e-3  # of the largest value: rows that are so near, one by one, need no matching


def is_open(spec: TensorSpec) -> bool:
    """Whether values decide on a size of this output."""
    return OPEN in spec.shape


def stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks arrays of one rank to (runs, *largest shape), NaN where one has nothing; ragged integers are float64."""
    import numpy as np

    if len({array.shape for array in arrays}) == 1:
        return np.stack(arrays)
    shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
    dtype = arrays[0].dtype if arrays[0].dtype.kind == "f" else np.dtype(np.float64)
    result = np.full((len(arrays), *shape), np.nan, dtype)
    for into, array in zip(result, arrays, strict=True):
        into[tuple(slice(0, size) for size in array.shape)] = array
    return result


def holds_integers(array: np.ndarray) -> bool:
    """Whether an output's values are integers, which `stack` may have made float64; EdgeKit's models have float32."""
    return array.dtype.kind in "iu" or array.dtype == "float64"


def matched(
    reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray], specs: Sequence[TensorSpec]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns both sides with the rows of open outputs paired as sets, run by run; zeros stand for a missing partner.

    Arrays are (runs, *shape), padded by `stack`. Rows are paired with the least sum of distances (the assignment
    problem, by scipy), over all outputs that have as many rows as each other: a box, its score and its label move
    together. Outputs of fixed shape are returned as they are.
    """
    import numpy as np

    left, right = list(reference), list(outputs)
    if len(left) != len(right):
        return left, right
    places = [i for i, spec in enumerate(specs) if is_open(spec)]
    if not places:
        return left, right
    axes = {i: specs[i].shape.index(OPEN) for i in places}
    pairs: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {i: [] for i in places}
    for run in range(len(reference[places[0]])):
        rows = {i: (_rows(reference[i][run], axes[i]), _rows(outputs[i][run], axes[i])) for i in places}
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (a, b) in rows.items():
            groups.setdefault((len(a), len(b)), []).append(i)
        for members in groups.values():
            order = _assignment([rows[i] for i in members])
            for i in members:
                pairs[i].append(_paired(*rows[i], order))
    for i in places:
        most = max(len(a) for a, _ in pairs[i])
        for side, index in ((left, 0), (right, 1)):
            result = np.zeros((len(pairs[i]), most, *pairs[i][0][0].shape[1:]))
            for into, both in zip(result, pairs[i], strict=True):
                into[: len(both[index])] = both[index]
            side[i] = result
    return left, right


def _rows(array: np.ndarray, axis: int) -> np.ndarray:
    """The rows of one run along its open axis, without those that padding added; other padding is 0."""
    import numpy as np

    rows = np.moveaxis(array.astype(np.float64), axis, 0)
    there = ~np.isnan(rows.reshape(len(rows), -1)).all(axis=1) if rows.size else np.zeros(len(rows), bool)
    return np.nan_to_num(rows[there], nan=0.0, posinf=np.inf, neginf=-np.inf)


def _assignment(members: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that belong together, as indices into either side."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    sides: list[list[np.ndarray]] = [[], []]
    for pair in members:
        scale = max((float(np.abs(side).max()) for side in pair if side.size), default=1.0) or 1.0
        for columns, side in zip(sides, pair, strict=True):
            columns.append(side.reshape(len(side), math.prod(side.shape[1:])) / scale)
    a, b = (np.concatenate(columns, axis=1) for columns in sides)
    least = min(len(a), len(b))
    if len(a) == len(b) and (not a.size or np.abs(a - b).max() < IN_ORDER):
        return np.arange(least), np.arange(least)
    rows, columns = linear_sum_assignment(cdist(a, b))
    return rows, columns


def _paired(a: np.ndarray, b: np.ndarray, order: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns both sides row by row: the pairs, then what only the first has, then what only the second has."""
    import numpy as np

    rows, columns = order
    lone_a, lone_b = np.delete(a, rows, axis=0), np.delete(b, columns, axis=0)
    return (
        np.concatenate([a[rows], lone_a, np.zeros_like(lone_b)]),
        np.concatenate([b[columns], np.zeros_like(lone_a), lone_b]),
    )
