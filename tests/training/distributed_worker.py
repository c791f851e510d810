"""One process of tests/test_distributed.py: train some steps as `fit` would, and save what the test compares.

python -m tests.training.distributed_worker IMAGE_FOLDER OUTPUT DEVICES BATCH_SIZE [steps | share]
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.training.classifier import Classifier


class SynchronisedBatchNorm(nn.Module):
    """Batch norm in training over all processes' images, which torch.nn.SyncBatchNorm computes on a GPU alone."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        sums = torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])  # (2, C)
        count = x.numel() / x.shape[1]
        if dist.is_initialized():
            sums, count = all_reduce(sums), count * dist.get_world_size()  # equal shares, as the test has them
        mean, square = sums / count
        scale = self.weight * (square - mean**2 + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def synchronise_batch_norm(network: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, SynchronisedBatchNorm(child))
            elif isinstance(child, nn.Dropout):
                setattr(parent, name, nn.Identity())


class Record(Callback):
    """Keeps each batch's labels and pixels."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.labels: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.images.append(batch[0].clone())
        self.labels.append(batch[1].clone())


def main() -> None:
    folder, output, devices, batch_size, what = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Classifier(3, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
    synchronise_batch_norm(model.network)
    augmentation: Any = "none" if what == "steps" else "rich"
    data = ImageDataModule("folder", folder, int(batch_size), val_size=29, augmentation=augmentation)
    record = Record()
    trainer = Trainer(
        accelerator="cpu", devices=int(devices), strategy="ddp" if int(devices) > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=2,
        num_sanity_val_steps=0, limit_val_batches=0, callbacks=[record],
    )  # fmt: skip
    trainer.fit(model, data)
    saved = {"images": torch.cat(record.images), "labels": torch.cat(record.labels), "weights": model.state_dict()}
    torch.save(saved, Path(output) / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
