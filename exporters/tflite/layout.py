"""How the axes of a value lie after a reshape, and which orders suit the layers."""

from __future__ import annotations

import numpy as np

from edgekit.exporters.tflite.ir import Perm, QParams, Shape, Tensor, Value, channels_last, identity

CHANNELS_LAST = 2


def welcome(perm: Perm) -> int:
    """How well an order of axes suits layers: convolutions want channels last, products of matrices the last axis."""
    if len(perm) > 2 and perm == channels_last(len(perm)):
        return CHANNELS_LAST
    return int(bool(perm) and perm[-1] == len(perm) - 1)


def reshaped_channels(tensor: Tensor, shape: Shape, axis: int) -> tuple[QParams | None, np.ndarray]:
    """Parameters of a reshaped constant with scales along an axis; real numbers where that axis merges or splits."""
    assert tensor.q is not None and tensor.data is not None
    for source, target in merge_groups(tensor.shape, shape) or []:
        if source == [axis] and len(target) == 1:
            return tensor.q.moved(target[0]), tensor.data
    return None, tensor.q.dequantize(tensor.data)


def merge_groups(source: Shape, target: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Match the axes of a reshape: groups of source axes and target axes with equal products, 1-sized axes left out.

    None for empty tensors, where every product is 0.
    """
    if 0 in source or 0 in target:
        return None
    left = [axis for axis, size in enumerate(source) if size != 1]
    right = [axis for axis, size in enumerate(target) if size != 1]
    groups: list[tuple[list[int], list[int]]] = []
    while left:
        group: tuple[list[int], list[int]] = ([left.pop(0)], [right.pop(0)])
        a, b = source[group[0][0]], target[group[1][0]]
        while a != b:
            if a < b:
                group[0].append(left.pop(0))
                a *= source[group[0][-1]]
            else:
                group[1].append(right.pop(0))
                b *= target[group[1][-1]]
        groups.append(group)
    return groups


def reshaped_order(
    value: Value, shape: Shape, groups: list[tuple[list[int], list[int]]] | None
) -> tuple[Perm, Shape] | None:
    """Permutation and physical shape of a reshaped value, or None if axes that merge do not lie in order."""
    if groups is None:
        return (identity(len(shape)), shape) if value.perm == identity(len(value.perm)) else None
    by_first = {group[0][0]: group for group in groups}
    grouped = {axis for group in groups for axis in group[0]}
    physical = [axis for axis in value.perm if axis in grouped]
    perm: list[int] = []
    while physical:
        group = by_first.get(physical[0])
        if group is None or physical[: len(group[0])] != group[0]:
            return None
        perm += group[1]
        physical = physical[len(group[0]) :]
    ones = [axis for axis, size in enumerate(shape) if size == 1]
    for axis in reversed(ones):  # a batch of 1 lies first, another 1-sized axis before its successor, or at the end
        perm.insert(0 if axis == 0 else perm.index(axis + 1) if axis + 1 in perm else len(perm), axis)
    return tuple(perm), tuple(shape[axis] for axis in perm)
