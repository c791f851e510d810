"""The LightningModule: a network's loss, metrics, optimizer and schedule."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from cbam_pl.attention import AttentionConfig
from cbam_pl.errors import UserError
from cbam_pl.models import Architecture, Stem, build_network
from cbam_pl.seeds import derive_seed, seed_device
from cbam_pl.training.run import epochs_of


@contextmanager
def _refusals_name(key: str) -> Iterator[None]:
    """Turn what an optimizer or a schedule refuses into a UserError that names the key."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{key}: {error}") from error


class EpochMeans:
    """Mean loss and accuracy over an epoch's images, over all processes, without waiting for the device each step.

    Each batch is noted as three tensors on the device; `take` fetches them all at once.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[Tensor, Tensor, int]] = []
        # NaN stays NaN: by default it is left out of the mean. ("disable" would drop the weights, torchmetrics 1.9.)
        self.loss = MeanMetric(nan_strategy=math.nan)
        self.acc = MeanMetric(nan_strategy=math.nan)

    def to(self, device: torch.device) -> None:
        """Move the sums to the device; in float64 where the device has it, so that their order does not matter."""
        for metric in (self.loss, self.acc):
            metric.to(device)
            if device.type != "mps":
                metric.set_dtype(torch.float64)

    def note(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Remember a batch. loss (): the batch's mean; logits (B, classes); labels (B,)."""
        correct = (logits.detach().argmax(1) == labels).sum()
        self._noted.append((loss.detach(), correct, len(labels)))

    def __len__(self) -> int:
        return len(self._noted)

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """Add what was noted to the means and forget it. Returns losses, correct counts and sizes, each (noted,)."""
        losses = torch.stack([loss for loss, _, _ in self._noted]).to(self.loss.mean_value.dtype)
        correct = torch.stack([correct for _, correct, _ in self._noted]).to(losses)
        sizes = torch.tensor([size for _, _, size in self._noted]).to(losses)
        self._noted.clear()
        self.loss.update(losses, sizes)
        self.acc.update(correct / sizes, sizes)
        return losses, correct, sizes

    def state_dict(self) -> dict[str, list[float]]:
        """What the epoch has summed up so far, over all processes: weighted sum and weight."""
        state = {}
        for name, metric in (("loss", self.loss), ("acc", self.acc)):
            with metric.sync_context():
                state[name] = [float(metric.mean_value), float(metric.weight)]
        return state

    def load_state_dict(self, state_dict: dict[str, list[float]]) -> None:
        """Take over the sums of an epoch that was broken off; one process alone, since they are everyone's."""
        for name, metric in (("loss", self.loss), ("acc", self.acc)):
            weighted, weight = state_dict[name]
            metric.mean_value.fill_(weighted)
            metric.weight.fill_(weight)
            metric._update_count = 1  # so that `compute` knows that there is something to compute

    def finish(self) -> tuple[float, float]:
        """Mean loss and accuracy over all processes since the last call."""
        if self._noted:
            self.take()
        loss, acc = float(self.loss.compute()), float(self.acc.compute())
        self.loss.reset()
        self.acc.reset()
        return loss, acc


def trained_with(trainer: Trainer) -> dict[str, Any]:
    """What may differ when a training is resumed, and is said then."""
    return {
        "max_epochs": trainer.max_epochs,
        "processes": trainer.world_size,
        "precision": trainer.precision,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
    }


class Classifier(LightningModule):
    """A network that is trained with cross-entropy and measured by loss and accuracy.

    Args:
        num_classes: classes to tell apart.
        arch: the network.
        attention: the attention of each of its blocks.
        image_size: height and width of the images in pixels.
        stem: of a ResNet: cifar (3×3, stride 1) or imagenet (7×7, stride 2, then a max pool, for large images).
        dropout: of the cnn: share of its hidden units that each training step leaves out; None: 0.5.
        optimizer: any of torch.optim, without its parameters.
        lr_scheduler: any of torch.optim.lr_scheduler or cbam_pl.schedules, without its optimizer; a plateau is judged
            by val/loss; where it takes total_steps and none are given, the trainer's are filled in.
        lr_interval: step the schedule once an epoch or once an optimizer step.
        label_smoothing: share of the target that is spread evenly over all classes, in training and evaluation.
        channels_last: lay out images and weights in memory with the channels innermost, which convolutions are
            faster on; results differ by rounding alone. By default on for CPU and CUDA.
        compile: let torch.compile write kernels for the training steps; results differ by rounding alone. By default
            on for CUDA with Triton, and off elsewhere: on a CPU it needs a C++ compiler and half a minute, after which
            a step of the cnn with CBAM takes a seventh less time, and one without attention as long as before.
        test_time_flip: classify by the mean of the logits of each image and of its mirror image, in validation, test
            and prediction.
        seed: what the dropout of each epoch depends on; the initial weights are drawn before, from torch's own state.

    Raises:
        ValueError: a setting out of its range.
    """

    # Steps whose losses are fetched from the device at once.
    _FETCH_EVERY = 50

    def __init__(
        self,
        num_classes: int,
        arch: Architecture = "cnn",
        attention: AttentionConfig = AttentionConfig(),  # noqa: B008 - frozen
        image_size: int = 32,
        stem: Stem = "cifar",
        dropout: float | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        label_smoothing: float = 0.0,
        channels_last: bool | None = None,
        compile: bool | None = None,
        test_time_flip: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
        if isinstance(attention, dict):  # as load_from_checkpoint gives it
            attention = AttentionConfig(**attention)
        # What rebuilds the network, as plain values, so that a checkpoint is loaded without running code.
        self.save_hyperparameters(
            {
                "num_classes": num_classes,
                "arch": arch,
                "attention": asdict(attention),
                "image_size": image_size,
                "stem": stem,
                "dropout": dropout,
                "label_smoothing": label_smoothing,
                "test_time_flip": test_time_flip,
            }
        )
        self.network = build_network(arch, num_classes, attention, image_size, stem, dropout)
        self.channels_last = channels_last
        self.compile_training = compile
        self.test_time_flip = test_time_flip
        self.memory_format = torch.contiguous_format
        # A function beside the network, not a module around it: checkpoints keep their keys, and whoever looks into
        # the network finds it as it was built.
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._compiled_size = 0  # images in the batches that it takes
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.label_smoothing = label_smoothing
        self.seed = seed
        self.train_means = EpochMeans()
        self.evaluation_means = EpochMeans()
        self.test_confusion = MulticlassConfusionMatrix(num_classes, validate_args=False)  # rows: true class
        self.recent: dict[str, float] = {}  # loss, acc and images/s of the last steps, for the progress bar
        self._steps: list[int] = []  # the optimizer step of each noted batch
        self._epoch_lr = 0.0
        self._fetched_at = 0.0
        self._tested_epoch = 0
        self._broken_off: dict[str, Any] = {}  # the epoch that a checkpoint was written in
        self._resumed_at: tuple[int, int, int] | None = None  # epochs completed, batches of the next, steps

    @property
    def fits_schedule(self) -> bool:
        """Whether the schedule's length is left to the trainer."""
        return isinstance(self.lr_scheduler, partial) and self.lr_scheduler.keywords.get("total_steps", 0) is None

    @property
    def optimization(self) -> dict[str, Any]:
        """How the weights are updated, as plain values, such as {"optimizer": "Adam", "optimizer.lr": 0.001}."""
        settings: dict[str, Any] = {"lr_interval": self.lr_interval}
        for name, factory in (("optimizer", self.optimizer), ("lr_scheduler", self.lr_scheduler)):
            made, options = factory, {}
            if isinstance(factory, partial):
                made = [factory.func, *factory.args][-1]  # jsonargparse puts functions of its own before the class
                options = factory.keywords
            settings[name] = getattr(made, "__name__", None)
            settings |= {f"{name}.{key}": value for key, value in options.items()}
        return settings

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute."""
        # Lightning notes the name of the running hook here, some 40 times a step; torch's way, which looks for
        # parameters and submodules first, takes a quarter of a step's overhead.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @classmethod
    def of_checkpoint(cls, checkpoint: dict[str, Any], test_time_flip: bool | None = None) -> "Classifier":
        """The network of a checkpoint that was read already, with its weights.

        Args:
            checkpoint: what `fit` wrote.
            test_time_flip: overrides the setting that it was trained with, unless None.
        """
        settings = dict(checkpoint["hyper_parameters"])
        if test_time_flip is not None:
            settings["test_time_flip"] = test_time_flip
        classifier = cls(**settings)
        classifier.load_state_dict(checkpoint["state_dict"])
        classifier.on_load_checkpoint(checkpoint)
        return classifier

    def setup(self, stage: str) -> None:
        """Put the sums where the network is, and choose what is fast on that device."""
        device = self.trainer.strategy.root_device
        self.train_means.to(device)
        self.evaluation_means.to(device)
        self.choose_fast_ways(device, stage == "fit")

    def choose_fast_ways(self, device: torch.device, training: bool) -> None:
        """Lay out the network's memory, and compile its training steps, as the settings or the device want it."""
        channels_last = device.type in ("cpu", "cuda") if self.channels_last is None else self.channels_last
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self.memory_format)
        compiled = self.compile_training
        if compiled is None:
            compiled = device.type == "cuda" and find_spec("triton") is not None
        if compiled and training:
            # With torch's own random numbers, so that dropout is the same with and without it.
            options: dict[str, Any] = {"fallback_random": True}
            if self.trainer.is_global_zero:
                print("compiling the training step, once, which takes about a minute", flush=True)
            self._compiled = torch.compile(self.network.forward, dynamic=False, options=options)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised → logits (B, num_classes)."""
        return self.network(images.to(memory_format=self.memory_format))

    def training_logits(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised → logits (B, num_classes), compiled where that was chosen."""
        if self._compiled is None:
            return self(images)
        self._compiled_size = self._compiled_size or len(images)
        if len(images) != self._compiled_size:
            return self(images)  # an epoch's last, smaller batch is not worth a compilation of its own
        return self._compiled(images.to(memory_format=self.memory_format))

    def _evaluation_logits(self, images: Tensor) -> Tensor:
        if self.test_time_flip:
            return (self(images) + self(images.flip(3))) / 2
        return self(images)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    # Training

    def on_train_start(self) -> None:
        """Go on in an epoch that was broken off."""
        self._fetched_at = time.monotonic()
        if self._broken_off:
            self._epoch_lr = self._broken_off["lr"]
            if self.global_rank == 0:
                self.train_means.load_state_dict(self._broken_off["means"])

    def on_train_epoch_start(self) -> None:
        """Note the epoch's learning rate."""
        self._epoch_lr = self.trainer.optimizers[0].param_groups[0]["lr"]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Images (B, 3, H, W) and labels (B,) → the batch's mean loss ()."""
        # Dropout is a function of seed, epoch and batch, so that any step can be done again.
        purpose = ("dropout", self.seed, self.current_epoch, batch_idx, self.global_rank)
        seed_device(derive_seed(*purpose), self.device)
        images, labels = batch
        logits = self.training_logits(images)
        loss = self._loss(logits, labels)
        self.train_means.note(loss, logits, labels)
        self._steps.append(self.global_step + 1)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write out the steps since the last time, now and then."""
        # Only when an optimizer step is complete: with accumulation it takes several batches.
        if len(self.train_means) >= self._FETCH_EVERY and self.global_step >= self._steps[-1]:
            self._log_steps()

    def _log_steps(self) -> None:
        losses, correct, sizes = self.train_means.take()
        sums = torch.stack([losses * sizes, correct, sizes])  # (3, batches)
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        by_step: dict[int, list[tuple[float, float]]] = {}
        weighted, correct_counts, counts = sums.tolist()
        for step, loss, count in zip(self._steps, weighted, counts, strict=True):
            by_step.setdefault(step, []).append((loss, count))
        self._steps.clear()
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        for step, parts in by_step.items():
            if not all(math.isfinite(loss) for loss, _ in parts):
                self._stop_at(step)
            if every and step % every == 0:
                mean = sum(loss for loss, _ in parts) / sum(count for _, count in parts)
                self._log({"train/loss_step": mean}, step)
        now, total = time.monotonic(), sum(counts)
        self.recent = {
            "loss": sum(weighted) / total,
            "acc": sum(correct_counts) / total,
            "images/s": total / (now - self._fetched_at),
        }
        self._fetched_at = now

    def _stop_at(self, step: int) -> None:
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        callbacks = self.trainer.checkpoint_callbacks
        saved = [path for callback in callbacks if (path := getattr(callback, "best_model_path", ""))]
        rescue = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
        raise UserError(
            f"the loss is not finite at step {step} (learning rate {lr:.3g}); {rescue}; lower the learning rate, or "
            "clip gradients (--trainer.gradient_clip_val 1)"
        )

    def on_train_epoch_end(self) -> None:
        """Log the epoch, and step a plateau schedule before the checkpoint is written, so that none of it is lost."""
        if self._steps:
            self._log_steps()
        loss, acc = self.train_means.finish()
        self._show({"train/loss": loss, "train/acc": acc, "lr": self._epoch_lr})
        measured = self.trainer.callback_metrics
        names = ["train/loss", "train/acc", "lr"]
        if self.trainer.fit_loop.epoch_loop._should_check_val_epoch() and "val/loss" in measured:
            names += ["val/loss", "val/acc"]
        self._log({name: float(measured[name]) for name in names}, self.current_epoch + 1)
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(float(measured["val/loss" if "val/loss" in measured else "train/loss"]))

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step any schedule but a plateau, which on_train_epoch_end steps (lightning issue 14699)."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def configure_optimizers(self) -> Any:
        """The optimizer over all parameters, and the schedule with its interval.

        Raises:
            UserError: a setting that the optimizer or the schedule refuses.
        """
        optimizer, scheduler = self._optimizer_and_scheduler(self.parameters(), self._total_steps)
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, OneCycleLR):
            with _refusals_name("model.lr_scheduler"):
                if scheduler.total_steps < (steps := self._total_steps()):
                    raise ValueError(
                        f"total_steps={scheduler.total_steps} is less than the training's {steps}; leave it out"
                    )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": self.lr_interval,
                "monitor": "val/loss",
                # Missing only where validation is switched off; then the training loss is used.
                "strict": False,
            },
        }

    def check_optimizers(self) -> None:
        """Try the optimizer and the schedule for a step, before the data is loaded.

        Raises:
            UserError: a setting that one of them refuses.
        """
        weights, bias = torch.ones(2, 2, 3, 3), torch.ones(2)
        if self.channels_last is not False:
            weights = weights.to(memory_format=torch.channels_last)
        parameters = [torch.nn.Parameter(weights), torch.nn.Parameter(bias)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer, scheduler = self._optimizer_and_scheduler(parameters, lambda: 1000)
        if not any(group.get("capturable") for group in optimizer.param_groups):  # which is for a GPU alone
            with _refusals_name("model.optimizer"):
                optimizer.step(lambda: torch.ones(()))
        with _refusals_name("model.lr_scheduler"):
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(1.0)
            elif scheduler is not None:
                scheduler.step()

    def _optimizer_and_scheduler(self, parameters: Iterable[Tensor], total_steps: Callable[[], int]) -> Any:
        with _refusals_name("model.optimizer"):
            optimizer = self.optimizer(parameters)
            for group in optimizer.param_groups:
                if not math.isfinite(group["lr"]):
                    raise ValueError(f"lr={group['lr']} must be finite")
        if self.lr_scheduler is None:
            return optimizer, None
        with _refusals_name("model.lr_scheduler"):
            scheduler = self.lr_scheduler
            if self.fits_schedule:
                scheduler = partial(scheduler, total_steps=total_steps())  # type: ignore[call-arg]
            return optimizer, scheduler(optimizer)

    def _total_steps(self) -> int:
        """Steps of the schedule over the whole training, in the unit of `lr_interval`."""
        trainer = self.trainer
        total = trainer.max_epochs if self.lr_interval == "epoch" else trainer.estimated_stepping_batches
        if total is None or total < 1 or total == math.inf:
            raise ValueError("a schedule over the whole training needs its end; set trainer.max_epochs")
        if self.lr_interval == "epoch":
            return int(total)
        # For the estimate the loader was built, before it is told at which batch to go on.
        trainer.fit_loop._combined_loader = None
        if self._resumed_at is not None and trainer.max_steps < 0:
            # With other processes or another accumulation than before, an epoch has another number of steps.
            epochs, batches, steps = self._resumed_at
            per_epoch = total // max(1, trainer.max_epochs or 1)
            total += steps - epochs * per_epoch - batches // trainer.accumulate_grad_batches
        return max(1, int(total))

    # Evaluation

    def _evaluate(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = self._evaluation_logits(images)
        self.evaluation_means.note(self._loss(logits, labels), logits, labels)
        return logits

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Images (B, 3, H, W) and labels (B,) → logits (B, num_classes), for callbacks."""
        return self._evaluate(batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Images (B, 3, H, W) and labels (B,)."""
        logits = self._evaluate(batch)
        self.test_confusion.update(logits.argmax(1), batch[1])

    def on_test_epoch_start(self) -> None:
        """Count from nothing."""
        self.test_confusion.reset()

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Images (B, 3, H, W) → probabilities (B, num_classes)."""
        return self._evaluation_logits(batch[0]).float().softmax(1)

    def on_validation_epoch_end(self) -> None:
        """Make val/loss and val/acc known to schedules and checkpoints."""
        loss, acc = self.evaluation_means.finish()
        if self.trainer.training and not math.isfinite(loss):
            self._stop_at(self.global_step)
        self._show({"val/loss": loss, "val/acc": acc})

    def on_test_epoch_end(self) -> None:
        """Log the test figures at the epoch of the tested checkpoint."""
        loss, acc = self.evaluation_means.finish()
        self._show({"test/loss": loss, "test/acc": acc})
        self._log({"test/loss": loss, "test/acc": acc}, self._tested_epoch)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which epoch the checkpoint is of, from 1, and how far it was; where it is resumed, go on from there."""
        self._tested_epoch = checkpoint["epoch"] + 1
        self._broken_off = checkpoint["broken_off"]
        if self._trainer is not None and self.trainer.training:
            self._resume(checkpoint)

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        """Fit a checkpoint to the trainer's number of processes and epochs, as far as these differ."""
        loop = checkpoint["loops"]["fit_loop"]
        (loader,) = loop["state_dict"]["combined_loader"]
        here = trained_with(self.trainer)
        there = checkpoint.get("trained_with", here)
        if loader["taken"] and there["processes"] != here["processes"]:
            # One order of the images is dealt out to all, so that as many are behind as before, rounded down.
            taken = loader["taken"] * there["processes"] // here["processes"]
            loader["taken"] = min(taken, len(self.trainer.datamodule.train_dataloader()) - 1)  # type: ignore[attr-defined]
            progress = loop["epoch_loop.batch_progress"]["current"]
            done = {"ready": 0, "started": 0, "processed": 0, "completed": progress["completed"] - progress["ready"]}
            progress.update({name: loader["taken"] + value for name, value in done.items()})
        self._resumed_at = (epochs_of(checkpoint), loader["taken"], checkpoint["global_step"])
        if self.fits_schedule:
            for state in checkpoint["lr_schedulers"]:
                for name in ("total_steps", "_schedule_phases"):  # the schedule just built knows them better
                    state.pop(name, None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the epoch's figures, and in the middle of an epoch what it has summed up so far."""
        if self._steps:
            self._log_steps()
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
        checkpoint["saved_at"] = time.time()  # all that was logged up to now is on the disk
        checkpoint["trained_with"] = trained_with(self.trainer)
        checkpoint["optimization"] = self.optimization
        checkpoint["figures"] = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        checkpoint["broken_off"] = {"lr": self._epoch_lr, "means": self.train_means.state_dict()}

    # Logging

    def _show(self, values: dict[str, float]) -> None:
        """Make values known to callbacks, as float64: they are already means over all processes."""
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
        self.log_dict(tensors, logger=False, on_epoch=True, on_step=False, batch_size=1, rank_zero_only=False)

    def _log(self, values: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log_metrics(values, step)
