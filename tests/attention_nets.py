"""Architectures with attention or LayerNorm: BERT, ViT, Swin, MobileViT, and ConvNeXt."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from networks import InvertedResidual, conv_bn


class Attention(nn.Module):
    """Multi-head self-attention with an optional additive bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(N, steps, width) → the same; `bias` broadcasts to (N, heads, steps, steps)."""
        n, steps, width = x.shape
        q, k, v = self.qkv(x).view(n, steps, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(y.transpose(1, 2).reshape(n, steps, width))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), act, nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Vit(nn.Module):
    """Vision transformer with a class token (Dosovitskiy et al., 2020)."""

    def __init__(self, size: int, width: int, heads: int, depth: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // 16) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, 4 * width, nn.GELU()) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit_tiny(full: bool) -> nn.Module:
    return Vit(224, 192, 3, 12, 1000) if full else Vit(64, 48, 3, 2, 100)


class ConvNextBlock(nn.Module):
    """Depthwise 7×7, LayerNorm over channels, MLP, layer scale (Liu et al., 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + (self.scale * y).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext_tiny(full: bool) -> nn.Module:
    widths, depths = ((96, 192, 384, 768), (3, 3, 9, 3)) if full else ((16, 32, 48), (1, 1, 2))
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0])]
    for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if index:
            layers += [ChannelNorm(widths[index - 1]), nn.Conv2d(widths[index - 1], width, 2, 2)]
        layers += [ConvNextBlock(width) for _ in range(depth)]
    head = [nn.AdaptiveAvgPool2d(1), ChannelNorm(widths[-1]), nn.Flatten()]
    return nn.Sequential(*layers, *head, nn.Linear(widths[-1], 1000 if full else 100))


class SwinBlock(nn.Module):
    """Attention in windows, shifted by half a window in every second block (Liu et al., 2021)."""

    def __init__(self, width: int, heads: int, size: int, window: int, shifted: bool) -> None:
        super().__init__()
        self.size, self.window = size, window
        self.shift = window // 2 if shifted and size > window else 0
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.table = nn.Parameter(0.5 * torch.randn((2 * window - 1) ** 2, heads))
        cells = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        distance = (cells[:, :, None] - cells[:, None, :]) + window - 1
        self.register_buffer("index", distance[0] * (2 * window - 1) + distance[1])
        self.register_buffer("mask", self._mask())

    def _split(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        k = self.window
        return x.view(n, h // k, k, w // k, k, c).transpose(2, 3).reshape(-1, k * k, c)

    def _mask(self) -> Tensor:
        """−100 between cells of a window that do not touch in the image: (windows, 1, cells, cells)."""
        parts = torch.zeros(self.size, dtype=torch.int64)
        parts[self.size - self.window : self.size - self.shift] = 1
        parts[self.size - self.shift :] = 2
        region = self._split((3 * parts[:, None] + parts[None, :])[None, :, :, None])[:, :, 0]
        differs = region[:, None, :] != region[:, :, None]
        return torch.where(differs, -100.0, 0.0)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(N, size, size, width) → the same."""
        n, h, w, c = x.shape
        k = self.window
        y = self.norms[0](x)
        bias = self.table[self.index].permute(2, 0, 1)[None]
        if self.shift:
            y, bias = torch.roll(y, (-self.shift, -self.shift), (1, 2)), bias + self.mask
        y = self.attention(self._split(y), bias)
        y = y.view(n, h // k, w // k, k, k, c).transpose(2, 3).reshape(n, h, w, c)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y
        return x + self.mlp(self.norms[1](x))


class PatchMerging(nn.Module):
    """Four neighbors become one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        return self.reduce(self.norm(torch.cat(parts, -1)))


class Swin(nn.Module):
    """Swin transformer."""

    def __init__(self, size: int, width: int, depths: tuple[int, ...], heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        layers: list[nn.Module] = [nn.LayerNorm(width)]
        size //= 4
        for stage, depth in enumerate(depths):
            if stage:
                layers.append(PatchMerging(width))
                size, width, heads = size // 2, 2 * width, 2 * heads
            layers += [SwinBlock(width, heads, size, 7, index % 2 == 1) for index in range(depth)]
        self.layers, self.norm, self.head = nn.Sequential(*layers), nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layers(self.patches(x).permute(0, 2, 3, 1)))
        return self.head(x.permute(0, 3, 1, 2).mean((2, 3)))


def swin_tiny(full: bool) -> nn.Module:
    return Swin(224, 96, (2, 2, 6, 2), 3, 1000) if full else Swin(56, 24, (2, 1), 3, 100)


class MobileVitBlock(nn.Module):
    """Convolve, attend among equal positions of all patches, fold back, fuse (Mehta and Rastegari, 2021)."""

    def __init__(self, channels: int, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.local = nn.Sequential(
            conv_bn(channels, channels, 3, act=nn.SiLU()), nn.Conv2d(channels, width, 1, bias=False)
        )
        self.blocks = nn.Sequential(*(Block(width, 4, hidden, nn.SiLU()) for _ in range(depth)), nn.LayerNorm(width))
        self.project = conv_bn(width, channels, 1, act=nn.SiLU())
        self.fuse = conv_bn(2 * channels, channels, 3, act=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.local(x)
        n, c, h, w = y.shape
        rows, columns = h // 2, w // 2
        y = y.reshape(n * c * rows, 2, columns, 2).transpose(1, 2).reshape(n, c, rows * columns, 4)
        y = self.blocks(y.transpose(1, 3).reshape(n * 4, rows * columns, c))
        y = y.view(n, 4, rows * columns, c).transpose(1, 3).reshape(n * c * rows, columns, 2, 2)
        y = y.transpose(1, 2).reshape(n, c, h, w)
        return self.fuse(torch.cat((x, self.project(y)), 1))


def mobilevit_xxs(full: bool) -> nn.Module:
    def mobile(i: int, o: int, stride: int) -> nn.Module:
        return InvertedResidual(i, 2 * i, o, 3, stride, nn.SiLU)

    layers: list[nn.Module] = [conv_bn(3, 16, 3, 2, act=nn.SiLU()), mobile(16, 16, 1), mobile(16, 24, 2)]
    if full:
        layers += [mobile(24, 24, 1), mobile(24, 24, 1), mobile(24, 48, 2), MobileVitBlock(48, 64, 128, 2)]
        layers += [mobile(48, 64, 2), MobileVitBlock(64, 80, 160, 4), mobile(64, 80, 2), MobileVitBlock(80, 96, 192, 3)]
        layers += [conv_bn(80, 320, 1, act=nn.SiLU())]
    else:
        layers += [mobile(24, 32, 2), MobileVitBlock(32, 32, 64, 1), mobile(32, 40, 2), MobileVitBlock(40, 32, 64, 1)]
    width = 320 if full else 40
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000 if full else 100))


def residual_norm(i: int, o: int, epsilon: float) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(i, o), "LayerNorm": nn.LayerNorm(o, eps=epsilon)})


class BertLayer(nn.Module):
    """Post-norm transformer block; parameters are named as in published BERT files."""

    def __init__(self, width: int, heads: int, hidden: int, epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": residual_norm(width, width, epsilon)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = residual_norm(hidden, width, epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(N, steps, width) → the same; `bias` (N, 1, 1, steps) is added to the scores."""
        n, steps, width = x.shape

        def split(name: str) -> Tensor:
            return self.attention["self"][name](x).view(n, steps, self.heads, -1).transpose(1, 2)

        scores = split("query") @ split("key").transpose(-1, -2) / math.sqrt(width // self.heads) + bias
        y = (scores.softmax(-1) @ split("value")).transpose(1, 2).reshape(n, steps, width)
        output = self.attention["output"]
        x = output["LayerNorm"](output["dense"](y) + x)
        return self.output["LayerNorm"](self.output["dense"](F.gelu(self.intermediate["dense"](x))) + x)


class Bert(nn.Module):
    """BERT encoder (Devlin et al., 2018); parameters are named as in published files."""

    def __init__(
        self, vocabulary: int, positions: int, width: int, heads: int, hidden: int, depth: int, epsilon: float = 1e-12
    ) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocabulary, width),
                "position_embeddings": nn.Embedding(positions, width),
                "token_type_embeddings": nn.Embedding(2, width),
                "LayerNorm": nn.LayerNorm(width, eps=epsilon),
            }
        )
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(BertLayer(width, heads, hidden, epsilon) for _ in range(depth))}
        )
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, tokens: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        """Three (N, steps) int64; a mask of 0 hides a step → states (N, steps, width), pooled (N, width)."""
        table = self.embeddings
        positions = torch.arange(tokens.shape[1])[None]
        x = table["word_embeddings"](tokens) + table["token_type_embeddings"](types)
        x = table["LayerNorm"](x + table["position_embeddings"](positions))
        bias = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.encoder["layer"]:
            x = layer(x, bias)
        return x, torch.tanh(self.pooler["dense"](x[:, 0]))


def bert_tiny(full: bool) -> nn.Module:
    return Bert(30522, 512, 128, 2, 512, 2) if full else Bert(100, 32, 32, 2, 64, 2)
