"""What the pods of a PyTorchJob are to do, as plain data: built by the adapter, staged, read in each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kfpytorch_ray.plan import LaunchPlan


@dataclass(frozen=True, slots=True)
class PodRequest:
    """What every pod does.

    Attributes:
        plan: Of the launch. Its function unpickles the call and returns it, so that only workers do.
        environment: Variables laid over the pod's.
        sys_path: Where modules are found; relative ones are in the folder that was sent.
    """

    plan: LaunchPlan
    environment: Mapping[str, str]
    sys_path: tuple[str, ...]
