"""What a notebook does: a textbook CBAM in a small CNN, and images that are decoded and augmented one by one.

Written as tutorials write it, not as this program does, so that the comparison is with what people use today.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cbam_pl.data.images import Images


class ChannelGate(nn.Module):
    """x (B, C, H, W) → (B, C, 1, 1); a shared MLP of 1×1 convolutions on the average and on the maximum."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.max_pool = nn.AdaptiveMaxPool2d(1)
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.relu = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → (B, C, 1, 1)."""
        avg_out = self.fc2(self.relu(self.fc1(self.avg_pool(x))))
        max_out = self.fc2(self.relu(self.fc1(self.max_pool(x))))
        return torch.sigmoid(avg_out + max_out)


class SpatialGate(nn.Module):
    """x (B, C, H, W) → (B, 1, H, W); a 7×7 convolution on the mean and the maximum across channels."""

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → (B, 1, H, W)."""
        avg_out = torch.mean(x, dim=1, keepdim=True)
        max_out, _ = torch.max(x, dim=1, keepdim=True)
        return torch.sigmoid(self.conv(torch.cat([avg_out, max_out], dim=1)))


class NaiveCBAM(nn.Module):
    """x (B, C, H, W) → (B, C, H, W): the channel gate, then the spatial gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = ChannelGate(channels)
        self.spatial = SpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) → (B, C, H, W)."""
        x = x * self.channel(x)
        return x * self.spatial(x)


class NaiveCNN(nn.Module):
    """The network of configs/cbam_cnn.yaml. Images (B, 3, 32, 32) → logits (B, num_classes)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
            layers.append(NaiveCBAM(after))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(2048, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) → logits (B, num_classes)."""
        return self.classifier(self.features(images))


class PillowImages(Dataset[tuple[Tensor, int]]):
    """Images that go through Pillow and torchvision one at a time, as torchvision's CIFAR10 hands them out.

    Args:
        images: in memory.
        augmentation: none, basic, alternating (whose flips are random here) or rich.
        mean: of each channel.
        std: of each channel.
    """

    def __init__(self, images: Images, augmentation: str, mean: list[float], std: list[float]) -> None:
        self.pixels: np.ndarray[Any, Any] = images.pixels.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, 3)
        self.labels: list[int] = images.labels.tolist()
        size = images.pixels.shape[2]
        steps: list[Any] = []
        if augmentation != "none":
            border = "symmetric" if augmentation == "alternating" else "constant"
            steps += [transforms.RandomCrop(size, 4, padding_mode=border), transforms.RandomHorizontalFlip()]
        if augmentation == "rich":
            steps += [transforms.ColorJitter(0.2, 0.2, 0.2, 0.1), transforms.RandomRotation(15)]
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def plain_loader(dataset: PillowImages, batch_size: int, workers: int) -> DataLoader[tuple[Tensor, int]]:
    """The DataLoader of the notebooks."""
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
