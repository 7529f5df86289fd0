"""A Flyte workflow that trains on handwritten digits, on Ray or as a Kubeflow PyTorchJob.

    python examples/digits.py                        two nodes on a Ray that is started here
    python examples/digits.py --backend kubeflow     two processes of torch elastic, as upstream's plugin runs them
    pyflyte run examples/digits.py wf --epochs 5     KFPYTORCH_RAY_BACKEND names the backend

The 1,797 images of 8 x 8 pixels come with scikit-learn, so nothing is downloaded. Every epoch ends with a checkpoint:
kill a worker in the middle, and the others go on with its successor from the last one.
"""

import argparse
import io
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from flytekit import Deck, FlyteContextManager, current_context, task, workflow
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from kfpytorch_ray import Elastic, progress, stop_requested

if __name__ == "__main__":
    # The decorator below is evaluated while this file is read, so the command line has to be read before it.
    parser = argparse.ArgumentParser(description="Train on handwritten digits.")
    parser.add_argument("--backend", choices=("ray", "kubeflow"), help="default: $KFPYTORCH_RAY_BACKEND, else ray")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.backend:
        os.environ["KFPYTORCH_RAY_BACKEND"] = arguments.backend

BACKEND = os.environ.setdefault("KFPYTORCH_RAY_BACKEND", "ray")
# Locally, kubeflow runs in this process, which can only be one node: the others would be pods of their own.
NNODES, NPROC_PER_NODE = (1, 2) if BACKEND == "kubeflow" else (2, 1)
BATCH_SIZE = 32


class Trained(NamedTuple):
    """What the workflow returns.

    Attributes:
        model: The state dict. A Module could be written, but not read back: see the README.
        accuracy: Share of the held-out images that are recognised.
    """

    model: dict[str, Tensor]
    accuracy: float


class DigitsCNN(nn.Sequential):
    """Two convolutions and a linear layer: 10 scores for an image of shape (1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )


def load(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Four fifths of the images for training and one fifth for the test; the same split on every rank."""
    # Here, because only workers need it: the driver starts a second sooner without.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=digits.target, random_state=seed)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def train_epoch(
    model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], optimizer: torch.optim.Optimizer, device: torch.device
) -> float:
    """One pass over this rank's shard; returns the mean loss over all ranks."""
    model.train()
    total = torch.zeros(2, device=device)
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += torch.tensor([loss.item(), 1.0], device=device)
    dist.all_reduce(total)
    return float(total[0] / total[1])


@torch.no_grad()
def evaluate(model: nn.Module, test: TensorDataset, device: torch.device) -> float:
    """Accuracy on the held-out images, of which each rank looks at its share."""
    model.eval()
    images, labels = (part[dist.get_rank() :: dist.get_world_size()].to(device) for part in test.tensors)
    hits = (model(images).argmax(dim=1) == labels).sum()
    counts = torch.stack([hits, torch.tensor(len(labels), device=device)])
    dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def loss_curve(losses: list[float], accuracy: float) -> str:
    """The losses as an inline SVG."""
    width, height, margin = 640, 320, 40
    top = max(losses)
    points = " ".join(
        f"{margin + (width - 2 * margin) * epoch / max(len(losses) - 1, 1):.1f},"
        f"{height - margin - (height - 2 * margin) * loss / top:.1f}"
        for epoch, loss in enumerate(losses)
    )
    return (
        f"<p>{len(losses)} epochs on {dist.get_world_size()} ranks; test accuracy {accuracy:.3f}</p>"
        f'<svg viewBox="0 0 {width} {height}" style="max-width: {width}px" font-family="sans-serif" font-size="12">'
        f'<path d="M{margin},{margin} V{height - margin} H{width - margin}" fill="none" stroke="gray"/>'
        f'<polyline points="{points}" fill="none" stroke="steelblue" stroke-width="2"/>'
        f'<text x="4" y="{margin}">{top:.2f}</text><text x="4" y="{height - margin}">0</text>'
        f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">epoch</text>'
        f'<text x="{width - margin}" y="{margin}" text-anchor="end">mean training loss; last {losses[-1]:.4f}</text>'
        "</svg>"
    )


def save_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    """Write down where the training is; rank 0 does, for all of them."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": len(losses), "losses": losses}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    current_context().checkpoint.write(buffer.getvalue())


def restore_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[int, list[float]]:
    """Go on where an earlier round, or an earlier attempt of the task, has stopped: its epochs, and their losses."""
    saved = current_context().checkpoint.read()
    if saved is None:
        return 0, []
    state = torch.load(io.BytesIO(saved), map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"], state["losses"]


def all_shall_stop(device: torch.device) -> bool:
    """Whether any rank is asked to leave: agreed on, or those that stay would wait for the others for ever."""
    asked = torch.tensor(int(stop_requested()), device=device)
    dist.all_reduce(asked)
    return bool(asked)


@task(
    task_config=Elastic(nnodes=NNODES, nproc_per_node=NPROC_PER_NODE, max_restarts=3, backend=BACKEND),
    environment={"KFPYTORCH_RAY_BACKEND": BACKEND},  # this file is read again in the container
    enable_deck=True,
    deck_fields=(),  # of flytekit's own decks none: they would come first, and listing what is installed takes seconds
)
def train(epochs: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """Train on every rank with DistributedDataParallel; rank 0's return value and deck become the task's."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
        torch.set_num_threads(1)  # with images this small, more threads only wait for each other
        torch.manual_seed(seed)
        training, test = load(seed)
        # The sampler pads the shards to one length, so every rank takes the same number of steps.
        sampler = DistributedSampler(training, seed=seed)
        loader = DataLoader(training, batch_size=BATCH_SIZE, sampler=sampler)
        model = DistributedDataParallel(DigitsCNN().to(device))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        first_epoch, losses = restore_checkpoint(model.module, optimizer, device)
        if first_epoch and dist.get_rank() == 0:
            print(f"resumed from epoch {first_epoch}")
        for epoch in range(first_epoch, epochs):
            sampler.set_epoch(epoch)
            losses.append(train_epoch(model, loader, optimizer, device))
            if dist.get_rank() == 0:
                save_checkpoint(model.module, optimizer, losses)
            progress(epoch + 1, total=epochs, loss=losses[-1])
            if all_shall_stop(device):
                return {}, 0.0  # not used: another round goes on from the checkpoint
        accuracy = evaluate(model.module, test, device)
        if dist.get_rank() == 0:
            Deck("Loss curve", loss_curve(losses, accuracy))
        return {name: value.cpu() for name, value in model.module.state_dict().items()}, accuracy
    finally:
        dist.destroy_process_group()


@workflow
def wf(epochs: int = 20, seed: int = 0) -> Trained:
    """Train once.

    Args:
        epochs: Passes over the training images.
        seed: Of the weights, the split and the order of the images.
    """
    model, accuracy = train(epochs=epochs, seed=seed)
    return Trained(model, accuracy)


def main(epochs: int) -> None:
    """Run the workflow here, and say how well it went and where the deck is."""
    trained = wf(epochs=epochs)
    parameters = sum(value.numel() for value in trained.model.values())
    print(f"backend: {BACKEND}, {NNODES} x {NPROC_PER_NODE} workers, {parameters} parameters")
    print(f"accuracy: {trained.accuracy:.3f}")
    decks = Path(FlyteContextManager.current_context().file_access.local_sandbox_dir).rglob("deck.html")
    for deck in sorted(decks, key=lambda path: path.stat().st_mtime)[-1:]:
        print(f"deck: {deck}")


if __name__ == "__main__":
    main(arguments.epochs)
