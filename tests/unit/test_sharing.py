"""Whose a placement group is, and behind what a launch waits, from plain data."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfpytorch_ray.cluster.demand import Resources
from kfpytorch_ray.cluster.sharing import Group, Launch, behind, launch_of

OWN = Launch("me", "mine", "0")
FULL: Resources = {"CPU": 8.0, "GPU": 4.0, "memory": 2.0**34}
WANTED: list[Resources] = [{"CPU": 1.0, "GPU": 4.0}]


def launch(number: int) -> Launch:
    return Launch(f"train{number}", f"run{number}", str(number))


def held(by: Launch | str, *bundles: tuple[str, Resources], job: str = "01000000") -> Group:
    return Group(by if isinstance(by, str) else by.group_name(0), job, bundles)


def line(*groups: Group, nodes: int = 2, **free: Resources) -> str:
    """Behind what a launch waits for a node with 1 CPU and 4 GPUs; nodes of which ``free`` says nothing are full."""
    names = [f"n{index}" for index in range(nodes)]
    used: dict[str, Resources] = {}
    for name in names:
        taken = [resources for group in groups for node, resources in group.bundles if node == name]
        used[name] = {kind: FULL[kind] - sum(has.get(kind, 0) for has in taken) for kind in FULL}
    return behind(WANTED, {**used, **free}, dict.fromkeys(names, FULL), groups, OWN)


@given(st.text(), st.text(), st.integers(0, 10**6))
def test_the_name_of_a_group_says_whose_it_is(name: str, run_id: str, number: int) -> None:
    """Whatever the launch is called, another launch reads the same from it; the name is plain and not long."""
    made = Launch.new(name, run_id)
    group = made.group_name(number)
    assert launch_of(group) == made
    assert re.fullmatch(r"kfpytorch_ray/[\w.<>:-]+/[\w.<>:-]+/[0-9a-f]{8}-\d+", group, re.ASCII)
    assert len(group) < 160


def test_names_are_kept_as_they_are_where_they_can_be() -> None:
    """Also those of local functions; of a very long one the end, of a run id the beginning."""
    made = Launch.new("test_x.<locals>.train", "f0a1b2-n0")
    assert str(made) == "test_x.<locals>.train (run f0a1b2-n0)"
    long = Launch.new("p" * 100 + ".train", "r" * 100)
    assert long.name.endswith("p.train")
    assert long.run_id == "r" * 60


def test_two_launches_of_one_execution_have_groups_of_different_names() -> None:
    """A Flyte task may launch twice, and Ray refuses a name that is taken."""
    assert Launch.new("train", "f1").group_name(0) != Launch.new("train", "f1").group_name(0)


@pytest.mark.parametrize("name", ["", "other", "kfpytorch_ray/x", "kfpytorch_ray/a/b/c/d", "other/a/b/c-0"])
def test_groups_of_others_are_nobodys(name: str) -> None:
    """Whatever they are called."""
    assert launch_of(name) is None


def test_the_launch_that_holds_the_nodes_is_named() -> None:
    """With the amounts of what is missing, over all its nodes, and nothing of what is not."""
    other = held(launch(1), ("n0", {"CPU": 1.0, "GPU": 4.0}), ("n1", {"CPU": 1.0, "GPU": 2.0, "memory": 2.0**30}))
    assert line(other) == "Behind: train1 (run run1) with {GPU: 6} on 2 nodes."


def test_groups_of_one_launch_are_one_entry() -> None:
    """A range holds one group for each node."""
    groups = [Group(launch(1).group_name(index), "01000000", ((f"n{index}", {"GPU": 1.0}),)) for index in range(2)]
    assert line(*groups) == "Behind: train1 (run run1) with {GPU: 2} on 2 nodes."


def test_nodes_that_could_hold_it_now_or_never_are_nobodys_fault() -> None:
    """One with enough free is left out, and so is one that is too small; one that is not there was not asked for."""
    other = held(launch(1), ("n0", {"GPU": 4.0}), ("small", {"GPU": 1.0}), ("gone", {"GPU": 4.0}))
    free = {"n0": {"CPU": 8.0}, "n1": FULL, "small": {}}
    totals: dict[str, Resources] = {"n0": FULL, "n1": FULL, "small": {"CPU": 8.0, "GPU": 1.0}}
    assert behind(WANTED, free, totals, [other], OWN) == "Behind: train1 (run run1) with {GPU: 4} on 1 node."
    assert behind(WANTED, {"n1": FULL, "small": {}}, totals, [other], OWN) == ""
    assert behind(WANTED, {}, {}, [other], OWN) == ""


def test_placement_groups_of_others_are_named_as_they_can_be() -> None:
    """By their own name, on one line, else by their job, as the dashboard shows it."""
    named = held("hyper parameters\n/x", ("n0", {"GPU": 1.0}))
    nameless = [held("", (node, {"GPU": 1.0}), job="0a000000") for node in ("n0", "n1")]
    assert line(named, *nameless) == (
        "Behind: a placement group without a name of job 0a000000 with {GPU: 2} on 2 nodes, "
        "placement group hyper_parameters_x with {GPU: 1} on 1 node."
    )


def test_work_outside_of_placement_groups_is_told_apart() -> None:
    """What is in use and in no group is plain tasks and actors."""
    other = held(launch(1), ("n0", {"GPU": 1.0}))
    free = {"n0": {"CPU": 8.0, "GPU": 1.0}, "n1": {"CPU": 0.5}}
    assert line(other, **free) == (
        "Behind: train1 (run run1) with {GPU: 1} on 1 node, and work outside of placement groups with "
        "{CPU: 7.5, GPU: 6} on 2 nodes."
    )
    assert line(n0={"CPU": 8.0}, nodes=1) == "Behind: work outside of placement groups with {GPU: 4} on 1 node."


def test_others_that_wait_are_named() -> None:
    """Also a range that runs and would take more; not who waits for something else, and not the launch itself."""
    running = held(launch(1), ("n0", {"GPU": 4.0}), ("n1", {"GPU": 4.0}), ("", {"GPU": 4.0}))
    waiting = held(launch(2), ("", {"GPU": 4.0}), ("", {"GPU": 4.0}))
    elsewhere = held(launch(3), ("", {"CPU": 1.0}))
    own = held(OWN, ("", {"CPU": 1.0, "GPU": 4.0}))
    assert line(running, waiting, elsewhere, own) == (
        "Behind: train1 (run run1) with {GPU: 8} on 2 nodes. "
        "Waiting too: train2 (run run2) for 2 nodes, train1 (run run1) for 1 more node."
    )


def test_no_more_than_three_are_named() -> None:
    """Those on most nodes first; the others are counted."""
    everywhere = held(launch(9), *((f"n{index}", {"GPU": 0.25}) for index in range(4)))
    others = [held(launch(index), (f"n{index % 4}", {"GPU": 0.25})) for index in range(4)]
    asking = [held(launch(20 + index), ("", {"GPU": 1.0})) for index in range(4)]
    text = line(everywhere, *others, *asking, nodes=4)
    assert text.startswith("Behind: train9 (run run9) with {GPU: 1} on 4 nodes, train0 (run run0)")
    assert ", and 2 others. Waiting too: train20" in text
    assert text.endswith("train22 (run run22) for 1 node, and 1 other.")


amounts = st.dictionaries(st.sampled_from(["CPU", "GPU", "disk"]), st.integers(0, 8).map(float))
places = st.sampled_from(["", "n0", "n1", "n2"])
names = st.one_of(st.text(), st.integers(0, 9).map(lambda index: launch(index).group_name(0)))
cluster = st.dictionaries(st.sampled_from(["n0", "n1", "n2"]), amounts)


@given(
    st.lists(amounts, max_size=3),
    cluster,
    cluster,
    st.lists(st.builds(Group, names, st.just("01000000"), st.lists(st.tuples(places, amounts)).map(tuple))),
)
def test_it_is_one_line_that_is_not_long_and_never_names_the_launch_itself(
    wanted: list[Resources], free: dict[str, Resources], totals: dict[str, Resources], groups: list[Group]
) -> None:
    """Whatever is on the cluster, also where the tables that it is read from do not agree."""
    text = behind(wanted, free, totals, [*groups, held(OWN, ("n0", FULL), ("", FULL))], OWN)
    assert text.isprintable()
    assert len(text) < 1500
    assert str(OWN) not in text
    assert not text or text.endswith(".")
