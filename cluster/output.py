"""What ranks print, on its way from their files to the streams of this process, where Ray's log monitor picks it up.

Whole lines only, each with its rank before it. Unlike torch's tails, this does not sleep when the ranks have ended, so
that nothing of theirs is left behind it. Behind the last line comes a mark: the driver knows by it that Ray has brought
everything before (kfpytorch_ray.cluster.delivery). Lines are not counted, because Ray may bring them more than once.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import secrets
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

MARK = "[kfpytorch_ray] end of the ranks' output so far: "
"""Begins a mark. The driver takes it out of what it prints; in Ray's log files it stays."""

_LOOK_S = 0.1
_PIECE_BYTES = 2**20
_LONGEST_LINE = 2**16
"""Characters; a longer line is passed on in pieces."""


class TextSink(Protocol):
    """Where text goes."""

    def write(self, text: str, /) -> object:
        """Take text."""

    def flush(self) -> object:
        """Pass on what was taken."""


class Outlet:
    """One stream of this process.

    Args:
        stream: Where lines go.
        token: Part of every mark, so that the driver finds its own; empty: nobody waits, and nothing is marked.
    """

    def __init__(self, stream: TextSink, token: str) -> None:
        self._stream = stream
        self._token = token
        self._lock = threading.Lock()
        self._unmarked = False
        self._mark: str | None = None

    def write(self, text: str) -> None:
        """Pass on whole lines."""
        with self._lock:
            self._stream.write(text)
            self._stream.flush()
            self._unmarked = True

    def mark(self) -> str | None:
        """Mark the end of what has been passed on, if anything was since the last mark.

        Returns:
            The last mark; None if there was never anything to mark.
        """
        with self._lock:
            if self._unmarked and self._token:
                mark = f"{self._token}-{secrets.token_hex(4)}"
                self._stream.write(f"{MARK}{mark}\n")
                self._stream.flush()
                self._mark = mark
                self._unmarked = False
            return self._mark


class Tail:
    """One file of one rank.

    Args:
        path: The file; it need not be there yet.
        prefix: What each line starts with when it is passed on.
        outlet: Where it goes.
    """

    def __init__(self, path: str, prefix: str, outlet: Outlet) -> None:
        self._path = Path(path)
        self._prefix = prefix
        self._outlet = outlet
        self._file: BinaryIO | None = None
        self._pending = ""
        # As a text file: progress bars that return to the start of their line make lines.
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder = io.IncrementalNewlineDecoder(decode, translate=True)

    def pass_on(self, *, last: bool = False) -> None:
        """Pass on what is in the file now; with ``last`` also a line without an end."""
        if self._file is None:
            with contextlib.suppress(FileNotFoundError):
                self._file = self._path.open("rb", buffering=0)
        if self._file is None:
            return
        # Somebody may write on and on.
        left = os.fstat(self._file.fileno()).st_size - self._file.tell()
        while left > 0 and (data := self._file.read(min(left, _PIECE_BYTES))):
            left -= len(data)
            self._take(self._decoder.decode(data))
        if last:
            self._take(self._decoder.decode(b"", final=True), last=True)
            self._file.close()

    def _take(self, text: str, *, last: bool = False) -> None:
        *lines, self._pending = (self._pending + text).split("\n")
        if self._pending and (last or len(self._pending) > _LONGEST_LINE):
            lines.append(self._pending)
            self._pending = ""
        if lines:
            self._outlet.write("".join(f"{self._prefix}{line}\n" for line in lines))


class Tails:
    """Passes on, in a thread of its own, what the files of one round's ranks get, until it is finished.

    Args:
        tails: The files.
    """

    def __init__(self, tails: Iterable[Tail]) -> None:
        self._tails = tuple(tails)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ranks-output", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def finish(self, timeout_s: float) -> None:
        """The ranks have ended: return when all that they wrote is passed on, or after ``timeout_s``.

        It goes on behind the caller's back then; a second call waits again.
        """
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        over = False
        while not over:
            over = self._over.wait(_LOOK_S)
            for tail in self._tails:
                # A full disk, most likely, where nobody could be told. The ranks are not to suffer.
                with contextlib.suppress(OSError):
                    tail.pass_on(last=over)
