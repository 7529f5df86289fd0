"""What a launch asks of Ray, as plain data: built by an adapter, staged for another machine, run by ``launching``.

Nothing here imports ray or torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from kfpytorch_ray.cluster.demand import Demand
from kfpytorch_ray.cluster.limits import Limits
from kfpytorch_ray.cluster.protocol import AgentSetup


@dataclass(frozen=True, slots=True)
class RayRequest:
    """What a launch asks of Ray.

    Attributes:
        setup: What every agent is given.
        demand: The nodes.
        limits: What bounds it.
        payload: The pickled call.
    """

    setup: AgentSetup
    demand: Demand
    limits: Limits
    payload: bytes
