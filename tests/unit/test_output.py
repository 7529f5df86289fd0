"""Lines of ranks from the files that they write to the rank's own file and the driver, by way of the agent."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import pytest

from kfpytorch_ray.cluster import log_archive
from kfpytorch_ray.cluster.log_archive import LogArchive, with_logs
from kfpytorch_ray.cluster.output import Tail, Tails
from kfpytorch_ray.cluster.output_spool import Cursor, OutputSource, OutputSpool
from kfpytorch_ray.cluster.rank_log import RankLog
from kfpytorch_ray.errors import StorageError
from kfpytorch_ray.results import ElasticResult, Outcome, RankRecord, RoundRecord
from kfpytorch_ray.storage import Digest, Storage
from kfpytorch_ray.testing import wait_until


def lines_of(*pieces: bytes, path: Path) -> list[str]:
    """What is passed on of a file that is written piece by piece."""
    taken: list[str] = []
    tail = Tail(str(path), [taken.append])
    tail.pass_on()
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            file.write(piece)
            tail.pass_on()
    tail.pass_on(last=True)
    text = "".join(taken)
    assert not text or text.endswith("\n")
    return text.split("\n")[:-1]


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
    """In whatever pieces they are written; the last one also without an end."""
    assert lines_of(*pieces, path=tmp_path / "out") == lines


def test_a_line_without_an_end_is_not_kept_for_ever(tmp_path: Path) -> None:
    """It is passed on in pieces: it may grow as long as its rank runs."""
    passed_on = lines_of(b"x" * 100_000, b"y" * 100_000, path=tmp_path / "out")
    assert len(passed_on) > 1
    assert "".join(passed_on) == "x" * 100_000 + "y" * 100_000


@pytest.mark.parametrize("line", [b"x" * 3_000_000, b"\xff" * 400_000], ids=["long", "not text"])
def test_a_long_line_stands_in_nobodys_way(line: bytes, tmp_path: Path) -> None:
    """A page of HTML or a file in base64: it comes in pieces, and what is printed after it comes as well."""
    (tmp_path / "spool").mkdir()
    spool, source = OutputSpool(tmp_path / "spool"), OutputSource(tmp_path / "spool")
    (tmp_path / "out").write_bytes(b"before\n" + line + b"\nafter\n")
    tail = Tail(str(tmp_path / "out"), [lambda text: spool.write(text, error=False)])
    tail.pass_on(last=True)
    source.end()
    cursor, text = Cursor(), ""
    while not (chunk := source.read(cursor, 60.0)).ended:
        cursor, text = chunk.cursor, text + "".join(part for _, part in chunk.texts)
        assert not chunk.left_out
    first, *pieces, last = text.splitlines()
    assert (first, last) == ("before", "after")
    assert "".join(pieces) == line.decode(errors="replace")


def test_what_was_written_last_is_passed_on_when_it_is_finished(tmp_path: Path) -> None:
    """Of all files, also of one that came late; one that never came is not waited for."""
    taken: list[str] = []
    done: list[bool] = []
    tails = Tails([Tail(str(tmp_path / str(rank)), [taken.append]) for rank in range(3)], [lambda: done.append(True)])
    tails.start()
    for rank in range(2):
        (tmp_path / str(rank)).write_text("".join(f"{rank}:{line}\n" for line in range(1000)))
    tails.finish(60)
    expected = [f"{rank}:{line}" for rank in range(2) for line in range(1000)]
    assert sorted("".join(taken).splitlines()) == sorted(expected)
    assert done == [True]


def test_a_taker_that_cannot_does_not_hold_up_the_others(tmp_path: Path) -> None:
    """A full disk under the rank's file: the driver still gets the lines."""

    def full(text: str) -> None:
        raise OSError(28, "No space left on device")

    taken: list[str] = []
    (tmp_path / "out").write_text("one\n")
    Tail(str(tmp_path / "out"), [full, taken.append]).pass_on(last=True)
    assert taken == ["one\n"]


def test_what_was_passed_on_is_given_back_to_the_disk(tmp_path: Path) -> None:
    """A rank that prints for weeks needs no more of the node's disk than its bound; its last lines stay."""
    path = tmp_path / "out"
    line = b"x" * 1023 + b"\n"
    tail = Tail(str(path), [])
    with path.open("wb", buffering=0) as file:
        for _ in range(64):
            file.write(line * 1024)
            tail.pass_on()
    if os.stat(path).st_blocks * 512 > 60 * 2**20:
        pytest.skip("this file system makes no holes")
    assert os.stat(path).st_blocks * 512 < 20 * 2**20
    assert path.read_bytes()[-(2**20) :] == line * 1024


@pytest.mark.parametrize("limit", [100, 101, 1000, 4096])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_a_rank_log_has_the_beginning_and_the_end(limit: int, batch: int, tmp_path: Path) -> None:
    """Whole lines, no more than the bound; what is missing between them is counted."""
    lines = [f"line {number}" for number in range(300)]
    log = RankLog(tmp_path / "round-0" / "rank-0.log", limit)
    for start in range(0, len(lines), batch):
        log.write("".join(f"{line}\n" for line in lines[start : start + batch]))
        assert sum(path.stat().st_size for path in tmp_path.rglob("rank-0.log*")) <= limit
    log.finish()
    (path,) = tmp_path.rglob("rank-0.log*")
    kept = path.read_text().splitlines()
    if path.stat().st_size <= limit and kept == lines:
        assert sum(len(line) + 1 for line in lines) <= limit
        return
    (gap,) = [index for index, line in enumerate(kept) if line.startswith("... ")]
    before, after = kept[:gap], kept[gap + 1 :]
    assert before == lines[: len(before)]
    assert after == lines[len(lines) - len(after) :]
    assert int(kept[gap].split()[1]) == len(lines) - len(before) - len(after)
    assert sum(len(line) + 1 for line in after) >= limit // 4 - 10


def test_a_last_line_that_is_longer_than_what_is_kept_is_kept_at_its_end(tmp_path: Path) -> None:
    """Most often it says why the rank failed."""
    log = RankLog(tmp_path / "rank-0.log", 400)
    log.write("".join(f"{number:08}\n" for number in range(100)))
    log.write("x" * 200 + "the end\n")
    log.finish()
    assert (tmp_path / "rank-0.log").read_text().endswith("xxxthe end\n")


def test_a_rank_log_below_its_bound_is_whole(tmp_path: Path) -> None:
    """Also where the end has begun: nothing is left out, and nothing said of it."""
    log = RankLog(tmp_path / "rank-0.log", 1000)
    for number in range(80):
        log.write(f"{number:08}\n")
    log.finish()
    assert (tmp_path / "rank-0.log").read_text() == "".join(f"{number:08}\n" for number in range(80))


def test_lines_are_taken_in_their_order(tmp_path: Path) -> None:
    """Of both streams; whoever asks with the same cursor again gets them again, and what has arrived is removed."""
    spool, source = OutputSpool(tmp_path), OutputSource(tmp_path)
    assert source.read(Cursor(), 0.0).texts == ()
    spool.write("one\ntwo\n", error=False)
    spool.write("odd \u2028 characters \x0c\n", error=True)
    spool.write("three\n", error=False)
    first = source.read(Cursor(), 60.0)
    assert first.texts == ((False, "one\ntwo\n"), (True, "odd \u2028 characters \x0c\n"), (False, "three\n"))
    assert source.read(Cursor(), 60.0) == first
    for _ in range(20):
        spool.write("x" * 2**19 + "\n", error=False)
    cursor, lines = first.cursor, 0
    while lines < 20:
        chunk = source.read(cursor, 60.0)
        cursor, lines = chunk.cursor, lines + sum(text.count("\n") for _, text in chunk.texts)
        assert not chunk.left_out
    source.read(cursor, 0.0)
    assert len([*tmp_path.glob("[0-9]*")]) == 1
    source.end()
    spool.write("the last\n", error=False)
    last = source.read(cursor, 60.0)
    assert (last.texts, last.ended) == (((False, "the last\n"),), False)
    assert source.read(last.cursor, 60.0).ended


def test_what_nobody_takes_is_bounded(tmp_path: Path) -> None:
    """The oldest lines go first, and it is said."""
    spool, source = OutputSpool(tmp_path, segment_bytes=1000), OutputSource(tmp_path)
    for number in range(1000):
        spool.write(f"{number:099}\n", error=False)
    assert len([*tmp_path.glob("[0-9]*")]) <= 17
    chunk = source.read(Cursor(), 60.0)
    assert chunk.left_out
    assert int(chunk.texts[0][1].split()[0]) > 0


def record(*ranks: int, index: int = 0) -> RoundRecord:
    made = tuple(RankRecord(rank, rank, 0, "n", Outcome.SUCCEEDED, 0, 0.0) for rank in ranks)
    return RoundRecord(index, len(ranks), ("n",), 0.0, 1.0, made)


def test_logs_are_kept_while_their_rank_runs(tmp_path: Path) -> None:
    """So that those of a node that is lost are there; parts that became one file are not kept twice."""
    own, kept = tmp_path / "own", tmp_path / "kept"
    log = RankLog(own / "round-0" / "rank-1.log", 100)
    archive = LogArchive(own, str(kept), first_copy_s=0.01)
    numbers = count()
    parts = tuple(f"{kept}/round-0/rank-1.log{part}" for part in ("", ".1"))
    while not all(Path(part).exists() for part in parts):
        log.write(f"line {next(numbers)}\n")
    (result,) = with_logs((record(0, 1),), str(kept))
    assert result.ranks[0].logs == ()
    assert result.ranks[1].logs[:2] == parts
    log.finish()
    archive.finish()
    assert [path.name for path in kept.rglob("*.log*")] == ["rank-1.log"]
    assert f"line {next(numbers) - 1}\n" in (kept / "round-0" / "rank-1.log").read_text()


def test_a_part_of_the_same_size_is_copied_again(tmp_path: Path) -> None:
    """Parts change places while a rank runs."""
    part, copy = tmp_path / "own" / "round-0" / "rank-1.log.2", tmp_path / "kept" / "round-0" / "rank-1.log.2"
    part.parent.mkdir(parents=True)
    part.write_text("before\n")
    archive = LogArchive(tmp_path / "own", str(tmp_path / "kept"), first_copy_s=0.01)
    wait_until(copy.exists, "the first copy")
    part.rename(part.with_suffix(".1"))
    part.write_text("after.\n")
    archive.finish()
    assert copy.read_text() == "after.\n"
    assert copy.with_suffix(".1").read_text() == "before\n"


def test_the_last_copy_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are removed after it."""
    failures = [StorageError("a gateway that was away for a moment")]

    def upload(storage: Storage, name: str, chunks: Iterable[bytes]) -> Digest:
        if failures:
            raise failures.pop()
        return real(storage, name, chunks)

    real = Storage.upload
    monkeypatch.setattr(Storage, "upload", upload)
    monkeypatch.setattr(log_archive, "_LAST_PAUSES_S", (0.0, 0.01))
    file = tmp_path / "own" / "round-0" / "rank-0.log"
    file.parent.mkdir(parents=True)
    file.write_text("line\n")
    LogArchive(tmp_path / "own", str(tmp_path / "kept"), first_copy_s=3600.0).finish()
    assert (tmp_path / "kept" / "round-0" / "rank-0.log").read_text() == "line\n"


def test_logs_by_rank(tmp_path: Path) -> None:
    """One for each round in which the rank left one; none where they are kept nowhere."""
    for index, rank in ((0, 0), (0, 1), (1, 0)):
        log = RankLog(tmp_path / f"round-{index}" / f"rank-{rank}.log", 100)
        log.finish()
    rounds = with_logs((record(0, 1, index=0), record(0, 1, index=1)), str(tmp_path))
    result = ElasticResult((0, 1), lambda rank: None, rounds)  # type: ignore[arg-type,return-value]
    assert result.logs == {
        0: (f"{tmp_path}/round-0/rank-0.log", f"{tmp_path}/round-1/rank-0.log"),
        1: (f"{tmp_path}/round-0/rank-1.log",),
    }
    assert with_logs((record(0),), "")[0].ranks[0].logs == ()


def test_a_copy_that_fails_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And tried again; nobody waits longer than was said."""
    (tmp_path / "own" / "round-0").mkdir(parents=True)
    (tmp_path / "own" / "round-0" / "rank-0.log").write_text("line\n")
    (tmp_path / "kept").write_text("in the way")
    archive = LogArchive(tmp_path / "own", str(tmp_path / "kept"), first_copy_s=0.01)
    wait_until(lambda: caplog.messages, "the failure to be said")
    archive.finish()
    assert len([message for message in caplog.messages if "could not be kept" in message]) == 1
