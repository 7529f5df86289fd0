"""A training that survives the death of a rank: one or two nodes, and a checkpoint after every epoch.

    python examples/elastic_digits.py

Two nodes with a worker each learn scikit-learn's handwritten digits on a Ray that is started here. In the middle of it
rank 1 is killed by SIGKILL, as the kernel does to a process when memory runs out. All ranks start again at once, read
the last checkpoint, and go on with the epoch that was interrupted. On a cluster, where nodes come and go, nnodes="1:2"
also means: go on with one node when the other is lost, and take it in again when it is back.
"""

import io
import os
import signal
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from flytekit import current_context
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfpytorch_ray import Elastic, launch, progress

EPOCHS, DEADLY_EPOCH = 40, 15


def load() -> tuple[Tensor, Tensor]:
    """1,797 images of 64 pixels and what they show, shuffled alike on every rank."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(digits.data).float().div(16)[order], torch.tensor(digits.target)[order]


def train(epochs: int) -> float:
    """Train on every rank with DistributedDataParallel. Returns the accuracy on images that nobody trained on."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    checkpoint = current_context().checkpoint  # the same place in every round
    images, labels = load()
    mine = slice(rank, 1500, world)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    first_epoch = 0
    if (saved := checkpoint.read()) is not None:  # None in the first round
        state = torch.load(io.BytesIO(saved), weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epoch"]
        if rank == 0:
            print(f"resumed from epoch {first_epoch} on {world} ranks")
    for epoch in range(first_epoch, epochs):
        loss = nn.functional.cross_entropy(model(images[mine]), labels[mine])
        optimizer.zero_grad()
        if epoch == DEADLY_EPOCH and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()
        optimizer.step()
        if rank == 0:
            buffer = io.BytesIO()
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            torch.save(state, buffer)
            checkpoint.write(buffer.getvalue())
        progress(epoch + 1, total=epochs, loss=loss.item())
    return float((model.module(images[1500:]).argmax(1) == labels[1500:]).float().mean())


def main() -> None:
    """Launch, and say what happened in each round."""
    elastic = Elastic(nnodes="1:2", nproc_per_node=1, max_restarts=1, backend="ray")
    result = launch(train, EPOCHS, elastic=elastic)
    for number, record in enumerate(result.rounds):
        ends = ", ".join(f"rank {rank.rank} {rank.outcome.value}" for rank in record.ranks)
        print(f"round {number}: {ends}")
    print(f"accuracy: {result[0].return_value:.3f}")
    print(f"deck: {result.save_html(Path(tempfile.gettempdir(), 'elastic_digits.html'))}")


if __name__ == "__main__":
    main()
