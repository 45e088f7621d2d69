"""Wrappers: modules that take tensors and give a flat tuple of tensors, whatever the model's own signature is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

SLOT = object()  # in a template: here goes the next tensor


class Flat(torch.nn.Module):
    """`inner` as a function from tensors to a flat tuple of tensors; torch.export takes it as it is.

    `in_spec` and `template` say how the tensors make up `inner`'s `(args, kwargs)`: each SLOT in the template is
    one tensor, everything else is passed as it stands. None outputs are dropped.
    """

    def __init__(self, inner: torch.nn.Module, in_spec: pytree.TreeSpec, template: Sequence[object]) -> None:
        """Wrap `inner`; `template` has one entry per leaf of `in_spec`."""
        super().__init__()
        self.inner = inner
        self.in_spec = in_spec
        self.slots = [i for i, leaf in enumerate(template) if leaf is SLOT]
        self.fixed = [None if leaf is SLOT else leaf for leaf in template]
        self.eval()

    def raw(self, *tensors: torch.Tensor) -> object:
        """What `inner` itself returns for these tensors."""
        leaves: list[Any] = list(self.fixed)
        for slot, tensor in zip(self.slots, tensors, strict=True):
            leaves[slot] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
        return self.inner(*args, **kwargs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run on one tensor per input."""
        return tuple(leaf for _, leaf in leaves(self.raw(*tensors)) if isinstance(leaf, torch.Tensor))


class OnnxReference(torch.nn.Module):
    """An ONNX model run by ONNX Runtime on the CPU: a numerical baseline. It cannot be exported or trained.

    The session is made on first use from `content`, so that copies and pickles of the module stay possible. It runs on
    one thread, or as many as `use` says: torch's own number does not reach ONNX Runtime.
    """

    def __init__(self, content: bytes) -> None:
        """Keep the serialized model."""
        super().__init__()
        self.content = content
        self.threads = 1
        self.session: Any = None
        self.training = False

    def __getstate__(self) -> dict[str, Any]:
        """The content without the session, which cannot be copied."""
        return {**self.__dict__, "session": None}

    def use(self, threads: int) -> None:
        """Run on so many threads from the next call on, in a session of its own."""
        self.threads, self.session = threads, None

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run on one tensor per graph input, in the graph's order."""
        if self.session is None:
            import onnxruntime

            from edgekit.runtimes.ort import session_options

            options = session_options(self.threads)
            self.session = onnxruntime.InferenceSession(self.content, options, providers=["CPUExecutionProvider"])
        names = [i.name for i in self.session.get_inputs()]
        feeds = {name: tensor.detach().numpy() for name, tensor in zip(names, tensors, strict=True)}
        return tuple(torch.from_numpy(out) for out in self.session.run(None, feeds))


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Name and leaf of every part of a model's output, depth first.

    Dict keys, named-tuple and dataclass fields give the names; positions are numbered; levels are joined by `_`.
    One bare tensor is `output`, a bare tuple's parts are `output_0`, `output_1`, ….
    """
    for key, part in _parts(value, path) or ():
        yield from leaves(part, key)
    if _parts(value, path) is None:
        yield path or "output", value


def _parts(value: object, path: str) -> list[tuple[str, object]] | None:
    """The named parts of a container; None for a leaf."""
    if isinstance(value, Mapping):
        named = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        named = list(zip(value._fields, value, strict=True))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif isinstance(value, (tuple, list)):
        return [(f"{path or 'output'}_{i}", v) for i, v in enumerate(value)]
    else:
        return None
    return [(f"{path}_{key}" if path else key, v) for key, v in named]
