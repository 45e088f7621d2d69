"""Sparsity of an exported file: which of the weights that it stores are zero."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import EdgeKitError

if TYPE_CHECKING:
    import numpy as np

WEIGHTS = {"float32", "float16", "int8"}  # dtypes that weights are stored in


def weights(path: Path) -> list[np.ndarray]:
    """Returns every constant of two dimensions or more with a dtype of WEIGHTS, in the order and layout of the file.

    Raises EdgeKitError for a file that is damaged or of no known format.
    """
    readers = {".onnx": _onnx, ".tflite": _tflite, ".pte": _pte}
    if path.suffix not in readers:
        raise EdgeKitError(f"{path} is no exported file", f"name one of {', '.join(readers)}")
    try:
        return [array for array in readers[path.suffix](path) if array.ndim > 1 and array.dtype.name in WEIGHTS]
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise EdgeKitError(f"cannot read the weights of {path}: {error}", "export it again") from None


def count_zeros(path: Path) -> tuple[int, int]:
    """Returns how many weights of a file are zero, and how many it has."""
    found = weights(path)
    return sum(int((array == 0).sum()) for array in found), sum(array.size for array in found)


def _onnx(path: Path) -> Iterator[np.ndarray]:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path)
    except DecodeError as error:
        raise ValueError(str(error)) from None
    for tensor in model.graph.initializer:
        yield onnx.numpy_helper.to_array(tensor)


def _tflite(path: Path) -> Iterator[np.ndarray]:
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    from edgekit.artifacts.tflite_file import DTYPES

    data = path.read_bytes()
    model = schema.Model.GetRootAs(data, 0)
    seen = set()
    for index in range(model.SubgraphsLength()):
        graph = model.Subgraphs(index)
        for number in range(graph.TensorsLength()):
            tensor = graph.Tensors(number)
            buffer, dtype = model.Buffers(tensor.Buffer()), DTYPES[tensor.Type()]
            if dtype not in WEIGHTS or tensor.Buffer() in seen or not (buffer.DataLength() or buffer.Size()):
                continue
            seen.add(tensor.Buffer())
            # Files over 2 GB keep their buffers behind the flatbuffer.
            raw = (
                buffer.DataAsNumpy().tobytes()
                if buffer.DataLength()
                else data[buffer.Offset() : buffer.Offset() + buffer.Size()]
            )
            yield np.frombuffer(raw, dtype).reshape([tensor.Shape(i) for i in range(tensor.ShapeLength())])


def _pte(path: Path) -> Iterator[np.ndarray]:
    import numpy as np

    from edgekit.artifacts.pte_file import Program

    for dtype, shape, raw in Program(path.read_bytes()).constant_values():
        if dtype in WEIGHTS:
            yield np.frombuffer(raw, dtype).reshape(shape)
