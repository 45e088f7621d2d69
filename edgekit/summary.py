"""INSPECT: a model layer by layer, an exported file op by op."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.contents import Contents, QParams, float_islands
from edgekit.errors import EdgeKitError
from edgekit.results import TensorSpec

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType
    from rich.table import Table

    from edgekit.bundle import Bundle
    from edgekit.model import Model

READERS = {"onnx": "read_onnx", "tflite": "read_tflite", "executorch": "read_pte"}  # format → module
DAMAGED = (
    ValueError, IndexError, KeyError, struct.error, TypeError, AttributeError, OverflowError, MemoryError,
    RecursionError,
)  # fmt: skip


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
        return {"type": "model", **_json(asdict(self))}


@dataclass(frozen=True)
class ArtifactSummary:
    """What one exported file holds; see `contents.Contents`. Sizes are in bytes.

    `int8_ops` and `float_ops` count arithmetic on activations; `float_islands` names the float ops between quantized
    ones, one entry for each group. `delegates` and `undelegated` are ExecuTorch's: backend → parts, operator → calls.
    """

    path: Path
    format: str
    version: str
    size_bytes: int
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    qparams: dict[str, QParams]
    ops: dict[str, int]
    int8_ops: int
    float_ops: int
    requantizations: int
    float_islands: tuple[str, ...]
    parameter_bytes: dict[str, int]
    delegates: dict[str, int]
    undelegated: dict[str, int]
    notes: tuple[str, ...]
    weight_files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of `inspect --json` for a file."""
        return {"type": "artifact", **_json(asdict(self))}


def is_artifact(path: Path) -> bool:
    """Whether the file at `path` is an ONNX, TFLite or ExecuTorch file, by its content."""
    from edgekit.runtimes import format_of

    try:
        return bool(format_of(path))
    except EdgeKitError:
        return False


def inspect_artifact(path: Path) -> ArtifactSummary:
    """Reads what an exported file holds. Raises EdgeKitError where it is none, cannot be read, or is damaged."""
    from edgekit.files import sha256
    from edgekit.limits import budget
    from edgekit.runtimes import format_of
    from edgekit.watchdog import guarded

    format = format_of(path)
    try:
        reader = import_module(f"edgekit.{READERS[format]}")
        contents: Contents = guarded(lambda: reader.read(path), str(path), budget([path]))
    except OSError as error:
        raise EdgeKitError(f"cannot read {path}: {error.strerror}") from error
    except DAMAGED as error:
        raise EdgeKitError(
            f"{path} is damaged, or not what its content says it is ({format}): {error}", "export or download it again"
        ) from error
    return ArtifactSummary(
        path=path,
        format=format,
        version=contents.version,
        size_bytes=path.stat().st_size,
        sha256=sha256(path),
        inputs=contents.inputs,
        outputs=contents.outputs,
        qparams=contents.qparams,
        ops=contents.ops(),
        int8_ops=contents.count("int8"),
        float_ops=contents.count("float"),
        requantizations=contents.count("requantize"),
        float_islands=tuple(", ".join(group) for graph in contents.graphs for group in float_islands(graph)),
        parameter_bytes=contents.parameter_bytes,
        delegates=contents.delegates,
        undelegated=contents.undelegated,
        notes=contents.notes,
        weight_files=contents.weight_files,
    )


@dataclass(frozen=True)
class BundleSummary:
    """What a bundle's manifest says, and what each of its files holds."""

    path: Path
    manifest: Mapping[str, Any]
    artifacts: tuple[ArtifactSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form of `inspect --json` for a bundle."""
        files = [summary.to_dict() for summary in self.artifacts]
        return {"type": "bundle", "path": str(self.path), "manifest": dict(self.manifest), "artifacts": files}


def inspect_bundle(bundle: Bundle) -> BundleSummary:
    """Reads what each file of a bundle holds; see `inspect_artifact`."""
    found = tuple(inspect_artifact(artifact.path) for artifact in bundle.artifacts)
    return BundleSummary(bundle.path, bundle.manifest, found)


def inspect_model(model: Model, what: str | None = None) -> ModelSummary:
    """Runs `model` once on its example and returns its layers.

    MACs are half of the FLOPs that torch's own counter finds in convolutions, matrix products and attention, whether
    a module or a function asks for them. Raises EdgeKitError, which calls the model `what`, for an ONNX model, which
    has no layers to look at.
    """
    from edgekit.flat import Flat

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


def render(summary: ModelSummary | ArtifactSummary | BundleSummary) -> RenderableType:
    """Returns what the terminal shows of a summary."""
    if isinstance(summary, BundleSummary):
        from rich.console import Group
        from rich.text import Text

        about = summary.manifest
        head = f"  {about['model']['name']} for {about['target']}, {about['precision']}"
        parts = [part for each in summary.artifacts for part in (Text(), _render_artifact(each))]
        return Group(Text.assemble((f"{summary.path}/", "bold"), head), *parts)
    return _render_model(summary) if isinstance(summary, ModelSummary) else _render_artifact(summary)


def _render_model(summary: ModelSummary) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from edgekit.report import notes, size, table

    rows = table("layer", "class", "output", "parameters", "MACs", "")
    for layer in summary.layers:
        shape = "–" if layer.output_shape is None else "×".join(map(str, layer.output_shape)) or "scalar"
        label = Text("  " * layer.depth + layer.path.rsplit(".", 1)[-1])
        rows.add_row(
            label, layer.kind, shape, _count(layer.parameters), _count(layer.macs), Text(_remark(layer), style="yellow")
        )
    totals = (
        f"{summary.parameters:,} parameters, {summary.buffers:,} in buffers, {size(summary.size_bytes)}; "
        f"{summary.macs:,} MACs; activations peak at {size(summary.activation_peak_bytes)}"
    )
    return Group(
        Text.assemble((summary.name, "bold"), f"  {summary.form}"),
        *_specs(summary.inputs, summary.outputs, {}),
        rows,
        Text(totals, style="bold"),
        *notes(summary.notes),
    )


def _remark(layer: Layer) -> str:
    if layer.shared_with is not None:
        return f"shared with {layer.shared_with}"
    if layer.calls == 0:
        return "never called"
    return f"called {layer.calls} times" if layer.calls is not None and layer.calls > 1 else ""


def _render_artifact(summary: ArtifactSummary) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from edgekit.report import notes, size, table

    ops = table("op", "count")
    for name, count in summary.ops.items():
        ops.add_row(Text(name), f"{count:,}")
    stored = ", ".join(f"{size(number)} {dtype}" for dtype, number in summary.parameter_bytes.items()) or "none"
    facts = [
        f"{sum(summary.ops.values()):,} ops: {summary.int8_ops:,} compute in int8, {summary.float_ops:,} in float; "
        f"{summary.requantizations:,} requantizations, {len(summary.float_islands):,} float islands",
        f"weights: {stored}",
    ]
    if summary.format == "executorch":
        parts = ", ".join(f"{count} × {name}" for name, count in summary.delegates.items()) or "none"
        outside = ", ".join(f"{count} × {name}" for name, count in summary.undelegated.items()) or "none"
        facts.append(f"delegates: {parts}; ops outside them: {outside}")
    islands = [
        f"float between int8 ops: {names}" + (f" ({count} times)" if count > 1 else "")
        for names, count in Counter(summary.float_islands).items()
    ]
    return Group(
        Text.assemble((summary.path.name, "bold"), f"  {summary.format} {summary.version}, {size(summary.size_bytes)}"),
        Text(f"sha256 {summary.sha256}", style="dim"),
        *_specs(summary.inputs, summary.outputs, summary.qparams),
        ops,
        *map(Text, facts),
        *notes([*islands, *summary.notes]),
    )


def _specs(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], qparams: dict[str, QParams]) -> list[Table]:
    from rich.table import Table
    from rich.text import Text

    rows = Table.grid(padding=(0, 2, 0, 0))
    for word, specs in (("input", inputs), ("output", outputs)):
        for spec in specs:
            q = qparams.get(spec.name)
            grid = f"{q.dtype} at scale {q.scale:.6g}, zero point {q.zero_point}" if q else ""
            rows.add_row(Text(word, style="dim"), Text(str(spec)), grid)
    return [rows]


def _count(number: int) -> str:
    return f"{number:,}" if number else "–"


def _json(value: Any) -> Any:
    """Dataclass fields as JSON values: tuples become lists, paths text."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value
