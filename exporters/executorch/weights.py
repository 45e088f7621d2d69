"""ExecuTorch: int8 weights beside float or dynamically quantized inputs, in the forms that its kernels take."""

from __future__ import annotations

from collections import Counter
from typing import Any

import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401 (registers embedding_byte)
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgekit.util.export_speedups import copied

aten = torch.ops.aten
q = torch.ops.quantized_decomposed

CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv_transpose2d.input}
DEQUANTIZE = {
    q.dequantize_per_channel.default,
    q.dequantize_per_tensor.default,
    q.dequantize_per_tensor.tensor,
}


def prepare_weights(program: ExportedProgram) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Returns a program whose int8 weights all have kernels, and notes on those that do not stay int8.

    Embeddings become `embedding_byte`. A linear layer with float inputs gives its bias to an addition, because
    XNNPACK's partitioner takes quantized weights and a float bias together only where inputs are quantized.
    Convolutions with float inputs get float weights. A program without such weights comes back as it is; else the one
    given stays as it was.
    """
    if not any(_weights(node) for node in program.graph.nodes):
        return program, ()
    program = copied(program)
    state = dict(program.state_dict)
    float_layers: Counter[str] = Counter()
    for node in list(program.graph.nodes):
        weights = _weights(node)
        if not weights:
            continue
        if node.target == aten.embedding.default:
            codes, scales, _, _, low, high, _ = weights[0].args
            node.args, node.kwargs = (codes, scales, None, low, high, node.args[1]), {}
            node.target = q.embedding_byte.default
        elif node.target == aten.linear.default:
            _split_bias(program, node)
            _own_weight(program, node, weights[0])
        else:
            _dequantize(program, state, weights[0])
            float_layers["convolution"] += 1
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    program._state_dict = state
    notes: tuple[str, ...] = ()
    if float_layers:
        count = float_layers.total()
        layers = f"{count} convolution{'s' if count > 1 else ''}"
        notes = (f"the weights of {layers} stay fp32: XNNPACK has no float convolution with int8 weights",)
    return program, notes


def _weights(node: Node) -> list[Node]:
    """Returns what dequantizes the weights of a layer whose inputs are not quantized themselves; none for others."""
    if node.target == aten.embedding.default:
        found = [node.args[0]]
    elif node.target in CONVOLUTIONS or node.target == aten.linear.default:
        found = [] if _is_dequantize(node.args[0]) else [node.args[1]]
    else:
        found = []
    return [weight for weight in found if _is_dequantize(weight) and weight.args[0].op == "placeholder"]


def _is_dequantize(node: Any) -> bool:
    return isinstance(node, Node) and node.target in DEQUANTIZE


def _split_bias(program: ExportedProgram, linear: Node) -> None:
    bias = linear.args[2] if len(linear.args) > 2 else None
    if bias is None:
        return
    with program.graph.inserting_after(linear):
        total = program.graph.call_function(aten.add.Tensor, (linear, bias))
    total.meta["val"] = linear.meta["val"]
    linear.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    linear.args = linear.args[:2]


def _own_weight(program: ExportedProgram, linear: Node, weight: Node) -> None:
    """Dequantizes for `linear` alone: steps of an LSTM may lie in several delegates, and each takes the node along."""
    with program.graph.inserting_before(linear):
        own = program.graph.node_copy(weight)
    linear.replace_input_with(weight, own)


def _dequantize(program: ExportedProgram, state: dict[str, torch.Tensor], node: Node) -> None:
    """Puts the real numbers that `node` gives in the place of the codes that it reads."""
    held = {**program.graph_signature.inputs_to_buffers, **program.graph_signature.inputs_to_parameters}
    values = [state[held[arg.name]] if isinstance(arg, Node) else arg for arg in node.args]
    codes = node.args[0]
    state[held[codes.name]] = node.target(*values)
    codes.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(codes)
