"""Modules in the fork server: which are refused, and by what."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kfpytorch_ray.cluster.preloading import Traces, preload, why_refused

PLAIN = Traces(threads=("MainThread",), tasks=1, openblas=frozenset(), cuda=False)
BLAS = frozenset({"/x/libopenblas.so"})


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (PLAIN, ""),
        (Traces(("MainThread", "poller"), 2, frozenset(), cuda=False), "starts threads while it is imported (poller)"),
        (Traces(("MainThread", "MainThread"), 2, frozenset(), cuda=False), "starts threads"),
        (Traces(("MainThread",), 4, frozenset(), cuda=False), "starts 3 threads of a native library"),
        (Traces(("MainThread",), 4, BLAS, cuda=False), ""),
        (Traces(("MainThread",), 1, frozenset(), cuda=True), "uses a GPU"),
    ],
)
def test_what_no_fork_can_have(after: Traces, said: str) -> None:
    """Threads and a GPU; OpenBLAS's own threads mend themselves in a fork."""
    reason = why_refused(PLAIN, after)
    assert reason.startswith(said)
    assert bool(reason) is bool(said)


def test_what_was_there_before_is_nobodys_fault() -> None:
    """Only what an import adds counts."""
    busy = Traces(("MainThread", "other"), 5, frozenset(), cuda=True)
    assert why_refused(busy, busy) == ""


def test_a_process_and_its_devices(tmp_path: Path) -> None:
    """As /proc shows it: an open device is a GPU in use; a file that is closed meanwhile is nothing."""
    for folder in ("task/1", "task/2", "fd"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "maps").write_text("7f0-7f1 r-xp 0 0:0 1 /usr/lib/libopenblas.so.0\n7f2-7f3 rw-p 0 00:00 0\n")
    (tmp_path / "fd" / "3").symlink_to("/tmp/file")
    (tmp_path / "fd" / "4").write_text("not a link")
    found = Traces.now(tmp_path)
    assert (found.tasks, found.openblas, found.cuda) == (2, frozenset({"/usr/lib/libopenblas.so.0"}), False)
    (tmp_path / "fd" / "5").symlink_to("/dev/nvidiactl")
    assert Traces.now(tmp_path).cuda


def test_modules_are_imported_until_one_is_refused(tmp_path: Path) -> None:
    """Those that fail are passed over, whatever they raise; the one that starts a thread is named."""
    (tmp_path / "fine_module.py").write_text("")
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('by itself')")
    (tmp_path / "busy_module.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, name='busy', daemon=True).start()\n"
    )
    names = ("fine_module", "broken_module", "no_such_module", "busy_module", "never_reached")
    code = f"from kfpytorch_ray.cluster.preloading import preload; print(preload({names!r}))"
    path = os.pathsep.join((str(tmp_path), *filter(None, sys.path)))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True, capture_output=True, text=True
    )
    said = "starts threads while it is imported (busy)"
    assert done.stdout.strip() == str((("broken_module", "no_such_module"), {"busy_module": said}))


def test_our_own_modules_would_pass() -> None:
    """What every fork server has is measured by the same rule."""
    assert preload(("kfpytorch_ray.cluster.guardian", "flytekit.core.base_task")) == ((), {})
