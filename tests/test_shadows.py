"""No process of a command imports from the current directory: files there bear the names of all that is imported."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kit import ROOT, command, environment

from edgekit.doctor import packages
from edgekit.runtimes.table import RUNTIMES

PACKAGES = (
    *(packages.MODULES.get(r.name, r.name.replace("-", "_")).partition(".")[0] for r in packages.requirements()),
    *("tflite_runtime", "google", "sympy", "ml_dtypes", "pip", "edgekit_job", "session", "measure", "worker"),
    *(name for runtime in RUNTIMES.values() for name in (runtime.module, *runtime.helpers)),
)
# `python -m edgekit` itself starts with the current folder on the path, before EdgeKit can take it off.
OWN = {"edgekit", "importlib", "runpy", "pkgutil", "__main__"}
COMMANDS = {
    "export": ("export", "net.py:make", "--target", "x86", "--precision", "int8", "--format", "onnx",
               "--data", "data.npz", "--out", "out"),
    "verify": ("verify", "out/net-x86"),
    "verify elsewhere": ("verify", "out/net-x86", "--device", f"python:{sys.executable}"),
    "doctor": ("doctor",),
}  # fmt: skip


@pytest.fixture(scope="module")
def shadowed(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.py, data.npz, and a file for each name, which would leave a mark and fail."""
    folder = tmp_path_factory.mktemp("shadowed")
    for name in {*PACKAGES, *sys.stdlib_module_names} - OWN:
        mark = f"open({str(folder / 'ran')!r}, 'a').write('{name} ')"
        (folder / f"{name}.py").write_text(f"{mark}\nraise SystemExit(9)\n")
    for name in ("net.py", "data.npz"):
        shutil.copy(workshop / name, folder)
    return folder


def run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=folder, env=environment(), capture_output=True, text=True)


@pytest.mark.parametrize("case", COMMANDS)
def test_commands_import_nothing_from_the_current_folder(case: str, shadowed: Path) -> None:
    done = run(shadowed, sys.executable, "-P", *command(*COMMANDS[case])[1:])
    assert not (shadowed / "ran").exists(), (shadowed / "ran").read_text()
    assert done.returncode in (0, 1) if case == "doctor" else done.returncode == 0, done.stderr


def test_packages_are_not_taken_from_the_current_folder_by_python_m(shadowed: Path) -> None:
    for name in sys.stdlib_module_names:  # Python itself imports some before the first line of EdgeKit
        (shadowed / f"{name}.py").unlink(missing_ok=True)
    done = run(shadowed, *command("targets"))
    assert done.returncode == 0, done.stderr
    assert not (shadowed / "ran").exists(), (shadowed / "ran").read_text()


def test_every_dependency_is_imported_from_where_it_is_installed(
    shadowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shadowed)
    monkeypatch.setenv(packages.OTHER_PYTHON, sys.executable)
    assert packages.import_problems(["onnx", "numpy"]) == {"onnx": None, "numpy": None}
    packages._tflite_runtime(deep=True)
    assert not (shadowed / "ran").exists(), (shadowed / "ran").read_text()


def test_each_child_of_ours_leaves_the_current_folder_out() -> None:
    """Every `python -c` and `python -m` in the sources has -P, or takes the folder off the path in its first line."""
    calls = []
    for part in ("edgekit", "runtimes", "quant", "exporters"):
        for path in (ROOT / part).rglob("*.py"):
            calls += [(path.name, line) for line in path.read_text().splitlines() if re.search(r'[\[ ]"-[cm]",', line)]
    ours = [(name, line) for name, line in calls if re.search(r"(python|executable)[,\]]", line) and '"sh"' not in line]
    assert len(ours) >= 6
    for name, line in ours:
        assert '"-P"' in line or "NOT_FROM_HERE" in line or "question" in line or "{ask}" in line, (name, line)
