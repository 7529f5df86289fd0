"""The other pods of an elastic PyTorchJob, watched from one: when one has failed, those that still run end as well.

The operator counts the job as failed then, and nobody starts that pod again. Ranks that communicate lose their
connection and fail by themselves; others would hold their nodes until somebody takes the result, or for the job's time
to live. (cleanPodPolicy would end them at once, and with them those that are about to say why.)
"""

from __future__ import annotations

import os
import signal
import time

from kfpytorch_ray.cluster.kube.pod_reports import failed_pods
from kfpytorch_ray.cluster.remote.lease import FolderThread
from kfpytorch_ray.storage import Storage

GRACE_S = 60.0
"""For ranks to notice by themselves, and for their agent to say so."""


class PeerWatch(FolderThread):
    """Ends this process by SIGTERM when another pod has failed and its own ranks still run.

    Args:
        folder: Of the run.
        pod: This one's name.
        grace_s: Seconds after the other one's failure. None: nothing is watched, as a failed pod is started again.
    """

    def __init__(self, folder: Storage, pod: str, grace_s: float | None) -> None:
        super().__init__(folder, grace_s)
        self._pod = pod
        self._grace_s = grace_s or 0.0
        self._failed_at: float | None = None
        self.reason = ""

    def _do(self) -> None:
        failed = sorted(set(failed_pods(self._folder)) - {self._pod})
        if not failed or self.reason:
            return
        if self._failed_at is None:
            self._failed_at = time.monotonic()
        elif time.monotonic() - self._failed_at > self._grace_s:
            self.reason = f"The pod {failed[0]} had failed, and this one still ran {self._grace_s:g} s later."
            os.kill(os.getpid(), signal.SIGTERM)
