"""What of a namespace can be listed and watched: a resource of some name, or the pods that a label selector selects.

One list and one watch, by the official client, whose errors become ours; watching.py makes them a picture that stays up
to date.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import urllib3
from kubernetes import watch
from kubernetes.client.exceptions import ApiException

from kfpytorch_ray.errors import ClusterError

TIMEOUT_S = (10.0, 30.0)
"""To connect, and for an answer."""

_LATE_S = 5.0
"""For which a watch may say nothing after the time at which the server was to end it."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a watch tells.

    Attributes:
        version: Of the collection after it; the next watch goes on from there.
        name: Of the resource; empty where only the version is new.
        item: As it is now; None when it is gone.
    """

    version: str
    name: str = ""
    item: Any = None


@final
class Collection:
    """Resources, custom ones as dicts and others as the official client has them.

    Args:
        what: They are, for messages.
        request: Lists them: a method of the official client with all arguments but those of a list and a watch.
        failed: Makes an error of ours of the client's and of what was asked.
        model: The official client's class of one; None: dicts.
    """

    def __init__(
        self,
        what: str,
        request: Callable[..., Any],
        failed: Callable[[Exception, str], ClusterError],
        model: type[Any] | None = None,
    ) -> None:
        self.what = what
        self._request = request
        self._failed = failed
        self._model = model

    def list(self) -> tuple[dict[str, Any], str]:
        """They by name, and the version of this answer.

        Raises:
            ClusterError: The cluster refuses to tell, or cannot be reached.
        """
        with self._told("list"):
            found = self._request(_request_timeout=TIMEOUT_S)
        items = found["items"] if isinstance(found, dict) else found.items
        return {_name(item): item for item in items}, _version(found)

    @contextlib.contextmanager
    def watch(self, version: str, timeout_s: float) -> Iterator[Watch]:
        """What has changed since a version, for as long as the block runs or until the server ends it."""
        seconds = max(1, int(timeout_s))
        official = watch.Watch(self._model)
        stream = official.stream(
            self._request,
            resource_version=version,
            timeout_seconds=seconds,
            allow_watch_bookmarks=True,
            _request_timeout=(TIMEOUT_S[0], seconds + _LATE_S),
        )
        with contextlib.closing(stream):
            yield Watch(official, self._changes(stream))

    def _changes(self, stream: Iterator[Any]) -> Iterator[Change]:
        with self._told("watch"):
            for event in stream:
                # The client makes None of a line that is no JSON.
                if event is not None:
                    yield _change(event)

    @contextlib.contextmanager
    def _told(self, verb: str) -> Iterator[None]:
        try:
            yield
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            raise self._failed(error, f"{verb} {self.what}") from error


@final
class Watch:
    """One watch.

    Args:
        official: That is asked to stop.
        changes: It gives.
    """

    def __init__(self, official: watch.Watch, changes: Iterator[Change]) -> None:
        self._official = official
        self._changes = changes

    def __iter__(self) -> Iterator[Change]:
        """The changes, as they come.

        Raises:
            ExpiredError: The server does not remember the version any more (410).
            ClusterError: It refuses, or the connection broke.
        """
        return self._changes

    def stop(self) -> None:
        """From another thread: end it. Clients before 36 do so with the next change only."""
        self._official.stop()


def _change(event: dict[str, Any]) -> Change:
    item, version = event["object"], _version(event["object"])
    if event["type"] == "BOOKMARK":
        return Change(version)
    return Change(version, _name(item), None if event["type"] == "DELETED" else item)


def _name(item: Any) -> str:
    return str(item["metadata"]["name"] if isinstance(item, dict) else item.metadata.name)


def _version(item: Any) -> str:
    return str(item["metadata"]["resourceVersion"] if isinstance(item, dict) else item.metadata.resource_version)
