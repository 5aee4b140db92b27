# SPDX-License-Identifier: MIT
# Source this before any SGLang process on a machine without a GPU.
_pat_stubs=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/stubs
export PYTHONPATH="$_pat_stubs${PYTHONPATH:+:$PYTHONPATH}"
export SGLANG_USE_CPU_ENGINE=1  # otherwise SGLang's non-CUDA path imports vllm
export OMP_NUM_THREADS=1        # 2 threads on a shared 2-core machine wait at barriers: 10x slower
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1  # a local model folder is all that is read
unset _pat_stubs
