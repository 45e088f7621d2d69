"""Summary of a model: its layers, their shapes, parameters and multiply-adds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edgekit.artifacts.summary import as_json
from edgekit.errors import EdgeKitError
from edgekit.types import TensorSpec

if TYPE_CHECKING:
    import torch

    from edgekit.loading.model import Model


@dataclass(frozen=True)
class Layer:
    """One module of a model: its path, class, first output's shape, own parameters, and MACs with all it contains.

    `calls` is how often one forward pass calls it: 0 where it is never called, None where calls cannot be seen.
    `shared_with` is the path where the same module, or all of its parameters, were counted before.
    """

    path: str
    kind: str
    depth: int
    output_shape: tuple[int, ...] | None
    parameters: int
    macs: int
    calls: int | None
    shared_with: str | None


@dataclass(frozen=True)
class ModelSummary:
    """A model's layers and totals. Parameters that are shared count once; buffers are elements, not bytes.

    `activation_peak_bytes` is the most memory that the tensors of one eager forward pass hold at a time, inputs
    included and weights left out.
    """

    name: str
    form: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[Layer, ...]
    parameters: int
    buffers: int
    macs: int
    size_bytes: int
    activation_peak_bytes: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of `inspect --json` for a model."""
        return {"type": "model", **as_json(asdict(self))}


def inspect_model(model: Model, what: str | None = None) -> ModelSummary:
    """Runs `model` once on its example and returns its layers.

    MACs are half of the FLOPs that torch's own counter finds in convolutions, matrix products and attention, whether
    a module or a function asks for them. Raises EdgeKitError, which calls the model `what`, for an ONNX model, which
    has no layers to look at.
    """
    from edgekit.loading.wrappers import Flat

    if model.onnx is not None:
        raise EdgeKitError(
            f"{what or model.name} is an ONNX graph, not a PyTorch model", "inspect the .onnx file itself"
        )
    root = model.module.inner if isinstance(model.module, Flat) else model.module
    seen, total, memory = _trace(model, root)
    unseen = tuple(path for path, module in root.named_modules() if _hides_calls(module))
    parameters = {id(p): p for p in root.parameters()}
    buffers = {id(b): b for b in root.buffers()}
    notes = [*model.notes]
    if unseen:
        notes.append("TorchScript and exported programs do not call their modules: MACs are known in total only")
    stored = (*parameters.values(), *buffers.values())
    return ModelSummary(
        name=model.name,
        form=model.form,
        inputs=model.inputs,
        outputs=model.outputs,
        layers=tuple(_layers(root, model.name, seen, memory.read)),
        parameters=sum(p.numel() for p in parameters.values()),
        buffers=sum(b.numel() for b in buffers.values()),
        macs=total,
        size_bytes=sum(t.numel() * t.element_size() for t in stored),
        activation_peak_bytes=memory.peak,
        notes=tuple(notes),
    )


@dataclass
class _Seen:
    """What the hooks of one module saw."""

    calls: int = 0
    macs: int = 0
    shape: tuple[int, ...] | None = None


def _trace(model: Model, root: torch.nn.Module) -> tuple[dict[int, _Seen], int, Any]:
    """What each module (by id) did in one forward pass, the MACs of all, and what `_memory_mode` saw."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    products = {torch.ops.aten.mv: _vector_flops, torch.ops.aten.addmv: _offset_vector_flops}
    counter = FlopCounterMode(display=False, custom_mapping=products)
    memory = _memory_mode()(model.example)
    seen: dict[int, _Seen] = {}
    started: list[int] = []

    def before(module: torch.nn.Module, args: Any) -> None:
        started.append(counter.get_total_flops())

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        entry = seen.setdefault(id(module), _Seen())
        entry.calls += 1
        entry.macs += (counter.get_total_flops() - started.pop()) // 2
        entry.shape = _first_shape(output)

    with ExitStack() as stack:
        for module in root.modules():
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_countable())
        stack.enter_context(counter)
        stack.enter_context(memory)
        model.module(*model.example)
    return seen, counter.get_total_flops() // 2, memory


@contextmanager
def _countable() -> Iterator[None]:
    """Lets attention, transformer layers and recurrent layers run as matrix products, which the counter knows."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    onednn: Any = torch.backends.mkldnn
    fast, enabled = torch.backends.mha.get_fastpath_enabled(), onednn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    onednn.enabled = False  # it has one op for a whole LSTM
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        onednn.enabled = enabled


def _memory_mode() -> Any:
    """Returns the class that follows every tensor made while it is active (torch is imported here).

    `peak` is the most memory that they held at a time, in bytes; `read` the storages that any operator read.
    """
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Memory(TorchDispatchMode):
        def __init__(self, given: tuple[torch.Tensor, ...]) -> None:
            super().__init__()
            self.known: set[int] = set()
            self.read: set[int] = set()
            self.live = self.peak = sum(t.numel() * t.element_size() for t in given)
            self.fixed = {t.untyped_storage()._cdata for t in given}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            before = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _dense(t)}
            self.read |= before
            for tensor in torch.utils._pytree.tree_leaves(result):
                if _dense(tensor) and tensor.untyped_storage()._cdata not in before | self.known | self.fixed:
                    self._add(tensor.untyped_storage())
            return result

        def _add(self, storage: torch.UntypedStorage) -> None:
            key, size = storage._cdata, storage.nbytes()
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key, size)

        def _remove(self, key: int, size: int) -> None:
            self.known.discard(key)
            self.live -= size

    def _dense(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.layout == torch.strided

    return Memory


def _vector_flops(matrix: tuple[int, ...], *rest: Any, **named: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _offset_vector_flops(offset: tuple[int, ...], matrix: tuple[int, ...], *rest: Any, **named: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _first_shape(output: Any) -> tuple[int, ...] | None:
    import torch

    leaves = torch.utils._pytree.tree_leaves(output)
    return next((tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)), None)


def _hides_calls(module: torch.nn.Module) -> bool:
    """Whether this module runs a graph of its own rather than calling what it contains."""
    import torch

    return isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule))


def _layers(root: torch.nn.Module, name: str, seen: dict[int, _Seen], read: set[int]) -> Iterator[Layer]:
    """One layer for each module, parents first; a module that is met again is marked and counts nothing.

    Of a module that is not called, but whose parameters are among the storages that were `read`, calls are not known:
    another one uses its weights, as attention does its output projection's.
    """
    first: dict[int, str] = {}
    owners: dict[int, str] = {}
    hidden: list[str] = []
    for path, module in root.named_modules(remove_duplicate=False):
        under_graph = any(path.startswith(parent) for parent in hidden)
        if _hides_calls(module):
            hidden.append(f"{path}." if path else "")
        shared = first.get(id(module))
        first.setdefault(id(module), path or name)
        found = _Seen() if shared else seen.get(id(module), _Seen())
        own = list(module.parameters(recurse=False))
        new = [p for p in own if id(p) not in owners]
        if own and not new and shared is None:
            shared = owners[id(own[0])]
        owners |= {id(p): path or name for p in new}
        yield Layer(
            path=path or name,
            kind=getattr(module, "original_name", type(module).__name__),
            depth=path.count(".") + 1 if path else 0,
            output_shape=found.shape,
            parameters=sum(p.numel() for p in new),
            macs=found.macs,
            calls=None if not found.calls and (under_graph or _is_read(own, read)) else found.calls,
            shared_with=shared,
        )


def _is_read(parameters: list[torch.nn.Parameter], read: set[int]) -> bool:
    return any(p.untyped_storage()._cdata in read for p in parameters)
