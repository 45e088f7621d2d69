"""What the tests of the command line and the pipeline share: a tiny network, its samples, and ways to run EdgeKit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import edgekit
from edgekit.cli import app
from edgekit.measuring import schedule
from edgekit.pruning import cost
from edgekit.quant.pruning import distillation
from edgekit.runtimes import Timing

ROOT = Path(edgekit.__file__).parents[1]
SHAPE = (3, 16, 16)
CLASSES = 10
NET = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )
"""


class Ran(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def network() -> torch.nn.Module:
    scope: dict[str, object] = {}
    exec(NET, scope)
    return scope["make"]().eval()  # type: ignore[operator]


def samples(count: int = 40) -> dict[str, np.ndarray]:
    """Random images, and labels of which the network gets three in four right."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, *SHAPE)).astype(np.float32)
    with torch.inference_mode():
        y = network()(torch.from_numpy(x)).argmax(1).numpy()
    y[::4] = (y[::4] + 1) % CLASSES
    return {"x": x, "y": y}


def invoke(capfd: pytest.CaptureFixture, *args: object) -> Ran:
    """Runs the command line in this process."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        app.app([str(arg) for arg in args])
    code = caught.value.code
    return Ran(int(code or 0), *capfd.readouterr())


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "edgekit", *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def start(*args: object, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Starts the command line in a process of its own."""
    return subprocess.Popen(
        command(*args), cwd=cwd, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextmanager
def full_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of `size` bytes; skips the test where none can be mounted."""
    folder.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def tree(folder: Path) -> Sequence[str]:
    """Every path under `folder`, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times each file in one process and five runs: tests look at the numbers' relations, not at the numbers."""
    monkeypatch.setattr(schedule, "ROUNDS", 1)
    monkeypatch.setattr(schedule, "MOST_ROUNDS", 1)
    monkeypatch.setattr(cost, "FINAL_ROUNDS", 1)
    monkeypatch.setattr(schedule, "TIMING", Timing(warmup_runs=1, seconds=0.0, min_runs=5, max_runs=5))


@contextmanager
def interrupted_training(epochs: int) -> Iterator[None]:
    """Lets trainings in this process run so many epochs, and then ends them as Ctrl-C does."""
    run_epoch = distillation._Training.run_epoch

    def interrupted(self: Any, *arguments: Any) -> None:
        if len(self.losses) == epochs:
            raise KeyboardInterrupt
        run_epoch(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation._Training, "run_epoch", interrupted)
        yield
