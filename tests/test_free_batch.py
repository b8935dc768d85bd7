"""Models whose forward computes with the size of its batch keep it free, or the line that fixes it is named."""

import numpy as np
import pytest
import torch
from torch import nn

from s2h_cli.graph import capture

SIDE, WINDOW = 8, 4


class Windows(nn.Module):
    """Splits an image into windows, and puts them together again with `count(windows, n)` for the number of images."""

    def __init__(self, count):
        super().__init__()
        self.count, self.stem, self.each, self.fc = count, nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        n = SIDE // WINDOW
        windows = x.reshape(-1, n, WINDOW, n, WINDOW, 8).transpose(2, 3).reshape(-1, WINDOW * WINDOW, 8)
        windows = self.each(windows)
        images = self.count(windows, n * n)
        x = windows.view(images, n, n, WINDOW, WINDOW, -1).transpose(2, 3).reshape(images, SIDE, SIDE, -1)
        return self.fc(x.mean((1, 2)))


@pytest.mark.parametrize("count", [
    lambda windows, n: int(windows.shape[0] / n), lambda windows, n: int(windows.shape[0]) // n, lambda windows, n: len(windows) // n,
    lambda windows, n: windows.shape[0] // n, lambda windows, n: int(np.prod(windows.shape[:1])) // n,
], ids=["divided", "int", "len", "floor", "numpy"])
def test_the_batch_stays_free(count):
    model = Windows(count)
    result = capture(model, (3, 16, 16))
    assert result.static_batch is None and result.notes == []
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(result.network(x), model(x))


def loop(windows, n):
    return sum(1 for _ in range(windows.shape[0])) // n


def test_the_line_that_fixes_it_is_named():
    result = capture(Windows(loop), (3, 16, 16))
    assert result.static_batch == 1
    assert result.notes[0].startswith("its graph takes batches of 1 only: its forward fixes the batch size, at test_free_batch.py line ")
    assert result.notes[0].endswith("'return sum(1 for _ in range(windows.shape[0])) // n'")


def test_int_and_len_are_as_before_afterwards():
    capture(Windows(lambda windows, n: len(windows) // n), (3, 16, 16))
    assert "int" not in globals() and "len" not in globals()
