"""Lines of ranks from their files to the streams of their agent, and the marks by which the driver knows them all."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import pytest

from kfpytorch_ray.cluster.delivery import expecting, note_marks, take_marks
from kfpytorch_ray.cluster.output import MARK, Outlet, Tail, Tails
from kfpytorch_ray.testing import wait_until


def lines_of(*pieces: bytes, path: Path) -> list[str]:
    """What is passed on of a file that is written piece by piece."""
    stream = io.StringIO()
    tail = Tail(str(path), "[rank 0] ", Outlet(stream, ""))
    tail.pass_on()
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            file.write(piece)
            tail.pass_on()
    tail.pass_on(last=True)
    return stream.getvalue().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        ((b"one\ntwo\n",), ["one", "two"]),
        ((b"o", b"ne\nt", b"wo"), ["one", "two"]),
        ((b"10%\r", b"20%\r\n", b"30%\r", b"\n"), ["10%", "20%", "30%"]),
        (("ä".encode()[:1], "ä".encode()[1:] + b"\n", b"\xff\n", b"\xc3"), ["ä", "\ufffd", "\ufffd"]),
        ((b"\n\n",), ["", ""]),
        ((), []),
    ],
)
def test_whole_lines_are_passed_on(pieces: tuple[bytes, ...], lines: list[str], tmp_path: Path) -> None:
    """In whatever pieces they are written, each with its rank; the last one also without an end."""
    assert lines_of(*pieces, path=tmp_path / "out") == [f"[rank 0] {line}\n" for line in lines]


def test_a_line_without_an_end_is_not_kept_for_ever(tmp_path: Path) -> None:
    """It is passed on in pieces: it may grow as long as its rank runs."""
    passed_on = lines_of(b"x" * 100_000, b"y" * 100_000, path=tmp_path / "out")
    assert len(passed_on) > 1
    assert "".join(line.removeprefix("[rank 0] ").rstrip("\n") for line in passed_on) == "x" * 100_000 + "y" * 100_000


def test_what_was_written_last_is_passed_on_when_it_is_finished(tmp_path: Path) -> None:
    """Of all files, also of one that came late; one that never came is not waited for."""
    stream = io.StringIO()
    outlet = Outlet(stream, "")
    tails = Tails(Tail(str(tmp_path / str(rank)), f"{rank}:", outlet) for rank in range(3))
    tails.start()
    for rank in range(2):
        (tmp_path / str(rank)).write_text("".join(f"{line}\n" for line in range(1000)))
    tails.finish(60)
    expected = [f"{rank}:{line}" for rank in range(2) for line in range(1000)]
    assert sorted(stream.getvalue().splitlines()) == sorted(expected)


def test_only_what_was_printed_is_marked() -> None:
    """A mark for each end, the last one again where nothing came after it; none without a token or without lines."""
    stream = io.StringIO()
    outlet = Outlet(stream, "launch")
    assert outlet.mark() is None
    outlet.write("one\n")
    first = outlet.mark()
    assert first == outlet.mark()
    outlet.write("two\n")
    second = outlet.mark()
    assert stream.getvalue().splitlines() == ["one", f"{MARK}{first}", "two", f"{MARK}{second}"]

    unmarked = io.StringIO()
    outlet = Outlet(unmarked, "")
    outlet.write("one\n")
    assert outlet.mark() is None
    assert unmarked.getvalue() == "one\n"


class Printer:
    """Ray's handlers in their order."""

    def __init__(self) -> None:
        self.printed: list[str] = []

    def emit(self, *lines: str) -> None:
        batch: dict[str, Any] = {"lines": [*lines], "pid": 1, "is_err": False}
        take_marks(batch)
        self.printed += batch["lines"]
        note_marks(batch)


def test_a_mark_says_that_all_before_it_has_been_printed() -> None:
    """Whoever waits goes on when the last of its marks has come; marks of others tell nothing, and none is printed."""
    printer = Printer()
    missing: list[set[str]] = []
    with expecting("mine") as delivery:
        waiting = threading.Thread(target=lambda: missing.append(delivery.wait(["mine-1", "mine-2"], 60, 60)))
        waiting.start()
        printer.emit("one", f"{MARK}mine-1", f"{MARK}others-2")
        printer.emit(f"unfinished{MARK}mine-1")
        assert waiting.is_alive()
        printer.emit("two", f"{MARK}mine-2")
        wait_until(lambda: not waiting.is_alive(), "the last mark")
    assert missing == [set()]
    printer.emit("three", f"{MARK}mine-3")
    assert printer.printed == ["one", "unfinished", "two", "three"]


def test_marks_that_do_not_come_are_given_up() -> None:
    """After a while in which nothing comes, at once where nothing was marked; and what is missing is said."""
    printer = Printer()
    with expecting("mine") as delivery:
        assert delivery.wait([]) == set()
        printer.emit(f"{MARK}mine-1")
        assert delivery.wait(["mine-1", "mine-2"], silence_s=0.1) == {"mine-2"}
        assert delivery.wait(["mine-2"], silence_s=60, longest_s=0.1) == {"mine-2"}
