from __future__ import annotations

from pathlib import Path

import pytest
from flytekit import Deck
from flytekit.deck.deck import TimeLineDeck

from kfpytorch_ray.rank_decks import file_of, kept, read
from kfpytorch_ray.report.data import RankDeck
from kfpytorch_ray.testing import wait_until


def deck(name: str, html: str) -> Deck:
    return Deck(name, html, auto_add_to_deck=False)


class Broken(Deck):  # type: ignore[misc] # flytekit ships no py.typed
    @property
    def html(self) -> str:
        raise RuntimeError("drawn from what is gone")


def test_all_decks_are_there_however_a_rank_ends(tmp_path: Path) -> None:
    """Those that are there at the end, without flytekit's timeline; also where the rank raises."""
    path = tmp_path / "decks"
    decks = [TimeLineDeck("timeline", auto_add_to_deck=False)]
    with kept(decks, path, 3, always=True):
        decks.append(deck("curve", "<p>1</p>"))
    assert read(str(path)) == (RankDeck(3, "curve", "<p>1</p>"),)
    decks.append(deck("more", "<p>2</p>"))
    with pytest.raises(ValueError, match="oh"), kept(decks, path, 3, always=True):
        raise ValueError("oh")
    assert [one.name for one in read(str(path))] == ["curve", "more"]


def test_rank_0s_are_left_only_where_it_raises(tmp_path: Path) -> None:
    """They come with the result otherwise."""
    path = tmp_path / "decks"
    with kept([deck("curve", "")], path, 0, always=False):
        pass
    assert read(str(path)) == ()
    with pytest.raises(SystemExit), kept([deck("curve", "")], path, 0, always=False):
        raise SystemExit(3)
    assert read(str(path)) == (RankDeck(0, "curve", ""),)


def test_decks_are_there_while_the_rank_runs(tmp_path: Path) -> None:
    """A rank that is stopped has left what it had drawn by then, and what it has added to it since."""
    path = tmp_path / "decks"
    decks: list[Deck] = []
    with kept(decks, path, 1, always=True):
        decks.append(deck("curve", "<p>1</p>"))
        wait_until(lambda: read(str(path)) == (RankDeck(1, "curve", "<p>1</p>"),), "the deck", timeout_s=60)
        decks[0].append("<p>2</p>")
        wait_until(lambda: "<p>2</p>" in read(str(path))[0].html, "the deck", timeout_s=60)


def test_a_deck_that_cannot_be_drawn_fails_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said in the log; nothing of it comes home."""
    with kept([Broken("broken", auto_add_to_deck=False)], tmp_path / "decks", 2, always=True):
        pass
    assert "decks of rank 2 could not be kept" in caplog.text
    assert read(str(tmp_path / "decks")) == ()


def test_a_deck_without_measure_stays_where_it_is(tmp_path: Path) -> None:
    """Its size is told instead."""
    with kept([deck("huge", "x" * 16_000_001)], tmp_path / "decks", 0, always=True):
        pass
    (told,) = read(str(tmp_path / "decks"))
    assert "16000001 characters" in told.html
    assert len(told.html) < 200


@pytest.mark.parametrize(
    ("decks", "rank", "name"), [("rank0", 0, "decks-0"), ("rank0", 2, ""), ("all", 2, "decks-0"), ("all", 0, "decks-0")]
)
def test_whose_decks_are_asked_for(decks: str, rank: int, name: str) -> None:
    """Rank 0's by default."""
    found = file_of(Path("round-0"), decks, rank, 0)
    assert found == (f"round-0/{name}" if name else "")
    assert read("") == ()
