"""One launch on a Ray that this process joins: connect, reserve nodes, start agents, run rounds.

What it needs is a RayRequest, which an adapter builds without a cluster, and which may have come from another machine:
nothing here unpickles the call. Called by the adapter, and on a remote cluster by kfpytorch_ray.cluster.remote.driver.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

from kfpytorch_ray.cluster.connect import connected, node_environ, starts_here
from kfpytorch_ray.cluster.controller import Controller
from kfpytorch_ray.cluster.environment import node_environment, one_thread_each
from kfpytorch_ray.cluster.failures import kept_logs
from kfpytorch_ray.cluster.interruption import interruptible
from kfpytorch_ray.cluster.log_archive import with_logs
from kfpytorch_ray.cluster.placement import driver_address
from kfpytorch_ray.cluster.protocol import AgentSetup
from kfpytorch_ray.cluster.recording import Recorder
from kfpytorch_ray.cluster.request import RayRequest
from kfpytorch_ray.cluster.server_modules import SERVER_MODULES, users_modules
from kfpytorch_ray.cluster.streaming import output_shown
from kfpytorch_ray.cluster.warm import crew_for, make_room
from kfpytorch_ray.cluster.zygote import Zygote
from kfpytorch_ray.config import RayBackend
from kfpytorch_ray.errors import KfpytorchRayError, LaunchError
from kfpytorch_ray.live.choice import live
from kfpytorch_ray.report.data import RunReport
from kfpytorch_ray.results import RoundRecord


@dataclass(frozen=True, slots=True)
class Launched:
    """A launch that succeeded.

    Attributes:
        refs: A reference to every rank's spooled result, by rank.
        rounds: What became of every rank, one record for each round.
        report: What happened.
    """

    refs: Sequence[Any]
    rounds: tuple[RoundRecord, ...]
    report: RunReport


def run_request(request: RayRequest, options: RayBackend, *, home: bool = True, backend: str = "") -> Launched:
    """Run a request to its end, and leave nothing running but what ``options`` keep warm.

    What it raises carries the report.

    Args:
        request: What is asked.
        options: Which Ray, and how it is joined.
        home: Whether this process is the one that the results are for, and the modules of the call are found by its
            search path. Files that rank 0 returns are uploaded otherwise.
        backend: Whose run it is, where that is not the options'.

    Raises:
        ConfigError: The Ray cannot be joined by a driver, or does not take the amounts.
        PlacementError: The nodes cannot be had.
        LaunchError: A rank or a node failed.
    """
    launch = request.setup
    recorder = Recorder(launch.name, launch.run_id, backend or options.name, request.limits.budgets)
    try:
        refs, rounds = _run(request, options, home, recorder)
    except KfpytorchRayError as error:
        if isinstance(error, LaunchError):
            rounds = with_logs(error.rounds, launch.log_archive)
            error.add(kept_logs(rounds, launch.log_archive), rounds)
            recorder.logs_kept(rounds)
        error.report = recorder.report(error)
        raise
    recorder.logs_kept(rounds)
    return Launched(refs, rounds, recorder.report())


def _run(
    request: RayRequest, options: RayBackend, home: bool, recorder: Recorder
) -> tuple[Sequence[Any], tuple[RoundRecord, ...]]:
    demand, launch = request.demand, request.setup
    make_room(demand)
    with live(launch.name, launch.known_as or launch.run_id) as shown, ExitStack() as undo:
        zygote = undo.enter_context(_zygote_of(request, home, os.environ)) if starts_here(options) else None
        if zygote is not None:
            # It imports while Ray starts.
            zygote.offer()
        private = undo.enter_context(connected(options, demand.total(demand.max_nodes)))
        if not private:
            zygote = None
        elif zygote is None:
            zygote = undo.enter_context(_zygote_of(request, home, node_environ()))
        setup = _joined(request, private=private, home=home)
        setup = replace(
            setup, launch_id=secrets.token_hex(8), driver_address=driver_address() if home else setup.driver_address
        )
        with (
            interruptible(),
            output_shown(shown.show) as output,
            crew_for(demand, setup, options, private=private) as membership,
        ):
            membership.begin(setup, request.payload, output, recorder, shown, zygote)
            controller = Controller(membership, setup, request.limits, shown, recorder)
            refs = controller.run()
    return refs, with_logs(controller.rounds, setup.log_archive)


def _zygote_of(request: RayRequest, home: bool, node: Mapping[str, str]) -> closing[Zygote]:
    """A zygote for agents on this machine, where Ray's processes have the environment ``node``."""
    setup = _joined(request, private=True, home=home)
    environment = {**node_environment(node, setup.environment), **users_modules(setup)}
    return closing(Zygote(environment, SERVER_MODULES))


def _joined(request: RayRequest, *, private: bool, home: bool) -> AgentSetup:
    """What follows from which Ray it is."""
    setup = request.setup
    # On a Ray of our own all nodes share this machine's cores.
    workers = setup.nproc_per_node * (request.demand.max_nodes if private else 1)
    joined = replace(
        setup,
        environment=one_thread_each(setup.environment, workers),
        # Elsewhere it is the folder that Ray unpacked, or the node's own.
        working_directory=os.getcwd() if private else "",
    )
    own = setup.sys_path if home else tuple(os.path.abspath(path) for path in sys.path)
    sent = () if private else tuple(path for path in setup.sys_path if not os.path.isabs(path))
    return replace(joined, sys_path=(*filter(os.path.isabs, own), *sent))
