"""What types the runtime's kernels take: asking for another one aborts the process or computes nonsense."""

from __future__ import annotations

import numpy as np

from edgekit.exporters.tflite.ir import QParams, Tensor

I32, I64, SMALL, BOOL = "int32", "int64", "int8 uint8 int16", "bool"
COPIES = f"{I32} {I64} {SMALL} {BOOL}"
# Types other than float32, and int8 with parameters, that the data inputs of an operator may have.
TYPES: dict[str, str] = {
    "ABS": I32,
    "ADD": f"{I32} {I64}",
    "ARG_MAX": f"{I32} int8 uint8",
    "ARG_MIN": f"{I32} int8 uint8",
    "BITWISE_XOR": f"{I32} int8 uint8 int16 uint16 uint32",
    "BROADCAST_TO": COPIES,
    "CAST": f"{COPIES} uint16 uint32 float64",
    "CONCATENATION": COPIES,
    "CUMSUM": f"{I32} {I64}",
    "DEPTH_TO_SPACE": f"{I32} {I64} int8 uint8",
    "DEQUANTIZE": "float16 int8",
    "DIV": I32,
    "DYNAMIC_UPDATE_SLICE": COPIES,
    "EQUAL": f"{I32} {I64} {BOOL}",
    "FILL": COPIES,
    "FLOOR_DIV": I32,
    "FLOOR_MOD": f"{I32} {I64}",
    "GATHER": COPIES,
    "GATHER_ND": f"{I32} {I64} {SMALL} {BOOL}",
    "GREATER": f"{I32} {I64}",
    "GREATER_EQUAL": f"{I32} {I64}",
    "LESS": f"{I32} {I64}",
    "LESS_EQUAL": f"{I32} {I64}",
    "LOGICAL_AND": BOOL,
    "LOGICAL_NOT": BOOL,
    "LOGICAL_OR": BOOL,
    "MAXIMUM": f"{I32} {I64} {SMALL}",
    "MINIMUM": f"{I32} {I64} {SMALL}",
    "MIRROR_PAD": f"{I32} {I64} {SMALL}",
    "MUL": f"{I32} {I64}",
    "NEG": f"{I32} {I64}",
    "NOT_EQUAL": f"{I32} {I64} {BOOL}",
    "ONE_HOT": f"{I32} {I64}",
    "PAD": f"{I32} {I64} {SMALL} {BOOL}",
    "PADV2": f"{I32} {I64} {SMALL}",
    "POW": I32,
    "REDUCE_ALL": BOOL,
    "REDUCE_ANY": BOOL,
    "REDUCE_MAX": f"{I32} {I64} {SMALL}",
    "REDUCE_MIN": f"{I32} {I64} {SMALL}",
    "REDUCE_PROD": f"{I32} {I64}",
    "RESHAPE": f"{COPIES} uint16 uint32 uint64",
    "RESIZE_NEAREST_NEIGHBOR": "int8 uint8 int16",
    "REVERSE_SEQUENCE": f"{I32} {I64}",
    "REVERSE_V2": COPIES,
    "RIGHT_SHIFT": f"{I32} int8 uint8 int16 uint16 uint32",
    "SCATTER_ND": f"{I32} {I64}",
    "SELECT_V2": COPIES,
    "SIGN": I32,
    "SLICE": COPIES,
    "SPACE_TO_DEPTH": f"{I32} {I64} int8 uint8",
    "SPLIT": f"{I32} {SMALL}",
    "SQUARED_DIFFERENCE": I32,
    "STRIDED_SLICE": COPIES,
    "SUB": f"{I32} {I64}",
    "SUM": f"{I32} {I64}",
    "TILE": COPIES,
    "TOPK_V2": f"{I32} {I64} int8 uint8",
    "TRANSPOSE": f"{I32} {I64} {SMALL} {BOOL}",
    "WHILE": I32,
}
# How many axes the kernels take, XNNPACK's included: it fails to prepare a graph with more.
MAX_RANK = {"": 6, "PAD": 5, "PADV2": 5, "MIRROR_PAD": 5, "BATCH_MATMUL": 5}
# The inputs that are data, where the first one is not, or not alone.
DATA = {
    "SELECT_V2": 1,
    "TRANSPOSE_CONV": 2,
    "CONV_3D_TRANSPOSE": 2,
    "SPLIT": 1,
    "SCATTER_ND": 1,
    "ONE_HOT": 2,
    "FILL": 1,
}
# The next larger type that kernels of arithmetic take: results wrap around as the narrow type's do once cast back.
WIDER = {
    np.dtype(narrow): np.dtype(wide)
    for narrow, wide in (
        ("int8", "int32"),
        ("uint8", "int32"),
        ("int16", "int32"),
        ("uint16", "int32"),
        ("uint32", "int64"),
    )
}


# Fixed-point kernels abort or saturate beyond these: no trained tensor is there, but an infinite mask "quantized" is.
SCALES = (1e-15, 1e15)
STEEPEST = 255.0


def rescales(output: QParams, product: float, *inputs: QParams) -> bool:
    """Whether int8 kernels compute with these scales; `product` is the real value of one step before rescaling."""
    scales = [scale for q in (output, *inputs) for scale in q.scale]
    return SCALES[0] <= min(scales) and max(scales) <= SCALES[1] and product <= STEEPEST * output.scale[0]


def takes(kind: str, dtype: np.dtype) -> bool:
    """Whether an operator has a kernel for unquantized data of a type."""
    return dtype == np.float32 or dtype.name in TYPES.get(kind, "").split()


def data_input(kind: str, inputs: list[Tensor | None]) -> Tensor | None:
    """The input whose type decides."""
    index = DATA.get(kind, 0)
    return inputs[index] if index < len(inputs) else None
