"""The table of lowerings: ONNX op name → function(builder, node, *, attributes)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import EdgeKitError

if TYPE_CHECKING:
    from edgekit.exporters.tflite.builder import Builder
    from edgekit.exporters.tflite.ir import Node

Lowering = Callable[..., None]
LOWERINGS: dict[str, Lowering] = {}
LARGEST = 2**31 - 1
EMPTY_PARTS = ("Concat", "Split")  # some of their inputs or outputs may be empty
COMPUTED = ("float32", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "bool")


def lowers(*ops: str) -> Callable[[Lowering], Lowering]:
    """Register a function as the lowering of ONNX ops. Its keyword-only parameters are the attributes it handles."""

    def register(function: Lowering) -> Lowering:
        for op in ops:
            if op in LOWERINGS:
                raise ValueError(f"two lowerings for ONNX op {op}")
            LOWERINGS[op] = function
        return function

    return register


def lower(builder: Builder, node: Node) -> None:
    """Lower one node; an op without a lowering and an attribute that a lowering does not name are errors."""
    lowering = LOWERINGS.get(node.op)
    if lowering is None:
        raise no_lowering(node)
    attributes: dict[str, Any] = {}
    parameters = inspect.signature(lowering).parameters
    for name, value in node.attrs.items():
        if name not in parameters or parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY:
            raise EdgeKitError(
                f"TFLite export does not handle the attribute '{name}' of ONNX op {node}",
                "export with --format onnx or executorch, or extend the lowering in exporters/tflite/ops",
            )
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and abs(number) > LARGEST for number in numbers):
            raise unsupported(node, f"its attribute '{name}' is {value}, and TFLite counts to {LARGEST}")
        attributes[name] = value
    _check_values(builder, node)
    if all(0 in builder.shape(name) for name in node.outputs if name):
        for name in filter(None, node.outputs):
            builder.bind(name, builder.const(np.zeros(builder.shape(name), builder.dtype(name))))
        return
    lowering(builder, node, **attributes)


def _check_values(builder: Builder, node: Node) -> None:
    """Refuse types that TFLite computes nothing with, and empty tensors where kernels do not expect them."""
    for name in filter(None, [*node.inputs, *node.outputs]):
        info = builder.graph.info[name]
        if name in node.outputs and info.dtype.name not in COMPUTED:
            raise unsupported(node, f"it makes {info.dtype}, and TFLite computes with {', '.join(COMPUTED)}")
        if math.prod(info.shape) > LARGEST:
            raise unsupported(node, f"'{name}' has {math.prod(info.shape)} elements, and TFLite counts to {LARGEST}")
        empty = 0 in info.shape and name not in builder.graph.constants
        if empty and node.op not in EMPTY_PARTS and not all(0 in builder.shape(out) for out in node.outputs if out):
            raise unsupported(node, f"'{name}' is empty, with shape {list(info.shape)}")


def no_lowering(node: Node) -> EdgeKitError:
    """The error for an op that nothing here lowers."""
    return EdgeKitError(
        f"TFLite export has no lowering for ONNX op {node}",
        "export with --format onnx or executorch, or add a lowering in exporters/tflite/ops",
    )


def unsupported(node: Node, what: str) -> EdgeKitError:
    """The error for a case of a supported op that TFLite cannot express."""
    return EdgeKitError(
        f"TFLite export cannot lower ONNX op {node}: {what}",
        "change the model at this node, or export with --format onnx or executorch",
    )
