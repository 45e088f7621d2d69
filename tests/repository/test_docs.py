"""The pages: they build strictly, every command and Python block runs on the example, and JSON is as they tell."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from kit import ROOT, environment, invoke, quick

from edgekit.examples import fashion_mnist

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
JSON_PAGE = ROOT / "docs" / "bundle-and-json.md"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")  # the first line of a Python block that is a file
NEW_ENVIRONMENT = "python3 -m venv"  # README's two commands: .ci/run and test_packaging run them
README_LINES = 120
# Long runs that CONTRIBUTING.md names, and the same in short. What test_faults.py kills, pytest runs once.
SHORT = {
    "python tests/exporters/test_onnx_backend.py": "python tests/exporters/test_onnx_backend.py 400",
    "python tests/exporters/test_architectures.py --full": "python tests/exporters/test_architectures.py --help",
    "python tests/exporters/check_random.py float 0 10000": "python tests/exporters/check_random.py float 0 5",
    "python tests/exporters/check_random.py int8 0 3000": "python tests/exporters/check_random.py int8 0 5",
    "python tests/exporters/check_random.py torch 0 200": "python tests/exporters/check_random.py torch 0 1",
    "python tests/exporters/pte_audit.py --full": "python tests/exporters/pte_audit.py --full --only 'pad rank 1'",
    "python tests/hostile_files.py --full --mutations 500": "python tests/hostile_files.py --only pt2",
    "python tests/test_faults.py": "",
    "python benchmarks/judging.py --sets 300": "python benchmarks/judging.py --sets 2 top1",
    "python benchmarks/memory.py compare --samples 1000,5000,20000": "python benchmarks/memory.py compare --samples 8",
    "python benchmarks/memory.py export --precision fp32,int8": "python benchmarks/memory.py export --help",
}


class Block(NamedTuple):
    """A fenced block: `bash` or `python`, and what is in it."""

    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands of a bash block, those over several lines as one."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


def blocks(page: Path) -> list[Block]:
    return [Block(language, text) for language, text in BLOCK.findall(page.read_text("utf-8"))]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the folder of the example holds, and a quarter of the samples to calibrate on."""
    folder = tmp_path / "fashion_mnist"
    shutil.copytree(Path(fashion_mnist.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    with np.load(folder / "data.npz") as data:
        few = {name: array[:128] if name.startswith("calib_") else array for name, array in data.items()}
    np.savez(folder / "data.npz", **few)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    quick(monkeypatch)
    for name in ("model", "samples", "loop", "metric"):  # another page's files of the same names
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run_on_the_example(page: Path, example: Path, capfd: pytest.CaptureFixture) -> None:
    for block in blocks(page):
        if block.language == "python":
            run_python(block, example)
            continue
        for command in block.commands:
            if NEW_ENVIRONMENT not in command:
                program, *arguments = shlex.split(command)
                assert program == "edgekit", command
                ran = invoke(capfd, *arguments)
                assert ran.code == 0, f"{command}\n{ran.err}"
    if page == JSON_PAGE:
        check_json(example)


def run_python(block: Block, folder: Path) -> None:
    named = FILE.match(block.text)
    if named:
        (folder / named[1]).write_text(block.text)
    else:
        exec(compile(block.text, "<page>", "exec"), {"__name__": "page"})


def test_long_commands_run_in_short() -> None:
    named = [command for block in blocks(CONTRIBUTING) for command in block.commands]
    assert named == list(SHORT)
    for short in filter(None, SHORT.values()):
        program = [sys.executable, *shlex.split(short)[1:]]
        ran = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert ran.returncode == 0, f"{short}\n{ran.stdout}\n{ran.stderr}"


def test_pages_build(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "edgekit.commands.export.export" in (tmp_path / "site" / "python-api" / "index.html").read_text("utf-8")


def test_readme_is_short_and_names_every_page() -> None:
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= README_LINES
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", text))
    assert linked == {page.name for page in PAGES[1:]} - {"index.md"}


# --- JSON: the keys that the page tells of, and those that the commands write.

HEADING = re.compile(r"^## (.*)$", re.MULTILINE)
ROW = re.compile(r"^\| (`[^|]*) \|(.*)\|$", re.MULTILINE)
# Section of the page → file that its commands write.
WRITTEN = {
    "edgekit.json, and `export --json`": "export.json",
    "`compare --json`": "compare.json",
    "`profile --json`": "profile.json",
    "`verify --json`": "verify.json",
    "`prune --json`": "prune.json",
    "`inspect --json`": "inspect-file.json",
    "`doctor --json` and `targets --json`": "doctor.json",
}
# Parts whose own keys stand in tables of their own, or in the words of their row.
PARTS = {
    *("parity", "to_original", "latency_ms", "baseline_latency_ms", "fp32_latency_ms", "accuracy", "structure", "op"),
    *("accuracy_before_recovery", "inputs", "outputs", "identity", "calibration", "float_layers", "sensitivity"),
    *("preprocessing", "original", "state", "pruned", "qat", "search", "sparsity", "qparams"),
}
# Table of the page's first section → the key of `compare --json` that it describes.
AGAIN = {"parity": "parity", "latency": "latency_ms", "accuracy": "accuracy", "structure": "structure"}


def told(section: str, model: bool) -> dict[str, bool]:
    """Returns the keys of a section's table → whether every file has them. `inspect` has a table for models too."""
    text = JSON_PAGE.read_text("utf-8").split(f"## {section}\n")[1]
    text = text.split("\n## ")[0]
    if "| key of a model |" in text:
        text = text.split("| key of a model |")[model]
    return keys_of(text)


def keys_of(text: str) -> dict[str, bool]:
    return {
        name: not meaning.strip().startswith("optional")
        for names, meaning in ROW.findall(text)
        for name in re.findall("`(.*?)`", names)
    }


def written(value: Any, inside: str = "") -> Iterator[str]:
    """Yields the paths of all keys of a JSON value, `[]` for the entries of a list."""
    if isinstance(value, dict):
        for key, item in value.items():
            path = f"{inside}.{key}" if inside else key
            deeper = isinstance(item, (dict, list)) and item and key not in PARTS
            yield from written(item, path) if deeper else [path]
    elif isinstance(value, list):
        for item in value:
            yield from written(item, f"{inside}[]") if isinstance(item, dict) else [f"{inside}[]"]


def is_told(path: str, keys: dict[str, bool]) -> bool:
    """Whether a table tells of a key, by itself or by `*` for all of a map; empty lists and maps have no entries."""
    forms = {path, path.removesuffix("[]"), f"{path}[]", f"{path}.*", re.sub(r"\.[^.]*$", ".*", path)}
    inside = any(key.startswith(f"{path}.") or key.startswith(f"{path}[].") for key in keys)
    return bool(forms & keys.keys()) or inside


def check_json(folder: Path) -> None:
    for section, name in WRITTEN.items():
        check_keys(told(section, model=False), json.loads((folder / name).read_text()), name)
    check_keys(told("`inspect --json`", model=True), json.loads((folder / "inspect-model.json").read_text()), "model")
    file = json.loads((folder / "compare.json").read_text())["artifacts"][0]
    for table, key in AGAIN.items():
        text = JSON_PAGE.read_text("utf-8").split(f"\n**{table}**")[1].split("\n**")[0]
        assert set(file[key]) == set(keys_of(text)), table


def check_keys(keys: dict[str, bool], value: Any, name: str) -> None:
    paths = set(written(value))
    assert [path for path in paths if not is_told(path, keys)] == [], f"{name} has keys that the page does not tell"
    found = {re.sub(r"\[\]$", "", path) for path in paths}
    inner = {path.rpartition(".")[0] for path in paths} | found
    missing = [
        key
        for key, always in keys.items()
        if always and re.sub(r"(\[\]|\.\*)$", "", key) not in inner and not _empty(key, value)
    ]
    assert missing == [], f"{name} lacks keys that the page tells"


def _empty(key: str, value: Any) -> bool:
    """Whether a key lies in a part that is empty or null in this file."""
    for part in key.split(".")[:-1]:
        many = part.endswith("[]")
        value = value.get(part.removesuffix("[]")) if isinstance(value, dict) else None
        if not value:
            return True
        value = value[0] if many else value
    return False
