# SPDX-License-Identifier: MIT
"""Markers that skip with a reason, one seed a test, and the hypothesis profile of CI.

On a machine without a CUDA device this file also puts scripts/cpu's stand-ins in place, so that
`pytest tests` works from any shell and SGLang imports inside the tests.
"""

from __future__ import annotations

import importlib
import os
import random
import runpy
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

try:
    import hypothesis
except ImportError:  # GPU machines are often offline images; only the CPU tier needs it
    hypothesis = None

ROOT = Path(__file__).resolve().parents[1]
STUBS = ROOT / "scripts" / "cpu" / "stubs"

# A shared two-core machine pauses any test for seconds, so no deadline; derandomised, so that a red
# run can be repeated. Look for new examples with HYPOTHESIS_PROFILE=explore.
if hypothesis is not None:
    hypothesis.settings.register_profile(
        "ci",
        deadline=None,
        derandomize=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if not torch.cuda.is_available() and "SGLANG_USE_CPU_ENGINE" not in os.environ:
    # The same as `. scripts/cpu/env.sh`, for this process and for the servers it starts.
    os.environ.update(
        SGLANG_USE_CPU_ENGINE="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", OMP_NUM_THREADS="1"
    )
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(STUBS), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    sys.path.insert(0, str(STUBS))
    runpy.run_path(str(STUBS / "sitecustomize.py"))


@cache
def _missing(marker: str) -> str | None:
    """Why tests with this marker cannot run here; None when they can."""
    if marker == "gpu" and not torch.cuda.is_available():
        return "no CUDA device"
    if marker == "nvcc":
        homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
        found = any(home and os.access(Path(home, "bin", "nvcc"), os.X_OK) for home in homes)
        if not found and shutil.which("nvcc") is None:
            return "no nvcc (CUDA_HOME, /usr/local/cuda and PATH were searched)"
    if marker == "sglang":
        try:
            importlib.import_module("sglang.srt.server_args")
        except Exception as error:  # a broken install raises more than ImportError
            return f"sglang does not import: {type(error).__name__}: {error}"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--min-passed",
        type=int,
        default=0,
        metavar="N",
        help="fail unless at least N tests passed, so that a tier of skips is never green",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in ("gpu", "nvcc", "sglang"):
        if item.get_closest_marker(marker) and (reason := _missing(marker)):
            pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    needed = terminalreporter.config.getoption("--min-passed")
    passed = len(terminalreporter.stats.get("passed", []))
    if passed < needed:
        terminalreporter.write_line(f"FAILED: {passed} tests passed, {needed} needed", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    needed = session.config.getoption("--min-passed")
    if (
        reporter is not None
        and exitstatus == pytest.ExitCode.OK
        and len(reporter.stats.get("passed", [])) < needed
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, in whatever order the tests run."""
    value = 20260511
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value
