"""Log the network itself to TensorBoard: pictures, statistics of its gates, its graph and hyperparameters."""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from cbam_pl.attention_parts import IdentityStart
from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.data.images import Images
from cbam_pl.errors import Interrupted
from cbam_pl.inspect import drawing, gates
from cbam_pl.process import quiet_tracing

# Sorted after lr, train and val: TensorBoard opens the first groups of charts, and those are the ones to see first.
_GATES = "val_gates"
_PLACES = {"channel": "channels", "spatial": "positions"}  # what a gate weighs
_NUM_PICTURED = 8  # validation images in the pictures
_NUM_PROBED = 64  # validation images for the gates' statistics; every eighth of them is pictured


class NetworkMonitor(Callback):
    """Logs pictures, gate statistics, the graph and final hyperparameters of a Classifier to each TensorBoard logger.

    Training with it gives the same weights, bit for bit, as without.

    Args:
        pictures_every: epochs between sets of pictures; the first and the last epoch always have one; 0: no pictures.
    """

    def __init__(self, pictures_every: int = 5) -> None:
        if pictures_every < 0:
            raise ValueError(f"pictures_every={pictures_every} must be at least 0, which means no pictures")
        self.pictures_every = pictures_every
        self._probed: Images | None = None  # on the first process only
        self._inputs = torch.empty(0)  # (N, 3, H, W), the probed images, normalised
        self._classes: list[str] = []
        self._predictions: list[tuple[Tensor, Tensor]] = []  # predicted and true classes, by batch
        self._validated_epoch = 0  # whose validation the predictions are of, from 1
        self._epoch = 0  # the last finished one, from 1
        self._pictured_epoch = 0
        self._warned: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the images, evenly over the validation split, and draw the graph of a new run."""
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if not (writers := _writers(trainer)):
            return
        images = data.images("val")
        self._probed = images.subset(torch.linspace(0, len(images) - 1, min(_NUM_PROBED, len(images))).long())
        self._inputs = data.normalise(self._probed.pixels.to(pl_module.device))
        self._classes = data.classes
        for writer in writers if trainer.global_step == 0 else []:
            try:
                _add_graph(writer, pl_module.network, self._inputs[:1])  # type: ignore[arg-type]
            except Exception as error:  # whatever tracing raises at a network of the user's, which trains all the same
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self._warn_once("graph", f"no graph in TensorBoard, since the network cannot be traced ({reason})")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the predictions of the last validation."""
        self._predictions.clear()
        self._validated_epoch = 0 if trainer.sanity_checking else trainer.current_epoch + 1

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        """Keep the predictions on the device, for the confusion matrix."""
        if self.pictures_every:
            self._predictions.append((outputs.argmax(1), batch[1]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the gates' statistics, and pictures in the first and in every `pictures_every`-th epoch."""
        self._epoch = trainer.current_epoch + 1
        self._log_health(trainer, pl_module)
        if self.pictures_every and (self._epoch == 1 or self._epoch % self.pictures_every == 0):
            self._log_pictures(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the last epoch's pictures unless they are there, and the hyperparameters with the final metrics."""
        if self.pictures_every and self._epoch > self._pictured_epoch:
            self._log_pictures(trainer, pl_module)
        self._log_hyperparameters(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log the hyperparameters, but no picture, where max_steps or max_time end the training inside an epoch."""
        if isinstance(exception, Interrupted) and not exception.number:
            self._log_hyperparameters(trainer, pl_module)

    def _log_hyperparameters(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for writer in _writers(trainer) if self._epoch else []:  # a run that was complete trains no epoch
            _add_hyperparameters(writer, trainer, pl_module)
            writer.flush()

    def _log_health(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._probed is None:
            return
        for path, module in pl_module.network.named_modules():  # type: ignore[union-attr]
            if isinstance(module, IdentityStart):
                for writer in _writers(trainer):
                    writer.add_scalar(f"{_GATES}/{path.removesuffix('.attention')}/factor", module.factor, self._epoch)
        try:
            blocks = gates.attention_maps(pl_module.network, self._inputs)  # type: ignore[arg-type]
        except ValueError as error:  # at a network of the user's, which trains all the same
            self._warn_once("gates", f"no statistics of the gates in TensorBoard: {error}")
            return
        for block, maps in blocks.items():
            for name, value in gates.gate_health(maps).items():
                for writer in _writers(trainer):
                    writer.add_scalar(f"{_GATES}/{block}/{name}", value, self._epoch)
            for name, mean in gates.constant_gates(maps).items():
                self._warn_once(
                    f"{block} {name}",
                    f"the {name} gate of {block} is constant in epoch {self._epoch}: {mean:.3f} everywhere, with a "
                    f"standard deviation below {gates.CONSTANT_STD} in each of {len(self._inputs)} validation images; "
                    f"it scales all {_PLACES[name]} alike, so it attends to none, and only costs time (warned once; "
                    f"{_GATES}/{block}/{name}_std shows whether it stays so)",
                )

    def _log_pictures(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pictured_epoch = self._epoch
        counts = self._confusion(trainer, pl_module)  # a collective operation of all processes
        if self._probed is None:
            return
        step = max(1, len(self._probed) // _NUM_PICTURED)
        chosen = slice(0, step * _NUM_PICTURED, step)
        network, inputs = pl_module.network, self._inputs[chosen]
        epoch, pictures = f"epoch {self._epoch}", {}
        try:
            features, maps = gates.feature_maps(network, inputs), gates.attention_maps(network, inputs)  # type: ignore[arg-type]
            logits = gates.logits_of(network, inputs, pl_module.hparams["test_time_flip"])  # type: ignore[arg-type]
        except ValueError as error:
            self._warn_once("maps", f"no pictures/features and pictures/attention in TensorBoard: {error}")
        else:
            headings = [f"true: {self._classes[label]}" for label in self._probed.labels[chosen]]
            captions = drawing.describe(logits, self._classes, headings)
            images = drawing.CaptionedImages(self._probed.pixels[chosen], captions)
            pictures["features"] = partial(drawing.draw_features, images, features, f"Features\n{epoch}")
            if maps:
                pictures["attention"] = partial(drawing.draw_attention, images, maps, f"Attention\n{epoch}")
        if counts is not None:
            title = f"Confusion of {int(counts.sum()):,} validation images\n{epoch}"
            pictures["confusion"] = partial(drawing.draw_confusion, counts, self._classes, title)
        for name, draw in pictures.items():
            try:
                image = drawing.rasterise(draw())
            except ValueError as error:  # which must not end the training
                self._warn_once(f"pictures/{name}", f"no pictures/{name} in epoch {self._epoch}: {error}")
                continue
            for writer in _writers(trainer):
                writer.add_image(f"pictures/{name}", image, self._epoch, dataformats="HWC")

    def _confusion(self, trainer: Trainer, pl_module: LightningModule) -> Tensor | None:
        """Images by true and predicted class (classes, classes) of all processes; None without a validation."""
        if not self._predictions or self._validated_epoch != self._epoch:
            return None
        predicted, true = (torch.cat(parts) for parts in zip(*self._predictions, strict=True))
        self._predictions.clear()
        classes = int(pl_module.hparams["num_classes"])
        counts = torch.bincount(true * classes + predicted, minlength=classes**2).view(classes, classes)
        return trainer.strategy.reduce(counts, reduce_op="sum").cpu()

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            rank_zero_warn(message)


def _writers(trainer: Trainer) -> list[SummaryWriter]:
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def _add_graph(writer: SummaryWriter, network: nn.Module, image: Tensor) -> None:
    plain = deepcopy(gates.unwrap(network)).float().cpu().eval()  # evaluation mode is deterministic
    # no_grad, since the tracer's check runs the network with and without gradients, and fails on the difference.
    with torch.no_grad(), quiet_tracing():
        writer.add_graph(plain, image.float().cpu())


def _add_hyperparameters(writer: SummaryWriter, trainer: Trainer, pl_module: LightningModule) -> None:
    model = dict(pl_module.hparams)
    groups = {"model.attention": model.pop("attention"), "model": model, "data": trainer.datamodule.hparams}  # type: ignore[attr-defined]
    values = {f"{group}.{name}": value for group, settings in groups.items() for name, value in settings.items()}
    values |= {"max_epochs": trainer.max_epochs, "precision": trainer.precision}
    for optimizer in trainer.optimizers:
        values["optimizer"] = type(optimizer).__name__
        names = [name for name in ("lr", "weight_decay", "momentum") if name in optimizer.defaults]
        values |= {name: float(optimizer.defaults[name]) for name in names}
    for config in trainer.lr_scheduler_configs:
        values["lr_scheduler"] = type(config.scheduler).__name__
    known = {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in values.items()}
    # The names of scalars that are logged already. The public ways, Logger.log_hyperparams and add_hparams, write their
    # values once more: at this step, though the last validation may be epochs ago, or as another run.
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
    file_writer: Any = writer.file_writer  # None only if nothing was ever logged
    for summary in hparams(known, metrics) if file_writer is not None else ():
        file_writer.add_summary(summary)
