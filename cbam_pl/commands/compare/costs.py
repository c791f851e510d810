"""What each recipe costs: parameters, operations, speed of training, latency, memory; measured in turns."""

import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Fabric
from torch import Tensor

from cbam_pl.commands.compare.plan import nest
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.data.images import Images
from cbam_pl.data.loader import Normalise, Shard, TrainingLoader
from cbam_pl.models.cost import count_flops, count_parameters
from cbam_pl.settings import command_parser
from cbam_pl.timing import peak_memory, time_in_turns
from cbam_pl.training.classifier import Classifier

_LATENCY_BATCHES = (1, 256)
_MEMORY_STEPS = 5


@dataclass(frozen=True)
class Cost:
    """What one recipe costs.

    Args:
        parameters: trainable ones.
        flops: floating-point operations of one image's forward pass; a multiplication and an addition are two.
        train_images_per_second: images a second of training steps, augmentation included.
        latency_1: milliseconds of the forward pass of 1 image.
        latency_256: milliseconds of the forward pass of 256 images.
        memory: peak in MB of a process that trains: on the GPU, or resident; None where it could not be measured.
    """

    parameters: int
    flops: int
    train_images_per_second: float
    latency_1: float
    latency_256: float
    memory: float | None


class Subject:
    """A recipe's network with the steps that are timed, on generated noise: speed does not depend on the pixels.

    Args:
        settings: of the recipe, by key with dots.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        parser = command_parser("fit")
        values = parser.instantiate(parser.parse_object(nest(settings)))
        data = ImageDataModule(**values.data)
        fabric = Fabric(accelerator=values.trainer.accelerator, devices=1, precision=values.trainer.precision)
        self._precision = fabric.strategy.precision
        self.device = fabric.device
        torch.manual_seed(0)
        self.classifier = Classifier(num_classes=data.num_classes, image_size=data.image_size, **values.model)
        self.classifier.network = self._precision.convert_module(self.classifier.network)
        self.classifier.to(self.device)
        self.classifier.configure_memory_format_and_compile(self.device, training=True)
        self.batch_size = data.batch_size
        self._size = data.image_size
        self._optimizer = self.classifier.optimizer(self.classifier.parameters())
        count = 4 * data.batch_size
        pixels = torch.randint(256, (count, 3, data.image_size, data.image_size), dtype=torch.uint8)
        normalise = Normalise([0.5] * 3, [0.25] * 3, self.device)
        images = Images(pixels, torch.arange(count) % data.num_classes)
        arguments = (images, data.batch_size, data.augmentation, normalise, self.device, 0, lambda: 0, Shard())
        self._batches = itertools.chain.from_iterable(itertools.repeat(TrainingLoader(*arguments)))

    def train_step(self) -> None:
        """One optimizer step, from uint8 pixels on."""
        images, labels = next(self._batches)
        self.classifier.train()
        with self._precision.forward_context():
            logits = self.classifier.training_logits(self._precision.convert_input(images))
            loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def forward_pass(self, batch_size: int) -> Callable[[], None]:
        """What computes the logits of a batch, in evaluation mode."""
        images = self._precision.convert_input(torch.randn(batch_size, 3, self._size, self._size, device=self.device))

        def run(images: Tensor = images) -> None:
            self.classifier.eval()
            with torch.inference_mode(), self._precision.forward_context():
                self.classifier(images)

        return run


def measure_costs(configs: dict[str, dict[str, Any]], threads: int, rounds: int, seconds: float) -> dict[str, Cost]:
    """Measure all recipes in interleaved rounds, so that a busy moment of the machine meets all alike.

    Args:
        configs: recipe → settings, by key with dots.
        threads: of the CPU.
        rounds: turns of each measurement; the median counts.
        seconds: of each turn, at least one step.
    """
    memory = {name: measure_memory(settings, threads) for name, settings in configs.items()}
    with _threads(threads):
        subjects = {name: Subject(settings) for name, settings in configs.items()}
        works: dict[tuple[str, int], Callable[[], None]] = {}
        for name, subject in subjects.items():
            works[name, 0] = subject.train_step
            works |= {(name, batch_size): subject.forward_pass(batch_size) for batch_size in _LATENCY_BATCHES}
        times = median_times(works, rounds, seconds, subject.device)
    costs = {}
    for name, subject in subjects.items():
        network, size = subject.classifier.network, subject._size
        costs[name] = Cost(
            count_parameters(network),
            count_flops(network, (3, size, size)),
            subject.batch_size / times[name, 0],
            1000 * times[name, 1],
            1000 * times[name, 256],
            memory[name],
        )
    return costs


def measure_rates(configs: dict[str, dict[str, Any]], threads: int, seconds: float) -> dict[str, float]:
    """Images a second of each recipe's training steps, quickly, to estimate by."""
    with _threads(threads):
        subjects = {name: Subject(settings) for name, settings in configs.items()}
        works = {name: subject.train_step for name, subject in subjects.items()}
        times = median_times(works, 2, seconds / 2, next(iter(subjects.values())).device)
    return {name: subjects[name].batch_size / time for name, time in times.items()}


def median_times(
    works: dict[Any, Callable[[], None]], rounds: int, seconds: float, device: torch.device
) -> dict[Any, float]:
    """Seconds per call of each work: the median of its rounds."""
    times = time_in_turns(works, rounds, seconds, device)
    return {key: statistics.median(values) for key, values in times.items()}


def measure_memory(settings: dict[str, Any], threads: int) -> float | None:
    """Peak memory in MB of training steps, in a process that does nothing else; None where it cannot be measured."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(_peak_memory, settings, threads).result()
    except Exception:  # out of memory, above all; the process may have been killed for it
        return None


def _peak_memory(settings: dict[str, Any], threads: int) -> float:
    torch.set_num_threads(threads)
    subject = Subject(settings)
    for _ in range(_MEMORY_STEPS):
        subject.train_step()
    return peak_memory(subject.device)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
