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
EXACT = {"session.x64quantprecision": "1"}  # kOrtSessionOptionsAvx2PrecisionMode: int8 weights become uint8 ones

# The model C = MatMulInteger(A, B) of uint8 A and int8 B, as onnx.helper serializes it.
PRODUCT = (
    b'\x08\x05:>\n\x18\n\x01a\n\x01b\x12\x01c"\rMatMulInteger\x12\x01gZ\t\n\x01a\x12\x04\n\x02\x08\x02'
    b"Z\t\n\x01b\x12\x04\n\x02\x08\x03b\t\n\x01c\x12\x04\n\x02\x08\x06B\x04\n\x00\x10\n"
)


def version() -> str:
    """The runtime's version."""
    return str(onnxruntime.__version__)


def _saturates() -> bool:
    """Whether products of uint8 and int8 are wrong here: without VNNI, x86 adds two of them in 16 bits.

    The product is tried out, because ONNX Runtime would take its exact and slower kernels on any x86 processor that it
    is asked to.
    """
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
    most = {"a": np.full((1, 4), 255, np.uint8), "b": np.full((4, 1), 127, np.int8)}
    return bool(session.run(None, most)[0].item() != 4 * 255 * 127)


# What this processor needs for int8 to be right. Tried when the runtime is imported: loading a file is timed.
SETTINGS: dict[str, str] = EXACT if _saturates() else {}


def load(path: str, *, threads: int, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> Session:
    """A session on the .onnx file at `path`; its own names, in the order of `inputs` and `outputs` where given.

    Raises ValueError for names that the file does not have, and for a dtype that numpy has no name for. What ONNX
    Runtime raises on a corrupt file passes through.
    """
    session = onnxruntime.InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
    return OnnxSession(session, inputs, outputs)


def trace(
    path: str, into: Path, *, threads: int, inputs: Sequence[str], feeds: Sequence[Mapping[str, np.ndarray]], runs: int
) -> None:
    """Run the file `runs` times on `feeds` in turn, and leave ONNX Runtime's own profile (JSON) in the file `into`."""
    options = session_options(threads)
    options.enable_profiling = True
    options.profile_file_prefix = str(into)
    profiled = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session = OnnxSession(profiled, inputs, ())
    for i in range(runs):
        session.run(feeds[i % len(feeds)])
    session.close()
    Path(profiled.end_profiling()).replace(into)


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """ONNX Runtime's options for a file that is run on so many threads, with SETTINGS."""
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    for key, value in SETTINGS.items():
        options.add_session_config_entry(key, value)
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
