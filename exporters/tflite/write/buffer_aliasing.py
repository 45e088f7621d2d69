"""Keep the runtime from overwriting values that are still to be read.

LiteRT's memory planner lets a RESHAPE share its input's buffer, and lets elementwise ops write over an input that
nothing else reads. It counts the readers of the tensor that owns the buffer and misses those of the tensors that
share it. In t = f(a); r = RESHAPE(t); y = g(r); z = h(t), with f and g in place, g overwrites t before h reads it.
"""

from __future__ import annotations

import numpy as np

from edgekit.exporters.tflite.ir import Op, Tensor

# These never write over their input; of others it may not be assumed.
SEPARATE = {
    "AVERAGE_POOL_2D", "BATCH_MATMUL", "CONCATENATION", "CONV_2D", "CONV_3D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED",
    "GATHER", "MAX_POOL_2D", "MEAN", "PAD", "REDUCE_MAX", "REDUCE_MIN", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR",
    "SPLIT", "STRIDED_SLICE", "SUM", "TRANSPOSE", "TRANSPOSE_CONV",
}  # fmt: skip


def protect(ops: list[Op], outputs: list[Tensor]) -> list[Op]:
    """Copy a reshaped tensor before an op that might write over it while what it was made from is still to be read."""
    makers = {tensor: op for op in ops for tensor in op.outputs}
    last: dict[Tensor, int] = {}
    readers: dict[Tensor, int] = {}
    for index, op in enumerate(ops):
        for tensor in (tensor for tensor in op.inputs if tensor is not None):
            last[tensor] = index
            readers[tensor] = readers.get(tensor, 0) + 1
    last |= dict.fromkeys(outputs, len(ops))
    result: list[Op] = []
    for index, op in enumerate(ops):
        if op.kind not in SEPARATE and op.kind != "RESHAPE":
            for place, shared in enumerate(op.inputs):
                if shared is not None and _endangers(shared, index, makers, last, readers):
                    copy = Tensor(f"{shared.name}_copy{index}", shared.shape, shared.dtype, None, shared.q)
                    result += _copy(shared, copy, op.source)
                    op.inputs[place] = copy
        result.append(op)
    return result


def _endangers(
    tensor: Tensor, index: int, makers: dict[Tensor, Op], last: dict[Tensor, int], readers: dict[Tensor, int]
) -> bool:
    """Whether a tensor that op number `index` may overwrite shares its buffer with one that is read later."""
    maker = makers.get(tensor)
    while maker is not None and maker.kind == "RESHAPE" and maker.inputs[0] is not None:
        source = maker.inputs[0]
        maker = makers.get(source)
        counted = source.data is not None or maker is None or (maker.kind in SEPARATE and readers[source] > 1)
        if last[source] > index and not counted:
            return True
    return False


def _copy(tensor: Tensor, copy: Tensor, source: str) -> list[Op]:
    """Ops that write `tensor` into a buffer of its own, that of `copy`."""
    if not tensor.shape:  # XNNPACK has no SLICE of a scalar: the copy is that of a vector of one element
        vectors = [Tensor(f"{copy.name}_{part}", (1,), tensor.dtype, None, tensor.q) for part in ("vector", "cut")]
        return [
            _reshape(tensor, vectors[0], source),
            *_copy(vectors[0], vectors[1], source),
            _reshape(vectors[1], copy, source),
        ]
    begin, size = np.zeros(len(tensor.shape), np.int32), np.array(tensor.shape, np.int32)
    cut = [_constant(f"{copy.name}_{part}", array) for part, array in (("begin", begin), ("size", size))]
    return [Op("SLICE", [tensor, *cut], [copy], {}, source)]


def _reshape(tensor: Tensor, other: Tensor, source: str) -> Op:
    shape = _constant(f"{other.name}_shape", np.array(other.shape, np.int32))
    return Op("RESHAPE", [tensor, shape], [other], {"newShape": list(other.shape)}, source)


def _constant(name: str, array: np.ndarray) -> Tensor:
    return Tensor(name, array.shape, array.dtype, array)
