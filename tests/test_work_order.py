# SPDX-License-Identifier: MIT
"""Which pieces the workers of a grid get, played on the host (work_order.cc)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_piece_is_computed_once(tmp_path: Path) -> None:
    program = tmp_path / "work_order"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-fsanitize=undefined"]
    source = ROOT / "tests" / "work_order.cc"
    subprocess.run([*compiler, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    played = subprocess.run([program], capture_output=True, text=True, check=False)
    assert played.returncode == 0, played.stdout + played.stderr
