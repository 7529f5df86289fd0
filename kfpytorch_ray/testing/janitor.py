"""Run as a script beside a cluster for tests: ends the cluster when the process that made it has died without doing so.

Reads its standard input, which its maker holds open. At the end of it, everything that carries the cluster's mark is
killed, and its network and its folder are removed. Standard library only, and none of this package: it has to be there
at once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK_VARIABLE = "KFPYTORCH_RAY_TESTING"
"""In the environment of every process of a cluster for tests: the cluster's folder."""

_RETRY_S = 0.05
_LOOKS = 4
"""How often nothing has to be found: a process that is just being executed shows no environment."""
_DONE = b"done\n"


@contextmanager
def janitor(folder: str, network: str = "") -> Iterator[None]:
    """Have the cluster of a folder ended if this process dies within the block; does nothing otherwise.

    Args:
        folder: The cluster's.
        network: Name of its bridge, which the names of its network namespaces begin with; empty without one.
    """
    script = [sys.executable, "-I", __file__, folder, network]
    with subprocess.Popen(script, stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None
        yield
        process.stdin.write(_DONE)


def end_cluster(folder: str) -> None:
    """SIGKILL to everything that carries the mark of a cluster, and to what is under it, until there is no more."""
    looks = _LOOKS
    while looks:
        there = _members(folder)
        for process in there:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        looks = _LOOKS if there else looks - 1
        time.sleep(_RETRY_S)


def _members(folder: str) -> set[int]:
    entry = f"{MARK_VARIABLE}={folder}".encode()
    found = set()
    children: dict[int, list[int]] = defaultdict(list)
    for process in Path("/proc").glob("[0-9]*"):
        # Gone meanwhile, or somebody else's.
        with contextlib.suppress(OSError):
            state, parent = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            children[int(parent)].append(int(process.name))
            if state != "Z" and entry in (process / "environ").read_bytes().split(b"\0"):
                found.add(int(process.name))
    found.discard(os.getpid())
    # A process that gives itself a title, as Ray's do, writes it over its environment.
    below = list(found)
    while below:
        below = [child for process in below for child in children[process] if child not in found]
        found.update(below)
    return found - {os.getpid()}


def remove_network(name: str) -> None:
    """Remove a bridge, the links to it, and the network namespaces at their other ends."""
    ip = shutil.which("ip") or "ip"
    links = [link.name for link in Path("/sys/class/net").glob(f"{name}*")]
    namespaces = [namespace.name for namespace in Path("/run/netns").glob(f"{name}-*")]
    for kind, found in (("link", links), ("netns", namespaces)):
        for one in found:
            subprocess.run([ip, kind, "delete", one], check=False, capture_output=True)


def _main(folder: str, network: str) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if sys.stdin.buffer.read() == _DONE:
        return
    end_cluster(folder)
    if network:
        remove_network(network)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
