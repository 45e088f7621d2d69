"""Einsum as products of stacks of matrices, two operands at a time."""

from __future__ import annotations

import itertools
import math

from edgekit.exporters.tflite.builder import FLOAT, Builder
from edgekit.exporters.tflite.ir import Node, Value
from edgekit.exporters.tflite.ops.matmul import batched
from edgekit.exporters.tflite.ops.reduction import reduced
from edgekit.exporters.tflite.registry import lowers, unsupported


@lowers("Einsum")
def einsum(b: Builder, node: Node, *, equation: str) -> None:
    """Sum what only one operand has, then multiply two operands after the other."""
    if b.dtype(node.outputs[0]) != FLOAT:
        raise unsupported(node, f"products of {b.dtype(node.outputs[0])}")
    terms, result = _terms(b, node, equation)
    if not set(result) <= set().union(*terms):
        raise unsupported(node, f"axes of the result that no operand has in '{equation}'")
    operands = [b.settle(b.value(name)) for name in node.inputs]
    for index, term in enumerate(terms):
        if len(set(term)) != len(term):
            raise unsupported(node, f"the diagonal in '{equation}'")
        others = set(result).union(*(other for place, other in enumerate(terms) if place != index))
        operands[index], terms[index] = _summed(b, operands[index], term, others)
    sizes = _sizes(node, operands, terms, equation)
    value, term = operands[0], terms[0]
    for place in range(1, len(operands)):
        read_later = [*dict.fromkeys([*result, *itertools.chain(*terms[place + 1 :])])]
        value, term = _product(b, node, (value, operands[place]), (term, terms[place]), read_later, sizes)
    b.bind(node.outputs[0], _ordered(value, term, result))


def _sizes(node: Node, operands: list[Value], terms: list[list[str]], equation: str) -> dict[str, int]:
    """The length of each named axis."""
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        for axis, size in zip(term, operand.shape, strict=True):
            sizes[axis] = size if sizes.get(axis, 1) == 1 else sizes[axis]
    for term, operand in zip(terms, operands, strict=True):
        if operand.shape != tuple(sizes[axis] for axis in term):
            raise unsupported(node, f"broadcasting within '{equation}'")
    return sizes


def _product(
    b: Builder,
    node: Node,
    operands: tuple[Value, Value],
    terms: tuple[list[str], list[str]],
    kept: list[str],
    sizes: dict[str, int],
) -> tuple[Value, list[str]]:
    """BATCH_MATMUL of two operands, summed over the axes that both have and `kept` has not; its axis names."""
    x, y = terms
    batch = [axis for axis in kept if axis in x and axis in y]
    left, right = ([axis for axis in kept if axis in term and axis not in batch] for term in terms)
    inner = [axis for axis in x if axis in y and axis not in batch]

    def count(axes: list[str]) -> int:
        return math.prod(sizes[axis] for axis in axes)

    stack = (count(batch),)
    matrix_x = b.settle(
        b.reshape(_ordered(operands[0], x, [*batch, *left, *inner]), (*stack, count(left), count(inner)))
    )
    matrix_y = b.settle(
        b.reshape(_ordered(operands[1], y, [*batch, *inner, *right]), (*stack, count(inner), count(right)))
    )
    product, perm = batched(b, node, matrix_x, matrix_y)
    order = [*batch, *left, *right]
    return b.settle(b.reshape(Value(product, perm), tuple(sizes[axis] for axis in order))), order


def _terms(b: Builder, node: Node, equation: str) -> tuple[list[list[str]], list[str]]:
    """Axis names of each operand and of the result; an ellipsis becomes names of its own."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = []
    widest = 0
    for term, name in zip(left.split(","), node.inputs, strict=True):
        hidden = len(b.shape(name)) - len(term.replace("...", "")) if "..." in term else 0
        widest = max(widest, hidden)
        head, _, tail = term.partition("...")
        terms.append([*head, *(f"…{index}" for index in range(-hidden, 0)), *tail])
    spread = [f"…{index}" for index in range(-widest, 0)]
    if not arrow:
        letters = [letter for letter in left if letter.isalpha()]
        return terms, [*spread, *sorted(letter for letter in set(letters) if letters.count(letter) == 1)]
    head, dots, tail = right.partition("...")
    return terms, [*head, *(spread if dots else []), *tail]


def _summed(b: Builder, value: Value, term: list[str], kept: set[str]) -> tuple[Value, list[str]]:
    """Sum over the axes that nothing else names."""
    gone = [index for index, axis in enumerate(term) if axis not in kept]
    if not gone:
        return value, term
    tensor = reduced(b, "SUM", b.as_float(value.tensor), [value.axis(index) for index in gone], keepdims=False)
    left = [axis for axis in value.perm if axis not in gone]
    order = sorted(left)
    perm = tuple(order.index(axis) for axis in left)
    return Value(tensor, perm), [axis for axis in term if axis in kept]


def _ordered(value: Value, term: list[str], wanted: list[str]) -> Value:
    """The value with its logical axes in another order: no data move."""
    order = [term.index(axis) for axis in wanted]
    return Value(value.tensor, tuple(order.index(axis) for axis in value.perm))
