# SPDX-License-Identifier: MIT
"""Model folders with the shapes of well-known models and no weights (``--load-format dummy``)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

# The numbers of the published config.json files. Llama has the context of 3.1, so that no trace is
# cut; its weights are those of 3.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "num_hidden_layers": 36,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "vocab_size": 151936,
    },
    "llama3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_hidden_layers": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "vocab_size": 128256,
    },
}


def make(shape: str, tokenizer: Path, folder: Path) -> Path:
    """A folder that SGLang serves as a model of that shape, with the tokenizer of another model.

    The vocabulary is filled up with words that no text is encoded to: random weights generate any
    id, and a request whose tokens print nothing would show no time to its first one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)
    words = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    size = SHAPES[shape]["vocab_size"]
    vocabulary |= {f"<{number}>": number for number in range(len(vocabulary), size)}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    (folder / "config.json").write_text(json.dumps(_COMMON | SHAPES[shape], indent=1) + "\n")
    return folder
