"""Every runtime passes the same conformance test."""

from __future__ import annotations

import importlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance import CHECKS, INPUTS, OUTPUTS, Subject, close_to, raises

from edgekit.runtimes import RUNTIMES, eager, table
from edgekit.types import SUFFIXES

SCRIPT = Path(__file__).with_name("conformance.py")
ELSEWHERE = {"tflite-runtime": "EDGEKIT_TFLITE_RUNTIME_PYTHON"}
"""Runtimes that cannot be installed beside the others → the variable that names an interpreter which has them."""
IN_PROCESS = {"executorch", "onnxruntime", "litert"}


def test_every_runtime_is_tested() -> None:
    assert set(ELSEWHERE) | IN_PROCESS == set(RUNTIMES)


def test_every_module_is_a_runtime() -> None:
    modules = {path.stem for path in Path(table.__file__).parent.glob("*.py") if "\ndef load(" in path.read_text()}
    assert modules == {runtime.module for runtime in RUNTIMES.values()} | {"eager"}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", RUNTIMES)
def test_runtime(name: str, check: Callable[[Subject], None], files: Path) -> None:
    runtime = RUNTIMES[name]
    suffix = SUFFIXES[runtime.format]
    if name in IN_PROCESS:
        check(Subject(importlib.import_module(f"edgekit.runtimes.{runtime.module}"), files, suffix))
        return
    python = other_python(name)
    runtimes = str(Path(table.__file__).parent)
    argv = [python, str(SCRIPT), runtimes, runtime.module, str(files), suffix, check.__name__]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def other_python(name: str) -> str:
    python = os.environ.get(ELSEWHERE[name])
    if not python:
        pytest.skip(f"{ELSEWHERE[name]} does not name an interpreter that has {RUNTIMES[name].package}")
    return python


@pytest.mark.parametrize("model", INPUTS)
def test_eager(model: str, modules: dict[str, torch.nn.Module], files: Path) -> None:
    subject = Subject(None, files, "")
    feeds, expected = subject.feeds(model), subject.expected(model)
    session = eager.load(modules[model], threads=1, inputs=INPUTS[model], outputs=OUTPUTS[model])
    got = session.run(feeds)
    close_to(got, expected)
    session.run({name: feed * 0 for name, feed in feeds.items()})
    close_to(got, expected)
    raises(lambda: session.run({"nothing": feeds["image"]}), "image", "nothing")
    session.close()
    raises(lambda: session.run(feeds), "closed")


class InPlace(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.ones(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.add_(1), self.state


def test_eager_guards_feeds_and_state() -> None:
    module = InPlace()
    session = eager.load(module)
    x = np.zeros(3, "float32")
    got = session.run({"input_0": x})
    assert list(got) == ["output_0", "output_1"]
    np.testing.assert_array_equal(x, 0)
    got["output_1"][:] = 7
    np.testing.assert_array_equal(module.state, 1)
    raises(lambda: eager.load(module, outputs=("one",)).run({"input_0": x}), "2 outputs", "one")
