"""Looking inside the ranks of a run that goes on: their stacks, and where one spends its time.

For a run on a cluster that this machine belongs to, also one that a launch has started here for itself, and for one on
a cluster elsewhere, whose storage knows it.
"""

from __future__ import annotations

import os
from typing import Protocol, runtime_checkable

from kfpytorch_ray.backends import Adapter, BackendChoice, load_adapter
from kfpytorch_ray.config import BackendOptions, RayBackend
from kfpytorch_ray.errors import BackendUnavailableError, ConfigError, UnknownRunError, explain
from kfpytorch_ray.runs import STORAGE_VARIABLE, Manifest, read_manifest, storage_of


@runtime_checkable
class InspectingAdapter(Adapter, Protocol):
    """An adapter that can look inside the ranks of its runs."""

    def stacks(self, run: str, manifest: Manifest | None, rank: int | None) -> dict[int, str]:
        """The stacks of ranks, by rank.

        Args:
            run: Id of the run.
            manifest: Of a run on a cluster elsewhere; None for one that is to be found here.
            rank: Only this one; None for all.
        """
        ...

    def flamegraph(self, run: str, manifest: Manifest | None, rank: int, duration_s: int) -> str:
        """Where a rank spends its time, as an SVG."""
        ...


def stacks(
    run: str, *, rank: int | None = None, storage: str | None = None, backend: BackendOptions | None = None
) -> dict[int, str]:
    """What the ranks of a run are doing: the stacks of all their threads, without stopping them.

    Answered by Python's faulthandler, also from C code; where py-spy is installed on the node, with what it sees.

    Args:
        run: Its id, which the launch tells, or the beginning of one.
        rank: Only this rank. None: all.
        storage: Of a run on a cluster elsewhere. None: the variable ``KFPYTORCH_RAY_STORAGE``, else it is looked for on
            the Rays of this machine.
        backend: How its cluster is reached, such as ``RayBackend(address="auto")``, where the defaults do not do.

    Returns:
        Text by rank.

    Raises:
        UnknownRunError: No such run goes on, or it has no such rank now.
        BackendUnavailableError: Runs of its backend cannot be looked into from here.
        ClusterError: Its cluster cannot be used.
        RunError: A node does not answer.
    """
    adapter, manifest = _found(run, storage, backend)
    return adapter.stacks(run, manifest, rank)


def flamegraph(
    run: str, rank: int, *, duration_s: int = 10, storage: str | None = None, backend: BackendOptions | None = None
) -> str:
    """Where a rank spends its time: an SVG that py-spy draws of its stacks, a hundred a second.

    Needs py-spy on the node (``pip install 'kfpytorch_ray[profile]'``). The rank is held for a moment at each look.

    Args:
        run: As in ``stacks``.
        rank: The rank.
        duration_s: Whole seconds for which it is watched.
        storage: As in ``stacks``.
        backend: As in ``stacks``.

    Raises:
        KfpytorchRayError: As ``stacks``; a RunError where py-spy is missing, or may not look.
        ConfigError: ``duration_s`` is no whole number of seconds.
    """
    if not isinstance(duration_s, int) or duration_s < 1:
        problem = explain(
            f"duration_s={duration_s!r} is no time to look for.",
            "py-spy counts whole seconds.",
            "Give 1 or more of them.",
        )
        raise ConfigError("flamegraph", (problem,))
    adapter, manifest = _found(run, storage, backend)
    return adapter.flamegraph(run, manifest, rank, duration_s)


def _found(run: str, storage: str | None, backend: BackendOptions | None) -> tuple[InspectingAdapter, Manifest | None]:
    """The adapter of a run, and its manifest where a storage has one."""
    address = getattr(backend, "address", None)
    joins = bool(address) and not str(address).startswith(("http://", "https://"))
    manifest = None
    if not joins and (storage or os.environ.get(STORAGE_VARIABLE)):
        try:
            manifest = read_manifest(storage_of(storage), run)
        except UnknownRunError:
            # Named for this run, it should know it; the environment's may be another's.
            if storage or address:
                raise
    name = manifest.backend if manifest is not None else RayBackend.name
    adapter = load_adapter(BackendChoice(name, backend if backend is None or backend.name == name else None))
    if not isinstance(adapter, InspectingAdapter):
        msg = (
            f"The ranks of {run} cannot be looked into from here: its backend is {name!r}.\n"
            "Why: nothing but its own cluster reaches them.\n"
            "Fix: on a machine or pod of that cluster, for example by kubectl exec on its head: kfpytorch-ray stacks "
            f"{run} --address auto"
        )
        raise BackendUnavailableError(msg)
    return adapter, manifest
