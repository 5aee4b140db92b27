# SPDX-License-Identifier: MIT
"""The cache in front of the compiler, on a module of one line."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pat_sglang import jit

ROOT = Path(__file__).resolve().parents[1]
MODULE = """
#include <tvm/ffi/function.h>
TVM_FFI_DLL_EXPORT_TYPED_FUNC(answer, []() { return 42; });
"""
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and nothing else set that jit reads."""
    for name in ("PAT_SGLANG_DISABLE_JIT", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PAT_SGLANG_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of a host module that compiles in two seconds."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "binding_host.cc").write_text(MODULE)
    monkeypatch.setattr(jit, "source_dir", lambda: folder)
    return folder


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one line a compilation; the compiler works whatever PATH is."""
    log = tmp_path / "compilations"
    log.touch()
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) echo "$*" >> {shlex.quote(str(log))};; esac\n'
        f'PATH={shlex.quote(os.environ["PATH"])} exec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return log


def wanted(monkeypatch: pytest.MonkeyPatch, device: bool = True, path: str | None = None) -> str:
    """Folder name of the module that the sources ask for, by the message of a miss."""
    with monkeypatch.context() as patch:
        patch.setenv("PAT_SGLANG_DISABLE_JIT", "1")
        with pytest.raises(jit.BuildError) as error:
            jit.build(path=path) if device else jit.build_host()
    return Path(str(error.value).split(" is missing")[0]).parent.name


def test_digest_follows_bytes_and_flags_not_paths(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = jit.source_dir()
    copy = tmp_path / "elsewhere" / "csrc"
    shutil.copytree(original, copy)
    monkeypatch.setattr(jit, "source_dir", lambda: copy)
    device, host = wanted(monkeypatch), wanted(monkeypatch, device=False)
    again = tmp_path / "again"
    copy.rename(again)
    monkeypatch.setattr(jit, "source_dir", lambda: again)
    assert (wanted(monkeypatch), wanted(monkeypatch, device=False)) == (device, host)

    def edit(name: str) -> tuple[bool, bool]:
        """Whether a byte more in the file changes the device's and the host's module."""
        file = again / name
        before = file.read_bytes()
        file.write_bytes(before + b"\n")
        changed = (wanted(monkeypatch) != device, wanted(monkeypatch, device=False) != host)
        file.write_bytes(before)
        return changed

    for kernel in sorted((again / "device").glob("*")):
        assert edit(f"device/{kernel.name}") == (True, False)
    for code in sorted((again / "host").glob("*")):
        assert edit(f"host/{code.name}") == (False, True)
    for code in sorted((again / "bench").glob("*")):
        assert edit(f"bench/{code.name}") == (False, False)
    assert edit("binding.cc") == (True, False)
    assert edit("binding_host.cc") == (False, True)
    assert edit("plan_layout.h") == (True, True)
    assert (wanted(monkeypatch), wanted(monkeypatch, device=False)) == (device, host)

    monkeypatch.setattr(jit, "_CUDA_FLAGS", (*jit._CUDA_FLAGS, "-DMORE"))
    assert wanted(monkeypatch) != device


def test_kernels_for_racecheck_do_not_take_the_place_of_those_that_serve(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper, ampere = wanted(monkeypatch), wanted(monkeypatch, path="sm80")
    monkeypatch.setenv("PAT_SGLANG_RACECHECK", "1")
    assert wanted(monkeypatch) != hopper
    assert wanted(monkeypatch, path="sm80") == ampere  # it has no mbarriers


def test_a_forbidden_miss_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAT_SGLANG_DISABLE_JIT", "1")
    with pytest.raises(jit.BuildError, match=r"DISABLE_JIT=1.*`python -m pat_sglang build`"):
        jit.build()
    assert not cache.exists()


def test_no_toolkit_names_cuda_home(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = str(tmp_path / "nowhere")
    monkeypatch.setenv("PATH", nowhere)
    monkeypatch.setenv("CUDA_HOME", nowhere)
    monkeypatch.setattr(jit, "_DEFAULT_CUDA_HOME", nowhere)
    with pytest.raises(jit.BuildError, match="set CUDA_HOME, or carry kernels"):
        jit.build()


def test_toolkit_without_runtime_library_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from pip's nvcc wheels, which compile and do not link."""
    partial, whole = tmp_path / "partial", tmp_path / "whole"
    for home in (partial, whole):
        (home / "bin").mkdir(parents=True)
        (home / "bin/nvcc").touch()
    (whole / "lib64").mkdir()
    (whole / "lib64/libcudart.so").touch()
    monkeypatch.setenv("CUDA_HOME", str(partial))
    monkeypatch.setattr(jit, "_DEFAULT_CUDA_HOME", str(whole))
    assert jit.cuda_home() == whole


def test_no_compiler_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(jit.BuildError, match=r"cannot run '/nowhere/c\+\+'.*install a compiler"):
        jit.build_host()


@needs_compiler
def test_ninja_is_looked_for_beside_python(
    cache: Path,
    sources: Path,
    compilations: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server started by its path, /venv/bin/python, has no /venv/bin on PATH."""
    venv = Path(sys.executable).parent
    ninja = shutil.which("ninja", path=os.pathsep.join([str(venv), os.environ["PATH"]]))
    assert ninja is not None, "pip install ninja"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(jit.BuildError, match="pip install ninja"):
        jit.build_host()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ninja").symlink_to(ninja)
    assert jit.build_host().exists()
    assert os.environ["PATH"] == str(tmp_path / "nowhere")  # as it was


@needs_compiler
def test_a_hit_needs_no_compiler_and_a_cache_can_be_carried(
    cache: Path,
    sources: Path,
    compilations: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = jit.build_host()
    assert len(compilations.read_text().splitlines()) == 1
    assert (first.parent / "compiler.txt").read_text().strip()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PATH", "/nowhere")
    assert jit.build_host() == first
    carried = tmp_path / "carried"
    cache.rename(carried)
    monkeypatch.setenv("PAT_SGLANG_CACHE_DIR", str(carried))
    monkeypatch.setenv("PAT_SGLANG_DISABLE_JIT", "1")
    assert jit.load_host.__wrapped__().answer() == 42
    assert len(compilations.read_text().splitlines()) == 1


@needs_compiler
def test_processes_that_build_at_once_compile_once(
    cache: Path, sources: Path, compilations: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from pat_sglang import jit\n"
        f"jit.source_dir = lambda: Path({str(sources)!r})\n"
        "print(jit.build_host(), jit.load_host().answer())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # stand-ins: slow
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(answers)) == 1 and answers[0].endswith("pat_host.so 42\n")
    assert len(compilations.read_text().splitlines()) == 1
    visible = [p for p in cache.iterdir() if not p.name.endswith(".lock")]
    assert [p.parent for p in cache.rglob("*.so")] == visible  # one module, no scratch folder


@needs_compiler
def test_a_failed_build_shows_the_compiler_and_leaves_nothing(cache: Path, sources: Path) -> None:
    (sources / "binding_host.cc").write_text("#error the reason\n")
    with pytest.raises(jit.BuildError, match=r"(?s)building pat_host failed.*the reason"):
        jit.build_host()
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


@needs_compiler
def test_a_folder_without_its_module_is_built_again(
    cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    debris = cache / wanted(monkeypatch, device=False)
    debris.mkdir(parents=True)
    (debris / "compiler.txt").touch()
    assert jit.build_host().parent == debris


def test_a_module_that_does_not_load_is_a_build_error(
    cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache / wanted(monkeypatch, device=False)
    folder.mkdir(parents=True)
    (folder / "pat_host.so").write_text("not a library")
    with pytest.raises(jit.BuildError, match=f"cannot load {re.escape(str(folder))}.*delete it"):
        jit.load_host.__wrapped__()


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PAT_SGLANG_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(jit.BuildError, match=r"PAT_SGLANG_CACHE_DIR: .*Not a directory"):
        jit.build_host()


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"arch": "7.5"}, "arch '7.5' is not supported"),
        ({"dtype": "fp8"}, "dtype 'fp8' is not supported"),
        ({"head_dim": 96}, "head_dim 96 is not supported"),
        ({"path": "sm70"}, "path 'sm70' is not supported"),
        ({"arch": "8.0", "path": "sm90"}, "path sm90 needs arch 9.0a, not 8.0"),
    ],
)
def test_unsupported_configurations_are_named(
    cache: Path, configuration: dict[str, object], message: str
) -> None:
    with pytest.raises(jit.BuildError, match=re.escape(message)):
        jit.build(**configuration)


def test_gpus_have_their_target_or_a_message() -> None:
    found = {jit.arch_of_capability(*c) for c in ((8, 0), (9, 0), (10, 0))}
    assert found == set(jit.SUPPORTED_ARCHS)
    for capability in ((7, 5), (8, 6), (8, 9), (12, 0)):
        with pytest.raises(jit.BuildError, match=r"compute capability {}\.{} ".format(*capability)):
            jit.arch_of_capability(*capability)
