"""Reserving nodes, with a Ray that does what the test says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from kfpytorch_ray.cluster import placement
from kfpytorch_ray.cluster.demand import Demand
from kfpytorch_ray.cluster.placement import Reservation

NODE = {"CPU": 4.0}


@dataclass(frozen=True)
class Group:
    """Stands for Ray's."""

    number: int
    bundle_specs: tuple[dict[str, float], ...]

    @property
    def bundle_count(self) -> int:
        return len(self.bundle_specs)

    @property
    def id(self) -> Any:
        return SimpleNamespace(hex=lambda: str(self.number))


@dataclass
class Ray:
    """Stands for Ray, which places only what it is told to.

    Attributes:
        free: What is free on each node.
        placed: Where the bundles of groups are, by the group's number.
        there: Groups that were asked for and not released.
    """

    free: dict[str, dict[str, float]]
    placed: dict[int, list[str]] = field(default_factory=dict)
    there: dict[int, Group] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def ask(self, bundles: list[dict[str, float]], *_: Any, **__: Any) -> Group:
        group = Group(next(self._numbers), tuple(bundles))
        self.there[group.number] = group
        return group

    def release(self, group: Group) -> None:
        self.there.pop(group.number, None)

    def place(self, number: int, *nodes: str) -> None:
        """What is placed is not free any more."""
        self.placed[number] = [*nodes]
        for node in nodes:
            self.free[node] = {}

    def table(self, group: Group | None = None) -> dict[str, Any]:
        if group is None:
            return {str(number): self.table(each) for number, each in self.there.items()}
        nodes = self.placed.get(group.number)
        if nodes is None:
            return {"state": "PENDING", "bundles_to_node_id": dict.fromkeys(range(group.bundle_count), "")}
        return {"state": "CREATED", "bundles_to_node_id": dict(enumerate(nodes))}


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    """Three free nodes."""
    made = Ray({name: dict(NODE) for name in "abc"})
    monkeypatch.setattr(placement, "placement_group", made.ask)
    monkeypatch.setattr(placement, "placement_group_table", made.table)
    monkeypatch.setattr(placement, "remove_placement_group", made.release)
    monkeypatch.setattr(placement, "available", lambda but=frozenset(): made.free)
    monkeypatch.setattr(placement, "alive_nodes", lambda: set(made.free))
    monkeypatch.setattr(placement.ray, "is_initialized", lambda: True)
    return made


def reserved(least: int, most: int, *, private: bool) -> Any:
    demand = Demand(NODE, NODE, least, most)
    return placement.reserved(demand, name="test", run_id="r", private=private, autoscaling=True)


def look(reservation: Reservation) -> list[str]:
    """The nodes that it has after a look."""
    reservation.refresh(frozenset(), frozenset())
    return [slot.node_id for _, slot in sorted(reservation.slots().items())]


def test_what_is_placed_at_last_is_kept(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own bundles are not free: it would look too large, and a smaller one would be asked for in its place."""
    monkeypatch.setattr(placement, "RECONSIDER_S", -1.0)
    ray.free = {"a": {"CPU": 12.0}}
    with reserved(1, 3, private=True) as reservation:
        assert [group.bundle_count for group in ray.there.values()] == [3]
        ray.place(max(ray.there), "a", "a", "a")
        assert look(reservation) == ["a", "a", "a"]
    assert ray.there == {}


def test_a_lost_node_is_asked_for_once(ray: Ray) -> None:
    """The request that was made when its loss was seen is not withdrawn when its agent's loss is told."""
    with reserved(1, 2, private=False) as range_:
        first, second = sorted(ray.there)
        ray.place(first, "a")
        ray.place(second, "b")
        assert look(range_) == ["a", "b"]
        lost = range_.slots()[1]
        del ray.placed[second], ray.free["b"]
        assert look(range_) == ["a"]
        (asked,) = ray.there.keys() - {first, second}
        range_.lost(lost, gone=True)
        assert look(range_) == ["a"]
        assert ray.there.keys() == {first, asked}
        ray.place(asked, "c")
        assert look(range_) == ["a", "c"]
        # One that is not to be used any more is given back.
        range_.lost(range_.slots()[1], gone=True)
        assert ray.there.keys() == {first}
