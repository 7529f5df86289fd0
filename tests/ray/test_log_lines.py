"""No line that a rank printed is lost at the end of a launch, in the output of a driver that runs by itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)

LINES = 1000

DRIVER = f"""
import os, signal, sys, time
from kfpytorch_ray import Elastic, LaunchError, RayBackend, launch
from kfpytorch_ray.testing import LaptopCluster
from kfpytorch_ray.testing.processes import all_processes, command

def say(name, stream):
    for line in range({LINES}):
        print(f"<{{name}} {{os.environ['RANK']}} {{line}}>", file=stream)

def succeed(name):
    say(name, sys.stdout)
    say(name, sys.stderr)

def fail(name):
    if os.environ["RANK"] == "0":
        time.sleep(600)
    say(name, sys.stdout)
    say(name, sys.stderr)
    raise RuntimeError(name)

def run(function, name, **options):
    backend = RayBackend(stop_grace_s=1.0, **options)
    try:
        result = launch(function, name, elastic=Elastic(nnodes=2, backend=backend))
        logs = result.logs
    except LaunchError as error:
        print(type(error).__name__, name)
        print(f"<error {{name}}>{{error}}</error>")
        logs = error.logs
    for rank, paths in logs.items():
        for path in paths:
            print(f"<kept {{name}} {{rank}} {{path}} {{len(open(path).readlines())}}>")
    for stream in (sys.stdout, sys.stderr):
        stream.write(f"<over {{name}}>\\n")
        stream.flush()

with LaptopCluster(nodes=2) as cluster:
    # Ray's log monitors pass on a hundred lines at a time, late, and only once what differs by numbers. Without them:
    for pid in all_processes():
        if "/log_monitor.py" in command(pid) and cluster.address in command(pid):
            os.kill(pid, signal.SIGSTOP)
    run(fail, "failure", logs="all")
    run(succeed, "success", logs="all")
    run(succeed, "default", log_folder=sys.argv[1])
    run(fail, "failure-of-rank-1", log_folder=sys.argv[1])
    run(succeed, "none", logs="none")
"""


@dataclass
class Output:
    """What a driver printed."""

    stdout: str
    stderr: str


def run_driver(script: str, *arguments: str) -> Output:
    """Run a script by itself to its end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "KFPYTORCH"))}
    # With what Ray does unless somebody switches it off.
    variables = {"RAY_DEDUP_LOGS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env=clean | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as driver:
        try:
            output = Output(*driver.communicate(timeout=900))
        finally:
            driver.kill()
    assert driver.returncode == 0, output.stdout[-3000:] + output.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where some launches keep their logs."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def output(folder: Path) -> Output:
    """Of some launches on the same Ray."""
    return run_driver(DRIVER, str(folder))


def lines_came(printed: str, name: str) -> set[tuple[int, int]]:
    """Ranks and numbers of lines that had been printed when their launch was over."""
    before, over, _ = printed.partition(f"<over {name}>")
    assert over
    found = re.findall(rf"^\[rank (\d) \| node \1\] <{name} \1 (\d+)>$", before, re.MULTILINE)
    assert len(found) == len(set(found))
    return {(int(rank), int(line)) for rank, line in found}


def lines_of(*ranks: int) -> set[tuple[int, int]]:
    return {(rank, line) for rank in ranks for line in range(LINES)}


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_every_line_is_there_when_a_launch_returns(output: Output, stream: str) -> None:
    """What all ranks print right before they return or raise, once, with rank and node; the traceback is last."""
    printed = getattr(output, stream)
    assert lines_of(0, 1) - lines_came(printed, "success") == set()
    assert lines_of(1) - lines_came(printed, "failure") == set()
    assert "WorkerFailedError failure\n" in output.stdout
    if stream == "stderr":
        assert "[rank 1 | node 1] RuntimeError: failure\n" in printed.partition("<over failure>")[0]
    assert "may be missing" not in output.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_whose_lines_are_printed(output: Output, stream: str) -> None:
    """Rank 0's where nothing else is asked, or nobody's."""
    printed = getattr(output, stream)
    assert lines_came(printed, "default") == lines_of(0)
    assert lines_came(printed, "none") == set()


def test_the_last_lines_of_a_failed_rank_are_printed(output: Output) -> None:
    """Although it is not rank 0, with what it raised; and where the others are is in the error."""
    printed = output.stderr.partition("<over failure-of-rank-1>")[0]
    assert f"[rank 1 | node 1] <failure-of-rank-1 1 {LINES - 1}>\n" in printed
    assert "[rank 1 | node 1] RuntimeError: failure-of-rank-1\n" in printed
    assert f"<failure-of-rank-1 1 {LINES // 2}>" not in printed


def test_logs_outlive_the_launch(output: Output, folder: Path) -> None:
    """Every rank's is whole in the folder that was asked for; result and error name them."""
    kept = {
        (name, int(rank)): (path, int(lines))
        for name, rank, path, lines in re.findall(r"<kept (\S+) (\d) (\S+) (\d+)>", output.stdout)
    }
    assert kept.keys() == {("default", 0), ("default", 1), ("failure-of-rank-1", 0), ("failure-of-rank-1", 1)}
    assert all(path.startswith(f"{folder}/launch-") for path, _ in kept.values())
    assert [kept["default", rank][1] for rank in range(2)] == [2 * LINES, 2 * LINES]
    path, lines = kept["failure-of-rank-1", 1]
    assert path.endswith("/round-0/rank-1.log")
    assert lines > 2 * LINES
    (error,) = re.findall(r"<error failure-of-rank-1>(.*?)</error>", output.stdout, re.DOTALL)
    assert f"rank 1: {path}" in error
