"""The API server in plain dicts, through the official client: what the doubles read and write, as JSON says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, final

from kubernetes import client

Document = dict[str, Any]

NOT_FOUND = 404
CONFLICT = 409

_GROUPS = {
    "jobs": "/apis/batch/v1",
    "pytorchjobs": "/apis/kubeflow.org/v1",
    "rayclusters": "/apis/ray.io/v1",
    "rayjobs": "/apis/ray.io/v1",
    "rolebindings": "/apis/rbac.authorization.k8s.io/v1",
    "roles": "/apis/rbac.authorization.k8s.io/v1",
}
_TYPES = {"PATCH": "application/merge-patch+json"}
_TIMEOUT_S = 30.0


@final
class Api:
    """Objects by resource, namespace and name.

    Args:
        connection: To the API server.

    Raises:
        kubernetes.client.ApiException: By every method, as the server answers.
    """

    def __init__(self, connection: client.ApiClient) -> None:
        self._connection = connection

    def find(self, resource: str, namespace: str = "", labels: str = "") -> list[Document]:
        """All objects of a resource, of all namespaces unless one is named."""
        found: list[Document] = self._send("GET", _path(resource, namespace), query={"labelSelector": labels})["items"]
        return found

    def get(self, resource: str, namespace: str, name: str) -> Document | None:
        """An object, or None where there is none."""
        try:
            return self._send("GET", _path(resource, namespace, name))
        except client.ApiException as error:
            if error.status != NOT_FOUND:
                raise
            return None

    def create(self, resource: str, namespace: str, body: Document, below: str = "") -> Document:
        """Make an object; ``below`` is ``NAME/SUBRESOURCE`` for those that are made of another."""
        return self._send("POST", _path(resource, namespace, below), body)

    def replace(self, resource: str, namespace: str, name: str, body: Document) -> Document:
        """Write an object, or with ``NAME/status`` its status, as a whole."""
        return self._send("PUT", _path(resource, namespace, name), body)

    def patch(self, resource: str, namespace: str, name: str, body: Document) -> bool:
        """Lay a merge patch over an object; False where there is none any more."""
        return self._unless_gone("PATCH", _path(resource, namespace, name), body)

    def delete(self, resource: str, namespace: str, name: str, **options: Any) -> bool:
        """Delete an object; ``options`` are DeleteOptions'. False where there is none any more."""
        return self._unless_gone("DELETE", _path(resource, namespace, name), options)

    def event(self, about: Document, kind: str, reason: str, message: str, source: str, level: str = "Warning") -> None:
        """Tell something about an object, as ``kubectl describe`` shows it."""
        meta = about["metadata"]
        reference = {"kind": kind, "name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"]}
        body = {
            "metadata": {"generateName": f"{meta['name']}.", "namespace": meta["namespace"]},
            "involvedObject": reference,
            "type": level,
            "reason": reason,
            "message": message,
            "source": {"component": source},
            "firstTimestamp": now(),
            "lastTimestamp": now(),
            "count": 1,
        }
        try:
            self.create("events", meta["namespace"], body)
        except client.ApiException as error:
            # A namespace that is being deleted takes none.
            if error.status not in {403, NOT_FOUND}:
                raise

    def _unless_gone(self, method: str, path: str, body: Document) -> bool:
        try:
            self._send(method, path, body)
        except client.ApiException as error:
            # 409: another object of that name, where a uid was given.
            if error.status not in {NOT_FOUND, CONFLICT}:
                raise
            return False
        return True

    def _send(
        self, method: str, path: str, body: Document | None = None, query: Mapping[str, str] | None = None
    ) -> Document:
        request = self._connection.param_serialize(
            method,
            path,
            query_params=[(name, value) for name, value in (query or {}).items() if value],
            header_params={"Accept": "application/json", "Content-Type": _TYPES.get(method, "application/json")},
            body=body,
            auth_settings=["BearerToken"],
        )
        answer = self._connection.call_api(*request, _request_timeout=_TIMEOUT_S)
        answer.read()
        if not 200 <= answer.status < 300:
            raise client.ApiException(http_resp=answer, body=answer.data.decode(errors="replace"))
        read: Document = json.loads(answer.data)
        return read


def _path(resource: str, namespace: str, name: str = "") -> str:
    parts = [_GROUPS.get(resource, "/api/v1"), *(("namespaces", namespace) if namespace else ()), resource, name]
    return "/".join(part for part in parts if part)


def now() -> str:
    """This moment as objects write it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
