"""The weights of an ONNX model: as arrays, their declared sizes, and the model without them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from edgekit.errors import EdgeKitError

LIGHT = 65536  # bytes: weights larger than this are not given to ONNX's checker


def array(tensor: onnx.TensorProto) -> np.ndarray:
    """A tensor's values; raises EdgeKitError where they are elsewhere, or not as many as it declares."""
    refuse_external(tensor)
    try:
        return numpy_helper.to_array(tensor)
    except ValueError as error:
        raise EdgeKitError(f"the ONNX model's tensor '{tensor.name}' is damaged: {error}", "export it anew") from error


def size(tensor: onnx.TensorProto) -> int:
    """Bytes of the tensor that its type and dimensions declare."""
    if tensor.data_type not in onnx.helper.get_all_tensor_dtypes() or tensor.data_type == onnx.TensorProto.STRING:
        return 0
    return math.prod(tensor.dims) * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large weights made empty: the checker would copy them twice. They are checked when read."""
    light = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _copy(light, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _copy(light.graph, field.name, value)
    for tensor in model.graph.initializer:
        if size(tensor) <= LIGHT or not tensor.HasField("raw_data"):
            light.graph.initializer.add().CopyFrom(tensor)
        else:
            light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=[0], raw_data=b"")
    return light


def _copy(target: Any, name: str, value: Any) -> None:
    field = getattr(target, name)
    if hasattr(field, "extend"):
        field.extend(value)
    elif hasattr(field, "CopyFrom"):
        field.CopyFrom(value)
    else:
        setattr(target, name, value)


def refuse_external(tensor: onnx.TensorProto) -> None:
    """A tensor in another file is not read, wherever the model says that it lies."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise EdgeKitError(
            f"the ONNX model keeps '{tensor.name}' in another file", "load it with onnx.load, which reads both"
        )
