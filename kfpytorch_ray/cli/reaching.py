"""Runs as commands see them: opened by their id, and where they stand, as storage and clusters tell."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kfpytorch_ray.cli.options import Reach
from kfpytorch_ray.errors import ClusterError, KfpytorchRayError
from kfpytorch_ray.run import Run, RunStatus, open_run
from kfpytorch_ray.runs import Manifest, RunSummary, read_manifest

_AT_A_TIME = 16
"""Clusters that are asked at the same time: one that does not answer takes ten seconds to say so."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a run stands.

    Attributes:
        status: As its outcome or its cluster says; None where neither does.
        why_unknown: What was in the way, in a few words.
    """

    status: RunStatus | None
    why_unknown: str = ""

    def __str__(self) -> str:
        return self.status.value if self.status else f"unknown ({self.why_unknown})"


def opened(run_id: str, reach: Reach) -> tuple[Manifest, Run]:
    """A run and what it is.

    Raises:
        ConfigError: No storage is named, or the run's backend has no such options.
        UnknownRunError: There is no such run.
        StorageError: The storage cannot be read.
        BackendUnavailableError: The run's backend is not installed here.
    """
    manifest = read_manifest(reach.open_storage(), run_id)
    return manifest, open_run(manifest, reach.options(manifest.backend))


def standings(runs: Sequence[RunSummary], reach: Reach) -> dict[str, Standing]:
    """Where runs stand, by id. Of those that have left no outcome, their clusters are asked.

    A cluster that has not answered is not asked again for other runs.
    """
    known = {run.manifest.run_id: Standing(RunStatus(run.outcome.state)) for run in runs if run.outcome is not None}
    by_cluster: dict[str, list[Manifest]] = {}
    for run in runs:
        if run.outcome is None:
            by_cluster.setdefault(reach.address or run.manifest.address, []).append(run.manifest)
    with ThreadPoolExecutor(_AT_A_TIME, "kfpytorch-ray-ask") as pool:
        for told in pool.map(lambda manifests: _ask(manifests, reach), by_cluster.values()):
            known.update(told)
    return known


def _ask(manifests: Sequence[Manifest], reach: Reach) -> dict[str, Standing]:
    told = {}
    silent: Standing | None = None
    for manifest in manifests:
        if silent is None:
            try:
                status = open_run(manifest, reach.options(manifest.backend)).status()
            except ClusterError:
                silent = Standing(None, "cluster does not answer")
            except KfpytorchRayError as error:
                told[manifest.run_id] = Standing(None, type(error).__name__)
                continue
            else:
                told[manifest.run_id] = _believed(status, manifest, reach)
                continue
        told[manifest.run_id] = silent
    return told


def _believed(status: RunStatus, manifest: Manifest, reach: Reach) -> Standing:
    """What an answer is worth: a cluster that was named for all runs need not be the one that a lost run was on."""
    if status is RunStatus.LOST and reach.address not in (None, manifest.address):
        return Standing(None, "not on this cluster")
    return Standing(status)
