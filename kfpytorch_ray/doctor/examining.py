"""What a backend does for the doctor, if it can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from kfpytorch_ray.backends import Adapter
from kfpytorch_ray.doctor.finding import Finding


@runtime_checkable
class ExaminingAdapter(Adapter, Protocol):
    """An adapter that can look at what it would launch on. Its findings come one after another, as they are made."""

    def examine(self, wait_s: float) -> Iterator[Finding]:
        """Look at the cluster that the adapter's options name.

        Args:
            wait_s: How long to wait for a node that is free.

        Raises:
            BackendUnavailableError: A package is missing.
        """
        ...

    def examine_here(self, wait_s: float) -> Iterator[Finding]:
        """Launch on this machine alone.

        Args:
            wait_s: How long the start may take.

        Raises:
            BackendUnavailableError: A package is missing.
        """
        ...
