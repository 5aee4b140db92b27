# SPDX-License-Identifier: MIT
"""Who may import and include whom. Reads the sources; compiles and loads nothing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pat_sglang"
CSRC = ROOT / "csrc"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cuh", ".cu", ".cc"})

# A module may import those of the lines above its own; plugin/ and __main__ come after all.
LAYERS = (
    {"_types", "cost", "envs", "metrics", "reference"},
    {"forest", "jit", "saved_cost"},
    {"packing"},
    {"layout"},
    {"host", "transfer"},
    {"plan"},
    {"cpu"},
    {"decode"},
    {"calibrate"},
)
# Planning needs no torch: it runs, and is tested, on arrays.
WITHOUT_TORCH = {
    "__init__",
    "cost",
    "envs",
    "forest",
    "host",
    "jit",
    "layout",
    "packing",
    "saved_cost",
}


class Import(NamedTuple):
    name: str  # absolute
    line: int
    lazy: bool  # inside a function


def imports_of(path: Path) -> Iterator[Import]:
    """Every module that ``path`` imports, also in functions; not those for type checkers only."""
    package = ["pat_sglang", *path.relative_to(PACKAGE).parent.parts]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            prefix = [*base, *filter(None, [node.module])]
            # `from . import jit` imports a module, `from .jit import build` a name of it.
            yield from (
                Import(".".join([*prefix, alias.name]), node.lineno, lazy) for alias in node.names
            )
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    return visit(ast.parse(path.read_text(encoding="utf-8")), False)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def offenders(package: str, allowed: set[Path], lazily: set[Path] = frozenset()) -> list[str]:
    """Imports of ``package`` in modules outside ``allowed``, or at the top of one in ``lazily``."""
    return [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.name}"
        for path in MODULES
        if path not in allowed
        for found in imports_of(path)
        if within(found.name, package) and not (path in lazily and found.lazy)
    ]


PLUGIN = set((PACKAGE / "plugin").rglob("*.py"))
MAIN = {PACKAGE / "__main__.py"}


def test_the_reader_of_imports_finds_them() -> None:
    found = {name for name, _, _ in imports_of(PACKAGE / "jit.py")}
    assert {"pathlib.Path", "pat_sglang.envs", "tvm_ffi"} <= found
    assert PLUGIN and SOURCES


def test_only_the_plugin_imports_sglang() -> None:
    assert not offenders("sglang", PLUGIN, lazily=MAIN)


def test_nothing_below_the_plugin_imports_it() -> None:
    assert not offenders("pat_sglang.plugin", PLUGIN, lazily=MAIN)


def test_only_jit_imports_tvm_ffi() -> None:
    assert not offenders("tvm_ffi", set(), lazily={PACKAGE / "jit.py"})


def test_modules_import_lower_layers_only() -> None:
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    below = [p for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "__main__")]
    assert {p.stem for p in below} == set(rank), "give the module its line in LAYERS"
    rank["__version__"] = -1  # a constant of the package itself
    wrong = [
        f"{path.name}:{found.line} imports {found.name}"
        for path in below
        for found in imports_of(path)
        if within(found.name, "pat_sglang")
        and rank.get(found.name.split(".")[1], len(LAYERS)) >= rank[path.stem]
    ]
    assert not wrong


def test_planning_needs_no_torch() -> None:
    allowed = {p for p in MODULES if p.parent != PACKAGE or p.stem not in WITHOUT_TORCH}
    assert not offenders("torch", allowed)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("pat_sglang", {"torch", "sglang", "tvm_ffi", "numpy"}),
        ("pat_sglang.jit", {"torch", "sglang", "tvm_ffi"}),
        ("pat_sglang.__main__", {"torch", "sglang", "tvm_ffi"}),
        ("pat_sglang.plan", {"sglang", "tvm_ffi"}),
    ],
)
def test_import_is_light(module: str, heavy: set[str]) -> None:
    """SGLang imports the entry point's package in every process; few of them decode."""
    code = f"import {module}, sys; print(*sorted({heavy!r} & sys.modules.keys()))"
    # PYTHONPATH would bring the stand-ins of conftest.py, which import more.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []


def includes_of(path: Path) -> list[str]:
    """Included names: in angle brackets as they are, quoted ones relative to csrc."""
    found = []
    for bracket, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', path.read_text(), re.M):
        if bracket == '"':
            beside = (path.parent / name).resolve()
            name = os.path.relpath(beside if beside.exists() else CSRC / name, CSRC)
        found.append(name)
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_point_downwards(source: Path) -> None:
    own = source.relative_to(CSRC)
    binding = own.name.startswith("binding")
    for name in includes_of(source):
        assert not name.startswith(("torch/", "ATen/", "c10/", "pybind11/")), name
        assert binding or not name.startswith(("tvm/", "dlpack/")), name
        assert not name.startswith("binding"), name
        if own.parts[0] == "host" or own.name in ("plan_layout.h", "binding_host.cc"):
            assert not re.match(r"cuda|cooperative_groups|device/|cub/", name), name
        if own.parts[0] == "device" or own.name in ("plan_layout.h", "binding.cc"):
            assert not name.startswith("host/"), name


@pytest.mark.parametrize("folder", [PACKAGE, CSRC], ids=lambda path: path.name)
def test_sources_are_ascii(folder: Path) -> None:
    files = [p for p in [*MODULES, *SOURCES] if folder in p.parents]
    assert files and [p for p in files if not p.read_bytes().isascii()] == []
