"""The launches by which a cluster's nodes are looked at, and the places that they need: made, and taken away again.

They go the way of any launch, by ``kfpytorch_ray.launch``, so that what stands in its way is met here, too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kfpytorch_ray.cluster.doctor import rank
from kfpytorch_ray.cluster.doctor.clocks import ahead
from kfpytorch_ray.cluster.doctor.exchange import Beacon
from kfpytorch_ray.cluster.doctor.report import Interval, NodeReport
from kfpytorch_ray.cluster.remote.client import JobClient
from kfpytorch_ray.config import Elastic, RayBackend, RunPolicy
from kfpytorch_ray.doctor.machine import boot_id, no_new_folders, try_storage
from kfpytorch_ray.errors import KfpytorchRayError
from kfpytorch_ray.plain_call import launch
from kfpytorch_ray.results import ElasticResult
from kfpytorch_ray.runs import storage_of
from kfpytorch_ray.storage import Storage

_DEADLINE_S = 300
"""Far above what the checks of a rank take with all of their time-outs."""
_MARGIN_S = 180.0
"""For the job to start, and for its results."""


@dataclass(frozen=True, slots=True)
class Launched:
    """What a launch brought.

    Attributes:
        reports: Of its nodes, by rank.
        clocks: What their clocks show more than this machine's, by rank.
    """

    reports: Sequence[NodeReport]
    clocks: Mapping[int, Interval]


@dataclass(frozen=True, slots=True)
class Launcher:
    """Launches on a cluster, as a user's launch would.

    Attributes:
        options: By which the launch finds the cluster.
        client: Of its job API; None where this process has joined it.
        folder: In the storage; None without one.
        wait_s: For the nodes.
    """

    options: RayBackend
    client: JobClient | None
    folder: Storage | None
    wait_s: float

    def launch(self, nnodes: int | str, backend: str | None, resources: Mapping[str, float]) -> Launched:
        """Have every node report.

        Raises:
            KfpytorchRayError: As ``kfpytorch_ray.launch`` does; RunPendingError where it did not end in time.
        """
        exchange = self.folder.folder(f"exchange-{uuid.uuid4().hex[:8]}") if self.folder else None
        elastic = Elastic(
            nnodes=nnodes,
            rdzv_configs={"join_timeout": self.wait_s, "last_call_timeout": self.wait_s},
            run_policy=RunPolicy(active_deadline_seconds=_DEADLINE_S),
            # Nothing that comes later is to disturb the nodes that are looked at.
            backend=replace(
                self.options,
                resources_per_node=dict(resources),
                max_node_failures=0,
                grow_cooldown_s=float(2 * _DEADLINE_S),
            ),
        )
        began = time.time()
        with quiet(), Beacon(exchange) if exchange else contextlib.nullcontext() as beacon:
            result = self._results(elastic, exchange.uri if exchange else None, backend)
        reports = [result[number].return_value for number in result]
        clocks = ahead(reports, boot_id(), Interval(began, time.time()), beacon.seen_at if beacon else {})
        return Launched(reports, clocks)

    def _results(self, elastic: Elastic, exchange: str | None, backend: str | None) -> ElasticResult:
        if self.client is None:
            return launch(rank.examine, exchange, backend, elastic=elastic)
        run = launch(rank.examine, exchange, backend, elastic=elastic, wait=False)
        try:
            result = run.result(self.wait_s + _DEADLINE_S + _MARGIN_S, keep=True)
            for number in result:
                # Its file is removed with the job.
                result[number]
            return result
        finally:
            with contextlib.suppress(KfpytorchRayError, TimeoutError):
                run.cancel()
                # Its outcome is there a moment before it is over, and it still writes then.
                self.client.wait_until_over(run.run_id, _MARGIN_S)
                self.client.forget(run.run_id, thoroughly=True)


@contextlib.contextmanager
def scratch(uri: str) -> Iterator[Storage | None]:
    """A folder of the storage for everything that is written, removed at the end; None where it cannot be used here."""
    try:
        storage = storage_of(uri)
        folder = storage.folder(f"doctor-{uuid.uuid4().hex[:12]}")
        try_storage(folder.uri)
    except KfpytorchRayError:
        yield None
        return
    with no_new_folders(storage):
        try:
            yield folder
        finally:
            with contextlib.suppress(KfpytorchRayError):
                folder.remove()


@contextlib.contextmanager
def own_temporary_folder() -> Iterator[None]:
    """A temporary folder for a Ray that is started meanwhile, removed with all that Ray leaves there."""
    variable = "RAY_TMPDIR"
    before = os.environ.get(variable)
    # Sockets lie in it, whose paths must not be longer than 107 bytes.
    folder = tempfile.mkdtemp(prefix="kfr-", dir=before or "/tmp")  # noqa: S108 - made for this user alone
    os.environ[variable] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Ray and launches say of their progress from those who asked for findings."""
    aside = io.StringIO()
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(aside), contextlib.redirect_stderr(aside):
            yield
    finally:
        logging.disable(logging.NOTSET)
