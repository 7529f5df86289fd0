"""A cluster that several launches share: whose a placement group is, and behind what a launch waits. Pure: no Ray.

Every placement group of a launch is called ``kfpytorch_ray/<name>/<run id>/<token>-<number>``, so that Ray's dashboard
and other launches can say whose it is. Ray refuses a name that is taken in the namespace of the job. The token is
another for every launch, also for two of one Flyte execution, and the number for every group of a launch.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kfpytorch_ray.cluster.demand import Resources, fits, shown

_PREFIX = "kfpytorch_ray"
_MOST_NAMED = 3
_LONGEST_NAME = 60
_LEAST = 1e-3
"""Ray counts in 1/10000; what is less than this is left from adding up."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Whose a placement group is.

    Attributes:
        name: Of the task or function.
        run_id: TORCHELASTIC_RUN_ID.
        token: Tells launches of the same name and run id apart.
    """

    name: str
    run_id: str
    token: str

    @classmethod
    def new(cls, name: str, run_id: str) -> Launch:
        """A launch with a token of its own; of names, what is safe in the name of a placement group."""
        # The end of a dotted name says more than its beginning.
        return cls(_plain(name)[-_LONGEST_NAME:], _plain(run_id)[:_LONGEST_NAME], secrets.token_hex(4))

    def group_name(self, number: int) -> str:
        """The name of one of its placement groups."""
        return f"{_PREFIX}/{self.name}/{self.run_id}/{self.token}-{number}"

    def __str__(self) -> str:
        return f"{self.name} (run {self.run_id})"


def launch_of(group_name: str) -> Launch | None:
    """The launch whose placement group has this name; None for a group that is none of ours."""
    match group_name.split("/"):
        case [prefix, name, run_id, number] if prefix == _PREFIX:
            return Launch(name, run_id, number.partition("-")[0])
    return None


@dataclass(frozen=True, slots=True)
class Group:
    """A placement group of the cluster.

    Attributes:
        name: As its maker called it; empty without one.
        job: Ray's id of the job that made it.
        bundles: Of each the id of its node, empty as long as it is not placed, and what it holds or asks for.
    """

    name: str
    job: str
    bundles: tuple[tuple[str, Resources], ...]

    def owner(self) -> Launch | str:
        """Whose it is; groups of one owner are one entry."""
        if (launch := launch_of(self.name)) is not None:
            return launch
        if self.name:
            return f"placement group {_plain(self.name)[:_LONGEST_NAME]}"
        return f"a placement group without a name of job {self.job}"


def behind(
    wanted: Sequence[Resources],
    free: Mapping[str, Resources],
    totals: Mapping[str, Resources],
    groups: Collection[Group],
    own: Launch,
) -> str:
    """Who has what a launch waits for, and who waits for it as well. One line, with at most three names in a list.

    Args:
        wanted: The bundles that are not placed.
        free: What each node has free now, of the nodes that could hold one of them.
        totals: What each node has in all.
        groups: All placement groups of the cluster.
        own: Who asks.

    Returns:
        Sentences; empty if no node that is large enough lacks anything.
    """
    taken = _taken(wanted, free, totals)
    if not taken:
        return ""
    kinds = frozenset().union(*taken.values())
    others = [(owner, group) for group in groups if (owner := group.owner()) != own]
    holders = _holders(others, taken)
    holding = [f"{owner} with {_held(nodes)}" for owner, nodes in holders]
    text = f"Behind: {_listed(holding)}" if holding else ""
    if loose := _unexplained(taken, free, totals, groups):
        text += f"{', and ' if text else 'Behind: '}work outside of placement groups with {_held(loose)}"
    waiting = _listed(_waiting(others, kinds))
    return ". ".join([*([text] if text else []), *([f"Waiting too: {waiting}"] if waiting else []), ""]).rstrip()


def _taken(
    wanted: Sequence[Resources], free: Mapping[str, Resources], totals: Mapping[str, Resources]
) -> dict[str, frozenset[str]]:
    """Nodes that could hold a bundle if they were free, and the kinds of which they have too little now."""
    taken: dict[str, frozenset[str]] = {}
    for node, has in free.items():
        for bundle in wanted:
            if fits(bundle, totals.get(node, {})) and not fits(bundle, has):
                short = frozenset(name for name, amount in bundle.items() if has.get(name, 0) < amount)
                taken[node] = taken.get(node, frozenset()) | short
    return taken


def _holders(
    others: Sequence[tuple[Launch | str, Group]], taken: Mapping[str, frozenset[str]]
) -> list[tuple[Launch | str, dict[str, dict[str, float]]]]:
    """Who holds what on which node, those on most nodes first."""
    holders: dict[Launch | str, dict[str, dict[str, float]]] = {}
    for owner, group in others:
        for node, resources in group.bundles:
            for kind in taken.get(node, frozenset()) & resources.keys():
                amounts = holders.setdefault(owner, {}).setdefault(node, {})
                amounts[kind] = amounts.get(kind, 0) + resources[kind]
    return sorted(holders.items(), key=lambda entry: (-len(entry[1]), str(entry[0])))


def _unexplained(
    taken: Mapping[str, frozenset[str]],
    free: Mapping[str, Resources],
    totals: Mapping[str, Resources],
    groups: Collection[Group],
) -> dict[str, dict[str, float]]:
    """What is in use on nodes that no placement group holds."""
    found: dict[str, dict[str, float]] = {}
    for node, kinds in taken.items():
        for kind in kinds:
            held = sum(has.get(kind, 0) for group in groups for where, has in group.bundles if where == node)
            rest = totals[node].get(kind, 0) - free[node].get(kind, 0) - held
            if rest > _LEAST:
                found.setdefault(node, {})[kind] = rest
    return found


def _waiting(others: Sequence[tuple[Launch | str, Group]], kinds: frozenset[str]) -> list[str]:
    """Who asks for the same kinds, and for how many bundles."""
    asked: dict[Launch | str, int] = {}
    placed = {owner for owner, group in others for node, _ in group.bundles if node}
    for owner, group in others:
        if count := sum(1 for node, resources in group.bundles if not node and kinds & resources.keys()):
            asked[owner] = asked.get(owner, 0) + count
    return [
        f"{owner} for {count} {'more ' if owner in placed else ''}node{'s' if count > 1 else ''}"
        for owner, count in sorted(asked.items(), key=lambda entry: (-entry[1], str(entry[0])))
    ]


def _held(nodes: Mapping[str, Mapping[str, float]]) -> str:
    """Amounts added up, and on how many nodes they are."""
    total: dict[str, float] = {}
    for amounts in nodes.values():
        for kind, amount in amounts.items():
            total[kind] = total.get(kind, 0) + amount
    return f"{shown(total)} on {len(nodes)} node{'s' if len(nodes) > 1 else ''}"


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - _MOST_NAMED
    rest = [f"and {more} other{'s' if more > 1 else ''}"] if more > 0 else []
    return ", ".join([*texts[:_MOST_NAMED], *rest])


def _plain(text: str) -> str:
    """Letters, digits and what Python's and Flyte's names have; no line ends, no slashes, never nothing."""
    return re.sub(r"[^A-Za-z0-9_.<>:-]+", "_", text) or "_"
