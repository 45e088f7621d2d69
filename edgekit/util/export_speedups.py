"""Monkeypatches of torch.export and torch.fx that skip work whose result is unused.

Passes trace a whole network anew, one after the other, and each copies records and writes code. Files compute the same
without all that; names and spellings in them may differ where a decomposition would have found nothing to decompose.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.traceback import NodeSource


@contextmanager
def unread_notes() -> Iterator[None]:
    """Leaves out what passes write down for people.

    - Each copies every node's record of where it comes from, which grows with every pass: nothing changes a record once
      it is made, so copies may be shared.
    - Each writes the graph as Python code: passes walk the graph, and the code is written when a module is called. A
      module that leaves this block needs `recompile` before its `forward` is asked for its arguments, or it is pickled.
    """
    with (
        replaced(NodeSource, "__deepcopy__", lambda record, memo: record),
        replaced(GraphModule, "recompile", _recompile_later),
    ):
        yield


@contextmanager
def needed_decompositions() -> Iterator[None]:
    """Leaves out decompositions of ops of which a functional program has none: it comes back itself, not a copy."""
    whole_run = ExportedProgram.run_decompositions

    def run(program: ExportedProgram, decomp_table: Any = None, **rest: Any) -> ExportedProgram:
        if decomp_table is None or not _is_functional(program) or _has_any(program, decomp_table):
            return whole_run(program, decomp_table, **rest)
        return program

    with replaced(ExportedProgram, "run_decompositions", run):
        yield


def copied(program: ExportedProgram) -> ExportedProgram:
    """Returns a copy on the same weights, whose graph, branches of control flow and signature may be changed."""
    module = copy.deepcopy(program.graph_module)
    for node, original in zip(module.graph.nodes, program.graph.nodes, strict=True):
        node.name = original.name  # by which the signature knows inputs and outputs, and which a copy may change
    state, constants = dict(program.state_dict), dict(program.constants)
    signature = copy.copy(program.graph_signature)
    signature.input_specs, signature.output_specs = [*signature.input_specs], [*signature.output_specs]
    return program._update(module, signature, state_dict=state, constants=constants)


def all_nodes(module: GraphModule) -> Iterator[Node]:
    """Yields the nodes of a graph and of the branches of its control flow."""
    for part in module.modules():
        if isinstance(part, GraphModule):
            yield from part.graph.nodes


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


_recompile = GraphModule.recompile


def _recompile_later(module: GraphModule) -> None:
    """Stands for GraphModule.recompile: each has a class of its own, whose `forward` is the code."""
    codegen = module.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        module._in_spec, module._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
    module._code = ""  # which logs quote
    type(module).forward = _first_forward


def _first_forward(module: GraphModule, *args: Any, **kwargs: Any) -> Any:
    _recompile(module)
    return type(module).forward(module, *args, **kwargs)


def _is_functional(program: ExportedProgram) -> bool:
    """Whether no op changes what it reads, as after a decomposition."""
    schemas = [getattr(node.target, "_schema", None) for node in program.graph.nodes]
    return not any(schema.is_mutable for schema in schemas if schema is not None)


def _has_any(program: ExportedProgram, ops: Any) -> bool:
    """Whether the program, or a branch of its control flow, has one of `ops`, also where ExecuTorch has wrapped it."""
    targets = {node.target for node in all_nodes(program.graph_module) if node.op == "call_function"}
    return any((op if isinstance(op, OpOverload) else getattr(op, "_op", op)) in ops for op in targets)
