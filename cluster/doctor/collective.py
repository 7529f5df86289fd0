"""One all_reduce of all ranks, small and large, as a training step does it. Runs in workers."""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta

import torch
from torch import distributed

from kfpytorch_ray.cluster.doctor.report import LARGE_BYTES, Collective

TIMEOUT_S = 30.0
_TIMES = 3


def all_reduce(backend: str, timeout_s: float = TIMEOUT_S) -> Collective:
    """Do it, with all other ranks; what fails is told and not raised.

    Args:
        backend: ``"gloo"`` or ``"nccl"``.
        timeout_s: Longest wait for the others, at each step.
    """
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        try:
            small = _seconds(torch.ones(1, device=device))
            large = _seconds(torch.ones(LARGE_BYTES // 4, device=device))
        finally:
            # A group that has failed may not be destroyed in peace; this process ends soon.
            with contextlib.suppress(RuntimeError):
                distributed.destroy_process_group()
    except Exception as error:  # noqa: BLE001 - torch's own and the backends' errors have no common class
        return Collective(backend, " ".join(str(error).split())[:500] or type(error).__name__)
    return Collective(backend, "", small, large)


def _seconds(tensor: torch.Tensor) -> float:
    """The fastest of a few: what the link can do, and not what the machine was busy with."""
    taken = []
    for _ in range(1 + _TIMES):
        tensor.fill_(1)
        began = time.perf_counter()
        distributed.all_reduce(tensor)
        total = float(tensor[0])
        taken.append(time.perf_counter() - began)
        if total != distributed.get_world_size():
            msg = f"the sum of {distributed.get_world_size()} ones came out as {total:g}"
            raise RuntimeError(msg)
    # The first opens the connections.
    return min(taken[1:])
