"""Inspect: layers, MACs and memory of models; ops, types and delegates of real exported files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from rich.console import Console
from torch import nn

from edgekit.artifacts import summary
from edgekit.artifacts.contents import Node, float_islands
from edgekit.errors import EdgeKitError
from edgekit.exporters.executorch.lower import to_executorch
from edgekit.exporters.onnx.export import to_onnx
from edgekit.exporters.tflite import convert
from edgekit.loading import model_summary
from edgekit.loading.model import load
from edgekit.quant.ptq.recipes import RECIPES
from edgekit.reports.summary import render
from edgekit.types import TensorSpec


class Net(nn.Module):
    """A small network; `outside` is an op between the convolutions that XNNPACK does not take."""

    def __init__(self, outside: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.head = nn.Linear(8, 10)
        self.outside = outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.depthwise(torch.atan(x) if self.outside else x))
        return self.head(x.mean((2, 3)))


WEIGHTS = {"stem": 8 * 3 * 9, "depthwise": 8 * 9, "head": 80}
BIASES = 8 + 8 + 10
SHAPE = (1, 3, 16, 16)


class Random(CalibrationDataReader):
    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.feeds = iter([{"x": rng.standard_normal(SHAPE).astype(np.float32)} for _ in range(4)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("artifacts")
    x = torch.randn(SHAPE)
    plain, outside = Net(False).eval(), Net(True).eval()
    exported = torch.onnx.export(plain, (x,), dynamo=True, verbose=False, input_names=["x"], output_names=["y"])
    assert exported is not None
    onnx.save(exported.model_proto, folder / "fp32.onnx")
    quantize_static(
        folder / "fp32.onnx", folder / "int8.onnx", Random(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    (folder / "fp32.tflite").write_bytes(convert(exported.model_proto))
    batches = [(torch.randn(SHAPE),) for _ in range(4)]
    quantized = RECIPES["int8"].apply(plain, (x,), batches, frozenset()).program
    (folder / "int8.tflite").write_bytes(convert(to_onnx(quantized, ["x"], ["y"])))
    (folder / "fp32.pte").write_bytes(to_executorch(RECIPES["fp32"].apply(outside, (x,), (), frozenset()).program).data)
    int8 = RECIPES["int8"].apply(outside, (x,), batches, frozenset())
    (folder / "int8.pte").write_bytes(to_executorch(int8.program).data)
    return folder


# file → int8 ops, float ops, what its weights are stored in, and op counts that must be among the others
FILES = {
    "fp32.onnx": (0, 6, {"float32": sum(WEIGHTS.values()) * 4 + BIASES * 4}, {"Conv": 2, "Relu": 2, "Gemm": 1}),
    "int8.onnx": (None, None, {"int8": sum(WEIGHTS.values()), "int32": BIASES * 4}, {"Conv": 2, "Gemm": 1}),
    "fp32.tflite": (
        0, 4, {"float32": sum(WEIGHTS.values()) * 4 + BIASES * 4},
        {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 1},
    ),
    "int8.tflite": (
        4, 0, {"int8": sum(WEIGHTS.values()), "int32": BIASES * 4},
        {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 1},
    ),
    "fp32.pte": (
        0, 5, {"float32": sum(WEIGHTS.values()) * 4 + BIASES * 4},
        {"Conv2d": 1, "DepthwiseConv2d": 1, "FullyConnected": 1, "aten::atan": 1},
    ),
    "int8.pte": (
        None, None, {"int8": sum(WEIGHTS.values()), "int32": BIASES * 4},
        {"Conv2d": 1, "DepthwiseConv2d": 1, "FullyConnected": 1, "aten::atan": 1},
    ),
}  # fmt: skip


def test_the_table_of_files_is_complete(files: Path) -> None:
    assert {path.name for path in files.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_artifact(files: Path, name: str) -> None:
    int8_ops, float_ops, weights, ops = FILES[name]
    assert summary.is_artifact(files / name)
    found = summary.inspect_artifact(files / name)
    assert found.size_bytes == (files / name).stat().st_size
    assert [spec.shape for spec in (*found.inputs, *found.outputs)] == [SHAPE, (1, 10)]
    assert {spec.dtype for spec in (*found.inputs, *found.outputs)} == {"float32"}
    assert found.ops | ops == found.ops
    assert found.parameter_bytes["int8" if "int8" in name else "float32"] >= max(weights.values()) * 0.99
    for dtype, size in weights.items():  # constants of other kinds (scales, shapes, zero points) add a few bytes
        assert size <= found.parameter_bytes[dtype] <= size + 300
    if int8_ops is not None:
        assert (found.int8_ops, found.float_ops) == (int8_ops, float_ops)
    assert json.loads(json.dumps(found.to_dict()))["ops"] == found.ops
    console = Console(width=200, record=True)
    console.print(render(found))
    assert found.sha256 in console.export_text()


def test_int8_onnx_agrees_with_what_onnxruntime_fuses(files: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    onnxruntime.InferenceSession(files / "int8.onnx", options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx")
    fused = [node.op_type for node in optimized.graph.node if node.op_type in ("QLinearConv", "QGemm")]
    found = summary.inspect_artifact(files / "int8.onnx")
    assert len(fused) == 3 and found.int8_ops >= 3
    # the reader knows what is int8 in the optimized file as well, where the ops themselves say it
    assert summary.inspect_artifact(tmp_path / "optimized.onnx").ops["QLinearConv"] == fused.count("QLinearConv")


def test_onnx_ops_with_float_bias_and_float_readers_are_float(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[1,1,4,4] x) => (float[1,1,4,4] y) <
        float s = {0.1}, int8 z = {0}, float s2 = {0.2}, int8[1,1,1,1] w = {3}> {
        a = QuantizeLinear (x, s, z)    b = DequantizeLinear (a, s, z)
        wd = DequantizeLinear (w, s, z)
        c = Conv (b, wd)                d = QuantizeLinear (c, s, z)      e = DequantizeLinear (d, s, z)
        f = Erf (e)                     g1 = Mul (f, e)                   h = QuantizeLinear (g1, s, z)
        i = DequantizeLinear (h, s, z)  j = QuantizeLinear (i, s2, z)     k = DequantizeLinear (j, s2, z)
        y = Tanh (k) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "mixed.onnx")
    found = summary.inspect_artifact(tmp_path / "mixed.onnx")
    assert (found.int8_ops, found.float_ops, found.requantizations) == (1, 3, 1)
    assert found.float_islands == ("Erf, Mul",)  # Tanh is the float tail, not an island
    assert found.qparams["x"].scale == pytest.approx(0.1) and "y" not in found.qparams


def test_executorch_delegates(files: Path) -> None:
    single = summary.inspect_artifact(files / "fp32.pte")
    assert single.delegates["XnnpackBackend"] >= 2 and single.undelegated["aten::atan"] == 1
    assert single.float_islands == ()
    int8 = summary.inspect_artifact(files / "int8.pte")
    assert int8.int8_ops == 4 and "aten::atan" in int8.float_islands


def test_executorch_program_agrees_with_executorch_own_reader(files: Path) -> None:
    from executorch.exir._serialize import _deserialize_pte_binary
    from executorch.exir.schema import DelegateCall, KernelCall

    plan = _deserialize_pte_binary((files / "fp32.pte").read_bytes()).program.execution_plan[0]
    calls = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
    found = summary.inspect_artifact(files / "fp32.pte")
    assert sum(found.undelegated.values()) == sum(isinstance(call, KernelCall) for call in calls)
    assert sum(found.delegates.values()) == sum(isinstance(call, DelegateCall) for call in calls)
    assert set(found.delegates) == {delegate.id for delegate in plan.delegates}


def test_tflite_agrees_with_the_interpreter(files: Path) -> None:
    for name in ("fp32.tflite", "int8.tflite"):
        details = Interpreter(model_path=str(files / name)).get_signature_runner("serving_default").get_input_details()
        found = summary.inspect_artifact(files / name)
        assert [spec.name for spec in found.inputs] == list(details)
    assert set(found.qparams) == {"x", "y"} and found.qparams["x"].dtype == "int8"


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_an_error_and_never_a_traceback(files: Path, name: str, tmp_path: Path) -> None:
    data = (files / name).read_bytes()
    rng = np.random.default_rng(0)
    damaged = [data[: len(data) // 2], data[: len(data) - len(data) // 20], data[:64], data[:9]]
    for _ in range(40):
        changed = bytearray(data)
        for place in rng.integers(8, len(data), 20):
            changed[place] = rng.integers(256)
        damaged.append(bytes(changed))
    refused = 0
    for index, content in enumerate(damaged):
        path = tmp_path / f"{index}"
        path.write_bytes(content)
        try:
            summary.inspect_artifact(path)
        except EdgeKitError as error:
            refused += 1
            assert str(path) in error.what
    assert refused >= 4


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"hello", bytes(64)])
def test_other_files_are_no_artifacts(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.onnx").write_bytes(content)
    assert not summary.is_artifact(tmp_path / "file.onnx")
    with pytest.raises(EdgeKitError):
        summary.inspect_artifact(tmp_path / "file.onnx")
    assert not summary.is_artifact(tmp_path / "missing")


def test_islands_are_connected_groups() -> None:
    nodes = [
        Node("Q", "quantize", ("x",), ("q",)),
        Node("D", "dequantize", ("q",), ("a",)),
        Node("Exp", "float", ("a",), ("b",)),
        Node("Reshape", "move", ("b",), ("c",)),
        Node("Log", "float", ("c",), ("d",)),
        Node("Abs", "float", ("a",), ("e",)),
        Node("Q", "quantize", ("d",), ("f",)),
        Node("Q", "quantize", ("e",), ("g",)),
        Node("Sin", "float", ("a",), ("y",)),
    ]
    assert float_islands(nodes) == [["Exp", "Log"], ["Abs"]]


class Attention(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q)


def mha() -> nn.Module:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    return SelfAttention()


# network, input shape, MACs by hand
NETS = {
    "conv": (lambda: nn.Conv2d(3, 16, 3, stride=2, padding=1), (1, 3, 32, 32), 16 * 3 * 3 * 3 * 16 * 16),
    "batch": (lambda: nn.Conv2d(3, 16, 3), (4, 3, 10, 10), 4 * 16 * 3 * 9 * 8 * 8),
    "depthwise": (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8), (1, 8, 12, 12), 8 * 25 * 144),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (1, 4, 20), 6 * 4 * 3 * 18),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 6 * 4 * 25),
    "linear": (lambda: nn.Linear(20, 30), (7, 20), 7 * 20 * 30),
    "vector": (lambda: nn.Linear(20, 30), (20,), 20 * 30),
    "attention": (Attention, (1, 2, 10, 8), 2 * 2 * 10 * 10 * 8),
    "multihead": (mha, (1, 10, 16), 4 * 10 * 16 * 16 + 2 * 10 * 10 * 16),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (1, 10, 16),
        4 * 10 * 16 * 16 + 2 * 10 * 10 * 16 + 2 * 10 * 16 * 32,
    ),
    "lstm": (lambda: nn.LSTM(8, 12, batch_first=True), (2, 5, 8), 2 * 5 * 4 * (8 * 12 + 12 * 12)),
    "gru": (lambda: nn.GRU(8, 12, batch_first=True), (2, 5, 8), 2 * 5 * 3 * (8 * 12 + 12 * 12)),
}  # fmt: skip


def inspect(module: nn.Module, shape: tuple[int, ...]) -> model_summary.ModelSummary:
    return model_summary.inspect_model(load(module, inputs=["x".join(map(str, shape))]))


@pytest.mark.parametrize("name", NETS)
def test_macs_by_hand(name: str) -> None:
    make, shape, macs = NETS[name]
    found = inspect(make().eval(), shape)
    assert found.macs == macs
    assert found.layers[0].macs == macs


class Odd(nn.Module):
    """One layer used twice, one never, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.again = self.body[0]
        self.idle = nn.Linear(8, 3)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.body[0].weight
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.tied(self.again(self.body(x))))


def test_shared_and_idle_layers() -> None:
    found = inspect(Odd().eval(), (2, 8))
    layers = {layer.path: layer for layer in found.layers}
    assert set(layers) == {"Odd", "body", "body.0", "body.1", "again", "idle", "tied", "norm"}
    assert (layers["body.0"].parameters, layers["body.0"].calls, layers["body.0"].macs) == (72, 2, 2 * 2 * 64)
    assert layers["again"].shared_with == "body.0" and layers["again"].parameters == 0
    assert layers["tied"].shared_with == "body.0" and layers["tied"].macs == 2 * 64
    assert layers["idle"].calls == 0 and layers["idle"].output_shape is None
    assert layers["tied"].output_shape == (2, 8)
    assert found.parameters == sum(layer.parameters for layer in found.layers) == 72 + 27 + 16
    assert found.buffers == 8 + 8 + 1 and found.macs == 3 * 2 * 64
    assert found.size_bytes == 4 * found.parameters + 4 * 16 + 8  # num_batches_tracked is int64
    console = Console(width=200, record=True)
    console.print(render(found))
    text = console.export_text()
    assert "never called" in text and "shared with body.0" in text
    assert json.loads(json.dumps(found.to_dict()))["layers"][2]["path"] == "body.0"


def test_activation_peak() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1)).eval()
    found = inspect(net, (1, 1, 32, 32))
    plane = 4 * 32 * 32
    # Sequential drops each tensor once the next one is made: two of four planes live at a time, and the input.
    assert found.activation_peak_bytes == plane * (1 + 4 + 4)


def test_graphs_that_hide_their_layers(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    torch.export.save(torch.export.export(net, (torch.randn(1, 3, 8, 8),)), tmp_path / "net.pt2")
    found = model_summary.inspect_model(load(tmp_path / "net.pt2"))
    assert found.macs == 4 * 3 * 9 * 36 and found.parameters == 4 * 27 + 4
    assert all(layer.calls is None for layer in found.layers if layer.depth)
    assert any("MACs are known in total only" in note for note in found.notes)


def test_inspecting_leaves_the_model_as_it_was() -> None:
    model = load(Net(False), inputs=["1x3x16x16"])
    before = [t.clone() for t in model.module(*model.example)]
    fast = torch.backends.mha.get_fastpath_enabled()
    found = model_summary.inspect_model(model)
    assert found.inputs == (TensorSpec(model.inputs[0].name, "float32", SHAPE),)
    assert math.prod(found.layers[0].output_shape or ()) == 10
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.module.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert all(map(torch.equal, before, model.module(*model.example)))
