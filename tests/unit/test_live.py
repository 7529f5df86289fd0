"""What a person sees of a launch: on the screen of a pseudo-terminal, and where there is none."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pyte
import pytest

from kfpytorch_ray.live.choice import view_for
from kfpytorch_ray.live.plain import Plain
from kfpytorch_ray.live.status import Phase, Status, Steps, clock, shown_steps
from kfpytorch_ray.live.view import Live, Silent
from kfpytorch_ray.metrics import MetricPoint
from kfpytorch_ray.notices import write

COLUMNS, LINES = 100, 30


def point(step: int, round_index: int = 0, total: int | None = None, **values: float) -> MetricPoint:
    return MetricPoint(round_index, step, step, 1000.0 + step / 2, total, values)


HEAD = """
import logging, sys
from kfpytorch_ray.live.choice import live
from kfpytorch_ray.metrics import MetricPoint

def point(step, total=None, **values):
    return MetricPoint(0, step, step, 1000 + step / 2, total, values)

def wait():
    sys.stdin.readline()
"""


@dataclass
class Screen:
    """A terminal in which a script runs, told to go on by a line."""

    process: subprocess.Popen[bytes]
    controller: int
    screen: pyte.HistoryScreen
    stream: pyte.ByteStream

    def read(self, timeout_s: float) -> None:
        """Take in what is written until then."""
        ready, _, _ = select.select([self.controller], [], [], timeout_s)
        if ready:
            self.stream.feed(os.read(self.controller, 65536))

    def lines(self) -> list[str]:
        """What is to be read, scrolled lines first."""
        above = ["".join(row[column].data for column in range(COLUMNS)) for row in self.screen.history.top]
        return [line.rstrip() for line in (*above, *self.screen.display)]

    def shows(self, *texts: str) -> list[str]:
        """The lines once all of these texts are among them."""
        deadline = time.monotonic() + 60
        while not all(any(text in line for line in self.lines()) for text in texts):
            assert time.monotonic() < deadline, (texts, [line for line in self.lines() if line])
            self.read(0.1)
        return [line for line in self.lines() if line]

    def hang_up(self) -> None:
        """Close the terminal; what is asked of its file from now on is of nothing."""
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, self.controller)
        os.close(nothing)

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()


@contextmanager
def terminal(script: str, *, output: int | None = None, **variables: str) -> Iterator[Screen]:
    """Run a script in a terminal.

    Args:
        script: After ``live`` and ``point`` are imported; ``wait()`` waits until the test goes on.
        output: Of standard output, where that is not the terminal.
        **variables: Of its environment.
    """
    controller, device = pty.openpty()
    fcntl.ioctl(device, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    names = ("PYTEST_CURRENT_TEST", "KFPYTORCH_RAY_PROGRESS", "COLUMNS", "LINES", "NO_COLOR")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + script],
        stdin=subprocess.PIPE,
        stdout=device if output is None else output,
        stderr=device,
        env={**clean, "TERM": "xterm-256color", "PYTHONPATH": path, **variables},
    )
    os.close(device)
    screen = pyte.HistoryScreen(COLUMNS, LINES, history=1000, ratio=0.01)
    screen.set_mode(pyte.modes.LNM)
    try:
        yield Screen(process, controller, screen, pyte.ByteStream(screen))
    finally:
        process.kill()
        process.communicate()
        os.close(controller)


LAUNCH = """
logging.basicConfig()
with live("train", "launch-1a2b") as shown:
    shown.nodes(1, 2, "Missing: 1 x {GPU: 8}; [no] node has so many.")
    wait()
    shown.nodes(2, 2)
    wait()
    shown.round(1, 4, 2, 4)
    shown.heard(0, 1, 2, ())
    shown.heard(1, 1, 1, ())
    wait()
    shown.round(0, 4, 2, 4)
    shown.heard(0, 0, 2, [point(step, 200, loss=1 / (step + 1)) for step in range(101)])
    for line in range(100):
        shown.show(f"[rank 0 | node 0] line {line} " + "\\x1b[2Jx" * 40 + "\\n", line % 2 == 1)
    print("of the script itself")
    logging.warning("of a library")
    wait()
print("after the end")
wait()
"""


def test_a_launch_in_a_terminal() -> None:
    """What it does now is on the last lines, with a bar and numbers; what ranks and others print is above, whole.

    In the end the bar is gone, and one line tells how it went.
    """
    with terminal(LAUNCH) as screen:
        lines = screen.shows("placing 1/2 nodes", "Missing: 1 x {GPU: 8}; [no] node has so many.")
        assert len(lines) == 1
        screen.go_on()
        assert len(screen.shows("starting on 2 nodes")) == 1
        screen.go_on()
        (line,) = screen.shows("3/4 ranks")
        assert re.search(r"train launch-1a2b · round 2/4 · running for \d\d:\d\d", line)
        screen.go_on()
        bar = ("50 %", "━━━━", "step 100/200", "2 steps/s", "ETA 00:50", "loss 0.009901")
        lines = screen.shows("of a library", "round 1/4", *bar)
        assert "round 1/4" in lines[-2]
        for text in bar:
            assert text in lines[-1], lines[-1]
        printed = "".join(line for line in lines[:-2])
        for number in range(100):
            assert f"[rank 0 | node 0] line {number} {'x' * 40}" in printed.replace("[2J", "")
        assert "of the script itself" in lines
        assert "WARNING:root:of a library" in lines
        screen.go_on()
        lines = screen.shows("after the end")
        assert not any("step 100/200" in line or "round 1/4" in line for line in lines)
        assert lines[-1] == "after the end"
        assert re.fullmatch(r"kfpytorch_ray: train \(launch-1a2b\): succeeded.* after \d\d:\d\d", lines[-2])


def test_what_a_script_prints_to_a_file_is_not_on_the_terminal() -> None:
    """Rank 0's lines are its output, too."""
    read, write = os.pipe()
    script = """
with live("train", "run") as shown:
    shown.round(0, 1, 1, 1)
    shown.show("[rank 0 | node 0] one\\n", False)
    shown.show("[rank 0 | node 0] two\\n", True)
    print("three")
    wait()
"""
    with terminal(script, output=write) as screen:
        os.close(write)
        lines = screen.shows("round 1/1", "two")
        assert not any("one" in line or "three" in line for line in lines)
        screen.go_on()
        with os.fdopen(read) as file:
            assert file.read().splitlines() == ["[rank 0 | node 0] one", "three"]


def test_two_launches_share_a_terminal() -> None:
    """The second one tells by lines, above the first one's bar."""
    script = (
        "with live('first', 'a') as one, live('second', 'b') as two:\n    one.round(0, 1, 1, 1)\n"
        "    two.round(0, 1, 1, 1)\n    wait()\nwait()\n"
    )
    with terminal(script) as screen:
        lines = screen.shows("first a · round 1/1", "second (b): round 1/1, 1 ranks on 1 node")
        assert "first" in lines[-1]
        screen.go_on()
        assert [line.split(" after")[0] for line in screen.shows("first (a): succeeded after")[-2:]] == [
            "kfpytorch_ray: second: succeeded",
            "kfpytorch_ray: first (a): succeeded",
        ]


@pytest.mark.parametrize("variables", [{"KFPYTORCH_RAY_PROGRESS": "plain"}, {"TERM": "dumb"}])
def test_lines_in_a_terminal(variables: Mapping[str, str]) -> None:
    """Where they are asked for, or nothing else can be drawn."""
    with terminal("with live('train', 'run') as shown:\n    shown.round(0, 1, 1, 1)\nwait()\n", **variables) as screen:
        assert screen.shows("succeeded")[0] == "kfpytorch_ray: train (run): round 1/1, 1 ranks on 1 node"


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but what ranks print, to the streams of the moment."""
    live = Live("train", "run", Silent())
    live.nodes(0, 2)
    live.round(0, 1, 2, 4)
    live.show("one\n", False)
    live.show("two\n", True)
    live.close("succeeded")
    assert capsys.readouterr() == ("one\n", "two\n")


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """One for each change, one for steps now and then, one for the end."""
    live = Live("train", "launch-1", Plain(steps_s=0.0))
    for _ in range(3):
        live.nodes(1, 2, "Missing: 1 x {CPU: 1}")
    live.nodes(2, 2)
    live.round(0, 3, 2, 4)
    live.heard(0, 0, 2, [point(0, total=4, loss=0.5), point(2, total=4, loss=0.25)])
    live.close("failed")
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines == [
        "kfpytorch_ray: train (launch-1): placing 1/2 nodes",
        "kfpytorch_ray: train: starting on 2 nodes",
        "kfpytorch_ray: train: round 1/3, 4 ranks on 2 nodes",
        "kfpytorch_ray: train: step 2/4, 2 steps/s, ETA 00:01, loss 0.25",
    ]
    assert re.fullmatch(r"kfpytorch_ray: train: failed at step 2/4 after \d\d:\d\d", last)


def test_steps_are_not_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    """A log of thousands of them would be read by nobody."""
    live = Live("train", "launch-1", Plain())
    live.round(0, 3, 2, 4)
    for step in range(100):
        live.heard(0, 0, 2, [point(step)])
    live.close("succeeded")
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_blocked_terminal_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that takes agents' pulses tells what they answer: held up, it would have them end."""
    let_go = threading.Event()

    class Blocked(io.StringIO):
        def write(self, text: str) -> int:
            assert let_go.wait(60)
            return super().write(text)

    stream = Blocked()
    monkeypatch.setattr(sys, "stderr", stream)
    live = Live("train", "run", Plain(steps_s=0.0))
    for index in range(3):
        live.round(index, 3, 1, 1)
        live.heard(0, index, 1, [point(1, index)])
    let_go.set()
    live.close("succeeded")
    assert len(stream.getvalue().splitlines()) == 7


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "stream", "kind"),
    [
        ({"TERM": "xterm"}, io.StringIO(), Plain),
        ({"TERM": "xterm", "PYTEST_CURRENT_TEST": "x"}, Tty(), Plain),
        ({"TERM": "dumb"}, Tty(), Plain),
        ({}, Tty(), Plain),
        ({"TERM": "xterm", "KFPYTORCH_RAY_PROGRESS": "plain"}, Tty(), Plain),
        ({"TERM": "xterm", "KFPYTORCH_RAY_PROGRESS": "0"}, Tty(), Silent),
        ({"TERM": "dumb", "KFPYTORCH_RAY_PROGRESS": "loud"}, Tty(), Plain),
    ],
)
def test_which_view(environment: Mapping[str, str], stream: io.StringIO, kind: type) -> None:
    """A bar only where it can be drawn and nobody else draws."""
    assert type(view_for(environment, stream)) is kind


class Log:
    """What programs put in the place of standard output to have it in a file, too."""

    def write(self, _text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None: ...


def test_streams_that_are_no_terminals_or_closed() -> None:
    """Any object that can be written to may stand for one, and nobody may be left to read."""
    closed = io.StringIO()
    closed.close()
    for stream in (Log(), closed, None):
        assert type(view_for({"TERM": "xterm"}, stream)) is Plain  # type: ignore[arg-type]
        write(stream, "line\n")


def test_a_terminal_that_is_closed_takes_no_result_with_it() -> None:
    """A script in the background goes on when its shell has gone."""
    read, written = os.pipe()
    script = """
with live("train", "launch-1a2b") as shown:
    shown.nodes(2, 2)
    wait()
    shown.show("[rank 0 | node 0] line\\n", False)
print("the result")
"""
    with terminal(script, output=written) as screen, os.fdopen(read) as output:
        os.close(written)
        screen.shows("2 nodes")
        screen.hang_up()
        screen.go_on()
        assert output.read().endswith("the result\n")
        assert screen.process.wait(60) == 0


def test_ranks_of_an_agent_that_is_lost_do_not_run() -> None:
    """As far as is known: who has not answered in this round yet is not counted as gone."""
    live = Live("train", "run", Silent())
    status = live._status
    live.round(0, 1, 2, 4)
    live.heard(0, 0, 2, ())
    assert status.ranks() == "4/4 ranks"
    live.heard(1, 0, 2, ())
    live.forget(1)
    live.heard(0, 0, 2, ())
    assert status.ranks() == "2/4 ranks"
    live.round(1, 2, 2, 4)
    live.heard(0, 0, 0, [point(3)])
    assert status.ranks() == "4/4 ranks"
    assert status.steps.latest is None
    assert len(live.metrics.of_round(0)) == 1


def test_steps_that_are_counted_anew_in_each_epoch_have_the_same_speed() -> None:
    """Whatever lies between the epochs, nothing of an earlier one counts."""
    steps = Steps()
    for number in range(1000):
        epoch, step = divmod(number, 200)
        steps.add([MetricPoint(0, number, step, number / 10 + 5 * epoch, 200)])
        if step > 10:
            assert steps.per_second == pytest.approx(10)
            assert steps.left_s == pytest.approx((200 - step) / 10)


def test_a_clock_that_is_set_back_spoils_no_speed() -> None:
    """And what is kept of the past stays bounded."""
    steps = Steps()
    for step in range(2000):
        steps.add([MetricPoint(0, step, step, step / 10 - (3600 if step > 100 else 0))])
    assert steps.per_second == pytest.approx(10)
    assert len(steps.window) < 400


def test_words() -> None:
    """What is not known is left out."""
    assert (clock(41), clock(3723)) == ("00:41", "1:02:03")
    steps = Steps()
    assert shown_steps(steps) == []
    steps.add([point(4)])
    assert shown_steps(steps) == ["step 4"]
    steps.add([point(5)])
    assert shown_steps(steps) == ["step 5", "2 steps/s"]
    slow = Steps()
    slow.add([MetricPoint(0, 0, 0, 0.0), MetricPoint(0, 1, 1, 20.0, 4)])
    assert shown_steps(slow) == ["step 1/4", "20 s/step", "ETA 01:00"]
    assert Status("train", "run", phase=Phase.STARTING, placed=1).headline() == "starting on 1 node"
