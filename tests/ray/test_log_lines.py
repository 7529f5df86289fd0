"""No line that a rank printed is lost at the end of a launch, in the output of a driver that runs by itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

from kfpytorch_ray.cluster.output import MARK

LINES = 1000
TIMES = 10

DRIVER = f"""
import os, signal, sys, threading, time
from kfpytorch_ray import Elastic, LaunchError, RayBackend, launch
from kfpytorch_ray.cluster.delivery import Delivery
from kfpytorch_ray.testing import LaptopCluster, meanwhile, wait_until
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

def run(function, name):
    try:
        launch(function, name, elastic=Elastic(nnodes=2, max_restarts=0, backend=RayBackend(stop_grace_s=1.0)))
    except LaunchError as error:
        print(type(error).__name__, name)
    for stream in (sys.stdout, sys.stderr):
        # Ray's thread writes to it as well.
        stream.write(f"<over {{name}}>\\n")
        stream.flush()

def waits():
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None and frame.f_code is not Delivery.wait.__code__:
        frame = frame.f_back
    return frame is not None

def run_held(function, name):
    monitors = [pid for pid in all_processes() if "/log_monitor.py" in command(pid) and cluster.address in command(pid)]
    assert monitors
    over = threading.Event()

    def let_go():
        wait_until(lambda: over.is_set() or waits(), "the end of the launch", 120)
        for pid in monitors:
            os.kill(pid, signal.SIGCONT)

    for pid in monitors:
        os.kill(pid, signal.SIGSTOP)
    with meanwhile(let_go):
        run(function, name)
        over.set()

with LaptopCluster(nodes=2) as cluster:
    run_held(succeed, "held-success")
    run_held(fail, "held-failure")
    for time_ in range({TIMES}):
        run(succeed, f"success-{{time_}}")
"""

QUIET = """
import glob, os, sys, tempfile
import ray
from kfpytorch_ray import Elastic, launch

folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
ray.init(address="local", num_cpus=4, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
launch(lambda: print("a line of a rank"), elastic=Elastic(nnodes=1, backend="ray"))
logs = [open(path).read() for path in glob.glob(f"{folder}/session_latest/logs/worker*.out")]
print("passed on", sum(text.count("a line of a rank") for text in logs), sum(text.count(sys.argv[1]) for text in logs))
ray.shutdown()
__import__("shutil").rmtree(folder, ignore_errors=True)
"""


@dataclass
class Output:
    """What a driver printed."""

    stdout: str
    stderr: str


def run_driver(script: str, *arguments: str) -> Output:
    """Run a script by itself to its end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "KFPYTORCH"))}
    variables = {"RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
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
def output() -> Output:
    """Of many launches on the same Ray."""
    return run_driver(DRIVER)


def missing(printed: str, name: str, ranks: set[int]) -> set[tuple[int, int]]:
    """Ranks and numbers of lines that had not been printed when their launch was over."""
    before, over, _ = printed.partition(f"<over {name}>")
    assert over
    came = {(int(rank), int(line)) for rank, line in re.findall(rf"\[rank \d\] <{name} (\d) (\d+)>", before)}
    return {(rank, line) for rank in ranks for line in range(LINES)} - came


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_every_line_is_there_when_a_launch_returns(output: Output, stream: str) -> None:
    """What all ranks print right before they return, each time."""
    printed = getattr(output, stream)
    names = [f"success-{time}" for time in range(TIMES)]
    assert {name: missing(printed, name, {0, 1}) for name in names} == {name: set() for name in names}


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_lines_that_are_late_are_waited_for(output: Output, stream: str) -> None:
    """Ray's log monitors stand still until everything else is over; of a rank that fails, the traceback is last."""
    printed = getattr(output, stream)
    assert "WorkerFailedError held-failure\n" in output.stdout
    assert missing(printed, "held-success", {0, 1}) == set()
    assert missing(printed, "held-failure", {1}) == set()
    if stream == "stderr":
        assert "[rank 1] RuntimeError: held-failure\n" in printed.partition("<over held-failure>")[0]


def test_nobody_sees_how_it_is_known(output: Output) -> None:
    """The marks behind the last lines are not printed, and no line is said to be missing."""
    assert MARK not in output.stdout + output.stderr
    assert "may be missing" not in output.stderr


def test_lines_that_do_not_come_to_the_driver_are_not_waited_for() -> None:
    """With ``ray.init(log_to_driver=False)`` there is nothing to wait for, and nothing is marked."""
    assert "passed on 1 0\n" in run_driver(QUIET, MARK).stdout
