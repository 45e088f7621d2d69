"""Automatic mixed precision and sensitivity through the pipeline, on networks that collapse in int8 without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import hazards
import numpy as np
import pytest
import torch
from kit import invoke, network, samples

import edgekit
from edgekit.artifacts.artifact import Artifact
from edgekit.artifacts.bundles import Bundle
from edgekit.compression import mixed_precision
from edgekit.errors import EdgeKitError
from edgekit.judging import parity_ladder, verdicts
from edgekit.loading import with_data
from edgekit.measuring import running
from edgekit.measuring.evaluation import whole
from edgekit.quant.ptq import float_heads
from edgekit.runtimes import open_device
from edgekit.util.progress import Silent

FORMATS = ["onnx", "tflite"]
LOUD = {"mid", "last"}  # what touches the loud channel of the outlier network


def run(artifact: Artifact, x: np.ndarray) -> np.ndarray:
    """What the file itself gives for each image, in its own runtime."""
    return running.run(artifact, [x[:, None]]).outputs[0][:, 0]


def right(bundle: Bundle) -> dict[str, float]:
    """The share of images that each file of a bundle of the outlier network tells right."""
    arrays = hazards.data()
    return {a.format: float((run(a, arrays["x"]).argmax(1) == arrays["y"]).mean()) for a in bundle.artifacts}


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return edgekit.export(
        hazards.outlier(), target="x86", formats=FORMATS, precision="int8", data=hazards.data(),
        sensitivity=True, out=tmp_path_factory.mktemp("int8"), name="net",
    )  # fmt: skip


@pytest.fixture(scope="module")
def tried() -> dict[int, float]:
    """Number of layers in float → the drop that the search measured with them."""
    return {}


@pytest.fixture(scope="module")
def rescued(tmp_path_factory: pytest.TempPathFactory, tried: dict[int, float]) -> Bundle:
    search = float_heads.fewest

    def watched(most: int, drop: Callable[[int], float], limit: float) -> int | None:
        def measured(count: int) -> float:
            tried[count] = drop(count)
            return tried[count]

        return search(most, measured, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float_heads, "fewest", watched)
        return edgekit.export(
            hazards.outlier(), target="x86", formats=FORMATS, precision="int8", data=hazards.data(),
            max_drop=1.0, out=tmp_path_factory.mktemp("mixed"), name="net",
        )  # fmt: skip


@torch.no_grad()
def test_an_outlier_channel_collapses_int8_and_layers_in_float_rescue_it(collapsed: Bundle, rescued: Bundle) -> None:
    """Measured on the files, in ONNX Runtime and LiteRT."""
    arrays = hazards.data()
    original = float((hazards.outlier()(torch.from_numpy(arrays["x"])).argmax(1).numpy() == arrays["y"]).mean())
    assert original > 0.97
    before, after = right(collapsed), right(rescued)
    assert set(before) == set(after) == set(FORMATS)
    assert max(before.values()) < 0.5
    assert min(after.values()) >= original - 0.011


def test_only_the_layers_to_blame_are_in_float(rescued: Bundle) -> None:
    recipe = rescued.manifest["recipe"]
    kept = {layer["path"] for layer in recipe["float_layers"]}
    assert kept <= LOUD and "mid" in kept
    assert recipe["accuracy"]["drop_points"] <= 1.0
    assert recipe["accuracy"]["samples"] == "evaluation"
    (note,) = [note for note in rescued.notes if note.startswith("accuracy drop")]
    assert "→" in note and f"{len(kept)} of 6 layers in float" in note and "mid (conv2d + relu)" in note
    assert any("chosen on the evaluation samples" in note for note in rescued.notes)


def test_the_ladder_keeps_them_in_float_too(rescued: Bundle) -> None:
    original, source = with_data.load(hazards.outlier(), data=hazards.data(), inputs=(), code=None, mean=(), std=())
    assert source is not None
    feeds = whole(source, original).feeds
    rungs = parity_ladder.explain(original, source, rescued.artifacts, feeds, open_device("local:"), True, Silent())
    graph = next(rung for rung in rungs if "graph, in float: " in rung.name)
    assert graph.parity.sqnr_db > verdicts.POOR_SQNR_DB
    assert not [rung.name for rung in rungs if rung.problem]
    assert {rung.against for rung in rungs[2:]} == {graph.name}


def test_the_fewest_are_kept(rescued: Bundle, tried: dict[int, float]) -> None:
    """With one layer less in float the drop is above the limit."""
    count = len(rescued.manifest["recipe"]["float_layers"])
    assert tried[count] <= 1.0 < tried.get(count - 1, 100.0)


def test_the_table_names_the_layers_to_blame(collapsed: Bundle) -> None:
    layers = collapsed.manifest["recipe"]["sensitivity"]
    assert {layer["path"] for layer in layers[:2]} == LOUD
    assert layers[0]["sqnr_db"] < 3 < 20 < layers[2]["sqnr_db"]
    assert collapsed.manifest["recipe"]["float_layers"] == []


def test_a_rejection_names_the_most_sensitive_layers(collapsed: Bundle, rescued: Bundle, tmp_path: Path) -> None:
    named = mixed_precision.most_sensitive(collapsed.artifacts[0])
    assert len(named) == 3 and any(name.startswith("mid (conv2d + relu) at ") for name in named)
    kept = {layer["path"] for layer in rescued.manifest["recipe"]["float_layers"]}
    assert not any(name.split(" ")[0] in kept for name in mixed_precision.most_sensitive(rescued.artifacts[0]))
    assert mixed_precision.most_sensitive(Artifact(tmp_path / "model.onnx", "onnx", "int8")) == ()


def test_nothing_is_kept_where_int8_is_good_enough(tmp_path: Path) -> None:
    bundle = edgekit.export(
        network(),
        target="x86",
        formats=["onnx"],
        precision="int8",
        data=samples(),
        max_drop=5,
        out=tmp_path,
        name="net",
    )
    recipe = bundle.manifest["recipe"]
    assert recipe["float_layers"] == []
    assert "sensitivity" not in recipe  # that took no time
    assert any("every layer in int8" in note for note in bundle.notes)


def test_a_drop_that_cannot_be_reached_is_an_error_with_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float_heads, "fewest", lambda most, drop, limit: None if drop(1) > limit else 1)
    with pytest.raises(EdgeKitError, match=r"int8 loses \d\d\.\d\d points on 200 samples.*mid \(conv2d") as caught:
        edgekit.export(
            hazards.outlier(), target="x86", formats=["onnx"], precision="int8", data=hazards.data(), max_drop=0.1,
            out=tmp_path,
        )  # fmt: skip
    assert 'precision="fp16"' in caught.value.help
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("calibration", "limit", "chosen"), [(100, 1.0, "evaluation"), (250, 1.0, "calibration")])
def test_labeled_calibration_samples_are_preferred_where_they_are_enough(
    calibration: int, limit: float, chosen: str, tmp_path: Path
) -> None:
    x, y = hazards.images(calibration, 3)
    arrays = {**hazards.data(), "calib_x": x.numpy(), "calib_y": y.numpy()}
    bundle = edgekit.export(
        hazards.outlier(), target="x86", formats=["onnx"], precision="int8", data=arrays, max_drop=limit, out=tmp_path
    )
    accuracy = bundle.manifest["recipe"]["accuracy"]
    assert accuracy["samples"] == chosen
    assert accuracy["n"] == (calibration if chosen == "calibration" else 200)
    assert any("chosen on the evaluation samples" in note for note in bundle.notes) == (chosen == "evaluation")


@torch.no_grad()
def test_a_detector_keeps_its_scores_beside_boxes_in_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the remedy boxes and scores share one scale, and every score is 0."""
    arrays = hazards.data(labeled=False)
    target = hazards.data()["y"]
    model = hazards.detector()
    assert (hazards.scores(model(torch.from_numpy(arrays["x"]))).argmax(1).numpy() == target).mean() > 0.97
    share = {}
    for name, apart in (("remedy", float_heads.MOST_APART), ("none", float("inf"))):
        monkeypatch.setattr(float_heads, "MOST_APART", apart)
        bundle = edgekit.export(
            model, target="x86", formats=FORMATS, precision="int8", data=arrays, out=tmp_path, name=name
        )
        for artifact in bundle.artifacts:
            outputs = hazards.scores(run(artifact, arrays["x"]))
            share[name, artifact.format] = float((outputs.argmax(1).numpy() == target).mean())
        assert any("stays in float" in note and "-fold" in note for note in bundle.notes) == (name == "remedy")
    for format in FORMATS:
        assert share["remedy", format] > 0.95
        assert share["none", format] < 0.5


def test_labels_of_calibration_samples_are_one_each(tmp_path: Path) -> None:
    arrays = {**hazards.data(), "calib_y": np.zeros(3, np.int64)}
    with pytest.raises(EdgeKitError, match=r"differ in length: \{'calib_x': 64, 'calib_y': 3\}"):
        edgekit.export(hazards.outlier(), target="x86", precision="int8", data=arrays, out=tmp_path)


ERRORS = {
    "fp32": ({"precision": "fp32", "max_drop": 1.0}, "max_drop=... looks at layers with int8 activations, and fp32"),
    "fp16": ({"precision": "fp16", "sensitivity": True}, "sensitivity=True looks at layers"),
    "below zero": ({"precision": "int8", "max_drop": -1.0}, "cannot be reached"),
    "no labels": ({"precision": "int8", "max_drop": 1.0}, "needs labels"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_asked_is_an_error(case: str, tmp_path: Path) -> None:
    options, message = ERRORS[case]
    with pytest.raises(EdgeKitError, match=message) as caught:
        edgekit.export(network(), target="x86", formats=["onnx"], data={"x": samples()["x"]}, out=tmp_path, **options)
    assert caught.value.help
    assert not list(tmp_path.iterdir())


def test_the_command_line_shows_the_table_and_writes_it(
    workshop: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = (
        "export",
        f"{workshop}/net.py:make",
        "--target",
        "x86",
        "--format",
        "onnx",
        "--data",
        workshop / "data.npz",
    )
    ran = invoke(capfd, *given, "--sensitivity", "--max-drop", "50", "--json", "out.json")
    assert ran.code == 0, ran.err
    layers = json.loads(Path("out.json").read_text())["recipe"]["sensitivity"]
    assert {(layer["path"], layer["op"]) for layer in layers} == {
        ("0", "conv2d + relu"), ("2", "conv2d + relu"), ("4", "mean"), ("6", "linear")
    }  # fmt: skip
    assert all(f"{layer['sqnr_db']:.1f} dB" in ran.out for layer in layers)
    assert sum(layer["weight_share"] for layer in layers) == pytest.approx(1, abs=0.05)
    assert "every layer in int8" in ran.out
    assert invoke(capfd, *given, "--max-drop", "-1").code == 2
    assert invoke(capfd, *given, "--precision", "fp32", "--max-drop", "1").code == 1


def test_batches_are_spread_over_a_stream_of_any_length() -> None:
    for length in (0, 1, 7, 16, 100, 513):
        kept = mixed_precision.spread(((index,) for index in range(length)), 16)  # type: ignore[misc]
        assert len(kept) >= min(length, 16) and len(kept) < 32
        steps = {b[0] - a[0] for a, b in pairwise(kept)}
        assert len(steps) <= 1
        assert not kept or kept[-1][0] + (steps.pop() if steps else 1) >= length
