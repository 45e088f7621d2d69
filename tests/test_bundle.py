"""What a bundle holds, and how it is written: whole or not at all, and never over what is not ours."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from kit import SHAPE, network, samples, tree

import edgekit
from edgekit.artifacts import summary
from edgekit.artifacts.bundles import FILES, Bundle, read, read_golden, this_machine
from edgekit.errors import EdgeKitError
from edgekit.reports.summary import render
from edgekit.types import TensorSpec
from edgekit.util import atomic_files

KEYS = {
    "schema", "model", "target", "precision", "recipe", "versions", "inputs", "outputs", "layout", "preprocessing",
    "labels", "qparams", "artifacts", "golden", "notes", "made_on",
}  # fmt: skip
ENTRY_KEYS = {"format", "file", "size_bytes", "sha256", "parity"}
FORMATS = {"executorch": "model.pte", "onnx": "model.onnx", "tflite": "model.tflite"}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_manifest_describes_the_files(precision: str, bundles: dict[str, Bundle]) -> None:
    bundle = bundles[precision]
    manifest = json.loads((bundle.path / "edgekit.json").read_text())
    assert manifest.keys() == KEYS
    assert (manifest["schema"], manifest["precision"], manifest["target"]) == (1, precision, "x86")
    assert {entry["format"]: entry["file"] for entry in manifest["artifacts"]} == FORMATS
    for entry in manifest["artifacts"]:
        content = (bundle.path / entry["file"]).read_bytes()
        assert entry.keys() >= ENTRY_KEYS
        assert entry["size_bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["parity"]["samples"] == 8
    golden = (bundle.path / "golden.npz").read_bytes()
    assert manifest["golden"] == {"file": "golden.npz", "sha256": hashlib.sha256(golden).hexdigest()}
    assert manifest["inputs"] == [{"name": "input", "dtype": "float32", "shape": [1, *SHAPE]}]
    assert manifest["outputs"][0]["shape"] == [1, 10]
    assert manifest["versions"]["torch"] == version("torch")
    assert manifest["versions"]["edgekit"] == edgekit.__version__
    quantized = {manifest["outputs"][0]["name"]} if precision == "int8" else set()
    assert set(manifest["qparams"]["outputs"]) == quantized
    assert set(tree(bundle.path)) == FILES


def test_the_processor_decides_how_far_outputs_may_move(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """Recorded outputs that are two steps off: on another processor that is ONNX Runtime's rounding, and only its."""
    folder = tmp_path / "moved"
    shutil.copytree(bundles["int8"].path, folder)
    manifest = json.loads((folder / "edgekit.json").read_text())
    assert manifest["made_on"] == this_machine() and read(folder).made_here
    [(name, q)] = manifest["qparams"]["outputs"].items()
    with np.load(folder / "golden.npz") as stored:
        arrays = dict(stored)
    for format in FORMATS:
        arrays[f"{format}/{name}"] = arrays[f"{format}/{name}"] + np.float32(2 * q["scale"])
    np.savez(folder / "golden.npz", **arrays)
    manifest["golden"]["sha256"] = atomic_files.sha256(folder / "golden.npz")
    for made_on, good in ((this_machine(), set()), ("riscv64 Other", {"onnx"})):
        manifest["made_on"] = made_on
        (folder / "edgekit.json").write_text(json.dumps(manifest))
        replays = edgekit.verify(folder)
        assert {r.artifact.format for r in replays if r.problem is None} == good
    del manifest["made_on"]  # an older bundle
    (folder / "edgekit.json").write_text(json.dumps(manifest))
    assert read(folder).made_here


def test_a_manifest_without_a_key_is_refused_or_shown(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    whole = bundles["int8"].manifest
    folder = tmp_path / "net"
    shutil.copytree(bundles["int8"].path, folder)
    refused = set()
    for where in [(key,) for key in whole] + [("model", key) for key in whole["model"]]:
        manifest = json.loads(json.dumps(whole))
        inside = manifest["model"] if where[1:] else manifest
        del inside[where[-1]]
        (folder / "edgekit.json").write_text(json.dumps(manifest))
        try:
            opened = read(folder)
        except EdgeKitError as error:
            assert where[-1] in error.what
            refused.add(where)
        else:
            assert repr(opened) and render(summary.inspect_bundle(opened))
    assert {("target",), ("precision",), ("model",), ("model", "name"), ("notes",)} <= refused


def test_golden_outputs_of_the_original_are_those_of_eager(bundles: dict[str, Bundle]) -> None:
    for bundle in bundles.values():
        golden = read_golden(bundle)
        name = bundle.manifest["outputs"][0]["name"]
        assert golden.keys() == {"input/input", *(f"{source}/{name}" for source in ("original", *FORMATS))}
        assert np.array_equal(golden["input/input"][:, 0], samples()["x"][:8])
        with torch.inference_mode():
            expected = network()(torch.from_numpy(golden["input/input"][:, 0])).numpy()
        assert np.allclose(golden[f"original/{name}"][:, 0], expected, atol=1e-6)


def test_verify_replays_every_file(bundles: dict[str, Bundle]) -> None:
    for bundle in bundles.values():
        replays = edgekit.verify(bundle.path)
        assert [replay.artifact.format for replay in replays] == list(FORMATS)
        assert [replay.problem for replay in replays] == [None] * 3
        assert all(replay.parity.max_abs == 0 for replay in replays)  # the same machine, the same file


def test_verify_sees_other_outputs(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """A file with a hash that fits, but which computes something else: here the recorded outputs are another's."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundles["int8"].path, folder)
    golden = read_golden(bundles["int8"])
    name = bundles["int8"].manifest["outputs"][0]["name"]
    np.savez(folder / "golden.npz", **{**golden, f"onnx/{name}": golden[f"onnx/{name}"][::-1]})
    manifest = json.loads((folder / "edgekit.json").read_text())
    manifest["golden"]["sha256"] = atomic_files.sha256(folder / "golden.npz")
    (folder / "edgekit.json").write_text(json.dumps(manifest))
    problems = {replay.artifact.format: replay.problem for replay in edgekit.verify(folder)}
    assert "steps of the output's scale" in problems.pop("onnx")
    assert problems == {"executorch": None, "tflite": None}


def test_golden_values_that_are_missing_are_told(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    shutil.copytree(bundles["fp32"].path, tmp_path / "bundle")
    np.savez(tmp_path / "bundle" / "golden.npz", other=np.zeros(1))
    manifest = json.loads((tmp_path / "bundle" / "edgekit.json").read_text())
    manifest["golden"]["sha256"] = atomic_files.sha256(tmp_path / "bundle" / "golden.npz")
    (tmp_path / "bundle" / "edgekit.json").write_text(json.dumps(manifest))
    with pytest.raises(EdgeKitError, match=r"golden\.npz lacks executorch/"):
        read_golden(read(tmp_path / "bundle"))


def test_an_export_replaces_our_own_bundle_and_keeps_the_old_one_where_it_fails(tmp_path: Path) -> None:
    def export(**more: object) -> Bundle:
        options = {"precision": "fp32", "data": samples(2), **more}
        return edgekit.export(network(), target="x86", formats=["onnx"], out=tmp_path, name="net", **options)

    first = export()
    before = (first.path / "edgekit.json").read_bytes()
    assert export(precision="fp16").manifest["precision"] == "fp16"
    assert (first.path / "edgekit.json").read_bytes() != before
    kept = tree(tmp_path), (first.path / "edgekit.json").read_bytes()
    with pytest.raises(EdgeKitError, match="original model's own outputs hold NaN"):
        export(data={"x": np.sign(samples(2)["x"]) * np.float32(3.4e38)})
    assert (tree(tmp_path), (first.path / "edgekit.json").read_bytes()) == kept


def test_preprocessing_and_labels_travel_in_the_manifest(tmp_path: Path) -> None:
    data = {
        "x": np.random.default_rng(0).integers(0, 256, (4, *SHAPE), dtype=np.uint8),
        "labels": [f"class {i}" for i in range(10)],
    }
    bundle = edgekit.export(
        network(), target="x86", precision="fp32", formats="onnx", data=data, mean=(0.5,), std=(0.25,), out=tmp_path
    )
    assert bundle.manifest["preprocessing"] == {"scale": 1 / 255, "mean": [0.5], "std": [0.25], "layout": "NCHW"}
    assert bundle.manifest["labels"] == data["labels"]
    expected = (data["x"] / 255 - 0.5) / 0.25
    assert np.allclose(read_golden(bundle)["input/input"][:, 0], expected, atol=1e-6)


def test_specs_survive_the_manifest(bundles: dict[str, Bundle]) -> None:
    assert read(bundles["fp32"].path / "edgekit.json").artifacts == bundles["fp32"].artifacts
    assert bundles["fp32"].artifacts[0].inputs == (TensorSpec("input", "float32", (1, *SHAPE)),)


def test_a_failed_block_leaves_neither_folder_nor_parents(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_files.new_folder(tmp_path / "a" / "b" / "c", {"f"}) as folder:
        (folder / "f").write_text("half")
        raise ZeroDivisionError
    assert tree(tmp_path) == []


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_files.new_folder(tmp_path / "link", {"f"}) as folder:
        (folder / "f").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "f").read_text() == "new"
    assert tree(tmp_path) == ["link", "real", "real/f"]


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "f").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if target.name == "out" and (self / "f").read_text() == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(EdgeKitError, match="cannot write"), atomic_files.new_folder(tmp_path / "out", {"f"}) as folder:
        (folder / "f").write_text("new")
    assert tree(tmp_path) == ["out", "out/f"]
    assert (tmp_path / "out" / "f").read_text() == "old"


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert tree(tmp_path) == []
