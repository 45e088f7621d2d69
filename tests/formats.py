"""A captured program as the file of each format, run in this process."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch.export import ExportedProgram

from edgekit.exporters.executorch.lower import to_executorch
from edgekit.exporters.onnx.export import to_onnx
from edgekit.exporters.onnx.ort_passes import for_onnxruntime
from edgekit.exporters.tflite import convert
from edgekit.types import SUFFIXES

RUNTIMES = {"executorch": "pte", "onnx": "ort", "tflite": "litert"}


def emit(program: ExportedProgram, format: str, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """Returns the file of a format."""
    if format == "executorch":
        return to_executorch(program).data
    proto = to_onnx(program, inputs, outputs)
    return convert(proto) if format == "tflite" else for_onnxruntime(proto).SerializeToString()


def run(data: bytes, format: str, feeds: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Returns what a file with `count` outputs gives."""
    inputs, outputs = [f"in{i}" for i in range(len(feeds))], [f"out{i}" for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{SUFFIXES[format]}"
        path.write_bytes(data)
        session = import_module(f"edgekit.runtimes.{RUNTIMES[format]}").load(
            str(path), threads=1, inputs=inputs, outputs=outputs
        )
        results = session.run({name: feed.numpy() for name, feed in zip(inputs, feeds, strict=True)})
        session.close()
    return [torch.from_numpy(results[name]) for name in outputs]


def through(program: ExportedProgram, format: str, feeds: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns what the file of `format` gives for `feeds`."""
    results = program.module()(*feeds)
    count = len(results) if isinstance(results, tuple | list) else 1
    names = [f"in{i}" for i in range(len(feeds))], [f"out{i}" for i in range(count)]
    return run(emit(program, format, *names), format, feeds, count)
