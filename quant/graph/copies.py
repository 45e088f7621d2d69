"""Copies of modules, and the tensors of their states: what torch makes harder than it sounds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def deep_copy(module: Kind) -> Kind:
    """Returns a deep copy of `module`.

    Tensors that a forward left in it, of which torch refuses copies (`torch.nn.utils.weight_norm` keeps the weight that
    it computes, others keep features), are copied as plain ones.
    """
    kept: list[Any] = []
    for child in module.modules():
        kept += pytree.tree_leaves({name: value for name, value in vars(child).items() if name != "_modules"})
    computed = [value for value in kept if isinstance(value, torch.Tensor) and not value.is_leaf]
    return copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in computed})


def state_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the tensors of the state_dict of `module`: a module's extra state may be anything else."""
    return tensors_of(module.state_dict())


def tensors_of(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the entries of a state_dict that are tensors."""
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
