"""Layers quantized one by one: the simulation against torchao's converted network, and who is named."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from int8_nets import CASES, Batches, build, flat, sqnr

from edgekit.quant.ptq.recipes import Calibrated, calibrate, convert
from edgekit.quant.ptq.sensitivity import LOST_DB, Layer, Simulation, _worst, sensitivity

SIMULATED = (
    "conv_hardswish", "residual", "dense", "squeeze_excite", "attention", "two_outputs", "two_inputs", "moves",
    "asymmetric_pad", "shared_conv", "transposed_groups",
)  # fmt: skip
Row = tuple[Calibrated, Simulation]


@functools.cache
def calibrated(name: str) -> Row:
    case = Batches(CASES[name], 4)
    found = calibrate(build(name), next(iter(case)), case)
    return found, Simulation(found.original, found.prepared)


@torch.no_grad()
@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize("kept", ["none", "even", "odd"])
def test_the_simulation_is_the_converted_network(name: str, kept: str) -> None:
    """With every layer in int8, and with every other one in float."""
    units = list(calibrated(name)[1].units)
    in_float = frozenset({"none": [], "even": units[::2], "odd": units[1::2]}[kept])
    module, batches = build(name), list(Batches(CASES[name], 4))
    found = calibrate(module, batches[0], batches, in_float)
    simulation = Simulation(found.original, found.prepared)
    simulated = simulation.outputs(batches[0], frozenset(simulation.units) - in_float)
    program = convert(found).program.module(check_guards=False)
    for expected, got in zip(flat(program(*batches[0])), simulated, strict=True):
        assert sqnr(expected, got) > 60  # equal but for how kernels round


@torch.no_grad()
@pytest.mark.parametrize("name", SIMULATED)
def test_no_layer_quantized_is_eager(name: str) -> None:
    _, simulation = calibrated(name)
    (batch,) = Batches(CASES[name], 1)
    for expected, got in zip(flat(build(name)(*batch)), simulation.outputs(batch, frozenset()), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", SIMULATED)
def test_what_lies_before_a_layer_need_not_be_run_again(name: str) -> None:
    _, simulation = calibrated(name)
    (batch,) = Batches(CASES[name], 1)
    floats = simulation.values(batch)
    assert simulation.units
    for unit in simulation.units:
        whole = simulation.outputs(batch, frozenset([unit]))
        for a, b in zip(whole, simulation.outputs(batch, frozenset([unit]), floats), strict=True):
            assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("name", ["residual", "squeeze_excite", "depthwise"])
def test_one_layer_alone_loses_what_it_does_in_a_network_converted_with_the_others_in_float(name: str) -> None:
    _, simulation = calibrated(name)
    batches = list(Batches(CASES[name], 4))
    units = frozenset(simulation.units)
    module = build(name)
    felt = [layer for layer in sensitivity(simulation, batches) if layer.sqnr_db < 60]
    assert len(felt) >= 3
    for layer in felt:
        alone = convert(calibrate(module, batches[0], batches, units - {layer.node})).program.module()
        expected, got = (torch.cat([flat(f(*batch))[0] for batch in batches]) for f in (module, alone))
        assert layer.sqnr_db == pytest.approx(sqnr(expected, got), abs=2)


def test_layers_are_named_as_the_user_knows_them() -> None:
    _, simulation = calibrated("squeeze_excite")
    layers = sensitivity(simulation, Batches(CASES["squeeze_excite"], 2))
    named = {(layer.path, layer.op) for layer in layers}
    assert named == {
        ("a", "conv2d + relu"), ("", "mean"), ("down", "conv2d + relu"), ("up", "conv2d"), ("", "sigmoid"),
        ("", "mul"), ("b", "conv2d"),
    }  # fmt: skip
    assert [layer.sqnr_db for layer in layers] == sorted(layer.sqnr_db for layer in layers)
    weights = {layer.path: layer.weight_share for layer in layers if layer.path}
    sizes = {path: sum(p.numel() for p in build("squeeze_excite").get_submodule(path).parameters()) for path in weights}
    assert weights == pytest.approx({path: size / sum(sizes.values()) for path, size in sizes.items()})


@pytest.mark.parametrize(
    ("signal", "noise", "decibel"),
    [([100.0], [1.0], 20), ([100.0, 1.0], [1.0, 1.0], 0), ([1.0], [0.0], math.inf), ([0.0], [1.0], LOST_DB),
     ([1.0], [math.nan], LOST_DB), ([1.0], [math.inf], LOST_DB), ([0.0], [0.0], math.inf)],
)  # fmt: skip
def test_the_worst_output_counts(signal: list[float], noise: list[float], decibel: float) -> None:
    assert _worst(signal, noise) == pytest.approx(decibel)


def test_a_layer_that_loses_nothing_has_no_number_in_json() -> None:
    assert Layer("n", "a.b", "conv2d", math.inf, 0.5).to_dict()["sqnr_db"] is None
    assert Layer("n", "a.b", "conv2d", 30.0, 0.5).label == "a.b (conv2d)"
    assert Layer("n", "", "mean", 30.0, 0.0).label == "mean"


def test_every_case_exists() -> None:
    assert set(SIMULATED) <= set(CASES)
