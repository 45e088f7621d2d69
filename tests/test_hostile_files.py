"""Damaged, lying and greedy files through the command line: a message, no traceback, nothing left, within bounds.

This runs a part of them; `python tests/hostile_files.py --full` runs all.
"""

# ruff: noqa: E501 (a case to a line)

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hostile_files
import numpy as np
import pytest
import torch
from hostile_files import Case
from torch import nn

from edgekit.artifacts import manifest
from edgekit.artifacts.bundles import MANIFEST, Bundle
from edgekit.commands import verify
from edgekit.errors import EdgeKitError
from edgekit.loading.model import load
from edgekit.measuring import running
from edgekit.reports.console import visible
from edgekit.screening import limits, torch_archives, watchdog
from edgekit.screening.allowed_ops import is_aten, is_target
from edgekit.screening.limits import Budget
from edgekit.screening.unpickle import check_tensors

# What takes longest, as it has to run into a limit, and one of each thing that once was not caught.
CHOSEN = {
    "pickle": ("memo index", "laughs", "storage of too many", "stride beyond", "bytearray"),
    "archive": ("zeros in data.pkl", "data: zeros in data.pkl", "data: version of text", "sizes that lie", "mutated 4"),
    "torchscript": ("loops while loading", "growing tensor", "python op", "set_ by another name", "mutated 4"),
    "pt2": ("expression 0", "target torch.ops.aten._sparse_coo_tensor_unsafe.default", "deep JSON", "mutated program 7"),
    "safetensors": ("overlap", "deep"),
    "onnx": ("export: if 30 deep", "export: growing loop", "export: huge expand", "inspect: functions that double",
             "export: outside, a pipe", "inspect: escape in a name", "export: a cycle"),
    "data": ("objects", "zeros", "deep header"),
}  # fmt: skip


@pytest.fixture(scope="module")
def cases() -> dict[tuple[str, str], Case]:
    found = hostile_files.cases()
    assert len(found) >= 300
    assert max(Counter((case.family, case.name) for case in found).values()) == 1
    return {(case.family, case.name): case for case in found}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in CHOSEN.items() for name in names])
def test_a_hostile_file_is_a_message(
    family: str, name: str, cases: dict[tuple[str, str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(limits.SECONDS_VARIABLE, "3")  # where time is the limit: the same, sooner
    outcome = hostile_files.run(cases[family, name], tmp_path / "place")
    assert outcome.problem is None, outcome.said
    assert outcome.code == (0 if name == "inspect: escape in a name" else 1)


# --- What is bounded by number


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("s0", True),
        ("2*s0 + 1", True),
        ("Mod(s0, 2)", True),
        ("s0**2", True),
        ("Pow(Symbol('s0', positive=True), Integer(2))", True),
        ("Max(1, FloorDiv(s0, 2))", True),
        ("9**9**9**9", False),
        ("9**99999", False),
        ("s0**s1", False),
        ("LShift(1, 99999999)", False),
        ("PowByNatural(2, 2**40)", False),
        ("Pow(2, Pow(2, 9))", False),
        ("1" * 1900, False),
        ("*".join(["s0"] * 200), False),
        ("s0" + " + s0" * 200, False),
        ("s0" * 2000, False),
        ("(" * 300 + "s0" + ")" * 300, False),
    ],
)
def test_expressions_come_to_numbers_of_few_digits(text: str, fine: bool) -> None:
    assert torch_archives._is_expression(text) is fine


@pytest.mark.parametrize(
    ("target", "fine"),
    [
        ("torch.ops.aten.conv2d.default", True),
        ("torch.ops.aten.relu_.default", True),
        ("torch.ops.aten.add.Tensor", True),
        ("torch.ops.torchvision.nms.default", True),
        ("torch.ops.higher_order.cond", True),
        ("_operator.getitem", True),
        ("math.trunc", True),
        ("torch.sym_max", True),
        ("torch._sym_sqrt", True),
        ("torch.ops.aten.linear.out", False),
        ("torch.ops.aten.lstm.data", False),
        ("torch.ops.aten._sparse_coo_tensor_unsafe.default", False),
        ("torch.ops.aten._to_dense.default", False),
        ("torch.ops.aten.set_.source_Storage", False),
        ("torch.ops.aten.resize_.default", False),
        ("torch.ops.aten._reshape_alias.default", False),
        ("torch.ops.aten.save.default", False),
        ("torch.ops.quantized.linear.default", False),
        ("torch.ops.mkldnn._linear_pointwise.default", False),
        ("torch.load", False),
        ("math.factorial", False),
        ("_operator.call", False),
        ("", False),
    ],
)
def test_operators_are_allowed_by_name(target: str, fine: bool) -> None:
    assert is_target(target) is fine


def test_no_operator_of_files_processes_and_raw_memory_is_allowed() -> None:
    words = (
        "save",
        "from_file",
        "sparse",
        "resize",
        "set_data",
        "quantized",
        "mkldnn_linear",
        "rpc",
        "fbgemm",
        "cudnn",
    )
    known = {schema.name.removeprefix("aten::") for schema in torch._C._jit_get_all_schemas()}
    named = {name for name in known if is_aten(name) and any(word in name for word in words)}
    assert named <= {"_sparse_log_softmax", "sparse_dim"}
    assert not is_aten("set_")


ZOO = {
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "a transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
    "an LSTM": lambda: nn.LSTM(8, 4, 2, bidirectional=True),
}  # fmt: skip
INPUTS = {"convolutions": "1x3x8x8", "a transformer": "1x4x8", "an LSTM": "1x4x8"}


@pytest.mark.parametrize("name", INPUTS)
def test_plain_networks_stay_allowed(name: str, tmp_path: Path) -> None:
    module = ZOO[name]().eval()
    path = tmp_path / "model.pt"
    torch.jit.script(module).save(path)
    assert torch_archives.load_script(path) is not None
    shape = tuple(map(int, INPUTS[name].split("x")))
    program = torch.export.export(module, (torch.zeros(shape),))
    for step, made in enumerate((program, program.run_decompositions())):
        torch.export.save(made, tmp_path / f"{step}.pt2")
        assert torch_archives.load_exported(tmp_path / f"{step}.pt2") is not None


class Resizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.resize = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resize(x)


def test_a_layer_may_be_called_like_an_operator_that_is_not_allowed(tmp_path: Path) -> None:
    torch.jit.script(Resizes()).save(tmp_path / "model.pt")
    assert load(tmp_path / "model.pt", inputs=["1x4"]).outputs[0].shape == (1, 4)


def test_tensors_end_where_their_values_do() -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(12.0).reshape(3, 4).t(), "v": torch.ones(2, dtype=torch.int8)}, buffer)
    import zipfile

    with zipfile.ZipFile(buffer) as held:
        sizes = {i.filename.rpartition("/")[2]: i.file_size for i in held.infolist() if "/data/" in i.filename}
        content = held.read(next(n for n in held.namelist() if n.endswith("data.pkl")))
    check_tensors(content, sizes, "model.pt")
    with pytest.raises(EdgeKitError, match="more than it holds"):
        check_tensors(content, {**sizes, "0": 44}, "model.pt")


# --- The watchdog

SMALL = Budget(200 << 20, 2.0)


def crash() -> None:
    import ctypes

    ctypes.string_at(0)


def hang() -> None:
    while True:
        pass


WORK = {
    "a crash": (crash, "crashed the process that tried it .SIGSEGV"),
    "a hang": (hang, "takes more than 2 s"),
    "memory of numpy": (lambda: np.ones(1 << 30), "more than 0.2 GB of memory"),
    "memory of torch": (lambda: torch.ones(1 << 30), "more than 0.2 GB of memory"),
    "an exit": (lambda: __import__("os")._exit(7), "exit code 7"),
    "an error of ours": (lambda: load("none.pt"), "none.pt does not exist"),
}


@pytest.mark.parametrize("name", WORK)
def test_whatever_becomes_of_watched_work_is_a_message(name: str) -> None:
    work, said = WORK[name]
    with pytest.raises(EdgeKitError, match=said):
        watchdog.guarded(work, "model.pt", SMALL)


def test_watched_work_gives_its_result_and_other_errors_as_they_are(tmp_path: Path) -> None:
    assert watchdog.guarded(lambda: {"a": math.pi}, "x", SMALL) == {"a": math.pi}
    with pytest.raises(ZeroDivisionError):
        watchdog.guarded(lambda: 1 // 0, "x", SMALL)
    with pytest.raises(OSError, match="too large"):
        watchdog.guarded(lambda: (tmp_path / "big").write_bytes(bytes(1 << 20)), "x", SMALL)


@pytest.mark.parametrize(("text", "number"), [("60", 60), ("8GB", 8 << 30), ("1.5", None), ("x", None), ("-1", None)])
def test_limits_are_raised_by_the_environment(text: str, number: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(limits.MEMORY_VARIABLE, text)
    if number is None:
        with pytest.raises(EdgeKitError, match=limits.MEMORY_VARIABLE):
            limits.budget()
    else:
        assert limits.budget().memory == number


def test_files_and_inputs_raise_the_limits(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(bytes(10 << 20))
    none, file, both = (
        limits.budget(),
        limits.budget([tmp_path / "model"]),
        limits.budget([tmp_path / "model"], 1 << 20),
    )
    assert none.memory < file.memory < both.memory
    assert none.seconds < file.seconds < both.seconds


# --- Bundles


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch, bundles: dict[str, Bundle]) -> Iterator[Path]:
    """Files give what was recorded, without being run: what is looked at is what surrounds them."""

    class Ran:
        def __init__(self, artifact: Any) -> None:
            golden = np.load(bundles["int8"].path / "golden.npz")
            self.outputs = tuple(golden[name] for name in golden if name.startswith(f"{artifact.format}/"))

    monkeypatch.setattr(running, "run", lambda artifact, feeds, **options: Ran(artifact))
    monkeypatch.setattr(running, "opened", lambda *given, **options: nullcontext())
    yield bundles["int8"].path


def test_mutated_manifests_and_golden_values_are_told(replayed: Path, tmp_path: Path) -> None:
    told = Counter()
    for case in hostile_files.artifacts(replayed, 60):
        if case.family in ("manifest", "golden"):
            folder = tmp_path / f"{case.family} {case.name}"
            folder.mkdir()
            case.make(folder)
            try:
                told[case.family, all(replay.problem is None for replay in verify.verify(folder / "b"))] += 1
            except EdgeKitError:
                told[case.family, False] += 1
    assert told["manifest", False] > 12  # the others changed what nothing reads
    assert told["golden", False] > 40
    assert sum(told.values()) == 120


def test_manifests_are_as_they_are_written(bundles: dict[str, Bundle]) -> None:
    for made in bundles.values():
        assert manifest.problem(json.loads((made.path / MANIFEST).read_text())) is None


# --- Terminals


def test_control_characters_are_pictures() -> None:
    assert visible("\x1b]0;evil\x07 a\tb\nc\r\x7f\x9b\u202e") == "␛]0;evil␇ a\tb\nc␍␡\ufffd\ufffd"
