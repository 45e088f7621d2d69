"""Bad input, full disks and interruptions: what is said, the exit code, and that nothing is left behind."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from kit import Ran, full_disk, invoke, samples, start, tree
from onnx import helper

from edgekit.artifacts.bundles import Bundle
from edgekit.compression import compress
from edgekit.measuring import running

UNSUPPORTED = """
import torch
from torch import nn


class Sampler(nn.Module):
    def forward(self, x):
        return torch.linalg.det(x)


class Roots(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x[0]).real


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(768, 10)
        nn.init.constant_(self.fc.weight, float("nan"))

    def forward(self, x):
        return self.fc(x.flatten(1))


class Infinite(nn.Module):
    def forward(self, x):
        return (x.flatten(1) * 0).log() * 0


def sample(): return Sampler()
def roots(): return Roots()
def broken(): return Broken()
def infinite(): return Infinite()
"""


@pytest.fixture
def place(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with net.py, data.npz and nets.py, and a temporary folder of its own to leave empty."""
    for name in ("net.py", "data.npz"):
        shutil.copy(workshop / name, tmp_path)
    (tmp_path / "nets.py").write_text(UNSUPPORTED)
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def cut_short(place: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, place / "model.pt")
    content = (place / "model.pt").read_bytes()
    (place / "model.pt").write_bytes(content[: len(content) // 2])


def wrong_shape(place: Path) -> None:
    np.savez(place / "data.npz", x=np.zeros((4, 1, 28, 28), np.float32))


def few_labels(place: Path) -> None:
    np.savez(place / "data.npz", x=np.zeros((4, 3, 16, 16), np.float32), y=np.arange(3))


def no_samples(place: Path) -> None:
    np.savez(place / "data.npz", x=np.zeros((0, 3, 16, 16), np.float32))


def a_file(place: Path) -> None:
    (place / "file").write_text("mine")


def foreign(place: Path) -> None:
    (place / "out" / "net-x86").mkdir(parents=True)
    (place / "out" / "net-x86" / "thesis.txt").write_text("mine")


def foreign_beside_ours(place: Path) -> None:
    foreign(place)
    (place / "out" / "net-x86" / "edgekit.json").write_text("{}")


def nothing(place: Path) -> None:
    pass


BASE = ("net.py:make", "--target", "x86", "--data", "data.npz", "--out", "out")
FP32 = ("--precision", "fp32", "--format", "onnx")


def export(*args: str, model: str = "net.py:make") -> tuple[str, ...]:
    return ("export", model, "--target", "x86", "--precision", "fp32", "--format", "onnx", "--out", "out", *args)


DATA = ("--data", "data.npz")
# name → (what to prepare, command, what is said, what helps)
EXPORTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str, str]] = {
    "missing model": (nothing, export(model="none.pt"), "none.pt does not exist", "give a .pt"),
    "truncated model": (cut_short, export(model="model.pt"), "damaged or cut short", "copy or download"),
    "missing function": (nothing, export(model="net.py:other"), "net.py has no 'other'", "it has: make"),
    "NaN weights": (nothing, export(*DATA, model="nets.py:broken"), "weight 'fc.weight' .* NaN", "earlier checkpoint"),
    "NaN outputs": (nothing, export(*DATA, model="nets.py:infinite"), "outputs hold NaN", "check its weights"),
    "missing data": (nothing, export("--data", "none.npz"), "no data at none.npz", "give --data"),
    "wrong shape": (wrong_shape, export(*DATA), "does not run on x?.*1,28,28", "--input, or --data"),
    "data against --input": (wrong_shape, export(*DATA, "--input", "1x3x16x16"), "--input says", "make the two agree"),
    "no shape at all": (nothing, export(), "shapes of the inputs", "--input 1x3x224x224"),
    "malformed --input": (nothing, export("--input", "3xx5"), "cannot read the input '3xx5'", "1x3x224x224"),
    "labels of another length": (few_labels, export(*DATA), "differ in length", "each sample one label"),
    "empty data": (no_samples, export(*DATA), "holds no samples", "give --data"),
    "unknown target": (nothing, export(*DATA, "--target", "toaster"), "unknown target 'toaster'", "android, ios"),
    "unknown format": (nothing, export(*DATA, "--format", "coreml"), "unknown format 'coreml'", "executorch, onnx"),
    "no format": (nothing, export(*DATA, "--format", ","), "unknown format ''", "executorch, onnx"),
    "unknown precision": (nothing, export(*DATA, "--precision", "int3"), "unknown precision 'int3'", "fp32, fp16"),
    "int8 without data": (nothing, export("--precision", "int8"), "needs data .* does not guess", "add --data .* fp16"),
    "--mean without --std": (nothing, export(*DATA, "--mean", "0.5"), "both a mean", "--mean and --std together"),
    "--mean without data": (nothing, export("--mean", "0.5", "--std", "1"), "none are given", "add --data"),
    "malformed --mean": (nothing, export(*DATA, "--mean", "a,b"), "'a,b' is not a list of numbers", "0.485,0.456"),
    "--mean of floats": (nothing, export(*DATA, "--mean", "0", "--std", "1"), "normalize uint8", "leave them out"),
    "--out under a file": (a_file, export(*DATA, "--out", "file/out"), "cannot write file/out/net-x86", "another"),
    "--out that cannot be made": (nothing, export(*DATA, "--out", "/proc/out"), "cannot write /proc/out", "another"),
    "--out holds a foreign folder": (foreign, export(*DATA), "did not write: thesis.txt", "another --out"),
    "--out holds ours and foreign": (foreign_beside_ours, export(*DATA), "did not write: thesis.txt", "another --out"),
    "--json into no folder": (nothing, export(*DATA, "--json", "none/a.json"), "cannot write none/a.json", "another"),
    "--json is a folder": (nothing, export(*DATA, "--json", "tmp"), "cannot write tmp: it is a folder", "name a file"),
    "op unknown to TFLite": (
        nothing, export(*DATA, "--format", "tflite", model="nets.py:sample"),
        "no lowering for ONNX op.*Det.*node", "--format onnx or executorch"),
    "op unknown to ONNX": (
        nothing, export(*DATA, "--format", "onnx", model="nets.py:roots"), "ONNX cannot express .*linalg_eig",
        "--format executorch"),
    "op unknown to ExecuTorch": (
        nothing, export(*DATA, "--format", "executorch", model="nets.py:roots"), "model.pte .* does not run here",
        "linalg_eig.*leave executorch out with --format"),
}  # fmt: skip


def check(ran: Ran, what: str, help: str) -> None:
    import re

    unknown = what.startswith(("unknown ", "there is no device"))  # a value that an option does not know is wrong usage
    assert ran.code == (2 if unknown else 1), ran.err
    message = re.sub(r"\s+", " ", ran.err)
    assert re.search(f"error: .*{what}.* help: .*{help}", message), ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


def left(folder: Path) -> list[str]:
    """What lies in a folder, but for what Python and torch keep there for their next start."""
    return [path for path in tree(folder) if not any(name in path for name in ("__pycache__", "torchinductor"))]


@pytest.mark.parametrize("case", EXPORTS)
def test_export_refuses(case: str, place: Path, capfd: pytest.CaptureFixture) -> None:
    prepare, args, what, help = EXPORTS[case]
    prepare(place)
    before = tree(place)
    check(invoke(capfd, *args), what, help)
    assert left(place) == before


def garbage(place: Path) -> tuple[str, ...]:
    (place / "model.onnx").write_bytes(bytes(range(256)) * 10)
    return ("model.onnx",)


def damaged_pte(place: Path) -> tuple[str, ...]:
    shutil.copy(place / "bundle" / "model.pte", place / "alone.pte")
    content = bytearray((place / "alone.pte").read_bytes())
    (place / "alone.pte").write_bytes(content[: len(content) // 2])
    return ("alone.pte",)


def changed(place: Path) -> tuple[str, ...]:
    content = bytearray((place / "bundle" / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (place / "bundle" / "model.onnx").write_bytes(content)
    return ("bundle",)


def changed_file(place: Path) -> tuple[str, ...]:
    changed(place)
    return ("bundle/model.onnx",)


def without_a_file(place: Path) -> tuple[str, ...]:
    (place / "bundle" / "model.pte").unlink()
    return ("bundle",)


def manifest(place: Path, edit: Callable[[dict], None]) -> tuple[str, ...]:
    path = place / "bundle" / "edgekit.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return ("bundle",)


def cut_manifest(place: Path) -> tuple[str, ...]:
    path = place / "bundle" / "edgekit.json"
    path.write_text(path.read_text()[:100])
    return ("bundle",)


def deep_manifest(place: Path) -> tuple[str, ...]:
    (place / "bundle" / "edgekit.json").write_text("[" * 100_000)
    return ("bundle",)


def another_model(place: Path) -> tuple[str, ...]:
    node = helper.make_node("Flatten", ["image"], ["scores"])
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 1, 28, 28])
    scores = helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, [1, 784])
    graph = helper.make_graph([node], "g", [image], [scores])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), "other.onnx")
    return ("other.onnx",)


def whole(place: Path) -> tuple[str, ...]:
    return ("bundle",)


def float_labels(place: Path) -> tuple[str, ...]:
    np.savez(place / "data.npz", x=samples(4)["x"], y=np.full(4, 0.5))
    return ("bundle",)


def far_labels(place: Path) -> tuple[str, ...]:
    np.savez(place / "data.npz", x=samples(4)["x"], y=np.arange(4) * 9)
    return ("bundle",)


def unlabeled(place: Path) -> tuple[str, ...]:
    np.savez(place / "data.npz", x=samples(4)["x"])
    return ("bundle",)


# name → (what to prepare, returning the artifacts; options; what is said; what helps)
COMPARISONS: dict[str, tuple[Callable[[Path], tuple[str, ...]], tuple[str, ...], str, str]] = {
    "no such file": (lambda place: ("none.onnx",), (), "no artifact at none.onnx", "bundle folder"),
    "garbage": (garbage, (), "model.onnx is not a file that EdgeKit can run", "ExecuTorch"),
    "half a .pte": (damaged_pte, (), "alone.pte is damaged", "export"),
    "a changed byte": (changed, (), "model.onnx has changed since it was exported", "export it again"),
    "a changed byte, by file": (changed_file, (), "model.onnx has changed since", "export it again"),
    "a missing file": (without_a_file, (), "model.pte is missing from the bundle", "export it again"),
    "half a manifest": (cut_manifest, (), "edgekit.json is damaged", "export the model again"),
    "a manifest without end": (deep_manifest, (), "edgekit.json is damaged", "export the model again"),
    "a manifest of something else": (
        lambda place: manifest(place, lambda m: m.pop("inputs")), (), "is damaged: it has no inputs", "export"),
    "a manifest of a later version": (
        lambda place: manifest(place, lambda m: m.update(schema=99)), (), "has schema 99", "export with this"),
    "a manifest that points elsewhere": (
        lambda place: manifest(place, lambda m: m["artifacts"][0].update(file="../../etc/passwd")), (),
        "a bundle has no file '../../etc/passwd'", "export"),
    "a manifest of no files": (
        lambda place: manifest(place, lambda m: m.update(artifacts=[])), (), "names no files", "export"),
    "an unknown format": (
        lambda place: manifest(place, lambda m: m["artifacts"][0].update(format="x")), (), "is damaged", "export"),
    "another model's file": (another_model, (), "other.onnx is not this model: it takes image.*1,1,28,28", "name the"),
    "unknown metric": (whole, ("--metric", "recall"), "unknown metric 'recall'", "top1, top5"),
    "a metric for other targets": (whole, ("--metric", "miou"), "miou needs class scores", "another --metric"),
    "a metric without its function": (whole, ("--metric", "net.py"), "no function in it", "net.py:function"),
    "unknown device": (whole, ("--device", "toaster:1"), "there is no device 'toaster:1'", "local:"),
    "no such python": (whole, ("--device", "python:/none"), "names no Python interpreter", "python:/path"),
    "unknown baseline device": (whole, ("--baseline-device", "tpu"), "unknown baseline device 'tpu'", "cpu or cuda"),
    "labels that are no classes": (float_labels, (), "labels must be one class index", "whole numbers"),
    "labels beyond the classes": (far_labels, (), "labels run from 0 to 27, .* 10 classes", "class indices"),
    "--max-drop without labels": (unlabeled, ("--max-drop", "1"), "the data has no labels", "add labels"),
}  # fmt: skip
if not torch.cuda.is_available():
    COMPARISONS["no CUDA"] = (whole, ("--baseline-device", "cuda"), "no CUDA device|without CUDA", "leave out")


@pytest.mark.parametrize("case", COMPARISONS)
def test_compare_refuses(
    case: str, place: Path, bundles: dict[str, Bundle], capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does so before any artifact runs."""
    monkeypatch.setattr(running, "run", lambda *args, **options: pytest.fail("an artifact ran"))
    prepare, options, what, help = COMPARISONS[case]
    shutil.copytree(bundles["int8"].path, place / "bundle")
    artifacts = prepare(place)
    check(invoke(capfd, "compare", "net.py:make", *artifacts, *DATA, *options), what, help)
    assert left(place / "tmp") == []


def test_verify_says_which_file_has_changed(
    place: Path, bundles: dict[str, Bundle], capfd: pytest.CaptureFixture
) -> None:
    shutil.copytree(bundles["int8"].path, place / "bundle")
    changed(place)
    ran = invoke(capfd, "verify", "bundle", "--json", "-")
    assert ran.code == 3
    assert "gate failed: the bundle is not what was exported" in ran.err
    replays = {replay["format"]: replay for replay in json.loads(ran.out)["artifacts"]}
    assert {name: replay["ok"] for name, replay in replays.items()} == {
        "executorch": True, "onnx": False, "tflite": True
    }  # fmt: skip
    assert "model.onnx has changed since it was exported" in replays["onnx"]["problem"]


def test_verify_refuses_changed_golden_values(
    place: Path, bundles: dict[str, Bundle], capfd: pytest.CaptureFixture
) -> None:
    shutil.copytree(bundles["fp32"].path, place / "bundle")
    path = place / "bundle" / "golden.npz"
    path.write_bytes(path.read_bytes() + b"\0")
    ran = invoke(capfd, "verify", "bundle")
    assert ran.code == 3
    assert ran.out.count("golden.npz has changed") == 3


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (("verify", "tmp"), "tmp is not an EdgeKit bundle"),
        (("verify", "bundle", "--device", "toaster:"), "there is no device"),
        (("profile", "none.onnx"), "no artifact at none.onnx"),
        (("profile", "net.py"), "not a file that EdgeKit can run"),
        (("profile", "bundle/model.onnx", "--device", "toaster:"), "there is no device"),
        (("inspect", "none.onnx"), "none.onnx"),
    ],
)
def test_other_commands_refuse(
    args: tuple[str, ...], what: str, place: Path, bundles: dict[str, Bundle], capfd: pytest.CaptureFixture
) -> None:
    shutil.copytree(bundles["fp32"].path, place / "bundle")
    check(invoke(capfd, *args), what, "")


def test_a_full_disk_leaves_nothing(place: Path, capfd: pytest.CaptureFixture) -> None:
    with full_disk(place / "disk", "8k") as disk:
        check(invoke(capfd, *export(*DATA, "--out", "disk/deep/er")), "No space left on device", "free some space")
        assert tree(disk) == []


def test_a_full_temporary_folder_is_told(
    place: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full_disk(place / "disk", "8k") as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        check(invoke(capfd, *export(*DATA)), "No space left on device|Not enough free space", "free some space")
        assert tree(disk) == []
    assert not (place / "out").exists()


def test_a_limit_on_file_sizes_leaves_nothing(place: Path, capfd: pytest.CaptureFixture) -> None:
    np.savez(place / "data.npz", x=samples(2)["x"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        ran = invoke(capfd, *export(*DATA))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check(ran, "File too large", "free some space")
    assert not (place / "out").exists()
    assert left(place / "tmp") == []


def test_results_on_a_full_disk_are_told(place: Path, capfd: pytest.CaptureFixture) -> None:
    with full_disk(place / "disk", "4k") as disk:
        (disk / "other").write_bytes(bytes(4096))
        check_ran = invoke(capfd, "targets", "--json", "disk/targets.json")
        assert check_ran.code == 1
        assert "cannot write disk/targets.json: No space left on device" in check_ran.err
        assert tree(disk) == ["other"]


def test_memory_that_runs_out_is_told(
    place: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(*args: object, **options: object) -> None:
        np.zeros(1 << 60, np.uint8)

    monkeypatch.setattr(compress, "compress", hungry)
    check(invoke(capfd, *export(*DATA)), "memory ran out", "close other programs")
    assert not (place / "out").exists()


STOPS = {
    "Ctrl-C while exporting": (signal.SIGINT, 130, "out/.net-x86-*"),
    "Ctrl-C while a file runs": (signal.SIGINT, 130, "tmp/edgekit-*/job.json"),
    "SIGTERM while exporting": (signal.SIGTERM, 143, "out/.net-x86-*"),
    "a closed terminal while exporting": (signal.SIGHUP, 129, "out/.net-x86-*"),
}


@pytest.mark.parametrize("case", STOPS)
def test_an_interrupted_export_leaves_nothing(case: str, place: Path) -> None:
    stop, code, sign = STOPS[case]
    process = start(
        "export", *BASE, "--precision", "fp32", "--format", "onnx", cwd=place, TMPDIR=str(place / "tmp")
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list(place.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(stop)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "interrupted: nothing was left behind" in err
    assert "Traceback" not in err
    assert out == ""
    assert not (place / "out").exists()
    assert left(place / "tmp") == []
