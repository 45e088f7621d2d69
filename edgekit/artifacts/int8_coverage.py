"""Coverage by int8: which ops of a quantized file do not run in int8, read from the file itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from edgekit.artifacts.artifact import Artifact
from edgekit.artifacts.contents import Contents, Node, float_islands
from edgekit.artifacts.summary import READERS
from edgekit.screening import limits
from edgekit.util import atomic_files

# ONNX Runtime says best what it runs: it writes the graph that it made of a file. At this level quantized ops are
# fused, and the layouts of one processor not yet chosen. In a process of its own: a runtime can crash on a file.
OPTIMIZE = """
import resource
import sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[3]), resource.getrlimit(resource.RLIMIT_DATA)[1]))
import onnxruntime
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
options.optimized_model_filepath = sys.argv[2]
options.log_severity_level = 4
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
"""
# ExecuTorch's binding says which kernels are linked into it; runtimes/pte.py loads the quantized ones too.
REGISTERED = """
import ctypes, json, pathlib, torch
from executorch.extension.pybindings import _C
library = pathlib.Path(_C.__file__).parents[2] / "lib" / "libexecutorch_kernels_quantized.so"
if library.is_file():
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
print(json.dumps(list(_C._get_operator_names())))
"""
TIMEOUT_S = 120
INTEGER_OPS = {"ConvInteger", "MatMulInteger", "QAttention", "QGemm"}
FLOAT_RESULTS = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}  # integer arithmetic with the dequantization fused in
TITLES = {"executorch": "ExecuTorch", "onnx": "ONNX", "tflite": "TFLite"}
BETWEEN = "in float between int8 ops"
MOST_NAMED = 4  # kinds of ops that one line names


@dataclass(frozen=True)
class Structure:
    """What in a quantized file does not run in int8.

    `float_ops` counts the arithmetic in float by op, `islands` that part of it which lies between quantized ops;
    `requantizations` change a quantized value's scale and nothing else. `delegates` and `undelegated` are ExecuTorch's:
    how many parts the delegate got, and op → count of what runs outside them, float arithmetic or not.
    """

    int8_ops: int
    float_ops: dict[str, int]
    islands: dict[str, int]
    requantizations: int
    delegates: int
    undelegated: dict[str, int]

    @property
    def floats(self) -> tuple[str, ...]:
        """One line for the float ops between int8 ones and one for those before the first or after the last."""
        outside = Counter(self.float_ops)
        outside.subtract(self.islands)
        lines = ((self.islands, BETWEEN), (+outside, "in float before or after the int8 ops"))
        return tuple(f"{counted(ops)} {where}" for ops, where in lines if ops)

    @property
    def suspects(self) -> tuple[str, ...]:
        """What costs speed, one line each, the worst first."""
        lines = [*self.floats]
        if self.undelegated:
            parts = f", which is cut into {self.delegates} parts" if self.delegates > 1 else ""
            lines.append(f"{counted(self.undelegated)} outside the delegate{parts}")
        if self.requantizations:
            plural = "s" if self.requantizations > 1 else ""
            lines.append(f"{self.requantizations} requantization{plural} from one int8 scale to another")
        return tuple(lines)

    def notes(self, format: str) -> tuple[str, ...]:
        """Returns what the user should know at export, where the exporter of this format does not tell it already.

        ExecuTorch's names what lies outside the delegate, and TFLite's every op between int8 ones.
        """
        told = format == "tflite"
        return tuple(f"{TITLES[format]}: {line}" for line in self.floats if not (told and line.endswith(BETWEEN)))

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return asdict(self)


def structure(artifact: Artifact) -> Structure | None:
    """Reads what in `artifact` does not run in int8; None where it is not quantized statically, or cannot be read."""
    if artifact.precision != "int8":
        return None
    contents = runs(artifact.path) if artifact.format == "onnx" else None
    if contents is None:
        contents = import_module(f"edgekit.artifacts.{READERS[artifact.format]}").read(artifact.path)
    return describe(contents)


def describe(contents: Contents) -> Structure:
    """Counts what a file's contents tell."""
    floats = Counter(node.op for graph in contents.graphs for node in graph if node.kind == "float")
    inside = Counter(op for graph in contents.graphs for group in float_islands(graph) for op in group)
    for outside in contents.undelegated:  # told of by itself
        floats.pop(outside, None)
        inside.pop(outside, None)
    return Structure(
        contents.count("int8"),
        dict(floats),
        dict(inside),
        contents.count("requantize"),
        sum(contents.delegates.values()),
        contents.undelegated,
    )


def runs(path: Path) -> Contents | None:
    """Returns what ONNX Runtime makes of the file at `path` once it is optimized; None where it cannot load it."""
    with atomic_files.temporary_folder() as folder:
        made = Path(folder) / "optimized.onnx"
        most = limits.budget([path]).memory
        command = [sys.executable, "-P", "-c", OPTIMIZE, str(path), str(made), str(most)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
        except subprocess.SubprocessError:
            return None
        contents: Contents = import_module(f"edgekit.artifacts.{READERS['onnx']}").read(made)
    return replace(
        contents, graphs=tuple(tuple(n for node in graph for n in _as_run(node)) for graph in contents.graphs)
    )


def missing_kernels(needed: Iterable[str]) -> list[str]:
    """Returns which of the operators that a .pte file calls ExecuTorch's runtime has no kernel for, by its registry.

    They are named as there, such as "aten::sort.values"; none where the runtime does not answer.
    """
    needed = list(needed)
    if not needed:
        return []
    command = [sys.executable, "-P", "-c", REGISTERED]
    try:
        answer = subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S, text=True).stdout
        registered = set(json.loads(answer.splitlines()[-1]))
    except (subprocess.SubprocessError, ValueError, IndexError):
        return []
    return [name for name in needed if name not in registered]


def _as_run(node: Node) -> Iterator[Node]:
    """The node by what it computes: (de)quantizations that are still there were not fused with what they surround."""
    if node.op in FLOAT_RESULTS:
        codes = tuple(f"{name} (codes)" for name in node.writes)
        yield replace(node, kind="int8", writes=codes)
        yield Node("DequantizeLinear", "dequantize", codes, node.writes)
    elif node.op.startswith("QLinear") or node.op in INTEGER_OPS:
        yield replace(node, kind="int8")
    else:
        yield replace(node, kind="float") if node.kind == "int8" else node


def counted(ops: Mapping[str, int]) -> str:
    """Returns "18 HardSwish and 9 Mul": the most frequent first, and how many kinds more there are."""
    most = sorted(ops.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{count} {op}" for op, count in most[:MOST_NAMED]]
    if len(most) > MOST_NAMED:
        named.append(f"{sum(count for _, count in most[MOST_NAMED:])} others")
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
