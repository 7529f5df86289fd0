"""Agents that stay warm between launches: taken again, given back, and without a trace of the launch before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from kfpytorch_ray import Elastic, ElasticResult, RayBackend, launch
from kfpytorch_ray.cluster import warm
from kfpytorch_ray.errors import ConfigError, WorkerFailedError
from kfpytorch_ray.testing import running_agents, wait_until
from kfpytorch_ray.testing.processes import all_processes, command, is_running

UNIQUE_S = "607.31"
"""Of a process that nobody else starts."""

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("local_ray")]


@pytest.fixture(autouse=True)
def given_back() -> Iterator[None]:
    """What a test has kept is given back after it."""
    yield
    warm.release_all()
    wait_until(lambda: not running_agents() and free_cpus() == 8, "all agents to end")


def launched(
    fn: Callable[..., Any], *args: Any, nnodes: int = 2, nproc_per_node: int = 1, **options: Any
) -> ElasticResult:
    """An agent costs five seconds of a core: one node is enough where the second would show nothing."""
    backend = RayBackend(**{"keep_warm_s": 600.0, **options})
    return launch(fn, *args, elastic=Elastic(nnodes=nnodes, nproc_per_node=nproc_per_node, backend=backend))


def agents() -> set[int]:
    return {agent.pid for agent in running_agents()}


def files_of_launches() -> list[str]:
    # Unlike pathlib, os.walk passes over what is removed meanwhile.
    walks = [walk for agent in running_agents() for folder in agent.folders for walk in os.walk(folder)]
    names = [name for _, folders, files in walks for name in (*folders, *files)]
    return [name for name in names if name.startswith(("launch-", "round-", "payload"))]


def free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0))


def rank() -> int:
    return int(os.environ["RANK"])


def leave_traces(folder: str) -> tuple[int, int]:
    """Change all that a process can change, and that the next one must not see."""
    import tempfile

    import numpy as np
    import torch

    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")
    os.umask(0)
    sys.modules["left_behind"] = sys
    sys.path.insert(0, "/left/behind")
    torch.manual_seed(7)
    np.random.seed(7)
    torch.set_default_dtype(torch.float64)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    files = [open(os.path.join(folder, f"{rank()}-{number}"), "w") for number in range(3)]  # noqa: SIM115
    subprocess.Popen(["sleep", UNIQUE_S], start_new_session=True)
    tempfile.tempdir = "/left/behind"
    return os.getpid(), len(files)


def look_for_traces() -> dict[str, Any]:
    """What a launch finds, as far as the one before could have changed it."""
    import numpy as np
    import torch

    links = (os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if _is_link(number))
    umask = os.umask(0o22)
    return {
        "environment": os.environ.get("LEFT_BEHIND"),
        "directory": os.getcwd(),
        "umask": umask,
        "module": "left_behind" in sys.modules,
        "path": "/left/behind" in sys.path,
        "dtype": str(torch.get_default_dtype()),
        "random": (torch.initial_seed() == 7, int(np.random.get_state()[1][0]) == 7),
        "handler": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        "files": [link for link in links if os.path.basename(link) in {f"{rank()}-{n}" for n in range(3)}],
        "rounds": os.environ["TORCHELASTIC_RESTART_COUNT"],
    }


def _is_link(number: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{number}")


def fail() -> None:
    msg = "as the user has written it"
    raise ValueError(msg)


def test_the_next_launch_takes_the_agents_and_finds_nothing_of_the_one_before(
    tmp_path: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same agents; environment, modules, files, generators and processes are as after a start."""
    fresh = launched(look_for_traces)
    first = agents()
    assert len(first) == 2
    traces = launched(leave_traces, str(tmp_path))
    assert agents() == first
    found = launched(look_for_traces)
    assert agents() == first
    assert [found[each].return_value for each in range(2)] == [fresh[each].return_value for each in range(2)]
    assert not any(is_running(traces[each].return_value[0]) for each in range(2))
    assert [pid for pid in all_processes() if command(pid) == f"sleep {UNIQUE_S}"] == []
    # Files of the launches before are gone with them.
    wait_until(lambda: not files_of_launches(), "the files of the launches to be removed")

    launched(lambda: print(f"said by {rank()}"), logs="all")
    assert capfd.readouterr().out.count("said by") == 2


def test_a_launch_that_failed_leaves_its_agents_warm() -> None:
    """The next attempt, with the mistake mended, is as quick; rounds are counted anew."""
    with pytest.raises(WorkerFailedError, match="as the user has written it"):
        launched(fail)
    first = agents()
    assert len(first) == 2
    result = launched(rank)
    assert agents() == first
    assert [record.index for record in result.rounds] == [0]
    report = result.report
    assert report is not None
    assert (len(report.rounds), report.failure, report.decks) == (1, None, ())
    assert all(report.started_at < node.started_at < (node.ready_at or 0.0) and node.facts for node in report.nodes)
    assert all(sample.at > report.started_at for of in report.samples for sample in of.samples)
    assert [result[each].return_value for each in range(2)] == [0, 1]


def test_another_shape_has_agents_of_its_own() -> None:
    """What modules may have read while they were imported has to be the same: those of before are given back."""
    launched(rank, nnodes=1)
    first = agents()
    other = launched(lambda: os.environ.get("OTHER"), nnodes=1, env={"OTHER": "x"})
    assert other[0].return_value == "x"
    wait_until(lambda: not agents() & first, "the agents of before to end")
    # Eight CPUs: four workers on each of two nodes need all of them.
    assert launched(rank, nproc_per_node=4)[7].return_value == 7
    wait_until(lambda: free_cpus() == 0, "all CPUs to be seen in use")


def test_the_time_is_up() -> None:
    """Then agents and nodes are given back without anybody's doing."""
    launched(rank, nnodes=1, keep_warm_s=0.5)
    wait_until(lambda: not agents() and free_cpus() == 8, "the agents to be given back")


def test_somebody_waits_for_the_nodes() -> None:
    """Tasks, actors and placement groups alike; one that the nodes could never hold is no reason."""
    impossible = ray.util.placement_group([{"CPU": 64.0}])
    launched(rank, nproc_per_node=3)
    wait_until(lambda: free_cpus() == 2, "six CPUs to be seen in use")
    first = agents()
    assert launched(rank, nproc_per_node=3)[5].return_value == 5
    assert agents() == first

    task = ray.remote(num_cpus=4)(lambda: "done").remote()
    assert ray.get(task, timeout=120) == "done"
    wait_until(lambda: not agents(), "the agents to end")
    ray.util.remove_placement_group(impossible)


def test_an_agent_that_died_meanwhile_is_replaced() -> None:
    """Nobody's budget pays for it: it died in nobody's launch."""
    launched(rank)
    killed = min(agents())
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: not is_running(killed), "the agent to end")
    result = launched(rank, max_node_failures=0)
    assert len(result.rounds) == 1
    assert killed not in agents()
    assert result.report is not None
    assert [bool(node.lost_because) for node in result.report.nodes].count(True) == 1
    assert len(result.report.nodes) == 3


def interrupt(driver: int) -> None:
    import time

    if rank() == 0:
        os.kill(driver, signal.SIGINT)
    time.sleep(600)


def test_an_interrupted_launch_keeps_nothing() -> None:
    """Whoever breaks a launch off wants its nodes back."""
    with pytest.raises(KeyboardInterrupt):
        launched(interrupt, os.getpid(), nnodes=1)
    wait_until(lambda: not agents() and free_cpus() == 8, "the nodes to be given back")


def test_a_driver_that_leaves_takes_its_agents_along() -> None:
    """At the end of a script nothing is left to do for whoever wrote it."""
    script = (
        "import os\n"
        "from kfpytorch_ray import Elastic, RayBackend, launch\n"
        "backend = RayBackend(address='auto', keep_warm_s=600, working_dir='')\n"
        "print(launch(os.getpid, elastic=Elastic(backend=backend))[0].return_value)\n"
    )
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True, timeout=240
    )
    assert int(done.stdout.split()[-1]) > 0
    wait_until(lambda: not agents() and free_cpus() == 8, "its agents to end")


TWO_JOBS = """
import os

import ray

from kfpytorch_ray import Elastic, NodeLostError, RayBackend, launch


def launched():
    ray.init(address=os.environ["RAY_ADDRESS"])
    return launch(os.getpid, elastic=Elastic(backend=RayBackend(keep_warm_s=600)))


first = launched()
print(first[0].return_value > 0)
ray.shutdown()
unread = launched()
ray.shutdown()
print(launched()[0].return_value > 0)
try:
    unread[0]
except NodeLostError as error:
    print(str(error).splitlines()[1])
"""


def test_a_driver_that_leaves_its_ray_and_joins_it_again_has_new_agents() -> None:
    """Those of before ended with its job; a call to one of them would abort the interpreter."""
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-c", TWO_JOBS],
        check=False,
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    why = f"Why: This process has left the Ray at {address}, and results go with its job there."
    assert [line for line in done.stdout.splitlines() if line in ("True", why)] == ["True", "True", why]


def test_preloaded_modules_are_there_and_dangerous_ones_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker finds them imported; what starts threads is no agent's fault but a mistake in the options."""
    (tmp_path / "heavy_module.py").write_text("")
    (tmp_path / "busy_module.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, name='busy', daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert launched(lambda: "heavy_module" in sys.modules, nnodes=1, preload=("heavy_module",))[0].return_value
    assert not launched(lambda: "heavy_module" in sys.modules, nnodes=1)[0].return_value
    with pytest.raises(ConfigError, match=r"preload: 'busy_module' starts threads while it is imported \(busy\)"):
        launched(rank, nnodes=1, preload=("heavy_module", "busy_module"))
