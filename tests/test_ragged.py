"""Outputs of data-dependent shape: found in the model, padded run by run, and compared as sets of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import edgekit
from edgekit.errors import EdgeKitError
from edgekit.loading import model
from edgekit.measuring import schedule
from edgekit.runtimes import Timing
from edgekit.types import TensorSpec
from edgekit.util import ragged_arrays

BOXES, SCORES = TensorSpec("boxes", "float32", (-1, 4)), TensorSpec("scores", "float32", (-1,))


class Masked(nn.Module):
    """Rows that a mask lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.layer(x)
        return rows[rows[:, 0] > 0]


class Places(nn.Module):
    """Indices of what is large, beside an output of fixed shape."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.nonzero(x[0, 0] > 0.3), x.mean((2, 3))


class Detector(nn.Module):
    """Boxes above a score."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, stride=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.conv(x).flatten(2)[0].T
        scores = torch.sigmoid(rows[:, 4])
        kept = scores > 0.5
        return rows[kept][:, :4], scores[kept]


class ByNumber(nn.Module):
    """An index of numbers always selects as many."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, torch.tensor([0, 2])]


SHAPES: list[tuple[Callable[[], nn.Module], str, list[str]]] = [
    (Masked, "8x4", ["output:float32[-1,4]"]),
    (Places, "1x1x6x6", ["output_0:int64[-1,2]", "output_1:float32[1,1]"]),
    (Detector, "1x3x12x12", ["output_0:float32[-1,4]", "output_1:float32[-1]"]),
    (ByNumber, "1x4", ["output:float32[1,2]"]),
]


@pytest.mark.parametrize(("kind", "shape", "outputs"), SHAPES, ids=lambda value: getattr(value, "__name__", ""))
def test_sizes_that_values_decide_are_open(kind: Callable[[], nn.Module], shape: str, outputs: list[str]) -> None:
    assert [str(spec) for spec in model.load(kind().eval(), inputs=[shape]).outputs] == outputs


def test_nms_inside_an_onnx_file_is_open(tmp_path: Path) -> None:
    onnx.save(nms(), tmp_path / "nms.onnx")
    assert [str(spec) for spec in model.load(tmp_path / "nms.onnx").outputs] == ["found:int64[-1,3]"]


def nms() -> onnx.ModelProto:
    """Non-maximum suppression over 20 boxes of one class."""
    helper, float32, int64 = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "overlap", "least"], ["found"])
    constants = [
        helper.make_tensor("most", int64, [1], [20]),
        helper.make_tensor("overlap", float32, [1], [0.5]),
        helper.make_tensor("least", float32, [1], [0.3]),
    ]
    fed = [
        helper.make_tensor_value_info("boxes", float32, (1, 20, 4)),
        helper.make_tensor_value_info("scores", float32, (1, 1, 20)),
    ]
    found = [helper.make_tensor_value_info("found", int64, ("kept", 3))]
    graph = helper.make_graph([node], "nms", fed, found, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_stacked_runs_are_padded() -> None:
    found = ragged_arrays.stack([np.ones((1, 2), np.int64), np.zeros((3, 2), np.int64)])
    assert found.shape == (2, 3, 2)
    assert np.isnan(found[0, 1:]).all() and not np.isnan(found[1]).any()
    assert ragged_arrays.stack([np.ones(2, np.int64)] * 2).dtype == np.int64


def detections(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 600, (count, 4)).astype(np.float32), rng.uniform(0.3, 1, count).astype(np.float32)


def stacked(*runs: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    return [ragged_arrays.stack([run[i] for run in runs]) for i in (0, 1)]


def test_rows_in_another_order_are_the_same_set() -> None:
    boxes, scores = detections(6, 0)
    order = np.random.default_rng(1).permutation(6)
    a, b = ragged_arrays.matched(stacked((boxes, scores)), stacked((boxes[order], scores[order])), (BOXES, SCORES))
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("missing", [0, 3, 5])
def test_a_missing_row_counts_whole_and_moves_no_other(missing: int) -> None:
    boxes, scores = detections(6, 0)
    left = np.delete(boxes, missing, 0), np.delete(scores, missing)
    a, b = ragged_arrays.matched(stacked((boxes, scores)), stacked(left), (BOXES, SCORES))
    assert sorted(np.abs(a[1] - b[1]).ravel().tolist()) == pytest.approx([0, 0, 0, 0, 0, scores[missing]])
    assert np.abs(a[0] - b[0]).sum() == pytest.approx(boxes[missing].sum(), rel=1e-6)


def test_nothing_found_in_a_run_and_rows_that_only_the_file_has() -> None:
    boxes, scores = detections(2, 0)
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    a, b = ragged_arrays.matched(stacked(nothing, (boxes, scores)), stacked((boxes, scores), nothing), (BOXES, SCORES))
    assert a[0].shape == b[0].shape == (2, 2, 4)
    np.testing.assert_allclose(np.abs(a[0] - b[0]), [boxes, boxes])


def test_outputs_of_fixed_shape_stay_as_they_are() -> None:
    fixed = TensorSpec("scores", "float32", (1, 3))
    arrays = [np.ones((2, 1, 3), np.float32)]
    a, b = ragged_arrays.matched(arrays, arrays, (fixed,))
    assert a[0] is b[0] is arrays[0]


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 12, 12)).astype(np.float32)


def test_a_detector_goes_into_the_format_that_holds_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Detector().eval()
    bundle = edgekit.export(net, target="android", precision="int8", data={"x": images(12)}, out=tmp_path)
    assert [artifact.format for artifact in bundle.artifacts] == ["onnx"]
    assert bundle.artifacts[0].outputs[0].shape == (-1, 4)
    assert any(note.startswith("without .pte, .tflite: the number of rows of 'output_0'") for note in bundle.notes)
    assert [replay.problem for replay in edgekit.verify(bundle.path)] == [None]
    golden = np.load(bundle.path / "golden.npz")
    with torch.no_grad():
        counts = [len(net(torch.from_numpy(image[None]))[1]) for image in images(8)]
    assert len(set(counts)) > 1
    assert (~np.isnan(golden["original/output_1"])).sum(1).tolist() == counts


@pytest.mark.parametrize("format", ["tflite", "executorch"])
def test_a_format_of_fixed_shapes_is_refused_in_one_sentence(format: str, tmp_path: Path) -> None:
    with pytest.raises(EdgeKitError, match="files hold outputs of a fixed shape") as caught:
        edgekit.export(Detector(), target="x86", formats=format, precision="fp32", inputs=["1x3x12x12"], out=tmp_path)
    assert 'export with formats="onnx"' in (caught.value.help or "")
    assert not list(tmp_path.iterdir())


def test_an_onnx_file_with_nms_inside_is_checked_as_a_set(tmp_path: Path) -> None:
    onnx.save(nms(), tmp_path / "nms.onnx")
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 10, (8, 20, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + rng.uniform(1, 5, (8, 20, 2)).astype(np.float32)], 2)
    data = {"boxes": boxes, "scores": rng.uniform(0, 1, (8, 1, 20)).astype(np.float32)}
    bundle = edgekit.export(tmp_path / "nms.onnx", target="x86", formats="onnx", data=data, out=tmp_path)
    golden = np.load(bundle.path / "golden.npz")
    assert len({int(rows) for rows in (~np.isnan(golden["original/found"][..., 0])).sum(1)}) > 1
    assert bundle.manifest["artifacts"][0]["parity"]["max_abs"] == 0


class Boxes(nn.Module):
    """Boxes, labels and scores, as many as are above a score: what a detector gives with suppression inside."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = x[0]
        kept = rows[:, 4] > 0.5
        return rows[kept][:, :4], rows[kept][:, 5].long(), rows[kept][:, 4]


def test_compare_scores_a_detector_with_suppression_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "TIMING", Timing(0, 0, 1, 1))
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 50, (30, 6, 2))
    x = np.concatenate([corners, corners + 10, rng.uniform(0, 1, (30, 6, 1)), rng.integers(0, 3, (30, 6, 1))], 2)
    labels = np.where(x[..., 4] > 0.5, x[..., 5], -1).astype(np.int64)
    data = {"x": x.astype(np.float32), "y_boxes": x[..., :4].astype(np.float32), "y_labels": labels}
    bundle = edgekit.export(Boxes(), target="x86", formats="onnx", precision="fp32", data=data, out=tmp_path)
    found = edgekit.compare(Boxes(), [bundle], data=data, metric="map", cache=False, rounds=1)
    assert found.artifacts[0].accuracy is not None
    assert (found.artifacts[0].accuracy.value, found.artifacts[0].accuracy.baseline) == (1.0, 1.0)
    assert found.artifacts[0].parity.max_abs == 0
