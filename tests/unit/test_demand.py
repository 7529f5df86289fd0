from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfpytorch_ray.cluster import demand as asked
from kfpytorch_ray.cluster.demand import Demand, Resources, fits, shown

SMALL: Resources = {"CPU": 4.0}
LARGE: Resources = {"CPU": 16.0, "GPU": 8.0}


def nodes(*has: Resources) -> dict[str, Resources]:
    return {f"node{index}": resources for index, resources in enumerate(has)}


def same(of_each: Resources, low: int, high: int) -> Demand:
    return Demand(of_each, of_each, low, high)


def fitting(demand: Demand, *has: Resources, private: bool = False) -> int:
    return asked.fitting(demand, nodes(*has), private=private)


def test_bundles_are_listed_by_node_rank() -> None:
    """Node 0's comes first, and each is a mapping of its own."""
    demand = Demand({"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}, 1, 3)
    bundles = demand.bundles(3)
    assert bundles == [{"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]
    bundles[1]["CPU"] = 9.0
    assert bundles[2]["CPU"] == 1.0
    assert demand.bundles(1) == [{"CPU": 2.0}]


@pytest.mark.parametrize(("count", "total"), [(1, {"CPU": 2.0}), (3, {"CPU": 4.0, "GPU": 2.0})])
def test_the_total_counts_the_first_node_once(count: int, total: dict[str, float]) -> None:
    """Kinds that only one sort of node asks for are in it as well."""
    assert Demand({"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}, 1, 3).total(count) == total


@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 5)),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 5)),
    st.integers(1, 4),
)
def test_the_total_is_the_sum_of_the_bundles(first: Resources, other: Resources, count: int) -> None:
    """Whatever the nodes ask for."""
    demand = Demand(first, other, 1, 4)
    assert demand.total(count) == {
        name: sum(bundle.get(name, 0) for bundle in demand.bundles(count))
        for name in {name for bundle in demand.bundles(count) for name in bundle}
    }


def test_a_bundle_of_nothing_asks_for_next_to_nothing() -> None:
    """Ray refuses amounts of zero, and a bundle without any amount."""
    assert Demand({"CPU": 0.0}, {"CPU": 1.0, "GPU": 0}, 1, 2).bundles(2) == [{"CPU": 0.01}, {"CPU": 1.0}]


def test_nodes_that_are_too_small_do_not_count() -> None:
    """A node of the task needs a Ray node that holds all of it: amounts are not added up over Ray nodes."""
    assert fitting(same({"CPU": 8.0}, 1, 4), SMALL, LARGE, SMALL, LARGE) == 2
    assert fitting(same({"CPU": 8.0}, 1, 4), SMALL, SMALL) == 0


def test_a_large_node_holds_one_node_of_the_task() -> None:
    """On a cluster every node of the task gets a Ray node of its own."""
    assert fitting(same({"CPU": 1.0}, 1, 4), LARGE) == 1


def test_every_kind_of_resource_must_be_there() -> None:
    """Also custom ones, and the amount may be used up exactly."""
    demand = same({"CPU": 4.0, "fast_disk": 1.0}, 1, 2)
    assert fitting(demand, LARGE) == 0
    assert fitting(demand, {"CPU": 4.0, "fast_disk": 1.0}) == 1
    assert fitting(demand, {"CPU": 3.9, "fast_disk": 1.0}) == 0


def test_a_kind_that_is_not_asked_for_need_not_be_there() -> None:
    """Zero of something is had everywhere."""
    assert fitting(same({"CPU": 1.0, "GPU": 0.0}, 1, 1), SMALL) == 1


@pytest.mark.parametrize(("has", "expected"), [(1, 1), (2, 2), (3, 3), (5, 3)])
def test_a_range_takes_what_is_there_up_to_its_maximum(has: int, expected: int) -> None:
    """More nodes than the maximum are of no use."""
    assert fitting(same({"CPU": 1.0}, 2, 3), *[SMALL] * has) == expected


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        ([LARGE, SMALL, SMALL], 3),
        ([SMALL, SMALL, LARGE], 3),
        ([LARGE], 1),
        ([LARGE, LARGE], 2),
        ([SMALL, SMALL, SMALL], 0),
        ([], 0),
    ],
)
def test_a_first_node_that_needs_more_is_found_wherever_it_is(cluster: list[Resources], expected: int) -> None:
    """The master of a ``PyTorch`` job may be larger than its workers; without room for it nothing fits."""
    assert fitting(Demand(LARGE, SMALL, 1, 3), *cluster) == expected


def test_a_first_node_that_needs_less_does_not_take_a_workers_place() -> None:
    """A small master goes to the small node, and the workers to the large ones."""
    assert fitting(Demand(SMALL, LARGE, 3, 3), SMALL, LARGE, LARGE) == 3
    assert fitting(Demand(SMALL, LARGE, 3, 3), LARGE, LARGE) == 2


amounts = st.fixed_dictionaries({"CPU": st.integers(0, 3), "GPU": st.integers(0, 2)})


@given(amounts, amounts, st.lists(amounts, max_size=4), st.integers(1, 4))
def test_as_many_fit_as_trying_all_assignments_finds(
    first: Resources, other: Resources, cluster: list[Resources], most: int
) -> None:
    """The number equals the best of every way to give each node of the task a Ray node of its own."""
    demand = Demand(first, other, 1, most)
    best = max(
        (
            count
            for count in range(1, most + 1)
            for chosen in permutations(cluster, count)
            if all(fits(bundle, has) for bundle, has in zip(demand.bundles(count), chosen, strict=True))
        ),
        default=0,
    )
    assert asked.fitting(demand, nodes(*cluster), private=False) == best


@pytest.mark.parametrize(("cpus", "expected"), [(1, 0), (2, 1), (5, 2), (6, 3), (100, 3)])
def test_on_a_ray_of_ones_own_nodes_share_the_machine(cpus: int, expected: int) -> None:
    """There the sum of all nodes must fit on the one machine."""
    assert fitting(same({"CPU": 2.0}, 1, 3), {"CPU": cpus}, private=True) == expected


@pytest.mark.parametrize(("cpus", "expected"), [(3, 0), (4, 1), (5, 2), (6, 3)])
def test_on_a_ray_of_ones_own_a_larger_first_node_counts_as_such(cpus: int, expected: int) -> None:
    """The first node's share is added once."""
    assert fitting(Demand({"CPU": 4.0}, {"CPU": 1.0}, 1, 3), {"CPU": cpus}, private=True) == expected


def test_a_ray_without_a_node_holds_nothing() -> None:
    """Before the first node has reported, nothing fits, and nothing breaks."""
    assert fitting(same({"CPU": 1.0}, 1, 2), private=True) == 0
    assert fitting(same({"CPU": 1.0}, 1, 2), private=False) == 0


def test_resources_are_shown_for_people() -> None:
    """Sorted, memory in GiB, whole numbers without a point, and none of Ray's own markers."""
    assert (
        shown(
            {
                "memory": 3 * 2**30,
                "object_store_memory": 2**29,
                "CPU": 4.0,
                "GPU": 0.5,
                "node:10.0.0.1": 1.0,
                "node:__internal_head__": 1.0,
                "accelerator_type:H200": 1.0,
                "bundle_group_0_abc": 1000.0,
                "CPU_group_0_abc": 2.0,
                "fast_disk": 1.0,
            }
        )
        == "{CPU: 4, GPU: 0.5, fast_disk: 1, memory: 3.0GiB, object_store_memory: 0.5GiB}"
    )
    assert shown({}) == "{}"
