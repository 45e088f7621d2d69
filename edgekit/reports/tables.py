"""What people read: tables for the terminal. Programs read the `to_dict` of the same results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from edgekit.artifacts.artifact import Culprit, labels
from edgekit.artifacts.bundles import Bundle
from edgekit.judging.results import Comparison, Profile, Replay
from edgekit.judging.results import Measurement as Measured
from edgekit.judging.verdicts import is_unsteady
from edgekit.measuring.latency import Latency
from edgekit.measuring.op_times import OpTimes
from edgekit.metrics.accuracy import Accuracy
from edgekit.targets import TARGETS
from edgekit.types import UNITS, Interval, Unit
from edgekit.util.progress import every_note
from edgekit.util.wording import counted, times

LONGEST_NOTE = 200  # characters of a note that lists things, shown without --verbose
MOST_LISTED = 6  # things in a shorter list are all shown
_VARIES = re.compile(r"'[^']*'|\"[^\"]*\"|\b[\w./]*\d[\w./]*")  # names and numbers, in which alike notes differ
FREE_WIDTH = 10_000  # columns: as wide as a table likes
EMULATED = "emulated: instructions of one run, not times"
VERDICT_STYLES = {"ship": "bold green", "reject": "bold red", "inconclusive": "bold yellow"}


class Sheet(Table):
    """A table that is turned on its side where the console is too narrow for it, so that nothing of it is cut off.

    Its rows are columns then, headed by their first cells, in as many tables as it takes. A `broad` one has to fit
    without a line break in any cell; others break lines between words before that.
    """

    def __init__(self, broad: bool, title: str | None) -> None:
        """An empty table in EdgeKit's one style."""
        super().__init__(
            title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        self.broad = broad
        self.cells: list[list[Any]] = []

    def add_row(self, *cells: Any, **options: Any) -> None:
        """As Table.add_row."""
        self.cells.append(list(cells))
        super().add_row(*cells, **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the table as it is, or on its side."""
        free = options.update(max_width=FREE_WIDTH)
        needed = Measurement.get(console, free, self)
        if (needed.maximum if self.broad else needed.minimum) <= options.max_width or not self.cells:
            yield from super().__rich_console__(console, options)
            return
        start = 0
        while start < len(self.cells):
            count = len(self.cells) - start
            while count > 1 and console.measure(self._aside(start, count), options=free).maximum > options.max_width:
                count -= 1
            yield from ([Text()] if start else [])
            yield self._aside(start, count)
            start += count

    def _aside(self, start: int, count: int) -> Table:
        """Returns some of the rows as columns."""
        part = self.cells[start : start + count]
        made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        made.add_column(self.columns[0].header, header_style="dim", style="dim", overflow="fold")
        for row in part:
            made.add_column(row[0], justify="right", overflow="fold")
        for index, column in enumerate(self.columns[1:], 1):
            cells = [row[index] if index < len(row) else "" for row in part]
            if any(str(cell) for cell in cells):
                made.add_row(column.header, *cells)
        return made


def table(*columns: str, title: str | None = None, broad: bool = False) -> Sheet:
    """Returns an empty table: names to the left, numbers to the right."""
    made = Sheet(broad, title)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", header_style="dim", no_wrap=index == 0)
    return made


def size(count: int | None) -> str:
    """Returns bytes in the unit that reads best (decimal units, as file managers show)."""
    if count is None:
        return "–"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"


def milliseconds(value: float | None) -> str:
    """Returns a latency with three significant digits; a dash where there is none, as on an emulated device."""
    if value is None:
        return "–"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def percentiles(latency: Latency | None) -> list[str]:
    """Returns p50, p90 and p99 in ms."""
    if latency is None:
        return [milliseconds(None)] * 3
    return [milliseconds(value) for value in (latency.p50, latency.percentile(90), latency.percentile(99))]


def instructions(count: int | None, fp32: int | None = None) -> str:
    """Returns instructions in millions, and their share of the fp32 file's."""
    if count is None:
        return "–"
    return f"{count / 1e6:.3g} M" + (f" ({100 * count / fp32:.0f} % of fp32)" if fp32 else "")


def bundle_report(bundle: Bundle, layers: bool = False) -> RenderableType:
    """Shows what an export wrote, how each file was checked and what to know of it; with `layers` also each layer."""
    manifest = bundle.manifest
    precision = manifest["precision"]
    rows = table("file", "size", "SQNR", "max difference", "agreement")
    for entry in manifest["artifacts"]:
        near = entry["parity"]
        rows.add_row(
            entry["file"]
            if entry.get("precision", precision) == precision
            else f"{entry['file']} {entry['precision']}",
            size(entry["size_bytes"]),
            _decibel(near["sqnr_db"], near["max_abs"]),
            f"{near['max_abs']:.2g}",
            "–" if near["agreement"] is None else f"{100 * near['agreement']:.0f} %",
        )
    samples = manifest["artifacts"][0]["parity"]["samples"]
    checked = f"{samples} real samples" if samples else "random inputs"
    head = Text.assemble(("Wrote ", ""), (f"{bundle.path}/", "bold"), f"  {precision}, checked on {checked}")
    return Group(*([sensitivity_report(manifest["recipe"])] if layers else []), head, rows, *notes(bundle.notes))


def sensitivity_report(recipe: Mapping[str, Any]) -> RenderableType:
    """Shows what each layer costs when it alone is int8, the most sensitive first, and which of them are in float."""
    in_float = {layer["node"] for layer in recipe["float_layers"]}
    rows = table("layer", "op", "SQNR alone in int8", "weights", "")
    for layer in recipe["sensitivity"]:
        decibel = layer["sqnr_db"]
        rows.add_row(
            Text(layer["path"] or "–"),
            Text(layer["op"]),
            "equal" if decibel is None else f"{decibel:.1f} dB",
            f"{100 * layer['weight_share']:.2f} %",
            Text("in float", style="yellow") if layer["node"] in in_float else "",
        )
    return rows


def summarized(lines: Sequence[str]) -> list[str]:
    """Returns one line for all notes that differ in names and numbers alone, with their number; long lists are cut."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(_VARIES.sub("…", line), []).append(line)
    shown = []
    for first, *others in groups.values():
        is_list = len(first) > LONGEST_NOTE and first.count(", ") >= MOST_LISTED
        line = f"{first[:LONGEST_NOTE].rpartition(', ')[0]}, …" if is_list else first
        hidden = [f"{len(others)} more like it"] if others else []
        hidden += ["the rest of it"] if line != first else []
        shown.append(f"{line} ({' and '.join(hidden)}: --verbose)" if hidden else line)
    return shown


def notes(lines: Sequence[str]) -> list[Text]:
    """Returns one line for each note, or for all that are alike (see `summarized`) unless the user wants every one."""
    lines = lines if every_note.get() else summarized(lines)
    return [Text.assemble(("note: ", "yellow"), line) for line in lines]


def comparison_report(comparison: Comparison) -> RenderableType:
    """Shows every artifact beside the original: accuracy, speed, size, memory and the verdict with its reasons."""
    base = comparison.baseline
    labeled = base.accuracy is not None
    drop = "rise in % (95 %)" if base.unit == "percent" else "drop (95 %)"
    quality = [base.metric or "", drop] if labeled else ["agreement", "cosine"]
    rows = table(
        "artifact",
        *quality,
        "SQNR",
        "p50 ms",
        "p90",
        "p99",
        "vs fp32",
        "vs original",
        "size",
        "load ms",
        "memory",
        "verdict",
        broad=True,
    )
    first = quantity(base.accuracy, base.unit) if base.accuracy is not None else ""
    lat = base.latency
    emulated = any(m.timing == "emulated" for m in comparison.artifacts)
    if emulated:
        rows.add_column("instructions", justify="right", header_style="dim")
    rows.add_row(
        f"original ({base.device}{', cached' if base.cached else ''})",
        first,
        "",
        "",
        *percentiles(lat),
        "",
        "",
        "",
        "",
        "",
        "",
    )
    names = labels([m.artifact for m in comparison.artifacts])
    for m in comparison.artifacts:
        counted = [instructions(m.instructions, m.fp32_instructions)] if emulated else []
        rows.add_row(Text(names[m.artifact]), *_comparison_row(m, labeled), *counted)
    reasons = [
        Text.assemble(
            (f"{names[m.artifact]}: ", "bold"), (m.verdict.word, VERDICT_STYLES[m.verdict.word]), f"  {reason}"
        )
        for m in comparison.artifacts
        for reason in m.verdict.reasons
        if m.verdict.word != "ship"
    ]
    threads = f"{lat.threads} thread{'s' if lat.threads > 1 else ''}"
    rounds = len(next((m.latency.processes for m in comparison.artifacts if m.latency), lat.processes))
    processor = next((f" on {m.processor}" for m in comparison.artifacts if m.processor), "")
    caption = f"{base.samples:,} samples; latency{processor} over {rounds} interleaved processes, {threads}"
    caption += "".join(f"; {line}" for line in _how(comparison))
    if emulated:
        caption += f"; {EMULATED}"
    ladder = ladder_report(comparison) if comparison.ladder is not None else ()
    return Group(rows, Text(caption, style="dim"), *reasons, *notes(comparison.notes), *ladder)


def ladder_report(comparison: Comparison) -> tuple[RenderableType, ...]:
    """Shows each rung of the parity ladder, and the first that breaks with the first op in it."""
    rows = table("rung", "on", "SQNR", "max difference", "SQNR to the original", "result")
    for rung in comparison.ladder or ():
        near = rung.parity
        word = Text("ok", style="green") if rung.problem is None else Text("diverges", style="bold red")
        whole = _decibel(rung.to_original.sqnr_db, rung.to_original.max_abs)
        shown = _decibel(near.sqnr_db, near.max_abs), f"{near.max_abs:.2g}", whole
        rows.add_row(Text(rung.name), Text(rung.against), *shown, word)
    lines = []
    for rung in comparison.ladder or ():
        if rung.problem is not None:
            lines.append(Text.assemble((f"{rung.name}: ", "bold"), rung.problem))
            lines += [Text(f"  {culprit_line(rung.culprit)}")] if rung.culprit is not None else []
    first = comparison.first_divergence
    lines.append(Text(f"the first rung that diverges: {first.name}" if first else "no rung diverges", style="bold"))
    return (Text(), rows, *lines)


def culprit_line(culprit: Culprit | str) -> str:
    """Returns the first op that differs in a sentence, or the sentence that says why there is none."""
    if isinstance(culprit, str):
        return culprit
    near = f"{culprit.sqnr_db:.1f} dB" if isfinite(culprit.sqnr_db) else "no SQNR at all"
    return f"the first op that differs: {culprit.op} '{culprit.node}' ({near} to what EdgeKit exports now)"


def quantity(value: float, unit: Unit) -> str:
    """Returns a metric: shares in percent, all else as it is."""
    return f"{100 * value:.2f} %" if unit == "points" else f"{value:.4g}"


def _drop(accuracy: Accuracy) -> str:
    """Returns a drop, and below it its interval, and McNemar's p-value where there is one."""
    digits = UNITS[accuracy.unit][2]
    drop, low, high = (f"{value:{digits}}" for value in (accuracy.drop, *accuracy.ci95))
    shown = f"{drop}\n{low} to {high}" if isfinite(accuracy.ci95[1]) else f"{drop}\nno interval"
    return shown if accuracy.p_value is None else f"{shown}\np = {accuracy.p_value:.2g}"


def _faster(ratio: float | None, interval: Interval | None) -> str:
    """Returns a speed-up, and below it its interval; where that is too wide for a figure, it alone."""
    if ratio is None:
        return "–"
    if interval is None:
        return f"{times(ratio)}x"
    bounds = f"{times(interval[0])} to {times(interval[1])}"
    return f"not known\n{bounds}" if is_unsteady(interval) else f"{times(ratio)}x\n{bounds}"


def _how(comparison: Comparison) -> list[str]:
    """Returns how the intervals in the table were found."""
    ways = {
        "Tango": "drops by Tango's score interval, p by McNemar's exact test",
        "Gaffke": "drops by Gaffke's bounds, with one sample more that is lost wholly",
    }
    used = {m.accuracy.interval for m in comparison.artifacts if m.accuracy}
    found = [words for name, words in ways.items() if name in used]
    if any(m.speedup_fp32_ci95 for m in comparison.artifacts):
        found.append("speed-ups with Student's 95 % interval over the rounds")
    if any(is_unsteady(pair) for m in comparison.artifacts for pair in (m.speedup_fp32_ci95, m.speedup_ci95)):
        found.append(
            "where it is not known the rounds differ too much: measure on an idle machine, or with more --rounds"
        )
    return found


def _comparison_row(m: Measured, labeled: bool) -> list[RenderableType]:
    if m.accuracy is not None:
        quality = [quantity(m.accuracy.value, m.accuracy.unit), _drop(m.accuracy)]
    elif labeled:
        quality = ["–", "–"]
    else:
        agreement = m.parity.agreement
        quality = ["–" if agreement is None else f"{100 * agreement:.1f} %", f"{m.parity.cosine:.4f}"]
    return [
        *quality,
        _decibel(m.parity.sqnr_db, m.parity.max_abs),
        *percentiles(m.latency),
        _faster(m.speedup_fp32, m.speedup_fp32_ci95),
        _faster(m.speedup, m.speedup_ci95),
        size(m.artifact.size_bytes),
        milliseconds(m.load_ms),
        size(m.peak_rss_bytes),
        Text(m.verdict.word, style=VERDICT_STYLES[m.verdict.word]),
    ]


def count(number: int) -> str:
    """Returns a number in the unit that reads best."""
    for unit, factor in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)


def profile_report(profile: Profile) -> RenderableType:
    """Shows one file's latency, load time and memory; on an emulated device its instructions."""
    lat = profile.latency
    if lat is None:
        rows = table("file", "runtime", "instructions", "size")
        count = instructions(profile.instructions)
        rows.add_row(Text(profile.artifact.path.name), profile.runtime, count, size(profile.artifact.size_bytes))
        return Group(rows, Text(f"{profile.device}; {EMULATED}", style="dim"))
    rows = table("file", "runtime", "p50 ms", "p90", "p99", "load ms", "first ms", "memory", "size")
    rows.add_row(
        Text(profile.artifact.path.name),
        profile.runtime,
        *percentiles(lat),
        milliseconds(profile.load_ms),
        milliseconds(profile.first_ms),
        size(profile.peak_rss_bytes),
        size(profile.artifact.size_bytes),
    )
    processes = f"{len(lat.processes)} process{'es' if len(lat.processes) != 1 else ''}"
    caption = f"{counted(len(lat.samples), 'run')} in {processes}, {counted(lat.threads, 'thread')}, {profile.device}"
    times = [Text(), ops_report(profile.ops)] if profile.ops is not None else []
    return Group(rows, Text(caption, style="dim"), *times, *notes(profile.notes))


def profiles_report(profiles: Sequence[Profile]) -> RenderableType:
    """Shows each file of a bundle."""
    return Group(*(part for profile in profiles for part in (profile_report(profile), Text())))


def ops_report(times: OpTimes) -> RenderableType:
    """Shows the time of each kind of op and between the ops, and what a run with and without the profiler takes."""
    inflated = times.scale < 1
    rows = table("op", "count", "µs", "share", *(["µs scaled"] if inflated else []))
    for op, (count, us) in times.by_op().items():
        scaled = [f"{us * times.scale:.1f}"] if inflated else []
        rows.add_row(Text(op), str(count), *_part(us, times.whole_us), *scaled)
    rows.add_row(Text("runtime, between the ops", style="dim"), "", *_part(times.between_us, times.whole_us))
    rows.add_row("a run under the profiler", "", *_part(times.whole_us, times.whole_us))
    told = f"means of {times.runs} typical runs of {times.recorded}; a run without profiler takes "
    told += f"{times.latency_us:.1f} µs (p50), call included"
    if inflated:
        told += "; the profiler's own cost is in the times, and scaled those of the ops sum to the p50"
    elif times.whole_us > times.latency_us:
        told += "; the profiler's own cost is in the times, most of it between the ops"
    return Group(rows, Text(told, style="dim"))


def _part(us: float, whole_us: float) -> tuple[str, str]:
    return f"{us:.1f}", f"{100 * us / (whole_us or 1):.1f} %"


def replay_report(replays: Sequence[Replay]) -> RenderableType:
    """Shows whether each file of a bundle still gives the outputs that it gave when it was exported."""
    rows = table("file", "max difference", "result")
    for replay in replays:
        word = Text("ok", style="green") if replay.problem is None else Text(replay.problem, style="red")
        rows.add_row(Text(replay.artifact.path.name), f"{replay.parity.max_abs:.2g}" if replay.parity else "–", word)
    return rows


def targets_report() -> RenderableType:
    """Shows the targets."""
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("target", "formats", "precision", "device", "for"):
        rows.add_column(column)
    for name, target in TARGETS.items():
        rows.add_row(name, ", ".join(target.formats), target.precision, target.device, target.summary)
    return rows


def _decibel(value: float | None, max_abs: float | None) -> str:
    if max_abs == 0:
        return "equal"
    return "–" if value is None or not isfinite(value) else f"{value:.1f} dB"
