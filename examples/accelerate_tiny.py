"""Hugging Face Accelerate and a tiny transformer on Ray: no `accelerate launch`, no download.

    pip install 'kfpytorch_ray[big-examples]'
    python examples/accelerate_tiny.py

The model is a Vision Transformer that is made from its configuration alone, with random weights; it reads
scikit-learn's 8 x 8 digits as 16 patches. Accelerate finds rank and world size in the environment, which is torchrun's.
The fork server of each agent loads both libraries once (preload), so that a restart after a failure does not wait for
them again.
"""

import torch
from torch.utils.data import DataLoader, TensorDataset, random_split

from kfpytorch_ray import Elastic, RayBackend, launch, progress

TINY = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "initializer_range": 0.2,  # the usual 0.02 is for wider models
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 10,
}


def train(epochs: int) -> float:
    """Train and test on every rank. Returns the accuracy on images that nobody trained on."""
    # Here, because only workers need them: the driver starts seconds sooner without.
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    set_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images).float().div(16).unsqueeze(1), torch.tensor(digits.target))
    training, test = random_split(data, [1500, len(data) - 1500])

    accelerator = Accelerator(cpu=True)  # leave cpu out where there are GPUs
    model = ViTForImageClassification(ViTConfig(**TINY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, training_loader, test_loader = accelerator.prepare(
        model, optimizer, DataLoader(training, batch_size=32, shuffle=True), DataLoader(test, batch_size=99)
    )

    step, steps = 0, epochs * len(training_loader)
    for _epoch in range(epochs):
        model.train()
        for images, labels in training_loader:
            loss = model(pixel_values=images, labels=labels).loss
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            step += 1
            progress(step, total=steps, loss=loss.item())

    model.eval()
    hits = []
    for images, labels in test_loader:
        with torch.no_grad():
            guesses = model(pixel_values=images).logits.argmax(1)
        # Of all ranks, less what Accelerate has added to make the last batches even.
        hits.append(accelerator.gather_for_metrics(guesses == labels))
    return float(torch.cat(hits).float().mean())


def main() -> None:
    """Launch on two nodes with a worker each."""
    backend = RayBackend(preload=("accelerate", "transformers.models.vit.modeling_vit"))
    result = launch(train, epochs=8, elastic=Elastic(nnodes=2, nproc_per_node=1, backend=backend))
    print(f"ranks: {len(result)}")
    print(f"accuracy: {result[0].return_value:.3f}")


if __name__ == "__main__":
    main()
