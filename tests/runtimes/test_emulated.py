"""What an emulator's clock says is shown nowhere: instructions are, and called that."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from kit import network, quick, samples
from rich.console import Console, RenderableType
from servers import missing_qemu, skip

import edgekit
from edgekit.artifacts.bundles import Bundle
from edgekit.errors import EdgeKitError
from edgekit.reports import tables
from edgekit.runtimes.devices import qemu

FIGURES = ("latency_ms", "load_ms", "first_ms", "peak_rss_bytes")


@pytest.fixture(autouse=True)
def emulator() -> None:
    if reason := missing_qemu():
        skip(reason)


def shown(renderable: RenderableType) -> str:
    console = Console(width=250)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_profile(bundles: dict[str, Bundle]) -> None:
    path = next(file.path for file in bundles["int8"].artifacts if file.format == "executorch")
    profile = edgekit.profile(path, device="qemu:arm64?cpu=cortex-a76")
    values = profile.to_dict()
    assert values["timing"] == "emulated" and not any(values[name] for name in FIGURES)
    text = shown(tables.profile_report(profile))
    assert "instructions" in text and "emulated" in text and not re.search(r"\bms\b", text)
    again = edgekit.profile(path, device="qemu:arm64?cpu=cortex-a76")
    older = edgekit.profile(path, device="qemu:arm64?cpu=cortex-a72")
    assert profile.instructions is not None and older.instructions is not None
    assert again.instructions == pytest.approx(profile.instructions, rel=1e-3)
    assert older.instructions > profile.instructions  # it has no int8 dot products


@pytest.mark.parametrize("lacks", ["gcc", "plugins"])
def test_what_cannot_be_counted_is_told_before_work_starts(
    lacks: str, bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = shutil.which
    if lacks == "gcc":
        monkeypatch.setattr(shutil, "which", lambda name: None if name == "gcc" else which(name))
    else:  # Debian's qemu-user-static is the same program under another name
        (tmp_path / "qemu-aarch64-static").symlink_to(which("qemu-aarch64"))
        monkeypatch.setattr(qemu, "PROGRAMS", (str(tmp_path / "qemu-aarch64-static"),))
    for ask in (
        lambda: edgekit.profile(bundles["int8"].artifacts[0].path, device="qemu:arm64"),
        lambda: edgekit.compare(network(), [bundles["int8"]], data=samples(), device="qemu:arm64"),
    ):
        with pytest.raises(EdgeKitError, match="plugin"):
            ask()


def test_compare(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    paths = [next(f.path for f in bundles[p].artifacts if f.format == "executorch") for p in ("fp32", "int8")]
    comparison = edgekit.compare(network(), paths, data=samples(), device="qemu:arm64")
    int8 = comparison.artifacts[1]
    values = int8.to_dict()
    assert values["timing"] == "emulated" and not any(values[name] for name in FIGURES)
    assert int8.speedup is None and int8.speedup_fp32 is None
    assert int8.instructions and int8.fp32_instructions == pytest.approx(comparison.artifacts[0].instructions, rel=1e-3)
    assert not any("speed of fp32" in reason for reason in int8.verdict.reasons)
    assert int8.accuracy is not None and int8.accuracy.n == len(samples()["y"])
    assert any("no speed-up" in note for note in comparison.notes)
    text = shown(tables.comparison_report(comparison))
    assert "% of fp32" in text and "emulated: instructions" in text
