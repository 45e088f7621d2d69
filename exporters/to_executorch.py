"""ExecuTorch: .pte programs with the XNNPACK delegate."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS, ConstantPadConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from torch.export import ExportedProgram

from edgekit.errors import EdgeKitError

# What the exporter notes on every node; the dozens of passes that follow would copy it deeply each time.
NOTES = ("from_node", "nn_module_stack", "stack_trace", "source_fn_stack")

BOOKKEEPING = {"executorch_call_delegate", "getitem", "alloc"}  # graph nodes that compute nothing


class QuantizedPadConfig(ConstantPadConfig):
    """Lets XNNPACK pad int8 codes, which it folds into the convolution that follows.

    ExecuTorch's own row pads in float, between a conversion from int8 and one back.
    """

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        """Float and static int8."""
        return [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]


PARTITIONER_CONFIGS = [QuantizedPadConfig if row is ConstantPadConfig else row for row in ALL_PARTITIONER_CONFIGS]


@dataclass(frozen=True)
class Lowered:
    """A .pte file's bytes, how many delegates it calls, and the ops that stayed outside them (name → count)."""

    data: bytes
    delegates: int
    undelegated: dict[str, int]


def to_executorch(program: ExportedProgram) -> Lowered:
    """Lowers a captured `program` to ExecuTorch, with XNNPACK taking every op that it can.

    Raises EdgeKitError for an operator that ExecuTorch has no kernel for.
    """
    for node in program.graph.nodes:
        for note in NOTES:
            node.meta.pop(note, None)
    try:
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner(configs=PARTITIONER_CONFIGS)],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        lowered = edge.to_executorch()
    except (RuntimeError, NotImplementedError) as error:
        raise EdgeKitError(
            f"ExecuTorch cannot lower this model: {error}", "leave it out with --format onnx,tflite"
        ) from error
    names = [_name(n) for n in edge.exported_program().graph.nodes if n.op == "call_function"]
    outside = Counter(name for name in names if name not in BOOKKEEPING)
    return Lowered(lowered.buffer, names.count("executorch_call_delegate"), dict(outside))


def _name(node: torch.fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None else node.target.__name__
