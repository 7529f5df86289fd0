"""Reserving nodes on Ray: one bundle per node of the launch, and what becomes of bundles when nodes come and go.

A fixed number of nodes is one placement group, which Ray places as a whole and places again when a node dies. A range
is a group for each node, so that each can be had, lost and replaced by itself. On a cluster every bundle gets a Ray
node of its own; on a Ray that this process started on its own machine they share it. Nothing here waits: who does
(kfpytorch_ray.cluster.membership) calls ``refresh`` again and again.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from kfpytorch_ray.cluster.demand import Demand, Resources, bundle_of, fits, fitting, missing, shown
from kfpytorch_ray.cluster.sharing import Launch, behind
from kfpytorch_ray.cluster.survey import alive_nodes, available, groups, totals
from kfpytorch_ray.errors import ConfigError, InfeasibleError, explain

RECONSIDER_S = 10.0
"""How long a request that is not placed stands before it is made again to fit the cluster as it is now."""
SWAP_S = 5.0
"""How long a range tries to have its fewest nodes one by one, after it has had them together, before it starts over."""

_NODE_ID_LABEL = "ray.io/node-id"


@dataclass(frozen=True, slots=True)
class Slot:
    """A bundle that is reserved: what an agent is started in.

    Attributes:
        index: Its number; where the number of nodes is fixed, the node rank.
        group: Its placement group.
        bundle: Its index in the group.
        resources: What it holds.
        node_id: Ray's id of its node.
    """

    index: int
    group: PlacementGroup
    bundle: int
    resources: Resources
    node_id: str


class Reservation(Protocol):
    """The nodes of one launch."""

    def refresh(self, draining: AbstractSet[str], silent: AbstractSet[str]) -> None:
        """Look what Ray has placed by now, and ask again where that serves.

        Args:
            draining: Ids of nodes that Ray is about to take away.
            silent: Ids of nodes that did not answer lately.
        """

    def slots(self) -> Mapping[int, Slot]:
        """The bundles in which an agent may be started, by index."""

    def lost(self, slot: Slot, *, gone: bool) -> None:
        """An agent ended; ``gone`` if its node did, too, or is not to be used any more."""

    def rest(self) -> bool:
        """Ask for nothing more until the next ``refresh``; whether what is placed is enough for a launch."""

    def waiting(self) -> str:
        """How many nodes are placed, what the others wait for, and behind whom. One line."""

    def release(self) -> None:
        """Give everything back."""


@contextmanager
def reserved(demand: Demand, *, name: str, run_id: str, private: bool, autoscaling: bool) -> Iterator[Reservation]:
    """Ask for the nodes of one launch, and give them back at the end; Ray does so when this process dies.

    Args:
        demand: What is asked.
        name: Of the launch, for people.
        run_id: Of the launch.
        private: Whether the Ray was started by this process, so that bundles may share the machine.
        autoscaling: Whether the cluster may grow to hold what it cannot hold now.

    Raises:
        ConfigError: Ray does not take the amounts.
        InfeasibleError: The cluster can never hold the minimum.
    """
    if not autoscaling:
        _refuse_infeasible(demand, private=private)
    # On one machine a range is settled at once: nobody joins it.
    fixed = private or demand.min_nodes == demand.max_nodes
    requests = _Requests(Launch.new(name, run_id))
    reservation: Reservation = _Gang(demand, requests, private=private) if fixed else _Singles(demand, requests)
    try:
        reservation.refresh(frozenset(), frozenset())
        yield reservation
    finally:
        reservation.release()


def driver_address() -> str:
    """The address of this process's node, as Ray knows it."""
    return str(ray.util.get_node_ip_address())


class _Requests:
    """Asks Ray for the placement groups of one launch, by their names, and says what those that are not placed lack."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._numbers = itertools.count()

    def ask(
        self, bundles: list[dict[str, float]], strategy: str, labels: list[dict[str, str]] | None = None
    ) -> PlacementGroup:
        """Ask for a group."""
        name = self._launch.group_name(next(self._numbers))
        try:
            group: PlacementGroup = placement_group(bundles, strategy, name, bundle_label_selector=labels)
        except ValueError as error:
            raise ConfigError("The resources of a node", (str(error),)) from error
        return group

    def lacking(self, bundles: list[dict[str, float]], used: AbstractSet[str], wanted: Sequence[Resources] = ()) -> str:
        """What bundles lack that are not placed, and who has it.

        Args:
            bundles: What they are.
            used: Nodes that the launch has already.
            wanted: What a node has to have free; empty for one of the bundles.
        """
        free, all_nodes = available(but=used), totals()
        others = behind(wanted or bundles, free, all_nodes, groups(), self._launch)
        return f"{missing(bundles, free, all_nodes)} {others}".rstrip()


class _Gang:
    """All nodes in one placement group: all or none."""

    def __init__(self, demand: Demand, requests: _Requests, *, private: bool) -> None:
        self._demand = demand
        self._requests = requests
        self._private = private
        self._group: PlacementGroup | None = None
        self._asked_at = 0.0
        self._placed = False
        self._nodes: dict[int, str] = {}
        self._slots: dict[int, Slot] = {}

    def refresh(self, draining: AbstractSet[str], silent: AbstractSet[str]) -> None:
        """Look where the bundles are; until the group is placed, its size follows what is free.

        A silent node keeps its bundle until Ray gives it up, and an agent that is started there waits as long.
        """
        if not self._look() and (self._group is None or time.monotonic() - self._asked_at > RECONSIDER_S):
            would_fit = fitting(self._demand, available(), private=self._private)
            count = max(self._demand.min_nodes, would_fit)
            # One that would fit and yet is not placed after that long was forgotten by Ray; a new one is looked at.
            if self._group is None or self._group.bundle_count != count or would_fit >= count:
                _release(self._group)
                strategy = "PACK" if self._private else "STRICT_SPREAD"
                self._group = self._requests.ask(self._demand.bundles(count), strategy)
            self._asked_at = time.monotonic()
            self._look()
        if not self._placed:
            return
        assert self._group is not None
        usable = alive_nodes() - draining
        self._slots = {
            index: Slot(index, self._group, index, bundle, node_id)
            for index, bundle in enumerate(self._group.bundle_specs)
            if (node_id := self._nodes.get(index)) in usable
        }

    def _look(self) -> bool:
        """See where Ray has placed it; whether it was placed at any time. What it has is not free any more."""
        if self._group is not None:
            entry = placement_group_table(self._group)
            self._placed |= entry["state"] == "CREATED"
            self._nodes = entry["bundles_to_node_id"]
        return self._placed

    def slots(self) -> Mapping[int, Slot]:
        """Those that are placed; none before all are."""
        return self._slots

    def lost(self, slot: Slot, *, gone: bool) -> None:
        """Nothing to do: Ray places a bundle again whose node died."""

    def rest(self) -> bool:
        """All are placed or none; a bundle that waits for a new node cannot be given back alone."""
        return self._group is not None and len(self._slots) == self._group.bundle_count

    def waiting(self) -> str:
        """See ``Reservation``."""
        if self._group is None or not self._placed:
            count = self._group.bundle_count if self._group else self._demand.min_nodes
            now = min(count, fitting(self._demand, available(), private=self._private))
            bundles = self._demand.bundles(count)[now:] or self._demand.bundles(1)
            # Nodes that share a machine have to fit on it together.
            wanted = [self._demand.total(count)] if self._private else ()
            return (
                f"0 of {count} nodes are placed: all are placed together, and {now} would fit now. "
                f"{self._requests.lacking(bundles, frozenset(), wanted)}"
            )
        bundles = self._group.bundle_specs
        placed = f"{len(self._slots)} of {len(bundles)} nodes are placed."
        lost = [dict(bundle) for index, bundle in enumerate(bundles) if index not in self._slots]
        if not lost:
            return placed
        used = {slot.node_id for slot in self._slots.values()}
        return f"{placed} {self._requests.lacking(lost, used)}"

    def release(self) -> None:
        """Give everything back."""
        _release(self._group)


@dataclass(frozen=True, slots=True)
class _Single:
    """A request for one node.

    Attributes:
        group: Its placement group, of one bundle.
        selector: Which nodes may hold it.
        asked_at: Monotonic seconds.
        node_id: Where it was placed; None as long as it is not.
    """

    group: PlacementGroup
    selector: str
    asked_at: float
    node_id: str | None = None


class _Singles:
    """A range of nodes on a cluster: each node is a placement group, which only nodes that are not in use may hold.

    The first ones are had together, so that two launches that share a cluster do not each hold half of it for ever:
    as a ticket, one group that is then swapped for single ones. Should somebody else take a node in that moment, so
    that too few are had within a while, all are given back and the next ticket is waited for.
    """

    def __init__(self, demand: Demand, requests: _Requests) -> None:
        self._demand = demand
        self._requests = requests
        self._bundle = bundle_of(demand.other)
        self._ticket = self._new_ticket()
        self._singles: dict[int, _Single] = {}
        self._rested: set[int] = set()
        self._swapped_at = 0.0
        self._enough = False

    def _new_ticket(self) -> _Gang | None:
        return _Gang(self._demand, self._requests, private=False) if self._demand.min_nodes > 1 else None

    def refresh(self, draining: AbstractSet[str], silent: AbstractSet[str]) -> None:
        """See ``Reservation``."""
        unusable = draining | silent
        if not self._singles and not self._begin(unusable):
            return
        for index in self._rested:
            self._ask(index, _avoiding(self._in_use(but=index) | unusable))
        self._rested.clear()
        self._look(unusable)
        placed = sum(single.node_id is not None for single in self._singles.values())
        self._enough |= placed >= self._demand.min_nodes
        late = time.monotonic() - self._swapped_at > SWAP_S
        if not self._enough and late and self._ticket is not None:
            self.release()
            self._singles = {}
            self._ticket = self._new_ticket()

    def _look(self, unusable: AbstractSet[str]) -> None:
        """See where the requests are placed, and make those again that have lost their node or ask for a wrong one."""
        table = placement_group_table()
        for index, single in self._singles.items():
            entry = table.get(single.group.id.hex(), {"state": "REMOVED"})
            placed = entry["bundles_to_node_id"][0] if entry["state"] == "CREATED" else None
            avoid = self._in_use(but=index) | unusable
            if single.node_id is not None and placed == single.node_id:
                continue
            if placed is not None and placed not in avoid and single.node_id is None:
                self._singles[index] = replace(single, node_id=placed)
                continue
            selector = _avoiding(avoid)
            stale = time.monotonic() - single.asked_at > RECONSIDER_S and selector != single.selector
            # Its node died, or Ray placed it beside another of this launch, or where it may be is out of date.
            if single.node_id is not None or placed is not None or stale or entry["state"] == "REMOVED":
                self._ask(index, selector)

    def _begin(self, unusable: AbstractSet[str]) -> bool:
        """Ask for all nodes, one request each; whether that was possible."""
        if self._ticket is None:
            there = [node for node, has in available(but=unusable).items() if fits(self._bundle, has)]
        else:
            self._ticket.refresh(unusable, frozenset())
            there = [slot.node_id for slot in self._ticket.slots().values()]
            if not there:
                return False
            self._ticket.release()
        self._swapped_at = time.monotonic()
        there = there[: self._demand.max_nodes]
        for index in range(self._demand.max_nodes):
            self._ask(index, there[index] if index < len(there) else _avoiding(set(there) | unusable))
        return True

    def _ask(self, index: int, selector: str) -> None:
        if (before := self._singles.get(index)) is not None:
            _release(before.group)
        labels = [{_NODE_ID_LABEL: selector}] if selector else None
        group = self._requests.ask([self._bundle], "PACK", labels)
        self._singles[index] = _Single(group, selector, time.monotonic())

    def _in_use(self, *, but: int) -> set[str]:
        return {single.node_id for index, single in self._singles.items() if single.node_id and index != but}

    def slots(self) -> Mapping[int, Slot]:
        """Those that are placed; none before the fewest are."""
        return {
            index: Slot(index, single.group, 0, self._bundle, single.node_id)
            for index, single in self._singles.items()
            if self._enough and single.node_id is not None
        }

    def lost(self, slot: Slot, *, gone: bool) -> None:
        """Give the node back if it is gone; the next ``refresh`` asks for another, unless the last one has."""
        single = self._singles.get(slot.index)
        if gone and single is not None and single.group == slot.group:
            _release(single.group)
            self._singles[slot.index] = replace(single, node_id=None)

    def rest(self) -> bool:
        """Give back the requests that are not placed: others need not think that somebody waits."""
        for index, single in [*self._singles.items()]:
            if single.node_id is None:
                _release(single.group)
                del self._singles[index]
                self._rested.add(index)
        return self._enough and len(self._singles) >= self._demand.min_nodes

    def waiting(self) -> str:
        """See ``Reservation``."""
        if not self._singles and self._ticket is not None:
            return self._ticket.waiting()
        used = self._in_use(but=-1)
        placed = len(used)
        wanted = f"{self._demand.min_nodes} to {self._demand.max_nodes}"
        text = f"{placed} of {wanted} nodes are placed."
        if placed >= self._demand.min_nodes:
            return text
        bundles = [self._bundle] * (self._demand.min_nodes - placed)
        return f"{text} {self._requests.lacking(bundles, used)}"

    def release(self) -> None:
        """Give everything back."""
        if self._ticket is not None:
            self._ticket.release()
        for single in self._singles.values():
            _release(single.group)


def _avoiding(nodes: AbstractSet[str]) -> str:
    """The label selector of all nodes but these; empty for every node."""
    return f"!in({','.join(sorted(nodes))})" if nodes else ""


def _release(group: PlacementGroup | None) -> None:
    # On a Ray that is gone there is nothing to give back, and the error that ended it is on its way.
    with contextlib.suppress(RayError):
        if group is not None and ray.is_initialized():
            remove_placement_group(group)


def _refuse_infeasible(demand: Demand, *, private: bool) -> None:
    nodes = totals()
    if fitting(demand, nodes, private=private) >= demand.min_nodes:
        return
    asked = f"{demand.min_nodes} nodes with {shown(demand.other)} each"
    if demand.first != demand.other:
        asked = f"a node with {shown(demand.first)} and {demand.min_nodes - 1} with {shown(demand.other)} each"
    there = "; ".join(f"{shown(resources)}" for resources in nodes.values())
    if private:
        fix = "Ask for less, set RayBackend(resources_per_node=...), or start Ray with more: ray.init(num_cpus=...)."
    else:
        fix = (
            "Ask for fewer or smaller nodes, or add nodes; each node of the task needs a Ray node of its own. Where an "
            "autoscaler would add them, say so: RayBackend(autoscaling=True)."
        )
    raise InfeasibleError(
        explain(
            f"The cluster can never hold {asked}.",
            f"It has {len(nodes)} Ray node(s), in all: {there}.",
            fix,
        )
    )
