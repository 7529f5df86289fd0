"""Modules in the fork server: which are refused, and by what."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kfpytorch_ray.cluster.preloading import Uninheritable, preload, why_refused

PLAIN = Uninheritable(threads=("MainThread",), tasks=1, openblas=frozenset(), cuda=False)
BLAS = frozenset({"/x/libopenblas.so"})


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (PLAIN, ""),
        (
            Uninheritable(("MainThread", "poller"), 2, frozenset(), cuda=False),
            "starts threads while it is imported (poller)",
        ),
        (Uninheritable(("MainThread", "MainThread"), 2, frozenset(), cuda=False), "starts threads"),
        (Uninheritable(("MainThread",), 4, frozenset(), cuda=False), "starts 3 threads of a native library"),
        (Uninheritable(("MainThread",), 4, BLAS, cuda=False), ""),
        (Uninheritable(("MainThread",), 1, frozenset(), cuda=True), "uses a GPU"),
    ],
)
def test_what_no_fork_can_have(after: Uninheritable, said: str) -> None:
    """Threads and a GPU; OpenBLAS's own threads mend themselves in a fork."""
    reason = why_refused(PLAIN, after)
    assert reason.startswith(said)
    assert bool(reason) is bool(said)


def test_what_was_there_before_is_nobodys_fault() -> None:
    """Only what an import adds counts."""
    busy = Uninheritable(("MainThread", "other"), 5, frozenset(), cuda=True)
    assert why_refused(busy, busy) == ""


def test_a_process_and_its_devices(tmp_path: Path) -> None:
    """As /proc shows it: an open device is a GPU in use; a file or thread that ended meanwhile is nothing."""
    for folder in ("task/1", "task/2", "task/3", "task/4", "fd"):
        (tmp_path / folder).mkdir(parents=True)
    for task, name in ((1, "python"), (2, "busy"), (3, "jemalloc_bg_thd")):
        (tmp_path / "task" / str(task) / "comm").write_text(f"{name}\n")
    (tmp_path / "maps").write_text("7f0-7f1 r-xp 0 0:0 1 /usr/lib/libopenblas.so.0\n7f2-7f3 rw-p 0 00:00 0\n")
    (tmp_path / "fd" / "3").symlink_to("/tmp/file")
    (tmp_path / "fd" / "4").write_text("not a link")
    found = Uninheritable.now(tmp_path)
    assert (found.tasks, found.openblas, found.cuda) == (2, frozenset({"/usr/lib/libopenblas.so.0"}), False)
    (tmp_path / "fd" / "5").symlink_to("/dev/nvidiactl")
    assert Uninheritable.now(tmp_path).cuda


def test_modules_are_imported_until_one_is_refused(tmp_path: Path) -> None:
    """Those that fail are passed over, whatever they raise; the one that starts a thread is named."""
    (tmp_path / "fine_module.py").write_text("")
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('by itself')")
    (tmp_path / "busy_module.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, name='busy', daemon=True).start()\n"
    )
    (tmp_path / "script.py").write_text("import sys\nsys.exit('usage')\n")
    names = ("fine_module", "broken_module", "script", "no_such_module", "busy_module", "never_reached")
    code = f"from kfpytorch_ray.cluster.preloading import preload; print(preload({names!r}))"
    path = os.pathsep.join((str(tmp_path), *filter(None, sys.path)))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True, capture_output=True, text=True
    )
    said = "starts threads while it is imported (busy)"
    missing = {
        "broken_module": "RuntimeError: by itself",
        "script": "SystemExit: usage",
        "no_such_module": "ModuleNotFoundError: No module named 'no_such_module'",
    }
    assert done.stdout.strip() == str((missing, {"busy_module": said}))


def test_our_own_modules_would_pass() -> None:
    """What every fork server has is measured by the same rule."""
    assert preload(("kfpytorch_ray.cluster.guardian", "flytekit.core.base_task")) == ({}, {})


def test_threads_of_jemalloc_are_no_harm() -> None:
    """pyarrow has them, which flytekit imports where it is: a fork goes on to allocate, in several threads."""
    code = """
import os, threading
from kfpytorch_ray.cluster.preloading import preload
missing, refused = preload(("numpy", "pyarrow"))
import pyarrow
names = [open(f"/proc/self/task/{task}/comm").read().rstrip() for task in os.listdir("/proc/self/task")]
print(missing, refused, "jemalloc_bg_thd" in names, flush=True)
if os.fork() == 0:
    pool = pyarrow.jemalloc_memory_pool()
    def work():
        for size in range(0, 2**22, 2**15):
            pyarrow.allocate_buffer(size, memory_pool=pool)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("allocated", pool.total_bytes_allocated() > 0, flush=True)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.stdout.splitlines() == ["{} {} True", "allocated True", "0"]
