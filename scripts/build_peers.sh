#!/usr/bin/env bash
# Builds the FlashInfer modules that the benchmarks and the serving check need, for Hopper, on a machine without a GPU.
#
#   build_peers.sh [DEST]      DEST: .carry/flashinfer_aot; finished modules are kept, so a second call only fills gaps
#
# Needs nvcc (CUDA_HOME), ninja, a Python with torch, jinja2 and apache-tvm-ffi (PYTHON), and an unpacked
# flashinfer-python wheel (FLASHINFER_ROOT). Only flashinfer's generators are imported, so nothing else of it has to be
# installed. On the GPU host scripts/peers.py points flashinfer.jit.env.FLASHINFER_AOT_DIR at DEST.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
dest=${1:-$repo/.carry/flashinfer_aot}
python=${PYTHON:-/root/venv/bin/python}
export FLASHINFER_ROOT=${FLASHINFER_ROOT:-$HOME/.cache/gpu-bundle/site/flashinfer}
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$HOME/.cache/gpu-bundle/flashinfer-build}
export FLASHINFER_CUDA_ARCH_LIST=9.0a MAX_JOBS=${MAX_JOBS:-1}
mkdir -p "$dest" "$FLASHINFER_WORKSPACE_BASE"
# The modules name libcuda.so.1 as a dependency; without a driver an empty library of that name satisfies the linker.
if ! [ -e "$CUDA_HOME/lib64/stubs/libcuda.so" ]; then
  cc -shared -Wl,-soname,libcuda.so.1 -o "$FLASHINFER_WORKSPACE_BASE/libcuda.so" -x c /dev/null
  export LIBRARY_PATH=$FLASHINFER_WORKSPACE_BASE
fi
# The tvm-ffi of that Python decides the ABI the modules are compiled against; it is the one SGLang 0.5.17 pins.
PATH=$(dirname "$python"):$CUDA_HOME/bin:$PATH DEST=$dest nice -n 19 "$python" - <<'P'
import os
import shutil
import sys
import time
import types
from pathlib import Path

package = types.ModuleType("flashinfer")  # only the jit generators: the package itself wants a CUDA driver
package.__path__ = [os.environ["FLASHINFER_ROOT"]]
sys.modules["flashinfer"] = package

import torch
from flashinfer.jit.attention.modules import gen_batch_decode_module, gen_batch_prefill_module
from flashinfer.jit.cascade import gen_cascade_module
from flashinfer.jit.xqa import gen_xqa_module

bf16, index = torch.bfloat16, torch.int32
plain = (0, False, False)  # no positional encoding, no sliding window, no logit cap


def prefill(backend: str, head_dim: int):
    return gen_batch_prefill_module(backend, bf16, bf16, bf16, index, head_dim, head_dim, *plain, False)


specs = [
    prefill("fa2", 128),  # tensor-core decode and every cascade level of bench_decode
    gen_cascade_module(),  # merging of states: cascade levels, and SGLang's prefill with a cached prefix
    # SmolLM2 (head dim 64, group 3) on SGLang's flashinfer backend: decode, and prefill through pages.
    # Its ragged prefill would want the fa3 template; SGLANG_FLASHINFER_USE_PAGED=1 does without.
    gen_batch_decode_module(bf16, bf16, bf16, index, 64, 64, *plain),
    prefill("fa2", 64),
    # XQA of bench_decode: page 64, head dim 128, one module a group size.
    *(gen_xqa_module(bf16, bf16, 64, 128, group, False, bf16) for group in (1, 2, 4, 8)),
]
for spec in specs:
    target = Path(os.environ["DEST"]) / spec.name / f"{spec.name}.so"
    if target.exists():
        continue
    start = time.time()
    spec.build(verbose=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(spec.jit_library_path, target.with_suffix(".tmp"))
    os.replace(target.with_suffix(".tmp"), target)
    print(f"{spec.name}: {time.time() - start:.0f} s, {target.stat().st_size / 1e6:.1f} MB", flush=True)
P
du -sh "$dest"
