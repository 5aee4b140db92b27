# SPDX-License-Identifier: MIT
"""Constants that ``pat_sglang doctor --calibrate`` has measured, kept beside the kernels."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict
from pathlib import Path

from . import envs
from .cost import CostModel, cost_model_for

logger = logging.getLogger(__name__)
_warned: set[Path] = set()


def path_of(gpu_name: str, num_sms: int) -> Path:
    """The file of one kind of GPU."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return envs.CACHE_DIR.get() / f"cost-{slug}-{num_sms}sms.json"


def save(model: CostModel, gpu_name: str, version: str) -> Path:
    """Writes constants for head dimension 128; ``version`` is that of the package they hold for."""
    path = path_of(gpu_name, model.num_sms)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"version": version, **asdict(model)}, indent=1) + "\n")
    partial.replace(path)
    return path


def model_for(gpu_name: str, num_sms: int, head_dim: int, version: str) -> CostModel:
    """The saved constants of a GPU, scaled to the head dimension; without any, the shipped ones.

    A file that cannot be used (damaged, or of another version of the package) is named in the log,
    once.
    """
    path = path_of(gpu_name, num_sms)
    if not path.exists():
        return cost_model_for(gpu_name, num_sms, head_dim)
    try:
        return _read(path, num_sms, version).scaled_to(head_dim)
    except (OSError, ValueError) as error:
        if path not in _warned:
            _warned.add(path)
            logger.warning(
                "pat_sglang: %s is not used (%s): run `python -m pat_sglang doctor --calibrate` "
                "again, or delete it",
                path,
                error,
            )
        return cost_model_for(gpu_name, num_sms, head_dim)


def _read(path: Path, num_sms: int, version: str) -> CostModel:
    """
    Raises:
        ValueError: the file is not one of this version for this number of SMs.
    """
    saved = json.loads(path.read_text())
    if not isinstance(saved, dict) or saved.pop("version", None) != version:
        raise ValueError(f"not of pat-sglang {version}")
    template = asdict(cost_model_for("", num_sms, 128))
    if set(saved) != set(template):
        raise ValueError("other constants than this version has")
    for name, like in template.items():
        if isinstance(like, str):
            continue
        numbers = saved[name] if isinstance(like, tuple) else [saved[name]]
        count = len(like) if isinstance(like, tuple) else 1
        fits = isinstance(numbers, list) and len(numbers) == count
        end = 1 << (24 if name == "part_ps" else 31)  # as csrc/host/planner.cc checks
        if not fits or not all(type(n) is int and 0 < n < end for n in numbers):
            raise ValueError(f"{name} is not {count} positive integers below {end}")
        if isinstance(like, tuple):
            saved[name] = tuple(numbers)
    if saved["num_sms"] != num_sms:
        raise ValueError(f"for {saved['num_sms']} SMs, not {num_sms}")
    return CostModel(**saved)
