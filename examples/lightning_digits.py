"""A Lightning Trainer on Ray: nothing of Lightning's own launchers, because the ranks are there already.

    pip install 'kfpytorch_ray[big-examples]'
    python examples/lightning_digits.py

A worker has the environment that torchrun would give it. Lightning sees that, takes its rank from there, and wraps the
model into DistributedDataParallel over gloo. All it has to be told is how many nodes and processes there are.
"""

import os
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfpytorch_ray import Elastic, launch, progress


class Digits(lightning.LightningModule):
    """A small network on scikit-learn's handwritten digits: 10 scores for 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count hits; sync_dist has the mean taken over all ranks."""
        images, labels = batch
        hits = (self.network(images).argmax(1) == labels).float().mean()
        self.log("accuracy", hits, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class TellProgress(lightning.Callback):
    """Shows Lightning's steps in the terminal's bar and as curves in the run deck."""

    def on_train_batch_end(self, trainer: lightning.Trainer, _module: Any, outputs: Any, *_batch: Any) -> None:
        """After every step."""
        progress(trainer.global_step, total=int(trainer.estimated_stepping_batches), loss=outputs["loss"].item())


def train(epochs: int) -> float:
    """Train and test on every rank. Returns the accuracy on images that nobody trained on."""
    from sklearn.datasets import load_digits

    lightning.seed_everything(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data).float().div(16), torch.tensor(digits.target))
    training, test = torch.utils.data.random_split(data, [1500, len(data) - 1500])
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",  # "auto" where there are GPUs
        strategy="ddp",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        callbacks=[TellProgress()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    model = Digits()
    # Lightning puts a DistributedSampler around both.
    trainer.fit(model, DataLoader(training, batch_size=32, shuffle=True))
    (measured,) = trainer.test(model, DataLoader(test, batch_size=149), verbose=False)
    return float(measured["accuracy"])


def main() -> None:
    """Launch on two nodes with a worker each."""
    result = launch(train, epochs=10, elastic=Elastic(nnodes=2, nproc_per_node=1, backend="ray"))
    print(f"ranks: {len(result)}")
    print(f"accuracy: {result[0].return_value:.3f}")


if __name__ == "__main__":
    main()
