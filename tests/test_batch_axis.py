"""Inputs whose batch is not their first dimension, or that have none, are fed from data in the forms people have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import edgekit
from edgekit.data import sources
from edgekit.errors import EdgeKitError
from edgekit.measuring import schedule
from edgekit.runtimes import Timing
from edgekit.types import TensorSpec

STEP = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
HIDDEN = np.random.default_rng(1).standard_normal((6, 2, 4)).astype(np.float32)  # samples, layers, hidden


class Recurrent(nn.Module):
    """One step of an LSTM of two layers, with its state as inputs and outputs, and a number for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, 2)

    def forward(
        self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor, rate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out, (hidden, cell) = self.lstm(x[None], (h, c))
        return out[0] * rate, hidden, cell


def inputs(batch: int) -> list[str]:
    state = f"float32[2,{batch},4]"
    return [f"x:float32[{batch},5]", f"h:{state}", f"c:{state}", "rate:int64[]"]


# How the states of six samples may lie in arrays whose samples come first.
FORMS = {"samples": HIDDEN, "whole inputs": HIDDEN[:, :, None]}
SPECS = (TensorSpec("x", "float32", (2, 5)), TensorSpec("h", "float32", (2, 1, 4)))


def specs(batch: int) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec("x", "float32", (batch, 5)),
        TensorSpec("h", "float32", (2, batch, 4)),
        TensorSpec("rate", "int64", ()),
    )


@pytest.mark.parametrize(("form", "batch"), [("samples", 1), ("samples", 4), ("whole inputs", 1)])
def test_arrays_of_samples_are_cut_along_the_batch(form: str, batch: int) -> None:
    source = sources.load({"x": STEP, "h": FORMS[form], "rate": np.array(3)})
    found = list(sources.batches(source.evaluation, specs(batch)))
    assert sum(real for _, real, _ in found) == 6
    for number, ((x, h, rate), real, _) in enumerate(found):
        part = slice(number * batch, number * batch + real)
        np.testing.assert_array_equal(x[:real], STEP[part])
        np.testing.assert_array_equal(h[:, :real], HIDDEN[part].transpose(1, 0, 2))
        assert (rate.shape, int(rate)) == ((), 3)


def test_a_batch_that_fits_both_ways_is_refused() -> None:
    given = [({"x": STEP[:2], "h": HIDDEN[:2], "rate": np.full(2, 3)}, None)]
    with pytest.raises(EdgeKitError, match=r"samples for input h:float32\[2,1,4\] can be read in two ways"):
        list(sources.batches(sources.load(given).evaluation, specs(1)))


@pytest.mark.parametrize("size", [1, 3, 6])
def test_batches_are_taken_as_the_model_takes_them(size: int) -> None:
    given = [
        ({"x": STEP[i : i + size], "h": HIDDEN[i : i + size].transpose(1, 0, 2), "rate": np.full(size, 3)}, None)
        for i in range(0, 6, size)
    ]
    found = list(sources.batches(sources.load(given).evaluation, specs(1)))
    assert len(found) == 6
    for number, ((_, h, _), _, _) in enumerate(found):
        np.testing.assert_array_equal(h[:, 0], HIDDEN[number])


def test_samples_that_differ_in_what_is_one_for_all_are_refused() -> None:
    source = sources.load({"x": STEP, "h": HIDDEN, "rate": np.arange(6)})
    with pytest.raises(EdgeKitError, match="input 'rate' is the same for the 2 samples of a run"):
        list(sources.batches(source.evaluation, specs(2)))


def test_a_shape_that_fits_no_form_is_told(tmp_path: Path) -> None:
    source = sources.load({"x": STEP, "h": HIDDEN[:, :1], "rate": np.array(3)})
    with pytest.raises(EdgeKitError, match="samples are 1x4, the model's input 'h' takes 2x4"):
        list(sources.batches(source.evaluation, specs(1)))


@pytest.mark.parametrize("form", FORMS)
def test_export_and_compare(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "TIMING", Timing(0, 0, 1, 1))
    torch.manual_seed(0)
    net = Recurrent().eval()
    given = {"x": STEP, "h": FORMS[form], "c": FORMS[form], "rate": np.array(3)}
    bundle = edgekit.export(
        net, target="x86", formats="onnx,tflite", precision="fp32", data=given, inputs=inputs(1), out=tmp_path
    )
    golden = np.load(bundle.path / "golden.npz")
    with torch.no_grad():
        h = torch.from_numpy(HIDDEN[0][:, None])
        expected = net(torch.from_numpy(STEP[:1]), h, h, torch.tensor(3))
    for name, value in zip(bundle.manifest["outputs"], expected, strict=True):
        np.testing.assert_allclose(golden[f"tflite/{name['name']}"][0], value.numpy(), atol=1e-6)
    found = edgekit.compare(net, [bundle], data=given, inputs=inputs(1), cache=False, rounds=1)
    assert min(m.parity.sqnr_db for m in found.artifacts) > 100


def test_an_onnx_file_with_a_state_of_open_batch(tmp_path: Path) -> None:
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("ReduceMean", ["h"], ["mean"], axes=[0], keepdims=0),
        helper.make_node("Add", ["x", "mean"], ["y"]),
        helper.make_node("Neg", ["h"], ["h_next"]),
    ]
    shapes = {"x": ["batch", 4], "h": [2, "batch", 4], "y": ["batch", 4], "h_next": [2, "batch", 4]}
    values = {name: helper.make_tensor_value_info(name, float32, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(nodes, "g", [values["x"], values["h"]], [values["y"], values["h_next"]])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "net.onnx"
    )
    with pytest.raises(EdgeKitError, match=r"net\.onnx are open: x:float32\[1,4\], h:float32\[2,\?,4\]") as caught:
        edgekit.export(tmp_path / "net.onnx", target="x86", out=tmp_path)
    assert "h:2x?x4" in caught.value.help
    given = {"x": STEP[:, :4], "h": HIDDEN[:, :, None]}
    bundle = edgekit.export(tmp_path / "net.onnx", target="x86", formats="onnx,tflite", data=given, out=tmp_path)
    golden = np.load(bundle.path / "golden.npz")
    np.testing.assert_allclose(golden["tflite/y"][:6, 0], STEP[:, :4] + HIDDEN.mean(1), atol=1e-6)


def test_training_needs_the_batch_in_front(tmp_path: Path) -> None:
    given = {"x": STEP, "h": HIDDEN, "c": HIDDEN, "rate": np.array(3)}
    with pytest.raises(EdgeKitError, match=r"input h:float32\[2,1,4\] has its batch elsewhere"):
        edgekit.export(
            Recurrent(), target="x86", precision="int8", data=given, inputs=inputs(1), out=tmp_path, qat=edgekit.Qat()
        )
