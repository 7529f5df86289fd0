"""What a Kubernetes API server's refusals mean, and what to do: errors of the official client become ours."""

from __future__ import annotations

import json

from kubernetes.client.exceptions import ApiException

from kfpytorch_ray.cluster.kube.kinds import Kind
from kfpytorch_ray.errors import AuthenticationError, ClusterError, ClusterUnreachableError, explain

_WEBHOOK = "admission webhook"
"""In what the API server says where one denied a request, often with the status of missing rights."""


class GoneError(ClusterError):
    """What was to be changed is not there."""


class ExpiredError(ClusterError):
    """The server does not remember the version any more from which a watch was to go on."""


def refusal(error: ApiException, what: str, server: str, namespace: str, kind: Kind | None = None) -> ClusterError:
    """What the API server's refusal means.

    Args:
        error: The refusal.
        what: That was asked, as in "could not ...".
        server: Its URL.
        namespace: In which it was asked.
        kind: That it was about.
    """
    said = _message(error)
    where = f"The Kubernetes cluster at {server}"
    match error.status:
        case 401:
            return AuthenticationError(
                explain(
                    f"{where} does not know who asks (401).",
                    "The kubeconfig's credentials are missing or have expired.",
                    "Log in again, or name another context: context=...; try `kubectl auth whoami`.",
                )
            )
        case 403:
            return _forbidden(said, f"{where} refuses to {what} in the namespace {namespace!r} (403).", kind)
        case 404 if "namespaces" in said:
            return ClusterError(
                explain(
                    f"{where} has no namespace {namespace!r}.",
                    said,
                    f"Create it (kubectl create namespace {namespace}), or name another one: namespace=...",
                )
            )
        case 404 if kind is not None and not _is_about_one(error):
            return not_installed(kind, server)
        case 404:
            return GoneError(explain(f"{where} could not {what}.", said, "It is gone already."))
        case 409:
            return ClusterError(
                explain(f"{where} could not {what}.", said, "A resource of this name is there: launch again.")
            )
        case 410:
            return ExpiredError(explain(f"{where} could not {what}.", said, "List again, and watch from there."))
        case 400 | 422:
            return ClusterError(
                explain(
                    f"{where} refuses to {what}: the manifest is not valid there ({error.status}).",
                    said,
                    "Look at the field that is named: it comes from the backend's options (spec=..., pod "
                    "templates), or this cluster's operator is too old for it.",
                )
            )
        case 429 | 500 | 502 | 503 | 504:
            return ClusterUnreachableError(
                explain(f"{where} could not {what} now ({error.status}).", said, "Try again in a moment.")
            )
        case _:
            return ClusterError(explain(f"{where} could not {what} ({error.status}).", said, "See its message."))


def not_installed(kind: Kind, server: str) -> ClusterError:
    """The cluster does not know a kind."""
    return ClusterError(
        explain(
            f"The Kubernetes cluster at {server} knows no {kind.name}.",
            f"{kind.operator} is not installed there: its definition {kind.crd} is missing.",
            f"Install {kind.operator}, or name the cluster that has it: context=..., kubeconfig=...",
        )
    )


def unreachable(error: Exception, server: str) -> ClusterUnreachableError:
    """The connection failed."""
    cause = getattr(error, "reason", None) or error
    return ClusterUnreachableError(
        explain(
            f"The Kubernetes cluster at {server} cannot be reached.",
            str(cause),
            "Check the context (kubectl config current-context), the VPN or tunnel to it, and that it runs.",
        )
    )


def _forbidden(said: str, what: str, kind: Kind | None) -> ClusterError:
    if _WEBHOOK in said:
        fix = (
            "Look at what the webhook names: it comes from the backend's options (spec=..., labels, pod templates), or "
            "from a rule of this cluster."
        )
        return ClusterError(explain(what, said, fix))
    named = kind.crd if kind else "what the backend creates (rayjobs.ray.io, pytorchjobs.kubeflow.org)"
    fix = (
        f"Ask for a Role with get, list, watch, create and delete on {named}, list and watch on pods, get on "
        "pods/log and list on events; a quota that is used up is refused like this, too."
    )
    return AuthenticationError(explain(what, said, fix))


def _is_about_one(error: ApiException) -> bool:
    """Whether the API server knows the kind, and says that there is none of a name."""
    try:
        return bool(json.loads(error.body or "")["details"]["name"])
    except (ValueError, KeyError, TypeError):
        return False


def _message(error: ApiException) -> str:
    """What the API server says of a refusal, without headers."""
    try:
        said = json.loads(error.body or "")["message"]
    except (ValueError, KeyError, TypeError):
        said = error.reason
    return str(said or "It says nothing about it.")
