#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Serving benchmark: starts servers with `pat` and with other backends and loads them with sglang.bench_serving.
#   bash scripts/bench_serving.sh --model FOLDER --backends pat,fa3,flashinfer,flashinfer-p64
# Options: --help. Uses the Python of $PYTHON, which has SGLang and pat-sglang installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" scripts/bench_serving.py "$@"
