"""A model of your own, in a file: any callable that returns an nn.Module.

    s2h prune examples/own_model.py:build --data digits --flops 0.3 --img-size 32 --epochs 5
"""

import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Two convolutions beside an identity: the stream's channels stay or go together in all blocks."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(32), Block(32))
        self.head = nn.Linear(32, num_classes)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def build(num_classes: int = 10) -> nn.Module:
    return Net(num_classes)
