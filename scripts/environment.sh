# SPDX-License-Identifier: MIT
# Sourced by test.sh and quickstart.sh from the repository root: the Python environment they share.
#
#   pat_environment DEV   makes or reuses it and sets PYTHON and PAT_MODE; DEV=dev adds test tools
#
# PAT_MODE   cpu   no GPU: CPU torch and just enough of SGLang's dependencies (1.6 GB, not 9)
#            host  GPU, and the active python3 has torch and sglang: they are used as they are,
#                  from a venv on top of them, so nothing is installed into the serving stack
#            gpu   GPU, nothing there: SGLang with all it wants
# PAT_VENV   the venv's folder (default .venv)

SGLANG_VERSION=0.5.17

pat_has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

pat_pip() { "$PYTHON" -m pip install -qq --disable-pip-version-check "$@" </dev/null; }

pat_environment() {
  local dev=${1:-} venv=${PAT_VENV:-.venv} extra="" stamp
  PAT_MODE=cpu
  if pat_has_gpu; then
    PAT_MODE=gpu
    python3 -c 'import importlib.util as u, sys, torch
sys.exit(not (torch.cuda.is_available() and u.find_spec("sglang")))' 2>/dev/null && PAT_MODE=host
  fi
  # Before the venv: torch of a GPU machine must not be hidden by the CPU stand-ins, or reverse.
  [ -x "$venv/bin/python" ] || pat_create_venv "$venv"
  PYTHON=$(cd "$venv" && pwd)/bin/python
  [ "$dev" = dev ] && extra="[dev]"

  stamp=$(cat pyproject.toml scripts/environment.sh scripts/cpu/requirements*.txt; echo "$PWD $PAT_MODE")
  stamp=$(printf %s "$stamp" | sha256sum | cut -c1-16)
  if [ ! -e "$venv/.pat-$stamp$extra" ] && [ ! -e "$venv/.pat-$stamp[dev]" ]; then
    echo "installing into $venv ($PAT_MODE) ..."
    "pat_install_$PAT_MODE" "$extra" || { echo "error: the installation into $venv failed" >&2; return 1; }
    touch "$venv/.pat-$stamp$extra"
  fi
  if [ "$PAT_MODE" = cpu ]; then . scripts/cpu/env.sh; fi
  export PATH="$(dirname "$PYTHON"):$PATH"  # ninja, for those who call it by name
}

pat_create_venv() {
  if [ "$PAT_MODE" != host ]; then python3 -m venv "$1"; return; fi
  # --system-site-packages sees the interpreter's packages, not those of a venv that is active now.
  python3 -m venv --system-site-packages "$1"
  python3 -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
    >"$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/host.pth"
}

pat_install_cpu() {
  local cpu=scripts/cpu
  # First what pip is configured for (a mirror, a wheel folder), then PyTorch's index; never CUDA.
  pat_pip -r $cpu/requirements-torch.txt 2>/dev/null ||
    pat_pip -r $cpu/requirements-torch.txt --index-url https://download.pytorch.org/whl/cpu
  pat_pip 'setuptools>=64' wheel &&
    pat_pip --no-build-isolation -r $cpu/requirements.txt -e ".$1" &&
    pat_pip --no-deps -r $cpu/requirements-nodeps.txt
}

pat_install_gpu() {
  pat_pip "sglang==$SGLANG_VERSION" gguf setuptools wheel && pat_pip --no-build-isolation -e ".$1"
}

pat_install_host() {
  # The package alone first: a machine without internet can still run the GPU tier. Building in
  # isolation needs an index; not doing so needs a setuptools that is not too old.
  local how=--no-build-isolation
  if ! pat_pip $how --no-deps -e . 2>/dev/null; then how=""; pat_pip --no-deps -e . || return; fi
  pat_pip $how -e ".$1" gguf ||
    echo "warning: pip could not install all tools; tiers that need one will say so" >&2
}
