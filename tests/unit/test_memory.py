"""Out-of-memory kills, from made-up files and from the kernel."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfpytorch_ray.cluster.memory import OutOfMemoryWatch, event_files, kills

ME = os.getpid()


class Machine:
    """A machine made of files: its proc file system and its cgroups."""

    def __init__(self, folder: Path, mounts: str, cgroup: str, pid: int = ME) -> None:
        self.folder = folder
        self.proc = folder / "proc"
        self.write("proc/self/mountinfo", mounts.replace("ROOT", str(folder)))
        self.joins(pid, cgroup)

    def joins(self, pid: int, cgroup: str) -> None:
        self.write(f"proc/{pid}/cgroup", cgroup)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def found(self, pid: int = ME) -> list[str]:
        return [str(file.relative_to(self.folder)) for file in event_files(pid, self.proc)]


V2 = "30 23 0:26 / ROOT/cg rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = """\
30 23 0:26 / ROOT/cg/cpu rw - cgroup cgroup rw,cpu,cpuacct
31 23 0:27 / ROOT/cg/memory rw - cgroup cgroup rw,memory
"""
V2_EVENTS = "low 0\nhigh 0\nmax 812\noom 3\noom_kill {}\noom_group_kill 0\n"
V1_EVENTS = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"


def test_version_2_is_read_from_a_process_up(tmp_path: Path) -> None:
    """Its own cgroup first; the root has no such file."""
    machine = Machine(tmp_path, V2, "0::/user.slice/ray.scope\n")
    for folder in ("cg/user.slice/ray.scope", "cg/user.slice"):
        machine.write(f"{folder}/memory.events", V2_EVENTS.format(0))
    (tmp_path / "cg/elsewhere").mkdir()
    assert machine.found() == ["cg/user.slice/ray.scope/memory.events", "cg/user.slice/memory.events"]


def test_version_1_is_read_from_a_process_up(tmp_path: Path) -> None:
    """Of several hierarchies the one that counts memory; its root has a counter, too."""
    machine = Machine(tmp_path, V1, "9:name=systemd:/\n5:memory:/pods/mine\n3:cpu,cpuacct:/other\n0::/\n")
    for folder in ("cg/memory/pods/mine", "cg/memory/pods", "cg/memory"):
        machine.write(f"{folder}/memory.oom_control", V1_EVENTS.format(0))
    assert machine.found() == [f"cg/memory/{name}memory.oom_control" for name in ("pods/mine/", "pods/", "")]


def test_a_container_sees_its_own_part_of_the_tree(tmp_path: Path) -> None:
    """Without a namespace for cgroups, a container's file system begins at its own cgroup, whose name it knows."""
    mounts = "31 23 0:27 /kubepods/pod1/c1 ROOT/cg/memory ro - cgroup cgroup rw,memory\n"
    machine = Machine(tmp_path, mounts, "5:memory:/kubepods/pod1/c1/below\n")
    machine.write("cg/memory/memory.oom_control", V1_EVENTS.format(0))
    machine.write("cg/memory/below/memory.oom_control", V1_EVENTS.format(0))
    assert machine.found() == ["cg/memory/below/memory.oom_control", "cg/memory/memory.oom_control"]


@pytest.mark.parametrize("path", ["/../../elsewhere", "/elsewhere"])
def test_a_cgroup_that_is_not_seen_is_looked_for_where_the_tree_begins(path: str, tmp_path: Path) -> None:
    """As where the process was moved out of what its container may see."""
    mounts = "31 23 0:27 /pod ROOT/cg rw - cgroup2 cgroup2 rw\n" if path == "/elsewhere" else V2
    machine = Machine(tmp_path, mounts, f"0::{path}\n")
    machine.write("cg/memory.events", V2_EVENTS.format(0))
    machine.write("elsewhere/memory.events", V2_EVENTS.format(0))
    assert machine.found() == ["cg/memory.events"]


def test_names_with_blanks_are_read_as_they_are(tmp_path: Path) -> None:
    """The kernel writes them in octal."""
    machine = Machine(tmp_path, "30 23 0:26 / ROOT/c\\040g rw - cgroup2 cgroup2 rw\n", "0::/a b\n")
    machine.write("c g/a b/memory.events", V2_EVENTS.format(0))
    assert machine.found() == ["c g/a b/memory.events"]


def test_a_machine_that_says_nothing_is_no_error(tmp_path: Path) -> None:
    """Neither without the proc file system, nor without a process, nor without a cgroup that counts memory."""
    assert event_files(ME, tmp_path / "nowhere") == ()
    machine = Machine(tmp_path, V1.splitlines()[0], "3:cpu,cpuacct:/other\n")
    assert machine.found() == []
    assert machine.found(pid=ME + 1) == []
    assert not OutOfMemoryWatch(machine.proc).struck(ME)


@pytest.mark.parametrize("text", ["", "oom_kill\n", "oom_kill many\n", "under_oom 0\n"])
def test_a_file_that_does_not_say_counts_as_none(text: str, tmp_path: Path) -> None:
    """Kernels before 4.13 do not count."""
    file = tmp_path / "memory.oom_control"
    file.write_text(text)
    assert kills(file) == 0
    assert kills(tmp_path / "gone") == 0


@pytest.mark.parametrize("where", ["w", ""])
def test_a_kill_since_the_process_was_noted_strikes(where: str, tmp_path: Path) -> None:
    """In its own cgroup or above; kills from before, and in other processes' cgroups, do not count."""
    machine = Machine(tmp_path, V2, "0::/\n")
    machine.joins(1, "0::/w\n")
    machine.joins(2, "0::/x\n")
    for folder, count in (("w/", 5), ("x/", 0), ("", 7)):
        machine.write(f"cg/{folder}memory.events", V2_EVENTS.format(count))
    watch = OutOfMemoryWatch(machine.proc)
    watch.add(1)
    assert not watch.struck(1)
    machine.write("cg/x/memory.events", V2_EVENTS.format(1))
    assert not watch.struck(1)
    machine.write(f"cg/{where}/memory.events", V2_EVENTS.format(9))
    assert watch.struck(1)


def test_processes_start_in_the_cgroup_of_who_starts_them(tmp_path: Path) -> None:
    """A kill between the start of a process and the moment when it is noted counts."""
    machine = Machine(tmp_path, V2, "0::/w\n")
    machine.joins(1, "0::/w\n")
    machine.write("cg/w/memory.events", V2_EVENTS.format(0))
    watch = OutOfMemoryWatch(machine.proc)
    machine.write("cg/w/memory.events", V2_EVENTS.format(1))
    watch.add(1)
    assert watch.struck(1)


@contextlib.contextmanager
def limited_cgroup(size_bytes: int) -> Iterator[Path]:
    """A real cgroup with a limit of its memory."""
    files = event_files(ME)
    if not files:
        pytest.skip("no cgroup of this process counts memory")
    limit = {"memory.events": "memory.max", "memory.oom_control": "memory.limit_in_bytes"}[files[0].name]
    try:
        folder = Path(tempfile.mkdtemp(prefix="kfpytorch_ray-", dir=files[0].parent))
    except OSError as error:
        pytest.skip(f"cgroups cannot be made here: {error}")
    try:
        if not (folder / limit).exists():
            pytest.skip(f"memory is not delegated to {folder.parent}")
        (folder / limit).write_text(str(size_bytes))
        yield folder
    finally:
        folder.rmdir()


HUNGRY = """
import os, sys
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
print("ready", flush=True)
sys.stdin.readline()
kept = []
while True:
    kept.append(b"x" * 2**20)
"""


def test_the_kernels_kill_is_seen() -> None:
    """A process that is killed because its cgroup has no memory left, on this machine."""
    with limited_cgroup(64 * 2**20) as cgroup:
        command = [sys.executable, "-c", HUNGRY, str(cgroup / "cgroup.procs")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            watch = OutOfMemoryWatch()
            watch.add(process.pid)
            assert not watch.struck(process.pid)
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.wait(60) == -signal.SIGKILL
        assert watch.struck(process.pid)
        assert not watch.struck(ME)
