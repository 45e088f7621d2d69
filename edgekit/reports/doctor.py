"""What people read of the doctor: packages, this machine, and devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.doctor.device import DeviceDiagnosis
from edgekit.doctor.packages import Diagnosis

if TYPE_CHECKING:
    from rich.console import RenderableType


STYLES = {"ok": "green", "untested": "yellow", "missing": "red", "broken": "red"}


def render(diagnosis: Diagnosis) -> RenderableType:
    """Returns what the terminal shows of a diagnosis."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from edgekit.reports.tables import size

    machine = diagnosis.machine
    packages = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("package", "installed", "tested", "status"):
        packages.add_column(column)
    for d in diagnosis.dependencies:
        word = d.status if d.required or d.status != "missing" else "not installed (optional)"
        style = STYLES[d.status] if d.required else "dim"
        status = Text(word + (", imports" if d.imported else ""), style=style)
        if d.problem:
            status.append(f": {d.problem}")
        packages.add_row(d.name, d.installed or "–", d.tested, status)
    abilities = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for feature in machine.features:
        mark = Text("yes", style="green") if feature.present else Text("no", style="dim")
        abilities.add_row(f"  {feature.name}", mark, Text(feature.brings, style="" if feature.present else "dim"))
    gpus = ", ".join(machine.gpus) or "no NVIDIA GPU"
    if machine.torch_cuda is not None:
        gpus += f"; torch CUDA: {machine.torch_cuda}"
    commands = [
        Text.assemble(("install: " if d.required else "optional: ", "yellow"), d.install)
        for d in diagnosis.dependencies
        if d.install
    ]
    return Group(
        packages,
        Text(),
        Text(f"Python {machine.python} on {machine.system} ({machine.architecture})"),
        Text(f"{machine.cpu}, {machine.cores} cores, {size(machine.memory_bytes)} memory; {gpus}"),
        abilities,
        Text(),
        *commands,
        Text(diagnosis.verdict, style="bold green" if diagnosis.ok else "bold red"),
    )


def render_device(diagnosis: DeviceDiagnosis) -> RenderableType:
    """Returns what the terminal shows of a device."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from edgekit.reports.tables import size

    now, most = diagnosis.ghz
    clock = "not readable" if now is None and most is None else " of ".join(f"{g:.2f} GHz" for g in (now, most) if g)
    heat = ", ".join(f"{name} {degrees:.0f} °C" for name, degrees in sorted(diagnosis.temperatures_c.items())[:6])
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    rows.add_column(style="dim")
    rows.add_row("device", Text(diagnosis.uri, style="bold"))
    rows.add_row("system", ", ".join(filter(None, (diagnosis.model, diagnosis.os, diagnosis.system))))
    rows.add_row("processor", f"{diagnosis.cpu} ({diagnosis.machine}), {diagnosis.cores or '?'} cores")
    rows.add_row(
        "memory", f"{size(diagnosis.memory_bytes)}, {size(diagnosis.memory_available_bytes)} of them available"
    )
    rows.add_row("disk for jobs", f"{size(diagnosis.disk_free_bytes)} free")
    rows.add_row("governor", ", ".join(diagnosis.governors) or "not readable")
    rows.add_row("clock", clock)
    rows.add_row("temperature", heat or "not readable")
    rows.add_row("Python", diagnosis.python or "none")
    abilities = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for feature in diagnosis.features:
        mark = Text("yes", style="green") if feature.present else Text("no", style="dim")
        abilities.add_row(f"  {feature.name}", mark, Text(feature.brings, style="" if feature.present else "dim"))
    runtimes = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("runtime", "runs", "version", "install"):
        runtimes.add_column(column)
    for runtime in diagnosis.runtimes:
        version = Text(runtime.version, style="green") if runtime.version else Text("none", style="dim")
        runtimes.add_row(runtime.name, runtime.format, version, Text(runtime.install or "", style="dim"))
    notes = [Text.assemble(("note: ", "yellow"), line) for line in diagnosis.notes]
    verdict = Text(diagnosis.verdict, style="bold green" if diagnosis.ok else "bold red")
    return Group(rows, abilities, Text(), runtimes, *notes, Text(), verdict)
