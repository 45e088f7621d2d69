"""ExecuTorch: recurrent layers over many steps as loops, whose body is one step that XNNPACK computes.

Unrolled, 160 steps of three layers are thousands of nodes, which take gigabytes and minutes to partition. So a layer
becomes a linear layer for the inputs of all steps and one `edgekit::recurrence` for the rest (`spell_recurrences`). Its
weights go into a program of their own, one step, that is lowered by itself (`steps_of`); in the lowered network the
operator becomes a scan over that step (`insert_steps`), which ExecuTorch runs as a loop of instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from executorch.exir import EdgeProgramManager
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.program._program import collect_named_data_store_from_exported_program
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node
from torch.nn.functional import linear

from edgekit.util.export_speedups import unread_notes

aten = torch.ops.aten

LONG = 16  # time steps from which a layer is a loop
COPIES = 2**22  # bytes of weights that may be kept once per time step

Tensors = Sequence[torch.Tensor]
Lower = Callable[[ExportedProgram], EdgeProgramManager]


def _parts(x: torch.Tensor, count: int) -> list[torch.Tensor]:
    size = x.shape[-1] // count
    return [x[..., index * size : (index + 1) * size] for index in range(count)]


def _lstm(x: torch.Tensor, states: Tensors, weights: Tensors) -> list[torch.Tensor]:
    h, c = states
    recurrent, bias, projection = _named(weights, c.shape[-1])
    i, f, g, o = _parts(x + linear(h, recurrent, bias), 4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return [h if projection is None else linear(h, projection), c]


def _named(weights: Tensors, hidden: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The recurrent weights, and the bias and the projection, of which a layer may have either, both or none."""
    bias = next((w for w in weights[1:] if w.ndim == 1), None)
    return weights[0], bias, next((w for w in weights[1:] if w.ndim == 2), None)


def _gru(x: torch.Tensor, states: Tensors, weights: Tensors) -> list[torch.Tensor]:
    (h,) = states
    r, z, n = _parts(x, 3)
    r_h, z_h, n_h = _parts(linear(h, *weights), 3)
    r, z = torch.sigmoid(r + r_h), torch.sigmoid(z + z_h)
    n = torch.tanh(n + r * n_h)
    return [n + z * (h - n)]


def _rnn_tanh(x: torch.Tensor, states: Tensors, weights: Tensors) -> list[torch.Tensor]:
    return [torch.tanh(x + linear(states[0], *weights))]


def _rnn_relu(x: torch.Tensor, states: Tensors, weights: Tensors) -> list[torch.Tensor]:
    return [torch.relu(x + linear(states[0], *weights))]


# (the inputs' product, the states, the other weights) → the states, the layer's output first
STEPS: dict[str, Callable[[torch.Tensor, Tensors, Tensors], list[torch.Tensor]]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _rnn_tanh,
    "rnn_relu": _rnn_relu,
}


def _unrolled(
    x: torch.Tensor, states: Tensors, weights: Tensors, kind: str, backward: bool = False
) -> list[torch.Tensor]:
    """The last states, and the outputs of all steps."""
    now, outputs = list(states), []
    for part in reversed(x.unbind(0)) if backward else x.unbind(0):
        now = STEPS[kind](part, now, weights)
        outputs.append(now[0])
    return [*now, torch.stack(outputs[::-1] if backward else outputs)]


@torch.library.custom_op("edgekit::recurrence", mutates_args=())
def recurrence(
    x: torch.Tensor, states: list[torch.Tensor], weights: list[torch.Tensor], kind: str
) -> list[torch.Tensor]:
    """Runs the steps of STEPS[kind] over x [time, batch, gates · hidden]; returns states, and outputs of all steps."""
    return [tensor.clone() for tensor in _unrolled(x, states, weights, kind)]


@recurrence.register_fake
def _(x: torch.Tensor, states: list[torch.Tensor], weights: list[torch.Tensor], kind: str) -> list[torch.Tensor]:
    return [*map(torch.empty_like, states), states[0].new_empty(x.shape[0], *states[0].shape)]


def _layers(
    kind: str,
    x: torch.Tensor,
    states: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """All layers of torch's LSTM, GRU or RNN; returns the outputs, and each state of all layers."""
    directions = 2 if bidirectional else 1
    per = len(params) // num_layers // directions
    lasts: list[list[torch.Tensor]] = []
    x = x.transpose(0, 1) if batch_first else x
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            w_ih, w_hh, *rest = params[index * per : (index + 1) * per]
            b_ih, *others = rest if has_biases else [None, *rest]
            # Of two dimensions: behind what dequantizes x, XNNPACK's partitioner would take the layer for an int8 one.
            product = linear(x.reshape(-1, x.shape[2]), w_ih, b_ih).reshape(*x.shape[:2], -1)
            first = [state[index] for state in states]
            if len(x) >= LONG or len(x) * w_hh.nbytes > COPIES:
                product = product.flip(0) if direction else product
                *last, y = torch.ops.edgekit.recurrence(product, first, [w_hh, *others], kind)
                y = y.flip(0) if direction else y
            else:
                *last, y = _unrolled(product, first, [w_hh, *others], kind, backward=direction == 1)
            outputs.append(y)
            lasts.append(last)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    return (x.transpose(0, 1) if batch_first else x), [torch.stack(each) for each in zip(*lasts, strict=True)]


def _decomposition(kind: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    def spell(
        x: torch.Tensor,
        hx: Any,
        params: list[torch.Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[torch.Tensor, ...]:
        states = hx if kind == "lstm" else [hx]
        y, lasts = _layers(kind, x, states, params, has_biases, num_layers, bidirectional, batch_first)
        return (y, *lasts)

    return spell


SPELLINGS = {
    aten.lstm.input: _decomposition("lstm"),
    aten.gru.input: _decomposition("gru"),
    aten.rnn_tanh.input: _decomposition("rnn_tanh"),
    aten.rnn_relu.input: _decomposition("rnn_relu"),
}


def spell_recurrences(program: ExportedProgram) -> ExportedProgram:
    """Returns a program whose recurrent layers are linear layers and steps, or `edgekit::recurrence` for many of them.

    A program without such layers comes back as it is.
    """
    if not any(node.target in SPELLINGS for node in program.graph.nodes):
        return program
    with unread_notes():
        return program.run_decompositions(SPELLINGS)


class _Step(torch.nn.Module):
    def __init__(self, weights: GraphModule, kind: str) -> None:
        super().__init__()
        self.weights, self.kind = weights, kind

    def forward(self, x: torch.Tensor, *states: torch.Tensor) -> list[torch.Tensor]:
        return STEPS[self.kind](x, states, self.weights())


def steps_of(program: ExportedProgram, lower: Lower) -> list[EdgeProgramManager]:
    """Takes the steps out of a program's loops, in place, and returns them lowered; the loops tell their number.

    A step maps (constants that its delegate does not hold, input, *states) to states; the loop keeps these constants.
    A loop whose weights depend on the program's inputs keeps all, and is left to `unroll_recurrences`.
    """
    steps = []
    for node in list(program.graph.nodes):
        if node.target != torch.ops.edgekit.recurrence.default:
            continue
        x, states, weights, kind = node.args
        constants = _constants(program, weights)
        if constants is None:
            continue
        example = (_like(x)[0], *map(_like, states))
        with unread_notes(), torch.no_grad():
            step = torch.export.export(_Step(constants, kind), example, strict=False).run_decompositions({})
        steps.append(lower(step))
        lowered = steps[-1].exported_program()
        held = {name: target.rpartition(".")[2] for name, target in lowered.graph_signature.inputs_to_buffers.items()}
        named = {each.name: each for each in program.graph.nodes}
        drop_unused(lowered)
        left = [named[held[each.name]] for each in lowered.graph.nodes if each.name in held]
        node.args = (x, states, left, str(len(steps) - 1))
    if steps:
        program.graph.eliminate_dead_code()
        drop_unused(program)
    return steps


def drop_unused(program: ExportedProgram) -> None:
    """Removes parameters and buffers that nothing reads: they would be in the file."""
    program._state_dict = dict(program.state_dict)
    specs, changed = program.graph_signature.input_specs, program.graph_signature.buffers_to_mutate.values()
    for node in [node for node in program.graph.nodes if node.op == "placeholder" and not node.users]:
        spec = next(spec for spec in specs if spec.arg.name == node.name)
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target not in changed:
            specs.remove(spec)
            program.graph.erase_node(node)
            program._state_dict.pop(spec.target, None)
    program.graph_module.recompile()


def unroll_recurrences(program: ExportedProgram) -> ExportedProgram:
    """Returns a program without the loops that `steps_of` left as they were."""
    loops = [node for node in program.graph.nodes if node.target == torch.ops.edgekit.recurrence.default]
    if all(node.args[3] not in STEPS for node in loops):
        return program

    def spell(x: torch.Tensor, states: Any, weights: Any, kind: str) -> list[torch.Tensor]:
        run = _unrolled if kind in STEPS else torch.ops.edgekit.recurrence
        return run(x, states, weights, kind)

    return program.run_decompositions({torch.ops.edgekit.recurrence.default: spell})


def _like(node: Node) -> torch.Tensor:
    return torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype)


def _constants(program: ExportedProgram, weights: Sequence[Node]) -> GraphModule | None:
    """Returns a module () → weights, or None where they are not constant."""
    signature = program.graph_signature
    held = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    changed = set(signature.buffers_to_mutate.values())
    needed = set(weights)
    for node in reversed(program.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    root, graph = torch.nn.Module(), Graph()
    copies: dict[Node, Node] = {}
    for node in (node for node in program.graph.nodes if node in needed):
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        name = held.get(node.name)
        if name is None or name in changed:
            return None
        tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
        root.register_buffer(node.name, tensor.detach())
        copies[node] = graph.get_attr(node.name)
    graph.output([copies[weight] for weight in weights])
    return GraphModule(root, graph)


def insert_steps(edge: EdgeProgramManager, steps: Sequence[EdgeProgramManager]) -> None:
    """Makes each loop of a lowered network a scan over its lowered step, in place."""
    program = edge.exported_program()
    module = program.graph_module
    for node in list(module.graph.nodes):
        if node.target != exir_ops.edge.edgekit.recurrence.default:
            continue
        x, states, constants, number = node.args
        step = steps[int(number)].exported_program().graph_module
        _carry_states(step.graph, len(constants))
        name = f"step_{number}"
        module.add_module(name, step)
        with module.graph.inserting_before(node):
            body = module.graph.get_attr(name)
            scan = module.graph.call_function(torch.ops.higher_order.scan, (body, list(states), [x], tuple(constants)))
        scan.meta = {**node.meta, "val": tuple(node.meta["val"])}
        node.replace_all_uses_with(scan)
        module.graph.erase_node(node)
    module.recompile()
    collect_named_data_store_from_exported_program(program, edge._named_data_store)


def _carry_states(graph: Graph, constants: int) -> None:
    """Makes (constants, input, *states) → states a scan's (*states, input, constants) → (*states, output)."""
    given = [node for node in graph.nodes if node.op == "placeholder"]
    for node in (given[constants], *given[:constants]):
        given[-1].append(node)
        given.append(node)
    (after,) = graph.output_node().args
    graph.output_node().args = ((*after, after[0]),)
    graph.lint()
