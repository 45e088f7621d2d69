"""Int8 weights beside float or dynamic inputs, in ExecuTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from int8_nets import sqnr
from weight_nets import batch, cases, program

from edgekit.artifacts.summary import inspect_artifact
from edgekit.exporters.executorch.lower import Lowered, to_executorch
from edgekit.exporters.executorch.weights import prepare_weights
from edgekit.quant.ptq.recipes import float32
from edgekit.runtimes import pte

# network and precision → how many linear layers the delegate computes
CASES = {("mlp", "int8-dynamic"): 3, ("mlp", "int8-weight-only"): 3, ("tied", "int8-dynamic"): 1}
CASES[("conv_head", "int8-weight-only")] = 1


def run(lowered: Lowered, name: str, path: Path) -> torch.Tensor:
    path.write_bytes(lowered.data)
    session = pte.load(str(path), threads=1, inputs=["x"], outputs=["y"])
    return torch.from_numpy(session.run({"x": batch(name)[0].numpy()})["y"])


@torch.no_grad()
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_linear_layers_are_delegated_with_int8_weights(name: str, precision: str, tmp_path: Path) -> None:
    lowered = to_executorch(program(name, precision))
    got = run(lowered, name, tmp_path / "model.pte")
    assert sqnr(cases()[name].module(*batch(name)), got) > 30
    assert not {op for op in lowered.undelegated if "quantize" in op} - {"quantized_decomposed::embedding_byte"}
    ops = inspect_artifact(tmp_path / "model.pte").ops
    assert ops["FullyConnected"] == CASES[name, precision]
    assert ("Convert" in ops) == (precision == "int8-dynamic")
    full = sum(t.numel() * 4 for t in float32(cases()[name].module, batch(name)).program.state_dict.values())
    assert len(lowered.data) < 0.45 * full + 4096  # of which the graph itself takes some kilobytes


@torch.no_grad()
def test_recurrent_layers_have_int8_weights(tmp_path: Path) -> None:
    name = "lstm"
    lowered = to_executorch(program(name, "int8-dynamic"))
    assert sqnr(cases()[name].module(*batch(name)), run(lowered, name, tmp_path / "model.pte")) > 30
    assert lowered.undelegated["quantized_decomposed::embedding_byte"] == 1
    assert inspect_artifact(tmp_path / "model.pte").parameter_bytes["int8"] >= 50 * 16 + 4 * 24 * (16 + 24)


def test_convolutions_without_kernels_are_noted() -> None:
    given = program("conv_head", "int8-weight-only")
    before = {name: tensor.dtype for name, tensor in given.state_dict.items()}
    made, (note,) = prepare_weights(given)
    assert "weights of 2 convolutions stay fp32" in note
    assert {name: tensor.dtype for name, tensor in given.state_dict.items()} == before
    assert made is not given and len(given.graph.nodes) != len(made.graph.nodes)
    assert prepare_weights(program("conv_head", "int8-dynamic"))[1] == ()


def test_float_programs_come_back_as_they_are() -> None:
    given = float32(cases()["mlp"].module, batch("mlp")).program
    assert prepare_weights(given) == (given, ())
