"""The loops that benchmarks.throughput times, each in a process of its own."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from benchmarks.measure import RoundClock
from benchmarks.naive import NaiveCNN, PillowImages, plain_loader
from cbam_pl.cli import WAITING
from cbam_pl.commands.fit import fit as fit_command
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.data.loader import Normalise, Shard, TrainingLoader
from cbam_pl.process import configure_process, keep_freed_memory
from cbam_pl.settings import command_parser, make_training, parse_with_recipes
from cbam_pl.training.classifier import Classifier

_clock: RoundClock  # of `fit`, whose callback Lightning makes


def _classifier_and_data(options: list[str]) -> tuple[Classifier, ImageDataModule]:
    """What `train.py fit OPTIONS` would train, and on what."""
    parser = command_parser("fit")
    values = parser.instantiate(parse_with_recipes(parser, options))
    classifier, data = make_training(values)
    data.setup()
    return classifier, data


def _batches(data: ImageDataModule, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """This program's batches of one epoch after another."""
    epoch = 0
    normalise = Normalise(data.mean, data.std, device)
    loader = TrainingLoader(
        data.images("train"), data.batch_size, data.augmentation, normalise, device, 0, lambda: epoch, Shard()
    )
    while True:
        yield from loader
        epoch += 1


def plain_loop(clock: RoundClock, options: list[str], workers: int) -> None:
    """(a) The loop of the notebooks: images one by one, a contiguous float32 network, `.item()` at each step."""
    model, data = _classifier_and_data(options)
    attention = model.hparams["attention"]["kind"]
    network: nn.Module = model.network
    if model.hparams["arch"] == "cnn" and attention == "cbam" and data.image_size == 32:
        network = NaiveCNN(data.num_classes)
    network.to(clock.device).train()
    optimizer = model.optimizer(network.parameters())
    for group in optimizer.param_groups:
        group["fused"] = None  # as the notebooks have it, weight by weight on a CPU
    criterion = nn.CrossEntropyLoss()
    dataset = PillowImages(data.images("train"), data.augmentation, data.mean, data.std)
    loader = plain_loader(dataset, data.batch_size, workers)
    running_loss, correct = 0.0, 0
    while True:
        for images, labels in loader:
            images, labels = images.to(clock.device), labels.to(clock.device)
            optimizer.zero_grad()
            outputs = network(images)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            correct += (outputs.argmax(1) == labels).sum().item()
            clock.step(len(labels))


def plain_data(clock: RoundClock, options: list[str]) -> None:
    """(e) The data of the notebooks' loop, in one process."""
    _, data = _classifier_and_data(options)
    loader = plain_loader(
        PillowImages(data.images("train"), data.augmentation, data.mean, data.std), data.batch_size, 0
    )
    while True:
        for images, labels in loader:
            images.to(clock.device), labels.to(clock.device)
            clock.step(len(labels))


def our_data(clock: RoundClock, options: list[str]) -> None:
    """(e) This program's data."""
    keep_freed_memory()
    _, data = _classifier_and_data(options)
    for _, labels in _batches(data, clock.device):
        clock.step(len(labels))


class FitClock(Callback):
    """Times the training steps of `fit`; logging and checkpoints count, validation does not."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step."""
        _clock.step(len(batch[1]))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation out: the other loops have none."""
        _clock.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count again."""
        _clock.resume()


class _UnseenTerminal(io.TextIOBase):
    """A terminal that nobody looks at: the progress bar is drawn on it in full."""

    def isatty(self) -> bool:
        """Yes."""
        return True

    def write(self, text: str) -> int:
        """Discard the text."""
        return len(text)


def fit(clock: RoundClock, options: list[str]) -> None:
    """(b) `train.py fit`, as users run it, with its progress bar, logs and checkpoints."""
    global _clock
    _clock = clock
    extra = ["--trainer.callbacks+", "benchmarks.variants.FitClock", "--trainer.max_epochs", "1000000"]
    accelerator = "gpu" if clock.device.type == "cuda" else "cpu"
    configure_process()  # as the command line does before each command
    with contextlib.redirect_stderr(_UnseenTerminal()):
        fit_command([*options, *extra, "--trainer.accelerator", accelerator])


fit.environment = WAITING  # type: ignore[attr-defined]  # set by the command line before torch is loaded


def _train(clock: RoundClock, model: Classifier, batches: Iterator[tuple[Tensor, Tensor]], bfloat16: bool) -> None:
    """A bare loop: forward, backward, update, and nothing else."""
    device = clock.device
    network: Any = model.network.to(device, memory_format=torch.channels_last).train()
    # As Classifier.setup chooses it.
    compiled = device.type == "cuda" if model.compile_training is None else model.compile_training
    if compiled:
        network = torch.compile(network.forward, dynamic=False)
    optimizer = model.optimizer(model.network.parameters())
    full_size = 0
    for images, labels in batches:
        full_size = full_size or len(labels)
        if len(labels) < full_size:
            continue  # an epoch's last, smaller batch would be compiled anew
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = network(images.to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock.step(len(labels))


def bare_loop(clock: RoundClock, options: list[str], bfloat16: bool, keep_memory: bool = True) -> None:
    """(c) A bare loop over this program's batches."""
    if keep_memory:
        keep_freed_memory()
    model, data = _classifier_and_data(options)
    _train(clock, model, _batches(data, clock.device), bfloat16)


def network_alone(clock: RoundClock, options: list[str], bfloat16: bool) -> None:
    """(d) The training step on one batch again and again."""
    keep_freed_memory()
    model, data = _classifier_and_data(options)
    batch = next(_batches(data, clock.device))

    def again() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield batch

    _train(clock, model, again(), bfloat16)


def naive_network_alone(clock: RoundClock, options: list[str]) -> None:
    """(d) The same for the notebooks' network, contiguous."""
    _, data = _classifier_and_data(options)
    images, labels = next(_batches(data, clock.device))
    network = NaiveCNN(data.num_classes).to(clock.device).train()
    optimizer = torch.optim.Adam(network.parameters())
    while True:
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock.step(len(labels))
