"""A thousand agents without their nodes: what the controller itself costs, with answers that are there at once.

The driver's modules are the real ones; ``ray`` in them is a double whose actors answer in this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from kfpytorch_ray.cluster import controller, membership, pulse, rounds
from kfpytorch_ray.cluster.controller import Controller
from kfpytorch_ray.cluster.limits import Budgets, Limits
from kfpytorch_ray.cluster.membership import Membership
from kfpytorch_ray.cluster.placement import Slot
from kfpytorch_ray.cluster.protocol import AgentSetup, NodePulse, NodeReport, RoundAssignment
from kfpytorch_ray.cluster.recording import Recorder
from kfpytorch_ray.live.view import Live, Silent
from kfpytorch_ray.plan import Contract, FlyteContext
from kfpytorch_ray.results import Outcome, RankRecord


class _Ref:
    def __init__(self, value: Any) -> None:
        self.value = value

    def future(self) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self.value)
        return future


class _Method:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def options(self, **_options: Any) -> _Method:
        return self

    def remote(self, *arguments: Any) -> Any:
        answer = self._function(*arguments)
        return [_Ref(part) for part in answer] if isinstance(answer, list) else _Ref(answer)


class _Agent:
    """An agent whose workers fail in the first round and return at once in the second."""

    def __init__(self, setup: AgentSetup, address: str) -> None:
        self._setup = setup
        self._address = address

    def __getattr__(self, name: str) -> _Method:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Method(getattr(self, f"_{name}", lambda *_: None))

    def _open_store(self) -> int:
        return 29500

    def _pulse(self) -> NodePulse:
        return NodePulse(None, 0.0, False)

    def _collect(self) -> list[Any]:
        return [True, *([None] * self._setup.nproc_per_node)]

    def _run_round(self, given: RoundAssignment) -> NodeReport:
        nproc = self._setup.nproc_per_node
        failed = given.restart_count == 0 and given.node_rank == 0
        outcomes = [Outcome.RAISED if failed else Outcome.STOPPED if given.restart_count == 0 else Outcome.SUCCEEDED]
        return NodeReport(
            given.node_rank,
            tuple(
                RankRecord(
                    rank=given.node_rank * nproc + local,
                    local_rank=local,
                    node_rank=given.node_rank,
                    node=self._address,
                    outcome=outcomes[0],
                    exit_code=0,
                    timestamp=time.time(),
                    message="",
                )
                for local in range(nproc)
            ),
        )


class _Actor:
    @staticmethod
    def remote(setup: AgentSetup, address: str, _zygote: None) -> _Agent:
        return _Agent(setup, address)


class _Ray:
    """What the driver's modules use of ray."""

    def __init__(self, agents: int, setup: AgentSetup) -> None:
        self._nodes = [
            {"NodeID": f"node-{index}", "NodeManagerAddress": f"10.0.{index // 256}.{index % 256}", "Alive": True}
            for index in range(agents)
        ]
        self._setup = setup

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def put(self, value: Any) -> _Ref:
        return _Ref(value)

    def get(self, ref: _Ref) -> Any:
        return ref.value

    def wait(self, refs: list[_Ref], **_options: Any) -> tuple[list[_Ref], list[_Ref]]:
        return refs, []

    def kill(self, _handle: Any) -> None:
        return None

    def remote(self, _class: Any) -> Any:
        return self

    def options(self, **_options: Any) -> Any:
        return _Actor

    def __getattr__(self, name: str) -> Any:
        import ray

        return getattr(ray, name)


class _Reservation:
    def __init__(self, agents: int) -> None:
        self._slots = {index: Slot(index, None, 0, {}, f"node-{index}") for index in range(agents)}  # type: ignore[arg-type]

    def refresh(self, _draining: Any, _silent: Any) -> None:
        return None

    def slots(self) -> dict[int, Slot]:
        return self._slots

    def __getattr__(self, _name: str) -> Any:
        return lambda *_arguments, **_options: None


class _Output:
    def __getattr__(self, _name: str) -> Any:
        return lambda *_arguments, **_options: set()


@contextmanager
def _simulated(agents: int, setup: AgentSetup) -> Iterator[None]:
    double: Any = _Ray(agents, setup)
    modules: tuple[Any, ...] = (membership, rounds, controller, pulse)
    before = [(module, module.ray) for module in modules]
    strategy, looked = membership.PlacementGroupSchedulingStrategy, (membership.draining_nodes, membership.alive_nodes)
    for module in modules:
        module.ray = double
    changes: dict[str, Any] = {
        "PlacementGroupSchedulingStrategy": lambda *_: None,
        "draining_nodes": dict,
        "alive_nodes": lambda: {node["NodeID"] for node in double.nodes()},
    }
    for name, value in changes.items():
        setattr(membership, name, value)
    try:
        yield
    finally:
        for module, ray in before:
            module.ray = ray
        membership.PlacementGroupSchedulingStrategy = strategy  # type: ignore[misc]
        membership.draining_nodes, membership.alive_nodes = looked


def controller_cost(agents: int, nproc: int = 8) -> dict[str, float]:
    """Seconds of the driver's processor for a launch of two rounds, the first of which fails.

    Returns:
        ``start``: until all agents are ready; ``round``: each of the two rounds on average, both for all agents.
    """
    setup = AgentSetup(
        name="simulated",
        run_id="simulated",
        nproc_per_node=nproc,
        contract=Contract.TORCHRUN,
        environment={},
        sys_path=(),
        working_directory="",
        preload=(),
        flyte=FlyteContext(""),
        payload_sha256="",
        driver_address="",
        max_restarts=1,
        monitor_interval_s=1.0,
        stop_grace_s=5.0,
        silence_timeout_s=3600.0,
        logs="none",
    )
    limits = Limits(agents, agents, Budgets(1, 0), 600.0, 30.0, None, 30.0, 60.0, None)
    with _simulated(agents, setup):
        members = Membership(_Reservation(agents), agents, setup.silence_timeout_s)  # type: ignore[arg-type]
        recorder = Recorder(setup.name, setup.run_id, "simulated", limits.budgets)
        shown = Live(setup.name, setup.run_id, Silent())
        began = time.process_time()
        members.begin(setup, b"", _Output(), recorder, shown)  # type: ignore[arg-type]
        launch = Controller(members, setup, limits, shown, recorder)
        launch._gather(0.0)
        ready = time.process_time()
        launch.run()
        ended = time.process_time()
        members.end()
    assert len(launch.rounds) == 2
    return {"start": ready - began, "round": (ended - ready) / 2}
