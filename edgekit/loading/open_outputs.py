"""Outputs of data-dependent shape: which of a model's outputs have as many rows as masks or NMS find."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from edgekit.types import TensorSpec
from edgekit.util.ragged_arrays import OPEN

if TYPE_CHECKING:
    import onnx

TAGS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
MASKS = (torch.bool, torch.uint8)  # indices of these types select, all others count
# ONNX ops whose outputs have as many rows as the values of their inputs make them have.
ONNX_OPS = {"NonZero", "NonMaxSuppression", "Unique", "Compress", "StringSplit", "SequenceAt", "ConcatFromSequence"}


class Watch(TorchDispatchMode):
    """Tells whether a torch op ran under it whose output's shape depends on values."""

    supports_higher_order_operators = True  # branches and loops of an exported program

    def __init__(self) -> None:
        """Nothing is seen yet."""
        super().__init__()
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an op as it is."""
        if TAGS.intersection(getattr(func, "tags", ())):
            is_index = func is torch.ops.aten.index.Tensor
            by_number = is_index and all(i is None or i.dtype not in MASKS for i in args[1])
            self.seen = self.seen or not by_number
        return func(*args, **(kwargs or {}))


def open_torch(
    module: torch.nn.Module, example: tuple[torch.Tensor, ...], outputs: Sequence[TensorSpec]
) -> tuple[TensorSpec, ...]:
    """Returns the specs of a module's outputs with OPEN where the captured graph has a size that values decide.

    A module that cannot be captured keeps its specs: the export says why.
    """
    from edgekit.quant.graph.capture_errors import told

    try:
        with told():
            program = torch.export.export(module, example, strict=False)
    except Exception:
        return tuple(outputs)
    given = program.graph.output_node().args[0][: len(outputs)]
    values = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in given]
    sizes = [[not isinstance(size, int) for size in getattr(value, "shape", ())] for value in values]
    return tuple(_opened(spec, loose) for spec, loose in zip(outputs, sizes, strict=True))


def open_onnx(graph: onnx.GraphProto, outputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Returns the specs of an ONNX graph's outputs with OPEN for what lies behind ONNX_OPS and is declared open."""
    behind: set[str] = set()
    for node in graph.node:
        if node.op_type in ONNX_OPS or _inside(node) or behind.intersection(node.input):
            behind.update(node.output)
    fed = {dim.dim_param for value in graph.input for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    result = []
    for spec, value in zip(outputs, graph.output, strict=True):
        dims = value.type.tensor_type.shape.dim
        loose = [not dim.HasField("dim_value") and dim.dim_param not in fed for dim in dims]
        loose = loose if len(dims) == len(spec.shape) else [axis == 0 for axis in range(len(spec.shape))]
        result.append(_opened(spec, loose) if value.name in behind else spec)
    return tuple(result)


def _inside(node: onnx.NodeProto) -> bool:
    graphs = [a.g for a in node.attribute if a.HasField("g")]
    return any(inner.op_type in ONNX_OPS or _inside(inner) for graph in graphs for inner in graph.node)


def _opened(spec: TensorSpec, loose: Iterable[bool]) -> TensorSpec:
    return replace(spec, shape=tuple(OPEN if is_open else n for n, is_open in zip(spec.shape, loose, strict=True)))
