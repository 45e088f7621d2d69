"""ExecuTorch: .pte programs with the XNNPACK delegate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from executorch.backends.transforms.remove_getitem_op import RemoveGetItemPass
from executorch.backends.xnnpack._passes import XNNPACKPassManager
from executorch.backends.xnnpack._passes.channels_last_tagged_reshape_pass import ChannelsLastTaggedReshapePass
from executorch.backends.xnnpack._passes.conv1d_unsqueeze_pass import Conv1dUnsqueezePass
from executorch.backends.xnnpack._passes.convert_to_linear import ConvertToLinearPass
from executorch.backends.xnnpack._passes.convert_to_sdpa import ConvertToSDPAPass
from executorch.backends.xnnpack._passes.convert_to_upsample_bilinear2d import ConvertToUpsampleBilinear2d
from executorch.backends.xnnpack._passes.decompose_batch_norm import DecomposeBatchNorm
from executorch.backends.xnnpack._passes.decompose_cat import DecomposeConcatenate
from executorch.backends.xnnpack._passes.fuse_activation_pass import FuseActivationPass
from executorch.backends.xnnpack._passes.fuse_batch_norm import FuseBatchNormPass
from executorch.backends.xnnpack._passes.prelu_reshape_pass import PReLUReshapePass
from executorch.backends.xnnpack._passes.propagate_custom_meta_pass import PropagateCustomMetaPass
from executorch.backends.xnnpack.partition.config import (
    ALL_PARTITIONER_CONFIGS,
    AddmmConfig,
    BatchNormConfig,
    ConstantPadConfig,
    GeluConfig,
    LinearConfig,
    MaxDimConfig,
    PreluConfig,
    UpsampleBilinear2dConfig,
)
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType, XNNPartitionerConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.utils.quant_utils import (
    IS_IMPLICIT_Q_DQ_TAG,
    is_dequant,
    is_quant,
    is_tagged_as_implicit_q_dq,
)
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    to_edge_transform_and_lower,
)
from executorch.exir.backend.utils import is_same_node
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.pass_base import ExportPass, NodeMetadata, ProxyValue
from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass
from executorch.exir.passes.legalize_portable_dim_order_pass import LegalizePortableDimOrderPass
from executorch.exir.passes.memory_format_ops_pass import DimOrderOpsRevertPass, MemoryFormatOpsPass
from executorch.exir.passes.normalize_transpose_pass import NormalizeTransposePass
from executorch.exir.passes.remove_mixed_type_operators import RemoveMixedTypeOperators
from executorch.exir.passes.replace_broken_ops_with_function_ops_pass import ReplaceBrokenOpsWithFunctionalOpsPass
from executorch.exir.passes.scalar_to_tensor_pass import ScalarToTensorPass
from executorch.exir.passes.sym_to_tensor_pass import SymToTensorPass
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from edgekit.errors import EdgeKitError, reason
from edgekit.exporters.executorch.decompose import decompose
from edgekit.exporters.executorch.recurrent import insert_steps, spell_recurrences, steps_of, unroll_recurrences
from edgekit.exporters.executorch.weights import prepare_weights
from edgekit.quant.graph.passes import CONVOLUTIONS, convolution_arguments
from edgekit.util.export_speedups import all_nodes, copied, needed_decompositions, replaced, unread_notes

aten = torch.ops.aten

# What the exporter notes on every node; the dozens of passes that follow would copy it deeply each time.
NOTES = ("from_node", "nn_module_stack", "stack_trace", "source_fn_stack")

# Of each constant in the file, in bytes: what XNNPACK asks for. The default of 128 pads every small scale and bias.
ALIGNMENT = 16

PAD_DEFAULTS = ("constant", None)  # mode, value
QUANTIZED = "quantized_decomposed::"  # how the names of the quantized kernel library's operators begin
BOOKKEEPING = {"executorch_call_delegate", "getitem", "alloc", "copy_", "scan"}  # graph nodes that compute nothing


class QuantizedPadConfig(ConstantPadConfig):
    """Lets XNNPACK pad int8 codes, which it folds into the convolution that follows.

    ExecuTorch's own row pads in float, between a conversion from int8 and one back.
    """

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        """Float and static int8."""
        return [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        """Leaves out a pad of int8 codes that is read as floats, for which ExecuTorch would write an int8 pad.

        So is one whose value widens the range: XNNPACK pads at one scale and zero point.
        """
        source = node.args[0]
        same = not is_dequant(source) or any(
            is_quant(user) and user.args[1:3] == source.args[1:3] for user in node.users
        )
        return same and super().check_constraints(node, ep)


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
        edge = exir_ops.edge.aten
        if op == edge.expand_copy.default and args[0].to_tensor().shape == meta["val"].shape:
            return args[0]
        if op == edge.select_copy.int:
            source, dim, index = args
            shape = source.to_tensor().shape
            dim, index = dim % len(shape), index % shape[dim]
            part = super().call_operator(edge.slice_copy.Tensor, (source, dim, index, index + 1), {}, meta)
        elif op in (edge.unsqueeze_copy.default, edge.squeeze_copy.dim, edge.squeeze_copy.dims):
            part = args[0]
        else:
            return super().call_operator(op, args, kwargs, meta)
        return super().call_operator(edge.view_copy.default, (part, list(meta["val"].shape)), {}, meta)


class OneReaderPerDequantize(ExportPass):
    """Gives each reader of a quantized value a dequantization of its own.

    XNNPACK's passes choose by one reader's needs whether a dequantization is a step of its own or part of an int8 op,
    and which layout it has; every other reader of the same one would get that too.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        """Copies each dequantization of an activation for all of its readers but the first."""
        graph = graph_module.graph
        for node in [n for n in graph.nodes if n.op == "call_function" and is_dequant(n)]:
            for reader in list(node.users)[1:]:
                with graph.inserting_after(node):
                    own = graph.node_copy(node)
                reader.replace_input_with(node, own)
        graph_module.recompile()
        return PassResult(graph_module, True)


class PlainAddmmConfig(AddmmConfig):
    """Leaves out factors other than 1, and a bias for each row, which the serializer drops."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        """Whether XNNPACK computes what this node does."""
        factors = (node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1))
        return factors == (1, 1) and node.args[0].meta["val"].ndim == 1 and super().check_constraints(node, ep)


class ImageBatchNormConfig(BatchNormConfig):
    """Leaves out what is no image, on which XNNPACK's layout pass fails."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        """Whether XNNPACK's passes take this node."""
        return node.args[0].meta["val"].ndim == 4 and super().check_constraints(node, ep)


class EvenUpsampleConfig(UpsampleBilinear2dConfig):
    """Leaves out factors that do not give whole sizes: XNNPACK computes with the ratio of the sizes instead."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        """Whether XNNPACK computes what this node does."""
        align_corners, factors = node.args[2], node.args[3] if len(node.args) > 3 else None
        before, after = node.args[0].meta["val"].shape[2:], node.meta["val"].shape[2:]
        even = factors is None or all(b * f == a for b, a, f in zip(before, after, factors, strict=True))
        return (align_corners or even) and super().check_constraints(node, ep)


class ExactGeluConfig(GeluConfig):
    """Leaves the approximation by tanh out, for which XNNPACK would compute the exact function."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        """Whether XNNPACK computes what this node does."""
        return node.kwargs.get("approximate", "none") == "none" and super().check_constraints(node, ep)


class ImageMaxDimConfig(MaxDimConfig):
    """Leaves out what the serializer refuses: other dimensions than rows and columns, and results of another rank."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        """Whether the serializer takes this node."""
        return (
            node.args[1] in (2, 3)
            and len(node.args) == 3
            and bool(node.args[2])
            and len(node.users) == 1
            and super().check_constraints(node, ep)
        )


class ImagePreluConfig(PreluConfig):
    """Leaves out what is no image, which the serializer refuses."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        """Whether the serializer takes this node."""
        return node.args[0].meta["val"].ndim == 4 and super().check_constraints(node, ep)


OWN_CONFIGS = {
    AddmmConfig: PlainAddmmConfig,
    BatchNormConfig: ImageBatchNormConfig,
    ConstantPadConfig: QuantizedPadConfig,
    GeluConfig: ExactGeluConfig,
    LinearConfig: WeightOnlyLinearConfig,
    MaxDimConfig: ImageMaxDimConfig,
    PreluConfig: ImagePreluConfig,
    UpsampleBilinear2dConfig: EvenUpsampleConfig,
}
MOST_DIMENSIONS = 6  # of XNNPACK's tensors


def bounded(row: type[XNNPartitionerConfig]) -> type[XNNPartitionerConfig]:
    """Returns a row of the partitioner's table that leaves out tensors of more dimensions than XNNPACK has.

    What a row leaves out it forgets: ExecuTorch's tag the quantizations around an op as parts of it before they look
    further, and would not convert those that the op outside then reads.
    """

    class Bounded(row):
        def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
            values = [node.meta.get("val"), *(source.meta.get("val") for source in node.all_input_nodes)]
            ranks = [value.ndim for value in values if isinstance(value, torch.Tensor)]
            behind = (reader for user in node.users for reader in user.users)  # of an activation that is fused
            untagged = [n for n in (*node.all_input_nodes, *node.users, *behind) if not is_tagged_as_implicit_q_dq(n)]
            takes = max(ranks, default=0) <= MOST_DIMENSIONS and super().check_constraints(node, ep)
            for other in () if takes else untagged:
                other.meta.pop(IS_IMPLICIT_Q_DQ_TAG, None)
            return takes

    Bounded.__name__ = row.__name__
    return Bounded


PARTITIONER_CONFIGS = [bounded(OWN_CONFIGS.get(row, row)) for row in ALL_PARTITIONER_CONFIGS]

# Ops that XNNPACK computes on the last dimension as torch has it: behind a convolution, that is not the last in memory.
ROW_OPS = {exir_ops.edge.aten._softmax.default, aten.scaled_dot_product_attention.default}


@contextmanager
def mended_layouts() -> Iterator[None]:
    """Mends XNNPACK's layout pass: images that ROW_OPS read get torch's layout, and numbers may be quantized.

    The pass takes the first element of a quantized value that comes from outside the delegate, and a number has none.
    """
    layouts = ChannelsLastTaggedReshapePass
    is_nhwc, is_nchw = layouts.is_nhwc_node, layouts.is_nchw_node
    with (
        replaced(layouts, "memory_sensitive_ops_nchw", layouts.memory_sensitive_ops_nchw | ROW_OPS),
        replaced(layouts, "is_nhwc_node", staticmethod(lambda node: not _is_quantized_number(node) and is_nhwc(node))),
        replaced(layouts, "is_nchw_node", staticmethod(lambda node: _is_quantized_number(node) or is_nchw(node))),
    ):
        yield


def _is_quantized_number(node: Node) -> bool:
    return is_dequant(node) and node.meta["val"].ndim == 0


def named(*parts: str) -> Callable[[Node], bool]:
    """Tells ops that have one of `parts` in their name."""
    return lambda node: any(part in str(node.target) for part in parts)


def _is_sequence(node: Node) -> bool:
    return "convolution" in str(node.target) and node.meta["val"].ndim == 3


def _is_symbolic(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def _is_view(node: Node) -> bool:
    return getattr(node.target, "is_view", False)


def _takes_numbers(node: Node) -> bool:
    """Whether an op is given a number in the place of a tensor."""
    schema = getattr(node.target, "_schema", None)
    taken = zip(schema.arguments if schema else (), node.args, strict=False)
    return any(isinstance(value, int | float) and isinstance(arg.type, torch.TensorType) for arg, value in taken)


def _is_mixed(node: Node) -> bool:
    """Whether an op that adds, multiplies or divides may have to convert an operand first."""
    operands = [value.meta.get("val") if isinstance(value, Node) else None for value in node.args]
    return named("add", "mul", "sub", "div", "minimum")(node) and any(
        getattr(operand, "dtype", None) != torch.float32 for operand in operands
    )


# ExecuTorch's passes and our own → what tells the ops that they are there for.
NEEDS: dict[type, Callable[[Node], bool]] = {
    Conv1dUnsqueezePass: _is_sequence,
    ConvertToLinearPass: named("mm."),
    ConvertToSDPAPass: named("softmax"),
    ConvertToUpsampleBilinear2d: named("upsample", "index"),
    DecomposeBatchNorm: named("batch_norm"),
    DecomposeConcatenate: named("cat"),
    DimOrderOpsRevertPass: named("dim_order"),
    FuseActivationPass: named("relu", "hardtanh"),
    FuseBatchNormPass: named("batch_norm"),
    LegalizePortableDimOrderPass: named("avg_pool2d", "expand_copy", "mean", "sum"),
    MemoryFormatOpsPass: named("_to_copy", "empty", "clone"),
    NormalizeTransposePass: named("aten.t."),
    OneReaderPerDequantize: named("dequantize"),
    PlainMoves: named("expand", "select", "squeeze"),
    PReLUReshapePass: named("prelu"),
    PropagateCustomMetaPass: lambda node: "custom" in node.meta,
    RemoveGetItemPass: named("max_pool2d_with_indices", "max.dim"),
    RemoveMixedTypeOperators: _is_mixed,
    ReplaceBrokenOpsWithFunctionalOpsPass: _is_view,
    ScalarToTensorPass: _takes_numbers,
    SymToTensorPass: _is_symbolic,
}


@contextmanager
def lean() -> Iterator[None]:
    """Spares the lowering that runs in it most of its time.

    What `util.export_speedups` spares, and three things of ExecuTorch's: passes for ops that the network does not have
    (NEEDS), XNNPACK's, which cost time around them too, and copies of the weights with each copy of a program.
    """
    whole_pass, whole_transform = PassBase.__call__, XNNPACKPassManager.transform

    def run_pass(row: PassBase, module: GraphModule) -> PassResult | None:
        return whole_pass(row, module) if _is_needed(type(row), module) else PassResult(module, False)

    def transform(manager: XNNPACKPassManager) -> ExportedProgram:
        module = manager.exported_program.graph_module
        manager.passes = [row for row in manager.passes if _is_needed(row, module)]
        return whole_transform(manager)

    with (
        unread_notes(),
        needed_decompositions(),
        replaced(ExportedProgram, "__deepcopy__", lambda program, memo: copied(program)),
        replaced(PassBase, "__call__", run_pass),
        replaced(XNNPACKPassManager, "transform", transform),
    ):
        yield


def _is_needed(row: type, module: GraphModule) -> bool:
    """Whether a pass has something to do in `module` or in the branches of its control flow."""
    return row not in NEEDS or any(map(NEEDS[row], all_nodes(module)))


class _Pieces(list[bytes]):
    """What ExecuTorch writes, as it is: its weights are in memory once."""

    def write(self, piece: bytes) -> None:
        """Stands for a file's."""
        self.append(piece)


@dataclass(frozen=True)
class Lowered:
    """A .pte file's bytes in pieces, how many delegates it calls, the ops outside them (name → count), and notes.

    `kernels` are the runtime's names of the operators that it calls, such as "aten::where.self_out".
    """

    pieces: tuple[bytes, ...]
    delegates: int
    undelegated: dict[str, int]
    notes: tuple[str, ...]
    kernels: tuple[str, ...] = ()

    @property
    def data(self) -> bytes:
        """The file's bytes, which are copies of the pieces."""
        return b"".join(self.pieces)

    @property
    def libraries(self) -> tuple[str, ...]:
        """ExecuTorch's libraries, by their CMake targets, that a runtime needs to load the file."""
        quantized = any(name.startswith(QUANTIZED) for name in self.kernels)
        plain = any(not name.startswith(QUANTIZED) for name in self.kernels)
        needed = {"xnnpack_backend": self.delegates > 0, "portable_kernels": plain, "quantized_kernels": quantized}
        return tuple(name for name, is_needed in needed.items() if is_needed)


def to_executorch(program: ExportedProgram) -> Lowered:
    """Lowers a captured `program` to ExecuTorch, with XNNPACK taking every op that it can.

    Buffers that the program changes are stored with their values: without, ExecuTorch leaves them as memory was.

    Raises EdgeKitError for an operator that ExecuTorch has no kernel for.
    """
    program = copied(program)
    for node in program.graph.nodes:
        for note in NOTES:
            node.meta.pop(note, None)
    program = spell_recurrences(program)
    try:
        with lean(), mended_layouts():
            steps = steps_of(program, lambda step: _lower(prepare_weights(step)[0]))
            program, notes = prepare_weights(unroll_recurrences(program))
            edge = _lower(program)
            insert_steps(edge, steps)
            signature = edge.exported_program().graph_signature
            state = [n for n, target in signature.inputs_to_buffers.items() if target in _mutated(signature)]
            config = ExecutorchBackendConfig(passes=[InitializedMutableBufferPass(state)], segment_alignment=ALIGNMENT)
            lowered = edge.to_executorch(config)
    except EdgeKitError:
        raise
    except Exception as error:  # its passes raise whatever they run into, and wrap it in a plain Exception
        raise EdgeKitError(
            f"ExecuTorch cannot lower this model: {reason(error.__cause__ or error)}",
            "leave it out with --format onnx,tflite",
        ) from error
    names = [_name(n) for n in all_nodes(edge.exported_program().graph_module) if n.op == "call_function"]
    outside = Counter(name for name in names if name not in BOOKKEEPING)
    plans = lowered.executorch_program.execution_plan
    kernels = {f"{op.name}.{op.overload}".removesuffix(".") for plan in plans for op in plan.operators}
    delegates = names.count("executorch_call_delegate")
    pieces = _Pieces()
    lowered.write_to_file(pieces)
    for kept in (FakeTensorMode, is_same_node):  # delegates, with all weights, as long as this process lives
        kept.cache_clear()
    return Lowered(tuple(pieces), delegates, dict(outside), notes, tuple(sorted(kernels)))


def _lower(program: ExportedProgram) -> EdgeProgramManager:
    decompose(program)
    spell_as_core(program)
    return to_edge_transform_and_lower(
        program,
        transform_passes=[PlainMoves(), OneReaderPerDequantize()],
        partitioner=[XnnpackPartitioner(configs=PARTITIONER_CONFIGS)],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )


def _mutated(signature: ExportGraphSignature) -> set[str]:
    return set(signature.buffers_to_mutate.values())


def spell_as_core(program: ExportedProgram) -> None:
    """Spells convolutions and constant pads as the core ops that a decomposition would make of them.

    Most networks then need none, and it takes half as long as all else.
    """
    for node in program.graph.nodes:
        if node.kwargs:
            continue
        if node.target in CONVOLUTIONS:
            source, weight, bias, stride, padding, dilation, groups = convolution_arguments(node)
            no_output_padding = [0] * len(stride)
            node.args = (source, weight, bias, stride, padding, dilation, False, no_output_padding, groups)
            node.target = aten.convolution.default
        elif node.target == aten.pad.default:
            given: list[Any] = [*node.args, *PAD_DEFAULTS[len(node.args) - 2 :]]
            source, amounts, mode, value = given
            if mode == "constant":
                node.args = (source, amounts, 0.0 if value is None else value)
                node.target = aten.constant_pad_nd.default


def _name(node: torch.fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None else node.target.__name__
