"""What people read of a pruning: what each layer lost, what that did to the whole, and what its files take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgekit.reports.tables import count, instructions, milliseconds, notes, size, table

if TYPE_CHECKING:
    from edgekit.pruning.cost import Cost, Measured
    from edgekit.pruning.result import Pruned
    from edgekit.pruning.target_search import Found


def pruning_report(pruned: Pruned) -> RenderableType:
    """Shows layers, totals, the candidates of a search, and the files that were measured."""
    shared = _shared([layer.kept for layer in pruned.masked or pruned.layers])
    rows = _masked(pruned, shared) if pruned.masked else _layers(pruned, shared)
    legend = [Text(f"{mark} {why}", style="dim") for why, mark in shared.items()]
    parts: list[RenderableType] = [rows, *legend, Text(""), _totals(pruned)]
    if pruned.search is not None:
        parts += [Text(""), _candidates(pruned.search)]
    if pruned.files:
        parts += [Text(""), _files(pruned.files, bool(pruned.masked))]
    hint = "  export model.pt2, or the weights with --code"
    head = Text.assemble(("Wrote ", ""), (f"{pruned.path}/", "bold"), hint)
    return Group(*parts, head, *notes(pruned.notes))


def _shared(reasons: Sequence[str | None]) -> dict[str, str]:
    """Returns a mark for each reason that several layers have: it stands in their rows, and the reason below them."""
    counts = Counter(why for why in reasons if why)
    return {why: f"({number})" for number, why in enumerate((w for w, count in counts.items() if count > 1), 1)}


def _layers(pruned: Pruned, shared: Mapping[str, str]) -> Table:
    rows = table("layer", "kind", "weight before", "after", "multiply-adds before", "after", "")
    for layer in pruned.layers:
        rows.add_row(
            Text(layer.name),
            layer.kind,
            "x".join(map(str, layer.before)),
            ("x".join(map(str, layer.after)) or "removed") if layer.after != layer.before else "same",
            count(layer.macs_before),
            count(layer.macs_after) if layer.macs_after != layer.macs_before else "same",
            Text(f"keeps its outputs: {shared.get(layer.kept, layer.kept)}", style="dim") if layer.kept else "",
        )
    return rows


def _masked(pruned: Pruned, shared: Mapping[str, str]) -> Table:
    rows = table("layer", "kind", "weight", "zeros", "")
    for layer in pruned.masked:
        rows.add_row(
            Text(layer.name),
            layer.kind,
            "x".join(map(str, layer.shape)),
            f"{100 * layer.zeros / layer.weights:.1f} %" if layer.zeros else "–",
            Text(f"stays dense: {shared.get(layer.kept, layer.kept)}", style="dim") if layer.kept else "",
        )
    return rows


def _totals(pruned: Pruned) -> Table:
    (macs, fewer), (parameters, left) = pruned.macs, pruned.parameters
    total = table("", "before", "after", "removed")
    if pruned.masked:
        zeros, weights = pruned.zeros
        total.add_row(
            "weights that are not zero", count(weights), count(weights - zeros), f"{100 * zeros / weights:.1f} %"
        )
    else:
        total.add_row("multiply-adds", count(macs), count(fewer), f"{100 * (1 - fewer / macs):.1f} %")
        total.add_row("parameters", count(parameters), count(left), f"{100 * (1 - left / parameters):.1f} %")
    if pruned.accuracy is not None and pruned.unrecovered is not None:
        now, low_high = pruned.accuracy, pruned.accuracy.ci95
        after = f"{100 * now.value:.2f} %"
        drop = f"{now.drop:.2f} points ({low_high[0]:.2f} to {low_high[1]:.2f})"
        total.add_row(now.metric, f"{100 * now.baseline:.2f} %", after, drop)
        if pruned.recovered is not None:
            total.add_row("  without fine-tuning", "", f"{100 * pruned.unrecovered.value:.2f} %", "")
    return total


def _candidates(found: Found) -> Table:
    formats = list(found.chosen.shares)
    name = "p50" if found.limit.kind == "latency" else "size"
    rows = table("candidate", "multiples of", "multiply-adds left", "parameters", *(f"{name} {f}" for f in formats), "")
    for candidate in found.front:
        chosen = candidate == found.chosen
        rows.add_row(
            Text(f"ratio {candidate.ratio:.3f}", style="bold" if chosen else ""),
            str(candidate.round_to),
            f"{100 * candidate.macs:.1f} %",
            f"{100 * candidate.parameters:.1f} %",
            *(f"{candidate.shares[format]:.2f}x" for format in formats),
            Text("chosen", style="bold green") if chosen else "" if candidate.load <= 1 else "above the target",
        )
    hidden = len(found.candidates) - len(found.front)
    if hidden:
        rows.caption = f"{hidden} more were tried that keep less and take no less"
        rows.caption_justify = "left"
    return rows


def _files(files: Sequence[Measured], masked: bool) -> Table:
    emulated = files[0].cost.latency is None
    columns = ["file", "", "instructions" if emulated else "p50 ms", "original", "", "size", "original", ""]
    columns += ["compressed", "original", "", "zeros"] if masked else []
    rows = table(*columns)
    for m in files:
        more = [size(m.packed), size(m.original_packed), f"{m.packed / m.original_packed:.2f}x"]
        more.append(f"{100 * m.zeros / max(m.weights, 1):.1f} %")
        rows.add_row(
            m.artifact.path.name,
            m.artifact.precision,
            _cost(m.cost),
            _cost(m.original_cost),
            f"{m.speed_share:.2f}x",
            size(m.size),
            size(m.original_size),
            f"{m.size_share:.2f}x",
            *(more if masked else []),
        )
    return rows


def _cost(cost: Cost) -> str:
    return milliseconds(cost.latency.p50) if cost.latency else instructions(cost.instructions)
