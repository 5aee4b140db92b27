# SPDX-License-Identifier: MIT
"""Everything here runs on the real SGLang; tests/conftest.py has put the CPU stand-ins in place."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import versions

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

torch.set_num_threads(1)  # two threads on a shared machine wait for each other at every barrier


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.sglang)


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No PAT_SGLANG_* variable of the shell reaches a test, and no count of another test."""
    from pat_sglang.metrics import METRICS

    for name in list(os.environ):
        if name.startswith("PAT_SGLANG") and name != "PAT_SGLANG_CACHE_DIR":
            monkeypatch.delenv(name)
    METRICS.reset()


@pytest.fixture
def registered() -> None:
    """The plug-in loaded into this process, as load_plugins() does it."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from pat_sglang.plugin import register

    register()
    HookRegistry.apply_hooks()


@pytest.fixture(params=versions.TREES)
def tree(request: pytest.FixtureRequest) -> str:
    """Each kind of prefix tree that this SGLang has."""
    kind: str = request.param
    return kind


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


@pytest.fixture
def model_folder(tmp_path: Path) -> str:
    """A model folder good enough to resolve arguments: a config and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


@pytest.fixture(scope="session")
def smollm2() -> ModuleType:
    """The script that makes the model."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module("smollm2")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def model(smollm2: ModuleType) -> Path:
    """SmolLM2-135M-Instruct in float32, where the quick start keeps it too."""
    folder = smollm2.CACHE / "SmolLM2-135M-Instruct-float32"
    smollm2.make(folder, "float32")
    return folder
