"""Which parts stay in float: the search for the fewest layers, and concats of parts that share no range."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from int8_nets import Net, conv
from torch import nn

from edgekit.quant.graph.passes import aten, capture, q
from edgekit.quant.ptq.float_heads import fewest, head_notes, uneven_heads
from edgekit.quant.ptq.recipes import int8_static

torch.set_num_threads(1)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 30])
def test_the_fewest_are_found_in_few_steps(most: int) -> None:
    for needed in range(1, most + 2):
        calls: list[int] = []

        def drop(count: int, needed: int = needed, calls: list[int] = calls) -> float:
            calls.append(count)
            return 0.0 if count >= needed else 5.0

        assert fewest(most, drop, 1.0) == (needed if needed <= most else None)
        assert len(calls) == len(set(calls)) <= 2 * max(needed, 1).bit_length() + 1
        assert all(1 <= count <= most for count in calls)


def heads(join: Callable[[Net, torch.Tensor, torch.Tensor], object]) -> Callable[[], nn.Module]:
    """A network with boxes, some 300 times as wide as its scores, and a function of the two."""
    return lambda: Net(
        lambda n, x: join(n, n.boxes(y := F.relu(n.stem(x))) * 1000.0, torch.sigmoid(n.scores(y))),
        stem=conv(), boxes=conv(8, 4), scores=conv(8, 4), after=conv(8, 4),
    )  # fmt: skip


# A function of boxes and scores → how many of its concats are uneven heads.
HEADS: dict[str, tuple[Callable[[Net, torch.Tensor, torch.Tensor], object], int]] = {
    "at the output": (lambda n, boxes, scores: torch.cat([boxes, scores], 1), 1),
    "before moves": (lambda n, boxes, scores: torch.cat([boxes, scores], 1).flatten(2).transpose(1, 2), 1),
    "of scales": (
        lambda n, boxes, scores: torch.cat([torch.cat([boxes, scores], 1).flatten(2) for _ in range(2)], 2), 3
    ),
    "of like parts": (lambda n, boxes, scores: torch.cat([scores, scores.flip(1)], 1), 0),
    "inside": (lambda n, boxes, scores: n.after(torch.cat([boxes, scores], 1)), 0),
    "two outputs": (lambda n, boxes, scores: (boxes, scores), 0),
    "beside another output": (lambda n, boxes, scores: (torch.cat([boxes, scores], 1), scores), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_uneven_heads(name: str) -> None:
    join, count = HEADS[name]
    torch.manual_seed(0)
    module = heads(join)().eval()
    batches = [(torch.randn(1, 3, 8, 8),) for _ in range(4)]
    graph = capture(module, batches[0])
    found = uneven_heads(graph, batches)
    assert len(found) == count
    assert all(32 < factor < 1e5 for factor in found.values())
    assert bool(head_notes(graph, found)) == bool(count)
    compressed = int8_static(module, batches[0], batches)
    assert any("stays in float" in note for note in compressed.notes) == bool(count)
    concats = [n for n in compressed.program.graph.nodes if n.target == aten.cat.default]
    quantized = [n for n in concats if all(user.target == q.quantize_per_tensor.default for user in n.users)]
    assert len(concats) - len(quantized) == count
    for concat in concats:
        if concat not in quantized:
            scales = [n.args[1] if n.target == q.dequantize_per_tensor.default else None for n in concat.args[0]]
            assert len(set(scales)) > 1 or scales[0] is None  # each part has a scale of its own, or none


@torch.no_grad()
def test_an_input_whose_only_reader_stays_in_float_is_not_quantized() -> None:
    module = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(stride=2, padding=0), nn.ReLU(), conv(8, 4)).eval()
    batches = [(torch.randn(1, 3, 8, 8),) for _ in range(4)]
    (first, second) = [n.name for n in capture(module, batches[0]).graph.nodes if n.target == aten.conv2d.default]
    for kept, quantized in ((frozenset([first]), 0), (frozenset([second]), 1), (frozenset([first, second]), 0)):
        graph = int8_static(module, batches[0], batches, kept).program.graph
        (x,) = [n for n in graph.nodes if n.name == "input"]
        assert sum(user.target == q.quantize_per_tensor.default for user in x.users) == quantized


def test_parts_that_are_always_zero_have_no_range() -> None:
    module = Net(lambda n, x: torch.cat([n.a(x) * 0.0, n.b(x)], 1), a=conv(), b=conv()).eval()
    batches = [(torch.randn(1, 3, 8, 8),)]
    assert uneven_heads(capture(module, batches[0]), batches) == {}
