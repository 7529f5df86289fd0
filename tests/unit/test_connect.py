"""Which Ray an address names."""

from __future__ import annotations

import socket

import pytest
import ray

from kfpytorch_ray.cluster import connect
from kfpytorch_ray.errors import ConfigError


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> str:
    """The GCS of this machine, as Ray calls it once it is joined."""
    current = f"{ray.util.get_node_ip_address()}:6379"
    context = type("Context", (), {"gcs_address": current})
    monkeypatch.setattr(connect.ray, "get_runtime_context", lambda: context)
    return current


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "by name"])
def test_a_ray_that_was_joined_is_known_by_all_its_names(
    host: str, joined: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second launch has the same config as the first."""
    if host == "by name":
        monkeypatch.setattr(socket, "gethostbyname", lambda _: joined.partition(":")[0])
    connect._refuse_other_address(f"{host.replace(' ', '-')}:6379")
    connect._refuse_other_address(joined)


@pytest.mark.parametrize("address", ["localhost:6380", "203.0.113.7:6379", "local", "no-such-host.invalid:6379"])
def test_another_one_is_refused(address: str, joined: str) -> None:
    """The launch would run elsewhere than it says."""
    with pytest.raises(ConfigError, match="has joined the Ray"):
        connect._refuse_other_address(address)
