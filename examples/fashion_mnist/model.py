"""The two networks of the Fashion-MNIST example; both take float32 (N, 1, 28, 28) and give logits (N, 10)."""

import torch
import torch.nn.functional as F
from torch import nn


def conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return convolution, BatchNorm and ReLU6; `kernel` is odd and the padding keeps the size at stride 1."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class SeparableBlock(nn.Module):
    """A depthwise 3x3 and a pointwise convolution, with a shortcut where input and output have one shape."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        """Build the block for `inputs` → `outputs` channels."""
        super().__init__()
        self.depthwise = conv_bn_relu6(inputs, inputs, 3, stride, groups=inputs)
        self.pointwise = conv_bn_relu6(inputs, outputs, 1)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = self.pointwise(self.depthwise(x))
        return x + y if self.shortcut else y


class FashionNet(nn.Module):
    """A depthwise-separable CNN after MobileNet (https://arxiv.org/abs/1704.04861), for 28x28 gray images."""

    def __init__(self) -> None:
        """Build the network with fresh weights."""
        super().__init__()
        self.features = nn.Sequential(
            conv_bn_relu6(1, 32, 5, stride=2),
            SeparableBlock(32, 64),
            SeparableBlock(64, 96),
            SeparableBlock(96, 160, stride=2),
            SeparableBlock(160, 160),
            SeparableBlock(160, 256),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, 1, 28, 28) to logits (N, 10)."""
        x = self.pool(self.features(x)).flatten(1)
        return self.classifier(self.dropout(x))


class LeNet(nn.Module):
    """The convolutional network that PyTorch's tutorials train first, sized for 28x28 gray images."""

    def __init__(self) -> None:
        """Build the network with fresh weights."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 4 * 4, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (N, 1, 28, 28) to logits (N, 10)."""
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)
