"""Mixed precision: which parts of an int8 network stay in float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch.fx import GraphModule, Node

from edgekit.quant.graph.activations import watch
from edgekit.quant.graph.passes import aten
from edgekit.quant.ptq.quantizer import MOVES
from edgekit.quant.ptq.sensitivity import module_path

MOST_APART = 32.0  # of ranges under one scale: the narrowest part still has 8 of the 256 steps
BATCHES = 16  # that ranges are measured on


def fewest(most: int, drop: Callable[[int], float], limit: float) -> int | None:
    """Returns the smallest count, from 1 to `most`, with `drop(count)` ≤ `limit`; None where `most` does not reach it.

    Doubles the count until the limit holds, then bisects: the drop is taken to fall as the count grows.
    """
    failed, count = 0, min(1, most)
    while count and drop(count) > limit:
        if count == most:
            return None
        failed, count = count, min(2 * count, most)
    if not count:
        return None
    while count - failed > 1:
        middle = (failed + count) // 2
        if drop(middle) > limit:
            failed = middle
        else:
            count = middle
    return count


def uneven_heads(model: GraphModule, batches: Iterable[tuple[torch.Tensor, ...]]) -> dict[str, float]:
    """Finds the concats at a network's outputs whose parts differ too much in range to share one int8 scale.

    Detectors join boxes in pixels with scores from 0 to 1: at the boxes' scale every score is 0. Returns node name →
    widest range over narrowest, for each concat above MOST_APART that nothing but moves and concats follow, and for
    the concats after it. Ranges are those that the float network has on the first batches.
    """
    heads = [node for node in model.graph.nodes if _is_head(node)]
    if not heads:
        return {}
    watched = {part for head in heads for part in head.args[0]}
    ends: dict[Node, tuple[float, float]] = {}  # always around 0, as int8 ranges are

    def see(part: Node, result: torch.Tensor) -> None:
        if result.numel():
            low, high = (float(v) for v in torch.aminmax(result.float()))
            before = ends.get(part, (0.0, 0.0))
            ends[part] = min(before[0], low), max(before[1], high)

    watch(model, watched, batches, BATCHES, see)
    found: dict[str, float] = {}
    for head in heads:
        widths = [high - low for low, high in (ends.get(part, (0.0, 0.0)) for part in head.args[0]) if high > low]
        factor = max(widths) / min(widths) if widths else 1.0
        if factor > MOST_APART:
            found[head.name] = factor
        elif inner := [found[node.name] for node in _before(head) if node.name in found]:
            found[head.name] = max(inner)
    return found


def head_notes(model: GraphModule, heads: Mapping[str, float]) -> tuple[str, ...]:
    """Returns what the user should know of the concats in `heads`, which `uneven_heads` found in `model`."""
    nodes = {node.name: node for node in model.graph.nodes}
    places = {module_path(nodes[name]): factor for name, factor in heads.items()}
    return tuple(
        f"the concat {f'in {path} ' if path else ''}at the output stays in float: the ranges of its parts differ "
        f"{factor:,.0f}-fold, and one int8 scale would lose the narrow ones"
        for path, factor in places.items()
    )


def _is_head(node: Node) -> bool:
    return node.target == aten.cat.default and len(node.args[0]) > 1 and _leads_out(node)


def _leads_out(node: Node) -> bool:
    return bool(node.users) and all(
        user.op == "output" or (user.target in (*MOVES, aten.cat.default) and _leads_out(user)) for user in node.users
    )


def _before(node: Node) -> Iterable[Node]:
    """The concats whose values reach `node` through moves and concats."""
    pending = list(node.all_input_nodes)
    while pending:
        source = pending.pop()
        if source.target == aten.cat.default:
            yield source
        if source.target in (*MOVES, aten.cat.default):
            pending += source.all_input_nodes
