# SPDX-License-Identifier: MIT
"""Two ranks on the CPU, each for half of the heads or of the requests, answer as the base does.

The model is small and random: SmolLM2's 9 query heads do not divide by 2. Attention matters in it:
weights have the scale of trained ones, and prompts that end alike are answered differently.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from serving import (
    CHECKED,
    STOOD_IN,
    Answer,
    ask,
    assert_equal,
    assert_nothing_declined,
    server,
    states_of,
)

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 256, 512, 2, 4, 2, 64, 49152
TWO_RANKS = ("--tp", "2", "--max-total-tokens", "4096")
DATA_PARALLEL = ("--dp", "2", "--enable-dp-attention")
BOUND = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}  # one core a rank

SYSTEM = "The tower was built of grey granite, and its lamp was fed with whale oil. " * 4
PROMPTS = [
    *(f"{SYSTEM}About the lamp. {question}" for question in ("Why?", "When?", "Who did it?")),
    *(f"{SYSTEM}About the stairs. {question}" for question in ("Why?", "When?")),
    "The sea is",
]


@pytest.fixture(scope="module")
def random_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, folder / name)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "torch_dtype": "float32", "attention_bias": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(3)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) / columns**0.5

    weights = {
        "model.embed_tokens.weight": weight(VOCABULARY, HIDDEN),
        "lm_head.weight": 8 * weight(VOCABULARY, HIDDEN),
    }
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    for layer in range(LAYERS):
        of_layer = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{of_layer}.{name}.weight"] = torch.ones(HIDDEN)
        for name in ("q", "k"):
            weights[f"{of_layer}.self_attn.{name}_norm.weight"] = torch.ones(HEAD_DIM)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"{of_layer}.self_attn.{name}_proj.weight"] = weight(heads * HEAD_DIM, HIDDEN)
        weights[f"{of_layer}.self_attn.o_proj.weight"] = 4 * weight(HIDDEN, HEADS * HEAD_DIM)
        for name in ("gate", "up"):
            weights[f"{of_layer}.mlp.{name}_proj.weight"] = weight(INTERMEDIATE, HIDDEN)
        weights[f"{of_layer}.mlp.down_proj.weight"] = weight(HIDDEN, INTERMEDIATE)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def serve(url: str) -> list[Answer]:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        numbers = range(len(PROMPTS))
        return list(pool.map(lambda i: ask(url, PROMPTS[i], 12 + 3 * i, f"r{i}"), numbers))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="SGLang binds each CPU rank to a core")
@pytest.mark.parametrize("dp", [False, True], ids=["tensor parallel", "DP attention"])
def test_two_ranks_answer_as_the_base_does(random_model: Path, tmp_path: Path, dp: bool) -> None:
    """DP attention: ranks pad to one size, and one of them runs out of requests first."""
    log = tmp_path / "pat.log"
    options = (*TWO_RANKS, *(DATA_PARALLEL if dp else ()), "--attention-backend")
    environment = {**BOUND, **STOOD_IN}
    with server(
        tmp_path / "base.log", random_model, *options, "torch_native", **environment
    ) as url:
        expected = serve(url)
    with server(log, random_model, *options, "pat", **environment, **CHECKED) as url:
        answers = serve(url)
        states = [state["pat"] for state in states_of(url)]

    assert_equal(answers, expected)
    assert len({round(answer.logprobs[0], 3) for answer in expected}) == len(PROMPTS)
    assert len(states) == (2 if dp else 1)  # of tensor-parallel ranks the first one answers
    for pat in states:
        assert pat["shared_segments"] > 0 and pat["planned_kv_tokens"] < pat["unshared_kv_tokens"]
        assert_nothing_declined(pat)
    banners = [line for line in log.read_text().splitlines() if "decode attention by PAT" in line]
    heads = f"{HEADS}/{KV_HEADS} heads" if dp else f"{HEADS // 2}/{KV_HEADS // 2} heads"
    assert len(banners) == 2 and all(heads in banner for banner in banners)
