"""Compact definitions of well-known architectures: real block structure, seeded weights, reduced or full size."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import networks
from attention_nets import bert_tiny, convnext_tiny, mobilevit_xxs, swin_tiny, vit_tiny
from networks import BasicBlock, InvertedResidual, ShuffleBlock, conv_bn


def classifier(channels: int, classes: int) -> list[nn.Module]:
    """(N, channels, H, W) → (N, classes)."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def resnet18(full: bool) -> nn.Module:
    if full:
        return networks.resnet18()
    layers: list[nn.Module] = [conv_bn(3, 16, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    for i, o, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 2)):
        layers += [BasicBlock(i, o, stride), BasicBlock(o, o, 1)]
    return nn.Sequential(*layers, *classifier(128, 100))


def mobilenet_v2(full: bool) -> nn.Module:
    if full:
        return networks.mobilenet_v2()
    layers: list[nn.Module] = [conv_bn(3, 16, 3, 2, act=nn.ReLU6())]
    for i, t, o, stride in (
        (16, 1, 8, 1),
        (8, 6, 12, 2),
        (12, 6, 12, 1),
        (12, 6, 24, 2),
        (24, 6, 24, 1),
        (24, 6, 40, 2),
    ):
        layers.append(InvertedResidual(i, t * i, o, 3, stride, nn.ReLU6))
    return nn.Sequential(*layers, conv_bn(40, 160, 1, act=nn.ReLU6()), *classifier(160, 100))


def mobilenet_v3_small(full: bool) -> nn.Module:
    if full:
        return networks.mobilenet_v3_small()
    layers: list[nn.Module] = [conv_bn(3, 16, 3, 2, act=nn.Hardswish())]
    layers += [InvertedResidual(16, 16, 16, 3, 2, nn.ReLU, 8), InvertedResidual(16, 72, 24, 3, 2, nn.ReLU)]
    layers += [
        InvertedResidual(24, 96, 40, 5, 2, nn.Hardswish, 24),
        InvertedResidual(40, 96, 40, 5, 1, nn.Hardswish, 24),
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 128), nn.Hardswish(), nn.Linear(128, 100)]
    return nn.Sequential(*layers, conv_bn(40, 96, 1, act=nn.Hardswish()), *head)


def shufflenet_v2(full: bool) -> nn.Module:
    if full:
        return networks.shufflenet_v2()
    layers: list[nn.Module] = [conv_bn(3, 24, 3, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    for i, o in ((24, 32), (32, 64), (64, 128)):
        layers += [ShuffleBlock(i, o, 2), ShuffleBlock(o, o, 1)]
    return nn.Sequential(*layers, conv_bn(128, 256, 1, act=nn.ReLU()), *classifier(256, 100))


class SigmoidGate(nn.Module):
    """Squeeze-and-excite (Hu et al., 2018) with the given inner activation."""

    def __init__(self, channels: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.down, self.up, self.act = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1), act

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))


class MBConv(nn.Module):
    """EfficientNet's block (Tan and Le, 2019)."""

    def __init__(self, i: int, t: int, o: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = t * i
        layers = [conv_bn(i, hidden, 1, act=nn.SiLU())] if t > 1 else []
        layers += [conv_bn(hidden, hidden, kernel, stride, hidden, nn.SiLU())]
        self.layers = nn.Sequential(*layers, SigmoidGate(hidden, max(1, i // 4), nn.SiLU()), conv_bn(hidden, o, 1))
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def efficientnet_b0(full: bool) -> nn.Module:
    table = [(1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2)]
    if full:
        table += [(6, 80, 3, 3, 2), (6, 112, 3, 5, 1), (6, 192, 4, 5, 2), (6, 320, 1, 3, 1)]
    layers: list[nn.Module] = [conv_bn(3, 32, 3, 2, act=nn.SiLU())]
    i = 32
    for t, o, count, kernel, stride in table:
        for index in range(count):
            layers.append(MBConv(i, t, o, kernel, stride if index == 0 else 1))
            i = o
    width = 1280 if full else 160
    return nn.Sequential(*layers, conv_bn(i, width, 1, act=nn.SiLU()), *classifier(width, 1000 if full else 100))


class RegNetBlock(nn.Module):
    """RegNetY's block: grouped convolution, squeeze-and-excite, shortcut (Radosavovic et al., 2020)."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv_bn(i, o, 1, act=nn.ReLU()), conv_bn(o, o, 3, stride, o // 8, nn.ReLU()),
            SigmoidGate(o, i // 4, nn.ReLU()), conv_bn(o, o, 1),
        )  # fmt: skip
        self.shortcut = conv_bn(i, o, 1, stride) if stride > 1 or i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.layers(x))


def regnet_y400(full: bool) -> nn.Module:
    layers: list[nn.Module] = [conv_bn(3, 32, 3, 2, act=nn.ReLU())]
    i = 32
    for o, count in ((48, 1), (104, 3), (208, 6), (440, 6)) if full else ((16, 1), (32, 2), (64, 2)):
        for index in range(count):
            layers.append(RegNetBlock(i, o, 2 if index == 0 else 1))
            i = o
    return nn.Sequential(*layers, *classifier(i, 1000 if full else 100))


class Fire(nn.Module):
    """SqueezeNet's block (Iandola et al., 2016)."""

    def __init__(self, i: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(i, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat((F.relu(self.one(x)), F.relu(self.three(x))), 1)


def squeezenet(full: bool) -> nn.Module:
    """SqueezeNet 1.1: pooling with ceil_mode, a convolution as classifier."""
    k = 4 if full else 1
    table = ((16, 64), (16, 64), None, (32, 128), (32, 128), None, (48, 192), (48, 192), (64, 256), (64, 256))
    layers: list[nn.Module] = [nn.Conv2d(3, 16 * k, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]
    i = 16 * k
    for row in table:
        if row is None:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            continue
        squeeze, expand = (number * k // 4 for number in row)
        layers.append(Fire(i, squeeze, expand))
        i = 2 * expand
    classes = 1000 if full else 100
    return nn.Sequential(*layers, nn.Conv2d(i, classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Inception(nn.Module):
    """GoogLeNet's block (Szegedy et al., 2014) with BatchNorm: four branches, concatenated."""

    def __init__(self, i: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int) -> None:
        super().__init__()
        self.one = conv_bn(i, one, 1, act=nn.ReLU())
        self.three = nn.Sequential(conv_bn(i, three[0], 1, act=nn.ReLU()), conv_bn(*three, 3, act=nn.ReLU()))
        self.five = nn.Sequential(conv_bn(i, five[0], 1, act=nn.ReLU()), conv_bn(*five, 5, act=nn.ReLU()))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv_bn(i, pool, 1, act=nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.one(x), self.three(x), self.five(x), self.pool(x)), 1)


def googlenet(full: bool) -> nn.Module:
    table = [
        (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), None, (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128), None, (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
    ]  # fmt: skip
    k = 1 if full else 8
    table = table if full else [*table[:4], None, table[-2]]
    act, pool = nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)
    layers = [conv_bn(3, 64 // k, 7, 2, act=act), pool, conv_bn(64 // k, 64 // k, 1, act=act)]
    layers += [conv_bn(64 // k, 192 // k, 3, act=act), pool]
    i = 192 // k
    for row in table:
        if row is None:
            layers.append(pool)
            continue
        a, b, c, d, e, f = (number // k for number in row)
        layers.append(Inception(i, a, (b, c), (d, e), f))
        i = a + c + e + f
    return nn.Sequential(*layers, *classifier(i, 1000 if full else 100))


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, convolution, twice; the input is kept (Huang et al., 2016)."""

    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.layers(x)), 1)


def densenet121(full: bool) -> nn.Module:
    growth, counts = (32, (6, 12, 24, 16)) if full else (8, (3, 3, 3))
    i = 2 * growth
    layers: list[nn.Module] = [conv_bn(3, i, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    for index, count in enumerate(counts):
        for _ in range(count):
            layers.append(DenseLayer(i, growth))
            i += growth
        if index < len(counts) - 1:
            layers += [nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, i // 2, 1, bias=False), nn.AvgPool2d(2)]
            i //= 2
    return nn.Sequential(*layers, nn.BatchNorm2d(i), nn.ReLU(), *classifier(i, 1000 if full else 100))


class Lraspp(nn.Module):
    """MobileNetV3's segmentation head (Howard et al., 2019): gated high features, upsampled, plus low ones."""

    def __init__(self, low: nn.Module, high: nn.Module, i: int, o: int, inner: int, classes: int) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.project = conv_bn(o, inner, 1, act=nn.ReLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(o, inner, 1, bias=False), nn.Sigmoid())
        self.low_classes, self.high_classes = nn.Conv2d(i, classes, 1), nn.Conv2d(inner, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, classes, H, W)."""
        low = self.low(x)
        high = self.high(low)
        high = self.project(high) * self.gate(high)
        high = F.interpolate(high, size=low.shape[-2:], mode="bilinear", align_corners=False)
        mask = self.low_classes(low) + self.high_classes(high)
        return F.interpolate(mask, size=x.shape[-2:], mode="bilinear", align_corners=False)


def lraspp(full: bool) -> nn.Module:
    backbone = list(networks.mobilenet_v3_small())[:9]
    inner, classes = (128, 21) if full else (32, 5)
    high = backbone[4:] if full else backbone[4:6]
    return Lraspp(nn.Sequential(*backbone[:4]), nn.Sequential(*high), 24, 48 if full else 40, inner, classes)


class DeepLab(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al., 2017) on a residual backbone with dilated convolutions."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_bn(3, width, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1), BasicBlock(width, width, 1),
            BasicBlock(width, 2 * width, 2), nn.Conv2d(2 * width, 2 * width, 3, padding=2, dilation=2), nn.ReLU(),
        )  # fmt: skip
        rates = (2, 4, 6)
        self.one = conv_bn(2 * width, width, 1, act=nn.ReLU())
        self.rates = nn.ModuleList(nn.Conv2d(2 * width, width, 3, padding=r, dilation=r) for r in rates)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn(2 * width, width, 1, act=nn.ReLU()))
        self.head = nn.Sequential(conv_bn(5 * width, width, 1, act=nn.ReLU()), nn.Conv2d(width, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, classes, H, W)."""
        y = self.stem(x)
        pooled = F.interpolate(self.pool(y), size=y.shape[-2:], mode="bilinear", align_corners=False)
        y = self.head(torch.cat([self.one(y), *(F.relu(conv(y)) for conv in self.rates), pooled], 1))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


def deeplab_v3(full: bool) -> nn.Module:
    return DeepLab(64 if full else 16, 21 if full else 5)


class C2f(nn.Module):
    """YOLOv8's block: split, a chain of residual blocks, all parts concatenated."""

    def __init__(self, i: int, o: int, count: int, shortcut: bool) -> None:
        super().__init__()
        half = o // 2
        self.first, self.last = conv_bn(i, o, 1, act=nn.SiLU()), conv_bn((2 + count) * half, o, 1, act=nn.SiLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(conv_bn(half, half, 3, act=nn.SiLU()), conv_bn(half, half, 3, act=nn.SiLU()))
            for _ in range(count)
        )
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]) if self.shortcut else block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Sppf(nn.Module):
    """Spatial pyramid pooling: three poolings in a row, all concatenated."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.last = conv_bn(c, c // 2, 1, act=nn.SiLU()), conv_bn(2 * c, c, 1, act=nn.SiLU())
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """YOLOv8-style detector: top-down and bottom-up pyramid, box distributions decoded to pixels, class scores."""

    BINS = 16

    def __init__(self, width: int, classes: int, count: int) -> None:
        super().__init__()
        w, act = width, nn.SiLU()
        self.classes = classes
        self.stem = nn.Sequential(
            conv_bn(3, w, 3, 2, act=act), conv_bn(w, 2 * w, 3, 2, act=act), C2f(2 * w, 2 * w, count, True)
        )
        self.p3 = nn.Sequential(conv_bn(2 * w, 4 * w, 3, 2, act=act), C2f(4 * w, 4 * w, count, True))
        self.p4 = nn.Sequential(conv_bn(4 * w, 8 * w, 3, 2, act=act), C2f(8 * w, 8 * w, count, True))
        self.p5 = nn.Sequential(conv_bn(8 * w, 16 * w, 3, 2, act=act), C2f(16 * w, 16 * w, count, True), Sppf(16 * w))
        self.top4, self.top3 = C2f(24 * w, 8 * w, count, False), C2f(12 * w, 4 * w, count, False)
        self.down3, self.down4 = conv_bn(4 * w, 4 * w, 3, 2, act=act), conv_bn(8 * w, 8 * w, 3, 2, act=act)
        self.out4, self.out5 = C2f(12 * w, 8 * w, count, False), C2f(24 * w, 16 * w, count, False)
        sizes = (4 * w, 8 * w, 16 * w)
        self.boxes = nn.ModuleList(self._head(c, 4 * self.BINS, 4 * w) for c in sizes)
        self.scores = nn.ModuleList(self._head(c, classes, 4 * w) for c in sizes)

    @staticmethod
    def _head(i: int, o: int, inner: int) -> nn.Sequential:
        return nn.Sequential(conv_bn(i, inner, 3, act=nn.SiLU()), nn.Conv2d(inner, o, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, 4 + classes, H·W/64 + H·W/256 + H·W/1024): center, size in pixels, scores in 0..1."""
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        up4 = self.top4(torch.cat((F.interpolate(p5, scale_factor=2.0), p4), 1))
        n3 = self.top3(torch.cat((F.interpolate(up4, scale_factor=2.0), p3), 1))
        n4 = self.out4(torch.cat((self.down3(n3), up4), 1))
        n5 = self.out5(torch.cat((self.down4(n4), p5), 1))
        levels = [
            torch.cat((box(n), score(n)), 1).flatten(2)
            for n, box, score in zip((n3, n4, n5), self.boxes, self.scores, strict=True)
        ]
        box, score = torch.cat(levels, 2).split((4 * self.BINS, self.classes), 1)
        anchors, strides = self.anchors([n.shape[-2:] for n in (n3, n4, n5)])
        bins = torch.arange(self.BINS, dtype=torch.float32).view(1, -1, 1, 1)
        sides = (box.view(x.shape[0], 4, self.BINS, -1).transpose(2, 1).softmax(1) * bins).sum(1)
        before, after = sides.chunk(2, 1)
        first, last = anchors - before, anchors + after
        return torch.cat((torch.cat(((first + last) / 2, last - first), 1) * strides, score.sigmoid()), 1)

    @staticmethod
    def anchors(sizes: list[torch.Size]) -> tuple[Tensor, Tensor]:
        """Returns the cells' centers (1, 2, cells) and strides (1, 1, cells) of three levels."""
        points, strides = [], []
        for (h, w), stride in zip(sizes, (8.0, 16.0, 32.0), strict=True):
            y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
            points.append(torch.stack((x, y)).view(2, -1))
            strides.append(torch.full((1, h * w), stride))
        return torch.cat(points, 1)[None], torch.cat(strides, 1)[None]


def yolo(full: bool) -> nn.Module:
    return Yolo(16, 80, 1) if full else Yolo(4, 5, 1)


class UNet(nn.Module):
    """U-Net (Ronneberger et al., 2015) with GroupNorm and transposed convolutions."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        w = width

        def double(i: int, o: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for source in (i, o):
                layers += [nn.Conv2d(source, o, 3, padding=1), nn.GroupNorm(4, o), nn.SiLU()]
            return nn.Sequential(*layers)

        self.down = nn.ModuleList([double(3, w), double(w, 2 * w), double(2 * w, 4 * w)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(4 * w, 2 * w, 2, 2), nn.ConvTranspose2d(2 * w, w, 4, 2, 1)])
        self.join = nn.ModuleList([double(4 * w, 2 * w), double(2 * w, w)])
        self.head = nn.Conv2d(w, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, classes, H, W)."""
        a = self.down[0](x)
        b = self.down[1](F.max_pool2d(a, 2))
        c = self.down[2](F.max_pool2d(b, 2))
        b = self.join[0](torch.cat((self.up[0](c), b), 1))
        return self.head(self.join[1](torch.cat((self.up[1](b), a), 1)))


def unet(full: bool) -> nn.Module:
    return UNet(32 if full else 8, 2)


class Recurrent(nn.Module):
    """Token classifier: embedding, two recurrent layers, the last step's state."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], width: int, bidirectional: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, width)
        self.layers = kind(width, width, 2, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(width * (2 if bidirectional else 1), 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, steps) int64 → (N, 5)."""
        return self.head(self.layers(self.embedding(tokens))[0][:, -1])


def lstm(full: bool) -> nn.Module:
    return Recurrent(nn.LSTM, 128 if full else 16, True)


def gru(full: bool) -> nn.Module:
    return Recurrent(nn.GRU, 128 if full else 16, False)


def audio_m5(full: bool) -> nn.Module:
    """M5 for raw audio (Dai et al., 2016)."""
    w = 128 if full else 16
    layers: list[nn.Module] = []
    for i, o, kernel, stride in ((1, w, 80, 4), (w, w, 3, 1), (w, 2 * w, 3, 1), (2 * w, 4 * w, 3, 1)):
        layers += [nn.Conv1d(i, o, kernel, stride), nn.BatchNorm1d(o), nn.ReLU(), nn.MaxPool1d(4)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4 * w, 35), nn.LogSoftmax(1))


def decoder(w: int, channels: int) -> list[nn.Module]:
    """(N, 4·w, H, W) → (N, channels, 8·H, 8·W) in 0..1."""
    layers: list[nn.Module] = []
    for i, o in ((4 * w, 2 * w), (2 * w, w)):
        layers += [nn.ConvTranspose2d(i, o, 3, 2, 1, output_padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    return [*layers, nn.ConvTranspose2d(w, channels, 4, 2, 1), nn.Sigmoid()]


def encoder(w: int) -> list[nn.Module]:
    """(N, 3, H, W) → (N, 4·w, H/8, W/8)."""
    table = ((3, w), (w, 2 * w), (2 * w, 4 * w))
    return [conv_bn(i, o, 3, 2, act=nn.LeakyReLU(0.1)) for i, o in table]


def autoencoder(full: bool) -> nn.Module:
    w = 32 if full else 8
    return nn.Sequential(*encoder(w), *decoder(w, 3))


class Vae(nn.Module):
    """Variational autoencoder (Kingma and Welling, 2013) whose noise is an input."""

    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        self.shape = (4 * width, 4, 4)
        size = 4 * width * 16
        self.encoder = nn.Sequential(*encoder(width), nn.Flatten())
        self.mean, self.log_variance = nn.Linear(size, latent), nn.Linear(size, latent)
        self.expand = nn.Linear(latent, size)
        self.decoder = nn.Sequential(*decoder(width, 3))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, 32, 32), (N, latent) → reconstruction, mean, log variance."""
        y = self.encoder(x)
        mean, log_variance = self.mean(y), self.log_variance(y)
        z = mean + torch.exp(0.5 * log_variance) * noise
        return self.decoder(self.expand(z).view(x.shape[0], *self.shape)), mean, log_variance


def vae(full: bool) -> nn.Module:
    return Vae(32 if full else 8, 16)


@dataclass(frozen=True)
class Architecture:
    """One entry: `transposes` is how many TRANSPOSE ops the reduced network may hold between its input and output.

    `small` and `image` are the height and width of the reduced and the full input.
    """

    make: Callable[[bool], nn.Module]
    transposes: int
    small: int = 64
    image: int = 224


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture(resnet18, 0),
    "mobilenet_v2": Architecture(mobilenet_v2, 0),
    "mobilenet_v3_small": Architecture(mobilenet_v3_small, 0),
    "efficientnet_b0": Architecture(efficientnet_b0, 0),
    "shufflenet_v2": Architecture(shufflenet_v2, 6),
    "regnet_y400": Architecture(regnet_y400, 0),
    "squeezenet": Architecture(squeezenet, 0),
    "googlenet": Architecture(googlenet, 0),
    "densenet121": Architecture(densenet121, 0),
    "mobilevit_xxs": Architecture(mobilevit_xxs, 12, image=256),
    "convnext_tiny": Architecture(convnext_tiny, 0),
    "vit_tiny": Architecture(vit_tiny, 8),
    "swin_tiny": Architecture(swin_tiny, 16, small=56),
    "lraspp": Architecture(lraspp, 0),
    "deeplab_v3": Architecture(deeplab_v3, 0),
    "yolo": Architecture(yolo, 0, image=640),
    "unet": Architecture(unet, 0, small=32, image=256),
    "bert_tiny": Architecture(bert_tiny, 8),
    "lstm": Architecture(lstm, 0),
    "gru": Architecture(gru, 0),
    "audio_m5": Architecture(audio_m5, 0),
    "autoencoder": Architecture(autoencoder, 0, small=32, image=128),
    "vae": Architecture(vae, 1, small=32, image=32),
}


def example(name: str, full: bool = False) -> tuple[Tensor, ...]:
    """Seeded inputs of batch 1."""
    made = torch.Generator().manual_seed(1)
    if name in ("lstm", "gru"):
        return (torch.randint(100, (1, 64 if full else 8), generator=made),)
    if name == "bert_tiny":
        steps = 128 if full else 12
        mask = torch.ones(1, steps, dtype=torch.int64)
        mask[:, steps * 2 // 3 :] = 0
        return torch.randint(100, (1, steps), generator=made), mask, torch.zeros_like(mask)
    if name == "audio_m5":
        return (torch.randn(1, 1, 16000 if full else 4000, generator=made),)
    size = ARCHITECTURES[name].image if full else ARCHITECTURES[name].small
    image = torch.randn(1, 3, size, size, generator=made)
    return (image, torch.randn(1, 16, generator=made)) if name == "vae" else (image,)


def build(name: str, full: bool = False) -> nn.Module:
    """Returns the network in eval mode: seeded weights, BatchNorm with statistics of a random batch."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].make(full)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = None
    if norms:
        with torch.no_grad():
            model(*(torch.randn(2 if full else 8, *array.shape[1:]) for array in example(name, full)))
    return model.eval()
