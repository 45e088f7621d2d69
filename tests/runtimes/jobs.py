"""Files and samples that the tests of jobs share."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from conformance import INPUTS
from onnx import TensorProto, helper

from edgekit.runtimes import RUNTIMES
from edgekit.types import SUFFIXES


def artifact(files: Path, model: str, runtime: str) -> Path:
    return files / f"{model}{SUFFIXES[RUNTIMES[runtime].format]}"


def stacked(files: Path, model: str, runs: int) -> list[np.ndarray]:
    """`runs` different samples, the first of them that of the .npz file."""
    with np.load(files / f"{model}.npz") as arrays:
        first = [arrays[name] for name in INPUTS[model]]
    return [np.stack([array + i for i in range(runs)]).astype(array.dtype) for array in first]


Spoil = Callable[[bytes], bytes]
SPOILED: dict[str, Spoil] = {
    "cut in half": lambda data: data[: len(data) // 2],
    "head alone": lambda data: data[:16],
    "zeros after the head": lambda data: data[:16] + bytes(len(data) - 16),
}


def endless_onnx(path: Path) -> None:
    """A Loop whose condition stays true."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Identity", ["v"], ["same"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("same", TensorProto.FLOAT, [1]),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)],
        "endless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        [helper.make_tensor("true", TensorProto.BOOL, [], [True])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """A server notices in its own time that a connection is gone."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def processes_of(folder: Path, words: str = "") -> list[str]:
    """Command lines of processes that name `folder`, and `words`; those of clients do not count."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        runs = line.startswith((sys.executable, "/bin/sh -c", "sh -c", str(folder))) and "run_artifact" not in line
        if runs and f"{folder}/edgekit-" in line and words in line and "sshd" not in line:
            found.append(line)
    return found
