"""What TensorBoard shows of the network itself: pictures, the health of its gates, its graph and hyperparameters."""

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from cbam_pl.data.datamodule import ImageDataModule
from cbam_pl.data.images import Images
from cbam_pl.data.loader import Normalise
from cbam_pl.inspect.drawing import Pictured, describe, draw_attention, draw_confusion, draw_features
from cbam_pl.inspect.gates import (
    CONSTANT,
    AttentionMaps,
    attention_maps,
    feature_maps,
    gate_health,
    is_constant,
    unwrap,
)
from cbam_pl.inspect.page import rasterise
from cbam_pl.training.classifier import Classifier

# Sorted after lr, train and val: TensorBoard opens the first groups of charts, and those are the ones to see first.
_GATES = "val_gates"
_NUM_PICTURED = 8  # validation images in the pictures
_NUM_PROBED = 64  # validation images that the gates' health is measured on; the pictured are every eighth of them


class NetworkMonitor(Callback):
    """Pictures, gate health, the graph and the final hyperparameters, in every TensorBoard logger of a Classifier.

    It only looks: a training with it gives the same weights, bit for bit, as one without.

    Args:
        pictures_every: epochs from one set of pictures to the next; the first and the last epoch always have one; 0:
            no pictures.

    Raises:
        ValueError: pictures_every is below 0.
    """

    def __init__(self, pictures_every: int = 5) -> None:
        if pictures_every < 0:
            raise ValueError(f"pictures_every={pictures_every} must be at least 0, which means no pictures")
        self.pictures_every = pictures_every
        self._probed: Images | None = None  # none on all processes but the first
        self._inputs = torch.empty(0)  # (N, 3, H, W), the probed images, normalised
        self._classes: list[str] = []
        self._predictions: list[tuple[Tensor, Tensor]] = []  # predicted and true classes of the last validation
        self._epoch = 0  # the last finished one, from 1
        self._pictured_epoch = 0
        self._warned: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the images, evenly over the validation split, and draw the graph of a new run."""
        data = getattr(trainer, "datamodule", None)
        writers = _writers(trainer)
        if not writers or not isinstance(pl_module, Classifier) or not isinstance(data, ImageDataModule):
            return
        images = data.images("val")
        self._probed = images.subset(torch.linspace(0, len(images) - 1, min(_NUM_PROBED, len(images))).long())
        pixels = self._probed.pixels.to(pl_module.device).float() / 255
        self._inputs = Normalise(data.mean, data.std, pixels.device)(pixels)
        self._classes = data.classes
        if trainer.global_step == 0:
            for writer in writers:
                _add_graph(writer, pl_module.network, self._inputs[:1])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last validation's predictions."""
        self._predictions.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the predictions on the device, for the confusion matrix."""
        if self.pictures_every and isinstance(outputs, Tensor):
            self._predictions.append((outputs.argmax(1), batch[1]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the gates' health, and the pictures in the first epoch and in each `pictures_every`-th."""
        self._epoch = trainer.current_epoch + 1
        maps = self._log_health(trainer, pl_module)
        if self.pictures_every and (self._epoch == 1 or self._epoch % self.pictures_every == 0):
            self._log_pictures(trainer, pl_module, maps)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the last epoch's pictures where they are missing, and the hyperparameters with the final figures."""
        if self.pictures_every and self._epoch > self._pictured_epoch:
            maps = {} if self._probed is None else attention_maps(pl_module.network, self._inputs)  # type: ignore[arg-type]
            self._log_pictures(trainer, pl_module, maps)
        for writer in _writers(trainer) if self._epoch else []:  # a run that was complete already trains no epoch
            _add_hyperparameters(writer, trainer, pl_module)
            writer.flush()

    def _log_health(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, AttentionMaps]:
        if self._probed is None:
            return {}
        maps = attention_maps(pl_module.network, self._inputs)  # type: ignore[arg-type]
        for block, gates in maps.items():
            for name, value in gate_health(gates).items():
                for writer in _writers(trainer):
                    writer.add_scalar(f"{_GATES}/{block}/{name}", value, self._epoch)
            if is_constant(gates) and gates.spatial is not None:
                mean = float(gates.spatial.mean())
                self._warn_once(
                    block,
                    f"the spatial gate of {block} is constant in epoch {self._epoch}: {mean:.3f} everywhere, with a "
                    f"standard deviation below {CONSTANT} in each of {len(self._inputs)} validation images; it scales "
                    "all places alike, so the block attends to no place, and the gate costs time for nothing (said "
                    f"once; {_GATES}/{block}/spatial_std shows whether it stays so)",
                )
        return maps

    def _log_pictures(self, trainer: Trainer, pl_module: LightningModule, maps: Mapping[str, AttentionMaps]) -> None:
        self._pictured_epoch = self._epoch
        counts = self._confusion(trainer, pl_module)  # all processes take part
        if self._probed is None:
            return
        chosen = torch.arange(0, len(self._probed), max(1, len(self._probed) // _NUM_PICTURED))[:_NUM_PICTURED]
        features = feature_maps(pl_module.network, self._inputs[chosen.to(self._inputs.device)])  # type: ignore[arg-type]
        shown = self._probed.subset(chosen)
        names = [self._classes[label] for label in shown.labels]
        pictured = Pictured(shown.pixels, describe(features.logits, self._classes, names))
        epoch = f"epoch {self._epoch}"
        drawings: dict[str, Callable[[], Figure]] = {
            "features": lambda: draw_features(pictured, features, f"Features\n{epoch}")
        }
        if maps:
            gates = {block: _take(gates, chosen) for block, gates in maps.items()}
            drawings["attention"] = lambda: draw_attention(pictured, gates, f"Attention\n{epoch}")
        if counts is not None:
            total = int(counts.sum())
            title = f"Confusion of {total:,} validation images\n{epoch}"
            drawings["confusion"] = lambda: draw_confusion(counts, self._classes, title)
        for name, draw in drawings.items():
            try:
                image = rasterise(draw())
            except ValueError as error:
                # A training is not to end for a picture.
                self._warn_once(f"pictures/{name}", f"no pictures/{name} in {epoch}: {error}")
                continue
            for writer in _writers(trainer):
                writer.add_image(f"pictures/{name}", image, self._epoch, dataformats="HWC")

    def _confusion(self, trainer: Trainer, pl_module: LightningModule) -> Tensor | None:
        """Images by true and predicted class (classes, classes) over all processes; None without a validation."""
        if not self._predictions:
            return None
        predicted, true = (torch.cat(parts).cpu() for parts in zip(*self._predictions, strict=True))
        self._predictions.clear()
        classes = int(pl_module.hparams["num_classes"])
        counts = torch.bincount(true * classes + predicted, minlength=classes**2).view(classes, classes)
        if trainer.world_size > 1:
            counts = trainer.strategy.reduce(counts.to(pl_module.device), reduce_op="sum")
        return counts.cpu()

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            rank_zero_warn(message)


def _take(gates: AttentionMaps, chosen: Tensor) -> AttentionMaps:
    parts = ((None if gate is None else gate[chosen.to(gate.device)]) for gate in (gates.channel, gates.spatial))
    return AttentionMaps(*parts)


def _writers(trainer: Trainer) -> list[SummaryWriter]:
    """TensorBoard's writers; none on all processes but the first."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _add_graph(writer: SummaryWriter, network: nn.Module, image: Tensor) -> None:
    plain = deepcopy(unwrap(network)).float().cpu().eval()  # in evaluation nothing is drawn at random
    # Without gradients, or the tracer's own check fails: it runs the network once with and once without them.
    with torch.no_grad(), warnings.catch_warnings():
        # torch.jit.trace, deprecated, is still how TensorBoard's graph is made.
        warnings.filterwarnings("ignore", ".*torch.jit", FutureWarning)
        warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
        writer.add_graph(plain, image.float().cpu())


def _add_hyperparameters(writer: SummaryWriter, trainer: Trainer, pl_module: LightningModule) -> None:
    """An entry of the HPARAMS tab, with the run's last loss and accuracy."""
    data = getattr(trainer, "datamodule", None)
    values = {
        **_flatten(pl_module.hparams, "model"),
        **({} if data is None else _flatten(data.hparams, "data")),
        "max_epochs": trainer.max_epochs,
        "precision": trainer.precision,
    }
    for optimizer in trainer.optimizers:
        values["optimizer"] = type(optimizer).__name__
        for name in ("lr", "weight_decay", "momentum"):
            if name in optimizer.defaults:
                values[name] = float(optimizer.defaults[name])
    for config in trainer.lr_scheduler_configs:
        values["lr_scheduler"] = type(config.scheduler).__name__
    plain = (bool, int, float, str)
    known = {name: value if isinstance(value, plain) else str(value) for name, value in values.items()}
    # Names of scalars that are there already. SummaryWriter.add_hparams would write them again, as another run.
    measured = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
    for summary in hparams(known, measured):
        writer._get_file_writer().add_summary(summary)


def _flatten(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}.{name}")
        else:
            flat[f"{prefix}.{name}"] = value
    return flat
