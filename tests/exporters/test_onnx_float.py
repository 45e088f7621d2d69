"""Layers that stay in float in a quantized ONNX file: ONNX Runtime must not quantize them as it loads the file."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnxruntime
import pytest
import torch
from int8_nets import conv, sqnr
from torch import nn

from edgekit.exporters.onnx import ort_passes
from edgekit.exporters.onnx.export import to_onnx
from edgekit.exporters.onnx.ort_passes import for_onnxruntime
from edgekit.quant.graph.passes import aten, capture
from edgekit.quant.ptq.recipes import int8_static
from edgekit.runtimes.ort import session_options

torch.set_num_threads(1)
LOUD = 3000.0  # of one output channel: rounded per tensor, the others' weights are lost


def loud(layer: nn.Module, axis: int = 0) -> nn.Module:
    with torch.no_grad():
        layer.weight.transpose(0, axis)[0] *= LOUD
        layer.bias[0] = 0
    return layer


# What the network is, the op whose second node (or only one) stays in float, its input's shape, and its name in ONNX.
CASES: dict[str, tuple[Callable[[], nn.Module], object, tuple[int, ...], str]] = {
    "convolution": (
        lambda: nn.Sequential(conv(4, 4), loud(conv(4, 8)), nn.ReLU6(), nn.Conv2d(8, 4, 1, groups=4)),
        aten.conv2d.default, (1, 4, 8, 8), "Conv",
    ),
    "one channel": (
        lambda: nn.Sequential(conv(1, 1), loud(conv(1, 8)), nn.ReLU6(), nn.Flatten(), nn.Linear(512, 4)),
        aten.conv2d.default, (1, 1, 8, 8), "Conv",
    ),
    "linear": (
        lambda: nn.Sequential(
            nn.Linear(16, 16), loud(nn.Linear(16, 8)), nn.ReLU6(), nn.Unflatten(1, (8, 1, 1)), conv(8, 4, 1)
        ),
        aten.linear.default, (1, 16), "Gemm",
    ),
    "transposed": (
        lambda: nn.Sequential(
            conv(4, 4), loud(nn.ConvTranspose2d(4, 8, 2, stride=2), 1), nn.ReLU6(), conv(8, 4)
        ),
        aten.conv_transpose2d.input, (1, 4, 8, 8), "ConvTranspose",
    ),
}  # fmt: skip


def run(proto: onnx.ModelProto, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), session_options(1))
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_layer_in_float_is_computed_in_float(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, target, shape, op = CASES[name]
    torch.manual_seed(0)
    module = make().eval()
    batches = [(torch.randn(shape),) for _ in range(6)]
    *_, kept = [n.name for n in capture(module, batches[0]).graph.nodes if n.target == target][:2]
    program = int8_static(module, batches[0], batches, frozenset([kept])).program
    expected = torch.cat([program.module(check_guards=False)(*batch) for batch in batches])
    proto = to_onnx(program, ["x"], ["y"])
    assert op in {node.op_type for node in proto.graph.node}

    def decibel() -> float:
        return sqnr(expected, torch.cat([run(for_onnxruntime(proto), batch[0]) for batch in batches]))

    guarded = decibel()
    assert guarded > 25
    monkeypatch.setattr(ort_passes, "guard_float_layers", lambda model: None)
    unguarded = decibel()
    print(f"{name}: {guarded:.1f} dB guarded, {unguarded:.1f} dB not")
    assert unguarded < guarded - 6  # ONNX Runtime's own doing; where this fails, the guard is not needed any more
