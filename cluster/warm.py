"""Agents that stay between two launches of this process, with the nodes that they have, so that a start is paid once.

A launch with ``RayBackend(keep_warm_s=...)`` leaves its agents here, the next one of the same shape takes them. Of a
launch nothing stays in an agent: workers are new processes each round, and files go with the launch. Agents are given
back when their time is up, when somebody waits for what their nodes have, when this process has a launch of another
shape that needs it, and at the end of the process. Called by kfpytorch_ray.cluster.launching.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import ray

from kfpytorch_ray.cluster.connect import job_of_now
from kfpytorch_ray.cluster.demand import Demand, fits
from kfpytorch_ray.cluster.membership import Membership, agents_on
from kfpytorch_ray.cluster.placement import reserved
from kfpytorch_ray.cluster.protocol import AgentSetup
from kfpytorch_ray.cluster.survey import demand_that_waits, totals
from kfpytorch_ray.config import RayBackend
from kfpytorch_ray.errors import LaunchError

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
"""Seconds between two looks whether anybody waits, while agents are kept and no launch runs on them."""
_LEASE_MARGIN_S = 60.0
"""How much longer agents wait than this process keeps them: it is this process that ends them."""


@dataclass(eq=False, slots=True)
class _Crew:
    """Agents, and all that they stand on.

    Attributes:
        demand: What was reserved for them.
        setup: What their first launch was.
        job: That they belong to.
        membership: The agents.
        undo: Ends them and gives their nodes back.
        until: Monotonic seconds at which their time is up.
    """

    demand: Demand
    setup: AgentSetup
    job: object
    membership: Membership
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    until: float = 0.0

    def serves(self, demand: Demand, setup: AgentSetup) -> bool:
        return self._is_there() and demand == self.demand and setup.same_agent(self.setup)

    def is_waited_for(self) -> bool:
        """Whether somebody asks for what one of its nodes could give."""
        nodes = [has for node, has in totals().items() if node in self.membership.nodes()]
        return any(fits(asked, has) for asked in demand_that_waits() for has in nodes)

    def release(self) -> None:
        """End the agents and give their nodes back; where this process has left their job, both are gone already."""
        if not self._is_there():
            self.membership.forget()
        self.undo.close()

    def _is_there(self) -> bool:
        return job_of_now() == self.job


_lock = threading.Lock()
_kept: list[_Crew] = []
"""Oldest first."""


def make_room(demand: Demand) -> None:
    """Before Ray is joined for a launch: give back what is kept and what this launch may need.

    Args:
        demand: Of the launch. Agents that were kept for the same one may serve it, and stay.
    """
    wanted = demand.total(demand.min_nodes)
    with _lock:
        others = [crew for crew in _kept if crew.demand != demand]
    for crew in others:
        if ray.is_initialized() and fits(wanted, ray.available_resources()):
            return
        _release(crew)


@contextmanager
def crew_for(demand: Demand, setup: AgentSetup, options: RayBackend, *, private: bool) -> Iterator[Membership]:
    """Agents for one launch: those that were kept for such a one, else new ones.

    Args:
        demand: What is reserved for them.
        setup: What the launch gives them.
        options: For how long they are kept afterwards, and whether the cluster may grow.
        private: As for ``reserved``.

    Raises:
        ConfigError: Ray does not take the amounts.
        InfeasibleError: The cluster can never hold the minimum.
    """
    crew = _taken(demand, setup) or _new(demand, setup, options, private=private)
    keep_s = 0.0
    try:
        yield crew.membership
        keep_s = options.keep_warm_s
    except LaunchError:
        # The function has failed, or a node: the next attempt shall be as quick.
        keep_s = options.keep_warm_s
        raise
    finally:
        _end_launch(crew, keep_s)


def release_all() -> None:
    """Give back everything that is kept."""
    with _lock:
        crews = [*_kept]
    for crew in crews:
        _release(crew)


def _new(demand: Demand, setup: AgentSetup, options: RayBackend, *, private: bool) -> _Crew:
    with contextlib.ExitStack() as undo:
        reservation = undo.enter_context(
            reserved(demand, name=setup.name, run_id=setup.run_id, private=private, autoscaling=options.autoscaling)
        )
        membership = undo.enter_context(agents_on(reservation, demand.min_nodes, setup.silence_timeout_s))
        return _Crew(demand, setup, job_of_now(), membership, undo.pop_all())


def _taken(demand: Demand, setup: AgentSetup) -> _Crew | None:
    with _lock:
        same = [crew for crew in _kept if crew.demand == demand]
        serving = next((crew for crew in same if crew.serves(demand, setup)), None)
        if serving is not None:
            _kept.remove(serving)
            return serving
    # Others have what this launch is about to ask for.
    for crew in same:
        _release(crew)
    return None


def _end_launch(crew: _Crew, keep_s: float) -> None:
    try:
        kept = keep_s > 0 and crew.membership.rest(keep_s + _LEASE_MARGIN_S)
    except BaseException:
        crew.release()
        raise
    if not kept:
        crew.release()
        return
    crew.until = time.monotonic() + keep_s
    with _lock:
        _kept.append(crew)
        _watcher.start()


def _release(crew: _Crew) -> None:
    """End one that is kept, unless somebody else has taken it meanwhile."""
    with _lock:
        if crew not in _kept:
            return
        _kept.remove(crew)
    crew.release()


class _Watcher:
    """A thread, as long as anything is kept, that gives it back when its time is up or somebody waits for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Called with ``_lock`` held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="warm agents", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(_LOOK_S)
            with _lock:
                crews = [*_kept]
                if not crews:
                    self._thread = None
                    return
            for crew in crews:
                _release_in_time(crew)


def _release_in_time(crew: _Crew) -> None:
    try:
        if time.monotonic() >= crew.until or crew.is_waited_for():
            _release(crew)
    except Exception as error:  # noqa: BLE001 - Ray may be left at any moment, and goes piece by piece
        logger.debug("Agents that are kept cannot be looked at, or given back: %s", error)


_watcher = _Watcher()
atexit.register(release_all)
