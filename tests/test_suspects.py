"""Who is to blame for a slow file: read from contents made by hand, and from files as the runtimes run them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from int8_nets import CASES, Batches, Net, build, conv
from kit import quick
from torch import nn

import edgekit
from edgekit.artifacts import int8_coverage
from edgekit.artifacts.bundles import Bundle
from edgekit.artifacts.contents import Contents, Kind, Node
from edgekit.judging import verdicts
from edgekit.types import SUFFIXES


def contents(*nodes: tuple[str, Kind], undelegated: dict[str, int] | None = None, delegates: int = 0) -> Contents:
    """A chain of ops."""
    chain = tuple(Node(op, kind, (str(i),), (str(i + 1),)) for i, (op, kind) in enumerate(nodes))
    return Contents("", (), (), {}, (chain,), {}, {"X": delegates} if delegates else {}, undelegated or {}, ())


Q, DQ, CONV = ("Q", "quantize"), ("DQ", "dequantize"), ("Conv", "int8")
SWISH, GELU = ("HardSwish", "float"), ("Gelu", "float")
TABLE: dict[str, tuple[Contents, tuple[str, ...]]] = {
    "all int8": (contents(Q, CONV, CONV, DQ), ()),
    "an island": (contents(Q, CONV, DQ, SWISH, Q, CONV, DQ), ("1 HardSwish in float between int8 ops",)),
    "two islands": (
        contents(Q, CONV, DQ, SWISH, Q, CONV, DQ, GELU, SWISH, Q, CONV),
        ("2 HardSwish and 1 Gelu in float between int8 ops",),
    ),
    "a tail": (contents(Q, CONV, DQ, GELU), ("1 Gelu in float before or after the int8 ops",)),
    "both": (
        contents(Q, CONV, DQ, GELU, Q, CONV, DQ, GELU),
        ("1 Gelu in float between int8 ops", "1 Gelu in float before or after the int8 ops"),
    ),
    "a scale to another": (
        contents(Q, CONV, ("Q", "requantize"), CONV, DQ), ("1 requantization from one int8 scale to another",)
    ),
    "outside the delegate": (
        contents(Q, CONV, DQ, ("sort", "float"), Q, CONV, undelegated={"sort": 1}, delegates=2),
        ("1 sort outside the delegate, which is cut into 2 parts",),
    ),
    "many kinds": (
        contents(Q, CONV, DQ, *[(name, "float") for name in "abcdef"], Q),
        ("1 a, 1 b, 1 c, 1 d and 2 others in float between int8 ops",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_what_a_file_holds_is_told_in_words(case: str) -> None:
    given, lines = TABLE[case]
    found = int8_coverage.describe(given)
    assert found.suspects == lines
    assert found.int8_ops == given.count("int8")
    assert found.to_dict().keys() >= {"int8_ops", "float_ops", "islands", "requantizations", "delegates", "undelegated"}


def exported(module: nn.Module, batches: Batches | list, folder: Path, name: str) -> Bundle:
    return edgekit.export(
        module, target="x86", precision="int8", data=[(batch[0], None) for batch in batches], out=folder, name=name,
    )  # fmt: skip


def test_files_are_read_as_their_runtimes_run_them(tmp_path: Path) -> None:
    """A bilinear resize is int8 in TFLite, and in float in ONNX Runtime and XNNPACK."""
    bundle = exported(build("bilinear"), Batches(CASES["bilinear"]), tmp_path, "net")
    found = {a.format: int8_coverage.structure(a) for a in bundle.artifacts}
    assert set(found) == set(SUFFIXES)
    assert found["onnx"].islands == {"Resize": 1}
    assert found["executorch"].islands == {"StaticResizeBilinear2D": 1}
    assert found["tflite"].float_ops == {}
    assert found["onnx"].int8_ops >= 2
    assert "ONNX: 1 Resize in float between int8 ops" in bundle.notes
    assert "ExecuTorch: 1 StaticResizeBilinear2D in float between int8 ops" in bundle.notes
    assert [entry["structure"] for entry in bundle.manifest["artifacts"]] == [s.to_dict() for s in found.values()]


@pytest.mark.parametrize("format", SUFFIXES)
def test_a_convolutional_network_has_no_suspects(format: str, bundles: dict[str, Bundle]) -> None:
    (artifact,) = [a for a in bundles["int8"].artifacts if a.format == format]
    found = int8_coverage.structure(artifact)
    assert (found.float_ops, found.suspects) == ({}, ())
    assert found.int8_ops == 4  # two convolutions, the pool and the linear layer


def test_only_int8_files_have_suspects(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    assert all(int8_coverage.structure(artifact) is None for artifact in bundles["fp32"].artifacts)
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    assert int8_coverage.runs(tmp_path / "bad.onnx") is None


def test_a_rejection_for_speed_names_the_suspects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    module = Net(
        lambda n, x: n.b(nn.functional.interpolate(n.a(x), scale_factor=2.0, mode="bilinear")), a=conv(), b=conv(8)
    )
    torch.manual_seed(0)
    batches = [(torch.randn(1, 3, 8, 8),) for _ in range(8)]
    bundle = edgekit.export(
        module.eval(), target="x86", formats=["onnx"], precision="int8", data=[(b[0], None) for b in batches],
        out=tmp_path, name="net",
    )  # fmt: skip
    monkeypatch.setattr(verdicts, "MIN_SPEEDUP", 1e9)
    (measured,) = edgekit.compare(module, [bundle], data=[(b[0], None) for b in batches], rounds=2).artifacts
    assert measured.verdict.word == "reject"
    (slow,) = (reason for reason in measured.verdict.reasons if reason.startswith("slower than fp32"))
    assert slow.endswith(": 1 Resize in float between int8 ops")
    assert measured.to_dict()["suspects"] == ["1 Resize in float between int8 ops"]
    assert measured.to_dict()["structure"]["islands"] == {"Resize": 1}
