"""Which Kubernetes cluster: as ``kubectl`` finds it, or the one whose pod this process is in."""

from __future__ import annotations

import contextlib
from pathlib import Path

from kubernetes import client, config
from kubernetes.config.config_exception import ConfigException

from kfpytorch_ray.errors import ConfigError, explain

_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def connection(context: str | None, kubeconfig: str | None) -> tuple[client.ApiClient, str | None]:
    """A client, and the namespace that its configuration names.

    Args:
        context: Of the kubeconfig. None: its current one.
        kubeconfig: Its path. None: as ``kubectl`` finds it, else this process's pod.

    Raises:
        ConfigError: There is no such file or context, and this is no pod.
    """
    try:
        contexts, current = config.list_kube_config_contexts(config_file=kubeconfig)
        chosen = next((one for one in contexts if one["name"] == context), None) if context else current
        settings = _settings()
        config.load_kube_config(config_file=kubeconfig, context=context, client_configuration=settings)
    except (ConfigException, OSError, TypeError) as error:
        if context is None and kubeconfig is None:
            with contextlib.suppress(ConfigException):
                return _in_cluster()
        named = "".join(
            f", {name}={value!r}" for name, value in (("kubeconfig", kubeconfig), ("context", context)) if value
        )
        raise ConfigError(
            "Kubernetes",
            (
                explain(
                    f"no cluster is named that could be used{named}",
                    str(error),
                    "Name a kubeconfig and a context that `kubectl config get-contexts` lists: kubeconfig=..., "
                    "context=..., or KUBECONFIG.",
                ),
            ),
        ) from error
    return client.ApiClient(settings), ((chosen or {}).get("context") or {}).get("namespace")


def _settings() -> client.Configuration:
    settings = client.Configuration()
    # Whoever follows a run tries again; urllib3 would do so three times before, and say so on standard error.
    settings.retries = False
    return settings


def _in_cluster() -> tuple[client.ApiClient, str | None]:
    settings = _settings()
    config.load_incluster_config(client_configuration=settings)
    return client.ApiClient(settings), _OWN_NAMESPACE.read_text().strip()
