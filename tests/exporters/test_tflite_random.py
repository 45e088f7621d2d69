"""Random graphs in TFLite: all ops, ranks, attributes, types and opsets, against ONNX Runtime (see check_random.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from check_random import BAD

GRAPHS = {"float": 300, "int8": 120}
OPS = {"float": 90, "int8": 40}


@pytest.mark.parametrize("kind", GRAPHS)
def test_random_graphs_agree_with_onnxruntime_or_are_refused(kind: str) -> None:
    command = [sys.executable, str(Path(__file__).parent / "check_random.py"), kind, "0", str(GRAPHS[kind]), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert {seed: verdict for seed, verdict in found.items() if verdict[0] in BAD} == {}
    counts = Counter(what for what, _ in found.values())
    assert len(found) == GRAPHS[kind]
    assert counts["passed"] > 0.8 * len(found), counts
    ops = {op for what, detail in found.values() if what == "passed" for op in detail.split()}
    assert len(ops) > OPS[kind], sorted(ops)
