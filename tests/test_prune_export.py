"""Pruning as a step of an export: what the bundle says, and what it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kit import quick
from test_finetune import data, wide

import edgekit
from edgekit.errors import EdgeKitError


def test_a_bundle_tells_its_pruning_and_is_compared_with_both_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    given = {"data": data()}
    bundle = edgekit.export(
        wide(), target="x86", formats="onnx", precision="fp32", prune=0.4, name="net", out=tmp_path, **given
    )
    told = bundle.manifest["model"]["pruned"]
    assert told["folder"] == "net-pruned" and told["macs"]["removed"] >= 0.4
    assert told["accuracy"]["n"] == 32
    assert any("checked against what is left, net-pruned/model.pt2" in note for note in bundle.notes)
    assert any(note.startswith("pruning dropped top1") for note in bundle.notes)
    (entry,) = bundle.manifest["artifacts"]
    assert entry["parity"]["max_rel"] < 1e-4  # to the pruned network

    (measured,) = edgekit.compare(wide(), [bundle], **given).artifacts
    assert measured.parity.max_rel > 1e-2
    assert not any("differs from the original" in reason for reason in measured.verdict.reasons)
    assert measured.speedup_fp32 is not None  # against the original's own fp32 file
    pruned = tmp_path / "net-pruned" / "model.pt2"
    (own,) = edgekit.compare(pruned, [bundle], **given).artifacts
    assert own.parity.max_rel < 1e-4 and own.artifact.pruned is None and own.speedup_fp32 is None

    with pytest.raises(EdgeKitError, match="files are of a pruned network"):
        edgekit.compare(wide(), [bundle], explain=True, **given)


def test_what_is_left_is_trained_for_int8(tmp_path: Path) -> None:
    given: dict[str, Any] = {"formats": "onnx,tflite", "precision": "int8", "name": "net", "data": data()}
    bundle = edgekit.export(wide(), target="x86", prune=0.4, qat=edgekit.Qat(epochs=2), out=tmp_path, **given)
    assert bundle.manifest["model"]["pruned"]["macs"]["removed"] >= 0.4
    assert bundle.manifest["recipe"]["qat"]["epochs"] == 2
    assert {entry["format"] for entry in bundle.manifest["artifacts"]} == {"onnx", "tflite"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net-pruned", "net-x86"]  # and no checkpoint


def test_a_share_that_cannot_go_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EdgeKitError, match=r"a ratio of 1\.5 would leave nothing"):
        edgekit.export(wide(), target="x86", precision="fp32", prune=1.5, data=data(), out=tmp_path)
    assert not list(tmp_path.iterdir())
