"""Operator versions, and the first TFLite runtime that has a kernel for each.

A runtime refuses a file whose operators have versions that it does not know, and computes nonsense from one that
claims a lower version than it uses. What needs which version is read from TFLite's
tensorflow/lite/tools/versioning/op_version.cc, and which release brought it from runtime_version.cc beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from edgekit.exporters.tflite.ir import Op, Tensor, all_ops
from edgekit.exporters.tflite.kernel_support import data_input

# The last release of the package `tflite-runtime`; LiteRT came after it.
LAST_TFLITE_RUNTIME = "2.14.0"
# Operator → the minor number of the 2.x release of each of its versions; 0 also stands for releases before 2.0.
RELEASES: dict[str, tuple[int, ...]] = {
    "ABS": (0, 4, 5, 6, 12), "ADD": (0, 0, 4, 6), "ARG_MAX": (0, 0), "ARG_MIN": (0, 0), "ATAN2": (10,),
    "AVERAGE_POOL_2D": (0, 0), "BATCH_MATMUL": (3, 3), "BITWISE_XOR": (13,), "BROADCAST_TO": (5, 5, 5),
    "CAST": (0, 7, 8, 9, 12), "CEIL": (0,), "CONCATENATION": (0, 0, 3), "CONV_2D": (0, 0, 0, 3, 4, 9),
    "CONV_3D": (5,), "CONV_3D_TRANSPOSE": (6,), "COS": (0,), "CUMSUM": (4,), "DEPTHWISE_CONV_2D": (0, 0, 0),
    "DEPTH_TO_SPACE": (1, 5), "DEQUANTIZE": (0, 0, 0, 2, 7), "DIV": (0, 3), "DYNAMIC_UPDATE_SLICE": (9,),
    "ELU": (0,), "EQUAL": (0, 0), "EXP": (0, 12), "FILL": (0,), "FLOOR": (0,), "FLOOR_DIV": (0, 0), "FLOOR_MOD": (0,),
    "FULLY_CONNECTED": (0, 0, 0, 0, 0, 1, 3, 3, 3, 11, 15, 17),
    "GATHER": (0, 0, 0, 4, 5), "GATHER_ND": (0, 3, 5, 13, 16), "GELU": (9, 9), "GREATER": (0, 0),
    "GREATER_EQUAL": (0, 0), "HARD_SWISH": (0,), "LEAKY_RELU": (0, 3), "LESS": (0, 0), "LESS_EQUAL": (0, 0),
    "LOCAL_RESPONSE_NORMALIZATION": (0,), "LOG": (0, 15), "LOGICAL_AND": (0,), "LOGICAL_NOT": (0,),
    "LOGICAL_OR": (0,), "LOGISTIC": (0, 0), "LOG_SOFTMAX": (0, 0), "MAXIMUM": (0, 0, 3, 3), "MAX_POOL_2D": (0, 0),
    "MEAN": (0, 0), "MINIMUM": (0, 0, 3, 3), "MIRROR_PAD": (0, 3, 12), "MUL": (0, 0, 0, 3, 6), "NEG": (0,),
    "NOT_EQUAL": (0, 0), "ONE_HOT": (0,), "PAD": (0, 0, 4, 6), "PADV2": (0, 0, 4, 6), "POW": (0,), "PRELU": (0,),
    "QUANTIZE": (0, 0, 7), "REDUCE_ALL": (6,), "REDUCE_ANY": (0,), "REDUCE_MAX": (0, 0, 5), "REDUCE_MIN": (0, 0, 5),
    "REDUCE_PROD": (0, 6), "RELU": (0, 1), "RELU6": (0, 0), "RELU_N1_TO_1": (0,), "RESHAPE": (0,),
    "RESIZE_BILINEAR": (0, 0, 2), "RESIZE_NEAREST_NEIGHBOR": (0, 0, 3, 4), "REVERSE_SEQUENCE": (0,),
    "REVERSE_V2": (0, 2, 5), "RIGHT_SHIFT": (13,), "ROUND": (0,), "RSQRT": (0, 5), "SCATTER_ND": (1,),
    "SELECT_V2": (2,), "SIGN": (11, 12), "SIN": (0,), "SLICE": (0, 0, 0, 4, 5), "SOFTMAX": (0, 0),
    "SPACE_TO_DEPTH": (0, 0), "SPLIT": (0, 0, 0, 3), "SPLIT_V": (0, 3), "SQRT": (0,), "SQUARE": (0,),
    "SQUARED_DIFFERENCE": (0, 5), "STRIDED_SLICE": (0, 0, 1, 2, 5, 6), "SUB": (0, 0, 3, 4), "SUM": (0, 0),
    "TANH": (0, 0), "TILE": (0, 2, 8), "TOPK_V2": (0, 0), "TRANSPOSE": (0, 0, 0, 3, 4, 12),
    "TRANSPOSE_CONV": (0, 2, 3), "WHILE": (0,),
}  # fmt: skip
# Type of the data input or of an output → operator → the version that such data need. float32 needs the first.
TYPES: dict[str, dict[str, int]] = {
    "int8": {
        "ABS": 2, "ADD": 2, "ARG_MAX": 2, "ARG_MIN": 2, "AVERAGE_POOL_2D": 2, "BATCH_MATMUL": 2, "BROADCAST_TO": 3,
        "CAST": 3, "CONCATENATION": 2, "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "DEPTH_TO_SPACE": 2, "DEQUANTIZE": 2,
        "EQUAL": 2, "EXP": 2, "FULLY_CONNECTED": 4, "GATHER": 2, "GELU": 2, "GREATER": 2, "GREATER_EQUAL": 2,
        "LEAKY_RELU": 2, "LESS": 2, "LESS_EQUAL": 2, "LOG": 2, "LOGISTIC": 2, "LOG_SOFTMAX": 2, "MAXIMUM": 2,
        "MAX_POOL_2D": 2, "MEAN": 2, "MINIMUM": 2, "MIRROR_PAD": 2, "MUL": 2, "NOT_EQUAL": 2, "PAD": 2, "PADV2": 2,
        "QUANTIZE": 2, "REDUCE_MAX": 2, "REDUCE_MIN": 2, "REDUCE_PROD": 2, "RELU": 2, "RELU6": 2,
        "RESIZE_BILINEAR": 2, "RESIZE_NEAREST_NEIGHBOR": 2, "REVERSE_V2": 3, "RSQRT": 2, "SLICE": 2, "SOFTMAX": 2,
        "SPACE_TO_DEPTH": 2, "SPLIT": 2, "SPLIT_V": 2, "SQUARED_DIFFERENCE": 2, "STRIDED_SLICE": 2, "SUB": 2,
        "SUM": 2, "TANH": 2, "TILE": 3, "TOPK_V2": 2, "TRANSPOSE": 2, "TRANSPOSE_CONV": 2,
    },
    "int16": {
        "BROADCAST_TO": 3, "CONCATENATION": 3, "GATHER": 4, "GATHER_ND": 3, "MAXIMUM": 4, "MINIMUM": 4,
        "MIRROR_PAD": 3, "PAD": 3, "PADV2": 3, "REDUCE_MAX": 3, "REDUCE_MIN": 3, "RESIZE_NEAREST_NEIGHBOR": 4,
        "SLICE": 4, "SPLIT": 4, "TRANSPOSE": 5,
    },
    "int32": {"ABS": 5, "SIGN": 2, "SPLIT": 3},
    "int64": {"ADD": 4, "MUL": 5, "SUB": 4},
    "uint16": {"CAST": 4},
    "uint32": {"CAST": 2},
    "float16": {"CAST": 5, "DEQUANTIZE": 3},
    "float64": {"CAST": 5},
    "float32": {"FLOOR_DIV": 2},
    "bool": {"GATHER": 3, "GATHER_ND": 5, "REVERSE_V2": 2, "STRIDED_SLICE": 3, "TRANSPOSE": 3},
}  # fmt: skip
# Operator → (rank of the data, version that it and larger ones need).
RANKS: dict[str, tuple[tuple[int, int], ...]] = {
    "PAD": ((5, 4),), "PADV2": ((5, 4),), "SLICE": ((5, 5),), "STRIDED_SLICE": ((5, 4),), "TRANSPOSE": ((5, 4), (6, 6)),
}  # fmt: skip
# The same, where the inputs differ in shape.
BROADCAST_RANKS = {"DIV": (5, 2), "MAXIMUM": (5, 3), "MINIMUM": (5, 3), "SUB": (5, 3)}
# Operator → option → the version that it needs where it is set.
OPTIONS = {
    "FULLY_CONNECTED": {"keepNumDims": 5},
    "GATHER": {"batchDims": 5},
    "RESIZE_BILINEAR": {"halfPixelCenters": 3},
    "RESIZE_NEAREST_NEIGHBOR": {"alignCorners": 3, "halfPixelCenters": 3},
    "STRIDED_SLICE": {"ellipsisMask": 6, "newAxisMask": 6},
}
WITHDRAWN = {"BROADCAST_TO": 2}  # the first version that any released runtime has
PER_CHANNEL = {"DEQUANTIZE": 5, "QUANTIZE": 3}


def version(op: Op) -> int:
    """Returns the version that an operator has to declare: the highest that its types, ranks and options need."""
    data = data_input(op.kind, op.inputs)
    assert data is not None
    needed = [1, WITHDRAWN.get(op.kind, 1)]
    needed += [TYPES.get(tensor.dtype.name, {}).get(op.kind, 1) for tensor in (data, *op.outputs)]
    rank = len(data.shape)
    needed += [number for least, number in RANKS.get(op.kind, ()) if rank >= least]
    needed += [number for option, number in OPTIONS.get(op.kind, {}).items() if op.options.get(option)]
    shapes = [tensor.shape for tensor in op.inputs if tensor is not None]
    if op.kind in BROADCAST_RANKS and any(a != b for a, b in pairwise(shapes)):
        least, number = BROADCAST_RANKS[op.kind]
        needed.append(number if max(map(len, shapes)) >= least else 1)
    if any(_per_channel(tensor) for tensor in (data, *op.outputs)):
        needed.append(PER_CHANNEL.get(op.kind, 1))
    return max(*needed, _by_shape(op, shapes))


def _by_shape(op: Op, shapes: Sequence[tuple[int, ...]]) -> int:
    if op.kind == "CONV_2D" and shapes[0][-1] != shapes[1][-1]:
        return 6  # grouped
    if op.kind == "DEPTHWISE_CONV_2D" and max(op.options.get(f"dilation{a}Factor", 1) for a in "HW") > 1:
        return 2
    if op.kind == "FULLY_CONNECTED" and op.options.get("asymmetricQuantizeInputs"):
        return 12 if op.inputs[1] is not None and _per_channel(op.inputs[1]) else 9
    if op.kind == "FULLY_CONNECTED" and len(shapes) == 2:
        return 6  # without a bias
    if op.kind == "TRANSPOSE_CONV" and len(shapes) == 4:
        return 3  # with a bias
    return 1


def _per_channel(tensor: Tensor) -> bool:
    return tensor.q is not None and not tensor.q.per_tensor


def min_runtime(ops: Sequence[Op]) -> str:
    """Returns the oldest 2.x release of the TFLite runtime that has a kernel for every operator, `2.9.0` say."""
    return f"2.{max((RELEASES[op.kind][version(op) - 1] for op in all_ops(ops)), default=0)}.0"


def too_new(ops: Sequence[Op]) -> tuple[str, ...]:
    """Returns a note naming the operators that no tflite-runtime has; nothing where one runs the file."""
    last = int(LAST_TFLITE_RUNTIME.split(".")[1])
    new = dict.fromkeys(
        f"{op.kind} version {version(op)}" for op in all_ops(ops) if RELEASES[op.kind][version(op) - 1] > last
    )
    if not new:
        return ()
    return (
        f"the file needs TFLite {min_runtime(ops)} or LiteRT for {', '.join(new)}, and tflite-runtime ended at "
        f"{LAST_TFLITE_RUNTIME}",
    )
