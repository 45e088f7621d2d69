"""--tflite-layout: the file is channels-last, and everything that EdgeKit feeds, records and compares stays NCHW."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kit import SHAPE, invoke, network, quick, samples
from tflite_tools import model, node, run_tflite
from torch import nn

import edgekit
from edgekit.artifacts import bundles, summary
from edgekit.artifacts.bundles import Bundle
from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite import convert
from edgekit.measuring import feeds, running, schedule
from edgekit.types import LAYOUTS, axis_order

IMAGE_OUT = nn.Conv2d(3, 5, 3, padding=1)  # rank 4 in and out, and 3, 16, 16 and 5 tell the axes apart


def export(module: nn.Module, out: Path, **options: object) -> Bundle:
    given = {"formats": "onnx,tflite", "precision": "fp32", "data": {"x": samples()["x"]}, **options}
    return edgekit.export(module.eval(), target="x86", out=out, name="net", **given)


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An image-to-image network, exported channels-last."""
    torch.manual_seed(0)
    return export(IMAGE_OUT, tmp_path_factory.mktemp("last"), tflite_layout="nhwc")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (1, 2, 3, 4, 5)])
def test_the_rule_is_the_one_that_the_converter_follows(layout: str, shape: Sequence[int]) -> None:
    """Inputs and outputs of every rank lie in the file as `axis_order` says."""
    made = model([node("Relu", ["x"])], {"x": np.zeros(shape, np.float32)}, {})
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    order = axis_order(len(shape), layout)
    result = run_tflite(convert(made, layout=layout), {"x": x.transpose(order)})["y"]
    np.testing.assert_array_equal(result, np.maximum(x, 0).transpose(order))


def test_the_file_is_channels_last_and_the_bundle_is_not(last: Bundle) -> None:
    artifacts = {artifact.format: artifact for artifact in last.artifacts}
    entries = {entry["format"]: entry["layout"] for entry in last.manifest["artifacts"]}
    assert entries == {"onnx": "NCHW", "tflite": "NHWC"}
    assert {name: artifact.layout for name, artifact in artifacts.items()} == {"onnx": "nchw", "tflite": "nhwc"}
    assert last.manifest["inputs"][0]["shape"] == [1, 3, 16, 16]
    assert last.manifest["outputs"][0]["shape"] == [1, 5, 16, 16]
    held = summary.inspect_artifact(artifacts["tflite"].path)
    assert held.inputs[0].shape == (1, 16, 16, 3)
    assert held.outputs[0].shape == (1, 16, 16, 5)


def test_golden_values_are_nchw_and_replay(last: Bundle) -> None:
    golden = bundles.read_golden(last)
    name = last.manifest["outputs"][0]["name"]
    with torch.inference_mode():
        expected = IMAGE_OUT(torch.from_numpy(golden["input/input"][:, 0])).numpy()
    np.testing.assert_allclose(golden[f"tflite/{name}"][:, 0], expected, atol=1e-5)
    replays = edgekit.verify(last.path)
    assert [(replay.problem, replay.parity.max_abs) for replay in replays] == [(None, 0), (None, 0)]


def test_a_wrong_layout_in_the_manifest_does_not_pass(last: Bundle, tmp_path: Path) -> None:
    """The transpose is made because the manifest says so, and for no other reason."""
    artifact = replace(last.artifacts[1], layout="nchw")
    with pytest.raises(EdgeKitError):
        running.run(artifact, feeds.random_feeds(artifact.inputs))
    shutil.copytree(last.path, tmp_path / "bundle")
    manifest = json.loads((last.path / bundles.MANIFEST).read_text())
    manifest["artifacts"][1]["layout"] = "CHWN"
    (tmp_path / "bundle" / bundles.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(EdgeKitError, match=r"damaged.*unknown layout 'CHWN'"):
        bundles.read(tmp_path / "bundle")


def test_bundles_without_a_layout_are_nchw(last: Bundle) -> None:
    entries = [{key: value for key, value in e.items() if key != "layout"} for e in last.manifest["artifacts"]]
    older = Bundle(last.path, {**last.manifest, "artifacts": entries})
    assert [artifact.layout for artifact in older.artifacts] == ["nchw", "nchw"]


def test_int8_is_compared_with_fp32_of_the_same_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    bundle = export(network(), tmp_path, formats="tflite", precision="int8", data=samples(), tflite_layout="nhwc")
    references = []
    before = schedule.race

    def race(original: object, artifacts: Sequence[object], *rest: object) -> object:
        references.extend(artifacts[1:])
        return before(original, artifacts, *rest)

    monkeypatch.setattr(schedule, "race", race)
    (measured,) = edgekit.compare(network(), [bundle], data=samples()).artifacts
    assert measured.parity.agreement >= 0.9
    assert [(r.precision, r.layout) for r in references] == [("fp32", "nhwc")]
    assert edgekit.profile(bundle.path / "model.tflite").latency.p50 > 0


def test_a_bare_file_is_told_apart(last: Bundle, tmp_path: Path) -> None:
    bare = shutil.copy(last.path / "model.tflite", tmp_path / "alone.tflite")
    with pytest.raises(EdgeKitError, match="channels-last") as caught:
        edgekit.compare(IMAGE_OUT, [bare], data={"x": samples()["x"]})
    assert "edgekit.json" in caught.value.help


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"tflite_layout": "hwc"}, "unknown TFLite layout 'hwc'"),
        ({"tflite_layout": "nhwc", "formats": "onnx"}, "is for a file that is not exported"),
    ],
)
def test_layouts_that_cannot_be_had_are_refused(options: dict[str, str], what: str, tmp_path: Path) -> None:
    with pytest.raises(EdgeKitError, match=what):
        export(network(), tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_the_command_line_takes_it(workshop: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    ran = invoke(
        capfd, "export", f"{workshop}/net.py:make", "--target", "x86", "--format", "tflite", "--precision", "fp32",
        "--data", workshop / "data.npz", "--tflite-layout", "nhwc", "--out", tmp_path, "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    entry = json.loads((tmp_path / "out.json").read_text())["artifacts"][0]
    assert entry["layout"] == "NHWC"
    held = summary.inspect_artifact(Path(json.loads((tmp_path / "out.json").read_text())["path"]) / entry["file"])
    assert held.inputs[0].shape == (1, *SHAPE[1:], SHAPE[0])
