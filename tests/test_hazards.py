"""Networks that the usual flow of tools ruins, and what EdgeKit makes of them.

Further hazards: extreme channels in tests/quant/test_equalize.py, transformers in tests/quant/test_smooth.py,
convolutions at int8-dynamic in tests/quant/test_recipes.py, detector heads in tests/quant/test_mixed.py.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from int8_nets import sqnr
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import edgekit
from edgekit.quant.ptq.recipes import int8_static

CHANNELS, BLOCKS = 16, 4


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


def block() -> list[nn.Module]:
    wide = 4 * CHANNELS
    return [
        *(nn.Conv2d(CHANNELS, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()),
        *(nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()),
        *(SqueezeExcite(wide), nn.Conv2d(wide, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS)),
    ]


def mobile_net() -> tuple[nn.Module, torch.Tensor]:
    """A MobileNetV3 in small with weights of heavy tails, and the images that BatchNorm was fitted to."""
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.BatchNorm2d(CHANNELS), nn.Hardswish())
    layers = [layer for _ in range(BLOCKS) for layer in block()]
    net = nn.Sequential(*stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10))
    images = torch.randn(80, 3, 32, 32)
    for _ in range(20):
        net(images)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
        if isinstance(module, nn.Conv2d):
            module.weight *= torch.exp(2 * torch.randn_like(module.weight))
    for _ in range(20):
        net(images)
    return net.eval(), images


@torch.no_grad()
def test_hard_swish_and_squeeze_excite() -> None:
    net, images = mobile_net()
    calibration, evaluation = [(image[None],) for image in images[:40]], images[40:]
    reference = net(evaluation)

    scheme = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(net, calibration[0]).module(), scheme)
    for batch in calibration:
        prepared(*batch)
    textbook = convert_pt2e(prepared)
    assert sqnr(reference, torch.cat([textbook(image[None]) for image in evaluation])) < 3

    ours = int8_static(net, calibration[0], calibration).program.module()
    outputs = torch.cat([ours(image[None]) for image in evaluation])
    assert sqnr(reference, outputs) > 10
    assert (outputs.argmax(1) == reference.argmax(1)).float().mean() > 0.9


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_channels_last(precision: str, tmp_path: Path) -> None:
    """Weights and data in channels-last order: ExecuTorch alone reads them as if they were contiguous, or fails."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    images = torch.randn(16, 3, 8, 8)
    expected = net(images)
    strided = images.to(memory_format=torch.channels_last)
    bundle = edgekit.export(
        net.to(memory_format=torch.channels_last), precision=precision, data={"x": strided}, out=tmp_path, name="net"
    )
    golden = np.load(bundle.path / "golden.npz")
    for format in ("executorch", "onnx", "tflite"):
        outputs = torch.from_numpy(golden[f"{format}/{bundle.artifacts[0].outputs[0].name}"])[:, 0]
        assert sqnr(expected[: len(outputs)], outputs) > (90 if precision == "fp32" else 30)
