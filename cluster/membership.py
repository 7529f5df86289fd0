"""Which agents a launch has: started where nodes are reserved, watched, given up, replaced.

Lives in the driver. The controller asks for the agents that are ready, and tells which of them it lost; how many are
enough, and what a loss costs, is not decided here. One launch may follow another on the same agents.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kfpytorch_ray.cluster.agent import ElasticAgent
from kfpytorch_ray.cluster.answers import Answers
from kfpytorch_ray.cluster.inspection import NAMESPACE, AgentName
from kfpytorch_ray.cluster.interruption import raise_if_lost
from kfpytorch_ray.cluster.log_archive import ARCHIVE_WAIT_S
from kfpytorch_ray.cluster.placement import Reservation, Slot
from kfpytorch_ray.cluster.protocol import AgentSetup, NodePulse, PreloadRefusedError, SupervisorLostError
from kfpytorch_ray.cluster.pulse import Pulse
from kfpytorch_ray.cluster.recording import Recorder
from kfpytorch_ray.cluster.streaming import OutputStream
from kfpytorch_ray.cluster.survey import alive_nodes, draining_nodes
from kfpytorch_ray.cluster.zygote import Zygote
from kfpytorch_ray.errors import ConfigError, LaunchError, explain
from kfpytorch_ray.live.view import Live
from kfpytorch_ray.report.data import Activity

logger = logging.getLogger(__name__)

_AGENT_THREADS = 12
"""Calls that an agent answers at once: the round, the waits for its failure and for lines, and beside them pulse, stop,
shutdown, and looks at its ranks."""
_END_WAIT_S = 30.0
"""Longest wait for an agent to stop its workers and remove its files, beyond the grace."""
_LOOK_S = 1.0
"""Seconds between two looks at Ray's tables."""
_SHUN_S = 70.0
"""How long a silent node gets nothing new: by then Ray has noticed, too, or the node has come back."""


@dataclass(slots=True, eq=False)
class Member:
    """An agent.

    Attributes:
        number: Of this agent; a replacement has another.
        slot: Where it runs.
        address: The address that Ray knows for its node.
        handle: The actor.
        ready: Whether it has loaded everything.
        rested: Whether it has served a launch before this one.
        lost_because: Why it is no member any more.
    """

    number: int
    slot: Slot
    address: str
    handle: Any
    ready: bool = False
    rested: bool = False
    lost_because: str = ""


@dataclass(frozen=True, slots=True)
class Loss:
    """An agent that is gone.

    Attributes:
        address: Of its node.
        reason: What is known.
        charged: Whether it counts against ``max_node_failures``. Not one on a node that is being drained, or that was
            not up yet and not needed, or that gave up this process because it stood still, or was gone when this launch
            began.
    """

    address: str
    reason: str
    charged: bool


@dataclass(slots=True)
class _Notices:
    """What Ray and the pulse say of nodes: who is taken away and when (epoch), who is silent and until when shunned."""

    draining: dict[str, float] = field(default_factory=dict)
    shunned_until: dict[str, float] = field(default_factory=dict)

    def silent(self) -> set[str]:
        now = time.monotonic()
        return {node for node, until in self.shunned_until.items() if now < until}


class Membership:
    """The agents of one launch, or of several one after the other: ``begin``, ``rest``, ``begin``, ..., ``end``.

    Args:
        reservation: Where they may run.
        min_nodes: As many agents are needed.
        silence_timeout_s: Seconds without an answer after which an agent is given up.
    """

    _setup: AgentSetup
    _payload: Any
    _output: OutputStream
    _recorder: Recorder
    _live: Live
    _zygote: Zygote | None
    _pulse: Pulse

    def __init__(self, reservation: Reservation, min_nodes: int, silence_timeout_s: float) -> None:
        self._reservation = reservation
        self._min_nodes = min_nodes
        self._silence_timeout_s = silence_timeout_s
        self.settled = False
        """Whether agents have been ready together: then one that cannot start is its node's fault."""
        self._members: dict[int, Member] = {}
        self._loading: dict[Any, Member] = {}
        self._loaded = Answers()
        self._numbers = itertools.count()
        self._launch = secrets.token_hex(4)
        self._notices = _Notices()
        self._losses: list[Loss] = []
        self._looked_at = float("-inf")
        self._begun = False

    def begin(
        self,
        setup: AgentSetup,
        payload: bytes,
        output: OutputStream,
        recorder: Recorder,
        live: Live,
        zygote: Zygote | None = None,
    ) -> None:
        """Begin a launch; agents that are there are given it, others are started by ``refresh``.

        Args:
            setup: What each is given.
            payload: The pickled call.
            output: Prints what their ranks print.
            recorder: Is told who they are and what becomes of them.
            live: Is told what they answer.
            zygote: Where those that are started now may come from; None where they may be on other machines.
        """
        self._setup = setup
        self._payload = ray.put(payload)
        self._output = output
        self._recorder = recorder
        recorder.enter(Activity.PLACING)
        self._live = live
        self._zygote = zygote
        self._pulse = Pulse(self._silence_timeout_s, self._heard)
        self._begun = True
        self._losses = []
        for member in self._members.values():
            member.ready, member.rested = False, True
            self._load(member)
            recorder.agent_started(member.number, member.address, member.slot.resources)

    def rest(self, keep_s: float) -> bool:
        """End a launch whose rounds are over, and keep its agents for another one.

        Args:
            keep_s: Seconds after which they end by themselves.

        Returns:
            Whether all are there, so that it is worth it. They end with ``end`` in any case.
        """
        self._pulse.close()
        members = [*self._members.values()]
        if not all(member.ready for member in members) or not self._reservation.rest():
            return False
        resting = {member.handle.rest.remote(keep_s): member for member in members}
        timeout_s = _END_WAIT_S + (ARCHIVE_WAIT_S if self._setup.log_archive else 0.0)
        rested, _ = ray.wait(list(resting), num_returns=len(resting), timeout=timeout_s)
        self._await_output({member.number for member in members})
        for member in members:
            member.handle.remove_launch.remote(self._setup.launch_id)
        return len(rested) == len(members) and all(map(_answered, rested))

    def refresh(self, *, now: bool = False) -> None:
        """Start agents where nodes were placed, take in those that are ready, give up those that are gone.

        Raises:
            ConfigError: A module cannot be preloaded.
            LaunchError: An agent cannot start, and another would not either.
            KeyboardInterrupt, SystemExit: An interruption was lost.
        """
        raise_if_lost()
        self._take_in()
        self._hear()
        if not now and time.monotonic() - self._looked_at < _LOOK_S:
            return
        self._looked_at = time.monotonic()
        self._notices.draining = draining_nodes()
        self._reservation.refresh(self._notices.draining.keys(), self._notices.silent())
        slots = self._reservation.slots()
        addresses = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}
        self._leave_lost_slots(slots, addresses.keys())
        for index, slot in slots.items():
            # A node may have died since it was placed.
            if index not in self._members and slot.node_id in addresses:
                self._members[index] = self._start(slot, addresses[slot.node_id])

    def ready(self) -> list[Member]:
        """Agents that can take part in a round, by slot; not those on nodes that are being drained."""
        return [
            member
            for _, member in sorted(self._members.items())
            if member.ready and member.slot.node_id not in self._notices.draining
        ]

    def nodes(self) -> set[str]:
        """Ray's ids of the nodes that agents are on."""
        return {member.slot.node_id for member in self._members.values()}

    def placed(self) -> int:
        """How many agents there are, ready or on their way."""
        return len(self._members)

    def _heard(self, agent: int, pulse: NodePulse) -> None:
        self._recorder.sampled(pulse.samples)
        self._live.heard(agent, pulse.round_index, pulse.alive, pulse.points)

    def starting(self) -> bool:
        """Whether an agent is on its way."""
        return any(not member.ready for member in self._members.values())

    def drained_at(self, member: Member) -> float | None:
        """When (epoch) a member's node is taken away; None if it is not about to be."""
        return self._notices.draining.get(member.slot.node_id)

    def pulse_of(self, member: Member) -> NodePulse | None:
        """A member's last answer."""
        return self._pulse.latest(member.number)

    def has(self, member: Member) -> bool:
        """Whether a member is still one."""
        return self._members.get(member.slot.index) is member

    def lose(self, member: Member, error: Exception | str, *, silent: bool = False) -> None:
        """Give a member up. A second time does nothing."""
        if not self.has(member):
            return
        node = member.slot.node_id
        alive = node in alive_nodes()
        draining = node in self._notices.draining or node in draining_nodes()
        preempted = draining or getattr(error, "preempted", False)
        # Nor is a node tried again and again on which an agent does not come up.
        shunned = silent or not (member.ready or member.rested)
        if shunned:
            self._notices.shunned_until[node] = time.monotonic() + _SHUN_S
        self._drop(member, gone=shunned or draining or not alive)
        if not member.ready and not alive:
            # It takes nothing with its node.
            return
        needed = member.ready or (len(self.ready()) < self._min_nodes and not member.rested)
        charged = needed and not preempted and not self._pulse.stood_still
        # Ray's messages are lists over many lines.
        member.lost_because = " ".join(str(error).split())
        self._losses.append(Loss(member.address, member.lost_because, charged))
        self._recorder.agent_gone(member.number, member.lost_because)

    def wait(self, timeout_s: float) -> None:
        """Return when an agent has started or failed to, or after ``timeout_s``."""
        self._take_in(timeout_s)

    def take_losses(self) -> list[Loss]:
        """Losses since the last call."""
        losses, self._losses = self._losses, []
        return losses

    def part_with_drained(self) -> None:
        """End the agents whose nodes are being drained, in order while there is time; they take part in nothing."""
        draining = self._notices.draining
        leaving = [member for member in self._members.values() if member.slot.node_id in draining]
        if not leaving:
            return
        left_s = min(draining[member.slot.node_id] for member in leaving) - time.time()
        self._shut_down([member for member in leaving if member.ready], min(left_s, self._shutdown_timeout_s))
        for member in leaving:
            self._drop(member, gone=True)

    def waiting(self) -> str:
        """What the launch waits for."""
        text = self._reservation.waiting()
        starting = [member.address for member in self._members.values() if not member.ready]
        return f"{text} Agents still starting on: {', '.join(starting)}." if starting else text

    def end(self) -> None:
        """Stop all workers, wait for their last lines and end the agents; a second interrupt still kills them."""
        if not self._begun:
            return
        members = [*self._members.values()]
        self.forget()
        try:
            self._pulse.close()
            ended = self._shut_down(members, self._shutdown_timeout_s)
            if removals := [member.handle.remove_files.remote() for member in ended]:
                ray.wait(removals, num_returns=len(removals), timeout=_END_WAIT_S)
        finally:
            for member in members:
                _kill(member.handle)

    def forget(self) -> None:
        """Have no agents. Before ``end``, where they have ended with their job: nothing may be asked of them."""
        self._members = {}
        self._loading = {}

    @property
    def _shutdown_timeout_s(self) -> float:
        archive_s = ARCHIVE_WAIT_S if self._setup.log_archive else 0.0
        return self._setup.stop_grace_s + _END_WAIT_S + archive_s

    def _shut_down(self, members: Sequence[Member], timeout_s: float) -> list[Member]:
        """Have agents stop their workers, keep their logs and say their last lines; those that did so in time."""
        endings = {member.handle.shutdown.remote(): member for member in members}
        if not endings:
            return []
        ended, _ = ray.wait(list(endings), num_returns=len(endings), timeout=max(0.0, timeout_s))
        self._await_output({member.number for member in members})
        return [endings[ref] for ref in ended]

    def _await_output(self, agents: AbstractSet[int]) -> None:
        """Wait until what ranks printed last is printed here."""
        if missing := self._output.drain(agents):
            logger.warning(
                "%s: not all lines that were printed last on %s have come; they may be missing here.",
                self._setup.name,
                ", ".join(sorted(missing)),
            )

    def _start(self, slot: Slot, address: str) -> Member:
        amounts = dict(slot.resources)
        number = next(self._numbers)
        actor: Any = ray.remote(ElasticAgent).options(
            num_cpus=amounts.pop("CPU", 0),
            num_gpus=amounts.pop("GPU", 0),
            memory=amounts.pop("memory", None),
            resources=amounts,
            max_concurrency=_AGENT_THREADS,
            scheduling_strategy=PlacementGroupSchedulingStrategy(slot.group, slot.bundle),
            # So that others can look inside its ranks.
            name=str(AgentName(self._setup.known_as or self._setup.run_id, self._launch, number)),
            namespace=NAMESPACE,
        )
        handle: Any = actor.remote(self._setup, address, self._zygote and self._zygote.offer())
        handle.expect_load.remote()
        member = Member(number, slot, address, handle)
        self._recorder.agent_started(member.number, address, slot.resources)
        self._load(member)
        return member

    def _load(self, member: Member) -> None:
        started = member.handle.load.remote(self._setup, self._payload)
        self._loading[started] = member
        self._loaded.expect(started)

    def _take_in(self, timeout_s: float = 0.0) -> None:
        for ref in self._loaded.take(timeout_s):
            member = self._loading.pop(ref, None)
            if member is None:
                continue
            try:
                facts = ray.get(ref)
            except SupervisorLostError:
                self.lose(member, "its supervisor process died")
            except PreloadRefusedError as error:
                raise _not_to_be_preloaded(error) from error
            except RayError as error:
                by_itself = isinstance(error, RayTaskError) or getattr(error, "actor_init_failed", False)
                if by_itself and not self.settled:
                    raise self._start_failed(member, error) from error
                self.lose(member, error)
            else:
                member.ready = True
                self._recorder.agent_ready(member.number, facts)
                self._pulse.watch(member.number, member.handle)
                if self._setup.logs != "none":
                    self._output.follow(member.number, member.handle, member.address)

    def _hear(self) -> None:
        silent = self._pulse.silent()
        errors = self._pulse.errors()
        for member in [*self._members.values()]:
            if member.number in errors:
                self.lose(member, errors[member.number])
            elif member.number in silent:
                self.lose(member, f"it has not answered for {self._setup.silence_timeout_s:g} s", silent=True)

    def _leave_lost_slots(self, slots: Mapping[int, Slot], alive: AbstractSet[str]) -> None:
        """Give up agents whose node is gone, also before Ray reports them: it can take seconds."""
        for index, member in [*self._members.items()]:
            slot = slots.get(index)
            if slot is not None and (slot.group, slot.node_id) == (member.slot.group, member.slot.node_id):
                continue
            if not member.ready:
                # It has never been anywhere; its place is.
                self._drop(member, gone=False)
            elif member.slot.node_id not in alive:
                self.lose(member, "its node died")

    def _drop(self, member: Member, *, gone: bool) -> None:
        self._pulse.forget(member.number)
        self._output.give_up(member.number)
        self._live.forget(member.number)
        # Should Ray lose the kill, the actor ends when nobody has a handle of it any more.
        self._loading = {ref: other for ref, other in self._loading.items() if other is not member}
        del self._members[member.slot.index]
        self._recorder.agent_gone(member.number)
        self._reservation.lost(member.slot, gone=gone)
        _kill(member.handle)

    def _start_failed(self, member: Member, error: Exception) -> LaunchError:
        message = explain(
            f"{self._setup.name}: the agent on {member.address} did not start.",
            str(error),
            "Check that every node has the same versions of Python, ray, torch, flytekit and kfpytorch_ray as the "
            "driver.",
        )
        return LaunchError(message, time.time())


@contextmanager
def agents_on(reservation: Reservation, min_nodes: int, silence_timeout_s: float) -> Iterator[Membership]:
    """Have agents wherever nodes are reserved; they and their workers end with the context. As ``Membership``."""
    membership = Membership(reservation, min_nodes, silence_timeout_s)
    try:
        yield membership
    finally:
        membership.end()


def _not_to_be_preloaded(error: PreloadRefusedError) -> ConfigError:
    return ConfigError(
        "RayBackend",
        tuple(
            f"preload: {name!r} {what}, which a fork of the process does not have: take it out of preload, and each "
            "worker imports it itself"
            for name, what in error.refused.items()
        ),
    )


def _answered(ref: Any) -> bool:
    """Whether an agent has done what it was asked; one that is gone has not."""
    try:
        ray.get(ref)
    except (RayError, SupervisorLostError):
        return False
    return True


def _kill(handle: Any) -> None:
    # Its guardian notices the end of the agent, kills what is left and removes the files. Where Ray was left meanwhile,
    # the agent is gone, and ray.kill would start another Ray.
    with contextlib.suppress(RayError):
        if ray.is_initialized():
            ray.kill(handle)
