# SPDX-License-Identifier: Apache-2.0
"""A classifier of images learns five new digits: LoRA on its convolutions and linear layers, a new head beside them.

    pip install scikit-learn
    python examples/image_classifier.py

The base is a small convolutional network that knows the digits 0 to 4 (of scikit-learn's packaged set, 8x8 pixels).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from graftlet import LoraConfig, get_peft_model


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.hidden, self.head = nn.Linear(32 * 4 * 4, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


def digits(first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Five digits from `first` on: images and labels to train on, and those held out."""
    data = load_digits()
    images, labels = torch.tensor(data.images).float()[:, None] / 16, torch.tensor(data.target) - first
    mine = (labels >= 0) & (labels < 5)
    images, labels = images[mine], labels[mine]
    held = torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < 0.3
    return images[~held], labels[~held], images[held], labels[held]


def fit(model: nn.Module, images: Tensor, labels: Tensor, rate: float, steps: int = 150) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        rows = torch.randint(len(labels), (64,))
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> dict[str, float]:
    torch.manual_seed(0)
    images, labels, held, right = digits(0)
    base = Network()
    fit(base, images, labels, 3e-3)
    known = accuracy(base, held, right)

    images, labels, new, wanted = digits(5)
    before = accuracy(base, new, wanted)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["conv1", "conv2", "hidden"], modules_to_save=["head"])
    model = get_peft_model(base, config)
    fit(model, images, labels, 1e-2)
    after = accuracy(model, new, wanted)
    with model.disable_adapter():
        still = accuracy(model, held, right)
    print(f"digits 5 to 9, held out: {before:.1%} before, {after:.1%} after")
    print(f"digits 0 to 4 with the adapter off: {known:.1%}, and still {still:.1%}")
    return {"before": before, "after": after, "known": known, "still": still}


if __name__ == "__main__":
    main()
