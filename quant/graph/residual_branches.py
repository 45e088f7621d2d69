"""Residual branches that a network can go without: a sum with a shortcut alone reads their results.

Dropping whole blocks leaves less to compute one after the other than thinning all of them does, and a network gets more
of its accuracy back from few samples (https://arxiv.org/abs/2202.07861).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from edgekit.quant.graph.copies import deep_copy
from edgekit.quant.pruning.surgery import COMPUTING, RECURRENT, REMOVABLE, Group, Tensors

aten = torch.ops.aten

ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
FILLS = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2}  # target → index of the value
# Of zeros as their first argument these give zeros, whatever their other arguments are.
KEEP_ZEROS = {
    aten.relu.default, aten.leaky_relu.default, aten.gelu.default, aten.silu.default, aten.mish.default,
    aten.hardswish.default, aten.elu.default, aten.tanh.default, aten.view.default, aten.reshape.default,
    aten.permute.default, aten.transpose.int, aten.clone.default, aten.alias.default, aten.contiguous.default,
    aten.expand.default, aten.squeeze.dims, aten.squeeze.dim, aten.unsqueeze.default, aten.slice.Tensor,
    aten.dropout.default, aten._to_copy.default, aten.flatten.using_ints,
}  # fmt: skip
BOUNDS = {aten.hardtanh.default: (-1.0, 1.0), aten.clamp.default: (None, None)}  # target → defaults
MULTIPLIES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Scalar)


def branches(module: nn.Module, example: Tensors) -> list[Group]:
    """Finds the branches of `module` that end in a sum with the very tensor that they begin with; none without a graph.

    A branch beside a shortcut that changes the shape stays: what follows could hardly do without it. What is found is
    not proved yet.
    """
    try:
        program = torch.export.export(deep_copy(module), example, strict=False).run_decompositions({})
    except Exception:  # whatever a forward raises that cannot be captured: then channels alone are pruned
        return []
    nodes = list(program.graph.nodes)
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, REMOVABLE)}
    recurrent = {name for name, layer in module.named_modules() if isinstance(layer, RECURRENT)}
    of = {node: _layer(node, {*layers, *recurrent}) for node in nodes if node.op == "call_function"}
    ancestors: dict[Node, frozenset[Node]] = {}
    for node in nodes:
        before = node.all_input_nodes
        ancestors[node] = frozenset(before).union(*(ancestors[n] for n in before))
    found: dict[tuple[str, ...], Group] = {}
    for node in nodes:
        for branch, shortcut in _sides(node):
            if shortcut not in ancestors[branch]:
                continue
            inside = (ancestors[branch] | {branch}) - ancestors[shortcut] - {shortcut}
            names = tuple(dict.fromkeys(name for n in nodes if n in inside and (name := of.get(n))))
            elsewhere = {of.get(n) for n in of if n not in inside}
            alone = all(user in inside or user is node for n in inside if n.op == "call_function" for user in n.users)
            computes = any(isinstance(layers.get(name), COMPUTING) for name in names)
            apart = not (elsewhere | recurrent) & set(names)
            if alone and computes and apart and _ends_in(branch, of, layers):
                found.setdefault(names, Group(names[0], (), 1, 1, names))
    return list(found.values())


def _layer(node: Node, names: set[str]) -> str | None:
    """The layer of `names` that `node` is a part of."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path.partition("@")[0] for path, _ in stack.values()]
    return next((path for path in reversed(paths) if path in names), None)


def _sides(node: Node) -> list[tuple[Node, Node]]:
    """Both readings of a sum of two tensors of one shape as (branch, shortcut)."""
    if node.target != aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return []
    a, b = node.args[:2]
    if not isinstance(a, Node) or not isinstance(b, Node) or a is b:
        return []
    if any(getattr(n.meta.get("val"), "shape", None) != node.meta["val"].shape for n in (a, b)):
        return []
    return [(branch, shortcut) for branch, shortcut in ((a, b), (b, a)) if branch.op == "call_function"]


def _ends_in(branch: Node, of: dict[Node, str | None], layers: dict[str, Any]) -> bool:
    """Whether `branch` is zero where the last layer in it gives zeros."""
    node = branch
    while of.get(node) not in layers:
        if not _keeps_zeros(node) or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]
    return True


def _keeps_zeros(node: Node) -> bool:
    if node.target in BOUNDS:
        given: list[Any] = list(node.args[1:3])
        low, high = given + list(BOUNDS[node.target][len(given) :])
        return not node.kwargs and (low is None or low <= 0) and (high is None or high >= 0)
    return node.target in KEEP_ZEROS or node.target in MULTIPLIES


def drop_zero_branches(model: GraphModule) -> None:
    """Takes sums with zeros out of a functional aten graph, and so all that led to the zeros."""
    zeros: set[Node] = set()
    for node in list(model.graph.nodes):
        if node.op != "call_function":
            continue
        made = node.target in ZEROS or (node.target in FILLS and node.args[FILLS[node.target]] == 0)
        if made or (node.args and node.args[0] in zeros and _keeps_zeros(node)):
            zeros.add(node)
            continue
        for branch, shortcut in _sides(node):
            same = shortcut.meta["val"].dtype == node.meta["val"].dtype
            passed = shortcut.op == "placeholder" and any(user.op == "output" for user in node.users)
            if branch in zeros and same and not passed:
                readers = list(node.users)
                node.replace_all_uses_with(shortcut)
                model.graph.erase_node(node)
                for reader in readers if shortcut.target == aten.relu.default else ():
                    if reader.target == aten.relu.default:
                        reader.replace_all_uses_with(shortcut)
                        model.graph.erase_node(reader)
                break
