"""ONNX files: names, codes, fusion in ONNX Runtime, and what cannot be expressed."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from int8_nets import CASES, Constant, Net, conv, flat, quantized, sqnr
from onnx import numpy_helper
from torch import nn

from edgekit.errors import EdgeKitError
from edgekit.exporters.onnx.export import OPSET, to_onnx
from edgekit.exporters.onnx.halves import halve
from edgekit.exporters.onnx.ort_passes import for_onnxruntime
from edgekit.quant.graph.passes import aten, q
from edgekit.quant.ptq.recipes import float32
from edgekit.runtimes.ort import EXACT, session_options

FLOAT = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "Clip", "Relu", "HardSwish", "ReduceMean"}
HARD_SIGMOID = (np.float32(1 / 254).item(), 0)  # qparams of the factor that makes x · hard-sigmoid of a HardSwish
EXACT_DB = 40.0  # codes that differ by one step where float32 sums round the other way

# network → ops of ONNX Runtime that compute in int8, and those that it leaves in float
FUSED: dict[str, tuple[dict[str, int], set[str]]] = {
    "conv_relu": ({"QLinearConv": 1}, set()),
    "conv_relu6_bn": ({"QLinearConv": 2}, set()),
    "conv_hardswish": ({"QLinearConv": 2, "QLinearMul": 1, "QLinearAdd": 1}, set()),
    "loud_hardswish": (
        {"QLinearConv": 3, "QLinearMul": 1, "Clip": 1, "QLinearGlobalAveragePool": 1},
        {"Clip"},
    ),
    "residual": ({"QLinearConv": 3, "QLinearAdd": 1}, set()),
    "concat": ({"QLinearConv": 3, "QLinearConcat": 1, "Clip": 1}, {"Clip"}),
    "dense": ({"QLinearConv": 3, "QLinearConcat": 2}, set()),
    "mul_constant": ({"QLinearConv": 2, "QLinearMul": 1}, set()),
    "squeeze_excite": ({"QLinearConv": 4, "QLinearSigmoid": 1, "QLinearMul": 1}, set()),
    "max_pool": ({"QLinearConv": 2}, set()),
    "norm_behind": ({"QLinearConv": 3}, set()),
    "prelu": ({"QLinearConv": 2}, set()),
    "avg_pool": ({"QLinearConv": 2, "QLinearAveragePool": 1}, set()),
    "resize": ({"QLinearConv": 2}, set()),
    "linear_chain": ({"QGemm": 2}, set()),
    "linear_3d": ({"QGemm": 2}, set()),
    "conv1d": ({"QLinearConv": 2}, set()),
    "depthwise": ({"QLinearConv": 3}, set()),
    "head": ({"QLinearConv": 1, "QGemm": 1}, set()),
    "two_inputs": ({"QGemm": 2, "QLinearAdd": 1}, set()),
    "shared_conv": ({"QLinearConv": 3}, set()),
    "asymmetric_pad": ({"QLinearConv": 2}, set()),
    "same_padding": ({"QLinearConv": 2}, set()),
    "dead": ({"QLinearConv": 2}, set()),
    "attention": ({"QGemm": 4}, {"MatMul"}),
}


def names(name: str) -> tuple[list[str], list[str]]:
    case = quantized(name)
    outputs = flat(case.module(*case.batches[0]))
    return [f"in{i}" for i in range(len(case.batches[0]))], [f"out{i}" for i in range(len(outputs))]


def session(model: onnx.ModelProto, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = session_options(1)
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, *inputs: torch.Tensor) -> list[torch.Tensor]:
    made = session(model)
    feeds = {info.name: x.numpy() for info, x in zip(made.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in made.run(None, feeds)]


def io_names(model: onnx.ModelProto) -> tuple[list[str], list[str]]:
    return [v.name for v in model.graph.input], [v.name for v in model.graph.output]


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_int8_files_compute_what_the_converted_graph_does(name: str, tmp_path: Path) -> None:
    case = quantized(name)
    model = for_onnxruntime(to_onnx(case.program, *names(name)))
    onnx.checker.check_model(model, full_check=True)
    assert io_names(model) == names(name)
    for expected, got in zip(flat(case.program.module()(*case.batches[0])), run(model, *case.batches[0]), strict=True):
        assert sqnr(expected, got) > EXACT_DB
    assert_same_codes(model, name)
    if name in FUSED:
        session(model, tmp_path / "optimized.onnx")
        ops = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
        integer, rest = FUSED[name]
        assert {op: count for op, count in ops.items() if op in integer} == integer
        assert not (ops.keys() & FLOAT) - rest


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_files_load_and_compute_alike_in_the_exact_mode_of_processors_without_vnni(name: str) -> None:
    """In it ONNX Runtime renames weights, and no two layers may share one."""
    case = quantized(name)
    model = for_onnxruntime(to_onnx(case.program, *names(name)))
    options = onnxruntime.SessionOptions()
    for key, value in EXACT.items():
        options.add_session_config_entry(key, value)
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {info.name: x.numpy() for info, x in zip(made.get_inputs(), case.batches[0], strict=True)}
    results = [torch.from_numpy(y) for y in made.run(None, feeds)]
    for expected, got in zip(flat(case.program.module()(*case.batches[0])), results, strict=True):
        assert sqnr(expected, got) > EXACT_DB


def test_shared_weights_are_stored_once() -> None:
    model = for_onnxruntime(to_onnx(quantized("shared_transposed").program, *names("shared_transposed")))
    assert sum(node.op_type == "ConvTranspose" for node in model.graph.node) == 2
    assert sum(list(tensor.dims) == [4, 4, 2, 2] for tensor in model.graph.initializer) == 1


def padded(raw: np.ndarray) -> np.ndarray:
    """Weights with zeros up to a multiple of four input channels."""
    return np.pad(raw, [(0, -size % 4) if axis == 1 else (0, 0) for axis, size in enumerate(raw.shape)])


def assert_same_codes(model: onnx.ModelProto, name: str) -> None:
    """Weight codes, scales, zero points (uint8: + 128) and bias codes are those of the converted torch graph."""
    program = quantized(name).program
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    dequantize = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    quantize = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    state = {**program.state_dict, **program.constants}
    signature = program.graph_signature
    held = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}

    def value(node: torch.fx.Node) -> np.ndarray:
        return state[held[node.name]].detach().numpy()

    wanted = Counter(
        (np.float32(n.args[1]).item(), n.args[2] + 128)
        for n in program.graph.nodes
        if n.target == q.quantize_per_tensor.default
    )
    found = Counter((stored[n.input[1]].item(), int(stored[n.input[2]])) for n in quantize)
    assert all(stored[n.input[2]].dtype == np.uint8 for n in quantize)
    assert set(found) - {HARD_SIGMOID} == set(wanted)

    weights = [n for n in dequantize.values() if n.input[0] in stored and stored[n.input[0]].dtype == np.int8]
    codes = {stored[n.input[0]].tobytes(): stored[n.input[1]].tobytes() for n in weights}
    layers = [
        n
        for n in program.graph.nodes
        if n.target in (aten.conv1d.default, aten.conv2d.default, aten.linear.default, aten.conv_transpose2d.input)
    ]
    assert layers
    for layer in layers:
        weight = layer.args[1]
        raw, scale = value(weight.args[0]), weight.args[1]
        scale = value(scale) if isinstance(scale, torch.fx.Node) else np.float32(scale)
        assert raw.dtype == np.int8
        assert raw.tobytes() in codes or raw.T.tobytes() in codes or padded(raw).tobytes() in codes
        assert scale.tobytes() in codes.values()
        matmul = layer.target == aten.linear.default and layer.meta["val"].ndim > 2  # its bias is a float Add
        if len(layer.args) > 2 and layer.args[2] is not None and not matmul:
            step = (np.float64(np.float32(layer.args[0].args[1])) * scale).astype(np.float32)
            bias = np.rint(value(layer.args[2]).astype(np.float64) / step).astype(np.int32)
            biases = {stored[n.input[0]].tobytes() for n in dequantize.values() if n.input[0] in stored}
            assert bias.tobytes() in biases


def test_the_table_names_real_networks() -> None:
    assert FUSED.keys() <= CASES.keys()


class Twins(nn.Module):
    """Inputs and parameters with the names that exports like, and outputs that are inputs or appear twice."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = F.relu(a + self.x) * self.y
        return z, a, z, self.y, b - 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (("a", "b"), ("p", "q", "r", "s", "t")),
        (("b", "a"), ("relu", "add", "mul", "sub", "relu_inner")),
        (("x", "y"), ("add", "add_inner", "a", "b", "add_inner_inner")),
        (("mul", "sub"), ("x", "y", "relu", "a", "b")),
        (("input.1", "image data"), ("output/0", "1", "2", "3", "größe")),
    ],
)
def test_names_are_the_given_ones(inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    module, example = Twins().eval(), (torch.randn(2, 4), torch.randn(2, 4))
    model = to_onnx(float32(module, example).program, inputs, outputs)
    assert io_names(model) == (list(inputs), list(outputs))
    for expected, got in zip(module(*example), run(model, *example), strict=True):
        torch.testing.assert_close(got, expected)


class Assorted(nn.Module):
    """Has what the exporter looks for: mixed types, numbers for tensors, views, a branch, and ops to take apart."""

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        branch = torch.cond(x.sum() > 0, lambda x: torch.relu(x * 2).t(), lambda x: (x + 1).t(), (x[0],))
        return branch, x * 2 + i, i / 2, x.max(1)[0], F.max_pool2d(x[None], 2), F.huber_loss(x, x + i), F.silu(x)


@torch.no_grad()
@pytest.mark.parametrize("name", ["residual", "concat", "squeeze_excite", "conv1d", "two_inputs", "assorted"])
def test_lean_passes_make_the_same_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "assorted":
        program = float32(Assorted(), (torch.ones(3, 8, 8), torch.arange(8))).program
    else:
        program = quantized(name).program
    signature = program.graph_signature
    names = [f"x{i}" for i in range(len(signature.user_inputs))], [f"y{i}" for i in range(len(signature.user_outputs))]
    before = str(program)
    lean_file = to_onnx(program, *names).SerializeToString()
    assert str(program) == before
    for part in ("unread_notes", "needed_decompositions"):
        monkeypatch.setattr(f"edgekit.exporters.onnx.export.{part}", nullcontext)
    assert to_onnx(program, *names).SerializeToString() == lean_file


def test_opset_and_nothing_of_the_exporter_is_left() -> None:
    model = to_onnx(quantized("residual").program, ["x"], ["y"])
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert model.producer_name == "edgekit" and not model.metadata_props and not model.functions
    graph = model.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph):
        assert not item.metadata_props and not item.doc_string
    assert b"int8_nets" not in model.SerializeToString()


@torch.no_grad()
def test_half_weights() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    x = torch.randn(2, 64)
    program = float32(module, (x,)).program
    full, half = to_onnx(program, ["x"], ["y"]), to_onnx(program, ["x"], ["y"], half_weights=True)
    assert half.ByteSize() < 0.55 * full.ByteSize()
    assert halve(full).ByteSize() < 0.55 * full.ByteSize()
    for model in (half, halve(full)):
        onnx.checker.check_model(model, full_check=True)
        assert io_names(model) == (["x"], ["y"])
        assert 50 < sqnr(module(x), run(model, x)[0]) < 120


@torch.no_grad()
def test_half_weights_leave_integers_and_infinities() -> None:
    module = Net(lambda n, x: F.relu(x[:, n.i.value]) + n.m.value, i=Constant(1), m=Constant(1)).eval()
    module.i.value = torch.arange(99, -1, -1)
    module.m.value = torch.linspace(0, 1, 100)
    module.m.value[3] = -torch.inf
    x = torch.randn(2, 100)
    model = to_onnx(float32(module, (x,)).program, ["x"], ["y"], half_weights=True)
    stored = {i.data_type for i in model.graph.initializer if np.prod(i.dims) == 100}
    assert stored == {onnx.TensorProto.INT64, onnx.TensorProto.FLOAT16}
    torch.testing.assert_close(run(model, x)[0], module(x), rtol=1e-3, atol=1e-3)


def test_half_weights_out_of_range_are_refused() -> None:
    module = nn.Linear(16, 16)
    module.weight.data[3, 3] = 70_000
    with pytest.raises(EdgeKitError, match="does not fit float16"):
        to_onnx(float32(module, (torch.randn(1, 16),)).program, ["x"], ["y"], half_weights=True)


@torch.no_grad()
@pytest.mark.parametrize("amounts", [(0, 1, 0, 1), (2, 1, 0, 3), (1, 1, 1, 1)])
def test_folded_pads_equal_explicit_ones(amounts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekit.exporters.onnx import export
    from edgekit.quant.ptq.recipes import int8_static

    torch.manual_seed(0)
    layers = (conv(), nn.Sigmoid(), nn.ZeroPad2d(amounts), conv(8, 4, padding=1, stride=2))
    batches = [(torch.randn(1, 3, 9, 9),) for _ in range(4)]
    program = int8_static(nn.Sequential(*layers).eval(), batches[0], batches).program
    folded = to_onnx(program, ["x"], ["y"])
    monkeypatch.setattr(export, "fold_quantized_pads", lambda model: None)
    explicit = to_onnx(program, ["x"], ["y"])
    assert not [n for n in folded.graph.node if n.op_type == "Pad"]
    assert len([n for n in explicit.graph.node if n.op_type == "Pad"]) == (amounts[0] != amounts[1])
    assert torch.equal(run(folded, *batches[0])[0], run(explicit, *batches[0])[0])


def test_what_onnx_cannot_express_is_named() -> None:
    module = Net(lambda n, x: torch.special.bessel_j0(F.relu(x)))
    program = float32(module, (torch.randn(2, 3),)).program
    with pytest.raises(EdgeKitError, match="bessel_j0") as caught:
        to_onnx(program, ["x"], ["y"])
    assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 600
    assert "--format executorch" in str(caught.value)


@pytest.mark.parametrize("codes", [np.int8, np.uint8])
@pytest.mark.parametrize("stored", ["initializer", "Constant"])
def test_constants_are_stored_as_their_codes(stored: str, codes: type) -> None:
    """Coordinates, masks and caches that stand beside activations: a float constant is not taken for its codes."""
    rng = np.random.default_rng(0)
    plane = (rng.standard_normal((1, 2, 4, 4)) * 3).astype(np.float32)
    scale, zero = np.array(0.03, np.float32), np.array(7, codes)
    make, tensor = onnx.helper.make_node, numpy_helper.from_array
    initializers = [tensor(scale, "scale"), tensor(zero, "zero")]
    nodes = [make("Constant", [], ["plane"], value=tensor(plane))] if stored == "Constant" else []
    initializers += [] if nodes else [tensor(plane, "plane")]
    for name in ("x", "plane"):
        nodes.append(make("QuantizeLinear", [name, "scale", "zero"], [f"{name}_codes"]))
        nodes.append(make("DequantizeLinear", [f"{name}_codes", "scale", "zero"], [f"{name}_real"]))
    nodes.append(make("Concat", ["x_real", "plane_real"], ["joined"], axis=1))
    nodes.append(make("QuantizeLinear", ["joined", "scale", "zero"], ["joined_codes"]))
    nodes.append(make("DequantizeLinear", ["joined_codes", "scale", "zero"], ["y"]))
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (1, channels, 4, 4))
        for name, channels in (("x", 3), ("y", 5))
    )
    graph = onnx.helper.make_graph(nodes, "planes", [x], [y], initializers)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)
    made = for_onnxruntime(proto)
    feed = torch.from_numpy(rng.standard_normal((1, 3, 4, 4)).astype(np.float32))
    assert torch.equal(run(made, feed)[0], run(proto, feed)[0])
    assert not any(numpy_helper.to_array(i).dtype == np.float32 and i.dims for i in made.graph.initializer)


NEARLY_NOTHING = {
    "divide by a norm": lambda x: x / (x.abs().sum(1, keepdim=True) + 1e-8),
    "logarithm": lambda x: torch.log(x.relu() + 1e-9),
    "subtract": lambda x: torch.log(x.abs() - -1e-9),
    "times": lambda x: 1e6 * (x * 1.000001 - x),
    "divided": lambda x: 1e6 * (x / 1.000001 - x),
}


@pytest.mark.parametrize("name", NEARLY_NOTHING)
def test_constants_near_0_and_1_are_kept(name: str) -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 3.0]])
    model = Net(lambda _, value: NEARLY_NOTHING[name](value))
    program = torch.export.export(model, (x,))
    session = onnxruntime.InferenceSession(to_onnx(program, ["x"], ["y"]).SerializeToString())
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-5, atol=1e-5)
