"""What a .tflite file says of itself: the runtime that it needs, how it is fed, and what its classes are called."""

from __future__ import annotations

import os
import struct
import subprocess
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from kit import CLASSES, SHAPE, network
from tflite_tools import model, node, run_tflite

import edgekit
from edgekit.artifacts.bundles import Bundle
from edgekit.exporters.tflite import Description, convert_with_notes, versions

OLD_RUNTIME = "EDGEKIT_TFLITE_RUNTIME_PYTHON"
LOAD = """
import sys
from tflite_runtime.interpreter import Interpreter
for path in sys.argv[1:]:
    try:
        Interpreter(model_path=path).allocate_tensors()
        print("runs")
    except (RuntimeError, ValueError):
        print("refused")
"""


class Case(NamedTuple):
    """One ONNX op, the TFLite operator to look at, its version and the release that brought it."""

    op: str
    inputs: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]
    attrs: dict[str, Any]
    operator: str
    version: int
    runtime: str


def f32(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


CASES = [
    Case("Relu", {"x": f32(1, 4)}, {}, {}, "RELU", 1, "2.0.0"),
    Case("Gelu", {"x": f32(1, 4)}, {}, {}, "GELU", 1, "2.9.0"),
    Case("Sign", {"x": f32(1, 4)}, {}, {}, "SIGN", 1, "2.11.0"),
    Case("Abs", {"x": np.arange(4, dtype=np.int32)}, {}, {}, "ABS", 5, "2.12.0"),
    Case("Sub", {"x": f32(2, 2, 2, 2, 2), "z": f32(2)}, {}, {}, "SUB", 3, "2.3.0"),
    Case("Sub", {"x": f32(2, 2), "z": f32(2)}, {}, {}, "SUB", 1, "2.0.0"),
    Case("Transpose", {"x": f32(2, 3, 4, 5)}, {}, {"perm": [3, 1, 0, 2]}, "TRANSPOSE", 1, "2.0.0"),
    Case("Transpose", {"x": f32(1, 2, 3, 2, 3)}, {}, {"perm": [4, 2, 0, 3, 1]}, "TRANSPOSE", 4, "2.3.0"),
    Case("Transpose", {"x": f32(2, 3, 2, 3, 2, 3)}, {}, {"perm": [5, 3, 1, 4, 2, 0]}, "TRANSPOSE", 6, "2.12.0"),
    Case("Conv", {"x": f32(1, 4, 8, 8)}, {"w": f32(4, 1, 3, 3)}, {"group": 4}, "DEPTHWISE_CONV_2D", 1, "2.0.0"),
    Case("Conv", {"x": f32(1, 4, 8, 8)}, {"w": f32(6, 2, 3, 3)}, {"group": 2}, "CONV_2D", 6, "2.9.0"),
    Case("ConvTranspose", {"x": f32(1, 3, 5, 5)}, {"w": f32(3, 4, 2, 2)}, {}, "TRANSPOSE_CONV", 3, "2.3.0"),
    Case("MatMul", {"x": f32(2, 3, 4)}, {"w": f32(4, 5)}, {}, "FULLY_CONNECTED", 5, "2.0.0"),
    Case("GatherND", {"x": np.eye(3, dtype=bool)}, {"i": np.array([[0, 1]])}, {}, "GATHER_ND", 5, "2.16.0"),
]
IDS = [f"{case.op}-{case.operator}-{case.version}" for case in CASES]


def made(case: Case) -> Any:
    return model([node(case.op, [*case.inputs, *case.constants], **case.attrs)], case.inputs, case.constants)


def declared(data: bytes) -> dict[str, int]:
    """Operator → version, as the file has them."""
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    codes = schema.ModelT.InitFromPackedBuf(data, 0).operatorCodes
    return {names[code.builtinCode]: code.version for code in codes}


def metadata(data: bytes) -> dict[str, bytes]:
    """Name → content of the file's metadata buffers."""
    read = schema.ModelT.InitFromPackedBuf(data, 0)
    return {entry.name.decode(): bytes(read.buffers[entry.buffer].data) for entry in read.metadata}


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_operators_declare_what_they_use(case: Case) -> None:
    converted = convert_with_notes(made(case))
    assert declared(converted.data)[case.operator] == case.version
    assert converted.min_runtime == case.runtime
    assert metadata(converted.data)["min_runtime_version"] == case.runtime.encode().ljust(16, b"\0")
    noted = [note for note in converted.notes if "tflite-runtime ended at 2.14.0" in note]
    assert len(noted) == (case.runtime == "2.16.0")
    assert all(f"{case.operator} version {case.version}" in note for note in noted)
    run_tflite(converted.data, case.inputs)


def test_tflite_runtime_runs_what_it_is_said_to_run(tmp_path: Path) -> None:
    """In 2.14.0 itself: what needs no more is run, and what needs more is refused."""
    python = os.environ.get(OLD_RUNTIME)
    if not python:
        pytest.skip(f"{OLD_RUNTIME} does not name an interpreter that has tflite-runtime")
    paths = []
    for index, case in enumerate(CASES):
        paths.append(tmp_path / f"{index}.tflite")
        paths[-1].write_bytes(convert_with_notes(made(case)).data)
    ran = subprocess.run([python, "-c", LOAD, *map(str, paths)], capture_output=True, text=True, check=True)
    expected = ["refused" if case.runtime == "2.16.0" else "runs" for case in CASES]
    assert ran.stdout.split() == expected


def test_every_version_that_a_rule_asks_for_has_a_release() -> None:
    asked = [(kind, number) for row in versions.TYPES.values() for kind, number in row.items()]
    asked += [(kind, number) for kind, row in versions.RANKS.items() for _, number in row]
    asked += [(kind, number) for kind, (_, number) in versions.BROADCAST_RANKS.items()]
    asked += [(kind, number) for kind, row in versions.OPTIONS.items() for number in row.values()]
    asked += [*versions.WITHDRAWN.items(), *versions.PER_CHANNEL.items()]
    assert [(kind, number) for kind, number in asked if number > len(versions.RELEASES[kind])] == []
    assert [kind for kind in versions.RELEASES if not hasattr(schema.BuiltinOperator, kind)] == []
    assert all(list(row) == sorted(row) for row in versions.RELEASES.values())


def test_the_manifest_tells_the_runtime(bundles: dict[str, Bundle]) -> None:
    for bundle in bundles.values():
        entries = {entry["format"]: entry for entry in bundle.manifest["artifacts"]}
        held = metadata((bundle.path / "model.tflite").read_bytes())["min_runtime_version"]
        assert entries["tflite"]["min_runtime"] == held.rstrip(b"\0").decode()
        assert "min_runtime" not in entries["onnx"]


class Reader:
    """A flatbuffer table, read by the format's own rules and not by the library that wrote it."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    @classmethod
    def root(cls, data: bytes) -> Reader:
        assert data[4:8] == b"M001"
        return cls(data, *struct.unpack_from("<I", data, 0))

    def _field(self, slot: int) -> int | None:
        vtable = self.at - struct.unpack_from("<i", self.data, self.at)[0]
        entry = 4 + 2 * slot
        if entry >= struct.unpack_from("<H", self.data, vtable)[0]:
            return None
        offset = struct.unpack_from("<H", self.data, vtable + entry)[0]
        return self.at + offset if offset else None

    def _target(self, slot: int) -> int | None:
        field = self._field(slot)
        return None if field is None else field + struct.unpack_from("<I", self.data, field)[0]

    def number(self, slot: int) -> int:
        field = self._field(slot)
        return 0 if field is None else self.data[field]

    def text(self, slot: int) -> str:
        start = self._target(slot)
        size = struct.unpack_from("<I", self.data, start)[0]
        return self.data[start + 4 : start + 4 + size].decode()

    def table(self, slot: int) -> Reader:
        return Reader(self.data, self._target(slot))

    def tables(self, slot: int) -> list[Reader]:
        start = self._target(slot)
        if start is None:
            return []
        places = range(start + 4, start + 4 + 4 * struct.unpack_from("<I", self.data, start)[0], 4)
        return [Reader(self.data, place + struct.unpack_from("<I", self.data, place)[0]) for place in places]

    def floats(self, slot: int) -> list[float]:
        start = self._target(slot)
        return list(struct.unpack_from(f"<{struct.unpack_from('<I', self.data, start)[0]}f", self.data, start + 4))


def described(data: bytes) -> tuple[Reader, list[Reader], list[Reader]]:
    """The model's metadata, and that of its inputs and of its outputs."""
    whole = Reader.root(metadata(data)["TFLITE_METADATA"])
    (subgraph,) = whole.tables(3)
    return whole, subgraph.tables(2), subgraph.tables(3)


def uint8_samples(**more: Any) -> dict[str, Any]:
    x = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    return {"x": x, "labels": [f"class {index}" for index in range(CLASSES)], **more}


def exported(out: Path, data: dict[str, Any], **options: Any) -> Bundle:
    given = {"target": "x86", "precision": "fp32", "formats": "tflite", "name": "net", **options}
    return edgekit.export(network(), data=data, out=out, **given)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_bundle_tells_android_how_to_feed_it_and_what_comes_out(layout: str, tmp_path: Path) -> None:
    mean, std = (0.5, 0.25, 0.125), (0.25, 0.5, 1.0)
    data = uint8_samples()
    bundle = exported(tmp_path, data, mean=mean, std=std, tflite_layout=layout)
    file = (bundle.path / "model.tflite").read_bytes()
    whole, inputs, outputs = described(file)
    assert (whole.text(0), whole.text(7)) == (bundle.manifest["model"]["name"], "1.0.0")
    assert [i.text(0) for i in inputs] == [spec["name"] for spec in bundle.manifest["inputs"]]
    assert [o.text(0) for o in outputs] == [spec["name"] for spec in bundle.manifest["outputs"]]

    (unit,) = inputs[0].tables(4)
    assert unit.number(0) == 1  # NormalizationOptions
    tflite_mean, tflite_std = np.array(unit.table(1).floats(0)), np.array(unit.table(1).floats(1))
    x = data["x"].transpose(0, 2, 3, 1).astype(np.float64)  # channels last: the parameters are per channel
    expected = (x / 255 - mean) / std
    np.testing.assert_allclose((x - tflite_mean) / tflite_std, expected, atol=1e-5)

    content = inputs[0].table(3)
    assert content.number(0) == (2 if layout == "nhwc" else 1)  # ImageProperties, FeatureProperties
    assert content.table(1).number(0) == (1 if layout == "nhwc" else 0)  # RGB
    (labels,) = outputs[0].tables(6)
    assert (labels.text(0), labels.number(2)) == ("labels.txt", 2)  # TENSOR_AXIS_LABELS
    with zipfile.ZipFile(BytesIO(file)) as archive:
        assert archive.testzip() is None
        assert archive.read("labels.txt").decode().splitlines() == data["labels"]
        assert archive.getinfo("labels.txt").compress_type == zipfile.ZIP_STORED
    assert [replay.problem for replay in edgekit.verify(bundle.path)] == [None]
    assert edgekit.profile(bundle.path / "model.tflite").latency.p50 > 0


def test_images_that_are_only_scaled(tmp_path: Path) -> None:
    _, inputs, _ = described((exported(tmp_path, uint8_samples()).path / "model.tflite").read_bytes())
    (unit,) = inputs[0].tables(4)
    assert (unit.table(1).floats(0), unit.table(1).floats(1)) == ([0.0], [255.0])


def test_what_is_not_known_is_not_told(bundles: dict[str, Bundle]) -> None:
    """Float samples without labels: names alone."""
    for bundle in bundles.values():
        file = (bundle.path / "model.tflite").read_bytes()
        _, inputs, outputs = described(file)
        assert inputs[0].tables(4) == []
        assert outputs[0].tables(6) == []
        assert not zipfile.is_zipfile(BytesIO(file))


def test_labels_that_fit_no_output_are_told(tmp_path: Path) -> None:
    bundle = exported(tmp_path, uint8_samples(labels=["a", "b"]))
    assert "TFLite: the 2 labels are not in the file: no output has a value for each" in bundle.notes
    assert not zipfile.is_zipfile(bundle.path / "model.tflite")


def test_a_file_with_labels_runs_in_every_runtime_and_is_always_the_same(tmp_path: Path) -> None:
    """Labels of any text are one line each; what is behind the flatbuffer does not disturb who reads it."""
    x = f32(1, 3, 4, 4)
    made = model([node("GlobalAveragePool", ["x"], "p"), node("Flatten", ["p"])], {"x": x}, {})
    about = Description("net", (127.5,), (127.5,), ("tench", "große\nKatze", "犬"))
    data = convert_with_notes(made, about=about).data
    assert data == convert_with_notes(made, about=about).data
    np.testing.assert_allclose(run_tflite(data, {"x": x})["y"], x.mean((2, 3)), atol=1e-6)
    with zipfile.ZipFile(BytesIO(data)) as archive:
        assert archive.read("labels.txt").decode() == "tench\ngroße Katze\n犬\n"
    python = os.environ.get(OLD_RUNTIME)
    if python:
        (tmp_path / "m.tflite").write_bytes(data)
        ran = subprocess.run([python, "-c", LOAD, str(tmp_path / "m.tflite")], capture_output=True, text=True)
        assert ran.stdout.split() == ["runs"]
