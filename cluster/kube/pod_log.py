"""The log of a RayJob's driver, as the container shows it that submits it: what comes before and between is left out.

The driver's first line is a mark. From there on the container prints what the driver has printed; where its stream
breaks, it is read again from its beginning and what was delivered is passed over.
"""

from __future__ import annotations

import codecs
import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import final

from kfpytorch_ray.cluster.kube.client import Namespace
from kfpytorch_ray.cluster.remote.received import Received
from kfpytorch_ray.errors import ClusterError

logger = logging.getLogger(__name__)

_PAUSE_S = 1.0
_STOP_S = 5.0


def mark_of(run_id: str) -> str:
    """The first line of a driver, or of a pod that is a node itself."""
    return f"kfpytorch_ray: the run {run_id} starts here\n"


def driver_part(text: str, run_id: str) -> str:
    """What of a container's log is the driver's."""
    _, mark, rest = text.partition(mark_of(run_id))
    return mark + rest


@final
class PodLogTail:
    """Follows a container's log in a thread of its own while a ``with`` block runs. See ``Tail``.

    Args:
        namespace: Where its pod is.
        find_pod: Names the pod; None as long as there is none.
        container: Of the pod.
        run_id: Whose driver it shows.
    """

    def __init__(self, namespace: Namespace, find_pod: Callable[[], str | None], container: str, run_id: str) -> None:
        self._namespace = namespace
        self._find_pod = find_pod
        self._container = container
        self._run_id = run_id
        self._texts = Received()
        self._received = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kfpytorch-ray-log", daemon=True)

    def __enter__(self) -> PodLogTail:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Follow it no longer; what was received can still be asked for."""
        self._over.set()
        # A stream that says nothing cannot be interrupted: the thread is a daemon.
        self._thread.join(_STOP_S)

    def next(self, timeout_s: float) -> str:
        """What has come since the last time, after ``timeout_s`` at the latest; empty if nothing has."""
        return self._texts.next(timeout_s)

    def rest(self, whole: str) -> str:
        """What of the driver's whole log ``next`` has not returned."""
        return driver_part(whole, self._run_id)[self._texts.delivered :]

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                pod = self._find_pod()
                if pod is not None:
                    self._receive(pod)
            except ClusterError as error:
                logger.debug("The log stream broke: %s", error)
            self._over.wait(_PAUSE_S)

    def _receive(self, pod: str) -> None:
        text, seen = "", 0
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        mark = mark_of(self._run_id)
        with self._namespace.log_stream(pod, self._container) as pieces:
            for piece in pieces:
                if self._over.is_set():
                    return
                text += decoder.decode(piece)
                if not seen and mark not in text:
                    continue
                if not seen:
                    text = driver_part(text, self._run_id)
                fresh = text[max(0, self._received - seen) :]
                seen += len(text)
                text = ""
                if fresh:
                    self._received += len(fresh)
                    self._texts.put(fresh)
