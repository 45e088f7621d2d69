"""Pruning from the command line and from Python: what is written, what it is worth, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from kit import NET, SHAPE, full_disk, interrupted_training, invoke, network, samples, tree

import edgekit
from edgekit.compression import training_samples
from edgekit.compression.training_samples import Memory
from edgekit.errors import EdgeKitError
from edgekit.loading.model import load
from edgekit.pruning.result import Pruned
from edgekit.quant.pruning import dependency_graph, distillation
from edgekit.quant.pruning.allocation import divergence
from edgekit.quant.pruning.allocation import prune as pruning_of

# Architecture → the image size it is pruned and exported at; None for tokens.
EXPORTED = {
    "mobilenet_v2": 32, "resnet18": 32, "densenet121": 64, "shufflenet_v2": 64, "vit_tiny": 64, "lstm": None,
}  # fmt: skip


def calibration(name: str, size: int | None, count: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if size is None:
        return {"x": rng.integers(0, 100, (count, 8))}
    return {"x": rng.standard_normal((count, 3, size, size)).astype(np.float32)}


@pytest.mark.parametrize("name", EXPORTED)
def test_a_third_goes_and_every_format_gives_what_is_left(name: str, tmp_path: Path) -> None:
    data = calibration(name, EXPORTED[name])
    pruned = edgekit.prune(architectures.build(name), ratio=0.3, data=data, epochs=1, out=tmp_path, name=name)
    before, after = pruned.macs
    assert 0.3 <= 1 - after / before < 0.5
    bundle = edgekit.export(pruned.path / "model.pt2", target="x86", precision="fp32", data=data, out=tmp_path)
    near = {entry["format"]: entry["parity"]["sqnr_db"] for entry in bundle.manifest["artifacts"]}
    assert set(near) == {"executorch", "onnx", "tflite"}
    assert all(value is None or value > 60 for value in near.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("prune")
    (made / "net.py").write_text(NET.replace("nn.Conv2d(3, 8", "nn.Conv2d(3, 24").replace("Conv2d(8,", "Conv2d(24,"))
    drawn = samples(200)
    arrays = {"x": drawn["x"][:80], "y": drawn["y"][:80], "calib_x": drawn["x"][80:], "calib_y": drawn["y"][80:]}
    np.savez(made / "data.npz", **arrays)
    return made


def test_the_command_writes_files_that_everything_reads(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    model, data = f"{folder / 'net.py'}:make", folder / "data.npz"
    ran = invoke(capfd, "prune", model, "--ratio", 0.5, "--data", data, "--epochs", 2, "--out", tmp_path, "--json", "-")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    path = Path(told["path"])
    assert tree(path) == ["model.pt2", "model.safetensors", "prune.json"]
    assert told["macs"]["removed"] >= 0.5
    assert told["accuracy"]["n"] == 80
    assert json.loads((path / "prune.json").read_text())["layers"] == told["layers"]
    x = samples(4)["x"][:1]
    from_graph = load(path / "model.pt2").module(torch.from_numpy(x))[0]
    weights = path / "model.safetensors"
    from_code = load(weights, code=model, example=[x]).module(torch.from_numpy(x))[0]
    torch.testing.assert_close(from_graph, from_code)
    again = invoke(
        capfd, "prune", weights, "--code", model, "--ratio", 0.2, "--data", data, "--epochs", 0, "--out", tmp_path
    )
    assert again.code == 0, again.err
    exported = invoke(
        capfd, "export", path / "model.pt2", "--target", "x86", "--format", "onnx", "--data", data, "--out", tmp_path,
        "--precision", "int8",
    )  # fmt: skip
    assert exported.code == 0, exported.err


RESIDUAL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, 1, 1)

    def forward(self, x):
        y = self.b(torch.relu(self.norm(self.a(x))))
        y += x
        return torch.relu(y)

def make():
    torch.manual_seed(0)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), Block(), Block(), Block(), pool, nn.Linear(16, 10)).eval()
"""


def test_whole_branches_go_and_both_files_know(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "net.py").write_text(RESIDUAL)
    model, data = f"{tmp_path / 'net.py'}:make", folder / "data.npz"
    ran = invoke(capfd, "prune", model, "--ratio", 0.5, "--data", data, "--epochs", 1, "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert "removed" in ran.out
    path = tmp_path / "net-pruned"
    layers = json.loads((path / "prune.json").read_text())["layers"]
    assert sum(layer["after"] == [] and layer["macs_after"] == 0 for layer in layers) == 2
    x = torch.from_numpy(samples(4)["x"][:1])
    from_graph = load(path / "model.pt2").module(x)[0]
    from_code = load(path / "model.safetensors", code=model, example=[x.numpy()]).module(x)[0]
    torch.testing.assert_close(from_graph, from_code)


def test_the_report_shows_layers_and_totals(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    model = f"{folder / 'net.py'}:make"
    ran = invoke(capfd, "prune", model, "--ratio", 0.4, "--input", "1x3x16x16", "--out", tmp_path)
    assert ran.code == 0, ran.err
    for words in (
        "multiply-adds",
        "parameters",
        "keeps its outputs: its width is that of the output",
        "not fine-tuned",
    ):
        assert words in ran.out


def wide() -> torch.nn.Module:
    scope: dict[str, Any] = {}
    exec(NET.replace("nn.Conv2d(3, 8", "nn.Conv2d(3, 32").replace("Conv2d(8,", "Conv2d(32,"), scope)
    return scope["make"]().eval()


def prune(tmp_path: Path, model: Any = None, **options: Any) -> Pruned:
    drawn = samples(96)
    data = {"x": drawn["x"][:32], "y": drawn["y"][:32], "calib_x": drawn["x"][32:], "calib_y": drawn["y"][32:]}
    return edgekit.prune(model or wide(), **{"ratio": 0.5, "data": data, "out": tmp_path, "epochs": 3, **options})


def test_fine_tuning_comes_nearer_to_the_original() -> None:
    teacher, x = Flat(wide()), torch.from_numpy(samples(128)["x"])
    with torch.no_grad():
        teacher.inner[6].weight *= 100  # a random network hardly tells its inputs apart
    structure = dependency_graph.structure(teacher, (x[:1],))
    student = pruning_of(teacher, {group: range(group.size // 2) for group in structure.groups})
    found = distillation.recover(
        student, teacher, Memory((x,), None, 32, ()), distillation.Plan(20, learning_rate=0.01)
    )
    with torch.no_grad():
        before, after = (divergence(net(x), teacher(x)) for net in (student, found.module))
    assert after < 0.5 * before
    assert found.losses[-1] < found.losses[0]


class Flat(torch.nn.Module):
    """Gives a tuple, as loaded models do."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner
        self.eval()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.inner(*tensors),)


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    first, again, other = (prune(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    state, same, differs = (result.module.state_dict() for result in (first, again, other))
    assert all(torch.equal(state[key], same[key]) for key in state)
    assert any(not torch.equal(state[key], differs[key]) for key in state)


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = prune(tmp_path / "whole", name="net")
    with interrupted_training(2), pytest.raises(KeyboardInterrupt) as stopped:
        prune(tmp_path / "cut", name="net")
    assert tree(tmp_path / "cut") == ["net-pruned.checkpoint.pt"]
    (note,) = stopped.value.__notes__
    assert note == f"the same command with --resume goes on from {tmp_path / 'cut' / 'net-pruned.checkpoint.pt'}"
    done = prune(tmp_path / "cut", name="net", resume=True)
    assert tree(tmp_path / "cut") == ["net-pruned", *(f"net-pruned/{file}" for file in tree(done.path))]
    state, resumed = whole.module.state_dict(), done.module.state_dict()
    assert all(torch.equal(state[key], resumed[key]) for key in state)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        prune(tmp_path, name="net")
    with pytest.raises(EdgeKitError, match="checkpoint of another pruning"):
        prune(tmp_path, name="net", learning_rate=0.5, resume=True)


def test_a_checkpoint_of_another_model_is_refused_and_a_missing_one_told(tmp_path: Path) -> None:
    with interrupted_training(2), pytest.raises(KeyboardInterrupt):
        prune(tmp_path, name="net")
    other = wide()
    with torch.no_grad():
        other[6].bias += 1
    with pytest.raises(EdgeKitError, match="checkpoint of another pruning") as caught:
        prune(tmp_path, other, name="net", resume=True)
    assert "give the model" in str(caught.value.help)
    assert not any("--resume" in note for note in prune(tmp_path, name="net", resume=True).notes)
    anew = prune(tmp_path, name="net", resume=True)
    assert any(note.startswith("--resume found nothing to go on from") for note in anew.notes)


def test_a_full_disk_ends_in_its_message(tmp_path: Path) -> None:
    with full_disk(tmp_path / "small", "64k") as small:
        with pytest.raises(EdgeKitError, match=r"cannot write .*checkpoint\.pt: No space left"):
            prune(small, name="net")
        assert tree(small) in ([], ["net-pruned.checkpoint.pt"])  # of the epoch before, and whole


def test_labels_that_are_no_classes_are_left_aside(tmp_path: Path) -> None:
    drawn = samples(64)["x"]
    data = {"x": drawn[:32], "y": np.zeros((32, 10), np.float32), "calib_x": drawn[32:]}
    found = prune(tmp_path, data=data)
    assert found.accuracy is None and any("labels are no class indices" in note for note in found.notes)


def test_training_images_are_normalized_as_the_others_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, *SHAPE), dtype=np.uint8)
    data: dict[str, Any] = {"x": pixels[:32], "mean": [0.5] * 3, "std": [0.25] * 3}
    found = prune(tmp_path / "a", data=data, train={"x": pixels[32:]})
    assert any("normalized as those of --data" in note for note in found.notes)
    same = prune(tmp_path / "b", data=data, train={**data, "x": pixels[32:]})
    assert not any("training images" in note for note in same.notes)
    a, b = found.module.state_dict(), same.module.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    floats = {"x": np.zeros((8, *SHAPE), np.float32)}
    raw = prune(tmp_path / "c", data=floats, train={"x": pixels})
    assert any("training images are scaled to 0..1" in note for note in raw.notes)


def test_a_diverging_training_keeps_the_last_good_epoch(tmp_path: Path) -> None:
    with pytest.raises(EdgeKitError, match="training diverged in epoch") as caught:
        prune(tmp_path, learning_rate=1e30, epochs=5)
    assert "give a lower learning_rate=..." in str(caught.value.help)
    left = tree(tmp_path)
    assert left in ([], ["Sequential-pruned.checkpoint.pt"])
    if left:
        state = torch.load(tmp_path / left[0], weights_only=True)["module"]
        assert all(torch.isfinite(tensor).all() for tensor in state.values())


class Branches(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 32), torch.nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(torch.relu(self.a(x)))
        return y if float(y.sum()) > 0 else -y


REFUSED = {
    "everything": ({"ratio": 1.0}, "would leave nothing"),
    "nothing": ({"ratio": 0.0}, "would leave everything"),
    "out of reach": ({"ratio": 0.99}, "cannot be removed"),
    "unknown method": ({"method": "magic"}, "unknown pruning method"),
    "unknown allocation": ({"allocation": "magic"}, "unknown pruning allocation"),
    "method without data": ({"data": None, "method": "taylor", "inputs": ["1x3x16x16"]}, "taylor reads samples"),
    "epochs without data": ({"data": None, "epochs": 3, "inputs": ["1x3x16x16"]}, "fine-tuning reads samples"),
    "epochs": ({"epochs": -1}, "-1 epochs"),
    "learning rate": ({"learning_rate": -1.0}, "a learning rate of -1"),
    "rounding": ({"round_to": 0}, "cannot be rounded to 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused_and_leave_nothing(case: str, tmp_path: Path) -> None:
    options, words = REFUSED[case]
    with pytest.raises(EdgeKitError, match=words):
        prune(tmp_path, **options)
    assert tree(tmp_path) == []


def test_graphs_and_branches_are_refused(tmp_path: Path) -> None:
    program = torch.export.export(network(), (torch.randn(1, *SHAPE),))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(EdgeKitError, match="every shape built in"):
        edgekit.prune(tmp_path / "net.pt2", ratio=0.3, out=tmp_path / "out")
    with pytest.raises(EdgeKitError, match="cannot be captured as a graph"):
        edgekit.prune(Branches(), ratio=0.3, inputs=["1x8"], out=tmp_path / "out")
    assert tree(tmp_path) == ["net.pt2"]


@pytest.mark.parametrize(("many", "mixed", "labels"), [(10_000, distillation.MIXED, 0.0), (100, 0.0, 1.0)])
def test_many_samples_teach_as_they_are_and_by_their_labels(
    many: int, mixed: float, labels: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_samples, "MANY", many)
    plans, recover = [], distillation.recover
    monkeypatch.setattr(
        distillation, "recover", lambda s, t, m, plan, **o: plans.append(plan) or recover(s, t, m, plan, **o)
    )
    given = {"data": samples(40), "train": samples(200), "allocation": "global", "epochs": 1}
    edgekit.prune(network(), ratio=0.3, learning_rate=1e-4, out=tmp_path, **given)
    assert [(plan.mixed, plan.labels, plan.learning_rate) for plan in plans] == [(mixed, labels, 1e-4)]
