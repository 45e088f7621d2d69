"""Random small torch networks for all three formats: convolutions, attention, recurrences, shortcuts, reshapes.

`network(seed)` makes a module and its example; `export_and_compare` exports it at fp32 and int8 and runs every file.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from isolated import Verdict
from torch import nn

from edgekit.runtimes import litert, ort, pte

SAMPLES = 12
CLOSE = 1e-3  # of the largest value, at fp32
FAITHFUL = 5.0  # dB at int8: a wrong axis or scale leaves about 0, and random weights amplify rounding


class Sum(nn.Module):
    """x + f(x), x · gate(x) or both beside one another along the channels."""

    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        if self.kind == "concat":
            return torch.cat([x, y], 1)
        return x + y if self.kind == "add" else x * torch.sigmoid(y) if self.kind == "gate" else torch.maximum(x, y)


class Apply(nn.Module):
    """A function of a tensor as a module."""

    def __init__(self, function: Any, *numbers: Any) -> None:
        super().__init__()
        self.function, self.numbers = function, numbers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *self.numbers)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.fused = heads, fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5, -1) @ v
        return x + self.out(y.transpose(1, 2).reshape(batch, length, width))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], width: int, hidden: int, both: bool) -> None:
        super().__init__()
        self.cell = kind(width, hidden, batch_first=True, bidirectional=both)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x)[0]


def _swap_halves(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, 1)
    return torch.cat([second, F.relu(first)], 1)


def _shuffle(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def _squeeze_excite(c: int) -> nn.Module:
    gate = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, max(2, c // 2), 1), nn.ReLU(), nn.Conv2d(max(2, c // 2), c, 1)
    )
    return Sum(gate, "gate")


IMAGE_BLOCKS = (
    "conv", "conv", "conv", "depthwise", "residual", "pool", "squeeze", "concat", "split", "shuffle", "up", "norm",
    "dilated", "asymmetric", "transposed",
)  # fmt: skip


class Choices:
    """Random choices by a seed."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def one(self, *choices: Any) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def activation(self) -> nn.Module:
        return self.one(
            nn.ReLU, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.Sigmoid,
            nn.Hardsigmoid, nn.Softplus, nn.Mish, nn.PReLU,
        )()  # fmt: skip

    def image_block(self, c: int, size: int) -> tuple[nn.Module, int, int]:
        """A block on images of `c` channels; returns what it makes of channels and sizes."""
        kind = self.one(*IMAGE_BLOCKS)
        width = self.one(4, 6, 8)
        if kind == "conv":
            stride = self.one(1, 1, 2) if size > 4 else 1
            conv = nn.Conv2d(c, width, 3, stride, 1, bias=self.one(True, False))
            return nn.Sequential(conv, nn.BatchNorm2d(width), self.activation()), width, -(-size // stride)
        if kind == "depthwise":
            inner = nn.Sequential(nn.Conv2d(c, c, 3, 1, 1, groups=c), self.activation(), nn.Conv2d(c, width, 1))
            return inner, width, size
        if kind in ("residual", "concat"):
            inner = nn.Sequential(nn.Conv2d(c, c, 3, 1, 1), self.activation(), nn.Conv2d(c, c, 1))
            return (
                Sum(inner, self.one("add", "gate", "max") if kind == "residual" else "concat"),
                c if kind == "residual" else 2 * c,
                size,
            )
        if kind == "pool" and size > 3:
            pool = self.one(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1))
            return pool, c, size // 2 if pool.kernel_size == 2 else (size - 1) // 2 + 1
        if kind == "squeeze":
            return _squeeze_excite(c), c, size
        if kind in ("split", "shuffle") and c % 2 == 0:
            return Apply(_swap_halves if kind == "split" else _shuffle), c, size
        if kind == "up" and size < 9:
            return nn.Upsample(scale_factor=2, mode=self.one("nearest", "bilinear")), c, 2 * size
        if kind == "norm":
            return self.one(nn.GroupNorm(1, c), nn.InstanceNorm2d(c), nn.BatchNorm2d(c)), c, size
        if kind == "transposed" and size < 9:
            return nn.Sequential(nn.ConvTranspose2d(c, width, 2, 2), self.activation()), width, 2 * size
        if kind == "asymmetric":
            return nn.Sequential(nn.ZeroPad2d((0, 1, 1, 0)), nn.Conv2d(c, width, 2)), width, size
        return nn.Conv2d(c, width, 3, 1, 2, dilation=2), width, size

    def row_block(self, width: int) -> tuple[nn.Module, int]:
        """A block on sequences or rows, whose last axis has `width` numbers."""
        kind = self.one("linear", "linear", "mlp", "attention", "norm", "recurrent", "activation")
        wide = self.one(8, 12, 16)
        if kind == "linear":
            return nn.Sequential(nn.Linear(width, wide), self.activation()), wide
        if kind == "mlp":
            inner = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, wide), self.activation(), nn.Linear(wide, width)
            )
            return Sum(inner, "add"), width
        if kind == "attention" and width % 4 == 0:
            return Attention(width, self.one(1, 2, 4), self.one(True, False)), width
        if kind == "recurrent":
            both = self.one(True, False)
            return Recurrent(self.one(nn.LSTM, nn.GRU, nn.RNN), width, 6, both), 12 if both else 6
        return (nn.LayerNorm(width) if kind == "norm" else self.activation()), width


def network(seed: int) -> tuple[nn.Module, torch.Tensor]:
    """Returns the network of a seed, in evaluation mode, and an example of its input."""
    torch.manual_seed(seed)
    choices = Choices(seed)
    blocks: list[nn.Module] = []
    if choices.random.random() < 0.6:
        c, size = choices.one(1, 3, 4), choices.one(8, 9, 12)
        x = torch.randn(1, c, size, size)
        for _ in range(int(choices.random.integers(2, 6))):
            block, c, size = choices.image_block(c, size)
            blocks.append(block)
        if choices.one(True, False):
            blocks += [nn.Flatten(2), Apply(torch.transpose, 1, 2)]
            width = c
            for _ in range(int(choices.random.integers(1, 3))):
                block, width = choices.row_block(width)
                blocks.append(block)
            blocks += [Apply(torch.mean, 1), nn.Linear(width, 5)]
        else:
            blocks += choices.one(
                [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 5)],
                [nn.Conv2d(c, 2, 1)],
                [nn.Flatten(), nn.LazyLinear(5)],
            )
    else:
        width = choices.one(4, 8, 10)
        x = torch.randn(1, choices.one(5, 7), width)
        for _ in range(int(choices.random.integers(2, 5))):
            block, width = choices.row_block(width)
            blocks.append(block)
        blocks.append(choices.one(nn.Linear(width, 4), nn.Softmax(-1), Apply(torch.mean, 1)))
    module = nn.Sequential(*blocks)
    module.train()
    with torch.no_grad():
        for _ in range(3):  # statistics of the normalizations
            module(torch.randn(8, *x.shape[1:]))
    return module.eval(), x


def export_and_compare(seed: int, precisions: tuple[str, ...] = ("fp32", "int8")) -> Verdict:
    """Export a network in three formats and run each file on samples that were not calibrated on."""
    import edgekit
    from edgekit.errors import EdgeKitError

    module, x = network(seed)
    samples = [torch.randn_like(x) for _ in range(SAMPLES)]
    held = [torch.randn_like(x) for _ in range(3)]
    with torch.no_grad():
        wanted = np.concatenate([module(each).numpy() for each in held])
    refused = []
    for precision in precisions:
        for format in ("executorch", "onnx", "tflite"):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    bundle = edgekit.export(
                        module, target="x86", formats=format, precision=precision, out=folder, name="net",
                        data=[(each, None) for each in samples], inputs=(),
                    )  # fmt: skip
                except EdgeKitError as error:
                    refused.append(f"{format} {precision}: {error.what}")
                    continue
                (artifact,) = bundle.artifacts
                actual = np.concatenate([_run(artifact, each.numpy()) for each in held])
            if actual.shape != wanted.shape:
                return "shape", f"{format} {precision}: {actual.shape}, not {wanted.shape}"
            error_size = float(np.abs(actual - wanted).max())
            if precision == "fp32" and error_size > CLOSE * max(1e-3, float(np.abs(wanted).max())):
                return "wrong", f"{format} {precision}: {error_size:.3g} of {np.abs(wanted).max():.3g}"
            noise = float(np.square(actual - wanted).mean())
            ratio = 10 * np.log10(float(np.square(wanted - wanted.mean()).mean()) / max(noise, 1e-20))
            if precision == "int8" and ratio < FAITHFUL and float(wanted.std()) > 1e-3:
                return "wrong", f"{format} {precision}: {ratio:.1f} dB"
    return ("refused", "; ".join(refused)) if refused else ("passed", " ".join(type(each).__name__ for each in module))


def _run(artifact: Any, x: np.ndarray) -> np.ndarray:
    """One run of a file by its format's own runtime."""
    (name,), outputs = [each.name for each in artifact.inputs], [each.name for each in artifact.outputs]
    load = {"onnx": ort.load, "tflite": litert.load, "executorch": pte.load}[artifact.format]
    session = load(str(artifact.path), threads=1, inputs=[name], outputs=outputs)
    try:
        return session.run({name: x})[outputs[0]]
    finally:
        session.close()
