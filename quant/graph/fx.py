"""What the graph passes share: reading the arguments of nodes, and reading and adding constants."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """Returns a node's argument, given by position or by name, or `default`."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def filled_arguments(node: Node) -> list[Any]:
    """Returns the arguments of a node in the order of its schema, defaults filled in."""
    given = [*node.args]
    for each in node.target._schema.arguments[len(given) :]:
        given.append(node.kwargs.get(each.name, each.default_value))
    return given


def is_attribute(node: object) -> bool:
    """Whether `node` reads a parameter or buffer."""
    return isinstance(node, Node) and node.op == "get_attr"


def attribute(model: GraphModule, node: Node) -> torch.Tensor:
    """Returns the tensor that a get_attr `node` reads."""
    return read_attribute(model, node).detach()


def read_attribute(model: GraphModule, node: Node) -> Any:
    """Returns what a get_attr `node` reads: a tensor, or the graph of a branch."""
    value: Any = model
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def add_attribute(model: GraphModule, name: str, value: torch.Tensor) -> Node:
    """Registers `value` as a buffer of `model` and returns a node, at the insertion point, that reads it.

    The buffer is called `name`, with underscores behind it where the model has that name already.
    """
    while hasattr(model, name):
        name += "_"
    model.register_buffer(name, value)
    node = model.graph.get_attr(name)
    mode = next(n.meta["val"].fake_mode for n in model.graph.nodes if hasattr(n.meta.get("val"), "fake_mode"))
    node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    return node


def drop_unread(model: GraphModule) -> None:
    """Removes the parameters and buffers that no node reads any more: the module would hold them, and its exports."""
    read = tuple(f"{node.target}." for node in model.graph.nodes if node.op in ("get_attr", "call_module"))
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name in [name for name, _ in held if not f"{name}.".startswith(read)]:
        owner, _, attribute_name = name.rpartition(".")
        delattr(model.get_submodule(owner), attribute_name)


def calls(model: GraphModule) -> list[Node]:
    """Returns the nodes that compute."""
    return [n for n in model.graph.nodes if n.op == "call_function"]


def insert(model: GraphModule | ExportedProgram, target: Any, *args: Any, **options: Any) -> Node:
    """Returns a new node, at the insertion point, that calls `target`; its value is inferred."""
    node = model.graph.call_function(target, args, options)
    node.meta["val"] = target(*map_arg(args, lambda arg: arg.meta["val"]), **options)
    return node
