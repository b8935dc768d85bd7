"""Some cases of benchmarks/fuzz.py, always the same: damaged files end in one line, hang nothing, and run no code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource")
FUZZ = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"


def test_damaged_files_and_odd_options_end_in_one_line(tmp_path):
    """In a process of its own: torch cannot compute gradients in a fork of one that has computed some."""
    command = [sys.executable, str(FUZZ), "--quick", "--workers", "1", "--output", str(tmp_path / "failures.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "172 cases" in done.stdout, done.stdout + done.stderr[-2000:]
