# SPDX-License-Identifier: MIT
"""The stream kernels compile without spills and load. No GPU; scripts/bench_floor.py runs them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pat_sglang import jit

pytestmark = pytest.mark.nvcc


def test_streams_build_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAT_SGLANG_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("PAT_SGLANG_DISABLE_JIT", raising=False)
    module = jit.load_stream.__wrapped__()
    names = [module.variant_name(i) for i in range(module.num_variants())]
    assert len(set(names)) == len(names) > 5
    assert {name.split()[0] for name in names} == {"registers", "cp.async", "bulk"}


def test_streams_do_not_spill(tmp_path: Path) -> None:
    root = jit.source_dir()
    done = subprocess.run(
        [
            str(jit.cuda_home() / "bin/nvcc"), *jit._CUDA_FLAGS, f"-I{root}", "-arch=sm_90a",
            "-cubin", str(root / "bench/stream.cu"), "-o", str(tmp_path / "stream.cubin"),
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills and set(spills) == {("0", "0")}
