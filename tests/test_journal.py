"""What was measured before a command failed is not measured again with --resume; nothing else is taken from there."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kit import invoke, quick

from edgekit.artifacts.artifact import Artifact
from edgekit.artifacts.bundles import Bundle
from edgekit.errors import EdgeKitError
from edgekit.measuring import running, schedule
from edgekit.measuring.feeds import random_feeds
from edgekit.measuring.run_cache import KEPT, KEPT_DAYS, Journal
from edgekit.runtimes import open_device


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgekit" / "journal"


@pytest.fixture
def artifact(bundles: dict[str, Bundle]) -> Artifact:
    return next(a for a in bundles["int8"].artifacts if a.format == "onnx")


class Runs:
    """Counts the runs, and fails from a given one on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.fail_at = 0, 99
        self._run = running.run
        monkeypatch.setattr(running, "run", self)

    def __call__(self, *args: object, **options: object) -> object:
        self.count += 1
        if self.count >= self.fail_at:
            raise EdgeKitError("the connection was lost", "check the cable")
        return self._run(*args, **options)


def test_profile_goes_on(
    artifact: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(schedule, "MOST_ROUNDS", 3)
    runs = Runs(monkeypatch)
    runs.fail_at = 3
    failed = invoke(capfd, "profile", artifact.path)
    assert failed.code == 1 and "the connection was lost" in failed.err and KEPT in failed.err
    assert runs.count == 3 and len(list(cache.iterdir())) == 2
    runs.count, runs.fail_at = 0, 99
    done = invoke(capfd, "profile", artifact.path, "--resume")
    assert done.code == 0 and runs.count == 1 and "2 results are those of the command before" in done.out
    assert not list(cache.iterdir())  # a command that ended well keeps nothing
    assert invoke(capfd, "profile", artifact.path, "--resume").code == 0 and runs.count == 4


def test_results_come_back_as_they_were(artifact: Artifact, cache: Path) -> None:
    feeds = random_feeds(artifact.inputs)
    device = open_device("local:")
    with pytest.raises(EdgeKitError, match="later") as caught, Journal(resume=False) as journal:
        first = journal.run(artifact, feeds, device=device, trace_runs=10)
        raise EdgeKitError("later", "do this")
    assert caught.value.help == f"do this; {KEPT}"
    journal = Journal(resume=True)
    again = journal.run(artifact, feeds, device=device, trace_runs=10)
    np.testing.assert_array_equal(again.outputs[0], first.outputs[0])
    assert again.trace == first.trace and first.trace
    assert replace(again, outputs=()).__dict__ == replace(first, outputs=()).__dict__
    assert journal.reused == 1
    device.cleanup()


def test_only_the_same_run_is_taken(
    artifact: Artifact, bundles: dict[str, Bundle], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(monkeypatch)
    feeds = random_feeds(artifact.inputs)
    device = open_device("local:")
    Journal(resume=False).run(artifact, feeds, device=device)
    other = next(a for a in bundles["fp32"].artifacts if a.format == "onnx")
    journal = Journal(resume=True)
    journal.run(other, feeds, device=device)
    journal.run(artifact, [feed + 1 for feed in feeds], device=device)
    journal.run(artifact, feeds, device=device, number=1)
    assert journal.reused == 0 and runs.count == 4
    for path in cache.iterdir():
        path.write_bytes(b"damaged")
    journal.run(artifact, feeds, device=device)
    assert journal.reused == 0 and runs.count == 5
    Journal(resume=False).run(artifact, feeds, device=device)  # nobody asked to go on
    assert runs.count == 6
    device.cleanup()


def test_old_results_are_forgotten(cache: Path) -> None:
    cache.mkdir(parents=True)
    for name, days in (("old", KEPT_DAYS + 1), ("new", 1)):
        path = cache / f"{name}.zip"
        path.touch()
        os.utime(path, (time.time() - days * 86400,) * 2)
    Journal(resume=False)
    assert [path.stem for path in cache.iterdir()] == ["new"]
