"""The code's own standards: Ruff on the checkout, mypy on the installed wheel, README and CI in step."""

import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ruff_finds_nothing() -> None:
    run(sys.executable, "-m", "ruff", "check", ".", cwd=ROOT)


def test_code_is_formatted() -> None:
    run(sys.executable, "-m", "ruff", "format", "--check", ".", cwd=ROOT)


def test_mypy_accepts_the_installed_wheel(tmp_path: Path) -> None:
    try:
        installed = [str(file) for file in files("edgekit") or ()]
    except ModuleNotFoundError:
        installed = []
    if "edgekit/quant/ptq/recipes.py" not in installed:
        pytest.skip("mypy cannot follow the folder mapping of a checkout: install the wheel (pip install .)")
    run(sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "edgekit", cwd=tmp_path)


def test_ci_runs_the_readme_command() -> None:
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith("-m pytest")]
    assert len(commands) == 1
    assert "pip install" in commands[0] and "'.[test]'" in commands[0]
