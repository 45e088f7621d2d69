"""ExecuTorch: .pte programs with the XNNPACK delegate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from executorch.backends.xnnpack._passes import XNNPACKPassManager
from executorch.backends.xnnpack._passes.convert_to_sdpa import ConvertToSDPAPass
from executorch.backends.xnnpack._passes.convert_to_upsample_bilinear2d import ConvertToUpsampleBilinear2d
from executorch.backends.xnnpack._passes.decompose_batch_norm import DecomposeBatchNorm
from executorch.backends.xnnpack._passes.decompose_cat import DecomposeConcatenate
from executorch.backends.xnnpack._passes.fuse_batch_norm import FuseBatchNormPass
from executorch.backends.xnnpack._passes.prelu_reshape_pass import PReLUReshapePass
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS, ConstantPadConfig, LinearConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.utils.quant_utils import is_dequant
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.graph_module import contains_any_call_fn_target_op
from executorch.exir.pass_base import ExportPass, NodeMetadata, ProxyValue
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.traceback import NodeSource

from edgekit.errors import EdgeKitError
from edgekit.exporters.pte_weights import prepare_weights

# What the exporter notes on every node; the dozens of passes that follow would copy it deeply each time.
NOTES = ("from_node", "nn_module_stack", "stack_trace", "source_fn_stack")

# Of each constant in the file, in bytes: what XNNPACK asks for. The default of 128 pads every small scale and bias.
ALIGNMENT = 16

# XNNPACK's passes → a part of the name of some op that they are there for.
NEEDS = {
    ConvertToUpsampleBilinear2d: ("upsample", "index"),
    ConvertToSDPAPass: ("softmax",),
    FuseBatchNormPass: ("batch_norm",),
    DecomposeBatchNorm: ("batch_norm",),
    DecomposeConcatenate: ("cat",),
    PReLUReshapePass: ("prelu",),
}

BOOKKEEPING = {"executorch_call_delegate", "getitem", "alloc"}  # graph nodes that compute nothing


class QuantizedPadConfig(ConstantPadConfig):
    """Lets XNNPACK pad int8 codes, which it folds into the convolution that follows.

    ExecuTorch's own row pads in float, between a conversion from int8 and one back.
    """

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        """Float and static int8."""
        return [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]


class WeightOnlyLinearConfig(LinearConfig):
    """Lets XNNPACK take a linear layer with int8 weights and float inputs, for which it has kernels of its own.

    ExecuTorch's own row asks for quantized inputs wherever it sees quantized weights.
    """

    def _detect_precision(self, node: Node) -> ConfigPrecisionType:
        if _is_weight_only(node):
            return ConfigPrecisionType.DYNAMIC_QUANT  # whose weights and outputs are treated alike
        return super()._detect_precision(node)

    def _get_act_deps(self, node: Node, ep: ExportedProgram, precision: ConfigPrecisionType) -> tuple[bool, list[Node]]:
        return (True, []) if _is_weight_only(node) else super()._get_act_deps(node, ep, precision)


def _is_weight_only(linear: Node) -> bool:
    return is_dequant(linear.args[1]) and not is_dequant(linear.args[0])


class PlainMoves(ExportPass):
    """Spells moves in the ops that XNNPACK takes; what it does not take cuts the network in two.

    Expands to the shape that is there already, which come from matrix products of more than two dimensions, are
    removed: each copies a tensor. Squeeze, unsqueeze and select, of which torch's attention has some in every block,
    become views and slices.
    """

    def call_operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], meta: NodeMetadata) -> ProxyValue:
        """Returns what stands for such a move, and any other operator as it is."""
        aten = exir_ops.edge.aten
        if op == aten.expand_copy.default and args[0].to_tensor().shape == meta["val"].shape:
            return args[0]
        if op == aten.select_copy.int:
            source, dim, index = args
            shape = source.to_tensor().shape
            dim, index = dim % len(shape), index % shape[dim]
            part = super().call_operator(aten.slice_copy.Tensor, (source, dim, index, index + 1), {}, meta)
        elif op in (aten.unsqueeze_copy.default, aten.squeeze_copy.dim, aten.squeeze_copy.dims):
            part = args[0]
        else:
            return super().call_operator(op, args, kwargs, meta)
        return super().call_operator(aten.view_copy.default, (part, list(meta["val"].shape)), {}, meta)


OWN_CONFIGS = {ConstantPadConfig: QuantizedPadConfig, LinearConfig: WeightOnlyLinearConfig}
PARTITIONER_CONFIGS = [OWN_CONFIGS.get(row, row) for row in ALL_PARTITIONER_CONFIGS]


@contextmanager
def lean() -> Iterator[None]:
    """Spares the passes that run in it half of their time, by three lines of torch's and ExecuTorch's insides.

    - Every pass copies each node's record of where it comes from, which grows with every pass: nothing changes a record
      once it is made, so copies may be shared.
    - XNNPACK's passes trace the whole network anew, one after the other, also those for ops that it does not have
      (NEEDS).
    - So does a decomposition of ops of which it has none.
    """
    whole_transform, whole_run = XNNPACKPassManager.transform, ExportedProgram.run_decompositions

    def transform(manager: XNNPACKPassManager) -> ExportedProgram:
        names = {str(node.target) for node in manager.exported_program.graph.nodes}
        manager.passes = [
            row for row in manager.passes if any(word in name for word in NEEDS.get(row, ("",)) for name in names)
        ]
        return whole_transform(manager)

    def run_decompositions(program: ExportedProgram, decomp_table: Any = None, **rest: Any) -> ExportedProgram:
        given = decomp_table is not None and _is_functional(program)
        if given and not contains_any_call_fn_target_op(program.graph_module, decomp_table):
            return program
        return whole_run(program, decomp_table, **rest)

    with (
        replaced(NodeSource, "__deepcopy__", lambda self, memo: self),
        replaced(XNNPACKPassManager, "transform", transform),
        replaced(ExportedProgram, "run_decompositions", run_decompositions),
    ):
        yield


def _is_functional(program: ExportedProgram) -> bool:
    """Whether no op changes what it reads: then there is nothing left that the first decomposition would do."""
    schemas = [getattr(node.target, "_schema", None) for node in program.graph.nodes]
    return not any(schema.is_mutable for schema in schemas if schema is not None)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Gives an attribute another value for a while."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@dataclass(frozen=True)
class Lowered:
    """A .pte file's bytes, how many delegates it calls, the ops that stayed outside them (name → count), and notes."""

    data: bytes
    delegates: int
    undelegated: dict[str, int]
    notes: tuple[str, ...]


def to_executorch(program: ExportedProgram) -> Lowered:
    """Lowers a captured `program` to ExecuTorch, with XNNPACK taking every op that it can.

    Raises EdgeKitError for an operator that ExecuTorch has no kernel for.
    """
    for node in program.graph.nodes:
        for note in NOTES:
            node.meta.pop(note, None)
    program, notes = prepare_weights(program)
    try:
        with lean():
            edge = to_edge_transform_and_lower(
                program,
                transform_passes=[PlainMoves()],
                partitioner=[XnnpackPartitioner(configs=PARTITIONER_CONFIGS)],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            lowered = edge.to_executorch(ExecutorchBackendConfig(segment_alignment=ALIGNMENT))
    except (RuntimeError, NotImplementedError) as error:
        raise EdgeKitError(
            f"ExecuTorch cannot lower this model: {error}", "leave it out with --format onnx,tflite"
        ) from error
    names = [_name(n) for n in edge.exported_program().graph.nodes if n.op == "call_function"]
    outside = Counter(name for name in names if name not in BOOKKEEPING)
    return Lowered(lowered.buffer, names.count("executorch_call_delegate"), dict(outside), notes)


def _name(node: torch.fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None else node.target.__name__
