"""Finding what runs, breaking it, and seeing what is left: on processes that stand for agents and ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from kfpytorch_ray.heartbeat import MARK_VARIABLE, PAGE_NAME, PAGE_VARIABLE, HeartbeatPage
from kfpytorch_ray.testing import (
    FaultError,
    Leftovers,
    find_agent,
    kill_agent,
    kill_rank,
    left_after,
    meanwhile,
    nothing_left,
    reached,
    running,
    running_agents,
    running_ranks,
    slow_rank,
    stop_rank,
    wait_until,
)
from kfpytorch_ray.testing.janitor import MARK_VARIABLE as CLUSTER_MARK
from kfpytorch_ray.testing.processes import descendants, is_running, is_stopped
from kfpytorch_ray.testing.starting import TRIES, start_ray

ADDRESS = "203.0.113.7:6379"
"""Of a cluster that no other process on this machine belongs to."""

RAYLET = """
import os, subprocess, sys
agent = subprocess.Popen([sys.executable, "-c", sys.argv[2], *sys.argv[3:]], stdout=subprocess.PIPE, text=True)
print(agent.stdout.readline(), end="", flush=True)
import signal; signal.pause()
"""
AGENT = f"""
import os, subprocess, sys
folder, ranks = sys.argv[1], int(sys.argv[2])
mark = {{"{MARK_VARIABLE}": os.pathsep.join([str(os.getpid()), folder])}}
workers = [subprocess.Popen(["sleep", "600"], env={{**os.environ, **mark}}) for _ in range(ranks)]
print(os.getpid(), *(worker.pid for worker in workers), flush=True)
import signal; signal.pause()
"""


@dataclass
class Machine:
    """A node of a cluster, with an agent and its workers."""

    raylet: subprocess.Popen[str]
    agent: int
    workers: list[int]
    page: HeartbeatPage


@pytest.fixture
def temp_dir(tmp_path: Path) -> str:
    return str(tmp_path)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """Node rank 1 of a round with two workers on each node."""
    folder = tmp_path / "kfpytorch_ray-0"
    folder.mkdir()
    command = [sys.executable, "-c", RAYLET, f"--gcs-address={ADDRESS}", AGENT, str(folder), "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as raylet:
        assert raylet.stdout is not None
        agent, *workers = map(int, raylet.stdout.readline().split())
        with HeartbeatPage.create(folder / PAGE_NAME, 2) as page:
            page.start_round(4)
            for local_rank, worker in enumerate(workers):
                page.join(local_rank, 2 + local_rank, worker)
            try:
                yield Machine(raylet, agent, workers, page)
            finally:
                for process in [*descendants(raylet.pid), agent, *workers, raylet.pid]:
                    if is_running(process):
                        os.kill(process, signal.SIGKILL)


def tell_step(page_file: Path, local_rank: int, step: int) -> None:
    """A worker makes progress."""
    code = "import sys; from kfpytorch_ray.heartbeat import progress; progress(int(sys.argv[1]))"
    variables = {PAGE_VARIABLE: f"{page_file}:{local_rank}"}
    subprocess.run([sys.executable, "-c", code, str(step)], env={**os.environ, **variables}, check=True)


def test_the_mark_is_the_agents() -> None:
    """The ground floor may not import it from the cluster floor."""
    assert running.MARK_VARIABLE == MARK_VARIABLE


def test_agents_and_ranks_are_found(machine: Machine, tmp_path: Path) -> None:
    """By their cluster's address: with their processes, ranks, round and step."""
    (agent,) = running_agents(ADDRESS)
    assert (agent.pid, agent.raylet) == (machine.agent, machine.raylet.pid)
    first, second = running_ranks(ADDRESS)
    assert (first.rank, first.local_rank, first.node_rank, first.round_index, first.step) == (2, 0, 1, 4, None)
    assert [first.pid, second.pid] == machine.workers
    assert find_agent(1, address=ADDRESS) == agent
    assert not reached(1, 2, ADDRESS)
    for local_rank in range(2):
        tell_step(tmp_path / "kfpytorch_ray-0" / PAGE_NAME, local_rank, 1)
    assert reached(1, 2, ADDRESS)
    assert not reached(2, 2, ADDRESS)
    assert not reached(1, 3, ADDRESS)
    assert running_agents("203.0.113.8:6379") == ()
    machine.page.end_round()
    assert running_ranks(ADDRESS) == ()


def test_what_does_not_run_cannot_be_broken(machine: Machine) -> None:
    """The error says what there is."""
    with pytest.raises(FaultError, match=r"Rank 3000 is not running[\s\S]*now: 2, 3\.[\s\S]*Fix:"):
        kill_rank(3000, address=ADDRESS)
    with pytest.raises(FaultError, match=r"node rank 7[\s\S]*now: 1;[\s\S]*Fix:"):
        kill_agent(7, address=ADDRESS)


def test_two_launches_cannot_be_told_apart(machine: Machine) -> None:
    """Rather than break somebody else's."""
    machine.page.join(1, 2, machine.workers[1])
    with pytest.raises(FaultError, match="not one process"):
        kill_rank(2, address=ADDRESS)


def test_a_rank_and_an_agent_are_killed(machine: Machine) -> None:
    """And nothing else."""
    assert kill_rank(3, address=ADDRESS).pid == machine.workers[1]
    wait_until(lambda: not is_running(machine.workers[1]), "the rank to end")
    assert [rank.rank for rank in running_ranks(ADDRESS)] == [2]
    assert kill_agent(1, address=ADDRESS).pid == machine.agent
    wait_until(lambda: not is_running(machine.agent), "the agent to end")
    assert is_running(machine.workers[0])


def test_a_rank_is_stopped_for_a_while(machine: Machine) -> None:
    """It runs again afterwards, also when the block raises."""
    with pytest.raises(ZeroDivisionError), stop_rank(2, address=ADDRESS) as rank:  # noqa: PT012
        assert is_stopped(rank.pid)
        raise ZeroDivisionError
    wait_until(lambda: not is_stopped(machine.workers[0]), "the rank to run")


def test_a_rank_is_slowed_down(machine: Machine) -> None:
    """It is stopped and runs again, in turn, and runs afterwards."""
    with slow_rank(2, share=0.5, address=ADDRESS) as rank:
        for _ in range(2):
            wait_until(lambda: is_stopped(rank.pid), "the rank to stop")
            wait_until(lambda: not is_stopped(rank.pid), "the rank to run")
    assert not is_stopped(rank.pid)
    with pytest.raises(ValueError, match=r"share=1\.5"), slow_rank(2, share=1.5, address=ADDRESS):
        pass


def test_leftovers_are_listed(machine: Machine, temp_dir: str) -> None:
    """Processes with their command line, and folders; nothing once all of it is gone."""
    there = Leftovers.now(temp_dir)
    assert {int(process.split(":")[0]) for process in there.processes} == set(machine.workers)
    # Shared memory has one folder for the whole machine.
    assert {file for file in there.files if file.startswith(temp_dir)} == {f"{temp_dir}/kfpytorch_ray-0"}
    assert len(there) == len(there.processes) + len(there.files)
    assert "sleep 600" in str(there)
    assert not there - there
    assert str(there - there) == "nothing"
    for worker in machine.workers:
        os.kill(worker, signal.SIGKILL)
    assert len(left_after(Leftovers(files=there.files), temp_dir)) == 0


def test_leftovers_of_others_are_left_out(machine: Machine, tmp_path: Path) -> None:
    """Two clusters on one machine do not see each other's."""
    other = tmp_path / "other"
    other.mkdir()
    assert not Leftovers.now(str(other)).processes


def test_agents_of_another_ray_are_left_out(temp_dir: str) -> None:
    """Of one that somebody on this machine has started without a word of temporary folders."""
    raylet = "exec -a raylet bash -c '(exec -a ray::ElasticAgent sleep 600) & echo $!; wait'"
    environment = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    process = subprocess.Popen(["bash", "-c", raylet], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    agent = int(process.stdout.readline())
    try:
        wait_until(lambda: any(str(agent) in found for found in Leftovers.now().processes), "the agent")
        assert not any(str(agent) in found for found in Leftovers.now(temp_dir).processes)
    finally:
        process.kill()
        process.wait()
    # Its raylet has died: it may be anybody's.
    assert any(str(agent) in found for found in Leftovers.now(temp_dir).processes)
    os.kill(agent, signal.SIGKILL)


def test_something_left_is_an_error(temp_dir: str) -> None:
    """It is named; what was there before is not."""
    Path(temp_dir, "kfpytorch_ray-before").mkdir()
    with pytest.raises(AssertionError, match="kfpytorch_ray-after"), nothing_left(temp_dir, timeout_s=0.1):
        Path(temp_dir, "kfpytorch_ray-after").mkdir()
    with nothing_left(temp_dir):
        pass


def test_waiting_ends() -> None:
    """With the condition, or with an error that says what was waited for."""
    wait_until(lambda: True, "nothing")
    with pytest.raises(TimeoutError, match=r"0\.1 s for: a miracle"):
        wait_until(lambda: False, "a miracle", timeout_s=0.1)


def test_something_runs_meanwhile() -> None:
    """The block and the function see each other."""
    seen = []

    def act() -> None:
        wait_until(lambda: "block" in seen, "the block")
        seen.append("act")

    with meanwhile(act):
        seen.append("block")
        wait_until(lambda: "act" in seen, "the function")
    assert seen == ["block", "act"]


def test_waiting_for_what_does_not_happen_ends_with_the_block() -> None:
    """A fault that was never injected is an error, not a test that passes."""
    with pytest.raises(FaultError, match="a miracle"), meanwhile(lambda: wait_until(lambda: False, "a miracle")):
        pass


def test_a_failure_meanwhile_ends_the_block() -> None:
    """A launch that waits for a fault which could not be injected would wait for ever."""

    def act() -> None:
        raise ZeroDivisionError

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), meanwhile(act):
        time.sleep(100)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_blocks_own_error_comes_first() -> None:
    """It is what a test expects of the launch."""
    with pytest.raises(ValueError, match="launch"), meanwhile(lambda: wait_until(lambda: False, "a miracle")):
        raise ValueError("launch")


def test_a_cluster_ends_with_its_maker(tmp_path: Path) -> None:
    """A process that dies without leaving its cluster takes all of it along, also what was given a title."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    code = f"""
import os, signal, subprocess, sys
from kfpytorch_ray.testing.janitor import janitor
with janitor(sys.argv[1]):
    member = subprocess.Popen(["sh", "-c", "env -i sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True,
                              env={{**os.environ, "{CLUSTER_MARK}": sys.argv[1]}}, start_new_session=True)
    print(member.pid, member.stdout.readline(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, check=False)
    member, below = map(int, done.stdout.split())
    wait_until(lambda: not folder.exists(), "the janitor")
    assert not is_running(member)
    assert not is_running(below)


def test_ray_is_started_again_and_what_was_begun_is_killed() -> None:
    """A start that fails leaves nothing of Ray's behind; what else this process has started goes on."""
    name_a_file_of_rays = f"{Path(ray.__file__).parent}/raylet"
    begun: list[subprocess.Popen[bytes]] = []
    undone: list[int] = []

    def start() -> str:
        begun.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", name_a_file_of_rays]))
        begun.append(subprocess.Popen(["sleep", "600"]))
        if len(undone) < failures:
            raise RuntimeError("timed out during startup")
        return "started"

    try:
        failures = TRIES - 1
        assert start_ray(start, lambda: undone.append(len(begun))) == "started"
        assert undone == [2, 4]
        assert [process.poll() is None for process in begun[1::2]] == [True] * TRIES
        assert [process.wait(60) for process in begun[0:-2:2]] == [-signal.SIGKILL] * failures
        assert begun[-2].poll() is None
        failures = 3 * TRIES
        with pytest.raises(RuntimeError, match="during startup"):
            start_ray(start, lambda: undone.append(len(begun)))
        assert len(undone) == 2 * TRIES - 1
        assert begun[-2].wait(60) == -signal.SIGKILL
    finally:
        for process in begun:
            process.kill()
            process.wait()
