"""A namespace of a Kubernetes cluster, by the official client: what we create, look at, watch and delete there.

The client's errors become ours. Tokens stay with the client; no message repeats a header or a request's body.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import urllib3
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from kfpytorch_ray.cluster.kube.collection import TIMEOUT_S, Collection
from kfpytorch_ray.cluster.kube.connection import connection
from kfpytorch_ray.cluster.kube.kinds import Kind
from kfpytorch_ray.cluster.kube.refusals import ExpiredError, GoneError, not_installed, refusal, unreachable
from kfpytorch_ray.errors import AuthenticationError, ClusterError, ClusterUnreachableError

logger = logging.getLogger(__name__)

Manifest = dict[str, Any]

WATCH_S = 30.0
"""How long one watch lasts; the next goes on where it ended. So long a link that was cut may go unnoticed."""

_ASK_S = 1.0

_SILENCE_S = 300.0
"""After which a log that is followed is asked for anew: a link that was cut says nothing."""

T = TypeVar("T")


class Namespace:
    """One namespace of a cluster.

    Args:
        name: Of the namespace. None: the context's, else ``"default"``.
        context: Of the kubeconfig. None: its current one.
        kubeconfig: Its path. None: as ``kubectl`` finds it, else the service account of this process's pod.

    Raises:
        ConfigError: There is no such file or context, and this is no pod.
    """

    def __init__(self, name: str | None = None, context: str | None = None, kubeconfig: str | None = None) -> None:
        self._api, at_home = connection(context, kubeconfig)
        self.name = name or at_home or "default"
        # What its methods return depends on their arguments, which its annotations do not know.
        self._custom: Any = client.CustomObjectsApi(self._api)
        self._core: Any = client.CoreV1Api(self._api)
        self._definitions: Any = client.ApiextensionsV1Api(self._api)

    @property
    def server(self) -> str:
        """The API server's URL."""
        return str(self._api.configuration.host)

    def definition(self, kind: Kind) -> Manifest | None:
        """The schema of a kind as this cluster has it; None where this user may not look at definitions.

        Raises:
            ClusterError: It is not installed, or the cluster cannot be asked.
        """
        try:
            found = self._definitions.read_custom_resource_definition(
                kind.crd, _request_timeout=TIMEOUT_S, _preload_content=False
            )
            served: Manifest = json.loads(found.data)
        except ApiException as error:
            if error.status == 404:
                raise not_installed(kind, self.server) from error
            if error.status in (401, 403):
                return None
            raise self._told(error, f"read the definition {kind.crd}") from error
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(error) from error
        version = next((one for one in served["spec"]["versions"] if one["name"] == "v1"), None)
        if version is None:
            # Of KubeRay before 1.0.
            raise not_installed(kind, self.server)
        schema: Manifest = version["schema"]["openAPIV3Schema"]
        return schema

    def create(self, kind: Kind, manifest: Manifest) -> Manifest:
        """Create a resource, strictly: a field that the cluster does not know is refused.

        Raises:
            ClusterError: The cluster refuses it, or cannot be reached.
        """
        created: Manifest = self._ask(
            f"create a {kind.name}",
            lambda: self._custom.create_namespaced_custom_object(
                kind.group,
                "v1",
                self.name,
                kind.plural,
                manifest,
                field_validation="Strict",
                _request_timeout=TIMEOUT_S,
            ),
            kind,
        )
        return created

    def get(self, kind: Kind, name: str) -> Manifest | None:
        """A resource; None if there is none of this name.

        Raises:
            ClusterError: The cluster refuses to tell, or cannot be reached.
        """
        try:
            found: Manifest = self._custom.get_namespaced_custom_object(
                kind.group, "v1", self.name, kind.plural, name, _request_timeout=TIMEOUT_S
            )
        except ApiException as error:
            if error.status == 404:
                return None
            raise self._told(error, f"read the {kind.name} {name}", kind) from error
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(error) from error
        return found

    def delete(self, kind: Kind, name: str, *, foreground: bool = False) -> None:
        """Delete a resource and what belongs to it; may be gone already.

        Args:
            kind: Of it.
            name: Of it.
            foreground: Whether it stays until what belongs to it is gone.

        Raises:
            ClusterError: The cluster refuses, or cannot be reached.
        """
        with contextlib.suppress(GoneError):
            self._ask(
                f"delete the {kind.name} {name}",
                lambda: self._custom.delete_namespaced_custom_object(
                    kind.group,
                    "v1",
                    self.name,
                    kind.plural,
                    name,
                    propagation_policy="Foreground" if foreground else "Background",
                    _request_timeout=TIMEOUT_S,
                ),
                kind,
            )

    def changes(self, kind: Kind, name: str, *, timeout_s: float) -> Iterator[Manifest | None]:
        """A resource as it is, then whenever it changes, for as long; None when it is gone.

        A watch that breaks, or that the server has forgotten (410), begins again with a look.

        Raises:
            ClusterError: The cluster refuses, or cannot be reached.
        """
        named = self.named(kind, name)
        deadline = _Deadline(timeout_s)
        while deadline.left() > 0:
            found = self.get(kind, name)
            yield found
            if found is None:
                return
            try:
                with named.watch(found["metadata"]["resourceVersion"], min(WATCH_S, deadline.left())) as watch:
                    for change in watch:
                        if change.name:
                            yield change.item
                            if change.item is None:
                                return
            except (ExpiredError, ClusterUnreachableError) as error:
                logger.debug("A watch broke: %s", error)
            except AuthenticationError as error:
                logger.debug("It may not be watched, so it is asked for again and again: %s", error)
                time.sleep(_ASK_S)

    def named(self, kind: Kind, name: str) -> Collection:
        """What can be listed and watched: the resource of this name, or none."""
        request = functools.partial(
            self._custom.list_namespaced_custom_object,
            kind.group,
            "v1",
            self.name,
            kind.plural,
            field_selector=f"metadata.name={name}",
        )
        return Collection(f"the {kind.name} {name}", request, functools.partial(self._failed, kind=kind))

    def pods_of(self, selector: str) -> Collection:
        """What can be listed and watched: the pods that a label selector selects."""
        request = functools.partial(self._core.list_namespaced_pod, self.name, label_selector=selector)
        return Collection(f"the pods {selector}", request, self._failed, client.V1Pod)

    def pods(self, selector: str) -> list[Any]:
        """The pods that a label selector selects.

        Raises:
            ClusterError: The cluster refuses to tell, or cannot be reached.
        """
        found, _ = self.pods_of(selector).list()
        return list(found.values())

    def warnings_of(self, names: set[str]) -> list[str]:
        """What events warn of that are about resources of these names, oldest first; empty where that may not be read.

        Raises:
            ClusterUnreachableError: The cluster cannot be reached.
        """
        try:
            events = self._ask(
                "list events",
                lambda: self._core.list_namespaced_event(
                    self.name, field_selector="type=Warning", _request_timeout=TIMEOUT_S
                ),
            ).items
        except AuthenticationError:
            return []
        mine = [event for event in events if event.involved_object.name in names]
        mine.sort(key=lambda event: str(event.last_timestamp or event.event_time or event.metadata.creation_timestamp))
        return [f"{event.reason}: {event.message}" for event in mine]

    def log(self, pod: str, container: str) -> str:
        """What a container has printed; empty where there is nothing to read.

        Raises:
            ClusterError: The cluster refuses to tell, or cannot be reached.
        """
        with self.log_stream(pod, container, follow=False) as stream:
            return b"".join(stream).decode(errors="replace")

    @contextlib.contextmanager
    def log_stream(self, pod: str, container: str, *, follow: bool = True) -> Iterator[Iterator[bytes]]:
        """What a container prints, from its beginning, in pieces; nothing where it has not begun.

        Raises:
            ClusterError: The cluster refuses to tell, or cannot be reached.
        """
        try:
            answer = self._core.read_namespaced_pod_log(
                pod,
                self.name,
                container=container,
                follow=follow,
                _preload_content=False,
                _request_timeout=(TIMEOUT_S[0], _SILENCE_S if follow else TIMEOUT_S[1]),
            )
        except ApiException as error:
            if error.status in (400, 404):
                # Its container has not begun, or it is gone.
                yield iter(())
                return
            raise self._told(error, f"read the log of the pod {pod}") from error
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(error) from error
        with contextlib.closing(answer):
            try:
                yield answer.stream(amt=None)
            except urllib3.exceptions.HTTPError as error:
                raise self._unreachable(error) from error

    def _ask(self, what: str, request: Callable[[], T], kind: Kind | None = None) -> T:
        try:
            return request()
        except (ApiException, urllib3.exceptions.HTTPError) as error:
            raise self._failed(error, what, kind) from error

    def _failed(self, error: Exception, what: str, kind: Kind | None = None) -> ClusterError:
        return self._told(error, what, kind) if isinstance(error, ApiException) else self._unreachable(error)

    def _told(self, error: ApiException, what: str, kind: Kind | None = None) -> ClusterError:
        return refusal(error, what, self.server, self.name, kind)

    def _unreachable(self, error: Exception) -> ClusterUnreachableError:
        return unreachable(error, self.server)


class _Deadline:
    def __init__(self, timeout_s: float) -> None:
        self._end = time.monotonic() + timeout_s

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()
