"""A model file and a command line that trains it within seconds, for tests of the real entry point."""

import pytest

from s2h_cli import cli

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.1),
                                  nn.Conv2d(32, 24, 3, padding=1), nn.SiLU(),
                                  nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.body(x)).relu().mean((2, 3)))

def build(num_classes=10):
    return Net(num_classes)

def blank(num_classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))

def plain(num_classes=10):
    net = Net(num_classes)
    for i in (1, 3, 7):  # what depends on the other images of a batch, and on chance
        net.body[i] = nn.Identity()
    return net

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.conv1(x).relu())

def deep(num_classes=10):
    net = Net(num_classes)
    net.body = nn.Sequential(*(Block() for _ in range(3)))
    return net

def wide(num_classes=3):
    return Net(3)

def nothing():
    return 42

class Fixed(Net):
    def forward(self, x):
        return super().forward(x.reshape(1, 3, 16, 16))

def fixed(num_classes=10):
    return Fixed(num_classes)

def naughty(num_classes=10):
    net = Net(num_classes)
    net.head.register_forward_hook(lambda module, x, y: y / torch.zeros(()))
    return net
"""


PRUNE = ["prune", "net.py:build", "--data", "data", "--flops", "0.4", "--img-size", "16", "--workers", "0", "--batch-size", "16",
         "--divisor", "2", "--device", "cpu"]


def s2h(*args):
    """Runs the command line in this process; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in args])
    return end.value.code
