"""Doctor: every dependency has a row, CPU features are read right, and what is missing is told with its remedy."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from edgekit.doctor import packages
from edgekit.reports import doctor

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse4_2 avx avx2 avx512f avx512_vnni avx_vnni amx_tile amx_int8 avx512_fp16
bugs\t\t: spectre_v1

processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse4_2 avx avx2 avx512f avx512_vnni avx_vnni amx_tile amx_int8 avx512_fp16
"""
OLD_PC = "processor\t: 0\nmodel name\t: Intel(R) Core(TM) i5-3570\nflags\t\t: fpu sse4_2 avx\n"
PI5 = """processor\t: 0
Features\t: fp asimd evtstrm crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b

Revision\t: c04170
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""
BIG_LITTLE = """processor\t: 0
Features\t: fp asimd asimdhp asimddp
CPU part\t: 0xd05

processor\t: 4
Features\t: fp asimd asimdhp asimddp i8mm sve
CPU part\t: 0xd41
"""
# text, architecture, name, features that are there
CPUS = {
    "xeon": (
        XEON, "x86_64", "Intel(R) Xeon(R) Platinum 8480+",
        {"avx2", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_fp16"},
    ),
    "old pc": (OLD_PC, "x86_64", "Intel(R) Core(TM) i5-3570", set()),
    "raspberry pi 5": (PI5, "aarch64", "Raspberry Pi 5 Model B Rev 1.0", {"asimddp", "asimdhp"}),
    "only what every core has": (BIG_LITTLE, "aarch64", "ARM CPU part 0xd05, 0xd41", {"asimddp", "asimdhp"}),
    "unknown": ("", "riscv64", "", set()),
}  # fmt: skip


@pytest.mark.parametrize("case", CPUS)
def test_cpu(case: str) -> None:
    text, architecture, name, present = CPUS[case]
    found = packages.features(text, architecture)
    assert packages.cpu_name(text) == name
    assert {feature.name for feature in found if feature.present} == present
    table = {"x86_64": packages.X86_FEATURES, "aarch64": packages.ARM_FEATURES}.get(architecture, {})
    assert [feature.name for feature in found] == list(table)
    assert all(feature.brings for feature in found)


def test_every_dependency_has_a_row_and_every_format_its_packages() -> None:
    diagnosis = packages.diagnose()
    lines = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    declared = {Requirement(line).name for line in lines}
    assert {d.name for d in diagnosis.dependencies if d.required} == declared
    assert {d.name for d in diagnosis.dependencies} - declared == {"tflite-runtime"}
    assert {name for names in packages.FORMATS.values() for name in names} <= declared
    assert set(packages.MODULES) <= declared
    for d in diagnosis.dependencies:
        if d.required:
            assert d.installed == importlib.metadata.version(d.name)
    assert diagnosis.ok and diagnosis.formats == tuple(packages.FORMATS)


def test_the_formats_are_those_of_the_targets() -> None:
    from edgekit.types import SUFFIXES

    assert set(packages.FORMATS) == set(SUFFIXES)


def test_json_and_terminal() -> None:
    diagnosis = packages.diagnose()
    values = json.loads(json.dumps(diagnosis.to_dict()))
    assert values["ok"] is True and values["machine"]["cores"] >= 1
    assert len(values["dependencies"]) == len(diagnosis.dependencies)
    console = Console(width=200, record=True)
    console.print(doctor.render(diagnosis))
    text = console.export_text()
    assert all(d.name in text for d in diagnosis.dependencies) and diagnosis.verdict in text


def declare(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(packages, "requirements", lambda: [Requirement(line) for line in lines])


def test_missing_and_untested_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "edgekit-no-such-package>=1", "numpy<1", "rich>=1", "torch==0.4")
    diagnosis = packages.diagnose()
    found = {d.name: d for d in diagnosis.dependencies}
    assert [found[n].status for n in ("edgekit-no-such-package", "numpy", "rich", "torch")] == [
        "missing", "untested", "ok", "untested",
    ]  # fmt: skip
    assert found["numpy"].install == f"{sys.executable} -m pip install 'numpy<1'"
    assert found["torch"].install is not None and found["torch"].install.endswith(
        "https://download.pytorch.org/whl/cpu"
    )
    assert found["rich"].install is None
    assert not diagnosis.ok and diagnosis.formats == ()
    assert "missing or broken: edgekit-no-such-package" in diagnosis.verdict
    console = Console(width=200, record=True)
    console.print(doctor.render(diagnosis))
    assert "pip install 'numpy<1'" in console.export_text()


def test_an_untested_version_is_told_but_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "numpy<1")
    diagnosis = packages.diagnose()
    assert diagnosis.ok and "untested versions: numpy" in diagnosis.verdict


def test_deep_imports_each_package(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "rich", "numpy", "typer")
    monkeypatch.setitem(packages.MODULES, "typer", "typer.no_such_module")
    found = {d.name: d for d in packages.diagnose(deep=True).dependencies}
    assert (found["rich"].imported, found["numpy"].imported) == (True, True)
    assert found["typer"].status == "broken" and "no_such_module" in (found["typer"].problem or "")
    assert "--force-reinstall" in (found["typer"].install or "")


def test_an_import_that_hangs_is_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "slow_package.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(packages, "IMPORT_TIMEOUT_S", 0.5)
    assert "no answer" in (packages.import_problems(["slow-package"])["slow-package"] or "")


def test_tflite_runtime_in_another_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    for body, status, installed in (
        ("echo 2.14.0", "ok", "2.14.0"),
        ("echo 2.11.0", "untested", "2.11.0"),
        ("echo 'No module named x' >&2; exit 1", "broken", None),
    ):
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(0o755)
        monkeypatch.setenv(packages.OTHER_PYTHON, str(python))
        row = packages.diagnose().dependencies[-1]
        assert (row.name, row.status, row.installed) == ("tflite-runtime", status, installed)
    monkeypatch.setenv(packages.OTHER_PYTHON, str(tmp_path / "missing"))
    diagnosis = packages.diagnose()
    assert diagnosis.dependencies[-1].status == "broken" and diagnosis.ok  # it is optional


def test_doctor_imports_nothing_heavy() -> None:
    question = (
        "import sys; from edgekit.doctor import packages; packages.diagnose(); "
        "print([m for m in ('torch', 'onnx', 'numpy', 'executorch') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", question], capture_output=True, text=True, cwd=PYPROJECT.parent, check=True
    )
    assert answer.stdout.strip() == "[]"
