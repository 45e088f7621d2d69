"""Masked networks as files: what is zero stays zero in every format, and what that brings is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import invoke, quick, tree

import edgekit
from edgekit.artifacts import sparsity
from edgekit.errors import EdgeKitError
from edgekit.loading import with_data
from edgekit.loading.model import load
from edgekit.pruning import cost
from edgekit.pruning.options import Wanted
from edgekit.quant.pruning import masks
from edgekit.types import SUFFIXES

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 24, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.point = nn.Conv2d(24, 32, 1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 16)
        nn.init.uniform_(self.norm.weight, 0.5, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.point(torch.relu(self.depthwise(x))))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))
"""
LAYERS = ("first", "point", "second", "head")


def network() -> Any:
    scope: dict[str, Any] = {}
    exec(MODEL, scope)
    return scope["Net"]().eval()


def data(count: int = 48) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((count, 4, 12, 12)).astype(np.float32)
    with torch.no_grad():
        y = network()(torch.from_numpy(x)).argmax(1).numpy()
    return {"x": x[: count // 2], "y": y[: count // 2], "calib_x": x[count // 2 :], "calib_y": y[count // 2 :]}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    quick(monkeypatch)
    yield


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the files out, where the network is what counts."""
    monkeypatch.setattr(cost, "measure", lambda *arguments: ())


@pytest.mark.parametrize(("pattern", "precision"), [("2:4", "fp32"), ("0.8", "int8")])
def test_what_is_zero_is_zero_in_every_format(pattern: str, precision: str, tmp_path: Path) -> None:
    net = network()
    found, _ = masks.find(net, masks.parse(pattern), "l1")
    assert {key.partition(".")[0] for key in found} == set(LAYERS)
    masks.apply(net, found)
    model, source = with_data.load(net, data=data(), inputs=(), code=None, mean=(), std=())
    wanted = Wanted(tuple(SUFFIXES), precision, "local:", 1, None)
    artifacts, _, _ = cost.write(model, source, wanted, tmp_path)
    for format, artifact in artifacts.items():
        stored = sparsity.weights(artifact.path)
        assert {array.dtype.name for array in stored} == {"float32" if precision == "fp32" else "int8"}
        for key, mask in found.items():
            wanted_zeros = mask.numpy() == 0
            if format != "onnx" and wanted_zeros.ndim == 4:
                wanted_zeros = wanted_zeros.transpose(0, 2, 3, 1)
            places = [array for array in stored if array.shape == wanted_zeros.shape]
            assert places, (format, key)
            assert any(not array[wanted_zeros].any() for array in places), (format, key)
            if precision == "fp32":  # where no BatchNorm was folded in, every bit is the same
                weight = net.get_parameter(key).detach().numpy()
                weight = weight.transpose(0, 2, 3, 1) if format != "onnx" and weight.ndim == 4 else weight
                assert key == "first.weight" or any(np.array_equal(array, weight) for array in places), (format, key)


def test_the_command_masks_trains_measures_and_saves(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    np.savez(tmp_path / "data.npz", **data())
    model, arrays = f"{tmp_path / 'net.py'}:Net", tmp_path / "data.npz"
    ran = invoke(
        capfd, "prune", model, "--sparsity", "2:4", "--data", arrays, "--epochs", 2, "--out", tmp_path, "--format",
        "onnx,tflite", "--json", tmp_path / "told.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    for words in ("weights that are not zero", "stays dense: a depthwise convolution", "compressed", "fine-tuning"):
        assert words in ran.out
    told = json.loads((tmp_path / "told.json").read_text())
    path = Path(told["path"])
    assert tree(path) == ["model.onnx", "model.pt2", "model.safetensors", "model.tflite", "prune.json"]
    assert told["sparsity"]["pattern"] == "2:4"
    by_name = {layer["name"]: layer for layer in told["layers"]}
    assert all(by_name[name]["zeros"] == by_name[name]["weights"] // 2 for name in LAYERS)
    gone = sum(layer["zeros"] for layer in told["layers"])
    for entry in told["files"]:
        assert entry["zero_weights"] >= gone
        assert entry["compressed_bytes"] < entry["original_compressed_bytes"]
        assert entry["share_of_original"] > 0
    assert any("zeros faster" in note for note in told["notes"])
    state = load(path / "model.safetensors", code=model, example=[data()["x"][:1]]).module.state_dict()
    for name in LAYERS:
        weight = state[f"inner.{name}.weight"]
        matrix = weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight
        assert ((matrix.reshape(-1, 4) != 0).sum(1) <= 2).all()


def test_the_cubic_schedule_ends_at_the_sparsity(tmp_path: Path, unmeasured: None) -> None:
    pruned = edgekit.prune(
        network(), sparsity=0.6, schedule="cubic", steps=3, epochs=3, data=data(), formats="onnx", out=tmp_path
    )
    gone, _ = pruned.zeros
    weights = sum(layer.weights for layer in pruned.masked if layer.zeros)
    assert abs(gone / weights - 0.6) < 0.01
    assert tree(tmp_path) == ["Net-pruned", *(f"Net-pruned/{name}" for name in tree(pruned.path))]


def test_masks_hold_through_the_users_own_training(tmp_path: Path, unmeasured: None) -> None:
    def train(student: Any, teacher: Any, samples: Any) -> None:
        optimizer = torch.optim.SGD(student.parameters(), 0.1)
        for inputs, _ in samples:
            optimizer.zero_grad()
            (student(*inputs) - teacher(*inputs)).square().mean().backward()
            optimizer.step()

    pruned = edgekit.prune(network(), sparsity="2:4", finetune=train, data=data(), formats="onnx", out=tmp_path)
    head = pruned.module.state_dict()["inner.head.weight"]
    assert ((head.reshape(-1, 4) != 0).sum(1) == 2).all()
    assert not torch.equal(head[head != 0], network().head.weight.detach()[head != 0])


REFUSED = {
    "channels' method": ({"sparsity": 0.5, "method": "fpgm"}, "unknown pruning method"),
    "data": ({"sparsity": 0.5, "method": "wanda", "data": None, "inputs": ["1x4x12x12"]}, "wanda reads samples"),
    "pattern": ({"sparsity": "5:4"}, "leaves all of a block"),
    "steps to a pattern": ({"sparsity": "2:4", "schedule": "cubic"}, "no steps on the way to 2:4"),
    "block alone": ({"ratio": 0.5, "block": "4x1"}, "block=... is the shape"),
    "precision": ({"sparsity": 0.5, "precision": "int3"}, "unknown precision"),
    "format": ({"sparsity": 0.5, "formats": "onxx"}, "unknown format"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused_and_leave_nothing(case: str, tmp_path: Path) -> None:
    options, words = REFUSED[case]
    with pytest.raises(EdgeKitError, match=words):
        edgekit.prune(network(), **{"data": data(), "out": tmp_path, **options})
    assert tree(tmp_path) == []


def test_other_files_have_no_weights_to_count(tmp_path: Path) -> None:
    for name, content in (
        ("a.txt", b""),
        ("a.onnx", b"\x00\x01"),
        ("a.tflite", b"nothing here at all"),
        ("a.pte", b"x" * 64),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EdgeKitError):
            sparsity.count_zeros(tmp_path / name)


def test_a_linear_layer_in_gptq_keeps_its_zeros() -> None:
    from edgekit.quant.ptq.gptq_rounding import channel_scales, gptq

    torch.manual_seed(0)
    weight = torch.randn(8, 40) * (torch.rand(8, 40) > 0.8)
    columns = torch.randn(200, 40) @ torch.randn(40, 40)
    scale = channel_scales(weight)[:, None]
    rounded = gptq(weight[None], scale[None], (columns.T @ columns)[None])[0] * scale
    assert not rounded[weight == 0].any()
    error = (columns @ (weight - rounded).T).square().mean()
    assert error < (columns @ (weight - torch.round(weight / scale) * scale).T).square().mean()
