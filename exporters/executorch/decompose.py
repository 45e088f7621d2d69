"""ExecuTorch: activations, 3-D convolutions and sorts in the ops that it computes.

What runs outside the delegate takes its time twice, for the op and for the values that go there and back, and 3-D
convolutions have no kernel at all.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from executorch.backends.transforms.utils import create_constant_placeholder
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from edgekit.exporters.executorch.recurrent import drop_unused
from edgekit.quant.graph.fx import filled_arguments, insert
from edgekit.quant.graph.passes import spread

aten = torch.ops.aten

Emit = Callable[..., Node]

# log(1 + exp(-t)) at the threshold t of a softplus, which torch takes for 0 from there on, has to be below this.
NOTHING = 1e-6

ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)


def decompose(program: ExportedProgram) -> None:
    """Puts ops of XNNPACK in the place of those in RULES, on a functional program, and drops weights of no use then."""
    graph, held = program.graph, len(program.state_dict)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in ARITHMETIC and isinstance(node.args[1], int):
            _as_float(node)
        if node.target not in RULES or not _is_float(node.args[0]):
            continue
        with graph.inserting_before(node):
            result = RULES[node.target](partial(insert, program), program, node, *filled_arguments(node))
        if result is not None:
            node.replace_all_uses_with(result)
            graph.erase_node(node)
    if len(program.state_dict) > held:
        drop_unused(program)


def _as_float(node: Node) -> None:
    """Makes the whole number that goes into a float result a float: it is not converted at every inference then."""
    if _is_float(node) and _is_float(node.args[0]) and not isinstance(node.args[1], bool):
        node.args = (node.args[0], float(node.args[1]), *node.args[2:])


def _is_float(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float16)


def _log1p_exp(emit: Emit, x: Node) -> Node:
    """Emits log(1 + exp(-|x|))."""
    decay = emit(aten.exp.default, emit(aten.neg.default, emit(aten.abs.default, x)))
    return emit(aten.log.default, emit(aten.add.Tensor, decay, 1.0))


def softplus(emit: Emit, program: ExportedProgram, node: Node, x: Node, beta: float, threshold: float) -> Node | None:
    """log(1 + exp(βx)) / β = (max(βx, 0) + log(1 + exp(-|βx|))) / β, which does not overflow."""
    if beta <= 0 or math.log1p(math.exp(-threshold)) / beta > NOTHING:
        return None
    scaled = x if beta == 1 else emit(aten.mul.Tensor, x, float(beta))
    total = emit(aten.add.Tensor, emit(aten.relu.default, scaled), _log1p_exp(emit, scaled))
    return total if beta == 1 else emit(aten.mul.Tensor, total, 1 / beta)


def mish(emit: Emit, program: ExportedProgram, node: Node, x: Node) -> Node | None:
    """x · tanh(softplus(x))."""
    plus = softplus(emit, program, node, x, 1.0, math.inf)
    return emit(aten.mul.Tensor, x, emit(aten.tanh.default, plus))


def log_sigmoid(emit: Emit, program: ExportedProgram, node: Node, x: Node) -> Node | None:
    """-softplus(-x)."""
    plus = softplus(emit, program, node, emit(aten.neg.default, x), 1.0, math.inf)
    return emit(aten.neg.default, plus)


def elu(
    emit: Emit, program: ExportedProgram, node: Node, x: Node, alpha: float, scale: float, input_scale: float
) -> Node | None:
    """scale · (max(x, 0) + α · (exp(min(input_scale · x, 0)) - 1))."""
    inner = x if input_scale == 1 else emit(aten.mul.Tensor, x, float(input_scale))
    below = emit(aten.exp.default, emit(aten.neg.default, emit(aten.relu.default, emit(aten.neg.default, inner))))
    negative = emit(aten.mul.Tensor, emit(aten.sub.Tensor, below, 1.0), float(alpha * scale))
    positive = emit(aten.relu.default, x)
    if scale != 1:
        positive = emit(aten.mul.Tensor, positive, float(scale))
    return emit(aten.add.Tensor, positive, negative)


def celu(emit: Emit, program: ExportedProgram, node: Node, x: Node, alpha: float) -> Node | None:
    """An ELU whose slope is 1 on both sides of 0."""
    return elu(emit, program, node, x, float(alpha), 1.0, 1 / alpha) if alpha else None


def selu(emit: Emit, program: ExportedProgram, node: Node, x: Node) -> Node | None:
    """An ELU with two constants of its own (Klambauer et al. 2017)."""
    return elu(emit, program, node, x, 1.6732632423543772, 1.0507009873554805, 1.0)


def gelu(emit: Emit, program: ExportedProgram, node: Node, x: Node, approximate: str) -> Node | None:
    """x · sigmoid(2 · √(2/π) · (x + 0.044715 x³)) where that approximation is asked for: XNNPACK has the exact one."""
    if approximate != "tanh":
        return None
    factor = 2 * math.sqrt(2 / math.pi)
    square = emit(aten.mul.Tensor, x, x)
    inner = emit(aten.mul.Tensor, emit(aten.add.Tensor, emit(aten.mul.Tensor, square, 0.044715 * factor), factor), x)
    return emit(aten.mul.Tensor, x, emit(aten.sigmoid.default, inner))


def prelu(emit: Emit, program: ExportedProgram, node: Node, x: Node, weight: Node) -> Node | None:
    """Of one slope a leaky ReLU; else max(x, 0) - w · max(-x, 0) where x is no image, of which alone XNNPACK has it."""
    slope = _parameter(program, weight)
    if slope is not None and slope.numel() == 1:
        return emit(aten.leaky_relu.default, x, float(slope))
    rank = x.meta["val"].ndim
    if rank == 4 and slope is not None and len(weight.users) == 1:
        return None
    if rank > 2 and weight.meta["val"].numel() > 1:
        weight = emit(aten.view.default, weight, [-1, *[1] * (rank - 2)])
    below = emit(aten.mul.Tensor, emit(aten.relu.default, emit(aten.neg.default, x)), weight)
    return emit(aten.sub.Tensor, emit(aten.relu.default, x), below)


def _parameter(program: ExportedProgram, node: Node) -> torch.Tensor | None:
    """Returns the tensor that a placeholder of a program stands for, None for one of its inputs or a computed value."""
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return program.state_dict.get(held.get(node.name, ""))


def glu(emit: Emit, program: ExportedProgram, node: Node, x: Node, dim: int) -> Node | None:
    """The first half times the sigmoid of the second."""
    dim %= x.meta["val"].ndim
    half = x.meta["val"].shape[dim] // 2
    first, second = (emit(aten.slice.Tensor, x, dim, start, start + half) for start in (0, half))
    return emit(aten.mul.Tensor, first, emit(aten.sigmoid.default, second))


def conv3d(
    emit: Emit,
    program: ExportedProgram,
    node: Node,
    x: Node,
    weight: Node,
    bias: Node | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Node | None:
    """A convolution of images: one for each depth of the result, its channels those of all depths that it reads."""
    (step, *stride), (edge, *padding), (gap, *dilation) = (spread(value, 3) for value in (stride, padding, dilation))
    batch, channels, depth, height, width = x.meta["val"].shape
    after = node.meta["val"].shape[2]
    outputs, _, kernel, *window = weight.meta["val"].shape
    length = after + (kernel - 1) * gap // step  # in steps: XNNPACK has no slices with one
    y = emit(aten.view.default, x, [batch, channels, depth, height * width])
    if length * step < edge + depth:
        y = emit(aten.slice.Tensor, y, 2, 0, length * step - edge)
    missing = length * step - edge - y.meta["val"].shape[2]
    if edge or missing:
        y = emit(aten.constant_pad_nd.default, y, [0, 0, edge, missing], 0.0)
    y = emit(aten.view.default, y, [batch, channels, length, step, height * width])
    parts = []
    for start, rest in (divmod(index * gap, step) for index in range(kernel)):
        part = emit(aten.slice.Tensor, y, 2, start, start + after)
        parts.append(emit(aten.slice.Tensor, part, 3, rest, rest + 1))
    y = parts[0] if kernel == 1 else emit(aten.cat.default, parts, 3)
    y = emit(aten.permute.default, y, [0, 2, 1, 3, 4])
    y = _view(emit, y, [batch * after, channels * kernel, height, width])
    flat = _reshaped(emit, program, weight, [outputs, -1, *window])
    y = emit(aten.conv2d.default, y, flat, bias, stride, padding, dilation, groups)
    y = emit(aten.view.default, y, [batch, after, outputs, -1])
    return _view(emit, emit(aten.permute.default, y, [0, 2, 1, 3]), list(node.meta["val"].shape))


def conv_transpose3d(
    emit: Emit,
    program: ExportedProgram,
    node: Node,
    x: Node,
    weight: Node,
    bias: Node | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Node | None:
    """Transposed convolutions of images: one of each depth, and one by ones that sums the depths where they overlap."""
    (step, *stride), (edge, *padding), (extra, *output_padding), (gap, *dilation) = (
        spread(value, 3) for value in (stride, padding, output_padding, dilation)
    )
    batch, channels, depth, height, width = x.meta["val"].shape
    outputs = node.meta["val"].shape[1]
    _, _, kernel, *window = weight.meta["val"].shape
    y = emit(aten.view.default, x, [batch, channels, depth, height * width])
    y = _view(emit, emit(aten.permute.default, y, [0, 2, 1, 3]), [batch * depth, channels, height, width])
    flat = _reshaped(emit, program, weight, [channels, -1, *window])
    y = emit(aten.conv_transpose2d.input, y, flat, None, stride, padding, output_padding, groups, dilation)
    y = emit(aten.view.default, y, [batch, depth, outputs * kernel, -1])
    y = _contiguous(emit, emit(aten.permute.default, y, [0, 2, 1, 3]))
    one_hot = torch.eye(kernel, dtype=weight.meta["val"].dtype).reshape(kernel, 1, kernel, 1).repeat(outputs, 1, 1, 1)
    ones = _constant(program, f"{node.name}_ones", one_hot)
    y = emit(aten.conv_transpose2d.input, y, ones, bias, [step, 1], [edge, 0], [extra, 0], outputs, [gap, 1])
    return emit(aten.view.default, y, list(node.meta["val"].shape))


def _contiguous(emit: Emit, x: Node) -> Node:
    return emit(aten.clone.default, x, memory_format=torch.contiguous_format)


def _view(emit: Emit, x: Node, shape: list[int]) -> Node:
    return emit(aten.view.default, _contiguous(emit, x), shape)


def _reshaped(emit: Emit, program: ExportedProgram, weight: Node, shape: list[int]) -> Node:
    """Gives a weight another shape: a constant stays one, which XNNPACK asks for."""
    value = _parameter(program, weight)
    if value is None:
        return emit(aten.view.default, weight, shape)
    return _constant(program, f"{weight.name}_flat", value.reshape(shape))


def _constant(program: ExportedProgram, name: str, value: torch.Tensor) -> Node:
    """Returns what reads a new constant of a program, or the one that it has by that name."""
    with program.graph.inserting_before(next(iter(program.graph.nodes))):
        return create_constant_placeholder(program, program.graph, name, InputKind.PARAMETER, value.detach())


def sort(emit: Emit, program: ExportedProgram, node: Node, x: Node, dim: int, descending: bool) -> Node:
    """The largest or smallest of all: the runtime has a kernel for topk alone."""
    size = x.meta["val"].shape[dim] if x.meta["val"].ndim else 1
    return emit(aten.topk.default, x, size, dim, descending, True)


def argsort(emit: Emit, program: ExportedProgram, node: Node, x: Node, dim: int, descending: bool) -> Node:
    """The places of the largest or smallest of all."""
    return emit(operator.getitem, sort(emit, program, node, x, dim, descending), 1)


RULES: dict[Any, Callable[..., Node | None]] = {
    aten.argsort.default: argsort,
    aten.celu.default: celu,
    aten.conv3d.default: conv3d,
    aten.conv_transpose3d.input: conv_transpose3d,
    aten.elu.default: elu,
    aten.gelu.default: gelu,
    aten.glu.default: glu,
    aten.log_sigmoid.default: log_sigmoid,
    aten.mish.default: mish,
    aten.prelu.default: prelu,
    aten.selu.default: selu,
    aten.softplus.default: softplus,
    aten.sort.default: sort,
}
