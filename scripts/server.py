# SPDX-License-Identifier: MIT
"""An SGLang server as a subprocess, for the scripts that start one."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STOP_PATIENCE_S = 10.0
ROOT = Path(__file__).resolve().parents[1]


def port_arguments() -> tuple[int, list[str]]:
    """A port for a server and its arguments about ports, of its own and of its ranks' rendezvous.

    Ports nobody listens on, below those that the kernel hands out by itself: one of these might be
    taken, by the server's own ranks too, before it listens, half a minute later. (The rendezvous
    port that SGLang 0.5.17 chooses is one of them.)
    """
    found: list[int] = []
    while len(found) < 2:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found += [port] * (port not in found)
    port, rendezvous = found
    return port, ["--host", "127.0.0.1", "--port", str(port), "--nccl-port", str(rendezvous)]


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    """``--plugin``, for ``environment_with``."""
    parser.add_argument(
        "--plugin",
        type=Path,
        default=os.environ.get("PAT_PLUGIN_META"),
        help="folder with the package metadata that carries the entry point (gpu_session.sh)",
    )


def environment_with(pat: bool, plugin: Path | None) -> dict[str, str]:
    """Environment of a server; only one with PAT sees the repository and the plug-in.

    Args:
        pat: whether it is one with PAT.
        plugin: folder with the package metadata that carries the entry point, None: installed.
    """
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    ours = [str(ROOT), *([str(plugin)] if plugin else [])]
    paths = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p not in ("", *ours)]
    environment["PYTHONPATH"] = os.pathsep.join([*(ours if pat else []), *paths])
    return environment


class Server:
    """One server process on a free port, with its whole process group.

    Args:
        name: for messages.
        arguments: of ``sglang.launch_server``, without host and port.
        environment: the complete environment.
        log: file that gets stdout and stderr.
        cwd: working folder.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        cwd: Path | None = None,
    ) -> None:
        port, of_ports = port_arguments()
        self.name, self.log, self.url = name, log, f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "sglang.launch_server", *arguments, *of_ports]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # its workers are stopped with it, by their group
            )

    def wait(self, patience: float) -> float:
        """Wait until it answers; the seconds it took.

        Raises:
            RuntimeError: it ended, or did not answer in time.
        """
        begin = time.monotonic()
        while time.monotonic() - begin < patience:
            if self.process.poll() is not None:
                raise RuntimeError(f"the {self.name} server ended with {self.process.returncode}")
            try:
                self.call("/health", timeout=5)
                return time.monotonic() - begin
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"the {self.name} server did not answer within {patience:.0f} s")

    def call(self, path: str, body: dict[str, Any] | None = None, timeout: float = 600) -> Any:
        """GET, or POST of a JSON body; parsed JSON, or the text of an answer that is none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            text = response.read().decode()
        return json.loads(text) if text.startswith(("{", "[")) else text

    def pat_state(self) -> dict[str, Any]:
        """What the plug-in counted, from /get_server_info; empty when it is not there."""
        states = self.call("/get_server_info").get("internal_states") or [{}]
        return states[0].get("pat") or {}

    def tail(self, lines: int = 25) -> str:
        """The end of its log, with a heading."""
        of_log = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join([f"\n--- the end of {self.log}", *of_log])

    def flush(self) -> None:
        """Empty the prefix cache, which must not be done while a request runs.

        Raises:
            RuntimeError: one still runs after 10 s.
        """
        for _ in range(50):
            try:
                self.call("/flush_cache", {})
                return
            except OSError:  # the last request is not quite gone
                time.sleep(0.2)
        raise RuntimeError(f"{self.name}: the prefix cache could not be flushed")

    def stop(self) -> None:
        """End the whole process group; the launcher may be gone before its workers are."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(STOP_PATIENCE_S)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue
