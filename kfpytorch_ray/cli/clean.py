"""``kfpytorch-ray gc``: remove what old runs have left in the storage, and nothing of a run that may be at work.

Outputs and checkpoints, which functions wrote there, stay: they are the user's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import rich_click as click

from kfpytorch_ray.cli.options import Reach, json_option, reach_options, seconds
from kfpytorch_ray.cli.reaching import Standing, standings
from kfpytorch_ray.cli.reporting import print_json, span
from kfpytorch_ray.errors import ClusterUnreachableError, ConfigError, KfpytorchRayError, StorageError, explain
from kfpytorch_ray.notices import tell
from kfpytorch_ray.run import RunStatus, open_run
from kfpytorch_ray.runs import RunSummary, expired_runs, remove_run, stale_files
from kfpytorch_ray.storage import Storage

_KEPT_BY_OPERATORS = {"kuberay": "RayJob", "kubeflow": "PyTorchJob"}
"""What is left on a cluster when a job is over, by backend."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A run that stays although it is old.

    Attributes:
        run: The run.
        why: In a few words.
    """

    run: RunSummary
    why: str


def sort_out(
    runs: list[RunSummary], known: dict[str, Standing], now: float, *, unknown: bool
) -> tuple[list[RunSummary], list[Kept]]:
    """Which of the runs whose time is over are removed, and which stay.

    Args:
        runs: Whose time is over.
        known: Where they stand, by id.
        now: Seconds since the epoch.
        unknown: Whether those are removed, too, whose cluster could not be asked.
    """
    removed, kept = [], []
    for run in runs:
        if why := _why_kept(run, known[run.manifest.run_id], now, unknown=unknown):
            kept.append(Kept(run, why))
        else:
            removed.append(run)
    return removed, kept


def _why_kept(run: RunSummary, standing: Standing, now: float, *, unknown: bool) -> str:
    """What speaks against the removal; empty if nothing does."""
    if run.outcome is not None or standing.status is RunStatus.STOPPED:
        return ""
    if standing.status is not None and not standing.status.ended:
        return str(standing)
    # A cluster that does not know it may be another one, behind the same address of a tunnel.
    left_s = run.manifest.created_at + run.manifest.retention_s - now
    if left_s > 0:
        return f"{standing}, for another {span(left_s)}"
    # It may train for longer than that, on a cluster that is away for a moment.
    return f"{standing}: --older-than removes it" if standing.status is None and not unknown else ""


@click.command()
@click.option(
    "--older-than",
    type=seconds,
    metavar="TIME",
    help="Remove runs that ended longer ago than this (30m, 12h, 7d), whatever their own retention is.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@json_option
@reach_options
def gc(
    older_than: float | None,
    dry_run: bool,
    as_json: bool,
    storage: str | None,
    address: str | None,
    verify: bool | str | None,
) -> None:
    """Remove from the storage what old runs have left.

    Old is a run whose retention is over. A run at work stays; one that has left no outcome, and whose cluster does not
    say that it was stopped, stays for its retention, and for longer where the cluster cannot be asked, unless
    --older-than is given. What launches that were cut short and clusters that were looked at
    have left goes after a day. Outputs and checkpoints of functions are never removed. The RayJob or PyTorchJob of a
    run that is removed goes as well; where it cannot be removed the run stays, unless --older-than is given.
    """
    reach = Reach(storage, address, verify)
    place = reach.open_storage()
    now = time.time()
    old = expired_runs(place, older_than, now)
    removed, kept = sort_out(old, standings(old, reach), now, unknown=older_than is not None)
    failed: list[tuple[str, StorageError]] = []
    gone: list[str] = []
    remover = _Remover(place, reach, anyway=older_than is not None)
    for run in removed:
        run_id = run.manifest.run_id
        try:
            why = "" if dry_run else remover.remove(run)
        except StorageError as error:
            failed.append((run_id, error))
            continue
        if why:
            kept.append(Kept(run, why))
        else:
            gone.append(run_id)
            _say_removed(run_id, dry_run, as_json)
    stale = _remove_stale(place, now, dry_run=dry_run)
    for name in stale:
        _say_removed(name, dry_run, as_json)
    if failed:
        raise _not_removed(place.uri, failed)
    if as_json:
        stay = [{"run_id": one.run.manifest.run_id, "reason": one.why} for one in kept]
        print_json({"removed": gone, "kept": stay, "stale": stale, "dry_run": dry_run})
        return
    for one in kept:
        click.echo(f"kept {one.run.manifest.run_id}: {one.why}", err=True)
    removals = len(gone) + len(stale)
    click.echo(f"{removals} removed." if removals else "Nothing to remove.", err=True)


@dataclass
class _Remover:
    """Removes runs, and what Kubernetes clusters keep of them.

    Attributes:
        place: The storage.
        reach: How clusters are reached.
        anyway: Whether runs are removed, too, of which a cluster keeps its part.
        silent: Why clusters did not answer, by address: they are not asked again.
    """

    place: Storage
    reach: Reach
    anyway: bool
    silent: dict[str, str] = field(default_factory=dict)

    def remove(self, run: RunSummary) -> str:
        """Remove a run; why it stays, else empty.

        Raises:
            StorageError: What it has left in the storage cannot be removed.
        """
        if kind := _KEPT_BY_OPERATORS.get(run.manifest.backend):
            try:
                if at_work := self._forget(run):
                    return at_work
            except KfpytorchRayError as error:
                why = f"its {kind} cannot be removed ({_in_short(error)})"
                if not self.anyway:
                    # What the storage has of the run is all that leads to it.
                    return f"{why}: --older-than removes the run from the storage all the same"
                tell(f"{run.manifest.run_id}: {why}")
        remove_run(self.place, run.manifest.run_id)
        return ""

    def _forget(self, run: RunSummary) -> str:
        """Have the cluster forget a run; its status where it turns out to be at work, which was not known before."""
        address = run.manifest.address
        if address in self.silent:
            raise ClusterUnreachableError(self.silent[address])
        handle = open_run(run.manifest, self.reach.options(run.manifest.backend))
        try:
            if run.outcome is None and not (status := handle.status()).ended:
                return status.value
            handle.forget()
        except ClusterUnreachableError as error:
            self.silent[address] = str(error)
            raise
        return ""


def _in_short(error: KfpytorchRayError) -> str:
    said = error.problems[0] if isinstance(error, ConfigError) else str(error)
    return said.splitlines()[0]


def _remove_stale(place: Storage, now: float, *, dry_run: bool) -> list[str]:
    stale = stale_files(place, now)
    for name in stale:
        if not dry_run:
            place.remove(name)
    return stale


def _say_removed(name: str, dry_run: bool, as_json: bool) -> None:
    if not as_json:
        click.echo(f"{'would remove' if dry_run else 'removed'} {name}")


def _not_removed(where: str, failed: list[tuple[str, StorageError]]) -> StorageError:
    first = str(failed[0][1]).splitlines()
    listed = ", ".join(run_id for run_id, _ in failed)
    return StorageError(
        explain(
            f"{len(failed)} runs in {where} could not be removed: {listed}.",
            first[1].removeprefix("Why: "),
            first[-1].removeprefix("Fix: "),
        )
    )
