# SPDX-License-Identifier: MIT
"""Everything here runs on the real SGLang; the stand-ins for a CPU machine come from tests/conftest.py."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.sglang)


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No PAT_SGLANG_* variable of the developer's shell reaches a test, no count of another test."""
    import os

    from pat_sglang.metrics import METRICS

    for name in list(os.environ):
        if name.startswith("PAT_SGLANG") and name != "PAT_SGLANG_CACHE_DIR":
            monkeypatch.delenv(name)
    METRICS.reset()
