"""Resize: any of ONNX's modes along any axes, because each is a constant matrix per axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime

from edgekit.exporters.tflite.builder import FLOAT, Builder
from edgekit.exporters.tflite.ir import Node, Tensor, channels_last
from edgekit.exporters.tflite.ops.reduction import averaged_q
from edgekit.exporters.tflite.ops.shape import gathered
from edgekit.exporters.tflite.registry import lowers, unsupported

NHWC = channels_last(4)


@lowers("Resize")
def resize(
    b: Builder,
    node: Node,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> None:
    """RESIZE_NEAREST_NEIGHBOR or RESIZE_BILINEAR where one computes the same; else gathers or products per axis."""
    if coordinate_transformation_mode == "tf_crop_and_resize":
        raise unsupported(node, "coordinate_transformation_mode tf_crop_and_resize")
    value = b.settle(b.value(node.inputs[0]))
    source, target = value.shape, b.shape(node.outputs[0])
    attributes = {
        "antialias": antialias,
        "coordinate_transformation_mode": coordinate_transformation_mode,
        "cubic_coeff_a": cubic_coeff_a,
        "exclude_outside": exclude_outside,
        "mode": mode,
        "nearest_mode": nearest_mode,
    }
    scales = _scales(b, node, axes, keep_aspect_ratio_policy)
    if coordinate_transformation_mode == "align_corners" and any(
        abs(scale * size - out) > 1e-4 for scale, size, out in zip(scales, source, target, strict=True)
    ):
        raise unsupported(
            node, "align_corners with a scale that makes no whole number, which runtimes read differently"
        )
    changed = [axis for axis, scale in enumerate(scales) if source[axis] != target[axis] or scale != 1]
    matrices = {axis: _matrix(node, source[axis], target[axis], scales[axis], attributes) for axis in changed}
    picks = all(_one_hot(matrix) for matrix in matrices.values())
    q = b.common_q(node, node.inputs[:1]) if picks else None
    builtin = _builtin(matrices, picks, source, target)
    if builtin is not None:
        kind, options = builtin
        x = b.take(node.inputs[0], NHWC, q if picks else averaged_q(b, node))
        size = np.array(target[2:], np.int32)
        shape = (x.shape[0], *target[2:], x.shape[3])
        b.bind(node.outputs[0], b.op(kind, [x, size], shape, q=x.q, **options), NHWC)
        return
    if not picks and b.dtype(node.inputs[0]) != FLOAT:
        raise unsupported(node, f"interpolation of {b.dtype(node.inputs[0])}")
    x, perm = b.held_as(value.tensor, q), value.perm
    for axis, matrix in matrices.items():
        physical = perm.index(axis)
        x = gathered(b, x, matrix.argmax(1), physical) if picks else _product(b, x, matrix, physical)
    b.bind(node.outputs[0], x, perm)


def _scales(b: Builder, node: Node, axes: Sequence[int] | None, policy: str) -> list[float]:
    """The scale of each axis: as given, or from the sizes."""
    source, target = b.shape(node.inputs[0]), b.shape(node.outputs[0])
    given = b.array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    scales = [out / size if size else 1.0 for size, out in zip(source, target, strict=True)]
    if given is not None and given.size:
        for axis, scale in zip(axes if axes is not None else range(len(source)), given, strict=True):
            scales[axis] = float(scale)
    elif policy != "stretch":
        raise unsupported(node, f"keep_aspect_ratio_policy {policy}")
    return scales


def _matrix(source: Node, size: int, out: int, scale: float, attributes: dict[str, Any]) -> np.ndarray:
    """The [out, size] matrix that resizes one axis: what ONNX Runtime makes of the unit vectors."""
    exact = scale == out / size
    sizes = np.array([1, 1, size, out], np.int64)
    inputs = ["x", "", "", "sizes"] if exact else ["x", "", "scales"]
    feeds = [("sizes", sizes)] if exact else [("scales", np.array([1, 1, 1, scale], np.float32))]
    node = onnx.helper.make_node("Resize", inputs, ["y"], **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "axis",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 1, size, size])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in feeds],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=10)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        matrix = session.run(None, {"x": np.eye(size, dtype=np.float32)[None, None]})[0][0, 0].T
    except Exception as error:
        raise unsupported(source, str(error).strip().splitlines()[0]) from error
    return np.ascontiguousarray(matrix)


def _one_hot(matrix: np.ndarray) -> bool:
    return bool(((matrix == 0) | (matrix == 1)).all() and (matrix.sum(1) == 1).all())


def _builtin(
    matrices: dict[int, np.ndarray], picks: bool, source: Sequence[int], target: Sequence[int]
) -> tuple[str, dict[str, bool]] | None:
    """The TFLite op and options that compute these matrices over axes 2 and 3, if there is one."""
    if len(source) != 4 or not set(matrices) <= {2, 3}:
        return None
    for options in ({"halfPixelCenters": True}, {"alignCorners": True}, {}):
        candidates = {
            axis: _tflite_matrix(
                source[axis], target[axis], picks, "halfPixelCenters" in options, "alignCorners" in options
            )
            for axis in (2, 3)
        }
        wanted = {axis: matrices.get(axis, np.eye(source[axis], dtype=np.float32)) for axis in (2, 3)}
        if all(np.abs(candidates[axis] - wanted[axis]).max() < 1e-5 for axis in (2, 3)):
            return "RESIZE_NEAREST_NEIGHBOR" if picks else "RESIZE_BILINEAR", options
    return None


def _tflite_matrix(size: int, out: int, nearest: bool, half_pixel: bool, align_corners: bool) -> np.ndarray:
    """What TFLite's kernels compute along one axis (reference_ops ResizeNearestNeighbor and ResizeBilinear)."""
    scale = np.float32((size - 1) / (out - 1)) if align_corners and out > 1 else np.float32(size / out)
    x = np.arange(out, dtype=np.float32)
    rows = np.arange(out)
    matrix = np.zeros((out, size), np.float32)
    if nearest:
        position = (x + np.float32(0.5 if half_pixel else 0)) * scale
        index = np.floor(position + np.float32(0.5)) if align_corners else np.floor(position)
        matrix[rows, np.clip(index, 0, size - 1).astype(int)] = 1
        return matrix
    position = (x + np.float32(0.5)) * scale - np.float32(0.5) if half_pixel else x * scale
    lower = np.maximum(np.floor(position), 0).astype(int)
    upper = np.minimum(np.ceil(position), size - 1).astype(int)
    lower = np.minimum(lower, size - 1)
    weight = np.clip(position - lower, 0, 1)
    np.add.at(matrix, (rows, lower), 1 - weight)
    np.add.at(matrix, (rows, upper), weight)
    return matrix


def _product(b: Builder, x: Tensor, matrix: np.ndarray, axis: int) -> Tensor:
    """Multiply along a physical axis: [before, size, after] by the matrix from the left."""
    before, after = int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis + 1 :]))
    out, size = matrix.shape
    stacked = b.raw_reshape(x, (before, size, after))
    left = b.const(np.broadcast_to(matrix, (before, out, size)).copy()) if before <= 4 else b.const(matrix[None])
    product = b.op(
        "BATCH_MATMUL", [left, stacked], (before, out, after), adjX=False, adjY=False, asymmetricQuantizeInputs=False
    )
    return b.raw_reshape(product, (*x.shape[:axis], out, *x.shape[axis + 1 :]))
