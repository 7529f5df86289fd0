"""An agent without Ray: a plain class in a process of its own, with real workers."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from kfpytorch_ray.cluster.output_spool import Cursor
from kfpytorch_ray.cluster.pickling import load_parts
from kfpytorch_ray.cluster.protocol import (
    AgentSetup,
    NodePulse,
    NodeReport,
    RoundAssignment,
    SupervisorLostError,
)
from kfpytorch_ray.cluster.server_modules import SERVER_MODULES, users_modules
from kfpytorch_ray.cluster.spool import parts_of
from kfpytorch_ray.cluster.stacks import find_py_spy
from kfpytorch_ray.cluster.zygote import Zygote
from kfpytorch_ray.heartbeat import MARK_VARIABLE, PAGE_NAME, HeartbeatPage
from kfpytorch_ray.payload import dump_payload
from kfpytorch_ray.plan import Contract, FlyteContext
from kfpytorch_ray.report.data import NodeFacts, RankDeck
from kfpytorch_ray.results import Outcome, RankRecord
from kfpytorch_ray.testing import wait_until
from kfpytorch_ray.testing.processes import all_processes, environment
from kfpytorch_ray.testing.processes import is_running as runs

LAUNCH = "one"
ADDRESS = "127.0.0.1"

until = partial(wait_until, what="what the test asks for", timeout_s=60)

HOST = """
import os, sys, threading
from multiprocessing.connection import Connection
from kfpytorch_ray.cluster.agent import ElasticAgent

connection = Connection(int(sys.argv[1]))
agent = ElasticAgent(*connection.recv())
sending = threading.Lock()

def serve(number, method, args):
    try:
        answer = True, getattr(agent, method)(*args)
    except BaseException as error:
        answer = False, error
    with sending:
        connection.send((number, *answer))

while True:
    try:
        request = connection.recv()
    except EOFError:
        os._exit(0)
    threading.Thread(target=serve, args=request, daemon=True).start()
"""
"""Stands for Ray's actor: calls arrive at any time, each has a thread."""


@dataclass
class Agent:
    """The other end of an agent's process."""

    process: subprocess.Popen[bytes]
    connection: Connection
    folder: Path
    names: set[str] = field(default_factory=set)
    rounds: Iterator[int] = field(default_factory=itertools.count)
    facts: NodeFacts = field(default_factory=NodeFacts)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _answers: dict[int, Future[Any]] = field(default_factory=dict)

    def start(self, method: str, *args: Any) -> Future[Any]:
        number = next(self._numbers)
        answer = self._answers[number] = Future()
        self.connection.send((number, method, args))
        return answer

    def call(self, method: str, *args: Any) -> Any:
        return self.start(method, *args).result(180)

    def listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, good, value = self.connection.recv()
                if good:
                    self._answers[number].set_result(value)
                else:
                    self._answers[number].set_exception(value)

    def start_round(self, *functions: str) -> tuple[int, Future[NodeReport]]:
        """One round with these bodies of functions, by rank."""
        index = next(self.rounds)
        for old in self.folder.glob("said-*"):
            old.unlink()
        for rank, body in enumerate(functions):
            (self.folder / f"rank-{rank}").write_text(textwrap.dedent(body))
        port = self.call("open_store")
        return index, self.start("run_round", RoundAssignment(index, 0, 0, 1, ADDRESS, port))

    def run(self, *functions: str) -> tuple[RankRecord, ...]:
        """The same, to its end."""
        ranks: tuple[RankRecord, ...] = self.start_round(*functions)[1].result(60).ranks
        return ranks

    def said(self, name: str) -> str:
        """What a worker has written to a file of this name, once it is there."""
        path = self.folder / f"said-{name}"
        until(path.exists)
        return path.read_text()

    def marked(self) -> set[int]:
        """What it has started: its fork server, though it be a zygote's child, and everything that comes of that."""
        mark = f"{self.process.pid}{os.pathsep}"
        return {pid for pid in all_processes() if environment(pid).get(MARK_VARIABLE, "").startswith(mark)}

    def page(self) -> Path:
        (path,) = self.folder.glob(f"kfpytorch_ray-*/{PAGE_NAME}")
        return path

    def folders(self) -> set[Path]:
        """What there is of its folders: one of its name wherever it has any."""
        self.names |= {path.name for path in self.folder.glob("kfpytorch_ray-*")}
        paths = {Path(parent, name) for parent in (self.folder, "/dev/shm") for name in self.names}
        return {path for path in paths if path.exists()}


def stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X", "0"]


def call_of_a_file(folder: str) -> Callable[[], Any]:
    """What every rank runs: the body of a function that lies in a file, so that one agent serves many tests."""

    def call() -> Any:
        import os
        import textwrap
        import time
        from pathlib import Path

        rank = os.environ["RANK"]
        body = Path(folder, f"rank-{rank}").read_text()
        head = "import os, signal, socket, subprocess, sys, time\nimport kfpytorch_ray\n"

        def say(name: str, text: object) -> None:
            partial = Path(folder, f"saying-{name}")
            partial.write_text(str(text))
            partial.rename(Path(folder, f"said-{name}"))

        def hear(name: str) -> None:
            while not Path(folder, f"said-{name}").exists():
                time.sleep(0.01)

        names: dict[str, Any] = {"say": say, "hear": hear, "rank": int(rank)}
        exec(f"{head}def function():\n{textwrap.indent(body, '    ')}", names)
        return names["function"]()

    return call


@contextlib.contextmanager
def agent_in(folder: Path, *, by_zygote: bool = False, **changes: Any) -> Iterator[Agent]:
    """An agent that has loaded everything; its fork server is its own, or comes from a zygote of this process."""
    payload = dump_payload(call_of_a_file(str(folder)))
    settings: dict[str, Any] = {
        "name": "test",
        "run_id": "run",
        "nproc_per_node": 2,
        "contract": Contract.TORCHRUN,
        "environment": {},
        "sys_path": tuple(sys.path),
        "working_directory": str(folder),
        "preload": (),
        "flyte": FlyteContext(str(folder)),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
        "driver_address": ADDRESS,
        "max_restarts": 0,
        "monitor_interval_s": 60.0,
        "stop_grace_s": 10.0,
        "silence_timeout_s": 3600.0,
        "launch_id": LAUNCH,
    }
    setup = AgentSetup(**{**settings, **changes})
    # Not as this shell may have it: what is printed is to arrive all the same.
    around = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"TMPDIR": str(folder)}
    zygote = Zygote({**around, **setup.environment, **users_modules(setup)}, SERVER_MODULES)
    ours, theirs = Pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", HOST, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=around
    )
    theirs.close()
    agent = Agent(process, ours, folder)
    listener = threading.Thread(target=agent.listen, daemon=True)
    listener.start()
    try:
        ours.send((setup, ADDRESS, zygote.offer() if by_zygote else None))
        agent.facts = agent.call("load", setup, payload)
        assert len(agent.folders()) == 2
        yield agent
    finally:
        process.kill()
        process.wait()
        listener.join()
        ours.close()
        zygote.close()
        until(lambda: not agent.folders())


@pytest.fixture(scope="module", params=[False, True], ids=["own server", "by zygote"])
def agent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """One for all tests that leave it alive."""
    folder = tmp_path_factory.mktemp("agent")
    with agent_in(folder, by_zygote=request.param, max_log_bytes=2**16) as started:
        yield started


def value_of(spooled: Any) -> Any:
    return load_parts(parts_of(spooled)).return_value


FOREVER = "time.sleep(600)"


def test_results_come_after_a_first_element_that_is_true(agent: Agent) -> None:
    """It lets a caller ask whether the call failed without fetching a result; each result is handed out once."""
    one, other = agent.run("return rank * 10", "return rank * 10")
    assert (one.outcome, other.outcome) == (Outcome.SUCCEEDED, Outcome.SUCCEEDED)
    first, *results = agent.call("collect")
    assert first is True
    assert [value_of(result) for result in results] == [0, 10]
    assert agent.call("collect") == (True, None, None)


def test_records_say_how_far_a_rank_came(agent: Agent) -> None:
    """Whether it told of progress and the last step that it told; the next round knows nothing of it."""
    one, other = agent.run("kfpytorch_ray.progress(3); kfpytorch_ray.progress(4)", "return None")
    assert (one.progressed, one.step) == (True, 4)
    assert (other.progressed, other.step) == (False, None)
    assert {(rank.progressed, rank.step) for rank in agent.run("return None", "return None")} == {(False, None)}


def test_what_ranks_use_and_when_they_ran_comes_home(agent: Agent) -> None:
    """Their memory by pulses while they run, and with the report what no pulse has said; times in their order."""
    index, running = agent.start_round(
        "held = bytearray(150 * 2**20); say('held', 1); hear('go')", "hear('go'); print('last words')"
    )
    agent.said("held")
    seen: list[Any] = []

    def held() -> bool:
        seen.extend(agent.call("pulse").samples)
        return any(rank == 0 and sample.memory_bytes > 150 * 2**20 for rank, sample in seen)

    until(held)
    (agent.folder / "said-go").touch()
    report = running.result(60)
    seen.extend(report.samples)
    assert {rank for rank, _ in seen} == {0, 1}
    assert {sample.round_index for _, sample in seen} == {index}
    assert len(seen) == len({(rank, sample.at) for rank, sample in seen})
    for rank in report.ranks:
        assert rank.started_at < rank.called_at < rank.ended_at
        of_rank = [sample.at for number, sample in seen if number == rank.rank]
        assert of_rank == sorted(of_rank)
        assert rank.started_at < of_rank[0]
        assert of_rank[-1] < rank.ended_at
    assert report.ranks[1].log_tail == ("last words",)


def test_rank_0s_decks_come_home_where_it_fails(agent: Agent) -> None:
    """A rank that returns brings them with its result; the other ranks' are not asked for."""
    draw = "import flytekit; flytekit.Deck('curve', f'<p>{rank}</p>'); "
    _, failed = agent.start_round(f"{draw}raise ValueError('oh')", f"{draw}time.sleep(600)")
    assert failed.result(60).decks == (RankDeck(0, "curve", "<p>0</p>"),)
    _, returned = agent.start_round(f"{draw}return 1", f"{draw}return 1")
    assert returned.result(60).decks == ()


def test_decks_of_all_ranks_come_home_where_they_are_asked_for(tmp_path: Path) -> None:
    """Of one that raised, and of one that was stopped for it and could write nothing by then."""
    draw = "import flytekit; flytekit.Deck('curve', f'<p>{rank}</p>'); "
    with agent_in(tmp_path, decks="all") as agent:
        wait = f"from pathlib import Path\nwhile not [*Path({str(tmp_path)!r}).rglob('decks-0')]: pass"
        _, failed = agent.start_round(f"{draw}time.sleep(600)", f"{draw}\n{wait}\nraise ValueError('oh')")
        report = failed.result(60)
    assert [rank.outcome for rank in report.ranks] == [Outcome.STOPPED, Outcome.RAISED]
    assert report.decks == (RankDeck(0, "curve", "<p>0</p>"), RankDeck(1, "curve", "<p>1</p>"))


def test_exit_handlers_come_after_the_last_thread(agent: Agent) -> None:
    """As at the end of every interpreter: a thread may still upload from a folder that a handler removes."""
    agent.run(
        """
        import atexit, threading
        def upload():
            threading.main_thread().join()
        thread = threading.Thread(target=upload)
        thread.start()
        atexit.register(lambda: say('thread', thread.is_alive()))
        """,
        "return None",
    )
    assert agent.said("thread") == "False"


def test_who_may_look_at_a_rank_is_above_agent_and_supervisor(agent: Agent, request: pytest.FixtureRequest) -> None:
    """Both start py-spy."""
    agent.run(
        f"""
        from kfpytorch_ray.cluster.stacks import common_ancestor
        say('common', common_ancestor(os.getpid(), {agent.process.pid}))
        """,
        "return None",
    )
    by_zygote = "by zygote" in request.node.callspec.id
    assert agent.said("common") == str(os.getpid() if by_zygote else agent.process.pid)


@pytest.mark.parametrize("by_zygote", [False, True])
@pytest.mark.parametrize("orderly", [False, True])
def test_shared_memory_of_a_killed_rank_is_removed(orderly: bool, by_zygote: bool, tmp_path: Path) -> None:
    """By multiprocessing's tracker, which outlives all that is killed for its mark."""
    with agent_in(tmp_path, by_zygote=by_zygote, nproc_per_node=1) as agent:
        agent.run(
            """
            from multiprocessing.shared_memory import SharedMemory
            block = SharedMemory(create=True, size=100)
            say('block', block.name)
            os.kill(os.getpid(), signal.SIGKILL)
            """
        )
        block = Path("/dev/shm", agent.said("block"))
        assert block.exists()
        if orderly:
            agent.call("shutdown")
            agent.call("remove_files")
            assert not block.exists()
    until(lambda: not block.exists())


def test_an_agent_says_what_its_node_is(agent: Agent) -> None:
    """When it has loaded everything."""
    assert agent.facts.cpus >= 1
    assert "torch" in dict(agent.facts.versions)


def test_a_rank_that_leaves_when_it_is_asked_to_has_not_succeeded(agent: Agent) -> None:
    """It has been told, so what it returns is no result; one that was not told has finished."""
    listening = """
        while not kfpytorch_ray.stop_requested():
            say(f"asked-{rank}", "")
            time.sleep(0.01)
        return "early"
    """
    index, ending = agent.start_round(listening, "say('deaf', ''); return 'done'")
    agent.said("asked-0")
    assert not agent.call("request_stop", LAUNCH, index + 1)
    assert agent.call("request_stop", LAUNCH, index)
    early, done = ending.result(60).ranks
    assert (early.outcome, early.message) == (Outcome.STOPPED, "left after it was asked to stop")
    assert done.outcome is Outcome.SUCCEEDED
    assert not agent.call("request_stop", LAUNCH, index)


def test_nobody_listens_who_has_not_asked(agent: Agent) -> None:
    """Then there is nobody to wait for: the controller stops the round at once."""
    index, ending = agent.start_round(f"say('up-0', ''); {FOREVER}", f"say('up-1', ''); {FOREVER}")
    agent.said("up-0")
    agent.said("up-1")
    assert not agent.call("request_stop", LAUNCH, index)
    agent.call("stop_round", LAUNCH, index)
    assert {rank.outcome for rank in ending.result(60).ranks} == {Outcome.STOPPED}


def test_a_pulse_is_answered_while_everything_else_waits(agent: Agent) -> None:
    """It says which round runs, how long nobody made progress, and whether a worker listens."""
    idle: NodePulse = agent.call("pulse")
    assert (idle.round_index, idle.idle_s, idle.listening) == (None, 0.0, False)
    index, ending = agent.start_round(
        f"kfpytorch_ray.stop_requested(); say('pulse', ''); {FOREVER}",
        "while time.sleep(0.01) is None: kfpytorch_ray.progress(1)",
    )
    failure = agent.start("wait_for_failure", LAUNCH, index)
    agent.said("pulse")
    busy: NodePulse = agent.call("pulse")
    assert (busy.round_index, busy.listening) == (index, True)
    assert busy.idle_s < 60
    agent.call("stop_round", LAUNCH, index)
    assert {rank.outcome for rank in ending.result(60).ranks} == {Outcome.STOPPED}
    assert failure.result(60) is False


def test_an_agent_lives_on_from_what_its_controller_is_known_to_have_heard(agent: Agent) -> None:
    """A pulse says that the answer before it arrived: the lease counts from that answer, not from the pulse."""
    clock, timeout_s = time.CLOCK_BOOTTIME, 3600.0
    with HeartbeatPage.open(agent.page()) as page:
        agent.call("pulse")
        answered_at = time.clock_gettime(clock)
        until(lambda: time.clock_gettime(clock) > answered_at + 0.1)
        agent.call("pulse")
        assert answered_at - 60 < page.lease_until - timeout_s <= answered_at
        agent.call("pulse")
        assert page.lease_until - timeout_s > answered_at + 0.1


def test_the_stacks_of_ranks_that_hang_are_kept(agent: Agent) -> None:
    """Also of those in C code; the rank that stopped first comes first, and what was being done is named."""
    for _ in range(5):
        one, other = ranks_that_hang(agent)
        # A rank has two seconds to answer and py-spy five, which may be too few on a machine that is busy.
        if not any(late in rank.stacks for late in ("does not take signals", "timed out") for rank in (one, other)):
            break
    assert (one.outcome, other.outcome) == (Outcome.HUNG, Outcome.HUNG)
    assert one.message.startswith("made no progress for ")
    assert one.message.endswith(" s (last step 7)")
    assert "waits_for_a_peer" in one.stacks
    assert "sleeps_in_c" in other.stacks
    assert one.timestamp < other.timestamp
    if find_py_spy():
        assert "py-spy:\nProcess " in one.stacks


def ranks_that_hang(agent: Agent) -> tuple[RankRecord, ...]:
    index, ending = agent.start_round(
        """
        def waits_for_a_peer():
            one, other = socket.socketpair()
            say("hung-0", "")
            other.recv(1)
        kfpytorch_ray.progress(7)
        waits_for_a_peer()
        """,
        """
        def sleeps_in_c():
            say("hung-1", "")
            time.sleep(600)
        hear("hung-0")
        kfpytorch_ray.progress(8)
        sleeps_in_c()
        """,
    )
    agent.said("hung-1")
    agent.call("stop_round", LAUNCH, index, True)
    ranks: tuple[RankRecord, ...] = ending.result(60).ranks
    return ranks


def test_a_collection_in_a_rank_does_not_look_through_what_was_imported(agent: Agent) -> None:
    """That takes a quarter of a second each time, and copies its pages; what the rank makes is collected as ever."""
    body = "import gc; return gc.isenabled(), gc.get_freeze_count(), len(gc.get_objects())"
    assert {rank.outcome for rank in agent.run(body, body)} == {Outcome.SUCCEEDED}
    for collecting, frozen, looked_at in map(value_of, agent.call("collect")[1:]):
        assert collecting
        assert looked_at < frozen / 10


def test_who_ended_before_a_hang_was_noticed_keeps_that_end(agent: Agent) -> None:
    """Only ranks that still run hang. A rank that never told of a step is idle since the round began."""
    index, ending = agent.start_round("say('gone', os.getpid()); return None", f"say('left', ''); {FOREVER}")
    agent.said("left")
    until(lambda: not runs(int(agent.said("gone"))))
    agent.call("stop_round", LAUNCH, index, True)
    one, other = ending.result(60).ranks
    assert (one.outcome, one.stacks) == (Outcome.SUCCEEDED, "")
    assert other.outcome is Outcome.HUNG
    assert other.message.endswith("(no step was told)")


def test_a_round_that_is_stopped_before_it_starts_has_no_workers(agent: Agent) -> None:
    """Orders cross; the page shows no round afterwards."""
    index = next(agent.rounds)
    agent.rounds = itertools.count(index)
    agent.call("stop_round", LAUNCH, index)
    _, ending = agent.start_round("say('never', '')", "say('never', '')")
    assert {rank.message for rank in ending.result(60).ranks} == {"stopped before it started"}
    assert agent.call("pulse").round_index is None
    assert not (agent.folder / "said-never").exists()


def test_who_is_stopped_can_ask_whether_it_is(agent: Agent) -> None:
    """A handler of SIGTERM, and the loop that it interrupts, see the request; returning then is no success."""
    polite = """
        def handler(signum, frame):
            say(f"handled-{rank}", kfpytorch_ray.stop_requested())
        signal.signal(signal.SIGTERM, handler)
        say(f"polite-{rank}", "")
        while not kfpytorch_ray.stop_requested():
            time.sleep(0.01)
    """
    index, ending = agent.start_round(polite, polite)
    agent.said("polite-0")
    agent.said("polite-1")
    agent.call("stop_round", LAUNCH, index)
    assert {(rank.outcome, rank.exit_code) for rank in ending.result(60).ranks} == {(Outcome.STOPPED, 0)}
    assert (agent.said("handled-0"), agent.said("handled-1")) == ("True", "True")


@pytest.mark.parametrize("by_zygote", [False, True])
def test_what_a_rank_started_ends_with_its_round(by_zygote: bool, tmp_path: Path) -> None:
    """Children in its group, in a session of their own, with or without an exec; the agent goes on."""
    # Its own agent: a rank that is deaf takes the whole grace.
    with agent_in(tmp_path, by_zygote=by_zygote, stop_grace_s=1.0) as agent:
        end_with_its_round(agent)


def end_with_its_round(agent: Agent) -> None:
    before = agent.marked()
    _, ending = agent.start_round(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sleep = ["sh", "-c", "trap '' TERM; sleep 600"]
        children = [subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True).pid]
        if (child := os.fork()) == 0:
            os.setsid()
            if (child := os.fork()) == 0:
                say("grandchild", os.getpid())
            time.sleep(600)
        say("children", " ".join(map(str, [os.getpid(), *children, child])))
        time.sleep(600)
        """,
        """
        hear("children")
        hear("grandchild")
        raise ValueError("the others are to be stopped")
        """,
    )
    deaf, raised = ending.result(60).ranks
    assert raised.outcome is Outcome.RAISED
    assert (deaf.outcome, deaf.exit_code) == (Outcome.STOPPED, -signal.SIGKILL)
    started = [*map(int, agent.said("children").split()), int(agent.said("grandchild"))]
    assert len(started) == 5
    # Killed by now; what the kernel does with them after that takes a moment.
    until(lambda: not any(runs(pid) for pid in started))
    until(lambda: agent.marked() == before)
    assert {rank.outcome for rank in agent.run("return None", "return None")} == {Outcome.SUCCEEDED}


def test_a_rank_that_is_held_is_stopped_too(agent: Agent) -> None:
    """A process that was stopped by a signal takes no other but SIGKILL until it goes on."""
    index, ending = agent.start_round("say('held', os.getpid()); os.kill(os.getpid(), signal.SIGSTOP)", FOREVER)
    held = int(agent.said("held"))
    until(lambda: stat(held)[0] == "T")
    agent.call("stop_round", LAUNCH, index)
    assert [rank.exit_code for rank in ending.result(60).ranks] == [-signal.SIGTERM, -signal.SIGTERM]


def test_an_agent_that_never_hears_a_pulse_ends(tmp_path: Path) -> None:
    """Its controller counts on it from when it has loaded, so its time runs from then on."""
    with agent_in(tmp_path, silence_timeout_s=10.0) as agent:
        assert agent.process.wait(60) == -signal.SIGKILL
        until(lambda: not agent.folders())


def test_shutdown_leaves_only_the_actor(tmp_path: Path) -> None:
    """A round that runs is ended, files are removed, and the rest goes with the actor's process."""
    with agent_in(tmp_path) as agent:
        _, ending = agent.start_round(f"say('up', ''); {FOREVER}", FOREVER)
        agent.said("up")
        agent.call("shutdown")
        assert {rank.outcome for rank in ending.result(60).ranks} == {Outcome.STOPPED}
        agent.call("remove_files")
        assert agent.folders() == set()
        left = agent.marked()
        agent.process.kill()
        agent.process.wait()
        until(lambda: not any(runs(pid) for pid in left))


def lines_of(agent: Agent) -> list[tuple[bool, str]]:
    """What the driver would print: whether it is of standard error, and the line."""
    lines: list[tuple[bool, str]] = []
    cursor = Cursor()
    while not (chunk := agent.call("read_output", cursor, 1.0)).ended:
        lines += [(error, line) for error, text in chunk.texts for line in text.splitlines()]
        cursor = chunk.cursor
    return lines


def test_what_ranks_print_is_kept_and_passed_on(tmp_path: Path) -> None:
    """A file for each rank and round with all of it, kept elsewhere in the end; the driver gets rank 0's lines."""
    archive = tmp_path / "archive"
    with agent_in(tmp_path, log_archive=str(archive), max_log_bytes=2**20) as agent:
        body = "print('out', rank); print('error', rank, file=sys.stderr)"
        agent.run(body, body)
        agent.run("return print('second')", "return print('second')")
        agent.call("shutdown")
        prefix = "[rank 0 | node 0] "
        came = lines_of(agent)
    # The order is each stream's own: between two of them nobody knows it.
    assert [line for error, line in came if not error] == [f"{prefix}out 0", f"{prefix}second"]
    assert [line for error, line in came if error] == [f"{prefix}error 0"]
    logs = {str(path.relative_to(archive)): path.read_text() for path in archive.rglob("*.log")}
    kept = {name: sorted(text.splitlines(keepends=True)) for name, text in logs.items()}
    first = {f"round-0/rank-{rank}.log": [f"error {rank}\n", f"out {rank}\n"] for rank in range(2)}
    assert kept == first | {f"round-1/rank-{rank}.log": ["second\n"] for rank in range(2)}


CRASH = """
    import ctypes
    libc = ctypes.CDLL(None)
    for line in range(1000):
        print("python", line)
        libc.puts(b"c %d" % line)
    child = "import os; print('child'); os.abort()"
    subprocess.run([sys.executable, "-c", child], check=False)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def log_of(agent: Agent, rank: int) -> str:
    """The file of a rank's lines in the last round, on the node."""
    (index,) = {max(int(path.name[6:]) for path in agent.folder.glob("kfpytorch_ray-*/launch-*/logs/round-*"))}
    (path,) = agent.folder.glob(f"kfpytorch_ray-*/launch-*/logs/round-{index}/rank-{rank}.log*")
    return path.read_text()


def test_no_line_is_lost_at_a_crash(agent: Agent) -> None:
    """Neither Python's, nor one of a C library, nor a child's, all of which would wait in a buffer."""
    rank, _ = agent.run(CRASH, FOREVER)
    assert rank.message == "killed by SIGKILL"
    said = log_of(agent, 0).splitlines()
    expected = [f"{name} {line}" for name in ("python", "c") for line in range(1000)]
    assert sorted(said) == sorted([*expected, "child"])


LOUD = """
    for line in range(25_000):
        print(f"<{rank} {line}>")
"""


def test_ten_thousand_lines_a_second_lose_nothing(tmp_path: Path) -> None:
    """Four ranks print as fast as they can: every line is in its file, and has come to the driver, in its order."""
    archive = tmp_path / "archive"
    with agent_in(tmp_path, log_archive=str(archive), nproc_per_node=4, logs="all") as agent:
        agent.run(*[LOUD] * 4)
        agent.call("shutdown")
        came = lines_of(agent)
    for rank in range(4):
        expected = [f"<{rank} {line}>" for line in range(25_000)]
        assert (archive / "round-0" / f"rank-{rank}.log").read_text().splitlines() == expected
        prefix = f"[rank {rank} | node 0] "
        assert [line.removeprefix(prefix) for _, line in came if line.startswith(prefix)] == expected


def test_a_bound_on_what_a_rank_prints(agent: Agent) -> None:
    """Its file has the beginning and the end, and says what is left out; the record has its last lines all the same."""
    rank, _ = agent.run(LOUD + "    sys.exit(3)", "return None")
    said = log_of(agent, 0)
    assert 2**15 < len(said) < 2**16 + 200
    lines = said.splitlines()
    (gap,) = [line for line in lines if line.startswith("... ")]
    left_out = int(gap.split()[1])
    assert len(lines) - 1 + left_out == 25_000
    assert (lines[0], lines[-1]) == ("<0 0>", "<0 24999>")
    assert rank.log_tail[-1] == "<0 24999>"


@pytest.mark.parametrize("by_zygote", [False, True])
@pytest.mark.parametrize("victim", ["supervisor", "fork server"])
def test_workers_do_not_outlive_who_would_stop_them(victim: str, by_zygote: bool, tmp_path: Path) -> None:
    """Of an agent whose supervisor or fork server was killed, nothing goes on: its successor may start at once."""
    with agent_in(tmp_path, by_zygote=by_zygote) as agent:
        _, ending = agent.start_round(f"hear('last'); say('up', os.getpid()); {FOREVER}", f"say('last', ''); {FOREVER}")
        worker = int(agent.said("up"))
        server = int(stat(worker)[1])
        with HeartbeatPage.open(agent.page()) as beats:
            workers = {beat.pid for beat in beats.read()}
        (supervisor,) = {pid for pid in agent.marked() if int(stat(pid)[1]) == server} - workers
        os.kill(supervisor if victim == "supervisor" else server, signal.SIGKILL)
        with pytest.raises(SupervisorLostError):
            ending.result(60)
        until(lambda: not any(runs(pid) for pid in {*agent.marked(), worker}))


def test_a_rank_undoes_what_it_made_and_not_what_its_server_made(tmp_path: Path) -> None:
    """As a spawned process would: a folder of the server's is still there for the next rank."""
    (tmp_path / "keeps_a_folder.py").write_text(
        "import tempfile\nFOLDER = tempfile.TemporaryDirectory(prefix='of-the-server-')\n"
    )
    with agent_in(tmp_path, preload=("keeps_a_folder",), sys_path=(*sys.path, str(tmp_path))) as agent:
        body = """
        import tempfile, keeps_a_folder
        global own
        own = tempfile.TemporaryDirectory(prefix="of-a-rank-")
        say(f"own-{rank}", own.name)
        assert os.path.isdir(keeps_a_folder.FOLDER.name)
        """
        for _ in range(2):
            assert {rank.outcome for rank in agent.run(body, body)} == {Outcome.SUCCEEDED}
            assert not any(os.path.exists(agent.said(f"own-{rank}")) for rank in (0, 1))
        assert list(tmp_path.glob("of-the-server-*"))
