"""Tiny networks, one per pattern, quantized: which edges carry qparams, and how near to eager the result is."""

from __future__ import annotations

import pytest
import torch
from int8_nets import CASES, flat, quantized, sqnr
from torch.fx import Node

from edgekit.quant.graph.passes import aten, q

Q, DQ = q.quantize_per_tensor.default, q.dequantize_per_tensor.default
CHANNELS = q.dequantize_per_channel.default
LEAST_DB = 25.0


def nodes(name: str, *targets: object) -> list[Node]:
    return [n for n in quantized(name).program.graph.nodes if n.target in targets]


def qparams(node: Node) -> tuple[object, ...]:
    return node.args[1:3]


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_converted_network_is_near_eager(name: str) -> None:
    case = quantized(name)
    module = case.program.module()
    for batch in case.batches[:3]:
        for expected, got in zip(flat(case.module(*batch)), flat(module(*batch)), strict=True):
            assert sqnr(expected, got) > LEAST_DB


@pytest.mark.parametrize("name", CASES)
def test_weighted_ops_read_and_write_int8(name: str) -> None:
    weighted = nodes(name, aten.conv1d.default, aten.conv2d.default, aten.conv_transpose2d.input, aten.linear.default)
    assert weighted
    for node in weighted:
        assert node.args[0].target == DQ
        assert node.args[1].target in (DQ, CHANNELS)
        readers = list(node.users)
        if len(readers) == 1 and readers[0].target in (aten.relu.default, aten.hardtanh.default):
            readers = list(readers[0].users)
        assert {reader.target for reader in readers} == {Q}


@pytest.mark.parametrize("name", CASES)
def test_quantize_and_dequantize_have_the_same_qparams(name: str) -> None:
    for node in nodes(name, DQ):
        if node.args[0].target == Q:
            assert node.args[1:] == node.args[0].args[1:]
    for node in nodes(name, Q):
        scale, zero_point, *rest = node.args[1:]
        assert scale > 0 and -128 <= zero_point <= 127 and rest == [-128, 127, torch.int8]


MOVING = {
    "max_pool": aten.max_pool2d.default,
    "norm_behind": aten.max_pool2d.default,
    "prelu": aten.max_pool2d.default,
    "resize": aten.upsample_nearest2d.vec,
    "moves": aten.permute.default,
    "asymmetric_pad": aten.pad.default,
    "split": aten.slice.Tensor,
    "head": aten.view.default,
    "concat": aten.cat.default,
    "dense": aten.cat.default,
}


@pytest.mark.parametrize("name", MOVING)
def test_ops_that_move_values_share_qparams(name: str) -> None:
    found = nodes(name, MOVING[name])
    assert found
    for node in found:
        (after,) = node.users
        assert after.target == Q
        assert {qparams(source) for source in node.all_input_nodes} == {qparams(after)}


def test_fixed_qparams_of_sigmoid() -> None:
    for name in ("squeeze_excite", "two_outputs"):
        (sigmoid,) = nodes(name, aten.sigmoid.default)
        assert {qparams(user) for user in sigmoid.users} == {(1 / 256, -128)}


@pytest.mark.parametrize("name", ["conv_relu", "conv_relu6_bn", "residual", "max_pool", "depthwise", "same_padding"])
def test_implied_clips_are_gone(name: str) -> None:
    assert not nodes(name, aten.relu.default, aten.hardtanh.default)


@pytest.mark.parametrize("name", ["attention", "masked"])
def test_attention_scores_stay_in_float(name: str) -> None:
    """A mask's huge values would take the whole range, and 1/256 is too coarse a step for long sequences."""
    (softmax,) = nodes(name, aten.softmax.int)
    assert softmax.args[0].target != DQ
    assert all(user.target != Q for user in softmax.users)


@pytest.mark.parametrize("name", ["gelu_sort", "two_inputs", "mul_scalar"])
def test_what_no_runtime_computes_in_int8_stays_in_float(name: str) -> None:
    found = {n.target for n in quantized(name).program.graph.nodes}
    expected = {"gelu_sort": aten.gelu.default, "two_inputs": aten.embedding.default, "mul_scalar": aten.mul.Tensor}
    assert expected[name] in found
