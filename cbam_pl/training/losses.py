"""What a Classifier brings into every training: the loss of each step, in the logs and on the progress bar."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, stack, tensor

from cbam_pl.errors import UserError

if TYPE_CHECKING:
    from cbam_pl.training.classifier import Classifier  # which imports this file


class StepLosses(Callback):
    """Log train/loss_step, and stop a training whose loss is not finite with a UserError.

    The losses stay on the device until some are fetched together, so that no step waits for it.
    """

    FETCH_EVERY = 50  # batches

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}  # for the progress bar: of the batches that were fetched last
        self._pending: list[tuple[int, Tensor, int]] = []  # optimizer step, mean loss, images
        self._last_step = 0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin where the training begins or resumes."""
        self._last_step = trainer.global_step
        self._since = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the speed of training alone, without the validation before."""
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the loss, and fetch those of the last batches now and then."""
        step = max(trainer.global_step, self._last_step + 1)  # more batches follow until an accumulated step is taken
        # Lightning has divided the loss by the number of batches that are accumulated.
        self._pending.append((step, outputs["loss"] * trainer.accumulate_grad_batches, len(batch[1])))
        if trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            if len(self._pending) >= self.FETCH_EVERY:
                self._fetch(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where the validation loss is not finite."""
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.state.fn == "fit" and loss is not None and not math.isfinite(loss):
            raise not_finite(trainer, trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Fetch: all steps up to a checkpoint are in the logs, since a resumed run logs only those after it."""
        self._fetch(trainer, pl_module)

    def _fetch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._pending:
            return
        steps, losses, sizes = zip(*self._pending, strict=True)
        self._pending.clear()
        counts = tensor(sizes, device=losses[0].device)
        sums = stack([stack(losses) * counts, counts])  # (2, batches)
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        by_step: dict[int, tuple[float, float]] = {}
        for step, loss_sum, count in zip(steps, *sums.tolist(), strict=True):
            total = by_step.get(step, (0.0, 0.0))
            by_step[step] = (total[0] + loss_sum, total[1] + count)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        for step, (loss_sum, count) in by_step.items():
            if not math.isfinite(loss_sum):
                raise not_finite(trainer, step)
            if every and step % every == 0:
                for logger in trainer.loggers:
                    logger.log_metrics({"train/loss_step": loss_sum / count}, step)
        now, (loss_sum, count) = time.monotonic(), sums.sum(1).tolist()
        self.figures = {"loss": loss_sum / count, "images/s": count / (now - self._since)}
        metric = cast("Classifier", pl_module).train_metric  # of this process, since the epoch began
        self.figures["acc"] = float(metric.num_correct / metric.num_images)
        self._since = now

    on_validation_start = _fetch  # the epoch's last losses, before the validation, whose time is not theirs
    on_train_epoch_end = _fetch  # what is left where there was no validation


def not_finite(trainer: Trainer, step: int) -> UserError:
    """What to report when the loss is not finite."""
    lr = trainer.optimizers[0].param_groups[0]["lr"]
    saved = [str(getattr(callback, "best_model_path", "")) for callback in trainer.checkpoint_callbacks]
    saved = [path for path in saved if path and Path(path).is_file()]
    rescue = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
    return UserError(
        f"the loss is not finite at step {step} (learning rate {lr:.3g}); {rescue}; lower the learning rate, or clip "
        "gradients (--trainer.gradient_clip_val 1)"
    )
