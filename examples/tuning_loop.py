"""A hyper-parameter loop in which only the first launch waits: the agents are kept warm for the next.

    python examples/tuning_loop.py

Each trial is a launch of its own, on two nodes with a worker each. keep_warm_s leaves the nodes reserved between them,
and what torch, flytekit and preload name stays loaded, so that a trial's ranks run after a tenth of a second. Nothing
else stays: every trial has new processes. The nodes are given back after a minute without a trial, or as soon as
somebody else waits for them.
"""

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfpytorch_ray import Elastic, RayBackend, launch, progress

LEARNING_RATES = (0.001, 0.01, 0.1)
STEPS = 40


def train(learning_rate: float) -> float:
    """Train on scikit-learn's handwritten digits. Returns the accuracy on images that nobody trained on."""
    from sklearn.datasets import load_digits

    dist.init_process_group("gloo")
    digits = load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(digits.target))
    images, labels = torch.tensor(digits.data).float().div(16)[order], torch.tensor(digits.target)[order]
    mine = slice(dist.get_rank(), 1500, dist.get_world_size())
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for step in range(STEPS):
        loss = nn.functional.cross_entropy(model(images[mine]), labels[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1, total=STEPS, loss=loss.item())
    return float((model.module(images[1500:]).argmax(1) == labels[1500:]).float().mean())


def main() -> None:
    """Try each learning rate, and say which is best."""
    # torch's optimizers load the second one in their first step, which takes a second in every process.
    backend = RayBackend(keep_warm_s=60, preload=("sklearn.datasets", "torch._dynamo"))
    elastic = Elastic(nnodes=2, nproc_per_node=1, backend=backend)
    accuracies = {}
    for learning_rate in LEARNING_RATES:
        began = time.monotonic()
        result = launch(train, learning_rate, elastic=elastic)
        accuracies[learning_rate] = result[0].return_value
        print(f"learning rate {learning_rate}: {accuracies[learning_rate]:.3f} after {time.monotonic() - began:.1f} s")
    best = max(accuracies, key=accuracies.__getitem__)
    print(f"best: {best}")
    print(f"accuracy: {accuracies[best]:.3f}")


if __name__ == "__main__":
    main()
