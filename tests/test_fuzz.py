"""Some cases of benchmarks/fuzz.py, always the same: damaged files end in one line, hang nothing, and run no code."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("resource")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import fuzz  # noqa: E402

#: Cases of each kind: the kinds that cost little, often.
COUNTS = {
    "plan": 40,
    "args": 12,
    "bench": 10,
    "csv": 8,
    "weights_of_result": 12,
    "onnx": 16,
    "ts": 8,
    "pt2": 6,
    "checkpoint": 4,
    "weights": 4,
    "recipe": 8,
    "images": 8,
    "options": 24,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    fuzz.make_base(folder, timed=False)
    return folder


def test_every_kind_of_case_is_run():
    assert set(COUNTS) == set(fuzz.KINDS)


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_files_and_odd_options_end_in_one_line(base, kind):
    verdicts = {seed: fuzz.case(base, kind, seed) for seed in range(COUNTS[kind])}
    assert not {seed: (v.failures, v.words, v.output[-300:]) for seed, v in verdicts.items() if v.failures}
