"""torch elastic's agent, with three decisions taken elsewhere: who takes part, where workers come from, when to stop.

Ranks and the master address come from the controller instead of a vote of peers, workers from the warm fork server,
and one ``run()`` is one round: restarts are the controller's. Everything else is torch's: the environment contract,
error files, log redirection, the watchdog.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import Store, TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.api import RendezvousGracefulExitError

from kfpytorch_ray.cluster import worker
from kfpytorch_ray.cluster.output import RoundOutput
from kfpytorch_ray.cluster.processes import ForkedWorkers
from kfpytorch_ray.cluster.protocol import AgentSetup, RoundAssignment, StopRound
from kfpytorch_ray.cluster.protocol import WorkerSpec as ProcessSpec
from kfpytorch_ray.cluster.records import Ended
from kfpytorch_ray.heartbeat import HeartbeatPage
from kfpytorch_ray.plan import Contract

_ENDED = "the controller ended the round"

ROLE = "default"
"""ROLE_NAME of every worker, as torchrun has it without ``--role``."""


def open_store(address: str) -> TCPStore:
    """Open the store that the workers of one round join, on a port that the kernel picks.

    It is open before any worker starts, so no port can be lost to somebody else in between.
    """
    return TCPStore(address, 0, is_master=True, wait_for_workers=False, multi_tenant=True)


class AssignedRendezvous(RendezvousHandler):
    """A rendezvous whose answer is known: the controller's assignment."""

    def __init__(self, run_id: str, assignment: RoundAssignment, store: Store | None) -> None:
        self._run_id = run_id
        self._assignment = assignment
        self._store = store

    def get_backend(self) -> str:
        """Name in torch's event log."""
        return "kfpytorch_ray"

    @property
    def use_agent_store(self) -> bool:
        """Workers join the store of rank 0's agent as clients."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """The assignment; never waits."""
        given = self._assignment
        # Only rank assignment by votes reads the store, and this agent does not vote.
        return RendezvousInfo(
            self._store,  # type: ignore[arg-type]
            given.node_rank,
            given.node_count,
            RendezvousStoreInfo(given.master_address, given.master_port),
        )

    def is_closed(self) -> bool:
        """Never: the controller ends rounds."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def num_nodes_waiting(self) -> int:
        """None: the controller sees nodes come and go."""
        return 0

    def get_run_id(self) -> str:
        """The launch's run id."""
        return self._run_id

    def shutdown(self) -> bool:
        """Nothing to shut down."""
        return True


class RoundAgent(LocalElasticAgent):
    """Runs the workers of one node for one round.

    Args:
        setup: What holds for all rounds.
        assignment: This round.
        store: The store of this round if it lives here.
        log_folder: Folder of this round's output and error files; must exist.
        make_spec: As in ``ForkedWorkers``.
        orders: Becomes readable when ``stop_ordered`` should be asked.
        stop_ordered: How the controller ended the round; None if it has not.
        failing: Called when a worker has failed, before the others are stopped.
        page: The node's heartbeat page, on which the round has begun.
        output: As in ``ForkedWorkers``.
    """

    def __init__(
        self,
        setup: AgentSetup,
        assignment: RoundAssignment,
        store: Store | None,
        log_folder: str,
        make_spec: Callable[[int, Mapping[str, str], str, str], ProcessSpec],
        orders: Connection,
        stop_ordered: Callable[[], StopRound | None],
        failing: Callable[[], None],
        page: HeartbeatPage,
        output: RoundOutput,
    ) -> None:
        spec = WorkerSpec(
            role=ROLE,
            local_world_size=setup.nproc_per_node,
            rdzv_handler=AssignedRendezvous(setup.run_id, assignment, store),
            entrypoint=worker.main,
            # torch counts a restart as max minus remaining; both ends are set so that the difference is ours.
            max_restarts=max(setup.max_restarts, assignment.restart_count),
            monitor_interval=setup.monitor_interval_s,
        )
        super().__init__(
            spec,
            DefaultLogsSpecs(log_dir=log_folder, redirects=Std.ALL),
        )
        self._remaining_restarts = spec.max_restarts - assignment.restart_count
        self._setup = setup
        self._assignment = assignment
        self._make_spec = make_spec
        self._orders = orders
        self._stop_ordered = stop_ordered
        self._failing = failing
        self._page = page
        self._output = output
        self.workers: ForkedWorkers | None = None

    def ended(self) -> Mapping[int, Ended]:
        """How workers ended, by local rank; none for one that never started."""
        return {} if self.workers is None else self.workers.ended

    def _assign_worker_ranks(
        self, store: Store, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        # Every node has as many workers: ranks are arithmetic, as in torch's own fast path.
        world_size = group_world_size * spec.local_world_size
        first = group_rank * spec.local_world_size
        return [
            Worker(
                local_rank=local_rank,
                global_rank=first + local_rank,
                role_rank=first + local_rank,
                world_size=world_size,
                role_world_size=world_size,
            )
            for local_rank in range(spec.local_world_size)
        ]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        envs = {member.local_rank: self._worker_environment(member) for member in worker_group.workers}
        if self._setup.contract is Contract.TORCHRUN:
            # torch's watchdog is a part of torchrun and wants its run id.
            self._setup_local_watchdog(envs=envs)
        self._setup_healthcheck()
        self.workers = ForkedWorkers(
            name=ROLE,
            envs=envs,
            logs_specs=self._logs_specs,
            make_spec=self._make_spec,
            stop_grace_s=self._setup.stop_grace_s,
            failing=self._failing,
            page=self._page,
            output=self._output,
        )
        self._pcontext = self.workers
        self.workers.start()
        return self.workers.pids()

    def _worker_environment(self, member: Worker) -> dict[str, str]:
        group = self._worker_group
        spec = group.spec
        if self._setup.contract is Contract.OPERATOR:
            contract = {
                "MASTER_ADDR": str(group.master_addr),
                "MASTER_PORT": str(group.master_port),
                "RANK": str(member.global_rank),
                "WORLD_SIZE": str(member.world_size),
                "PET_MASTER_ADDR": str(group.master_addr),
                "PET_MASTER_PORT": str(group.master_port),
                "PET_NNODES": str(group.group_world_size),
                "PET_NODE_RANK": str(group.group_rank),
                "PYTHONUNBUFFERED": "1",
                # Not the operator's: the store is open already, and rank 0 must not open another on its port.
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
        else:
            contract = {
                "RANK": str(member.global_rank),
                "GROUP_RANK": str(group.group_rank),
                "ROLE_RANK": str(member.role_rank),
                "ROLE_NAME": spec.role,
                "LOCAL_WORLD_SIZE": str(spec.local_world_size),
                "WORLD_SIZE": str(member.world_size),
                "GROUP_WORLD_SIZE": str(group.group_world_size),
                "ROLE_WORLD_SIZE": str(member.role_world_size),
                "MASTER_ADDR": str(group.master_addr),
                "MASTER_PORT": str(group.master_port),
                "TORCHELASTIC_RESTART_COUNT": str(self._assignment.restart_count),
                "TORCHELASTIC_MAX_RESTARTS": str(self._setup.max_restarts),
                "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
                "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
                "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
                "LOCAL_RANK": str(member.local_rank),
                # Not torchrun's: what a worker's own children have printed when they crash is to be there.
                "PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED", "1"),
            }
        return {**os.environ, **contract}

    def _invoke_run(self, role: str = ROLE) -> RunResult:
        """One round: torch's loop without sleep, restarts and exit barrier."""
        if self._stop_ordered():
            raise RendezvousGracefulExitError(_ENDED)
        self._initialize_workers(self._worker_group)
        assert self.workers is not None
        while True:
            self.workers.wait_for_change(self._worker_group.spec.monitor_interval, self._orders)
            result: RunResult = self._monitor_workers(self._worker_group)
            self._worker_group.state = result.state
            if result.state is not WorkerState.HEALTHY:
                return result
            if order := self._stop_ordered():
                if order.hung:
                    self.workers.take_stacks()
                raise RendezvousGracefulExitError(_ENDED)
