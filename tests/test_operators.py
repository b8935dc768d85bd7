"""Some operators of benchmarks/operators.py, always the same: captured = model, and cut = zeroed, or frozen with a reason."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("expecttest")  # which PyTorch's database of operators imports
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

#: Operators that leave channels apart, a few of each kind of rule; and operators that do not, or that have no rule.
THROUGH = ["nn.functional.adaptive_max_pool2d", "nn.functional.group_norm", "nn.functional.conv2d",
           "nn.functional.pad (constant)", "nn.functional.unfold", "nn.functional.prelu", "add", "cat", "chunk", "cumsum",
           "diff", "gather", "index_select", "permute", "roll", "sort", "topk"]
STUCK = ["fft.fft", "linalg.inv", "logaddexp", "vdot", "nn.functional.bilinear", "nn.functional.cross_entropy", "cov"]


@pytest.mark.parametrize("name", [*THROUGH, *STUCK])
def test_an_operator_between_convolutions(name):
    import operators  # late: PyTorch's database takes seconds

    found = operators.sweep(name, 4)
    assert "wrong" not in found and (name in STUCK or "pruned" in found), found
