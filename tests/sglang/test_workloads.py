# SPDX-License-Identifier: MIT
"""Every point of the serving benchmark is a command line that sglang.bench_serving takes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import workloads


@pytest.mark.parametrize("point", workloads.points(Path("trace")), ids=lambda point: point.name)
def test_bench_serving_takes_it(
    point: workloads.Point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.benchmark import serving

    taken: list[SimpleNamespace] = []
    monkeypatch.setattr(serving, "run_benchmark", taken.append)
    monkeypatch.setattr(workloads, "_write_requests", lambda path, *_: path.touch())
    arguments = point.arguments(Path("tokenizer"), tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_serving", *arguments])
    serving.cli_main()
    (args,) = taken
    assert args.max_concurrency == point.concurrency
    assert args.request_rate == (point.request_rate or float("inf"))
    expected = "custom" if point.rows else point.options["dataset-name"]
    assert args.dataset_name == expected
    assert point.rows is None or Path(args.dataset_path).exists()
