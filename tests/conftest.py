import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
warnings.filterwarnings("ignore", category=FutureWarning)

from s2h_cli import latency  # noqa: E402
from toy import MODEL  # noqa: E402

latency.BLOCK_SECONDS = 0.001  # no test waits for a timing that is good


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a model file and a data folder of two easy classes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for target, name in enumerate(("dark", "light")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (16, 16, 3)) + 127 * target
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path
