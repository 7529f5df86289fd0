"""A namespace that is looked at again and again: what was asked for once is kept up to date by a watch.

As an informer does it: list, watch from there, list again where the server has forgotten where that was (410) or the
connection broke. As long as a watch is sound it answers, without a request; otherwise the API server is asked, so that
its refusals and a connection that is lost reach whoever asks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, final

from kfpytorch_ray.cluster.kube.client import WATCH_S, Manifest, Namespace
from kfpytorch_ray.cluster.kube.collection import Collection, Watch
from kfpytorch_ray.cluster.kube.kinds import Kind
from kfpytorch_ray.cluster.kube.refusals import ExpiredError
from kfpytorch_ray.errors import AuthenticationError, ClusterError

logger = logging.getLogger(__name__)

_PAUSES_S = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Before a watch that broke is begun again; the last one again and again."""
_SHORT_S = 1.0
"""A watch that ends sooner than this has nothing to say, or something on the way ends it."""


@final
class Watcher:
    """Tells what is in a namespace; while a ``with`` block runs, from watches. May be asked by several threads.

    Args:
        namespace: The namespace.
        watch_s: Seconds after which a watch is begun anew; a link that was cut goes unnoticed for as long.

    Attributes:
        active: Whether the block runs.
    """

    def __init__(self, namespace: Namespace, watch_s: float = WATCH_S) -> None:
        self._namespace = namespace
        self._watch_s = watch_s
        self._watches: dict[object, _Kept] = {}
        self._lock = threading.Lock()
        self.active = False

    def __enter__(self) -> Watcher:
        self.active = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self.active = False
            ended, self._watches = self._watches, {}
        for watch in ended.values():
            watch.stop()

    def get(self, kind: Kind, name: str) -> Manifest | None:
        """A resource; None if there is none of this name.

        Raises:
            ClusterError: The cluster refuses to tell, or cannot be reached.
        """
        kept = self._kept((kind, name), lambda: self._namespace.named(kind, name))
        return self._namespace.get(kind, name) if kept is None else kept.get(name)

    def pods(self, selector: str) -> list[Any]:
        """The pods that a label selector selects.

        Raises:
            ClusterError: The cluster refuses to tell, or cannot be reached.
        """
        kept = self._kept(selector, lambda: self._namespace.pods_of(selector))
        return self._namespace.pods(selector) if kept is None else list(kept.values())

    def _kept(self, key: object, collection: Callable[[], Collection]) -> dict[str, Any] | None:
        """What a watch has seen, which is begun where there is none; None where it does not know."""
        with self._lock:
            if not self.active:
                return None
            watch = self._watches.get(key)
            if watch is None or watch.forgotten:
                watch = self._watches[key] = _Kept(collection(), self._watch_s)
                watch.start()
        return watch.now()


@final
class _Kept(threading.Thread):
    """Keeps a collection up to date until it is stopped, or nobody has asked for it while a whole watch lasted.

    Args:
        collection: That is watched.
        watch_s: Seconds after which a watch is begun anew.

    Attributes:
        forgotten: It has ended because nobody asked any more.
    """

    def __init__(self, collection: Collection, watch_s: float) -> None:
        super().__init__(name="kfpytorch-ray-watch", daemon=True)
        self.forgotten = False
        self._collection = collection
        self._watch_s = watch_s
        # Replaced and never changed, so that whoever has it may read it.
        self._items: dict[str, Any] | None = None
        self._asked = True
        self._over = threading.Event()
        self._watch: Watch | None = None

    def now(self) -> dict[str, Any] | None:
        """The resources by name; None while it is not known how they are now."""
        self._asked = True
        return self._items

    def stop(self) -> None:
        """End soon. Is not waited for: a connection that says nothing may not be interruptible."""
        self._over.set()
        if (watch := self._watch) is not None:
            watch.stop()

    def run(self) -> None:
        """List and watch, again and again."""
        try:
            self._keep()
        finally:
            self._items = None

    def _keep(self) -> None:
        tries = 0
        while not self._over.is_set() and not self.forgotten:
            began = time.monotonic()
            try:
                self._items, version = self._collection.list()
                self._follow(version)
            except AuthenticationError as error:
                # First, for whoever has read the line counts on being answered by the server.
                self._items = None
                logger.info("No watch, so the API server is asked again and again: %s", error)
                return
            except ExpiredError:
                logger.debug("The watch of %s has expired", self._collection.what)
            except ClusterError as error:
                self._items = None
                logger.debug("The watch of %s broke: %s", self._collection.what, error)
            tries = 1 if time.monotonic() - began > _PAUSES_S[-1] else tries + 1
            self._over.wait(_PAUSES_S[min(tries, len(_PAUSES_S)) - 1])

    def _follow(self, version: str) -> None:
        """Watch from a version on; one watch after the other, as each ends."""
        while not self._over.is_set():
            self._asked = False
            began = time.monotonic()
            with self._collection.watch(version, self._watch_s) as self._watch:
                for change in self._watch:
                    version = change.version
                    if change.name:
                        self._note(change.name, change.item)
            if not self._asked:
                self.forgotten = True
                return
            if time.monotonic() - began < _SHORT_S:
                self._over.wait(_SHORT_S)

    def _note(self, name: str, item: Any) -> None:
        rest = {other: kept for other, kept in (self._items or {}).items() if other != name}
        self._items = rest if item is None else {**rest, name: item}
