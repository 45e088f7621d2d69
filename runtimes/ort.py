"""ONNX Runtime: runs a .onnx file on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime

from .session import Session, TensorInfo, checked_feeds, named

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int16)": "int16",
    "tensor(uint16)": "uint16",
    "tensor(int32)": "int32",
    "tensor(uint32)": "uint32",
    "tensor(int64)": "int64",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
}
SEVERITY_ERROR = 3


def version() -> str:
    """The runtime's version."""
    return str(onnxruntime.__version__)


def load(path: str, *, threads: int, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> Session:
    """A session on the .onnx file at `path`; its own names, in the order of `inputs` and `outputs` where given.

    Raises ValueError for names that the file does not have, and for a dtype that numpy has no name for. What ONNX
    Runtime raises on a corrupt file passes through.
    """
    session = onnxruntime.InferenceSession(path, _options(threads), providers=["CPUExecutionProvider"])
    return OnnxSession(session, inputs, outputs)


def trace(
    path: str, into: Path, *, threads: int, inputs: Sequence[str], feeds: Sequence[Mapping[str, np.ndarray]], runs: int
) -> None:
    """Run the file `runs` times on `feeds` in turn, and leave ONNX Runtime's own profile (JSON) in the file `into`."""
    options = _options(threads)
    options.enable_profiling = True
    options.profile_file_prefix = str(into)
    profiled = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session = OnnxSession(profiled, inputs, ())
    for i in range(runs):
        session.run(feeds[i % len(feeds)])
    session.close()
    Path(profiled.end_profiling()).replace(into)


def _options(threads: int) -> onnxruntime.SessionOptions:
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = SEVERITY_ERROR
    return options


class OnnxSession:
    """One loaded .onnx file."""

    def __init__(self, session: onnxruntime.InferenceSession, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Raises ValueError for names that the file does not have, and for a dtype without a numpy name."""
        self._session: onnxruntime.InferenceSession | None = session
        self.inputs = named([_info(node) for node in session.get_inputs()], inputs, "input")
        self.outputs = named([_info(node) for node in session.get_outputs()], outputs, "output")
        self._input_names = [info.name for info in self.inputs]
        self._output_names = [info.name for info in self.outputs]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Raises ValueError for a feed that does not match `inputs`."""
        return dict(zip(self._output_names, self.prepared(feeds)(), strict=True))

    def prepared(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], list[np.ndarray]]:
        """What runs once on `feeds`. Raises ValueError for a feed that does not match `inputs`."""
        if self._session is None:
            raise ValueError("this session is closed")
        arrays = checked_feeds(self.inputs, feeds)
        return partial(self._session.run, self._output_names, dict(zip(self._input_names, arrays, strict=True)))

    def close(self) -> None:
        """Let go of the model."""
        self._session = None


def _info(node: onnxruntime.NodeArg) -> TensorInfo:
    if node.type not in DTYPES:
        raise ValueError(f"'{node.name}' is a {node.type}, which EdgeKit cannot feed or read")
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    return TensorInfo(node.name, DTYPES[node.type], shape)
