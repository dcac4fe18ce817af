"""A plain training loop, written as Accelerate's own image example is (examples/cv_example.py), as a contestant.

    python benchmarks/peers/accelerate_loop.py --data cifar10 --root DIR --mixed-precision bf16

From the example: torchvision's transforms in a DataLoader with four workers, batches normalised on the device,
``accelerator.prepare`` for all of it, a OneCycleLR stepped after each optimizer step. Different from it, to do the same
work as the other side: ResNet-20 for CIFAR (He et al. 2015, option A) on CIFAR-10 with its usual crops and flips, and
SGD with Nesterov momentum instead of Adam. Runs in an environment of its own: nothing of greenprune is imported.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, ToTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from process import Pacer


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.more = stride, channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.more:
            half = self.more // 2
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return torch.relu(x + y)


class ResNet(nn.Module):
    """He et al. 2015, section 4.2, with 6n + 2 layers."""

    def __init__(self, depth: int, channels: int, classes: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        width = 16
        for stage in (16, 32, 64):
            for number in range((depth - 2) // 6):
                blocks.append(BasicBlock(width, stage, 2 if number == 0 and stage > 16 else 1))
                width = stage
        self.conv = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(torch.relu(self.bn(self.conv(x)))).mean((2, 3)))


class Labelled(Dataset):
    """Pictures as the example's data set returns them."""

    def __init__(self, pictures: list[Image.Image], labels: list[int], transform: Compose) -> None:
        self.pictures, self.labels, self.transform = pictures, labels, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"image": self.transform(self.pictures[index]), "label": self.labels[index]}


def open_dataset(name: str, root: str) -> tuple[Labelled, int, tuple[list[float], list[float]]]:
    """The training set, the channels of an image, and their mean and deviation."""
    if name == "digits":
        from sklearn.datasets import load_digits

        data = load_digits()
        pictures = [Image.fromarray((16 * image).clip(0, 255).astype(np.uint8)) for image in data.images[:1438]]
        transform = Compose([RandomCrop(8, padding=1), ToTensor()])
        return Labelled(pictures, data.target[:1438].tolist(), transform), 1, ([0.3], [0.37])
    with warnings.catch_warnings():
        # The published pickles hold an old form of dtype, which NumPy 2.4 warns about.
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed", category=Warning)
        data = CIFAR10(root, train=True)
    pictures = [Image.fromarray(image) for image in data.data]
    transform = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), ToTensor()])
    return Labelled(pictures, data.targets, transform), 3, ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("cifar10", "digits"), default="cifar10")
    parser.add_argument("--root", default="")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=4, help="the example's")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision)
    pacer = Pacer(torch.cuda.synchronize if accelerator.device.type == "cuda" else lambda: None)
    set_seed(0)
    dataset, channels, statistics = open_dataset(args.data, args.root)
    loader = DataLoader(dataset, shuffle=True, batch_size=args.batch_size, num_workers=args.workers, drop_last=True)
    model = ResNet(args.depth, channels, classes=10).to(accelerator.device)
    mean, std = (torch.tensor(values)[None, :, None, None].to(accelerator.device) for values in statistics)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    epochs = 1000
    lr_scheduler = OneCycleLR(optimizer, max_lr=0.1, epochs=epochs, steps_per_epoch=len(loader))
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pacer.ready(params=parameters, torch=torch.__version__, threads=torch.get_num_threads())
    for _ in range(epochs):
        model.train()
        for batch in pacer.pace(loader):
            on_device = {k: v.to(accelerator.device) for k, v in batch.items()}
            inputs = (on_device["image"] - mean) / std
            outputs = model(inputs)
            loss = nn.functional.cross_entropy(outputs, on_device["label"])
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
