"""What torch says of itself, and whether it can be imported at all.

Here it is asked in a process of its own, run by its path: importing torch takes seconds, and one that does not fit its
machine may end the process. On a node a worker asks it directly. So this file imports nothing of this package.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class TorchReport:
    """What torch can do on a machine.

    Attributes:
        version: Of torch.
        gloo: Whether it was built with gloo.
        nccl: Whether it was built with NCCL.
        cuda: Version of CUDA that it was built for; None for a CPU build.
        devices: CUDA devices that it can use in this process.
    """

    version: str
    gloo: bool
    nccl: bool
    cuda: str | None
    devices: int


def torch_report() -> TorchReport:
    """Import torch and ask it.

    Raises:
        Exception: It cannot be imported.
    """
    import torch
    from torch import distributed

    there = distributed.is_available()
    return TorchReport(
        version=str(torch.__version__),
        gloo=there and distributed.is_gloo_available(),
        nccl=there and distributed.is_nccl_available(),
        cuda=torch.version.cuda,
        devices=torch.cuda.device_count(),
    )


if __name__ == "__main__":
    json.dump(asdict(torch_report()), sys.stdout)
