"""What ``launch()`` promises on Ray, each on real agents and workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import ray
import torch

import kfpytorch_ray
from kfpytorch_ray import (
    Elastic,
    InfeasibleError,
    NodeLostError,
    RayBackend,
    RecoverableWorkerError,
    ResultError,
    RunPolicy,
    WorkerFailedError,
    WorkerHungError,
    launch,
    progress,
)
from kfpytorch_ray.errors import DeadlineExceededError
from kfpytorch_ray.heartbeat import MARK_VARIABLE
from kfpytorch_ray.results import Ending, Outcome
from kfpytorch_ray.testing import wait_until
from kfpytorch_ray.testing.processes import is_running as runs
from kfpytorch_ray.testing.processes import parent

until = partial(wait_until, what="the processes of a launch to end")

pytestmark = pytest.mark.usefixtures("local_ray")

TORCHRUN_PROBE = """
import json, os, sys
path = os.path.join(sys.argv[1], os.environ["RANK"])
with open(path, "w") as file:
    json.dump(dict(os.environ), file)
"""


def on_ray(nnodes: int | str = 1, nproc: int = 2, max_restarts: int = 0, **options: Any) -> Elastic:
    """A job on Ray."""
    return Elastic(nnodes=nnodes, nproc_per_node=nproc, max_restarts=max_restarts, backend=RayBackend(**options))


def test_agents_of_one_machine_import_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their fork servers are forks of one that the driver has started, also where its environment has changed since."""
    monkeypatch.setenv("NOT_THERE_WHEN_RAY_STARTED", "1")

    def lineage() -> tuple[int, int]:
        server = os.getppid()
        return server, parent(server)

    result = launch(lineage, elastic=on_ray(nnodes=2, nproc=1))
    (one, its), (other, others) = result[0].return_value, result[1].return_value
    assert one != other
    assert its == others
    until(lambda: not any(runs(pid) for pid in (one, other, its)))


def test_workers_find_what_torchrun_gives_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of two workers see the variables that torchrun sets, with the values torchrun would give."""
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("NOT_CARRIED", "x")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def probe() -> dict[str, Any]:
        import torch.distributed as dist

        dist.init_process_group()
        total = torch.ones(1)
        dist.all_reduce(total)
        return {
            "environment": dict(os.environ),
            "sum": float(total),
            "torchelastic": dist.is_torchelastic_launched(),
            "threads": torch.get_num_threads(),
            "main_is_ray": "default_worker" in str(getattr(sys.modules["__main__"], "__file__", "")),
        }

    result = launch(probe, elastic=on_ray(nnodes=2, max_restarts=3, env={"FROM_OPTIONS": "1"}))

    script = tmp_path / "probe.py"
    script.write_text(TORCHRUN_PROBE)
    folder = tmp_path / "torchrun"
    folder.mkdir()
    # torchrun leaves its folder for logs behind.
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"TMPDIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script), str(folder)],
        env=clean,
        check=True,
        capture_output=True,
    )
    by_torchrun = json.loads((folder / "1").read_text())
    # The one that torchrun sets for its own agent.
    set_by_torchrun = by_torchrun.keys() - clean.keys() - {"TORCHELASTIC_SIGNALS_TO_HANDLE"}

    assert len(result) == 4
    node = next(node for node in ray.nodes() if node["Alive"])
    for rank in range(4):
        seen = result[rank].return_value
        environment = seen["environment"]
        assert set_by_torchrun <= environment.keys()
        expected = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % 2),
            "GROUP_RANK": str(rank // 2),
            "ROLE_RANK": str(rank),
            "WORLD_SIZE": "4",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_WORLD_SIZE": "2",
            "ROLE_WORLD_SIZE": "4",
            "ROLE_NAME": by_torchrun["ROLE_NAME"],
            "MASTER_ADDR": node["NodeManagerAddress"],
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "3",
            "TORCHELASTIC_USE_AGENT_STORE": by_torchrun["TORCHELASTIC_USE_AGENT_STORE"],
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": by_torchrun["TORCH_NCCL_ASYNC_ERROR_HANDLING"],
            "OMP_NUM_THREADS": by_torchrun["OMP_NUM_THREADS"],
            "NCCL_DEBUG": "WARN",
            "FROM_OPTIONS": "1",
        }
        assert {name: environment.get(name) for name in expected} == expected
        assert "NOT_CARRIED" not in environment
        assert seen["sum"] == 4
        assert seen["torchelastic"]
        assert seen["threads"] == 1
        assert not seen["main_is_ray"]
    assert len({result[rank].return_value["environment"]["TORCHELASTIC_RUN_ID"] for rank in range(4)}) == 1


def test_other_ranks_values_are_not_fetched_unasked() -> None:
    """Values stay in the object store until somebody asks; tensors come home writable and share storage as before."""

    def work() -> dict[str, torch.Tensor]:
        weights = torch.full((4, 4), float(os.environ["RANK"]))
        return {"weights": weights, "row": weights[1]}

    result = launch(work, elastic=on_ray())

    assert "fetched=()" in repr(result)
    assert 1 in result
    assert "fetched=()" in repr(result)
    value = result[1].return_value
    assert "fetched=(1,)" in repr(result)
    value["row"][0] = 7
    assert value["weights"][1].tolist() == [7, 1, 1, 1]
    assert [record.outcome for record in result.rounds[0].ranks] == [Outcome.SUCCEEDED] * 2


def test_restart_after_a_failure_anywhere(tmp_path: Path) -> None:
    """One rank on one node raises: all ranks of all nodes start again, counted once for the whole group."""

    def work(folder: str) -> tuple[str, str]:
        import torch.distributed as dist

        dist.init_process_group()
        restarts = os.environ["TORCHELASTIC_RESTART_COUNT"]
        Path(folder, f"{os.environ['RANK']}-{restarts}").touch()
        if os.environ["RANK"] == "3" and restarts == "0":
            raise RuntimeError("first time")
        dist.barrier()
        return os.environ["RANK"], restarts

    result = launch(work, str(tmp_path), elastic=on_ray(nnodes=2, max_restarts=1))

    assert [result[rank].return_value for rank in range(4)] == [(str(rank), "1") for rank in range(4)]
    first, second = result.rounds
    assert first.ranks[3].outcome is Outcome.RAISED
    assert "RuntimeError: first time" in first.ranks[3].message
    assert not any(rank.outcome is Outcome.SUCCEEDED for rank in first.ranks)
    assert second.succeeded


def test_what_rank_0_tells_comes_home(capfd: pytest.CaptureFixture[str]) -> None:
    """Every round's steps and metrics are in its record, also those told right before its end; lines tell of it."""

    def work() -> None:
        restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        for step in range(10):
            progress(step, total=10, loss=1 / (step + 1), round=restarts, rank=int(os.environ["RANK"]))
        if restarts == 0 and os.environ["RANK"] == "0":
            raise ValueError(restarts)

    result = launch(work, elastic=on_ray(max_restarts=1))
    for index, record in enumerate(result.rounds):
        assert [(point.round_index, point.step, point.total) for point in record.metrics] == [
            (index, step, 10) for step in range(10)
        ]
        assert {(point.values["round"], point.values["rank"]) for point in record.metrics} == {(index, 0)}
        assert record.metrics[-1].values["loss"] == 0.1
    said = capfd.readouterr().err
    for text in ("round 1/2, ", "round 2/2, ", "succeeded at step 9/10 after"):
        assert f": {text}" in said


def test_error_names_rank_and_carries_the_users_exception() -> None:
    """The error says which rank on which node, with traceback and last output; the exception itself is the cause."""

    def work() -> None:
        print("before the end")
        if os.environ["RANK"] == "1":
            raise KeyError("lost key")

    with pytest.raises(WorkerFailedError) as caught:
        launch(work, elastic=on_ray())

    text = str(caught.value)
    assert "rank 1 (local rank 1 on node 0" in text
    assert "KeyError: 'lost key'" in text
    assert 'raise KeyError("lost key")' in text
    assert "before the end" in text
    assert "worker.py" not in text, "our own frames are noise"
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__cause__.args == ("lost key",)
    assert caught.value.timestamp > 0


def test_exception_class_that_exists_only_in_the_worker() -> None:
    """An exception that cannot be rebuilt here keeps its text."""

    def work() -> None:
        from types import ModuleType

        sys.modules["only_there"] = module = ModuleType("only_there")
        exec("class OnlyThere(Exception): pass", module.__dict__)
        raise module.OnlyThere("hello from there")

    with pytest.raises(WorkerFailedError, match="OnlyThere: hello from there") as caught:
        launch(work, elastic=on_ray(nproc=1))
    assert caught.value.__cause__ is None


def test_recoverable_error_is_retryable() -> None:
    """A subclass of FlyteRecoverableException ends as an error that Flyte retries."""

    def work() -> None:
        from flytekit.exceptions.user import FlyteRecoverableException

        class Flaky(FlyteRecoverableException):
            pass

        raise Flaky("try again")

    with pytest.raises(RecoverableWorkerError, match="try again") as caught:
        launch(work, elastic=on_ray(nproc=1))
    assert caught.value.retryable


def test_killed_rank_stops_ranks_in_a_collective_and_their_children(
    tmp_path: Path, eventually: Callable[[Callable[[], object], str], None]
) -> None:
    """SIGKILL of one rank: the others, blocked in an all_reduce, end at once, and so do their child processes."""

    def work(folder: str) -> None:
        import signal
        import subprocess

        import torch.distributed as dist

        dist.init_process_group()
        child = subprocess.Popen(["sleep", "1000"])
        Path(folder, os.environ["RANK"]).write_text(f"{os.getpid()} {child.pid}")
        dist.barrier()
        if os.environ["RANK"] == "2":
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
        signal.pause()

    with pytest.raises(WorkerFailedError) as caught:
        launch(work, str(tmp_path), elastic=on_ray(nnodes=2))

    text = str(caught.value)
    assert "rank 2" in text
    assert "SIGKILL" in text
    assert "out-of-memory" in text
    ranks = caught.value.rounds[0].ranks
    assert ranks[2].outcome is Outcome.KILLED
    assert ranks[2].exit_code == -9
    pids = [int(pid) for rank in range(4) for pid in (tmp_path / str(rank)).read_text().split()]
    assert len(pids) == 8
    eventually(lambda: not any(running(pid) for pid in pids), "workers and their children to end")


def running(pid: int) -> bool:
    """Whether a process exists and is more than an entry that waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(
    tmp_path: Path, eventually: Callable[[Callable[[], object], str], None]
) -> None:
    """Stopping is bounded: SIGTERM, the grace, SIGKILL."""

    def work(folder: str) -> None:
        import signal
        import time

        if os.environ["RANK"] == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Path(folder, "deaf").write_text(str(os.getpid()))
            while True:
                signal.pause()
        while not Path(folder, "deaf").exists():
            time.sleep(0.01)
        raise ValueError("end")

    with pytest.raises(WorkerFailedError, match="ValueError: end") as caught:
        launch(work, str(tmp_path), elastic=on_ray(stop_grace_s=0.5))
    deaf = caught.value.rounds[0].ranks[0]
    assert (deaf.outcome, deaf.exit_code) == (Outcome.STOPPED, -9)
    eventually(lambda: not running(int((tmp_path / "deaf").read_text())), "the deaf rank to end")


def test_other_nodes_do_not_wait_for_a_slow_stop(tmp_path: Path) -> None:
    """While a deaf rank beside the failed one uses up its grace, ranks on other nodes are stopped already."""

    def work(folder: str) -> None:
        import signal
        import time

        rank = os.environ["RANK"]

        def leave(*_: object) -> None:
            # Before or after the deaf rank on the other node was killed?
            deaf = int(Path(folder, "deaf").read_text())
            alive = Path(f"/proc/{deaf}/stat").exists()
            Path(folder, "order").write_text("deaf alive" if alive else "deaf gone")
            os._exit(1)

        if rank == "1":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Path(folder, "deaf").write_text(str(os.getpid()))
            while not Path(folder, "order").exists():
                time.sleep(0.01)
            return
        if rank == "2":
            signal.signal(signal.SIGTERM, leave)
            Path(folder, "waiting").touch()
        elif rank == "0":
            while not (Path(folder, "deaf").exists() and Path(folder, "waiting").exists()):
                time.sleep(0.01)
            raise ValueError("end")
        while True:
            signal.pause()

    with pytest.raises(WorkerFailedError, match="ValueError: end"):
        launch(work, str(tmp_path), elastic=on_ray(nnodes=2, stop_grace_s=60))
    assert (tmp_path / "order").read_text() == "deaf alive"


def test_the_store_outlives_the_workers_of_its_node(tmp_path: Path) -> None:
    """Rank 0 may return early: the others still have the store that it joined."""

    def work(folder: str) -> str:
        import time

        import torch.distributed as dist

        dist.init_process_group("gloo")
        dist.barrier()
        if dist.get_rank() == 0:
            Path(folder, "pid").write_text(str(os.getpid()))
            return "early"
        pid = Path(folder, "pid")
        while not pid.exists() or Path("/proc", pid.read_text()).exists():
            time.sleep(0.01)
        store = dist.distributed_c10d._get_default_store()
        store.set("late", "still there")
        return str(store.get("late").decode())

    result = launch(work, str(tmp_path), elastic=on_ray(nnodes=2, nproc=1))
    assert [result[rank].return_value for rank in range(2)] == ["early", "still there"]


def test_exit_handlers_run_in_workers(tmp_path: Path) -> None:
    """What a spawned process does at its exit, a worker does as well: loggers and trackers end their runs there."""

    def work(folder: str) -> None:
        import atexit

        rank = os.environ["RANK"]
        atexit.register(Path(folder, rank).touch)
        if rank == "1":
            sys.exit(0)

    launch(work, str(tmp_path), elastic=on_ray())
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_what_a_stopped_rank_raises_is_no_cause(tmp_path: Path) -> None:
    """A handler of SIGTERM that raises, in a rank that is being stopped, does not hide the rank that was killed."""

    def work(folder: str) -> None:
        import signal
        import time

        def handler(*_: object) -> None:
            raise ValueError("from the handler")

        if os.environ["RANK"] == "1":
            signal.signal(signal.SIGTERM, handler)
            Path(folder, "ready").touch()
            signal.pause()
        while not Path(folder, "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerFailedError, match=r"rank 0 .*SIGKILL") as caught:
        launch(work, str(tmp_path), elastic=on_ray())
    assert caught.value.rounds[0].ranks[1].outcome is Outcome.STOPPED


def test_leaving_with_exit_code_zero_returns_none() -> None:
    """``sys.exit(0)``, ``sys.exit()`` and ``os._exit(0)`` are no crash."""

    def work() -> str:
        rank = os.environ["RANK"]
        if rank == "0":
            sys.exit(0)
        if rank == "1":
            sys.exit()
        if rank == "2":
            os._exit(0)
        return "returned"

    result = launch(work, elastic=on_ray(nproc=4))
    assert [result[rank].return_value for rank in range(4)] == [None, None, None, "returned"]


def test_exit_code_is_reported() -> None:
    """``sys.exit(3)`` is a failure that says its exit code."""

    def work() -> None:
        if os.environ["RANK"] == "1":
            sys.exit(3)

    with pytest.raises(WorkerFailedError, match=r"rank 1 .* exit code 3") as caught:
        launch(work, elastic=on_ray())
    assert caught.value.rounds[0].ranks[1].outcome is Outcome.EXITED


def test_result_that_cannot_be_pickled_is_named_and_not_tried_again() -> None:
    """The error names rank and type; a restart would end the same way."""

    def work() -> Any:
        import threading

        return threading.Lock() if os.environ["RANK"] == "1" else 1

    with pytest.raises(ResultError, match=r"return value of rank 1 .*_thread\.lock") as caught:
        launch(work, elastic=on_ray(max_restarts=5))
    assert len(caught.value.rounds) == 1


def test_more_gpus_than_there_can_be_fails_at_once() -> None:
    """Demand that no node can meet says what was asked and what there is."""
    with pytest.raises(InfeasibleError, match=r"GPU: 8.*") as caught:
        launch(int, elastic=on_ray(resources_per_node={"CPU": 1, "GPU": 8}))
    assert "CPU: 8" in str(caught.value)


def test_deadline_stops_everything(tmp_path: Path) -> None:
    """RunPolicy(active_deadline_seconds) ends a launch that takes longer, and says how every rank was stopped."""

    def work(folder: str) -> None:
        import signal

        Path(folder, os.environ["RANK"]).touch()
        signal.pause()

    job = on_ray()
    job.run_policy = RunPolicy(active_deadline_seconds=10)
    with pytest.raises(DeadlineExceededError, match="active_deadline_seconds") as caught:
        launch(work, str(tmp_path), elastic=job)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
    assert [rank.outcome for rank in caught.value.rounds[-1].ranks] == [Outcome.STOPPED] * 2


def kill_own_agent() -> None:
    """SIGKILL of the agent that a worker belongs to, by its mark: its fork server may be another process's child."""
    import signal

    os.kill(int(os.environ[MARK_VARIABLE].split(os.pathsep)[0]), signal.SIGKILL)


def test_killed_agent_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    """SIGKILL of an agent costs a node failure and no restart; the other agent goes on, with its processes."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def work(folder: str) -> tuple[int, str, str]:
        import signal
        import time

        rank = os.environ["RANK"]
        first = not Path(folder, "killed").exists()
        Path(folder, rank).touch()
        while not all(Path(folder, other).exists() for other in "01"):
            time.sleep(0.01)
        if first and rank == "1":
            Path(folder, "killed").touch()
            kill_own_agent()
        if first:
            signal.pause()
        return os.getppid(), os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["GROUP_RANK"]

    result = launch(work, str(tmp_path), elastic=on_ray(nnodes=2, nproc=1))
    lost, _ = result.rounds
    assert [rank.outcome for rank in lost.ranks] == [Outcome.STOPPED, Outcome.LOST]
    assert lost.ending is Ending.NODE_LOST
    assert [result[rank].return_value[1:] for rank in (0, 1)] == [("0", "0"), ("0", "1")]


def test_lost_agents_end_the_launch_when_their_budget_is_spent(tmp_path: Path) -> None:
    """The error may be retried by Flyte and names node and budget; restarts that are left do not count for it."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def work() -> None:
        kill_own_agent()

    job = on_ray(nnodes=1, nproc=1, max_restarts=5, max_node_failures=1)
    with pytest.raises(NodeLostError, match=r"nodes lost: 2 of 1 \(max_node_failures\)") as caught:
        launch(work, elastic=job)
    assert caught.value.retryable
    assert [ended.ending for ended in caught.value.rounds] == [Ending.NODE_LOST] * 2


def test_the_same_crash_twice_is_not_tried_a_third_time() -> None:
    """Before any progress; after progress every restart is used."""

    def work(progresses: bool) -> None:
        if progresses:
            kfpytorch_ray.progress(0)
        msg = "always"
        raise ValueError(msg)

    with pytest.raises(WorkerFailedError, match="not tried again: the same rank failed at the same place") as caught:
        launch(work, False, elastic=on_ray(nproc=1, max_restarts=5))
    assert len(caught.value.rounds) == 2
    with pytest.raises(WorkerFailedError, match="Restarts used: 3 of 3") as caught:
        launch(work, True, elastic=on_ray(nproc=1, max_restarts=3))
    assert [ended.ranks[0].step for ended in caught.value.rounds] == [0] * 4


def test_a_hang_ends_with_everybodys_stacks() -> None:
    """A rank that waits for what never comes is found by the stacks; the wait is bounded by ``hang_timeout_s``."""

    def stuck_here() -> None:
        import threading

        threading.Event().wait()

    def work() -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        kfpytorch_ray.progress(41)
        if dist.get_rank() == 1:
            stuck_here()
        dist.barrier()

    with pytest.raises(WorkerHungError, match="stuck_here") as caught:
        launch(work, elastic=on_ray(hang_timeout_s=15.0))
    ranks = caught.value.rounds[-1].ranks
    assert [rank.outcome for rank in ranks] == [Outcome.HUNG] * 2
    assert [rank.step for rank in ranks] == [41, 41]
    assert "barrier" in ranks[0].stacks
    assert "stuck_here" in ranks[1].stacks


def test_checkpoints_are_in_the_same_place_in_every_round() -> None:
    """What one round wrote the next reads, on every rank; the first finds nothing, which is no error."""

    def work() -> tuple[bytes | None, bytes | None]:
        import flytekit
        import torch.distributed as dist

        dist.init_process_group("gloo")
        checkpoint = flytekit.current_context().checkpoint
        found = checkpoint.read()
        dist.barrier()
        if found is None:
            if dist.get_rank() == 0:
                checkpoint.write(b"after round 0")
            dist.barrier()
            msg = "half way"
            raise RuntimeError(msg)
        return found, checkpoint.read()

    result = launch(work, elastic=on_ray(max_restarts=1))
    assert [result[rank].return_value for rank in (0, 1)] == [(b"after round 0", b"after round 0")] * 2
    assert [rank.progressed for rank in result.rounds[0].ranks] == [True, False]


def test_workers_do_not_share_random_state() -> None:
    """Forks of one warm server draw different numbers, as spawned processes do."""

    def work() -> tuple[float, float]:
        import random

        import numpy as np

        return random.random(), float(np.random.rand())

    result = launch(work, elastic=on_ray(nproc=3))
    drawn = [result[rank].return_value for rank in range(3)]
    assert len({value for value, _ in drawn}) == 3
    assert len({value for _, value in drawn}) == 3
