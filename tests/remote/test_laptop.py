"""The process that launched a remote run ends, in every way that processes do; scripts as a user writes them."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kfpytorch_ray import RunStatus, RunStoppedError, attach
from kfpytorch_ray.testing import HeadCluster, wait_until
from kfpytorch_ray.testing.processes import is_stopped

SCRIPT = """
import json, sys
from pathlib import Path
from helper import work
from kfpytorch_ray import Elastic, RayBackend, launch

if __name__ == "__main__":
    address, storage, gate, options = sys.argv[1:]
    backend = RayBackend(address=address, storage=storage, **json.loads(options))
    print("result:", launch(work, gate, elastic=Elastic(backend=backend))[0].return_value)
"""

HELPER = """
import threading
from pathlib import Path

def work(gate):
    print("begun", flush=True)
    number = 0
    while not Path(gate).exists():
        print(f"tick {number}", flush=True)
        number += 1
        Path(gate).with_name("ticks").write_text(str(number))
        threading.Event().wait(0.05)
    return "done"
"""


class Laptop:
    """A user's script that follows a run."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path, gate: Path, storage: str) -> None:
        self.process = process
        self.gate = gate
        self._output = output
        self._storage = storage

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def run_id(self) -> str:
        found = re.search(r"the run (kfr-[a-z0-9-]+) is submitted", self.output())
        assert found is not None, self.output()
        return found[1]

    def wait_for(self, text: str) -> None:
        def said() -> bool:
            # In this order: what it says last is there when it has ended.
            ended = self.process.poll() is not None
            output = self.output()
            assert text in output or not ended, output
            return text in output

        wait_until(said, f"the script to say {text!r}")

    def status(self) -> RunStatus:
        return attach(self.run_id(), storage=self._storage).status()


@contextmanager
def laptop(
    head: HeadCluster, storage: str, folder: Path, options: str = "{}", terminal: int | None = None
) -> Iterator[Laptop]:
    project = folder / "project"
    project.mkdir()
    (project / "script.py").write_text(SCRIPT)
    (project / "helper.py").write_text(HELPER)
    gate = folder / "gate"
    own_terminal = [] if terminal is None else ["setsid", "--ctty"]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [*own_terminal, sys.executable, "script.py", head.address, storage, str(gate), options],
            cwd=project,
            stdin=subprocess.DEVNULL if terminal is None else terminal,
            stdout=output,
            stderr=subprocess.STDOUT if terminal is None else terminal,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        yield Laptop(process, folder / "output", gate, storage)
    finally:
        process.kill()
        process.wait()


CTRL_C = b"\x03"


def press_until(noticed: Callable[[], object], press: Callable[[], object], shown: Callable[[], str]) -> None:
    """Ctrl-C, and again, as a person would: Python drops one that comes within a finaliser."""
    for _ in range(5):
        press()
        with contextlib.suppress(TimeoutError):
            wait_until(noticed, "Ctrl-C to be noticed", 20)
            return
    pytest.fail(f"Ctrl-C has no effect:\n{shown()}")


def interrupt(script: Laptop, says: str) -> None:
    """Have a script notice SIGINT, which it shows by these words."""
    press_until(
        lambda: script.process.poll() is not None or says in script.output(),
        lambda: script.process.send_signal(signal.SIGINT),
        script.output,
    )


def test_a_script_and_its_modules(head: HeadCluster, storage: str, tmp_path: Path) -> None:
    """The working directory travels, and it is said what of it; the run ends as the script expects."""
    with laptop(head, storage, tmp_path) as script:
        script.wait_for("begun")
        script.gate.touch()
        assert script.process.wait(120) == 0
        assert "result: done" in script.output()
        assert re.search(r"Sending .*project.*: 2 files", script.output())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_the_run(head: HeadCluster, storage: str, tmp_path: Path, signum: signal.Signals) -> None:
    """The script ends when the run is stopped, says so, and is no success."""
    with laptop(head, storage, tmp_path) as script:
        script.wait_for("begun")
        if signum == signal.SIGINT:
            interrupt(script, "stopping the run")
        else:
            script.process.send_signal(signum)
        assert script.process.wait(120) != 0
        assert f"the run {script.run_id()} is stopped." in script.output()
        assert script.status() is RunStatus.STOPPED


def test_an_interruption_can_leave_it_running(head: HeadCluster, storage: str, tmp_path: Path) -> None:
    """With on_interrupt="detach" the script ends and says how to find the run, which is taken from elsewhere."""
    with laptop(head, storage, tmp_path, '{"on_interrupt": "detach"}') as script:
        script.wait_for("begun")
        interrupt(script, "goes on")
        assert script.process.wait(120) != 0
        assert f"kfpytorch-ray result {script.run_id()}" in script.output()
        assert script.status() is RunStatus.RUNNING
        script.gate.touch()
        assert attach(script.run_id(), storage=storage).result()[0].return_value == "done"


def test_a_killed_script_leaves_its_run(head: HeadCluster, storage: str, tmp_path: Path) -> None:
    """SIGKILL, or a laptop without power: the run goes on, and is found by its id."""
    with laptop(head, storage, tmp_path) as script:
        script.wait_for("begun")
        script.process.kill()
        script.process.wait()
        run = attach(script.run_id(), storage=storage)
        assert run.status() is RunStatus.RUNNING
        script.gate.touch()
        assert run.result()[0].return_value == "done"


def test_a_killed_script_with_a_lease_ends_its_run(head: HeadCluster, storage: str, tmp_path: Path) -> None:
    """It stops itself when nobody has kept its lease, and says why."""
    # Until it has begun the lease is to be kept, by a script that may get no CPU for some seconds.
    with laptop(head, storage, tmp_path, '{"lease_s": 12}') as script:
        script.wait_for("begun")
        script.process.kill()
        script.process.wait()
        wait_until(lambda: script.status() is RunStatus.STOPPED, "the run to stop itself")
        with pytest.raises(RunStoppedError, match="no sign of life"):
            attach(script.run_id(), storage=storage).result()


A_SLEEP = 400
"""In ticks of 50 ms: more than it takes the script, when it is awake again, to find its connection dead."""


@pytest.mark.timeout(600)
def test_a_script_that_sleeps(head: HeadCluster, storage: str, tmp_path: Path) -> None:
    """As with a lid that is closed: no line is lost, a lease that has not run out is kept again, the result arrives."""
    lease_s = 180

    def ticks() -> int:
        counter = tmp_path / "ticks"
        return int(counter.read_text() or 0) if counter.exists() else 0

    with laptop(head, storage, tmp_path, f'{{"lease_s": {lease_s}}}') as script:
        script.wait_for("tick 20\n")
        lease = Path(storage.removeprefix("file://"), "runs", script.run_id(), "lease")
        script.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: is_stopped(script.process.pid), "it to fall asleep")
        kept, before = lease.read_bytes(), ticks()
        wait_until(lambda: ticks() > before + A_SLEEP, "the script to sleep for a while", 240)
        assert lease.read_bytes() == kept
        assert f"tick {before + A_SLEEP // 2}\n" not in script.output()
        script.process.send_signal(signal.SIGCONT)
        wait_until(lambda: lease.read_bytes() != kept, "its lease to be kept again")
        script.wait_for(f"tick {before + A_SLEEP}\n")
        script.gate.touch()
        assert script.process.wait(120) == 0
        assert "result: done" in script.output()
        numbers = [int(number) for number in re.findall(r"tick (\d+)\n", script.output())]
        assert numbers == list(range(ticks()))


@pytest.mark.parametrize(("answer", "status"), [("d", RunStatus.RUNNING), ("s", RunStatus.STOPPED)])
def test_an_interruption_at_a_terminal_asks(
    head: HeadCluster, storage: str, tmp_path: Path, answer: str, status: RunStatus
) -> None:
    """Ctrl-C, and then what the person answers is done: leave it running, or stop it."""
    person, terminal = pty.openpty()
    shown = bytearray()

    def screen() -> str:
        # A terminal that nobody reads takes no more after a while, and who writes to it waits.
        while select.select([person], [], [], 0)[0]:
            shown.extend(os.read(person, 4096))
        return shown.decode(errors="replace")

    with laptop(head, storage, tmp_path, terminal=terminal) as script:
        wait_until(lambda: screen() and "begun" in script.output(), "the run to begin")
        press_until(
            lambda: "[d]etach" in screen() or script.process.poll() is not None,
            lambda: os.write(person, CTRL_C),
            screen,
        )
        assert "[d]etach" in screen(), screen()
        os.write(person, f"{answer}\n".encode())
        try:
            wait_until(lambda: screen() and script.process.poll() is not None, "the script to end")
        except TimeoutError:
            pytest.fail(f"the script does not end:\n{screen()}")
        assert script.process.returncode != 0
        assert ("goes on" if answer == "d" else "is stopped.") in screen()
        run_id = re.search(r"the run (kfr-[a-z0-9-]+) is submitted", screen())
        assert run_id is not None
        run = attach(run_id[1], storage=storage)
        assert run.status() is status
        assert run.cancel() is RunStatus.STOPPED
    os.close(person)
    os.close(terminal)
