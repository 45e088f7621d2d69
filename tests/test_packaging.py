"""The wheel: every package with every file, nothing beside `edgekit`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"edgekit": "edgekit", "examples": "edgekit/examples", "exporters": "edgekit/exporters",
           "quant": "edgekit/quant", "runtimes": "edgekit/runtimes"}  # fmt: skip
EXAMPLE = {"model.pt", "lenet.pt", "data.npz", "README.md"}


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel that is built from a copy: building leaves its traces beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build"))
    for name in (".git", ".ci"):
        assert not (folder / "copy" / name).exists()
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    ran = subprocess.run(build, cwd=folder / "copy", capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_source_file(contents: set[str]) -> None:
    expected = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for folder, package in SOURCES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(expected) > 50
    assert expected <= contents


def test_the_wheel_holds_the_example(contents: set[str]) -> None:
    assert {f"edgekit/examples/fashion_mnist/{name}" for name in EXAMPLE} <= contents


def test_the_wheel_adds_no_other_name_to_site_packages(contents: set[str]) -> None:
    assert {name.partition("/")[0] for name in contents if ".dist-info" not in name} == {"edgekit"}
    assert not [name for name in contents if "tests" in name or name.endswith(".log")]


def test_every_folder_of_sources_is_a_package_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(project["tool"]["setuptools"]["packages"])
    expected = {
        ".".join((*package.split("/"), *path.parent.relative_to(ROOT / folder).parts))
        for folder, package in SOURCES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert packages == expected


def test_the_command_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"edgekit": "edgekit.cli.app:main"}
