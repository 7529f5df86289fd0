"""Where a launch stands, at the bottom of a terminal: two lines that change, with ranks' lines above them."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from kfpytorch_ray.live.status import Phase, Status, clock, shown_steps
from kfpytorch_ray.notices import is_terminal, tell

_PER_SECOND = 5
_BAR_WIDTH = 24
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[@-ln-~]|\x1b[^\[]|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]")
"""What would move the cursor or clear the screen; colours stay."""

_taken = threading.Lock()
"""Held by the launch that has the bottom of the terminal."""


def take_terminal() -> bool:
    """Whether no other launch of this process has the terminal; it is the caller's then, until its view is closed."""
    return _taken.acquire(blocking=False)


class Terminal:
    """The bottom of the terminal. Whoever makes one has taken the terminal.

    Args:
        stream: Of the terminal.
        force: Draw although it is none.
    """

    def __init__(self, stream: TextIO, *, force: bool = False) -> None:
        self._output = sys.stdout
        self._errors = sys.stderr
        self._console = Console(file=stream, force_terminal=force or None, highlight=False)
        self._status: Status | None = None
        self._spinner = Spinner("dots")
        self._began = time.monotonic()
        # What is printed to a file or a pipe belongs there.
        shared = is_terminal(sys.stdout)
        self._live = RichLive(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=_PER_SECOND,
            transient=True,
            redirect_stdout=shared,
            redirect_stderr=True,
        )
        self._shared = shared
        self._live.start(refresh=False)
        self._handlers = list(_move_handlers(self._errors, sys.stderr))

    def changed(self, status: Status) -> None:
        """It is drawn at the next turn."""
        self._status = status

    def show(self, text: str, error: bool) -> None:
        """Above the bar, or where standard output goes."""
        if not error and not self._shared:
            self._output.write(text)
            self._output.flush()
            return
        self._console.print(_Raw(_CONTROLS.sub("", text)), end="", crop=False, soft_wrap=True)

    def close(self, status: Status, how: str) -> None:
        """Leave the terminal as it was, and one line that says how it ended."""
        # The terminal may have been closed.
        gone = (OSError, ValueError)
        with contextlib.suppress(*gone):
            self._live.stop()
        for handler in self._handlers:
            with contextlib.suppress(*gone):
                handler.setStream(self._errors)
        _taken.release()
        tell(f"{status.name} ({status.run_id}): {how} after {clock(time.monotonic() - self._began)}")

    def _render(self) -> Group | Text:
        status = self._status
        if status is None:
            return Text("")
        lines = [self._headline(status)]
        if status.phase is Phase.RUNNING and status.steps.latest is not None:
            lines.append(_steps(status))
        return Group(*lines)

    def _headline(self, status: Status) -> Table:
        # The id is what other commands ask for.
        words = [f"[bold]{_plain(status.name)}[/] [dim]{_plain(status.run_id)}[/]", status.headline()]
        if status.phase is Phase.RUNNING:
            words += [f"running for {clock(time.monotonic() - status.began)}", status.ranks()]
        elif status.phase is Phase.PLACING and status.why:
            words.append(f"[dim]{_plain(status.why)}[/]")
        else:
            words.append(clock(time.monotonic() - status.began))
        line = Table.grid(padding=(0, 1))
        line.add_column(width=1)
        line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_row(self._spinner, Text.from_markup(" · ".join(words), overflow="ellipsis"))
        return line


def _steps(status: Status) -> Table:
    latest = status.steps.latest
    assert latest is not None
    line = Table.grid(padding=(0, 1))
    line.add_column(width=1)
    cells: list[Text | ProgressBar] = [Text("")]
    if latest.total:
        line.add_column(width=_BAR_WIDTH)
        cells.append(ProgressBar(total=latest.total, completed=latest.step, width=_BAR_WIDTH))
        cells.append(Text(f"{min(100, 100 * latest.step // latest.total)} %"))
        line.add_column(no_wrap=True)
    line.add_column(no_wrap=True, overflow="ellipsis")
    cells.append(Text(" · ".join(shown_steps(status.steps)), overflow="ellipsis"))
    line.add_row(*cells)
    return line


def _plain(text: str) -> str:
    """No markup, no line ends."""
    return " ".join(text.split()).replace("[", r"\[")


class _Raw:
    """Text that is written as it is: styling it would take a hundred times as long."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, _console: Console, _options: ConsoleOptions) -> RenderResult:
        yield Segment(self._text)


def _move_handlers(before: TextIO, now: TextIO) -> Iterator[logging.StreamHandler[TextIO]]:
    """Have log handlers that write to the terminal do so above the bar."""
    loggers = [logging.root, *(each for each in logging.root.manager.loggerDict.values())]
    for owner in loggers:
        for handler in getattr(owner, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(now)
                yield handler
