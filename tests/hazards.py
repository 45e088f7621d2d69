"""Small networks that really collapse in int8 without a remedy, and the images that they tell apart."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)  # two spin at every op, and are ten times slower beside other work
SIZE, CLASSES = 12, 4
LOUD = 4000.0  # how much louder than the others one channel is
PIXELS = 640.0  # boxes are in pixels, scores from 0 to 1


class Outlier(nn.Module):
    """A classifier in which one channel of `mid` is LOUD: at one scale for all channels the others vanish.

    The image is turned behind it, so that nothing evens the channels out before they are quantized.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mid = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.mid(F.relu(self.stem(x)))).transpose(2, 3)
        return self.head(F.relu(self.deep(F.relu(self.last(x)))).mean((2, 3)))

    def loud(self) -> None:
        """Makes the channel loud where it is written and quiet where it is read: what is computed stays the same."""
        with torch.no_grad():
            self.mid.weight[0] *= LOUD
            self.mid.bias[0] *= LOUD
            self.last.weight[:, 0] /= LOUD


class Detector(nn.Module):
    """Joins boxes in pixels with class scores, one column for each cell of a grid: (1, 4 + CLASSES, 9)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.boxes = nn.Conv2d(16, 4, 1)
        self.scores = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.body(F.relu(self.stem(x))))
        boxes = F.relu(self.boxes(x)) * PIXELS
        return torch.cat([boxes.flatten(2), torch.sigmoid(self.scores(x)).flatten(2)], 1)


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy waves of two lengths and two directions, and which of the four each is."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, CLASSES, (count,), generator=generator)
    steps = torch.arange(SIZE).float()
    waves = [torch.sin(steps * length).expand(SIZE, SIZE) for length in (1.0, 2.2)]
    patterns = torch.stack([waves[0], waves[0].T, waves[1], waves[1].T])
    noise = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return 0.5 * noise + 0.6 * patterns[target][:, None], target


def scores(outputs: torch.Tensor | np.ndarray) -> torch.Tensor:
    """The class scores in a detector's output, averaged over the grid: (N, CLASSES)."""
    return torch.as_tensor(outputs)[:, 4:].mean(dim=2)


@torch.enable_grad()
def train(model: nn.Module, score: object) -> nn.Module:
    x, y = images(600, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(6):
        for start in range(0, len(x), 50):
            optimizer.zero_grad()
            F.cross_entropy(score(model(x[start : start + 50])), y[start : start + 50]).backward()  # type: ignore[operator]
            optimizer.step()
    return model.eval()


@functools.cache
def outlier() -> nn.Module:
    torch.manual_seed(0)
    model = train(Outlier(), lambda outputs: outputs)
    model.loud()
    return model


@functools.cache
def detector() -> nn.Module:
    torch.manual_seed(0)
    return train(Detector(), lambda outputs: 10 * scores(outputs))


def data(count: int = 200, calibration: int = 64, *, labeled: bool = True) -> dict[str, np.ndarray]:
    """Images to calibrate on and to evaluate on; `labeled` says whether the latter have labels."""
    x, y = images(count, 2)
    arrays = {"x": x.numpy(), "calib_x": images(calibration, 3)[0].numpy()}
    return {**arrays, "y": y.numpy()} if labeled else arrays
