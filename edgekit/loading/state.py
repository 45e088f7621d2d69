"""State: buffers that a model changes from call to call, as inputs and outputs of a function without state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from edgekit.errors import EdgeKitError
from edgekit.loading.wrappers import Flat
from edgekit.types import State, TensorSpec

NEXT = "_next"  # behind the name of a state: the output that holds its value for the next call


@dataclass(frozen=True)
class Buffers:
    """The buffers that a call changes: the state, which a later call reads, and beside it what is only written."""

    read: tuple[str, ...]
    unread: tuple[str, ...] = ()


class StateAsInputs(nn.Module):
    """`inner` as a function of its inputs and its state: (*inputs, *states) → (*outputs, *next states).

    `read` names the buffers that are the state, in the order of the last inputs; those of `unread` are only written. No
    call leaves a trace in the module.
    """

    def __init__(self, inner: nn.Module, read: Sequence[str], unread: Sequence[str]) -> None:
        """Wrap `inner`, which takes and returns tensors; its buffers hold the state at the start."""
        super().__init__()
        self.inner = inner
        self.read = tuple(read)
        self.initial = {name: inner.get_buffer(name).detach().clone() for name in (*read, *unread)}
        self.eval()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run one call from the given state."""
        count = len(tensors) - len(self.read)
        given = {**self.initial, **dict(zip(self.read, tensors[count:], strict=True))}
        held = {name: tensor.clone() for name, tensor in given.items()}
        outputs = functional_call(self.inner, held, tensors[:count])
        return (*outputs, *(held[name] for name in self.read))


class StateInBuffers(nn.Module):
    """The inverse of StateAsInputs: `network` with its state in buffers, which it changes in place."""

    def __init__(self, network: nn.Module, initial: Sequence[torch.Tensor]) -> None:
        """Wrap `network`, whose last inputs and outputs are the states; `initial` are their values at the start."""
        super().__init__()
        self.network = network
        self.count = len(initial)
        for index, tensor in enumerate(initial):
            self.register_buffer(f"state_{index}", tensor.clone())

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run one call and keep the next state."""
        states = [self.get_buffer(f"state_{index}") for index in range(self.count)]
        results = self.network(*inputs, *states)
        for state, value in zip(states, results[-self.count :], strict=True):
            state.copy_(value)
        return tuple(results[: -self.count])


def run_watched(module: nn.Module, call: Callable[[], Any], name: str) -> tuple[Any, Buffers]:
    """Returns what `call` gives, which runs `module` once, and the buffers of `module` that it changes.

    The buffers hold what they held before; tensors in plain attributes that a call changes become buffers. What the
    first call builds and the next one leaves alone (a table of positions) is no state: it stays as the first built it.
    Raises EdgeKitError for a state that changes its shape, and for one in an attribute that holds no tensor before the
    first call.
    """
    attributes, before = _attributes(module), _buffers(module)
    first = call()
    moved = _moved(attributes, call, name)
    changed = _changed(before, module)
    if moved:
        _restore(module, before, changed)
        for attribute in moved:
            attribute.to_buffer()
        first, buffers = run_watched(module, call, name)
        if not buffers.read:
            for attribute in moved:
                attribute.to_attribute()
        return first, buffers
    if not changed:
        return first, Buffers(())
    built = _buffers(module)
    with suppress(EdgeKitError):  # a state that does not fit any more: what the first call changed tells why
        call()
        changed &= _changed(built, module)
    for key in sorted(changed):
        old, new = before[key].value, built[key].value
        if old.shape != new.shape or old.dtype != new.dtype:
            raise EdgeKitError(
                f"the state '{key}' of {name} is {_kind(old)} before a call and {_kind(new)} after it",
                "give it a fixed size and type, such as the last N steps of a cache: torch.cat([cache, x])[-N:]",
            )
    for key in changed:
        _set(module, key, before[key].value.clone())
    read = {key for key in changed if _is_read(module, key, call, before, changed)}
    order = [key for key in before if key in changed]
    return first, Buffers(tuple(k for k in order if k in read), tuple(k for k in order if k not in read and read))


def explicit(flat: Flat, buffers: Buffers, taken: Sequence[str]) -> tuple[StateAsInputs, tuple[State, ...]]:
    """Returns `flat` as a function of the state in the `buffers` of its inner module, and what each state is called.

    `taken` are the names of its inputs and outputs.
    """
    wrapped = StateAsInputs(flat, *([f"inner.{key}" for key in keys] for keys in (buffers.read, buffers.unread)))
    used = set(taken)
    states = []
    for key in buffers.read:
        tensor = wrapped.initial[f"inner.{key}"]
        base = key.replace(".", "_")
        while {base, base + NEXT} & used:
            base += "_"
        used |= {base, base + NEXT}
        spec = TensorSpec(base, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        states.append(State(spec, base + NEXT, tensor.contiguous().numpy().tobytes()))
    return wrapped, tuple(states)


def state_note(states: Sequence[State]) -> str:
    """Returns what whoever runs the files of a model with state has to know."""
    pairs = ", ".join(f"{state.output} → {state.input.name}" for state in states)
    return (
        "the model has state: .onnx and .tflite files give it as outputs, for the inputs of the next call "
        f"({pairs}); a .pte file keeps it in itself until it is loaded again"
    )


@dataclass(frozen=True)
class _Held:
    """A tensor, and what shows whether it was written since: its version, and a copy of its value."""

    tensor: torch.Tensor
    version: int
    value: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Held:
        return cls(tensor, tensor._version, tensor.detach().clone())

    def is_still(self, tensor: Any) -> bool:
        return tensor is self.tensor and self.tensor._version == self.version


@dataclass(frozen=True, eq=False)
class _Attribute:
    """A plain attribute that holds a tensor or nothing."""

    part: nn.Module
    path: str
    key: str
    held: _Held | None

    @property
    def now(self) -> object:
        return vars(self.part).get(self.key)

    def to_buffer(self) -> None:
        """Registers the tensor of before as a buffer."""
        assert self.held is not None
        delattr(self.part, self.key)
        self.part.register_buffer(self.key, self.held.value, persistent=False)

    def to_attribute(self) -> None:
        """Takes the buffer back."""
        tensor = self.part._buffers[self.key]
        delattr(self.part, self.key)
        object.__setattr__(self.part, self.key, tensor)


def _buffers(module: nn.Module) -> dict[str, _Held]:
    return {key: _Held.of(tensor) for key, tensor in module.named_buffers()}


def _changed(before: dict[str, _Held], module: nn.Module) -> set[str]:
    """The buffers that were written, or given another tensor, since `before`."""
    now = dict(module.named_buffers())
    return {key for key, held in before.items() if not held.is_still(now.get(key))}


def _restore(module: nn.Module, before: dict[str, _Held], keys: set[str]) -> None:
    for key in keys:
        _set(module, key, before[key].value.clone())


def _set(module: nn.Module, key: str, tensor: torch.Tensor) -> None:
    path, _, name = key.rpartition(".")
    module.get_submodule(path)._buffers[name] = tensor


def _is_read(module: nn.Module, key: str, call: Callable[[], Any], before: dict[str, _Held], changed: set[str]) -> bool:
    """Whether what a call gives, or a state after it, depends on the buffer `key`: another value is tried."""
    start = before[key].value
    results = []
    try:
        for value in (start, ~start if start.dtype is torch.bool else start + 1):
            _restore(module, before, changed)
            _set(module, key, value.clone())
            given = [leaf for leaf in tree_leaves(call()) if isinstance(leaf, torch.Tensor)]
            now = dict(module.named_buffers())
            results.append([*given, *(now[other].detach().clone() for other in sorted(changed))])
    except EdgeKitError:  # an index that runs out of its range: it is read
        return True
    finally:
        _restore(module, before, changed)
    return not all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _attributes(module: nn.Module) -> list[_Attribute]:
    return [
        _Attribute(part, path, key, None if value is None else _Held.of(value))
        for path, part in module.named_modules()
        for key, value in vars(part).items()
        if value is None or isinstance(value, torch.Tensor)
    ]


def _moved(attributes: Sequence[_Attribute], call: Callable[[], Any], name: str) -> list[_Attribute]:
    """Returns the attributes whose tensors the last call changed.

    Raises EdgeKitError for one that held nothing before the first call and that another call changes.
    """
    made = {a: _Held.of(a.now) for a in attributes if a.held is None and isinstance(a.now, torch.Tensor)}
    moved = [a for a in attributes if a.held is not None and not a.held.is_still(a.now)]
    if made:
        call()
    for attribute, built in made.items():
        if not built.is_still(attribute.now):
            where = ".".join(filter(None, (attribute.path, attribute.key)))
            raise EdgeKitError(
                f"{name} keeps state in the attribute '{where}', which holds nothing before the first call",
                "register it with its value at the start: "
                f"self.register_buffer({attribute.key!r}, torch.zeros{tuple(built.value.shape)})",
            )
    return moved


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(map(str, tensor.shape))}]"
