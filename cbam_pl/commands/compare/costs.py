"""What each recipe costs: parameters, operations, training speed, latency and memory, measured in turns."""

import itertools
import json
import multiprocessing
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from lightning import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from cbam_pl.commands.compare.plan import nest
from cbam_pl.data.datamodule import in_proportion
from cbam_pl.data.folder import stored_size
from cbam_pl.data.images import Images
from cbam_pl.data.loader import Normalise, Shard, TrainingLoader
from cbam_pl.environment import describe_environment
from cbam_pl.errors import UserError, is_out_of_memory
from cbam_pl.models.cost import count_flops, count_parameters
from cbam_pl.process import configure_process
from cbam_pl.settings import command_parser, make_training
from cbam_pl.timing import peak_memory, reset_peak_memory, time_in_turns


class TimedRecipe:
    """A recipe's training step and forward pass, on random images: speed does not depend on the pixels."""

    def __init__(self, settings: dict[str, Any]) -> None:
        parser = command_parser("fit")
        values = parser.instantiate(parser.parse_object(nest(settings)))
        classifier, data = make_training(values)
        self._shape = (3, data.image_size, data.image_size)
        # Before the network is moved and converted to another type, which counting does not know.
        self.parameters = count_parameters(classifier.network)
        self.flops = count_flops(classifier.network, self._shape)
        try:
            # Fabric applies the precision as Lightning's Trainer does, without the Trainer's own loop.
            self._fabric = Fabric(accelerator=values.trainer.accelerator, devices=1, precision=values.trainer.precision)
        except (ImportError, MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"the trainer's settings conflict with each other or with this machine: {error}") from error
        self._convert = self._fabric.strategy.precision.convert_input
        self.device = self._fabric.device
        self.classifier = classifier
        _, self._optimizer = self._fabric.setup(classifier, classifier.make_optimizer())
        classifier.configure_memory_format_and_compile(self.device, training=True)
        self.batch_size = data.batch_size
        count = 4 * data.batch_size
        side = stored_size(data.image_size) if in_proportion(data.hparams) else data.image_size
        pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
        images = Images(pixels, torch.arange(count) % data.num_classes).copy_to(self.device)
        # In an epoch of many batches, since between two the device waits for its order.
        images = images.subset(torch.arange(16 * count, device=self.device) % count)
        normalise = Normalise([0.5] * 3, [0.25] * 3, self.device)
        arguments = (images, data.batch_size, data.augmentation, normalise, self.device, 0, lambda: 0, Shard())
        loader = TrainingLoader(*arguments, data.image_size, data.crop_scale)
        self._batches = itertools.chain.from_iterable(itertools.repeat(loader))
        classifier.eval()

    def train_step(self) -> None:
        """One optimizer step, from uint8 pixels on."""
        if not self.classifier.training:  # a switch takes a tenth of a small network's forward pass
            self.classifier.train()
            self.classifier.prepare_network()
        batch = self._convert(next(self._batches))
        with self._fabric.autocast():
            loss = self.classifier.training_step(batch, 0)
        self._optimizer.zero_grad()
        self._fabric.backward(loss)
        self._optimizer.step()

    def forward_pass(self, batch_size: int) -> Callable[[], None]:
        """What computes the logits of a batch, as an evaluation does."""
        images = self._convert(torch.randn(batch_size, *self._shape, device=self.device))

        def run() -> None:
            if self.classifier.training:
                self.classifier.eval()
            with torch.inference_mode(), self._fabric.autocast():
                self.classifier.evaluation_logits(images)

        return run


def measure_costs(configs: dict[str, dict[str, Any]], threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """What `time_recipes` measures, and peak `memory` in MB of a process that trains; None where memory ran out.

    Recipes that differ only in their epochs take the same steps, and are measured as one.
    """
    steps = {name: json.dumps(_of_a_step(settings), sort_keys=True) for name, settings in configs.items()}
    measured = {step: name for name, step in reversed(steps.items())}  # the first recipe of each
    distinct = {name: configs[name] for name in measured.values()}
    memory = {name: in_new_process(threads, peak_training_memory, settings) for name, settings in distinct.items()}
    timed = in_new_process(threads, time_recipes, distinct, rounds, seconds, (1, 256))
    costs = {name: timed and timed[name] | {"memory": memory[name]} for name in distinct}
    return {name: costs[measured[step]] for name, step in steps.items()}


def _of_a_step(settings: dict[str, Any]) -> dict[str, Any]:
    budget = ("trainer.max_epochs", "trainer.max_steps", "model.lr_scheduler")
    return {key: value for key, value in settings.items() if not key.startswith(budget)}


def time_recipes(
    configs: dict[str, dict[str, Any]], rounds: int, seconds: float, batch_sizes: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Time all recipes in interleaved rounds, so that a busy moment of the machine affects all alike.

    Returns:
        Recipe → trainable parameters; flops of one image's forward pass, a multiplication and an addition being two;
        train_images_per_second, augmentation included; latency_N, milliseconds of the forward pass of N images;
        measured_on, the device and commit. With test_time_flip the latencies, not the flops, are of both mirror images.
    """
    recipes = {name: TimedRecipe(settings) for name, settings in configs.items()}
    works = {(name, size): recipe.forward_pass(size) for name, recipe in recipes.items() for size in batch_sizes}
    works |= {(name, 0): recipe.train_step for name, recipe in recipes.items()}
    device = next(iter(recipes.values())).device
    turns = time_in_turns(works, rounds, seconds, device)
    times = {key: statistics.median(values) for key, values in turns.items()}
    threads = "" if device.type == "cuda" else f", threads: {torch.get_num_threads()}"
    environment = describe_environment(device)
    measured_on = f"{environment['device']}{threads}, commit {environment['commit']}"
    return {
        name: {
            "parameters": recipe.parameters,
            "flops": recipe.flops,
            "train_images_per_second": recipe.batch_size / times[name, 0],
            **{f"latency_{size}": 1000 * times[name, size] for size in batch_sizes},
            "measured_on": measured_on,
        }
        for name, recipe in recipes.items()
    }


def peak_training_memory(settings: dict[str, Any]) -> float:
    """Peak memory in MB of this process after a few training steps."""
    recipe = TimedRecipe(settings)
    recipe.train_step()
    reset_peak_memory(recipe.device)
    for _ in range(4):
        recipe.train_step()
    return peak_memory(recipe.device)


def in_new_process(threads: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a process that does nothing else, with `threads` threads; None without memory."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, context, _configure, (threads,)) as pool:
            return pool.submit(work, *arguments).result()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, BrokenProcessPool) or is_out_of_memory(error):  # the kernel may have killed it
            return None
        raise


def _configure(threads: int) -> None:
    threading.Thread(target=_follow_parent, daemon=True).start()
    configure_process()  # as of the commands, whose speed and memory are measured
    torch.set_num_threads(threads)


def _follow_parent() -> None:
    # A pool ends its processes only where its own process ends in order.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
