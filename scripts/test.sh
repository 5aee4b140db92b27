#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The one test command: lint, types, CPU tests, nvcc tests, GPU tests.
#
#   bash scripts/test.sh [TIER ...]     TIER: lint (with the wheel) types cpu nvcc gpu; default: all
#   bash scripts/test.sh format         applies what lint checks
#
# Installs what it needs into a venv first (environment.sh). A tier that this machine cannot run is
# listed with the reason; a tier that ran nothing has failed. Exit code 0: nothing failed and at
# least the CPU tests ran, or the tiers that were asked for.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

SECONDS=0
pat_environment dev || exit 1
echo "environment: $("$PYTHON" --version), $PAT_MODE, ${SECONDS} s"

names=() verdicts=() failed=0
record() { names+=("$1"); verdicts+=("$2"); echo "--- $1: $2"; }

# tier NAME COMMAND...: run it, time it, remember how it ended.
tier() {
  local name=$1 begin=$SECONDS code
  shift
  echo "--- $name"
  "$@" </dev/null
  code=$?
  if [ $code -eq 0 ]; then
    record "$name" "ok, $((SECONDS - begin)) s"
  else
    record "$name" "FAILED with code $code, $((SECONDS - begin)) s"
    failed=1
  fi
}

# absent TIER WHY: this machine cannot run it. A failure if it was asked for by name.
absent() {
  record "$1" "NOT RUN: $2"
  if [ -n "${asked:-}" ]; then failed=1; fi
}

has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# A missing tool is excused only where pip could not reach an index, on a GPU machine.
tool() {
  local name=$1 module=$2
  shift 2
  if has "$module" || [ "$PAT_MODE" != host ]; then tier "$name" "$@"; else absent "$name" "no $module"; fi
}

run_pytest() {
  local limit=$1 markers=$2
  timeout -k 10 "$limit" "$PYTHON" -m pytest tests -q --durations=5 --min-passed=1 -m "$markers"
}

format_csrc() {
  local sources
  mapfile -t sources < <(find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cc')
  [ ${#sources[@]} -gt 0 ] || { echo "no sources under csrc"; return 1; }
  "$(dirname "$PYTHON")/clang-format" "$@" "${sources[@]}"
}

check_csrc() {
  local found
  found=$(format_csrc --dry-run -Werror 2>&1) && return
  grep 'error:' <<<"$found" || echo "$found"
  echo "to apply: bash scripts/test.sh format"
  return 1
}

apply_formats() {
  "$PYTHON" -m ruff check --fix --quiet . ; "$PYTHON" -m ruff format --quiet . && format_csrc -i
}

# The wheel must build, and carry every source the kernels are compiled from.
check_wheel() (
  scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
  git ls-files -z --cached --others --exclude-standard -- pat_sglang csrc pyproject.toml README.md |
    xargs -0 cp --parents -t "$scratch" || exit
  "$PYTHON" -m pip wheel -qq --disable-pip-version-check --no-deps --no-build-isolation \
    -w "$scratch/dist" "$scratch" || exit
  listing=$("$PYTHON" -m zipfile -l "$scratch"/dist/*.whl) || exit
  missing=0
  while read -r source; do
    grep -q "pat_sglang/_csrc/${source#csrc/} " <<<"$listing" || { echo "not in the wheel: $source"; missing=1; }
  done < <(cd "$scratch" && find csrc -type f)
  exit $missing
)

find_cuda_home() {
  local home
  for home in "${CUDA_HOME:-}" /usr/local/cuda "$(dirname "$(dirname "$(command -v nvcc)")")"; do
    if [ -x "$home/bin/nvcc" ] && [ -e "$home/lib64/libcudart.so" ]; then echo "$home"; return; fi
  done
}

asked="$*"
for name in ${asked:-lint types cpu nvcc gpu}; do
  case $name in
    lint)
      tool "ruff check" ruff "$PYTHON" -m ruff check .
      tool "ruff format" ruff "$PYTHON" -m ruff format --check .
      tool "clang-format" clang_format check_csrc
      tier "wheel" check_wheel
      ;;
    format) tier "format" apply_formats ;;
    types) tool "mypy" mypy "$PYTHON" -m mypy pat_sglang ;;
    cpu) tool "CPU tests" hypothesis run_pytest 1200 "not gpu and not nvcc and not slow" ;;
    nvcc)
      CUDA_HOME=$(find_cuda_home)
      if [ -n "$CUDA_HOME" ]; then
        export CUDA_HOME
        tier "nvcc tests" run_pytest 900 "nvcc and not gpu and not slow"
      else
        unset CUDA_HOME
        absent "nvcc tests" "no CUDA toolkit (CUDA_HOME, /usr/local/cuda and PATH were searched)"
      fi
      ;;
    gpu)
      if pat_has_gpu; then
        tier "GPU tests" run_pytest 1200 "gpu and not slow"
      else
        waiting=$("$PYTHON" -m pytest tests --collect-only -q -m "gpu and not slow" 2>&1 | tail -1)
        absent "GPU tests" "nvidia-smi finds no GPU (waiting for one: $waiting)"
      fi
      ;;
    *) echo "unknown tier $name (lint types cpu nvcc gpu format)" >&2; exit 2 ;;
  esac
done

echo
echo "================ scripts/test.sh, ${SECONDS} s ================"
for i in "${!names[@]}"; do printf '%-14s %s\n' "${names[$i]}" "${verdicts[$i]}"; done
if [ $failed -ne 0 ]; then echo "FAILED"; else echo "PASSED"; fi
exit $failed
