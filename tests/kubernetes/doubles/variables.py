"""The environment of a container as the kubelet makes it: values, references to fields, Secrets and ConfigMaps."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal

from doubles.api import Document
from doubles.scheduling import amounts

Read = Callable[[str, str], "Document | None"]
"""Gives an object of the Pod's namespace by resource and name."""

_REFERENCE = re.compile(r"\$(\$|\(([A-Za-z_.-][A-Za-z0-9_.-]*)\))")


class MissingReferenceError(Exception):
    """The container cannot be made as long as this is missing; the kubelet says CreateContainerConfigError."""


def environment(container: Document, pod: Document, address: str, read: Read) -> dict[str, str]:
    """The variables that a container names.

    Args:
        container: Its specification.
        pod: The Pod that it is in.
        address: The Pod's.
        read: Gives Secrets and ConfigMaps.

    Raises:
        MissingReferenceError: A Secret or ConfigMap, or a key of it, is not there and not optional.
    """
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        for kind in ("secret", "configMap"):
            if reference := source.get(f"{kind}Ref"):
                data = data_of(kind, reference, read)
                found.update({source.get("prefix", "") + name: value.decode() for name, value in data.items()})
    for variable in container.get("env", []):
        if reference := variable.get("valueFrom"):
            value = _referenced(reference, container, pod, address, read)
            if value is not None:
                found[variable["name"]] = value
        else:
            found[variable["name"]] = expanded(variable.get("value") or "", found)
    return found


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """``$(NAME)`` replaced where there is such a variable; ``$$`` is a dollar sign."""

    def replacement(match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        return variables.get(match[2], match[0])

    return _REFERENCE.sub(replacement, text)


def data_of(kind: str, reference: Document, read: Read) -> dict[str, bytes]:
    """What is in a Secret (kind ``secret``) or ConfigMap (``configMap``).

    Raises:
        MissingReferenceError: It is not there, and not optional.
    """
    found = read(f"{kind.lower()}s", reference["name"])
    if found is None:
        if reference.get("optional"):
            return {}
        msg = f'{kind.lower()} "{reference["name"]}" not found'
        raise MissingReferenceError(msg)
    data: dict[str, str] = found.get("data") or {}
    if kind == "secret":
        return {name: base64.b64decode(value) for name, value in data.items()}
    binary: dict[str, str] = found.get("binaryData") or {}
    more = {name: base64.b64decode(value) for name, value in binary.items()}
    return {**{name: value.encode() for name, value in data.items()}, **more}


def _referenced(reference: Document, container: Document, pod: Document, address: str, read: Read) -> str | None:
    for kind in ("secret", "configMap"):
        if key := reference.get(f"{kind}KeyRef"):
            value = data_of(kind, key, read).get(key["key"])
            if value is None and not key.get("optional"):
                msg = f"couldn't find key {key['key']} in {kind} {pod['metadata']['namespace']}/{key['name']}"
                raise MissingReferenceError(msg)
            return None if value is None else value.decode()
    if resource := reference.get("resourceFieldRef"):
        return _resource(resource, container, pod)
    path: str = reference["fieldRef"]["fieldPath"]
    meta = pod["metadata"]
    if (entry := re.fullmatch(r"metadata\.(labels|annotations)\['(.*)'\]", path)) is not None:
        return str(meta.get(entry[1], {}).get(entry[2], ""))
    fields = {
        "metadata.name": meta["name"],
        "metadata.namespace": meta["namespace"],
        "metadata.uid": meta["uid"],
        "spec.nodeName": pod["spec"].get("nodeName", ""),
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName", ""),
        "status.podIP": address,
        "status.podIPs": address,
        "status.hostIP": "127.0.0.1",
    }
    return str(fields[path])


def _resource(reference: Document, container: Document, pod: Document) -> str:
    # Without a limit it would be the node's capacity; 0 shows that nothing was said.
    wanted = reference.get("containerName", container["name"])
    spec = next(one for one in pod["spec"]["containers"] if one["name"] == wanted)
    kind, _, resource = reference["resource"].partition(".")
    amount = amounts(spec.get("resources", {}).get(kind)).get(resource, Decimal(0))
    divisor = amounts({"divisor": reference.get("divisor", "1")})["divisor"] or Decimal(1)
    return str(math.ceil(amount / divisor))
