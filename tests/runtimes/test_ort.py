"""ONNX Runtime's int8 arithmetic on the processor at hand: right on every one, whatever it lacks."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgekit.artifacts.artifact import Artifact
from edgekit.measuring import running
from edgekit.runtimes import ort, run_artifact

CPUINFO = Path("/proc/cpuinfo")
VNNI = ("avx512_vnni", "avx_vnni")


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.is_file(), reason="needs x86-64 and Linux")
def test_the_exact_mode_is_for_processors_without_vnni() -> None:
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split()
    assert bool(ort.SETTINGS) == (not any(flag in flags for flag in VNNI))


def test_the_probe_is_the_model_that_it_says() -> None:
    model = onnx.load_model_from_string(ort.PRODUCT)
    assert [(node.op_type, list(node.input), list(node.output)) for node in model.graph.node] == [
        ("MatMulInteger", ["a", "b"], ["c"])
    ]
    assert [value.type.tensor_type.elem_type for value in model.graph.input] == [
        onnx.TensorProto.UINT8,
        onnx.TensorProto.INT8,
    ]


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_of_extreme_codes_is_exact(kernel: int, tmp_path: Path) -> None:
    """Pairs of its products leave int16, in which x86 without VNNI would add them."""
    x = np.full((1, 8, 4, 4), 255, np.uint8)
    weight = np.full((8, 8, kernel, kernel), 127, np.int8)
    step = np.float32(8 * kernel**2 * 127)  # 255 codes of it are the sum
    constants = {"one": np.float32(1), "zero": np.uint8(0), "w": weight, "wz": np.int8(0), "step": step}
    names = ["x", "one", "zero", "w", "one", "wz", "step", "zero"]
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", names, ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    result = run_artifact(path, [x[None]])
    assert (result.outputs[0] == 255).all()
    assert result.settings == ort.SETTINGS


@pytest.mark.parametrize(
    ("precision", "settings", "told"),
    [("int8", ort.EXACT, True), ("int8-dynamic", ort.EXACT, True), ("int8", {}, False), ("fp32", ort.EXACT, False)],
)
def test_the_user_is_told_what_an_application_has_to_set(precision: str, settings: dict, told: bool) -> None:
    result = SimpleNamespace(settings=settings, runtime="onnxruntime")
    notes = running.settings_notes(Artifact(Path("model.onnx"), "onnx", precision, (), ()), result)
    assert [("session.x64quantprecision=1" in note) for note in notes] == [True] * told
