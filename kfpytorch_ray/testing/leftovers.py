"""What launches leave on this machine if they are careless: processes, files, and what Ray holds for them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from kfpytorch_ray.testing.processes import all_processes, command, environment, is_running, parent
from kfpytorch_ray.testing.running import marks
from kfpytorch_ray.testing.waiting import wait_until

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - looked at, not written to
_OWN = "kfpytorch_ray-*"
_OF_LIBRARIES = ("pymp-*", "torch_*", "torchelastic_*")
"""What multiprocessing and torch leave. In a folder that the whole machine uses, nobody knows whose they are."""
_TORCH_FILE = re.compile(r"torch_(\d+)_")
_AGENT_TITLE = "ray::ElasticAgent"
_DEFAULT_TEMP_DIR = "/tmp"  # noqa: S108 - looked at, not written to


@final
@dataclass(frozen=True, slots=True)
class Leftovers:
    """What is there now; the difference of two is what came in between.

        before = Leftovers.now()
        launch(train, elastic=...)
        assert not Leftovers.now() - before

    Attributes:
        processes: Agents, and everything that carries an agent's mark.
        files: Folders of agents in the temporary folder, and files in shared memory.
        placement_groups: Those of the Ray cluster that this process has joined.
        actors: The agents and named actors of that cluster that live.
    """

    processes: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    placement_groups: frozenset[str] = frozenset()
    actors: frozenset[str] = frozenset()

    @classmethod
    def now(cls, temp_dir: str | None = None) -> Leftovers:
        """Look.

        Args:
            temp_dir: The temporary folder of the nodes meant; what belongs to nodes with another one is left out.
                None: this process's, with all processes and only the folders that agents make themselves.
        """
        # Before marks: an agent of somebody else that is just starting has a marked process before it has folders.
        files = _files(temp_dir)
        marked = {process: mark for process, mark in marks().items() if is_running(process)}
        own = {mark for mark in marked.values() if temp_dir is None or _is_under(temp_dir, mark)}
        foreign = {folder for mark in set(marked.values()) - own for folder in mark.split(os.pathsep)[1:]}
        processes = {process for process, mark in marked.items() if mark in own} | _agents(temp_dir)
        groups, actors = _held_by_ray()
        return cls(
            processes=frozenset(f"{process}: {_name(process)}" for process in processes),
            files=frozenset(files - foreign),
            placement_groups=groups,
            actors=actors,
        )

    def __sub__(self, before: Leftovers) -> Leftovers:
        return Leftovers(
            self.processes - before.processes,
            self.files - before.files,
            self.placement_groups - before.placement_groups,
            self.actors - before.actors,
        )

    def __len__(self) -> int:
        return len(self.processes) + len(self.files) + len(self.placement_groups) + len(self.actors)

    def __str__(self) -> str:
        kinds = {
            "process": self.processes,
            "file": self.files,
            "placement group": self.placement_groups,
            "actor": self.actors,
        }
        return "\n".join(f"{kind} {one}" for kind, found in kinds.items() for one in sorted(found)) or "nothing"


@contextlib.contextmanager
def nothing_left(temp_dir: str | None = None, timeout_s: float = 60.0) -> Iterator[None]:
    """Wait after the block until what came with it is gone: agents end a moment after their driver.

    Args:
        temp_dir: As in ``Leftovers.now``.
        timeout_s: Longest wait.

    Raises:
        AssertionError: Something stays; the message lists it. Not where the block raised.
    """
    before = Leftovers.now(temp_dir)
    yield
    left = left_after(before, temp_dir, timeout_s)
    if left:
        msg = f"still there {timeout_s:g} s after its end:\n{left}"
        raise AssertionError(msg)


def left_after(before: Leftovers, temp_dir: str | None = None, timeout_s: float = 60.0) -> Leftovers:
    """What there is beyond ``before``, once that is nothing or after ``timeout_s``.

    Args:
        before: What was there before.
        temp_dir: As in ``Leftovers.now``.
        timeout_s: Longest wait.
    """
    left = Leftovers()

    def nothing_is_left() -> bool:
        nonlocal left
        left = Leftovers.now(temp_dir) - before
        return not left

    with contextlib.suppress(TimeoutError):
        wait_until(nothing_is_left, "the end of what was started", timeout_s)
    # The last look, and no other one: what somebody else is just ending may be seen once without its owner.
    return left


def _agents(temp_dir: str | None) -> set[int]:
    """The actors' own processes, which carry no mark."""
    agents = {process for process in all_processes() if command(process).startswith(_AGENT_TITLE)}
    return agents if temp_dir is None else {agent for agent in agents if _may_be_under(temp_dir, parent(agent))}


def _may_be_under(temp_dir: str, raylet: int) -> bool:
    """Whether a raylet has this temporary folder. An agent's title is written over what its own environment says."""
    if "raylet" not in command(raylet):
        # It has died: nobody knows any more whose the agent was.
        return True
    return environment(raylet).get("TMPDIR", _DEFAULT_TEMP_DIR) == temp_dir


def _name(process: int) -> str:
    """The command line; of an agent without the method that it runs just now."""
    said = command(process) or "ended"
    return _AGENT_TITLE if said.startswith(_AGENT_TITLE) else said


def _is_under(temp_dir: str, mark: str) -> bool:
    return any(Path(folder).is_relative_to(temp_dir) for folder in mark.split(os.pathsep)[1:])


def _files(temp_dir: str | None) -> set[str]:
    everything = () if temp_dir is None else _OF_LIBRARIES
    places = ((temp_dir or tempfile.gettempdir(), (_OWN, *everything)), (SHARED_MEMORY, (_OWN, *everything)))
    found = {path for folder, patterns in places for pattern in patterns for path in Path(folder).glob(pattern)}
    return {str(path) for path in found if temp_dir is None or not _is_anothers(path.name, temp_dir)}


def _is_anothers(name: str, temp_dir: str) -> bool:
    """Whether a process with another temporary folder has a file of torch's, whose name begins with its maker's id."""
    owner = _TORCH_FILE.match(name)
    if owner is None or not is_running(int(owner[1])):
        return False
    folder = environment(int(owner[1])).get("TMPDIR")
    return folder is not None and not Path(folder).is_relative_to(temp_dir)


def _held_by_ray() -> tuple[frozenset[str], frozenset[str]]:
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return frozenset(), frozenset()
    groups = ray.util.placement_group_table()
    actors = ray._private.state.actors()
    return (
        frozenset(f"{id_} ({group['state']})" for id_, group in groups.items() if group["state"] != "REMOVED"),
        frozenset(
            f"{id_} {actor['ActorClassName']} {actor['Name']}"
            for id_, actor in actors.items()
            if actor["State"] != "DEAD" and (actor["Name"] or actor["ActorClassName"] == "ElasticAgent")
        ),
    )
