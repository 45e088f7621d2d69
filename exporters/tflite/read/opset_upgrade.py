"""Bring a foreign ONNX model to what the reader takes: open dimensions given sizes, old operators made new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import version_converter

from edgekit.errors import EdgeKitError, reason

OLDEST_OPSET = 13
CHANGED_RESIZE = 11  # the opset
TOLERANCE = 1e-5  # of the largest value: the same kernels in another order
_HELP = "convert it with onnx.version_converter and check the result, or export it anew"


def opset(model: onnx.ModelProto) -> int:
    """Version of the ONNX operators that a model imports; 0 where it imports none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller gives: those that are not weights."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def dims(value: onnx.ValueInfoProto) -> list[onnx.TensorShapeProto.Dimension]:
    """The dimensions of a tensor as declared."""
    return list(value.type.tensor_type.shape.dim)


def is_open(dim: onnx.TensorShapeProto.Dimension) -> bool:
    """Whether a dimension has no size. Some exporters write −1 for that."""
    return not dim.HasField("dim_value") or dim.dim_value == -1


def has_fixed_shapes(model: onnx.ModelProto) -> bool:
    """Whether every input has a size along each dimension."""
    return all(
        value.type.tensor_type.HasField("shape") and not any(map(is_open, dims(value))) for value in inputs(model)
    )


def with_shapes(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """A copy of a model whose inputs have the given shapes, by name; sizes that the model fixes cannot change.

    Raises EdgeKitError for an input that the model does not have, and for a shape that contradicts it.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    values = {value.name: value for value in inputs(fixed)}
    for name, shape in shapes.items():
        if name not in values:
            raise EdgeKitError(f"the ONNX model has no input '{name}'", f"its inputs: {', '.join(values)}")
        tensor = values[name].type.tensor_type
        declared = dims(values[name])
        fits = len(declared) == len(shape) if tensor.HasField("shape") else True
        if not fits or any(
            not is_open(dim) and dim.dim_value != size for dim, size in zip(declared, shape, strict=False)
        ):
            written = [dim.dim_param or "?" if is_open(dim) else dim.dim_value for dim in declared]
            raise EdgeKitError(
                f"input '{name}' of the ONNX model has the shape {written}, not {list(shape)}", "give sizes that fit"
            )
        tensor.shape.CopyFrom(onnx.helper.make_tensor_type_proto(1, shape).tensor_type.shape)
    # What the file says of the values in between holds for open dimensions.
    del fixed.graph.value_info[:]
    for value in fixed.graph.output:
        for dim in dims(value):
            dim.Clear()
    return fixed


def upgraded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in opset 13 where it is older, after both gave the same results in ONNX Runtime on random inputs.

    Raises EdgeKitError where it cannot be converted, or is not the same afterwards.
    """
    old = opset(model)
    if old >= OLDEST_OPSET or old == 0:
        return model
    what = f"the ONNX model uses opset {old}, and TFLite export reads opset {OLDEST_OPSET} and newer"
    try:
        new = version_converter.convert_version(model, OLDEST_OPSET)
        if old < CHANGED_RESIZE:
            _keep_coordinates(new)
        onnx.checker.check_model(new)
        # With an open shape there is nothing to run, and the reader refuses the model.
        same = not has_fixed_shapes(model) or _same(model, new)
    except Exception as error:
        raise EdgeKitError(f"{what}; upgrading it failed: {reason(error)}", _HELP) from error
    if not same:
        raise EdgeKitError(f"{what}; upgrading it changed its results", _HELP)
    return new


def _keep_coordinates(model: onnx.ModelProto) -> None:
    """Write how Resize read coordinates before opset 11: the converter leaves the new defaults, which are others."""
    for node in model.graph.node:
        if node.op_type == "Resize":
            old = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            given = {attribute.name for attribute in node.attribute}
            node.attribute.extend(onnx.helper.make_attribute(*each) for each in old.items() if each[0] not in given)


def _same(model: onnx.ModelProto, other: onnx.ModelProto) -> bool:
    feeds = random_feeds(model)
    for first, second in zip(run(model, feeds), run(other, feeds), strict=True):
        if first.shape != second.shape or first.dtype != second.dtype:
            return False
        size = float(np.abs(first).max()) if first.size and first.dtype.kind == "f" else 0.0
        if not np.allclose(first, second, rtol=TOLERANCE, atol=TOLERANCE * size, equal_nan=True):
            return False
    return True


def random_feeds(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Seeded inputs of fixed shapes: normal numbers, zeros for integers, which may be indices, and random truths."""
    rng = np.random.default_rng(0)
    feeds = {}
    for value in inputs(model):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = [dim.dim_value for dim in dims(value)]
        numbers = rng.standard_normal(shape) if dtype.kind == "f" else np.zeros(shape)
        feeds[value.name] = np.asarray(rng.random(shape) < 0.5 if dtype == np.bool_ else numbers).astype(dtype)
    return feeds


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a model in ONNX Runtime; its own exceptions where it refuses the model or the feeds."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))
