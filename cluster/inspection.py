"""Looking inside the ranks of a run that goes on, from another process: its agents are found by their names on Ray.

Workers are no processes of Ray's, so its own tools do not see them. Agents have names in a namespace of this package,
and answer beside whatever else they do. Called by the adapter, and on a remote cluster by a small job.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from kfpytorch_ray.errors import (
    ClusterUnreachableError,
    ConfigError,
    KfpytorchRayError,
    RunError,
    UnknownRunError,
    explain,
)

logger = logging.getLogger(__name__)

NAMESPACE = "kfpytorch_ray"
"""Of agents' names."""

_KIND = "ElasticAgent "
"""A name begins like the class: it takes the place of that in the title of the process and before lines of its log."""

_NAME_WAIT_S = 10.0
_WAIT_S = 30.0
"""Longest wait for an agent to answer, beyond what it was asked to do."""


@dataclass(frozen=True, slots=True)
class AgentName:
    """The name of an agent.

    Attributes:
        run: By which people know the run.
        launch: Tells launches of the same run apart.
        number: Of the agent.
    """

    run: str
    launch: str
    number: int

    def __str__(self) -> str:
        return f"{_KIND}{self.run}/{self.launch}/{self.number}"

    @classmethod
    def parsed(cls, text: str) -> AgentName | None:
        """From its text; None where it is another's."""
        parts = text.removeprefix(_KIND).rsplit("/", 2)
        ours = text.startswith(_KIND) and len(parts) == 3 and parts[2].isdecimal()
        return cls(parts[0], parts[1], int(parts[2])) if ours else None


def stacks_of(run: str, rank: int | None, address: str | None) -> dict[int, str]:
    """The stacks of all threads of each rank, as text, by rank.

    Args:
        run: Id of the run, or the beginning of one.
        rank: Only this one; None for all.
        address: Of the Ray; None: those of this machine are looked through.

    Raises:
        UnknownRunError: No such run goes on there, or it has no such rank now.
        ConfigError: Several runs begin like this.
        ClusterUnreachableError: No Ray answers.
        RunError: No agent with such a rank answers. Of those that do not answer beside others, a warning tells.
    """
    with _agents(run, address) as agents:
        found: dict[int, str] = {}
        try:
            for answer in _answers([agent.stacks.remote(rank) for agent in agents], _WAIT_S):
                found.update(answer)
                if rank is not None and found:
                    break
        except RunError as silent:
            # Most often what somebody looks for is why one node hangs.
            if not found:
                raise
            logger.warning("%s", silent)
    if not found:
        raise _no_rank(run, rank)
    return dict(sorted(found.items()))


def flamegraph_of(run: str, rank: int, duration_s: int, address: str | None) -> str:
    """Where a rank spends its time, as an SVG by py-spy.

    Args:
        run: As in ``stacks_of``.
        rank: The rank.
        duration_s: Seconds for which it is watched.
        address: As in ``stacks_of``.

    Raises:
        KfpytorchRayError: As ``stacks_of``; or a RunError where py-spy is not there, or may not look.
    """
    with _agents(run, address) as agents:
        answers = _answers([agent.flamegraph.remote(rank, duration_s) for agent in agents], duration_s + _WAIT_S)
        found = next((answer for answer in answers if answer is not None), None)
    if found is None:
        raise _no_rank(run, rank)
    svg, problem = found
    if problem:
        raise RunError(
            explain(
                f"Rank {rank} of the run {run} could not be watched.",
                problem,
                "Install py-spy on the nodes (pip install 'kfpytorch_ray[profile]'), and let it look at processes: in "
                "a container by the capability SYS_PTRACE. `kfpytorch-ray stacks` needs neither.",
            )
        )
    return str(svg)


@contextlib.contextmanager
def _agents(run: str, address: str | None) -> Iterator[list[Any]]:
    """The agents of a run, while this process is joined to its Ray."""
    if ray.is_initialized():
        yield _named(run)
        return
    places = [address] if address else _places_here()
    last: KfpytorchRayError | None = None
    for place in places:
        try:
            ray.init(address=place, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            last = _unreachable(place, error)
            continue
        try:
            try:
                agents = _named(run)
            except UnknownRunError as unknown:
                last = unknown
                continue
            yield agents
            return
        finally:
            ray.shutdown()
    raise last or _unreachable("auto", ConnectionError("no Ray runs on this machine"))


def _places_here() -> list[str]:
    """The Rays that run on this machine: a launch may have started one of its own."""
    # Not public. Where another Ray has it elsewhere, it finds one by itself.
    with contextlib.suppress(ImportError, AttributeError):
        from ray._private.services import find_gcs_addresses

        if found := sorted(find_gcs_addresses()):
            return found
    return ["auto"]


def _named(run: str) -> list[Any]:
    agents: dict[str, list[Any]] = defaultdict(list)
    for name, handle in _all_agents():
        agents[name].append(handle)
    matching = {run} & agents.keys() or {each for each in agents if each.startswith(run)}
    if not matching:
        raise UnknownRunError(
            explain(
                f"No run {run!r} goes on here.",
                f"Runs that have agents on this Ray: {', '.join(sorted(agents)) or 'none'}.",
                "Name one of these, or the Ray on which it runs (--address). A run that has ended has no ranks.",
            )
        )
    if len(matching) > 1:
        raise ConfigError("run", (f"{run!r} is the beginning of several: {', '.join(sorted(matching))}",))
    return agents[matching.pop()]


def _all_agents() -> list[tuple[str, Any]]:
    """Every agent on this Ray, with the run that it serves now: a warm one has the name of its first."""
    found: dict[Any, tuple[AgentName, Any]] = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and (name := AgentName.parsed(actor["name"])) is not None:
            # It may just have ended.
            with contextlib.suppress(ValueError):
                handle = ray.get_actor(actor["name"], namespace=NAMESPACE)
                found[handle.known_as.remote()] = (name, handle)
    done, starting = ray.wait(list(found), num_returns=len(found), timeout=_NAME_WAIT_S) if found else ([], [])
    agents = [(found[ref][0].run, found[ref][1]) for ref in starting]
    for ref in done:
        with contextlib.suppress(RayError):
            agents.append((ray.get(ref), found[ref][1]))
    return agents


def _answers(asked: list[Any], timeout_s: float) -> Iterator[Any]:
    """Answers of agents as they come.

    Raises:
        RunError: Those that remain have not answered in time.
    """
    until = time.monotonic() + timeout_s
    waiting = asked
    while waiting:
        done, waiting = ray.wait(waiting, timeout=max(0.0, until - time.monotonic()))
        if not done:
            raise RunError(
                explain(
                    f"{len(waiting)} of {len(asked)} nodes have not answered within {timeout_s:g} s.",
                    "They are overloaded, or cut off.",
                    "Try again; or look at one rank, whose node may answer.",
                )
            )
        # An agent that has just ended has no ranks.
        with contextlib.suppress(RayError):
            yield ray.get(done[0])


def _no_rank(run: str, rank: int | None) -> UnknownRunError:
    return UnknownRunError(
        explain(
            f"The run {run} has no {'ranks' if rank is None else f'rank {rank}'} now.",
            "It is between two rounds, or has fewer ranks.",
            "Try again while a round runs.",
        )
    )


def _unreachable(address: str, error: Exception) -> ClusterUnreachableError:
    return ClusterUnreachableError(
        explain(
            f"The Ray at {address!r} cannot be joined.",
            str(error),
            "Name it by HOST:PORT of its GCS on a machine that belongs to it; a run on a cluster elsewhere by its "
            "storage.",
        )
    )
