"""What the doctor's ranks do between each other and with the storage, in threads of one process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from kfpytorch_ray.cluster.doctor.exchange import Beacon, answer
from kfpytorch_ray.cluster.doctor.peers import Place, connect_all, place
from kfpytorch_ray.cluster.doctor.report import Peer
from kfpytorch_ray.storage import Storage
from kfpytorch_ray.testing import wait_until

LOOPBACK = "127.0.0.1"


@pytest.fixture
def master() -> Iterator[tuple[str, int]]:
    """A round's store, as the agent of rank 0's node opens it."""
    store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    yield LOOPBACK, store.port
    del store


def test_this_nodes_place() -> None:
    """The address on the way to rank 0's node, and the interface that has it."""
    assert place(LOOPBACK) == Place(LOOPBACK, "lo")


def test_all_ranks_connect_to_each_other(master: tuple[str, int]) -> None:
    """Each to all others, and learns how far its clock is: here it is the same."""
    with ThreadPoolExecutor(3) as ranks:
        found = list(ranks.map(lambda rank: connect_all(rank, 3, master, place(LOOPBACK)), range(3)))
    assert [[peer.rank for peer in one] for one in found] == [[1, 2], [0, 2], [0, 1]]
    for peer in (peer for one in found for peer in one):
        assert peer.error == ""
        assert peer.ahead is not None
        # Both read the same clock, which may have been adjusted in between.
        assert peer.ahead.low - 0.01 <= 0 <= peer.ahead.high + 0.01


def test_one_rank_alone() -> None:
    """It has nobody to connect to, and needs no store."""
    assert connect_all(0, 1, (LOOPBACK, 1), place(LOOPBACK)) == ()


def test_a_node_that_others_cannot_reach(master: tuple[str, int]) -> None:
    """It reaches them; they say which node, by which address and why, and all of them end."""
    nowhere = Place("no-such-node.invalid", "")
    with ThreadPoolExecutor(2) as ranks:
        other = ranks.submit(connect_all, 1, 2, master, place(LOOPBACK))
        (there,) = ranks.submit(connect_all, 0, 2, master, nowhere).result()
        (back,) = other.result()
    assert (there.rank, there.error) == (1, "")
    assert back.rank == 0
    assert back.error.startswith("no-such-node.invalid:")
    assert back.ahead is None


def test_a_node_that_cannot_reach_rank_0s() -> None:
    """It says so at once, with the reason."""
    with socket.socket() as closed:
        closed.bind((LOOPBACK, 0))
        port = closed.getsockname()[1]
        (found,) = connect_all(1, 2, (LOOPBACK, port), place(LOOPBACK))
    assert found.rank == 0
    assert f"{LOOPBACK}:{port}" in found.error
    assert "refused" in found.error


def test_a_rank_that_does_not_come(master: tuple[str, int]) -> None:
    """The others do not wait for ever, and say who is missing."""
    (found,) = connect_all(0, 2, master, place(LOOPBACK), patience_s=0.5)
    assert found == Peer(1, "it did not say where it is in time")


def test_the_exchange(tmp_path: Path) -> None:
    """A node reads the time of the machine that launches, which sees the node's; neither is in the future."""
    uri = str(tmp_path / "exchange")
    with Beacon(Storage(uri)) as beacon:
        said = answer(uri, 3)
        wait_until(lambda: 3 in beacon.seen_at, "the node's answer to be seen")
    assert said.error == ""
    assert said.beat_at is not None
    assert said.beat_at <= said.read_at
    written_at, seen_at = beacon.seen_at[3]
    assert written_at <= seen_at
    assert "kfpytorch-ray-doctor" not in {thread.name for thread in threading.enumerate()}


def test_a_node_that_sees_another_folder(tmp_path: Path) -> None:
    """It can write, but does not see what was written by the other side."""
    assert "cannot be seen" in answer(str(tmp_path / "mine"), 0, patience_s=0.1).error


def test_a_node_that_cannot_write(tmp_path: Path) -> None:
    """The storage's own words say why."""
    (tmp_path / "file").write_text("")
    assert "cannot be" in answer(str(tmp_path / "file" / "below"), 0).error


def test_the_beacon_outlives_a_storage_that_fails(tmp_path: Path) -> None:
    """What is wrong with it is found out elsewhere."""
    (tmp_path / "file").write_text("")
    with Beacon(Storage(str(tmp_path / "file" / "below"))) as beacon:
        pass
    assert beacon.seen_at == {}
