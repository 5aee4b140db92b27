# SPDX-License-Identifier: MIT
"""Command line: ``python -m pat_sglang run | doctor | build | explain``."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import runpy
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, version

from . import __version__, envs


def run(args: argparse.Namespace) -> int:
    """Run an SGLang tool that does not load plug-ins itself."""
    from .plugin import compat

    compat.load_plugins()
    sys.argv = [args.module, *args.args]
    runpy.run_module(args.module, run_name="__main__", alter_sys=True)
    return 0


def build(args: argparse.Namespace) -> int:
    """Compile kernels ahead; needs nvcc, no GPU."""
    from . import jit

    host = time.perf_counter()
    print(f"{jit.build_host()}  {time.perf_counter() - host:.1f} s")
    for arch in args.arch.split(","):
        for dtype in args.dtype.split(","):
            for head_dim in args.head_dim.split(","):
                begin = time.perf_counter()
                path = jit.build(arch=arch, dtype=dtype, head_dim=int(head_dim))
                print(f"{path}  {time.perf_counter() - begin:.1f} s", flush=True)
    return 0


def explain(args: argparse.Namespace) -> int:
    """The forest and the work items of a tree string."""
    import torch

    from . import DecodePlanner
    from .forest import Forest

    num_q_heads, num_kv_heads = map(int, args.heads.split("/"))
    paths = tree_paths(args.tree)
    forest, leaf_of_row = Forest.from_paths(paths)
    lens = [path[-1][2] for path in paths]
    planner = DecodePlanner(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=args.head_dim,
        dtype=torch.bfloat16,
        device="cpu",
        max_rows=len(paths),
        max_tokens=sum(lens),
        max_workspace_bytes=1 << 40,
        sharing=envs.FORCE.get(),
    )
    table = torch.zeros(len(paths), max(lens), dtype=torch.int32)  # slots: irrelevant here
    rows = torch.arange(len(paths))
    plan = planner.plan(forest, leaf_of_row, lens, torch.tensor(lens), table, rows)
    print(plan.explain())
    return 0


def tree_paths(text: str) -> list[list[tuple[tuple[int, int], int, int]]]:
    """Row paths of ``<nodes per level>_<tokens per level>``, e.g. ``1,8,512_32,512,256``.

    Each level's nodes are spread evenly below those of the level above; every leaf is a row.

    Raises:
        ValueError: the string is not of that form.
    """
    try:
        widths, tokens = ([int(n) for n in part.split(",")] for part in text.split("_"))
    except ValueError:
        raise ValueError(f"{text!r} is not <nodes per level>_<tokens per level>") from None
    fits = len(widths) == len(tokens) and min(widths) > 0 and min(tokens) >= 0
    if not fits or any(b % a for a, b in itertools.pairwise(widths)):
        raise ValueError(f"{text!r}: as many widths as lengths, each width a multiple of the last")
    paths = []
    for row in range(widths[-1]):
        path, begin = [], 0
        for level, (width, length) in enumerate(zip(widths, tokens, strict=True)):
            path.append(((level, row * width // widths[-1]), begin, begin + length))
            begin += length
        paths.append(path)
    return paths


def doctor(args: argparse.Namespace) -> int:
    """What is in place, and why not; exit status 1 when PAT could not serve here."""
    if args.calibrate:
        from .calibrate import calibrate

        print(calibrate(args.seconds))
        return 0
    failed = False
    for name, check in CHECKS.items():
        try:
            good, text = check()
        except Exception as error:
            good, text = False, f"{type(error).__name__}: {error}"
        failed |= not good
        print(f"{'ok ' if good else 'BAD'}  {name:12} {text}")
    return int(failed)


def _check_versions() -> tuple[bool, str]:
    found = {}
    for package in ("torch", "sglang", "apache-tvm-ffi"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    text = ", ".join(f"{name} {number}" for name, number in found.items())
    return "not installed" not in found.values(), f"pat-sglang {__version__}, {text}"


def _check_environment() -> tuple[bool, str]:
    envs.check_all()
    changed = [f"{v.name}={os.environ[v.name]}" for v in envs.TABLE if os.environ.get(v.name)]
    unknown = [f"{name} is unknown" for name in envs.unknown_names()]
    return not unknown, ", ".join(changed + unknown) or "no PAT_SGLANG_* variable is set"


def _check_entry_point() -> tuple[bool, str]:
    values = [e.value for e in entry_points(group="sglang.srt.plugins") if e.name == "pat"]
    if not values:
        return False, "entry point `pat` not found: install the package (pip install -e .)"
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    if allowed and "pat" not in [name.strip() for name in allowed.split(",")]:
        return False, f"SGLANG_PLUGINS={allowed} leaves `pat` out"
    return True, values[0]


def _check_gpu() -> tuple[bool, str]:
    import torch

    from . import jit

    if not torch.cuda.is_available():
        return True, "none: the CPU path serves (for tests), kernels can still be built"
    major, minor = torch.cuda.get_device_capability()
    arch = jit.arch_of_capability(major, minor)
    return True, f"{torch.cuda.get_device_name()}, kernels for {arch}"


def _check_cost() -> tuple[bool, str]:
    import torch

    from . import saved_cost

    if not torch.cuda.is_available():
        return True, "no GPU to have constants for"
    properties = torch.cuda.get_device_properties(0)
    sms = properties.multi_processor_count
    return True, saved_cost.model_for(properties.name, sms, 128, __version__).provenance


def _check_compiler() -> tuple[bool, str]:
    import torch

    from . import jit

    try:
        return True, f"CUDA toolkit {jit.cuda_home()}"
    except jit.BuildError as error:
        needed = torch.cuda.is_available() and not any(envs.CACHE_DIR.get().glob("pat_sm*"))
        return not needed, str(error)


def _check_cache() -> tuple[bool, str]:
    folder = envs.CACHE_DIR.get()
    modules = sorted(path.name for path in folder.glob("pat_*/")) if folder.is_dir() else []
    return True, f"{folder}: {len(modules)} modules {' '.join(modules)}".rstrip()


def _check_sglang() -> tuple[bool, str]:
    if importlib.util.find_spec("sglang") is None:
        return False, "not installed"
    from .plugin import compat

    number = compat.sglang_version()
    problem = compat.unsupported_version(number) or compat.missing_seams()
    tested = "tested" if number in compat.TESTED else f"not tested ({', '.join(compat.TESTED)} is)"
    return problem is None, problem or f"every seam is in place, this version is {tested}"


def _check_backends() -> tuple[bool, str]:
    from .plugin import compat, register

    register()
    names = [name for name in envs.BASE_BACKENDS if name in compat.registered_backends()]
    return bool(names), "base backends: " + ", ".join(names)


CHECKS: dict[str, Callable[[], tuple[bool, str]]] = {
    "versions": _check_versions,
    "environment": _check_environment,
    "entry point": _check_entry_point,
    "GPU": _check_gpu,
    "cost model": _check_cost,
    "compiler": _check_compiler,
    "cache": _check_cache,
    "SGLang": _check_sglang,
    "backends": _check_backends,
}


def _describe_variables() -> str:
    lines = [f"  {v.name} ({v.kind})\n      {v.meaning}" for v in envs.TABLE]
    return "environment variables:\n" + "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry of ``python -m pat_sglang``."""
    parser = argparse.ArgumentParser(
        prog="python -m pat_sglang",
        description=__doc__,
        epilog=_describe_variables(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("run", help="run an SGLang module with plug-ins loaded")
    command.add_argument("module", help="e.g. sglang.benchmark.one_batch")
    command.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the module")
    command.set_defaults(function=run)

    command = commands.add_parser("doctor", help="what is in place, and why not")
    command.add_argument(
        "--calibrate", action="store_true", help="measure the planner's constants on this GPU"
    )
    command.add_argument("--seconds", type=float, default=90, help="for --calibrate")
    command.set_defaults(function=doctor)

    command = commands.add_parser("build", help="compile kernels ahead; needs no GPU")
    command.add_argument("--arch", default="9.0a", help="comma-separated, of 8.0, 9.0a, 10.0a")
    command.add_argument("--dtype", default="bf16", help="comma-separated, of bf16, fp16")
    command.add_argument("--head-dim", default="128", help="comma-separated, of 64, 128")
    command.set_defaults(function=build)

    command = commands.add_parser("explain", help="forest and work items of a tree")
    command.add_argument("tree", help="nodes and tokens per level, e.g. 1,8,512_32,512,256")
    command.add_argument("--heads", default="32/8", help="query heads / KV heads")
    command.add_argument("--head-dim", type=int, default=128)
    command.set_defaults(function=explain)

    args = parser.parse_args(argv)
    from .jit import BuildError

    try:
        return args.function(args)
    except (BuildError, envs.EnvError, ValueError) as error:
        # `run` shows its tool's own errors as they are.
        if args.function is run:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
