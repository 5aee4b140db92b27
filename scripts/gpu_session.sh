#!/usr/bin/env bash
# The GPU scripts on a lent machine that has torch, nvcc and nothing of ours, and no network.
#
# Here, before (needs no GPU; again after every change of csrc/):
#   bash scripts/gpu_session.sh local        fills .carry/: PAT's kernels, streams, FlashInfer's modules, tvm-ffi, the commit
#                                            (PAT_PATHS="sm90 sm80": the A100 kernels for this GPU too; "racecheck": those
#                                            that `sanitize` takes for that tool)
#   bash ../shared/gpu/make_bundle.sh .gpu-bundle          SGLang and the model in parts of 58 MiB
#
# There, one `run` after the other without a pause (the machine is given back after 30 idle seconds;
# a call carries 64 MiB, and what was carried earlier is kept by `part`):
#   1. kernels alone need no bundle: one call
#        carry [".carry"]                           bash scripts/gpu_session.sh kernels --budget-s 200
#        carry [".carry"]                           bash scripts/gpu_session.sh tests
#        carry [".carry"]                           bash scripts/gpu_session.sh repeat --budget-s 60
#        carry [".carry"]                           bash scripts/gpu_session.sh sanitize
#      likewise floor (before bench, which reads results/floor-<gpu>.jsonl: copy it back first, or run both in one call),
#      regret and ablation
#   2. peers and servers need the site parts
#        carry [".gpu-bundle/site.00"]              bash scripts/gpu_session.sh part      (01 to 04 likewise)
#        carry [".carry", ".gpu-bundle/site.05", ".gpu-bundle/unpack_bundle.sh",
#               ".gpu-bundle/zstandard-0.25.0-cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"]
#                                                   bash scripts/gpu_session.sh unpack
#        carry [".carry"]                           bash scripts/gpu_session.sh bench --budget-s 300
#      likewise host (what a step costs outside the layers)
#        carry [".carry"]                           bash scripts/gpu_session.sh load --backends pat,fa3
#      load leaves $OUT/jit-cache.tgz.*, what SGLang compiled, unless it came along; in .carry/ (cat jit-cache.tgz.* >
#      jit-cache.tgz) it saves the next machine 90 s of a first start. A call may last 10 minutes; a longer load outlives it:
#        carry [".carry"]                           bash scripts/gpu_session.sh background load --backends pat,fa3
#                                                   bash scripts/gpu_session.sh poll 570      (again and again: it waits for the
#      end, brings the rows so far, and fails at once on a machine that has no such load)
#   3. the model: model.00 and model.01 as parts (with `part`), then
#        carry [".carry"]                           bash scripts/gpu_session.sh unpack
#        carry [".carry"]                           bash scripts/gpu_session.sh serving
#                                                   bash scripts/gpu_session.sh features   (likewise)
#
# Seconds it took on H100 hosts: parts 35 together, kernels 17, repeat 5 more than its budget, sanitize 8 with synccheck alone
# and 60 for one of its four configurations with racecheck, bench --suite all 90 with all peers, regret 20, ablation 10, host 45.
#
# Whatever follows a subcommand goes to its Python script. Results land in results/ there and in $OUT,
# which comes back: copy them to results/ here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repo=$PWD
gpu=${PAT_GPU_HOME:-/root/gpu}
parts=$gpu/parts
away=/tmp/pat-background

local_() {
  local python=${PYTHON:-/root/venv/bin/python} wheels=${BUNDLE_WORK:-$HOME/.cache/gpu-bundle}/wheels
  mkdir -p .carry
  cp "${PAT_TRACES:-../shared/traces}"/mooncake_conversation_trace.jsonl .carry/
  git rev-parse --short=12 HEAD > .carry/commit
  mkdir -p .carry/tokenizer
  cp "${PAT_TOKENIZER:-$HOME/.cache/pat_sglang/models/SmolLM2-135M-Instruct-float32}"/tokenizer*.json .carry/tokenizer/
  rm -rf .carry/site
  "$python" -m zipfile -e "$wheels"/apache_tvm_ffi-*.whl .carry/site
  CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} PAT_SGLANG_CACHE_DIR=$repo/.carry/jit nice "$python" - <<'P'
import os
import shutil
import time

from pat_sglang import jit

keep = {jit.build_host().parent, jit.build_stream().parent}
for path in os.environ.get("PAT_PATHS", "sm90").split():
    os.environ["PAT_SGLANG_RACECHECK"] = str(int(path == "racecheck"))
    for dtype in jit.SUPPORTED_DTYPES:
        for head_dim in jit.SUPPORTED_HEAD_DIMS:
            begin = time.time()
            of = "sm90" if path == "racecheck" else path
            keep.add(jit.build("9.0a", dtype, head_dim, of).parent)
            print(f"9.0a {dtype} d{head_dim} {path}: {time.time() - begin:.0f} s", flush=True)
for built in keep:  # the same kernels of earlier sources are not carried
    for folder in built.parent.glob(f"{built.name.rpartition('-')[0]}-*"):
        if folder not in keep:
            shutil.rmtree(folder)
P
  PYTHON=$python bash scripts/build_peers.sh .carry/flashinfer_aot
  du -sh .carry
}

# Parts of the bundle survive here; the folder they are carried in is replaced by the next call.
part() {
  mkdir -p "$parts"
  [ -d .gpu-bundle ] && find .gpu-bundle -maxdepth 1 -type f -exec cp -u -t "$parts" {} +
  ls -la "$parts"
}

unpack() {
  part >/dev/null
  meta
  local have
  have=$(ls "$parts")
  if [[ $have == *model.01* ]]; then
    bash "$parts/unpack_bundle.sh" "$parts" "$gpu"
  else # site alone: an empty model file would be made into a broken folder
    mkdir -p "$gpu/smollm2" && touch "$gpu/smollm2/model.safetensors"
    bash "$parts/unpack_bundle.sh" "$parts" "$gpu"
    rm -r "$gpu/smollm2"
  fi
  if [ -e .carry/jit-cache.tgz ]; then tar -C "$HOME" -xzf .carry/jit-cache.tgz; fi
  du -sh "$gpu"/*
}

# Package metadata: with it on PYTHONPATH, SGLang finds the entry point `pat` without an installation;
# and FlashInfer takes the carried modules for those of its own flashinfer-jit-cache package.
meta() {
  mkdir -p "$gpu/meta/flashinfer_jit_cache"
  cat > "$gpu/meta/flashinfer_jit_cache/__init__.py" <<P
__version__ = "0.6.15.post1"


def get_jit_cache_dir() -> str:
    return "$repo/.carry/flashinfer_aot"
P
  python3 - "$gpu/plugin" <<'P'
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
folder = Path(sys.argv[1]) / f"pat_sglang-{project['version']}.dist-info"
folder.mkdir(parents=True, exist_ok=True)
head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
(folder / "METADATA").write_text(head)
lines = []
for group, entries in project["entry-points"].items():
    lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
(folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
P
}

environment() {
  meta
  local site=$gpu/site
  [ -e "$site/.done" ] || site=$repo/.carry/site
  export PYTHONPATH=$repo:$gpu/meta:$site PYTHONUNBUFFERED=1
  export PAT_PLUGIN_META=$gpu/plugin PAT_SGLANG_CACHE_DIR=$repo/.carry/jit
  export PAT_COMMIT=${PAT_COMMIT:-$(cat .carry/commit 2>/dev/null || echo unknown)}
  log=${OUT:-/tmp}/${1}.log
}

tests() {
  environment tests
  python3 -m pytest -q -p no:cacheprovider "${@:-tests/gpu}" 2>&1 | tee "$log"
}

kernels() {
  environment kernels
  python3 scripts/gpu_kernel_check.py "$@" 2>&1 | tee "$log"
}

repeat() {
  environment repeat
  python3 scripts/gpu_repeat_check.py "$@" 2>&1 | tee "$log"
}

# Memory of its own for every tensor, so that an access beyond one is seen; only PAT's kernels are
# instrumented, torch's would take minutes.
sanitize() {
  environment sanitize
  local tool status=0
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in ${PAT_SANITIZERS:-memcheck racecheck synccheck}; do
    echo "== $tool"
    PAT_SGLANG_RACECHECK=$([ "$tool" = racecheck ] && echo 1 || echo 0) \
      timeout "${PAT_SANITIZE_S:-300}" compute-sanitizer --tool "$tool" --kernel-name kns=pat --error-exitcode 9 \
      --print-limit 20 python3 scripts/gpu_kernel_check.py --sanitize "$@" 2>&1 | tee -a "$log" || status=$?
  done
  return $status
}

bench() {
  environment bench
  python3 scripts/bench_decode.py "$@" 2>&1 | tee "$log"
}

# Scripts with no peer and no server: the streams that are the floor, plans other than the chosen, and
# the host's time of a step (which needs SGLang's prefix tree).
alone() {
  environment "$1"
  python3 "scripts/bench_$1.py" "${@:2}" 2>&1 | tee "$log"
}

serving() {
  environment serving
  python3 scripts/gpu_serving_check.py --model "$gpu/smollm2" "$@" 2>&1 | tee "$log"
}

features() {
  environment features
  python3 scripts/gpu_features_check.py --model "$gpu/smollm2" "$@" 2>&1 | tee "$log"
}

load() {
  environment load
  export SGLANG_FLASHINFER_USE_PAGED=1  # there is no fa3 module of FlashInfer here, see build_peers.sh
  local status=0
  python3 scripts/bench_serving.py --tokenizer .carry/tokenizer --trace .carry/mooncake_conversation_trace.jsonl \
    "$@" 2>&1 | tee "$log" || status=$?
  jit_cache
  return $status
}

# In pieces: a file that comes back has 16 MiB at most.
jit_cache() {
  [ -e .carry/jit-cache.tgz ] && return
  (cd "$HOME" && ls -d .cache/tvm-ffi .cache/flashinfer .cache/sglang .triton 2>/dev/null) |
    tar -C "$HOME" -cz -T - | split -b 15m - "${OUT:-/tmp}/jit-cache.tgz." || true
}

# A subcommand in a copy of the tree, which the next call would replace, and a process group of its own.
background() {
  if [ -d "$away/out" ] && [ ! -e "$away/out/ended" ]; then
    echo "the last one has not ended: poll" >&2
    exit 1
  fi
  rm -rf "$away"
  mkdir -p "$away/out"
  cp -r pat_sglang csrc scripts results tests pyproject.toml README.md .carry "$away/"
  cd "$away"
  OUT=$away/out setsid bash -c 'bash scripts/gpu_session.sh "$@" > out/console 2>&1; echo "ended with $?" > out/ended' \
    _ "$@" < /dev/null > /dev/null 2>&1 &
}

poll() {
  [ -d "$away/out" ] || { echo "nothing was started on this machine" >&2; exit 1; }
  local end=$((SECONDS + $1)) over=no
  while [ $over = no ]; do
    sleep 1
    if [ $SECONDS -ge $end ] || [ -e "$away/out/ended" ]; then over=yes; fi
    # Every time: where device time ends before this does, what is in $OUT comes back all the same.
    find "$away/results" -newer "$away/pyproject.toml" -type f -exec cp -t "${OUT:-/tmp}" {} +
  done
  { grep -v -i warn "$away/out/console" || true; } | tail -n "${2:-60}"
  if [ ! -e "$away/out/ended" ]; then
    jit_cache
    return
  fi
  find "$away/out" -name 'jit-cache*' -exec cp -t "${OUT:-/tmp}" {} +
  cat "$away/out/ended"
  grep -q 'with 0$' "$away/out/ended"
}

command=${1:?local, part, unpack, tests, kernels, repeat, sanitize, floor, regret, ablation, host, bench, serving, features, load, background or poll}
shift
case $command in
  local) local_ ;;
  floor | regret | ablation | host) alone "$command" "$@" ;;
  part | unpack | tests | kernels | repeat | sanitize | bench | serving | features | load | background | poll) "$command" "$@" ;;
  *) echo "unknown subcommand $command" >&2; exit 2 ;;
esac
