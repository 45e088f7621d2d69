"""What people read of inspect: a model layer by layer, a file op by op, a bundle."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from edgekit.artifacts.contents import QParams
from edgekit.artifacts.summary import ArtifactSummary, BundleSummary
from edgekit.loading.model_summary import Layer, ModelSummary
from edgekit.types import TensorSpec

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


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

    from edgekit.reports.tables import notes, size, table

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

    from edgekit.reports.tables import notes, size, table

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
