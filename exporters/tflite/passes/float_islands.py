"""Say what a converted graph holds that costs time."""

from __future__ import annotations

import numpy as np

from edgekit.exporters.tflite.ir import Op, Tensor

MOVES = {"TRANSPOSE", "RESHAPE", "DEQUANTIZE", "QUANTIZE"}


def float_islands(ops: list[Op]) -> list[str]:
    """Name the float ops that lie between int8 ones: they read what was dequantized, and their result is quantized."""
    from_int8: set[Tensor] = set()
    for op in ops:
        dequantized = op.kind == "DEQUANTIZE" and _runtime_int8(op.inputs[0])
        reads = any(tensor in from_int8 for tensor in op.inputs if tensor is not None)
        if dequantized or (reads and op.kind != "QUANTIZE"):
            from_int8.update(op.outputs)
    to_int8: set[Tensor] = set()
    islands: list[str] = []
    for op in reversed(ops):
        leads = any(tensor in to_int8 for tensor in op.outputs)
        if leads or (op.kind == "QUANTIZE" and op.inputs[0] is not None and op.inputs[0].dtype == np.float32):
            to_int8.update(tensor for tensor in op.inputs if tensor is not None and tensor.dtype == np.float32)
        if leads and op.kind not in MOVES and any(tensor in from_int8 for tensor in op.outputs):
            islands.append(f"float {op.kind} between int8 ops, from ONNX node '{op.source}'")
    return islands[::-1]


def _runtime_int8(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.data is None and tensor.dtype == np.int8
