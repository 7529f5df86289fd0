"""A zygote without Ray: agents that fork their server from it, and what becomes of both."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kfpytorch_ray.cluster.zygote import Zygote
from kfpytorch_ray.heartbeat import MARK_VARIABLE
from kfpytorch_ray.testing import wait_until
from kfpytorch_ray.testing.processes import all_processes, command, environment, parent
from kfpytorch_ray.testing.processes import is_running as runs

until = partial(wait_until, what="what the test asks for", timeout_s=60)

AGENT = """
import json, logging, os, sys
from kfpytorch_ray.cluster.forkserver import ForkServer
from kfpytorch_ray.cluster.zygote import Offer
from kfpytorch_ray.heartbeat import MARK_VARIABLE

logging.basicConfig(level=logging.INFO)
folder, address, fingerprint, prepare = sys.argv[1:]
exec(prepare)
os.environ[MARK_VARIABLE] = os.pathsep.join([str(os.getpid()), folder])
server = ForkServer(("colorsys",), folder, Offer(address, fingerprint))
print("asked", flush=True)
started = []
for word in sys.stdin:
    started.append(server.start_connected("tell", "main", word.strip()))
    print(json.dumps(started[-1][0].recv()), flush=True)
"""
"""Stands for an agent: for each line that it reads it starts a process by its fork server."""

TELL = """
import os, resource, sys

def main(connection, given):
    connection.send({
        "given": given,
        "pid": os.getpid(),
        "server": os.getppid(),
        "preloaded": "colorsys" in sys.modules,
        "directory": os.getcwd(),
        "own": os.environ.get("RAY_OWN"),
        "internal": os.environ.get("KFPYTORCH_RAY_PRELOAD"),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "out_of_memory_score": int(open("/proc/self/oom_score_adj").read()),
    })
    connection.poll(None)
"""


class Agent:
    """The other end of its process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.errors: list[str] = []

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start(self, word: str) -> dict[str, Any]:
        """What a process says that it starts, and what /proc shows of it and its server."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        told: dict[str, Any] = json.loads(self.hear())
        return told


@pytest.fixture
def here(short_folder: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for all that is made; agents find the module there that they run."""
    folder = Path(short_folder)
    (folder / "tell.py").write_text(TELL)
    monkeypatch.setattr("tempfile.tempdir", short_folder)
    return folder


def around(folder: Path, **more: str) -> dict[str, str]:
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    # pytest's own variable changes while a test runs.
    own = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return {**own, "PYTHONPATH": path, "TMPDIR": str(folder), **more}


@pytest.fixture
def zygote(here: Path) -> Iterator[Zygote]:
    with contextlib.closing(Zygote(around(here), ("colorsys",))) as made:
        yield made


def process_of(zygote: Zygote) -> int:
    offer = zygote.offer()
    assert offer is not None
    folder = os.path.dirname(offer.address)
    # Its servers have its command line.
    return the_one(lambda pid: parent(pid) == os.getpid() and f"{folder!r}" in command(pid))


def the_one(is_it: Callable[[int], bool]) -> int:
    """A process that is about to be there: before its exec a child has its parent's command line."""
    found: set[int] = set()

    def there() -> bool:
        found.update(filter(is_it, all_processes()))
        return bool(found)

    until(there)
    (pid,) = found
    return pid


@contextlib.contextmanager
def agent_of(zygote: Zygote, folder: Path, name: str = "agent", prepare: str = "", **more: str) -> Iterator[Agent]:
    """An agent that has asked the zygote; ``prepare`` is its code before."""
    offer = zygote.offer()
    assert offer is not None
    place = folder / name
    place.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(place), offer.address, offer.fingerprint, prepare],
        env=around(folder, **more),
        cwd=place,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        agent = Agent(process)
        assert agent.hear() == "asked"
        yield agent
    finally:
        process.kill()
        process.communicate()
        mark = f"{process.pid}{os.pathsep}"
        # With its agent a server ends, and everything that was started by it.
        until(lambda: not any(environment(pid).get(MARK_VARIABLE, "").startswith(mark) for pid in all_processes()))


def test_each_agent_gets_the_server_that_it_would_have_started(zygote: Zygote, here: Path) -> None:
    """With its environment, folder and mark, and the modules of the zygote, which is nobody's server."""
    with agent_of(zygote, here, "one", RAY_OWN="1") as one, agent_of(zygote, here, "other", RAY_OWN="2") as other:
        for agent, name, own in ((one, "one", "1"), (other, "other", "2")):
            told = agent.start(name)
            assert (told["given"], told["own"], told["preloaded"]) == (name, own, True)
            assert told["directory"] == str(here / name)
            assert parent(told["server"]) == process_of(zygote)
            for pid in (told["pid"], told["server"]):
                assert environment(pid)[MARK_VARIABLE] == os.pathsep.join([str(agent.process.pid), str(here / name)])
    assert MARK_VARIABLE not in environment(process_of(zygote))


def test_the_server_has_what_ray_gives_its_workers(zygote: Zygote, here: Path) -> None:
    """More open files than a shell, and the first place among those that are killed when memory runs out."""
    process_of(zygote)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    as_ray_does = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft - 10}, {hard}))
open("/proc/self/oom_score_adj", "w").write("500")
"""
    with agent_of(zygote, here, prepare=as_ray_does, KFPYTORCH_RAY_PRELOAD="{}") as agent:
        told = agent.start("first")
        assert parent(told["server"]) == process_of(zygote)
    assert (told["open_files"], told["out_of_memory_score"], told["internal"]) == (soft - 10, 500, None)


def test_what_an_import_says_and_starts(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log has its words when the zygote ends, and nothing that it has started stays."""
    (here / "starter.py").write_text(
        "import subprocess, sys, warnings\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        "warnings.warn(f'started {child.pid}')\n"
    )
    caplog.set_level(logging.INFO, "kfpytorch_ray")
    with contextlib.closing(Zygote(around(here), ("starter",))) as zygote:
        output = here / os.path.dirname(getattr(zygote.offer(), "address", "")) / "output"
        until(lambda: "started" in output.read_text())
    (said,) = caplog.messages
    child = int(said.partition("UserWarning: started ")[2].split()[0])
    until(lambda: not runs(child))


def test_an_agent_with_another_environment_imports_for_itself(zygote: Zygote, here: Path) -> None:
    """Libraries read variables while they are imported."""
    with agent_of(zygote, here, OMP_NUM_THREADS="7") as agent:
        told = agent.start("alone")
        assert parent(told["server"]) == agent.process.pid
        assert told["preloaded"]


@pytest.mark.parametrize("when", ["before it is asked", "before it answers"])
def test_an_agent_can_do_without_the_zygote(when: str, zygote: Zygote, here: Path) -> None:
    """One that dies costs the time that it would have saved."""
    pid = process_of(zygote)
    os.kill(pid, signal.SIGKILL if when == "before it is asked" else signal.SIGSTOP)
    until(lambda: not runs(pid) or when == "before it answers")
    with agent_of(zygote, here) as agent:
        os.kill(pid, signal.SIGKILL)
        told = agent.start("alone")
        assert parent(told["server"]) == agent.process.pid
        assert told["preloaded"]


def test_no_server_with_half_a_mark(zygote: Zygote, here: Path) -> None:
    """A mark for which there is no room would not be found; the agent imports for itself."""
    with agent_of(zygote, here, os.sep.join(["a" * 200] * 6)) as agent:
        told = agent.start("alone")
        assert parent(told["server"]) == agent.process.pid


def test_a_zygote_whose_status_somebody_else_has_taken_is_closed_like_any_other(zygote: Zygote, here: Path) -> None:
    """As where the driver's program waits for any child: neither its folder stays, nor what it was held by."""
    before = pipes()
    pid = process_of(zygote)
    assert pipes() > before
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    zygote.close()
    assert pipes() == before
    assert not list(here.glob("*zygote*"))


def pipes() -> set[str]:
    links = (Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return {target for link in links if link.is_symlink() and (target := os.readlink(link)).startswith("pipe:")}


def test_servers_outlive_the_zygote_that_is_no_longer_needed(zygote: Zygote, here: Path) -> None:
    """Agents may stay warm when their launch is over."""
    pid = process_of(zygote)
    with agent_of(zygote, here) as agent:
        server = agent.start("first")["server"]
        zygote.close()
        assert not runs(pid)
        assert not list(here.glob("*zygote*"))
        assert agent.start("second")["server"] == server


def test_without_room_for_a_socket_agents_import_for_themselves(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path has a bound; nothing is left of the attempt."""
    folder = here / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with contextlib.closing(Zygote(around(here), ())) as made:
        assert made.offer() is None
        assert not list(folder.iterdir())


def test_its_folder_is_its_users(zygote: Zygote, here: Path) -> None:
    """Whoever could reach the socket could have code run."""
    assert not list(here.glob("*zygote*"))
    process_of(zygote)
    (folder,) = here.glob("*zygote*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


DRIVER = """
import signal, sys, time
from kfpytorch_ray.cluster.zygote import Zygote
signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
import os
print(Zygote(dict(os.environ), ("colorsys",)).offer().address, flush=True)
while True:
    time.sleep(1)
"""


def test_it_ends_with_its_driver_and_not_by_ctrl_c(here: Path) -> None:
    """An interrupt in the terminal reaches the whole group of the driver; a driver may be killed."""
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER], env=around(here), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as driver:
        assert driver.stdout is not None
        folder = os.path.dirname(driver.stdout.readline().strip())
        zygote = the_one(lambda pid: f"{folder!r}" in command(pid))
        os.killpg(driver.pid, signal.SIGINT)
        assert driver.stdout.readline().strip() == "interrupted"
        assert runs(zygote)
        driver.kill()
    until(lambda: not runs(zygote))
    assert not os.path.exists(folder)
