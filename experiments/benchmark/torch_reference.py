"""The reference in PyTorch, for whole jobs: reads MNIST's files, trains, evaluates.

    python -m experiments.benchmark.torch_reference FOLDER [--epochs 1] [...]

It prints a line after the first step, and a line of JSON after each epoch. It imports nothing of
this project, so that its start is PyTorch's own.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Classifier(nn.Module):
    """`nn.LSTM`, whose last output goes through `nn.Linear`."""

    def __init__(self, hidden_size: int, num_layers: int, features: int = 28):
        super().__init__()
        self.rnn = nn.LSTM(features, hidden_size, num_layers, batch_first=True)
        self.lin = nn.Linear(hidden_size, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, 10] of images [batch, time, features]."""
        return self.lin(self.rnn(x)[0][:, -1])


def read_split(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read images float32 [n, 28, 28] in [0, 1] and labels int64 [n] from unpacked IDX files."""
    pixels = np.fromfile(folder / f"{name}-images-idx3-ubyte", np.uint8)[16:]
    labels = np.fromfile(folder / f"{name}-labels-idx1-ubyte", np.uint8)[8:]
    images = torch.from_numpy(pixels).reshape(-1, 28, 28).float() / 255
    return images, torch.from_numpy(labels).long()


def distort(images: torch.Tensor) -> torch.Tensor:
    """Rotate, shear, scale and shift images [n, 28, 28], as far as `lstm_flax.augment.distort`."""
    limits = torch.tensor([0.2, 0.2, 0.12, 0.12, 2.0, 2.0], device=images.device)
    drawn = limits * (2 * torch.rand(len(images), 6, device=images.device) - 1)
    rotation, shear, scale_y, scale_x, shift_y, shift_x = drawn.T
    cos, sin, slant = rotation.cos(), rotation.sin(), shear.tan()
    to_x = [(1 + scale_x) * (sin * slant + cos), (1 + scale_y) * sin, shift_x / 14]
    to_y = [(1 + scale_x) * (cos * slant - sin), (1 + scale_y) * cos, shift_y / 14]
    matrices = torch.stack([torch.stack(to_x, 1), torch.stack(to_y, 1)], 1)
    grid = functional.affine_grid(matrices, [len(images), 1, 28, 28], align_corners=False)
    return functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def accuracy(model: Classifier, images: torch.Tensor, labels: torch.Tensor, batch: int) -> float:
    """Return the fraction of the images that are classified correctly."""
    with torch.inference_mode():
        pieces = zip(images.split(batch), labels.split(batch), strict=True)
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in pieces)
    return correct / len(labels)


def main() -> None:
    """Train, and evaluate after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the four IDX files, unpacked")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="Adam's")
    parser.add_argument(
        "--one-cycle",
        action="store_true",
        help="the recipe of lstm_flax instead: distorted images, AdamW, clipped gradients, a "
        "learning rate that rises to 4e-3 and falls to almost 0",
    )
    parser.add_argument("--hidden-size", type=int, default=256, help="units of each layer")
    parser.add_argument("--num-layers", type=int, default=2, help="LSTM layers")
    flags = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    images, labels = (tensor.to(device) for tensor in read_split(flags.folder, "train"))
    test_images, test_labels = (tensor.to(device) for tensor in read_split(flags.folder, "t10k"))
    model = Classifier(flags.hidden_size, flags.num_layers).to(device)
    if flags.one_cycle:
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
        steps = flags.epochs * -(-len(images) // flags.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, cycle_momentum=False)
    else:
        optimizer = torch.optim.Adam(model.parameters(), flags.learning_rate)
    for epoch in range(1, flags.epochs + 1):
        started = time.perf_counter()
        order = torch.randperm(len(images), device=device)
        for step, rows in enumerate(order.split(flags.batch_size)):
            optimizer.zero_grad()
            batch = distort(images[rows]) if flags.one_cycle else images[rows]
            loss = functional.cross_entropy(model(batch), labels[rows])
            loss.backward()
            if flags.one_cycle:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if flags.one_cycle:
                schedule.step()
            if epoch == 1 and step == 0:
                print(f"first step: loss {loss.item():.4f}", flush=True)
        reached = accuracy(model, test_images, test_labels, flags.batch_size)
        record = {"epoch": epoch, "test_accuracy": reached}
        print(json.dumps(record | {"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
