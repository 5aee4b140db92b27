# SPDX-License-Identifier: MIT
"""Builds and loads ``csrc``: a content-addressed cache in front of ``tvm_ffi.cpp.build``.

A module is one folder ``<cache>/<name>-<digest>/`` with one shared object. The name holds the
target; the digest covers the bytes of every source file and the flags, never paths. So a cache made
elsewhere (``python -m pat_sglang build``) works after being carried, also where there is no
compiler, and a hit runs neither compiler nor ninja. A miss takes a file lock, looks again, builds
in a temporary folder and renames it into place: tensor-parallel ranks need no more.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import envs

SUPPORTED_ARCHS = ("8.0", "9.0a", "10.0a")
SUPPORTED_HEAD_DIMS = (64, 128)
SUPPORTED_DTYPES = ("bf16", "fp16")
PATHS = ("sm80", "sm90")  # kernel paths; sm90 needs arch 9.0a

_DEFAULT_CUDA_HOME = "/usr/local/cuda"
_CXX_FLAGS = ("-std=c++20", "-O3", "-Wall", "-Wextra", "-Wno-unused-parameter")
# A shared object's functions may be replaced at load time unless this says that nobody does;
# without it the compiler inlines none of them, and planning takes a third longer.
_HOST_FLAGS = (*_CXX_FLAGS, "-fno-semantic-interposition")
_CUDA_FLAGS = (
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "--use_fast_math",
    "-lineinfo",
    "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage",
)


class BuildError(RuntimeError):
    """A module is not there and cannot be built; the message says what to do."""


@dataclass(frozen=True)
class DeviceModule:
    """What one device module is compiled for."""

    arch: str
    dtype: str
    head_dim: int
    path: str

    def __post_init__(self) -> None:
        for value, known, name in (
            (self.arch, SUPPORTED_ARCHS, "arch"),
            (self.dtype, SUPPORTED_DTYPES, "dtype"),
            (self.head_dim, SUPPORTED_HEAD_DIMS, "head_dim"),
            (self.path, PATHS, "path"),
        ):
            if value not in known:
                raise BuildError(f"{name} {value!r} is not supported; one of {known}")
        if self.path == "sm90" and self.arch != "9.0a":
            raise BuildError(f"path sm90 needs arch 9.0a, not {self.arch}")

    def defines(self) -> tuple[str, ...]:
        """Compile-time answers: the kernels are told, they do not decide."""
        every_lane = self.path == "sm90" and envs.RACECHECK.get()
        return (
            f"-DPAT_DTYPE_{self.dtype.upper()}=1",
            f"-DPAT_HEAD_DIM={self.head_dim}",
            f"-DPAT_PATH_{self.path.upper()}=1",
            *(("-DPAT_EVERY_LANE_ARRIVES=1",) if every_lane else ()),
        )


def device_module(
    arch: str = "9.0a", dtype: str = "bf16", head_dim: int = 128, path: str | None = None
) -> DeviceModule:
    """Specification of a device module; ``path`` defaults to the best one of the arch."""
    return DeviceModule(arch, dtype, head_dim, path or ("sm90" if arch == "9.0a" else "sm80"))


def arch_of_capability(major: int, minor: int) -> str:
    """Target for a GPU's compute capability.

    Raises:
        BuildError: the GPU is not supported.
    """
    arch = {(8, 0): "8.0", (9, 0): "9.0a", (10, 0): "10.0a"}.get((major, minor))
    if arch is None:
        raise BuildError(
            f"compute capability {major}.{minor} is not supported (A100 8.0, H100/H200 9.0, "
            "B200 10.0 are); serve with a plain attention backend"
        )
    return arch


def source_dir() -> Path:
    """Folder of the C++ and CUDA sources: package data of a wheel, or ``csrc`` of a checkout."""
    packaged = Path(__file__).parent / "_csrc"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "csrc"


def cuda_home() -> Path:
    """Toolkit folder: ``CUDA_HOME``, ``/usr/local/cuda`` or nvcc's grandparent, whichever links.

    Raises:
        BuildError: no folder has both ``bin/nvcc`` and ``lib64/libcudart.so``.
    """
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), _DEFAULT_CUDA_HOME]
    candidates += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    for candidate in filter(None, candidates):
        home = Path(candidate)
        if (home / "bin/nvcc").exists() and (home / "lib64/libcudart.so").exists():
            return home
    raise BuildError(
        "no CUDA toolkit found (looked for bin/nvcc and lib64/libcudart.so in CUDA_HOME, "
        f"{_DEFAULT_CUDA_HOME} and beside nvcc): set CUDA_HOME, or carry kernels built with "
        "`python -m pat_sglang build` in PAT_SGLANG_CACHE_DIR"
    )


@functools.cache
def _compiler_version(command: str) -> str:
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"cannot run {command!r}: {error}; install a compiler") from error
    return done.stdout


@dataclass(frozen=True)
class _Kind:
    """What a module is made of: a binding and the sources of one folder, both below ``csrc``."""

    binding: str
    folder: str


_DEVICE = _Kind("binding.cc", "device")
_HOST = _Kind("binding_host.cc", "host")
_STREAM = _Kind("bench/binding_stream.cc", "bench")


def _sources(kind: _Kind) -> list[Path]:
    """Files a module depends on: what is common, and what is not another kind's."""
    others = {k for k in (_DEVICE, _HOST, _STREAM) if k != kind}
    other = {name for k in others for name in (k.binding, k.folder)}
    root = source_dir()
    return sorted(
        p
        for p in root.rglob("*")
        if p.suffix in {".cc", ".cu", ".cuh", ".h"} and p.relative_to(root).parts[0] not in other
    )


def _digest(flags: tuple[str, ...], kind: _Kind) -> str:
    """Key of a module. The compiler is not asked: a machine without one can load a carried cache,
    and its version is recorded beside the module (``compiler.txt``) instead."""
    digest = hashlib.sha256("\0".join((*_CXX_FLAGS, *flags)).encode())
    for path in _sources(kind):
        digest.update(path.relative_to(source_dir()).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _ensure(name: str, kind: _Kind, flags: tuple[str, ...], arch: str | None = None) -> Path:
    """Path of the module's shared object, built if it is not in the cache; ``arch``: needs nvcc."""
    folder = Path(envs.CACHE_DIR.get()) / f"{name}-{_digest(flags, kind)}"
    target = folder / f"{name}.so"
    if target.exists():
        return target
    if envs.DISABLE_JIT.get():
        raise BuildError(
            f"{target} is missing and PAT_SGLANG_DISABLE_JIT=1 forbids building it: unset it, or "
            "carry a cache made from these sources with `python -m pat_sglang build`"
        )
    version = _compiler_version(
        str(cuda_home() / "bin/nvcc") if arch else os.environ.get("CXX", "c++")
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f".{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _fill_cache(target, version, kind, flags, arch)
    except OSError as error:
        raise BuildError(f"cannot write the cache, see PAT_SGLANG_CACHE_DIR: {error}") from error
    return target


def _fill_cache(
    target: Path, version: str, kind: _Kind, flags: tuple[str, ...], arch: str | None
) -> None:
    """Compiles beside ``target``'s folder, then renames into place; the caller holds the lock."""
    folder = target.parent
    with tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=folder.parent) as scratch:
        built = _compile(target.stem, kind, flags, arch, scratch)
        final = Path(scratch, "final")
        final.mkdir()
        shutil.copy2(built, final / target.name)
        (final / "compiler.txt").write_text(version)
        shutil.rmtree(folder, ignore_errors=True)  # debris: it lacks the module
        final.rename(folder)


def _compile(name: str, kind: _Kind, flags: tuple[str, ...], arch: str | None, scratch: str) -> str:
    """The shared object, somewhere in ``scratch``."""
    # tvm-ffi runs `ninja` from PATH, where it is not if a venv's Python was started by its path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if shutil.which("ninja", path=path) is None:
        raise BuildError(f"building {name} needs ninja, which is not on PATH: pip install ninja")
    variables = {"PATH": path}
    if arch is not None:
        variables |= {"TVM_FFI_CUDA_ARCH_LIST": arch, "CUDA_HOME": str(cuda_home())}
    root = source_dir()
    binding, folder = str(root / kind.binding), root / kind.folder
    try:
        from tvm_ffi import cpp

        with _environment(**variables):
            if arch is None:
                return cpp.build(
                    name=name,
                    cpp_files=[binding, *sorted(map(str, folder.glob("*.cc")))],
                    extra_cflags=list(flags),
                    extra_include_paths=[str(root)],
                    build_directory=scratch,
                )
            return cpp.build(
                name=name,
                cpp_files=[binding],
                cuda_files=sorted(map(str, folder.glob("*.cu"))),
                extra_cflags=[f for f in flags if f.startswith("-D")] + list(_CXX_FLAGS),
                extra_cuda_cflags=list(flags),
                extra_include_paths=[str(root), os.path.join(variables["CUDA_HOME"], "include")],
                build_directory=scratch,
            )
    except Exception as error:  # tvm-ffi promises no type
        raise BuildError(f"building {name} failed:\n{error}") from error


def build(
    arch: str = "9.0a", dtype: str = "bf16", head_dim: int = 128, path: str | None = None
) -> Path:
    """Builds (or finds) the kernels of one configuration; needs nvcc, no GPU.

    Args:
        arch: "8.0", "9.0a" or "10.0a".
        dtype: "bf16" or "fp16".
        head_dim: 64 or 128.
        path: "sm80" or "sm90"; default: the best of the arch. "sm80" on 9.0a tests the A100 path.

    Returns:
        The shared object.

    Raises:
        BuildError: unsupported configuration, no compiler, or the compiler failed.
    """
    spec = device_module(arch, dtype, head_dim, path)
    name = f"pat_{spec.path}_{arch.replace('.', '')}_{dtype}_d{head_dim}"
    return _ensure(name, _DEVICE, (*_CUDA_FLAGS, *spec.defines()), arch)


@functools.cache
def load(arch: str, dtype: str, head_dim: int, path: str | None = None) -> Any:
    """The loaded device module of a configuration, see ``build``."""
    return _load(build(arch, dtype, head_dim, path))


@functools.cache
def load_host() -> Any:
    """The loaded C++ planner.

    Raises:
        BuildError: it is not in the cache and there is no C++ compiler, or it does not load.
    """
    return _load(build_host())


def _load(path: Path) -> Any:
    try:
        import tvm_ffi

        return tvm_ffi.load_module(str(path))
    except Exception as error:  # tvm-ffi promises no type
        raise BuildError(f"cannot load {path} ({error}): delete it to build it here") from error


def build_host() -> Path:
    """Builds (or finds) the C++ planner; needs a C++ compiler only."""
    return _ensure("pat_host", _HOST, _HOST_FLAGS)


def build_stream() -> Path:
    """Builds (or finds) the kernels that only move bytes, for Hopper; benchmarks alone use them."""
    return _ensure("pat_stream_90a", _STREAM, _CUDA_FLAGS, "9.0a")


@functools.cache
def load_stream() -> Any:
    """The loaded stream kernels: what ``csrc/bench/binding_stream.cc`` exports."""
    return _load(build_stream())
