"""int8 without calibration data: what is quantized, what stays float, and what is refused."""

from __future__ import annotations

import pytest
import torch
from int8_nets import Net, sqnr
from torch import nn
from weight_nets import NAMES, PRECISIONS, batch, cases, compressed, program

from edgekit.errors import EdgeKitError
from edgekit.quant.graph.passes import aten, capture, q
from edgekit.quant.ptq.dynamic import WeightQuantizer
from edgekit.quant.ptq.recipes import int8_dynamic, int8_weight_only

CONVOLUTIONS = {"convolution", "transposed convolution"}


def test_the_table_of_networks() -> None:
    assert cases().keys() == set(NAMES)
    assert {name for case in cases().values() for name in case.layers} == {
        "linear", "embedding", "LSTM", "GRU", *CONVOLUTIONS,
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_near(name: str, precision: str) -> None:
    module, inputs = cases()[name].module, batch(name, seed=2)
    assert sqnr(module(*inputs), program(name, precision).module()(*inputs)) > 30


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_are_quantized(name: str) -> None:
    for dynamic in (True, False):
        quantizer = WeightQuantizer(dynamic=dynamic)
        quantizer.annotate(capture(cases()[name].module, batch(name)))
        layers = cases()[name].layers
        assert quantizer.quantized == {k: n for k, n in layers.items() if not (dynamic and k in CONVOLUTIONS)}
        assert quantizer.left_float == {k: n for k, n in layers.items() if dynamic and k in CONVOLUTIONS}
        assert 0.5 < quantizer.share <= 1


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_symmetric_int8_per_channel(name: str) -> None:
    dequantized = [n for n in program(name, "int8-weight-only").graph.nodes if "dequantize" in str(n.target)]
    assert dequantized
    for node in dequantized:
        per_tensor = node.target == q.dequantize_per_tensor.default
        assert not per_tensor or name == "conv_head"  # a grouped transposed convolution
        assert node.args[-1] == torch.int8


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_linear_layers_alone_are_quantized_as_they_come(name: str) -> None:
    assert not [n for n in program(name, "int8-weight-only").graph.nodes if n.target == q.choose_qparams.tensor]
    for node in program(name, "int8-dynamic").graph.nodes:
        if node.target == q.dequantize_per_tensor.tensor:
            assert {user.target for user in node.users} == {aten.linear.default}
        if node.target == aten.linear.default:
            assert node.args[0].target == q.dequantize_per_tensor.tensor


def test_kept_layers_are_float() -> None:
    module, inputs = cases()["mlp"].module, batch("mlp")
    for recipe in (int8_dynamic, int8_weight_only):
        nodes = recipe(module, inputs, (), frozenset({"linear"})).program.graph.nodes
        layers = [n for n in nodes if n.target == aten.linear.default]
        assert [n.args[1].op for n in layers] == ["placeholder", "call_function", "call_function"]
        assert layers[0].args[0].op == "placeholder"


def test_directions_share_scales() -> None:
    nodes = program("lstm_two_ways", "int8-weight-only").graph.nodes
    lstm = next(n for n in nodes if n.target == aten.lstm.input)
    held = program("lstm_two_ways", "int8-weight-only").state_dict
    names = program("lstm_two_ways", "int8-weight-only").graph_signature.inputs_to_buffers
    scales = [held[names[p.args[1].name]] for p in lstm.args[2] if p.op == "call_function"]
    assert len(scales) == 8
    for forward, backward in ((0, 2), (1, 3), (4, 6), (5, 7)):
        assert torch.equal(scales[forward], scales[backward])


def test_notes() -> None:
    assert compressed("mlp", "int8-dynamic").notes == ()
    (note,) = compressed("conv_head", "int8-dynamic").notes
    assert "1 convolution layer and 1 transposed convolution layer in float" in note and "--precision int8" in note
    (note,) = compressed("lstm", "int8-dynamic").notes
    assert "computes 1 LSTM layer in float" in note
    for name in NAMES:
        (note,) = compressed(name, "int8-weight-only").notes
        assert "smaller, not faster" in note


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Softplus, nn.Mish])
def test_convolutional_networks_are_stored_as_int8(activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 64, 3), activation(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 16, 2)
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    made = int8_dynamic(module, (x,))
    (note,) = made.notes
    assert "which hold 5 % of this model's weights" in note and "2 convolution layers are stored as int8" in note
    assert "--precision int8, which needs --data" in note
    codes = [value for value in made.program.state_dict.values() if value.dtype == torch.int8 and value.ndim > 1]
    assert sum(value.numel() for value in codes) == sum(p.numel() for p in module.parameters() if p.ndim > 1)
    assert sqnr(module(x), made.program.module()(x)) > 30


def test_networks_without_weights_are_refused() -> None:
    with pytest.raises(EdgeKitError, match="this model has none"):
        int8_dynamic(nn.Conv3d(1, 2, 3).eval(), (torch.randn(1, 1, 3, 3, 3),))
    with pytest.raises(EdgeKitError, match="this model has none"):
        int8_weight_only(Net(lambda n, x: torch.softmax(x, -1)).eval(), (torch.randn(2, 3),))
