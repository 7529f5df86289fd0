"""A plain script, without Flyte: two nodes with two workers each, and what every rank returned.

On a Ray that is started here, and inside a Ray cluster::

    python examples/train_script.py
    ray job submit --working-dir examples -- python train_script.py

rayjob.yaml has KubeRay make that cluster and run it there.
"""

import os
import socket

import torch
import torch.distributed as dist

from kfpytorch_ray import Elastic, launch

ELASTIC = Elastic(nnodes=2, nproc_per_node=2, backend="ray")


def add_ranks(offset: int) -> dict[str, int | str]:
    """Add up ``rank + offset`` over all ranks; every rank returns the sum and says where it ran."""
    dist.init_process_group("gloo")
    try:
        value = torch.tensor(dist.get_rank() + offset)
        dist.all_reduce(value)
        return {"sum": int(value), "host": socket.gethostname(), "local_rank": int(os.environ["LOCAL_RANK"])}
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Launch, and print the value of every rank."""
    result = launch(add_ranks, offset=10, elastic=ELASTIC)
    for rank in sorted(result):
        print(f"rank {rank}: {result[rank].return_value}")


if __name__ == "__main__":
    main()
