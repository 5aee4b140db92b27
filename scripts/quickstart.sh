#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# From a fresh clone to a verdict: environment, SGLang, SmolLM2-135M-Instruct, a server with
# `--attention-backend pat`, 16 requests that share a system prompt, and the same on the base backend.
#
#   bash scripts/quickstart.sh [--new-tokens N] [--model FOLDER] [--keep-logs]
#
# Runs on the GPU if there is one, else on the CPU. Exit code 0 means PASS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
pat_environment
if pat_has_gpu; then device=cuda; else device=cpu; fi
exec "$PYTHON" scripts/quickstart.py --device $device "$@"
