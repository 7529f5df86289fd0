"""Which pod's failure is told, where several of one attempt fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flytekit
import pytest
from flyteidl.core.errors_pb2 import ContainerError, ErrorDocument
from google.protobuf.timestamp_pb2 import Timestamp

from kfpytorch_ray.error_file import told_earlier

FAILED_AT = 1_700_000_000.25


@pytest.fixture
def told(tmp_path: Path) -> Callable[[float], None]:
    """Has another pod tell of a failure at some time."""

    def tell(failed_at: float) -> None:
        timestamp = Timestamp(seconds=int(failed_at), nanos=int(failed_at % 1 * 1e9))
        (tmp_path / "error.pb").write_bytes(
            ErrorDocument(error=ContainerError(timestamp=timestamp)).SerializeToString()
        )

    return tell


def context(prefix: str | None) -> Any:
    builder = flytekit.current_context().builder()
    builder.output_metadata_prefix = prefix
    return builder.build()


@pytest.mark.parametrize(("before_s", "expected"), [(0.1, True), (3600, True), (0, False), (-0.1, False)])
def test_only_an_earlier_failure_stays(
    tmp_path: Path, told: Callable[[float], None], before_s: float, expected: bool
) -> None:
    """Fractions of a second count; a later one is a consequence, and is written over."""
    told(FAILED_AT - before_s)
    assert told_earlier(context(tmp_path.as_uri()), FAILED_AT) is expected


def test_the_first_to_fail_is_told(tmp_path: Path) -> None:
    """Nothing is there; nor outside Flyte, where there is no place for it."""
    assert not told_earlier(context(tmp_path.as_uri()), FAILED_AT)
    assert not told_earlier(context(None), FAILED_AT)


def test_what_cannot_be_read_hides_no_failure(tmp_path: Path) -> None:
    """Half a file, or a storage that is not there."""
    (tmp_path / "error.pb").write_bytes(b"\xff\xff")
    assert not told_earlier(context(tmp_path.as_uri()), FAILED_AT)
    assert not told_earlier(context("no-such-storage://bucket"), FAILED_AT)


def test_with_flytes_aggregation_every_pod_tells(
    tmp_path: Path, told: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each into a file of its own, from which Flyte takes the earliest."""
    monkeypatch.setenv("_F_DES", "EARLIEST")
    told(FAILED_AT - 1)
    assert not told_earlier(context(tmp_path.as_uri()), FAILED_AT)
