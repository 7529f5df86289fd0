"""The logs of a job whose pods all train: read one after the other, or followed together, whole lines at a time.

torch elastic marks the lines of its ranks. The processes of a ``PyTorch`` job are ranks themselves: their lines are
marked here, by the place that the operator gave the pod.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from types import TracebackType
from typing import final

from kfpytorch_ray.cluster.kube.client import Namespace
from kfpytorch_ray.cluster.kube.kinds import PYTORCH_CONTAINER
from kfpytorch_ray.cluster.kube.pod_log import PodLogTail, driver_part
from kfpytorch_ray.cluster.kube.pod_reports import LOG, folder_of
from kfpytorch_ray.errors import KfpytorchRayError
from kfpytorch_ray.runs import PODS
from kfpytorch_ray.storage import Storage

logger = logging.getLogger(__name__)

_LOOK_S = 5.0
"""How often it is looked whether there are more pods."""
_PLACE = re.compile(r"-(master|worker)-(\d+)$")


class PodsLog:
    """What the pods of a job have printed.

    Args:
        namespace: Where they are.
        selector: Selects them by their labels.
        folder: Of the run, where pods that have ended leave their logs.
        run_id: Of the run.
    """

    def __init__(self, namespace: Namespace, selector: str, folder: Storage, run_id: str) -> None:
        self._namespace = namespace
        self._selector = selector
        self._folder = folder
        self._run_id = run_id

    def pods(self) -> list[str]:
        """Names of the pods that have a log, here or in the storage, in the order of their places."""
        living = {pod.metadata.name for pod in self._namespace.pods(self._selector)}
        return sorted(living | set(self._folder.folder(PODS).names()), key=_order)

    def of(self, pod: str) -> str:
        """What one of them has printed."""
        kept = folder_of(self._folder, pod).read(LOG)
        text = self._namespace.log(pod, PYTORCH_CONTAINER) if kept is None else kept.decode(errors="replace")
        return driver_part(text, self._run_id)

    def text(self) -> str:
        """What all have printed, one after the other."""
        pods = self.pods()
        return "".join(marked(self.of(pod), prefix_of(pod, pods)) for pod in pods)

    def tail(self, pod: str) -> PodLogTail:
        """Follow one of them."""
        return PodLogTail(self._namespace, lambda: pod, PYTORCH_CONTAINER, self._run_id)


@final
class PodsTail:
    """Follows the logs of all pods of a job while a ``with`` block runs. See ``Tail``.

    Args:
        log: Of the job.
    """

    def __init__(self, log: PodsLog) -> None:
        self._log = log
        self._tails: dict[str, PodLogTail] = {}
        self._halves: dict[str, str] = {}
        self._following = contextlib.ExitStack()
        self._looked_at = 0.0
        self._over = False

    def __enter__(self) -> PodsTail:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Follow them no longer; what was received can still be asked for."""
        self._over = True
        self._following.close()

    def next(self, timeout_s: float) -> str:
        """Whole lines that have come since the last time, after ``timeout_s`` at the latest; empty if none have."""
        self._look()
        text = self._received(0.0)
        if text or not timeout_s:
            return text
        if not self._tails:
            time.sleep(timeout_s)
            return ""
        return self._received(timeout_s / len(self._tails))

    def rest(self, whole: str) -> str:
        """What of the pods' logs ``next`` has not returned."""
        pods = self._log.pods()
        texts = []
        for pod in pods:
            text = self._log.of(pod)
            rest = self._tails[pod].rest(text) if pod in self._tails else text
            texts.append(marked(self._halves.pop(pod, "") + rest, prefix_of(pod, pods)))
        return "".join(texts)

    def _look(self) -> None:
        if self._over or time.monotonic() - self._looked_at < _LOOK_S:
            return
        self._looked_at = time.monotonic()
        try:
            pods = self._log.pods()
        except KfpytorchRayError as error:
            # For how long that is borne, whoever follows the run decides.
            logger.debug("The pods with a log are not known now: %s", error)
            return
        for pod in pods:
            if pod not in self._tails:
                self._tails[pod] = self._following.enter_context(self._log.tail(pod))

    def _received(self, timeout_s: float) -> str:
        texts = []
        for pod, tail in self._tails.items():
            lines, end, half = (self._halves.pop(pod, "") + tail.next(timeout_s)).rpartition("\n")
            if half:
                self._halves[pod] = half
            texts.append(marked(lines + end, prefix_of(pod, [*self._tails])))
        return "".join(texts)


def prefix_of(pod: str, pods: list[str]) -> str:
    """What stands before a pod's lines: its rank, where it is one.

    Args:
        pod: Its name.
        pods: Names of all: an elastic job has no master.
    """
    place = _PLACE.search(pod)
    if place is None or not any(other.endswith("-master-0") for other in pods):
        return ""
    return f"[rank {0 if place[1] == 'master' else int(place[2]) + 1}] "


def marked(text: str, prefix: str) -> str:
    """A text with a prefix before each of its lines."""
    return "".join(prefix + line for line in text.splitlines(keepends=True)) if prefix else text


def _order(pod: str) -> tuple[str, int, str]:
    place = _PLACE.search(pod)
    return (place[1], int(place[2]), pod) if place else ("", 0, pod)
