"""Recipes: what is asked of the data, and what comes out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from int8_nets import CASES, Batches, build, flat, quantized, sqnr
from torch import nn
from torch.export import ExportedProgram

import edgekit
from edgekit.errors import EdgeKitError
from edgekit.quant.ptq.recipes import RECIPES, float32, half_compute, int8_static, io_qparams


class Counted:
    """Batches that tell how many of them are alive at once, and how often they were read."""

    def __init__(self, count: int) -> None:
        self.count, self.passes, self.alive, self.most = count, 0, 0, 0

    def _gone(self) -> None:
        self.alive -= 1

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        self.passes += 1
        for batch in Batches(CASES["conv_relu"], self.count):
            gc.collect()
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(batch[0], self._gone)
            yield batch
            del batch


def test_calibration_holds_few_batches_at_once() -> None:
    batches = Counted(20)
    int8_static(build("conv_relu"), next(iter(Batches(CASES["conv_relu"]))), batches)
    assert batches.passes == 2
    assert batches.most <= 2


def codes(program: ExportedProgram) -> dict[str, torch.Tensor]:
    return {name: value for name, value in program.state_dict.items() if value.dtype == torch.int8}


@pytest.mark.parametrize("name", ["residual", "squeeze_excite"])
def test_two_processes_calibrate_as_one_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [(batch[0].repeat(9, 1, 1, 1)[index : index + 1],) for index, batch in enumerate(Batches(CASES[name], 9))]
    two = int8_static(build(name), batches[0], batches).program
    monkeypatch.setattr("edgekit.util.forking.can_fork", lambda: False)
    one = int8_static(build(name), batches[0], batches).program
    assert codes(one) and all(torch.equal(value, codes(two)[key]) for key, value in codes(one).items())
    with torch.no_grad():
        assert sqnr(one.module()(*batches[0]), two.module()(*batches[0])) > 40


def test_calibration_leaves_data_and_module_alone() -> None:
    module = torch.nn.Sequential(torch.nn.ReLU(inplace=True), build("conv_relu"))
    batches = list(Batches(CASES["conv_relu"]))
    copies = [batch[0].clone() for batch in batches]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    int8_static(module, batches[0], batches)
    assert all(torch.equal(a[0], b) for a, b in zip(batches, copies, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_an_iterator_cannot_be_read_twice() -> None:
    with pytest.raises(TypeError, match="read twice"):
        int8_static(build("conv_relu"), next(iter(Batches(CASES["conv_relu"]))), iter(Batches(CASES["conv_relu"])))


def test_int8_without_data_is_an_error() -> None:
    with pytest.raises(EdgeKitError, match="data to calibrate"):
        int8_static(build("conv_relu"), next(iter(Batches(CASES["conv_relu"]))), [])


@torch.no_grad()
@pytest.mark.parametrize("name", ["residual", "two_inputs", "two_outputs", "squeeze_excite", "attention", "split"])
def test_half_compute_is_float16_inside_and_float32_outside(name: str) -> None:
    module, batch = build(name), next(iter(Batches(CASES[name])))
    program = half_compute(module, batch)
    expected, got = flat(module(*batch)), flat(program.module()(*batch))
    for a, b in zip(expected, got, strict=True):
        assert b.dtype == torch.float32 and a.shape == b.shape
        assert 45 < sqnr(a, b) < 120
    assert {value.dtype for value in program.state_dict.values() if value.is_floating_point()} == {torch.float16}


class Makes(nn.Module):
    """Makes tensors of its own: a recurrent state, a mask, a cast."""

    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.last = cell(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(x.shape[1], dtype=torch.float32)[None, :, None] > 1
        return self.last((self.cell(x)[0] * mask.float()).mean(1) + torch.ones(1, 16))


@torch.no_grad()
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_half_compute_makes_halves(cell: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Makes(cell).eval(), torch.randn(2, 5, 8)
    program = half_compute(module, (x,))
    made = [node.meta["val"] for node in program.graph.nodes if node.op == "call_function"]
    casts = sum(value.dtype == torch.float32 for value in made if isinstance(value, torch.Tensor))
    assert casts == 1  # of the output
    assert 45 < sqnr(module(x), program.module()(x)) < 120
    bundle = edgekit.export(module, precision="fp16", formats="executorch", inputs=["2x5x8"], out=tmp_path)
    assert bundle.manifest["artifacts"][0]["parity"]["sqnr_db"] > 45


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv_relu6_bn", "two_outputs", "two_inputs"])
def test_float32_is_the_module(name: str) -> None:
    module, batch = build(name), next(iter(Batches(CASES[name])))
    for a, b in zip(flat(module(*batch)), flat(float32(module, batch).program.module()(*batch)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_qparams_of_inputs_and_outputs() -> None:
    case = quantized("two_outputs")
    found = io_qparams(case.program, ["x"], ["a", "b"])
    assert set(found["inputs"]) == {"x"} and set(found["outputs"]) == {"a", "b"}
    assert found["outputs"]["b"] == {"scale": 1 / 256, "zero_point": -128, "dtype": "int8"}
    for value, name in zip(case.program.module()(*case.batches[0]), ("a", "b"), strict=True):
        steps = value / found["outputs"][name]["scale"]
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_qparams_of_floats_are_not_named() -> None:
    assert io_qparams(quantized("two_inputs").program, ["x", "i"], ["y"])["inputs"].keys() == {"x"}


def test_the_table_of_recipes() -> None:
    assert {name: (r.needs_data, r.half_weights) for name, r in RECIPES.items()} == {
        "fp32": (False, False),
        "fp16": (False, True),
        "int8": (True, False),
        "int8-dynamic": (False, False),
        "int8-weight-only": (False, False),
    }
    assert all(name == recipe.name for name, recipe in RECIPES.items())
