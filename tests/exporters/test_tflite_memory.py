"""What a conversion costs: memory, and the limit of 2 GB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from tflite_tools import model, node

from edgekit.errors import EdgeKitError
from edgekit.exporters.tflite import convert
from edgekit.exporters.tflite.ir import Op, Tensor
from edgekit.exporters.tflite.write.flatbuffer import LARGEST, write

ROOT = Path(__file__).parents[2]
CHILD = """
import json, sys, time
import numpy as np, onnx
from edgekit.exporters.tflite import convert

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return 1024 * int(line.split()[1])

small, large = (onnx.load(path) for path in sys.argv[1:])
convert(small)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
start = time.perf_counter()
data = convert(large)
print(json.dumps({"peak": status("VmHWM") - before, "size": len(data), "seconds": time.perf_counter() - start}))
"""


def layers(count: int, width: int) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {f"w{index}": rng.standard_normal((width, width), np.float32) for index in range(count)}
    nodes = [node("MatMul", [f"x{index}", f"w{index}"], f"x{index + 1}") for index in range(count)]
    return model(nodes, {"x0": np.zeros((1, width), np.float32)}, weights, (f"x{count}",))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the process from /proc")
def test_conversion_takes_no_more_than_three_times_the_model(tmp_path: Path) -> None:
    """The model itself, its weights as arrays, and the file; transposed weights cost nothing more."""
    onnx.save(layers(1, 16), tmp_path / "small.onnx")
    onnx.save(layers(6, 1600), tmp_path / "large.onnx")
    paths = [str(tmp_path / name) for name in ("small.onnx", "large.onnx")]
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, *paths], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    measured = json.loads(ran.stdout.splitlines()[-1])
    weights = 6 * 1600 * 1600 * 4
    assert weights <= measured["size"] < 1.01 * weights
    assert measured["peak"] <= 2.3 * weights  # beside the model, which is there before


def test_model_of_more_than_2_gb_is_refused_by_what_it_declares() -> None:
    made = model([node("MatMul", ["x", "w"])], {"x": np.zeros((1, 4), np.float32)}, {"w": np.zeros((4, 4), np.float32)})
    made.graph.initializer[0].CopyFrom(
        TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 2**28], raw_data=b"")
    )
    with pytest.raises(EdgeKitError, match=r"4\.3 GB, and a TFLite file ends at 2 GB") as caught:
        convert(made)
    assert "--precision int8" in caught.value.help


def test_file_of_more_than_2_gb_is_refused_before_it_is_written() -> None:
    weights = np.broadcast_to(np.float32(0), (2, LARGEST // 8 + 1))
    w = Tensor("w", weights.shape, weights.dtype, weights)
    x, y = Tensor("x", weights.shape, weights.dtype), Tensor("y", weights.shape, weights.dtype)
    with pytest.raises(EdgeKitError, match=r"2\.1 GB"):
        write([Op("ADD", [x, w], [y], {}, "add")], [x], [y], (["x"], ["y"]), {})


@pytest.mark.parametrize("size", [1, 100_000])
def test_weights_that_are_shorter_than_they_say_are_damaged(size: int) -> None:
    """Large ones, which are kept from ONNX's checker, as well."""
    made = model([node("Add", ["x", "w"])], {"x": np.zeros(size, np.float32)}, {"w": np.zeros(size, np.float32)})
    made.graph.initializer[0].raw_data = made.graph.initializer[0].raw_data[4:]
    with pytest.raises(EdgeKitError, match=r"not valid|damaged"):
        convert(made)


def test_equal_weights_are_in_the_file_once_however_they_lie() -> None:
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    feeds = {"x": np.zeros((1, 64), np.float32)}
    nodes = [node("MatMul", ["x", "a"], "t"), node("MatMul", ["t", "b"], "u"), node("Gemm", ["u", "a"], "y", transB=1)]
    data = convert(model(nodes, feeds, {"a": weights, "b": weights.copy()}))
    assert 2 * weights.nbytes < len(data) < 2.5 * weights.nbytes  # as they are, and transposed
