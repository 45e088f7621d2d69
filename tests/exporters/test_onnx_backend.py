"""ONNX's official node tests, converted to TFLite and run in LiteRT, each in a process of its own.

What a conversion may do is pass or be refused with an error. A wrong result, an abort of the interpreter or any other
exception fails. The default is every twelfth test; all of them (half a minute), with what was refused and why:

    python tests/exporters/test_onnx_backend.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

STEP = 12
BAD = ("wrong", "aborted", "raised")
SECONDS = 60


def cases(step: int) -> list[Any]:
    """The tests of ONNX's node suite by name, every `step`-th of them."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sorted(load_model_tests(kind="node"), key=lambda case: case.name)[::step]


def judge(case: Any) -> tuple[str, str]:
    """Convert and run one test: as it is, or else with all inputs but the first as constants."""
    import onnx
    from onnx import numpy_helper

    from edgekit.errors import EdgeKitError

    given, expected = (
        [
            numpy_helper.to_array(item)
            if isinstance(item, onnx.TensorProto)
            else np.asarray(item)
            if isinstance(item, np.generic)
            else item
            for item in part
        ]
        for part in case.data_sets[0]
    )
    if not all(isinstance(item, np.ndarray) for item in (*given, *expected)):
        return "skipped", "inputs or outputs are not tensors"
    names = [value.name for value in case.model.graph.input]
    feeds = dict(zip(names, given, strict=True))
    reason = ""
    for runtime in dict.fromkeys((tuple(names), tuple(names[:1]))):
        made = onnx.ModelProto()
        made.CopyFrom(case.model)
        for value in [value for value in made.graph.input if value.name not in runtime]:
            made.graph.initializer.append(numpy_helper.from_array(feeds[value.name], value.name))
            made.graph.input.remove(value)
        try:
            return compare(case, made, {name: feeds[name] for name in runtime}, expected)
        except EdgeKitError as error:
            reason = reason or error.what
    return "refused", reason


def compare(case: Any, made: Any, feeds: dict[str, np.ndarray], expected: list[np.ndarray]) -> tuple[str, str]:
    """Run with and without XNNPACK; a graph that was folded to a constant proves nothing and is not counted."""
    from tflite_tools import op_names, run_tflite

    from edgekit.exporters.tflite import convert

    data = convert(made)
    kinds = op_names(data)
    for xnnpack in (True, False):
        actual = run_tflite(data, feeds, xnnpack)
        for output, wanted in zip(made.graph.output, expected, strict=True):
            if not agree(actual[output.name], wanted, case.rtol, case.atol):
                return "wrong", f"'{output.name}' by {' '.join(kinds)}, XNNPACK {xnnpack}"
    moved = made.graph.node[0].op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout")
    return ("passed" if moved or set(kinds) != {"RESHAPE"} else "folded"), " ".join(kinds)


def agree(actual: np.ndarray, wanted: np.ndarray, rtol: float, atol: float) -> bool:
    """Same shape, type and numbers; the runtime's own kernels write infinities as the largest finite numbers."""
    if actual.shape != wanted.shape or actual.dtype != wanted.dtype:
        return False
    if wanted.dtype.kind != "f":
        return bool(np.array_equal(actual, wanted))
    largest = np.finfo(wanted.dtype).max
    actual, wanted = (np.clip(array, -largest, largest) for array in (actual, wanted))
    return bool(np.allclose(actual, wanted, rtol=max(rtol, 1e-3), atol=max(atol, 1e-5), equal_nan=True))


def isolated(case: Any) -> tuple[str, str]:
    """Judge in a forked process: an abort ends the process, and nothing else."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        signal.alarm(SECONDS)
        try:
            verdict = judge(case)
        except BaseException as error:
            verdict = "raised", f"{type(error).__name__}: {str(error)[:200]}"
        os.write(writer, json.dumps(verdict).encode()[:60000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        written = pipe.read()
    _, status = os.waitpid(child, 0)
    return tuple(json.loads(written)) if written else ("aborted", f"signal {os.waitstatus_to_exitcode(status)}")


def main(step: int) -> dict[str, tuple[str, str]]:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    import tflite_tools  # noqa: F401 (imported before the forks, which then need not)

    import edgekit.exporters.tflite  # noqa: F401

    return {case.name: isolated(case) for case in cases(step)}


def test_official_node_tests_pass_or_are_refused() -> None:
    run = subprocess.run([sys.executable, __file__, str(STEP)], capture_output=True, text=True, timeout=300, check=True)
    verdicts = json.loads(run.stdout)
    assert {name: verdict for name, verdict in verdicts.items() if verdict[0] in BAD} == {}
    passed = Counter(kind for kind, _ in verdicts.values())["passed"]
    assert passed >= 95, f"{passed} of {len(verdicts)} official tests pass"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(main(int(sys.argv[1]))))
    else:
        for name, (kind, detail) in (found := main(1)).items():
            if kind not in ("passed", "folded"):
                print(f"{kind:8} {name}: {detail}")
        print(dict(Counter(kind for kind, _ in found.values())))
