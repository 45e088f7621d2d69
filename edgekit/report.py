"""What people read: tables for the terminal. Programs read the `to_dict` of the same results."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgekit.bundle import Bundle
from edgekit.results import Comparison, Measurement, Profile, Replay
from edgekit.targets import TARGETS

VERDICT_STYLES = {"ship": "bold green", "reject": "bold red", "inconclusive": "bold yellow"}


def table(*columns: str, title: str | None = None) -> Table:
    """Returns an empty table in EdgeKit's one style: names to the left, numbers to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
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


def milliseconds(value: float) -> str:
    """Returns a latency with three significant digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def bundle_report(bundle: Bundle) -> RenderableType:
    """Shows what an export wrote, how each file was checked, and what the user should know."""
    manifest = bundle.manifest
    rows = table("file", "size", "SQNR", "max difference", "agreement")
    for entry in manifest["artifacts"]:
        near = entry["parity"]
        rows.add_row(
            entry["file"],
            size(entry["size_bytes"]),
            _decibel(near["sqnr_db"], near["max_abs"]),
            f"{near['max_abs']:.2g}",
            "–" if near["agreement"] is None else f"{100 * near['agreement']:.0f} %",
        )
    samples = manifest["artifacts"][0]["parity"]["samples"]
    checked = f"{samples} real samples" if samples else "random inputs"
    head = Text.assemble(
        ("Wrote ", ""), (f"{bundle.path}/", "bold"), f"  {manifest['precision']}, checked on {checked}"
    )
    return Group(head, rows, *notes(bundle.notes))


def notes(lines: Sequence[str]) -> list[Text]:
    """Returns one line for each note."""
    return [Text.assemble(("note: ", "yellow"), line) for line in lines]


def comparison_report(comparison: Comparison) -> RenderableType:
    """Shows every artifact beside the original: accuracy, speed, size, memory and the verdict with its reasons."""
    base = comparison.baseline
    labeled = base.accuracy is not None
    quality = [base.metric or "", "drop (95 %)"] if labeled else ["agreement", "cosine"]
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
    )
    first = f"{100 * base.accuracy:.2f} %" if base.accuracy is not None else ""
    lat = base.latency
    rows.add_row(
        f"original ({base.device})",
        first,
        "",
        "",
        milliseconds(lat.p50),
        milliseconds(lat.percentile(90)),
        milliseconds(lat.percentile(99)),
        "",
        "",
        "",
        "",
        "",
        "",
    )
    for m in comparison.artifacts:
        rows.add_row(*_comparison_row(m))
    reasons = [
        Text.assemble((f"{_label(m)}: ", "bold"), (m.verdict.word, VERDICT_STYLES[m.verdict.word]), f"  {reason}")
        for m in comparison.artifacts
        for reason in m.verdict.reasons
        if m.verdict.word != "ship"
    ]
    threads = f"{lat.threads} thread{'s' if lat.threads > 1 else ''}"
    caption = f"{base.samples:,} samples; latency over {len(lat.processes)} interleaved processes, {threads}"
    return Group(rows, Text(caption, style="dim"), *reasons, *notes(comparison.notes))


def _comparison_row(m: Measurement) -> list[RenderableType]:
    if m.accuracy is not None:
        low, high = m.accuracy.ci95
        quality = [f"{100 * m.accuracy.value:.2f} %", f"{m.accuracy.drop:.2f} ({low:.2f} to {high:.2f})"]
    else:
        agreement = m.parity.agreement
        quality = ["–" if agreement is None else f"{100 * agreement:.1f} %", f"{m.parity.cosine:.4f}"]
    return [
        _label(m),
        *quality,
        _decibel(m.parity.sqnr_db, m.parity.max_abs),
        milliseconds(m.latency.p50),
        milliseconds(m.latency.percentile(90)),
        milliseconds(m.latency.percentile(99)),
        f"{m.speedup_fp32:.2f}x" if m.speedup_fp32 else "–",
        f"{m.speedup:.2f}x",
        size(m.artifact.size_bytes),
        milliseconds(m.load_ms),
        size(m.peak_rss_bytes),
        Text(m.verdict.word, style=VERDICT_STYLES[m.verdict.word]),
    ]


def profile_report(profile: Profile) -> RenderableType:
    """Shows one file's latency, load time and memory."""
    rows = table("file", "runtime", "p50 ms", "p90", "p99", "load ms", "first ms", "memory", "size")
    lat = profile.latency
    rows.add_row(
        profile.artifact.path.name,
        profile.runtime,
        milliseconds(lat.p50),
        milliseconds(lat.percentile(90)),
        milliseconds(lat.percentile(99)),
        milliseconds(profile.load_ms),
        milliseconds(profile.first_ms),
        size(profile.peak_rss_bytes),
        size(profile.artifact.size_bytes),
    )
    caption = f"{len(lat.samples):,} runs in {len(lat.processes)} processes, {lat.threads} thread(s), {profile.device}"
    return Group(rows, Text(caption, style="dim"))


def replay_report(replays: Sequence[Replay]) -> RenderableType:
    """Shows whether each file of a bundle still gives the outputs that it gave when it was exported."""
    rows = table("file", "max difference", "result")
    for replay in replays:
        word = Text("ok", style="green") if replay.problem is None else Text(replay.problem, style="red")
        rows.add_row(replay.artifact.path.name, f"{replay.parity.max_abs:.2g}" if replay.parity else "–", word)
    return rows


def targets_report() -> RenderableType:
    """Shows the targets."""
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("target", "formats", "precision", "device", "for"):
        rows.add_column(column)
    for name, target in TARGETS.items():
        rows.add_row(name, ", ".join(target.formats), target.precision, target.device, target.summary)
    return rows


def _label(m: Measurement) -> str:
    return f"{m.artifact.path.name} {m.artifact.precision}"


def _decibel(value: float | None, max_abs: float | None) -> str:
    if max_abs == 0:
        return "equal"
    return "–" if value is None or not isfinite(value) else f"{value:.1f} dB"
