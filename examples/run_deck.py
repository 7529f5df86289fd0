"""The run deck of two launches on a Ray that is started here: one that recovers from a failure, and one that does not.

    python examples/run_deck.py        writes recovered.html and failed.html into the current folder

Four ranks on two nodes learn the handwritten digits of scikit-learn. In the first launch a rank meets a bad label once,
and training goes on from the last checkpoint; in the second it does so again and again, until max_restarts is spent.
"""

import io
import os

import torch
import torch.distributed as dist
from flytekit import current_context
from sklearn.datasets import load_digits
from torch import nn

from kfpytorch_ray import Elastic, RayBackend, WorkerFailedError, launch, progress

EPOCHS = 60
BAD_RANK, BAD_EPOCH = 3, 25


def read_labels(epoch: int, broken: bool) -> torch.Tensor:
    """The labels of an epoch, as rank 3 reads them from its damaged shard."""
    labels = torch.from_numpy(load_digits().target).long()
    if broken and dist.get_rank() == BAD_RANK and epoch == BAD_EPOCH:
        raise ValueError(f"shard-{BAD_RANK}.bin: labels go up to 201, and the model has 10 classes")
    return labels


def train(stays_broken: bool) -> float:
    """Train with data parallelism by hand; every epoch ends with a checkpoint. Returns the accuracy."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    checkpoint = current_context().checkpoint
    images = torch.from_numpy(load_digits().images).float().div(16).flatten(1)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    first = 0
    if (saved := checkpoint.read()) is not None:
        first, state = torch.load(io.BytesIO(saved))
        model.load_state_dict(state)
    restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    for epoch in range(first, EPOCHS):
        labels = read_labels(epoch, broken=stays_broken or not restarted)
        loss = nn.functional.cross_entropy(model(images[rank::world]), labels[rank::world])
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        optimizer.step()
        progress(epoch, total=EPOCHS, loss=loss.item())
        if rank == 0:
            print(f"epoch {epoch}: loss {loss:.3f}", flush=True)
            buffer = io.BytesIO()
            torch.save((epoch + 1, model.state_dict()), buffer)
            checkpoint.write(buffer.getvalue())
    return float((model(images).argmax(1) == torch.from_numpy(load_digits().target)).float().mean())


def main() -> None:
    """Launch twice, and write what happened."""
    config = Elastic(nnodes=2, nproc_per_node=2, max_restarts=2, backend=RayBackend(address="local"))
    result = launch(train, stays_broken=False, elastic=config)
    print(result.save_html("recovered.html"))
    try:
        launch(train, stays_broken=True, elastic=config)
    except WorkerFailedError as error:
        print(error.save_html("failed.html"))


if __name__ == "__main__":
    main()
