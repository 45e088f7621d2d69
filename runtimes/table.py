"""Runtimes: which runtimes there are, and which of them runs a file."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, NamedTuple

from edgekit.errors import EdgeKitError


class Runtime(NamedTuple):
    """One runtime: the format that it runs, its module, the modules that one needs, and what pip calls the runtime."""

    format: str
    module: str
    helpers: tuple[str, ...]
    package: str


RUNTIMES: dict[str, Runtime] = {
    "executorch": Runtime("executorch", "pte", ("session",), "executorch"),
    "onnxruntime": Runtime("onnx", "ort", ("session",), "onnxruntime"),
    "litert": Runtime("tflite", "litert", ("session", "interpreter", "litert_profiler"), "ai-edge-litert"),
    "tflite-runtime": Runtime("tflite", "tflite_rt", ("session", "interpreter"), "tflite-runtime==2.14.0 'numpy<2'"),
}

# Fields of ONNX's ModelProto, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
GRAPH_FIELD = 7
OPSET_IMPORT_FIELD = 8
MODEL_FIELDS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26})


def format_of(path: str | Path) -> str:
    """The format of a file, read from its content: "executorch", "onnx" or "tflite".

    Raises EdgeKitError when it is none of them or cannot be read.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            file.seek(0)
            if head[4:8] == b"TFL3":
                return "tflite"
            if head[4:6] == b"ET" and head[6:8].isdigit():
                return "executorch"
            if _is_onnx(file, size):
                return "onnx"
    except OSError as error:
        raise EdgeKitError(f"cannot read {path}: {error.strerror}") from error
    raise EdgeKitError(
        f"{path} is not a file that EdgeKit can run",
        "it runs ExecuTorch (.pte), ONNX (.onnx) and TFLite (.tflite) files",
    )


def runtime_for(path: str | Path) -> str:
    """The name in RUNTIMES that runs the file at `path` by default. Raises EdgeKitError as `format_of` does."""
    kind = format_of(path)
    return next(name for name, runtime in RUNTIMES.items() if runtime.format == kind)


def _is_onnx(file: BinaryIO, size: int) -> bool:
    """Whether the file is one protobuf message with the fields of a ModelProto, a graph and an opset among them."""
    seen = set()
    while file.tell() < size:
        key = _varint(file)
        if key is None or key >> 3 not in MODEL_FIELDS:
            return False
        seen.add(key >> 3)
        value = _varint(file)
        if value is None or key & 7 not in (0, 2):
            return False
        if key & 7 == 2:
            if value > size - file.tell():
                return False
            file.seek(value, 1)
    return {GRAPH_FIELD, OPSET_IMPORT_FIELD} <= seen


def _varint(file: BinaryIO) -> int | None:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None
