"""The command line against a real head: a process for each command, as a shell starts it."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kfpytorch_ray.testing import HeadCluster, wait_until

DEADLINE_S = 180.0

WORK = """
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from flytekit import task
from kfpytorch_ray import Elastic

from beside import NAME

@dataclass
class Config:
    base: int

def work(config: Config, gate: Path | None = None) -> dict:
    print("begun as", ("first", "second")[int(os.environ["RANK"])], flush=True)
    if gate is not None:
        gate.with_name(f"begun-{os.environ['RANK']}").touch()
    while gate is not None and not gate.exists():
        threading.Event().wait(0.05)
    return {"name": NAME, "sum": config.base + int(os.environ["RANK"])}

def hold(gate: Path) -> dict:
    gate.with_name(f"begun-{os.environ['RANK']}").touch()
    while not gate.exists():
        threading.Event().wait(0.05)
    return {"colour": os.environ["COLOUR"], "left out": not Path("large.bin").exists() and Path("work.py").exists()}

def fail() -> None:
    raise LookupError("no such data set")

@task(task_config=Elastic(rdzv_configs={"join_timeout": 2}))
def impatient() -> int:
    return 0
"""


class Shell:
    """Where commands are typed.

    Args:
        folder: The current one.
        storage: That the environment names.
    """

    def __init__(self, folder: Path, storage: str) -> None:
        self.folder = folder
        self._environment = {**os.environ, "KFPYTORCH_RAY_STORAGE": storage, "PYTHONUNBUFFERED": "1"}

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "kfpytorch_ray.cli", *map(str, arguments)],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, ends_with: int = 0) -> str:
        """What a command prints on standard output."""
        process = self.start(*arguments)
        output, self.errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == ends_with, self.errors
        return output

    def status(self, run_id: str) -> str:
        return str(json.loads(self.run("status", run_id, "--json"))["status"])


@pytest.fixture
def shell(tmp_path: Path, storage: str) -> Shell:
    """In a project whose function is in a sub-folder, beside what it imports."""
    for folder, name in (("project", "the wrong one"), ("project/jobs", "the right one")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "beside.py").write_text(f"NAME = {name!r}\n")
    (tmp_path / "project" / "work.py").write_text(
        "def work(config: dict, gate: str = '') -> str:\n    return 'wrong'\n"
    )
    (tmp_path / "project" / "jobs" / "work.py").write_text(WORK)
    return Shell(tmp_path / "project", storage)


@pytest.mark.parametrize("folder", ["project", "elsewhere"])
def test_a_file_is_run_from_any_folder(shell: Shell, head: HeadCluster, tmp_path: Path, folder: str) -> None:
    """What lies beside it is found on the cluster, and nothing of the same name that lies elsewhere."""
    shell.folder = tmp_path / folder
    shell.folder.mkdir(exist_ok=True)
    target = f"{tmp_path}/project/jobs/work.py:work"
    arguments = ("--arg", 'config={"base": 4}', "--nproc-per-node", 2, "--json")
    answer = json.loads(shell.run("run", target, "--address", head.address, *arguments))
    assert answer["value"] == {"name": "the right one", "sum": 4}
    assert answer["rounds"][0]["ranks"] == {"succeeded": 2}
    assert "begun" in shell.errors
    (listed,) = json.loads(shell.run("list", "--json"))
    assert (listed["run_id"], listed["status"], listed["collected"]) == (answer["run_id"], "succeeded", True)


def test_a_detached_run_from_begin_to_end(shell: Shell, head: HeadCluster, tmp_path: Path) -> None:
    """Looked at, followed, taken and cleaned up by other processes than the one that launched it."""
    gate = tmp_path / "gate"
    arguments = (
        "--arg",
        'config={"base": 4}',
        "--arg",
        f"gate={gate}",
        "--nnodes",
        2,
        "--address",
        head.address,
        "--logs",
        "all",
    )
    run_id = shell.run("run", "jobs/work.py:work", *arguments, "--detach").strip()
    wait_until(lambda: len([*tmp_path.glob("begun-*")]) == 2, "both ranks to begin", DEADLINE_S)
    assert shell.status(run_id) == "running"
    assert f"{run_id}  work  running  2 x 1" in shell.run("list")
    shell.run("result", run_id, "--timeout", 0, ends_with=5)
    assert shell.run("gc", "--older-than", 0) == ""
    following = shell.start("logs", "-f", run_id, "--rank", 1)
    gate.touch()
    lines, _ = following.communicate(timeout=DEADLINE_S)
    assert following.returncode == 0
    assert [line.endswith("[rank 1 | node 1] begun as second") for line in lines.splitlines()] == [True]
    assert shell.run("result", run_id, "--keep") == "{'name': 'the right one', 'sum': 4}\n"
    shell.run("result", run_id, "--rank", 1, "--output", tmp_path / "value.pkl")
    assert pickle.loads((tmp_path / "value.pkl").read_bytes())["sum"] == 5
    shell.run("result", run_id, ends_with=2)
    assert "collected already" in shell.errors
    assert shell.run("gc", "--older-than", 0) == f"removed {run_id}\n"
    shell.run("status", run_id, ends_with=2)


def interrupted(process: subprocess.Popen[str]) -> int:
    """The exit code after Ctrl-C. Pressed again, as a person would: Python drops one that comes within a finaliser."""
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
            break
    assert process.returncode is not None
    return process.returncode


def test_a_run_is_cancelled(shell: Shell, head: HeadCluster, tmp_path: Path) -> None:
    """It is over when the command is; who follows its log meanwhile may leave without a change to it."""
    arguments = ("--arg", 'config={"base": 4}', "--arg", f"gate={tmp_path / 'gate'}", "--address", head.address)
    run_id = shell.run("run", "jobs/work.py:work", *arguments, "--detach").strip()
    following = shell.start("logs", "-f", run_id)
    assert following.stdout is not None
    assert any("begun" in line for line in following.stdout)
    assert interrupted(following) == 130
    assert shell.status(run_id) == "running"
    assert shell.run("cancel", run_id) == "stopped\n"
    assert shell.status(run_id) == "stopped"
    shell.run("result", run_id, ends_with=6)
    assert shell.run("cancel", run_id) == "stopped\n"


def test_exit_codes_tell_what_went_wrong(shell: Shell, head: HeadCluster, tmp_path: Path) -> None:
    """The training, the way to the cluster, or the command itself."""
    arguments = ("run", "jobs/work.py:fail", "--address", head.address)
    shell.run(*arguments, ends_with=1)
    assert "LookupError: no such data set" in shell.errors.partition("Error: ")[2]
    # The driver's own traceback belongs to the log; the error of the command has none.
    answer = json.loads(shell.run(*arguments[:2], "--address", "http://127.0.0.1:1", "--json", ends_with=4))
    assert answer["error"] == "ClusterUnreachableError"
    shell.run("run", "jobs/work.py:nothing", ends_with=2)
    assert "it has work, hold, fail, impatient" in shell.errors


def test_a_full_cluster(shell: Shell, head: HeadCluster, tmp_path: Path) -> None:
    """Who holds all of its nodes has asked for them; who cannot wait longer has an exit code to try again by."""
    gate = tmp_path / "gate"
    (shell.folder / "large.bin").write_bytes(bytes(2**20))
    travels = ("--exclude", "large.bin", "--runtime-env", '{"env_vars": {"COLOUR": "red"}}')
    arguments = ("--arg", f"gate={gate}", "--nnodes", 2, "--resources", "CPU=4", "--address", head.address)
    run_id = shell.run("run", "jobs/work.py:hold", *arguments, *travels, "--detach").strip()
    wait_until(lambda: len([*tmp_path.glob("begun-*")]) == 2, "both ranks to begin", DEADLINE_S)
    shell.run("run", "jobs/work.py:impatient", "--address", head.address, ends_with=3)
    assert "Behind: hold (run launch-" in shell.errors
    gate.touch()
    assert shell.run("result", run_id) == "{'colour': 'red', 'left out': True}\n"
