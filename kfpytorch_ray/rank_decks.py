"""The flytekit decks of a rank on their way out of its process: a file, so that they survive the rank.

Written when the function has returned or raised, and where every rank's decks are wanted also from time to time: a rank
that is stopped because another one failed gets no chance to write anything. Agents import this module to read them, so
it does without flytekit there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfpytorch_ray.report.data import RankDeck

if TYPE_CHECKING:
    from flytekit import Deck

logger = logging.getLogger(__name__)

RANK_0, ALL = "rank0", "all"
CHOICES = (RANK_0, ALL)
"""Values of ``RayBackend(decks=...)``."""

_FIRST_S = 0.25
_EVERY_S = 2.0
_MOST_CHARACTERS = 16_000_000
"""Of all decks of a rank; a plotly figure with its library has 5 million."""


def file_of(folder: Path, decks: str, rank: int, local_rank: int) -> str:
    """Where a rank is to leave its decks; empty where nobody asks for them.

    Args:
        folder: Of the round on this node.
        decks: One of ``CHOICES``.
        rank: Global rank.
        local_rank: On its node.
    """
    return str(folder / f"decks-{local_rank}") if decks == ALL or rank == 0 else ""


@contextlib.contextmanager
def kept(decks: list[Deck], path: Path, rank: int, *, always: bool) -> Iterator[None]:
    """Leave a rank's decks in a file.

    Args:
        decks: The list to which the rank's context adds them.
        path: Of the file.
        rank: Global rank.
        always: Whether they are wanted however the block ends, and as they are meanwhile. Otherwise only where it
            raises: those of a rank that returns come with its result.
    """
    over = threading.Event()
    keeper = threading.Thread(target=_keep, args=(decks, path, rank, over), name="decks", daemon=True)
    if always:
        keeper.start()
    raised = True
    try:
        yield
        raised = False
    finally:
        if always:
            over.set()
            keeper.join()
        if always or raised:
            _write([*decks], path, rank)


def read(path: str) -> tuple[RankDeck, ...]:
    """The decks that a rank has left; none where it has left none, or was killed while it wrote the first."""
    if not path or not os.path.exists(path):
        return ()
    found: tuple[RankDeck, ...] = pickle.loads(Path(path).read_bytes())
    return found


def _keep(decks: list[Deck], path: Path, rank: int, over: threading.Event) -> None:
    from flytekit import Deck

    written: list[tuple[str, int]] = []
    pause_s = _FIRST_S
    while not over.wait(pause_s):
        pause_s = min(2 * pause_s, _EVERY_S)
        # A deck whose HTML is drawn when it is asked for may be half filled, and its code is not made for threads.
        plain = [deck for deck in [*decks] if type(deck) is Deck]
        now = [(deck.name, len(deck.html)) for deck in plain]
        if now != written:
            _write(plain, path, rank)
            written = now


def _write(decks: list[Any], path: Path, rank: int) -> None:
    from flytekit.deck.deck import TimeLineDeck

    try:
        data = pickle.dumps(tuple(_shown(deck, rank) for deck in decks if not isinstance(deck, TimeLineDeck)))
        partial = path.with_suffix(".partial")
        partial.write_bytes(data)
        partial.rename(path)
    except Exception:
        # Drawn by code of the user's, for a disk that may be full: no reason to fail a training.
        logger.warning("The decks of rank %s could not be kept.", rank, exc_info=True)


def _shown(deck: Deck, rank: int) -> RankDeck:
    html = str(deck.html)
    if len(html) > _MOST_CHARACTERS:
        html = f"<p>This deck has {len(html)} characters and is not brought home: {_MOST_CHARACTERS} at most are.</p>"
    return RankDeck(rank, str(deck.name), html)
