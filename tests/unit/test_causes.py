from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfpytorch_ray.cluster.causes import alike, failures, may_miss_a_peer, root_cause
from kfpytorch_ray.results import Outcome, RankRecord, RoundRecord

PEER_REPORTS = [
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:31742",
    "RuntimeError: [../gloo/transport/tcp/pair.cc:598] Read error [10.0.0.2]:31742: Connection reset by peer",
    "RuntimeError: [../gloo/transport/tcp/pair.cc:511] writev [10.0.0.2]:4711: Broken pipe",
    "RuntimeError: [../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation",
    "DistNetworkError: The client socket has timed out after 60000ms while trying to connect to (10.0.0.2, 29500).",
    "DistNetworkError: failed to recv, got 0 bytes",
    "DistStoreError: Timed out after 61 seconds waiting for clients. 1/2 clients joined.",
    "DistStoreError: wait timeout after 300000ms, keys: /default_pg/0//cpu//0",
    "DistBackendError: NCCL error: remote process exited or there was a network error, NCCL version 2.20.5",
    "DistBackendError: NCCL error in: x.cpp:2006, ncclRemoteError: A call failed possibly due to a network error.",
    "RuntimeError: NCCL communicator was aborted on rank 1.",
    "RuntimeError: [../gloo/transport/tcp/pair.cc:584] Application timeout caused pair closure",
    "RuntimeError: [Rank 0]: Rank 1 failed to pass monitoredBarrier in 1000 ms (gloo)",
    "DistBackendError: [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)",
]
OWN_FAULTS = [
    "ValueError: bad batch",
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    "ValueError: timeout must be positive",
    "KeyError: 'connection'",
    "ConnectionRefusedError: [Errno 111] Connection refused",  # by a data server of the user's
    "RuntimeError: the peer review is closed",
]


def record(
    rank: int = 0, outcome: Outcome = Outcome.RAISED, message: str = "", at: float = 0.0, **f: Any
) -> RankRecord:
    code = {Outcome.SUCCEEDED: 0, Outcome.KILLED: -9, Outcome.LOST: None}.get(outcome, 1)
    plain: dict[str, Any] = {"local_rank": rank % 2, "node_rank": rank // 2, "node": f"10.0.0.{rank // 2}"}
    return RankRecord(rank=rank, outcome=outcome, exit_code=code, timestamp=at, message=message, **{**plain, **f})


def round_of(*ranks: RankRecord, index: int = 0) -> RoundRecord:
    nodes = tuple(sorted({rank.node for rank in ranks}))
    return RoundRecord(index, len(ranks), nodes, started_at=0.0, ended_at=9.0, ranks=ranks)


BEST_FIRST = [
    (Outcome.RAISED, "ValueError: bad batch"),
    (Outcome.EXITED, "left with exit code 3 without an exception"),
    (Outcome.KILLED, "killed by SIGKILL"),
    (Outcome.LOST, "lost with its node: it is dead"),
    (Outcome.HUNG, "made no progress for 60 s"),
    (Outcome.KILLED, "killed by SIGABRT"),
    (Outcome.RAISED, PEER_REPORTS[0]),
]
"""Ways to fail, from the one that explains the others best."""

ENDS = [*BEST_FIRST, (Outcome.SUCCEEDED, ""), (Outcome.STOPPED, "stopped with the round")]


@st.composite
def rounds(draw: st.DrawFn) -> RoundRecord:
    """Rounds in which at least one rank failed of itself; many ranks end at the same moment."""
    ends = [draw(st.sampled_from(BEST_FIRST)), *draw(st.lists(st.sampled_from(ENDS), max_size=7))]
    return round_of(
        *(
            record(rank, outcome, message, at=float(draw(st.integers(0, 3))))
            for rank, (outcome, message) in zip(draw(st.permutations(range(len(ends)))), ends, strict=True)
        )
    )


@pytest.mark.parametrize("better", range(len(BEST_FIRST) - 1))
def test_what_a_rank_did_explains_more_than_what_befell_it(better: int) -> None:
    """Exceptions before exit codes, signals, lost nodes, aborts and reports of a peer's death, however late."""
    for worse in range(better + 1, len(BEST_FIRST)):
        early = record(0, *BEST_FIRST[worse], at=1.0)
        late = record(1, *BEST_FIRST[better], at=2.0)
        assert root_cause(round_of(early, late)) is late


@pytest.mark.parametrize("message", PEER_REPORTS)
def test_a_rank_that_reports_a_peers_death_is_not_the_cause(message: str) -> None:
    """What torch.distributed raises in the survivors never hides the rank that died."""
    survivor = record(0, Outcome.RAISED, message, at=1.0)
    died = record(1, Outcome.KILLED, "killed by SIGABRT", at=2.0)
    assert root_cause(round_of(survivor, died)) is died


@pytest.mark.parametrize("message", PEER_REPORTS)
def test_a_report_of_a_peers_death_is_the_cause_when_it_is_all_there_is(message: str) -> None:
    """A round that failed always has a cause."""
    reported = record(1, Outcome.RAISED, message)
    assert root_cause(round_of(record(0, Outcome.STOPPED), reported)) is reported


@pytest.mark.parametrize("message", OWN_FAULTS)
def test_words_like_those_of_a_peers_death_are_a_ranks_own_fault(message: str) -> None:
    """Only what torch.distributed says of other ranks counts as such."""
    killed = record(0, Outcome.KILLED, "killed by SIGKILL", at=1.0)
    raised = record(1, Outcome.RAISED, message, at=2.0)
    assert root_cause(round_of(killed, raised)) is raised


@pytest.mark.parametrize("end", BEST_FIRST)
def test_the_earliest_of_a_kind_is_the_cause(end: tuple[Outcome, str]) -> None:
    """Among ranks that failed alike, time decides; at the same moment the lowest rank."""
    late, early, same = record(0, *end, at=3.0), record(1, *end, at=1.0), record(2, *end, at=1.0)
    assert root_cause(round_of(late, early, same)) is early
    assert root_cause(round_of(late, same, early)) is early


@given(rounds())
def test_a_stopped_or_succeeded_rank_is_never_the_cause(ended: RoundRecord) -> None:
    """Ranks that this launch stopped, and ranks that returned, explain nothing."""
    innocent = (Outcome.SUCCEEDED, Outcome.STOPPED)
    assert root_cause(ended).outcome not in innocent
    assert failures(ended) == tuple(rank for rank in ended.ranks if rank.outcome not in innocent)


@given(rounds(), st.data())
def test_the_cause_does_not_depend_on_the_order_of_ranks(ended: RoundRecord, data: st.DataObject) -> None:
    """Whichever agent reports first, the same rank is named."""
    again = round_of(*data.draw(st.permutations(ended.ranks)))
    assert root_cause(again) == root_cause(ended)


def test_a_round_without_a_failed_rank_has_no_cause() -> None:
    """Asking for it is a mistake, not a wrong answer."""
    with pytest.raises(ValueError, match="no failed rank"):
        root_cause(round_of(record(0, Outcome.SUCCEEDED), record(1, Outcome.STOPPED)))


def test_ranks_that_failed_alike_say_the_same() -> None:
    """Same outcome and same message; where and when does not matter."""
    one = record(0, Outcome.RAISED, "ValueError: 1", at=1.0)
    assert alike(one, record(5, Outcome.RAISED, "ValueError: 1", at=2.0))
    assert not alike(one, record(5, Outcome.RAISED, "ValueError: 2"))
    assert not alike(record(0, Outcome.EXITED, "x"), record(1, Outcome.KILLED, "x"))


def test_a_refused_connection_inside_torch_distributed_is_a_peers() -> None:
    """The same words are a report of a peer's death where torch.distributed said them."""
    trace = 'File "/venv/lib/python3.11/site-packages/torch/distributed/rendezvous.py", line 1, in _create_c10d_store'
    survivor = record(0, Outcome.RAISED, "ConnectionRefusedError: Connection refused", at=1.0, traceback=trace)
    died = record(1, Outcome.KILLED, "killed by SIGABRT", at=2.0)
    assert root_cause(round_of(survivor, died)) is died


def test_the_out_of_memory_killer_explains_more_than_another_signal() -> None:
    """A rank that the kernel ended for its memory is the cause, also when another was killed before."""
    killed = record(0, Outcome.KILLED, "killed by SIGTERM", at=1.0)
    oom = record(1, Outcome.KILLED, "killed by SIGKILL: out of memory", at=2.0, out_of_memory=True)
    assert root_cause(round_of(killed, oom)) is oom


@pytest.mark.parametrize("message", PEER_REPORTS)
def test_reports_of_peers_are_told_from_other_failures(message: str) -> None:
    """What is excused when nodes come and go is no more than that."""
    assert may_miss_a_peer(record(0, Outcome.RAISED, message))
    assert not may_miss_a_peer(record(0, Outcome.RAISED, "ValueError: bad batch"))
    assert not may_miss_a_peer(record(0, Outcome.KILLED, "killed by SIGKILL"))
