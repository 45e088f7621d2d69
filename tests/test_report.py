"""The tables as a terminal shows them: nothing is cut off, however narrow it is."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from edgekit import targets
from edgekit.artifacts.artifact import Artifact
from edgekit.commands import compare
from edgekit.judging.results import Baseline, Comparison, Measurement, Verdict
from edgekit.measuring.latency import Latency
from edgekit.metrics.accuracy import Accuracy
from edgekit.metrics.parity import Parity
from edgekit.reports import tables

NEAR = Parity(29.2, 0.3, 0.01, 1, 1, 2000)
CPU = "Intel(R) Xeon(R) Processor @ 2.10GHz (x86_64)"


def latency(*medians: float) -> Latency:
    return Latency(tuple((ms, ms * 1.05, ms * 1.2, ms) for ms in medians), 1)


def shown(renderable: RenderableType, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, highlight=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Three files, one of which was disturbed."""
    original, measured = latency(1.18, 1.2, 1.1), []
    for suffix, format in ((".pte", "executorch"), (".onnx", "onnx"), (".tflite", "tflite")):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(bytes(131_000))
        accuracy = Accuracy("top1", 2000, 0.9125, 0.9125, (-0.32, 0.32), p_value=1.0, lost=5, won=5)
        fp32 = latency(0.1, 0.8, 0.2) if format == "tflite" else latency(0.1, 0.11, 0.105)
        word = "inconclusive" if format == "tflite" else "ship"
        measured.append(
            Measurement(
                Artifact(path, format, "int8"), "runtime", "local:", NEAR, accuracy,
                latency(0.083, 0.084, 0.0831), fp32, original, 1.87, 0.2, 236_000_000,
                Verdict(word, ("a reason",)), processor=CPU,
            )
        )  # fmt: skip
    return Comparison(Baseline("m", "cpu", 0.9125, "top1", 2000, original), tuple(measured))


PARTS = (
    "original (cpu)", "model.pte int8", "model.onnx int8", "model.tflite int8", "verdict", "inconclusive", "91.25 %",
    "-0.32 to 0.32", "p = 1", "29.2 dB", "0.0852", "131 kB", "236 MB", "not known", CPU,
)  # fmt: skip


@pytest.mark.parametrize("width", [45, 80, 100, 120, 200])
def test_nothing_of_a_comparison_is_cut_off(width: int, comparison: Comparison) -> None:
    text = shown(tables.comparison_report(comparison), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for part in PARTS:
        assert part in words
    assert words.count("ship") == 2


def test_the_table_of_the_example_fits_a_terminal_of_80_columns_as_one(comparison: Comparison) -> None:
    text = shown(tables.comparison_report(comparison), 80)
    assert text.count("drop (95 %)") == 1
    head = "artifact original (cpu) model.pte int8 model.onnx int8 model.tflite int8"
    assert text.splitlines()[0].split() == head.split()


@pytest.mark.parametrize("width", [30, 80])
def test_a_table_with_a_long_name_is_not_cut_off(width: int) -> None:
    rows = tables.table("file", "runtime", "p50 ms", "p90", "p99", "load ms", "memory")
    name = "a-file-with-quite-a-long-name-of-its-own.tflite"
    rows.add_row(name, "LiteRT", "0.123", "0.234", "0.345", "1.87", "236 MB")
    text = shown(rows, width)
    assert "…" not in text
    joined = "".join(line.replace("file", "", 1).strip() for line in text.splitlines()[:2])
    assert name.replace("file", "")[:20] in joined.replace("file", "")
    for part in ("0.123", "0.234", "0.345", "1.87", "236 MB"):
        assert part in text


MACHINES = {
    ("android", "x86_64"): "latency not measured on the target (android): --device adb:SERIAL",
    ("ios", "x86_64"): "latency not measured on the target (ios): --device ssh://user@host",
    ("linux-arm64", "AMD64"): "latency not measured on the target (linux-arm64): --device ssh://user@host",
    ("x86", "aarch64"): "latency not measured on the target (x86): --device local:",
    ("android", "aarch64"): None,
    ("ios", "arm64"): None,
    ("x86", "x86_64"): None,
    ("x86", "AMD64"): None,
    (None, "riscv64"): None,
    ("a target of another version", "x86_64"): None,
}


@pytest.mark.parametrize("case", MACHINES)
def test_a_file_is_not_judged_by_the_times_of_another_processor(case: tuple[str | None, str]) -> None:
    target, machine = case
    assert compare.elsewhere(Artifact(Path("m.onnx"), "onnx", "int8", target=target), machine) == MACHINES[case]


def test_every_target_has_a_machine_that_is_tried() -> None:
    assert {target for target, _ in MACHINES if target in targets.TARGETS} == set(targets.TARGETS)
