"""Pruning towards a latency or a size: what is tried, what is chosen and why, and what is out of reach."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import NET, interrupted_training, invoke, quick, samples, tree

import edgekit
from edgekit.artifacts.artifact import Artifact
from edgekit.errors import EdgeKitError
from edgekit.pruning import cost, target_search
from edgekit.pruning.cost import Cost
from edgekit.pruning.options import parse_limit
from edgekit.pruning.result import Pruned
from edgekit.types import SUFFIXES

WIDE = (
    NET.replace("nn.Conv2d(3, 8", "nn.Conv2d(3, 64").replace("nn.Conv2d(8, 16", "nn.Conv2d(64, 96")
    .replace("Linear(16", "Linear(96")
)  # fmt: skip


def wide() -> torch.nn.Module:
    scope: dict[str, Any] = {}
    exec(WIDE, scope)
    return scope["make"]().eval()


def data() -> dict[str, np.ndarray]:
    drawn = samples(64)
    return {"x": drawn["x"][:24], "y": drawn["y"][:24], "calib_x": drawn["x"][24:], "calib_y": drawn["y"][24:]}


def prune(out: Path, **options: Any) -> Pruned:
    return edgekit.prune(wide(), **{"data": data(), "out": out, "epochs": 1, "formats": "onnx", **options})


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock without noise, a file takes as long as it is large, and candidates that are only as large as files."""

    def race(
        artifacts: Sequence[Artifact], feeds: Any, device: Any, threads: int, rounds: int, advance: Callable[[], None]
    ) -> dict[Artifact, Cost]:
        for _ in range(rounds * len(artifacts)):
            advance()
        return {artifact: Cost(None, artifact.size_bytes) for artifact in artifacts}

    def export(self: Any, model: Any, name: str) -> dict[str, Artifact]:
        (self.folder / name).mkdir()
        count = sum(parameter.numel() for parameter in model.module.parameters())
        found = {}
        for format, more in zip(self.wanted.formats, (2500, 2900), strict=False):
            path = self.folder / name / f"model{SUFFIXES[format]}"
            path.write_bytes(bytes(4 * count + more))
            found[format] = Artifact(path, format, self.wanted.precision, model.inputs, model.outputs)
        return found

    monkeypatch.setattr(cost, "race", race)
    monkeypatch.setattr(target_search._Search, "_export", export)
    monkeypatch.setattr(cost, "measure", lambda *arguments: ())


@pytest.mark.parametrize("target", [{"target_latency": "0.5x"}, {"target_size": "0.5x"}, {"target_size": "120kB"}])
def test_what_is_chosen_is_within_the_target_and_keeps_the_most(
    target: dict[str, str], tmp_path: Path, sized: None
) -> None:
    pruned = prune(tmp_path, formats="onnx,tflite", **target)
    search = pruned.search
    assert search is not None
    assert 0.85 < search.chosen.load <= 1  # within the target, and little less
    assert search.chosen.macs == max(c.macs for c in search.candidates if c.load <= 1)
    assert search.chosen in search.front
    assert {c.round_to for c in search.candidates} == {8, 16}
    assert {c.processes for c in search.candidates} == ({1, 3} if "target_latency" in target else {0})
    for candidate in set(map(repr, search.candidates)) - set(map(repr, search.front)):
        (loser,) = (c for c in search.candidates if repr(c) == candidate)
        assert any(c.load <= loser.load and c.macs >= loser.macs for c in search.front)
    before, after = pruned.macs
    assert abs(after / before - search.chosen.macs) < 0.01


def test_the_command_times_the_files_and_tells_the_candidates(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    (tmp_path / "net.py").write_text(WIDE)
    np.savez(tmp_path / "data.npz", **data())
    model, arrays = f"{tmp_path / 'net.py'}:make", tmp_path / "data.npz"
    options = ("--data", arrays, "--epochs", 1, "--format", "onnx", "--out", tmp_path)
    ran = invoke(capfd, "prune", model, "--ratio", 0.5, "--precision", "int8", *options)
    assert ran.code == 0, ran.err
    assert "model.onnx" in ran.out and "p50 ms" in ran.out
    (entry,) = json.loads((tmp_path / "net-pruned" / "prune.json").read_text())["files"]
    assert entry["precision"] == "int8" and entry["latency_ms"]["p50"] > 0
    for name, fewer in (("FIRST", 2), ("NEAR", (0.03,)), ("ROUNDINGS", (8,))):
        monkeypatch.setattr(target_search, name, fewer)
    ran = invoke(capfd, "prune", model, "--target-size", "0.6x", *options)
    assert ran.code == 0, ran.err
    assert "chosen" in ran.out and "above the target" in ran.out
    told = json.loads((tmp_path / "net-pruned" / "prune.json").read_text())
    assert told["search"]["target"] == {"kind": "size", "asked": "0.6x"}
    assert told["ratio"] == told["search"]["chosen"]["ratio"]
    (entry,) = told["files"]
    assert (tmp_path / "net-pruned" / "model.onnx").stat().st_size == entry["size_bytes"]
    assert entry["size_bytes"] <= 0.6 * entry["original_size_bytes"]
    assert any("the target is kept" in note for note in told["notes"])


@pytest.mark.parametrize("target", [{"target_latency": "0.02x"}, {"target_size": "1kB"}])
def test_what_is_out_of_reach_says_how_far_one_gets(target: dict[str, str], tmp_path: Path, sized: None) -> None:
    with pytest.raises(EdgeKitError, match=r"out of reach: with \d+ % of the multiply-adds gone") as caught:
        prune(tmp_path, **target)
    assert "give target_" in str(caught.value.help)
    assert tree(tmp_path) == []


def test_a_target_that_the_original_keeps_is_refused(tmp_path: Path, sized: None) -> None:
    with pytest.raises(EdgeKitError, match="as it is"):
        prune(tmp_path, target_size="5MB")


def test_a_search_is_not_done_again_by_resume(tmp_path: Path, sized: None, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"target_latency": "0.6x", "epochs": 3, "name": "net"}
    with interrupted_training(2), pytest.raises(KeyboardInterrupt):
        prune(tmp_path, **options)
    assert tree(tmp_path) == ["net-pruned.checkpoint.pt", "net-pruned.checkpoint.search.json"]
    record = (tmp_path / "net-pruned.checkpoint.search.json").read_text()
    with pytest.raises(EdgeKitError, match="the search of another pruning"):
        prune(tmp_path, **{**options, "target_latency": "0.7x"}, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(target_search._Search, "run", lambda self: pytest.fail("it searched again"))
        done = prune(tmp_path, **options, resume=True, timeout=120)  # which changes nothing that was found
    assert done.search is not None and done.search.chosen.ratio == json.loads(record)["chosen"]["ratio"]
    assert tree(tmp_path) == ["net-pruned", *(f"net-pruned/{file}" for file in tree(done.path))]


def test_the_cubic_schedule_ends_at_the_ratio(tmp_path: Path) -> None:
    pruned = prune(tmp_path, ratio=0.6, schedule="cubic", steps=3, formats=None)
    before, after = pruned.macs
    assert 0.6 <= 1 - after / before < 0.75
    assert tree(tmp_path) == ["Sequential-pruned", *(f"Sequential-pruned/{file}" for file in tree(pruned.path))]


LIMITS = {
    ("latency", "0.6x"): (0.6, True),
    ("latency", "5ms"): (5.0, False),
    ("latency", "250 us"): (0.25, False),
    ("size", "800kB"): (8e5, False),
    ("size", ".5x"): (0.5, True),
}


@pytest.mark.parametrize("given", LIMITS)
def test_limits_are_read(given: tuple[Any, str]) -> None:
    limit = parse_limit(*given)
    assert (limit.value, limit.relative) == LIMITS[given]
    assert limit.allowed(10.0) == (10 * limit.value if limit.relative else limit.value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "nothing says how much"),
    "two things": ({"ratio": 0.5, "sparsity": 0.5}, "ratio=... and sparsity=... ask for different things"),
    "a longer latency": ({"target_latency": "1.2x"}, "no less than it takes"),
    "no unit": ({"target_latency": "0.6"}, "cannot read the latency '0.6'"),
    "a latency in bytes": ({"target_latency": "5MB"}, "cannot read the latency"),
    "nothing left": ({"target_size": "0x"}, "cannot read the size"),
    "schedule": ({"ratio": 0.5, "schedule": "linear"}, "unknown schedule"),
    "one-shot in steps": ({"ratio": 0.5, "steps": 3}, "one-shot has one step"),
    "cubic in one": ({"ratio": 0.5, "schedule": "cubic", "steps": 1}, "cannot have 1 steps"),
    "cubic to a target": ({"target_size": "0.5x", "schedule": "cubic"}, "a target has to be searched for"),
    "int8 without data": ({"target_size": "0.5x", "precision": "int8", "data": None}, "needs data to calibrate"),
    "fine-tuning without data": ({"ratio": 0.5, "finetune": print, "data": None}, "fine-tuning reads samples"),
    "a device that is none": ({"ratio": 0.3, "device": "nowhere:"}, "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused_and_leave_nothing(case: str, tmp_path: Path) -> None:
    options, words = REFUSED[case]
    with pytest.raises(EdgeKitError, match=words):
        prune(tmp_path, **{"inputs": ["1x3x16x16"], "epochs": None, **options})
    assert tree(tmp_path) == []
